"""How each operator carries the sequence dimension from its inputs to its result."""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from . import canonical
from .layout import Dim, Factor, Layout, dim, has_sequence, is_sequence, regroup
from .nodes import CASTS, argument, arguments, expression, op_name, rank, same_size
from .sequence import Kept, Rule, SequencePlan, UntrackedSequenceError, example_sizes, is_empty_tensor

_ARITHMETIC = frozenset(
    {"add", "sub", "rsub", "mul", "div", "pow", "maximum", "minimum", "where", "masked_fill", "clamp", "clip"}
    | {"add_", "sub_", "mul_", "div_", "masked_fill_", "eq", "ne", "lt", "gt", "le", "ge", "and_", "or_"}
    | {"logical_and", "logical_or"}
)
_FUNCTIONS = frozenset(
    {
        "rsqrt",
        "sqrt",
        "square",
        "exp",
        "exp2",
        "log",
        "tanh",
        "sigmoid",
        "erf",
        "cos",
        "sin",
        "neg",
        "abs",
        "reciprocal",
    }
    | {"silu", "gelu", "relu", "relu6", "leaky_relu", "elu", "softplus", "mish", "hardswish", "invert", "logical_not"}
)
_SAME = [*CASTS, "dropout", "dropout_", "contiguous", "clone", "detach", "alias", "relu_", "silu_"]
_REDUCTIONS = ["mean", "sum", "amax", "amin", "var", "std", "argmax", "argmin", "all", "any", "logsumexp"]


def rules() -> dict[Any, Rule]:
    """Rules by operator name, and by function for canonical nodes."""
    table: dict[Any, Rule] = {name: _pointwise for name in _ARITHMETIC | _FUNCTIONS}
    table |= {name: _same for name in _SAME}
    table |= {name: _reduction for name in _REDUCTIONS}
    table |= {name: _along for name in ("softmax", "log_softmax")}
    table |= {name: _view for name in ("view", "reshape", "flatten", "unflatten")}
    table |= {name: _split for name in ("split", "chunk", "tensor_split", "unbind")}
    table |= {"linear": _linear, "addmm": _addmm, "mm": _matmul, "bmm": _matmul, "matmul": _matmul}
    table |= {"layer_norm": _norm, "rms_norm": _norm, "expand": _expand, "getitem": _getitem, "cat": _cat}
    table |= {"transpose": _transpose, "permute": _permute, "unsqueeze": _unsqueeze, "squeeze": _squeeze}
    table |= {"scaled_dot_product_attention": _attention, canonical.attention: _attention}
    return table


def _pointwise(plan: SequencePlan, node: Node) -> Layout:
    operands = [value for value in [*node.args, *node.kwargs.values()] if isinstance(value, Node)]
    if (op_name(node) or "").endswith("_") and op_name(node) not in ("and_", "or_"):
        plan.need(node, node.args[0])
    return plan.broadcast(node, operands, len(example_sizes(node)))


def _same(plan: SequencePlan, node: Node) -> Layout:
    if plan.layout(node.args[0]) is None and op_name(node) == "type_as":
        raise UntrackedSequenceError(node, "a tensor from outside takes only its dtype from the sequence")
    return plan.need(node, node.args[0])


def _check_untouched(node: Node, layout: Layout, places: Any) -> None:
    """Raises when an operator mixes sequence positions."""
    for place in places:
        if has_sequence(layout[place]):
            raise UntrackedSequenceError(node, f"it mixes positions of the sequence (dimension {place})")


def _reduction(plan: SequencePlan, node: Node) -> Layout:
    layout = plan.need(node, node.args[0])
    given = argument(node, 1, "dim")
    keep = argument(node, 2, "keepdim", False)
    dims = range(len(layout)) if given is None else (given if isinstance(given, list | tuple) else [given])
    places = {place % len(layout) for place in dims}
    _check_untouched(node, layout, places)
    if keep:
        return tuple(() if i in places else d for i, d in enumerate(layout))
    return tuple(d for i, d in enumerate(layout) if i not in places)


def _along(plan: SequencePlan, node: Node) -> Layout:
    return plan.need(node, node.args[0])


def _norm(plan: SequencePlan, node: Node) -> Layout:
    layout = plan.need(node, node.args[0])
    normalized = argument(node, 1, "normalized_shape")
    _check_untouched(node, layout, range(len(layout) - len(normalized), len(layout)))
    return layout


def _linear(plan: SequencePlan, node: Node) -> Layout:
    layout = plan.need(node, node.args[0])
    _check_untouched(node, layout, [len(layout) - 1])
    if any(source in plan.layouts for source in arguments(node)[1:] if isinstance(source, Node)):
        raise UntrackedSequenceError(node, "its weight depends on the sequence")
    return (*layout[:-1], dim(example_sizes(node)[-1]))


def _addmm(plan: SequencePlan, node: Node) -> Layout:
    bias, left, right = arguments(node)[:3]
    layout = plan.need(node, left)
    _check_untouched(node, layout, [1])
    if right in plan.layouts or rank(bias) != 1 or bias in plan.layouts:
        raise UntrackedSequenceError(node, "its weight or bias depends on the sequence")
    return (layout[0], dim(example_sizes(node)[-1]))


def _matmul(plan: SequencePlan, node: Node) -> Layout:
    left, right = arguments(node)[:2]
    if (rank(left) or 0) < 2 or (rank(right) or 0) < 2:
        raise UntrackedSequenceError(node, "it multiplies vectors")
    a, b = plan.layout(left), plan.layout(right)
    contracted = [layout[place] for layout, place in ((a, -1), (b, -2)) if layout is not None]
    if len({has_sequence(d) for d in contracted}) > 1 or (len(contracted) == 1 and has_sequence(contracted[0])):
        raise UntrackedSequenceError(node, "it contracts the sequence with something else")
    ndim = len(example_sizes(node))
    rows = a[-2] if a is not None else dim(example_sizes(node)[-2])
    columns = b[-1] if b is not None else dim(example_sizes(node)[-1])
    leading: list[Dim] = []
    for place in range(ndim - 2):
        own = [x[place - ndim] for x in (a, b) if x is not None and len(x) >= ndim - place]
        leading.append(next((d for d in own if d), ()))
        if has_sequence(leading[-1]) and (a is None or b is None) and (rank(right if b is None else left) or 0) > 2:
            raise UntrackedSequenceError(node, "a tensor from outside has its own matrix for each position")
    return (*leading, rows, columns)


def _attention(plan: SequencePlan, node: Node) -> Layout:
    q, k, v = arguments(node)[:3]
    if op_name(node) == "scaled_dot_product_attention":
        q, k, v = (argument(node, i, name) for i, name in enumerate(("query", "key", "value")))
    layout = plan.need(node, q)
    keys, values = plan.layout(k), plan.layout(v)
    if (keys is None) != (values is None) or any(x is not None and not is_sequence(x[-2]) for x in (keys, values)):
        raise UntrackedSequenceError(node, "its keys and values do not both have the sequence in dimension -2")
    key_positions = keys[-2] if keys is not None else ()
    mask = argument(node, 3, "mask", argument(node, 3, "attn_mask"))
    if mask in plan.layouts:
        raise UntrackedSequenceError(node, "its mask depends on the hidden states")
    if mask is not None:
        plan.align(node, (*layout[:-1], key_positions), mask)
    return (*layout[:-1], dim(example_sizes(node)[-1]))


def _given_sizes(node: Node, first: int) -> list[Any] | None:
    """Sizes named by a view or expand call from argument ``first`` on, or None when they are not spelled out."""
    given = list(arguments(node)[first:]) or [v for k, v in node.kwargs.items() if k in ("shape", "size", "sizes")]
    if len(given) == 1:
        only = given[0]
        if isinstance(only, list | tuple):
            return list(only)
        if op_name(only) == "Size":
            return list(arguments(only)[0])
        if isinstance(only, Node) and isinstance(only.meta.get("example_value"), tuple):
            return None
    return given


def _resized(plan: SequencePlan, given: list[Any], layout: Layout) -> list[Any]:
    """The sizes of a call with those of sequence dimensions replaced; -1 and sizes read from narrowed tensors stay."""

    def stays(size: Any, d: Dim) -> bool:
        return not has_sequence(d) or size == -1 or (isinstance(size, Node) and size in plan.inside)

    return [size if stays(size, d) else Kept(d) for size, d in zip(given, layout, strict=True)]


def _view(plan: SequencePlan, node: Node) -> Layout:
    source = arguments(node)[0]
    layout = plan.need(node, source)
    found = regroup(layout, example_sizes(node))
    if found is None:
        raise UntrackedSequenceError(node, "it splits the sequence")
    name = op_name(node)
    if name in ("view", "reshape"):
        if any(isinstance(size, Node) and size in plan.layouts for size in arguments(node)[1:]):
            raise UntrackedSequenceError(node, "its sizes are data")
        given = _given_sizes(node, 1)
        if given is not None:
            new = _resized(plan, given, found)
            if new != given:
                plan.arguments[node] = (source, tuple(new))
        elif not any(size in plan.inside for size in node.all_input_nodes if size is not source):
            raise UntrackedSequenceError(node, "its sizes are not spelled out")
    elif name == "unflatten":
        place = argument(node, 1, "dim") % len(layout)
        given = list(argument(node, 2, "sizes"))
        new = _resized(plan, given, found[place : place + len(given)])
        if new != given:
            plan.arguments[node] = (source, place, tuple(new))
    return found


def _expand(plan: SequencePlan, node: Node) -> Layout:
    source = arguments(node)[0]
    layout = plan.need(node, source)
    wanted = example_sizes(node)
    lead = len(wanted) - len(layout)
    found = [dim(size) for size in wanted[:lead]]
    found += [own or dim(size) for own, size in zip(layout, wanted[lead:], strict=True)]
    given = _given_sizes(node, 1)
    if given is None:
        raise UntrackedSequenceError(node, "its sizes are not spelled out")
    new = _resized(plan, given, tuple(found))
    if new != given:
        plan.arguments[node] = (source, tuple(new))
    return tuple(found)


def _split(plan: SequencePlan, node: Node) -> list[Layout]:
    layout = plan.need(node, node.args[0])
    name = op_name(node)
    place = argument(node, 1 if name == "unbind" else 2, "dim", 0) % len(layout)
    _check_untouched(node, layout, [place])
    parts = []
    for value in node.meta["example_value"]:
        kept = layout[:place] + layout[place + 1 :]
        parts.append(kept if name == "unbind" else (*layout[:place], dim(value.shape[place]), *layout[place + 1 :]))
    return parts


def _transpose(plan: SequencePlan, node: Node) -> Layout:
    layout = list(plan.need(node, node.args[0]))
    a, b = argument(node, 1, "dim0"), argument(node, 2, "dim1")
    layout[a], layout[b] = layout[b], layout[a]
    return tuple(layout)


def _permute(plan: SequencePlan, node: Node) -> Layout:
    layout = plan.need(node, node.args[0])
    given = argument(node, 1, "dims")
    order = given if isinstance(given, list | tuple) else arguments(node)[1:]
    return tuple(layout[place] for place in order)


def _unsqueeze(plan: SequencePlan, node: Node) -> Layout:
    layout = list(plan.need(node, node.args[0]))
    place = argument(node, 1, "dim")
    layout.insert(place if place >= 0 else place + len(layout) + 1, ())
    return tuple(layout)


def _squeeze(plan: SequencePlan, node: Node) -> Layout:
    layout = list(plan.need(node, node.args[0]))
    given = argument(node, 1, "dim")
    if not isinstance(given, int):
        raise UntrackedSequenceError(node, "which dimensions it removes depends on their sizes")
    if len(example_sizes(node)) < len(layout):
        layout.pop(given)
    return tuple(layout)


def _cat(plan: SequencePlan, node: Node) -> Layout:
    parts = list(argument(node, 0, "tensors"))
    tracked = [plan.need(node, part) for part in parts if part in plan.layouts]
    rest = [part for part in parts if part not in plan.layouts and not is_empty_tensor(part)]
    layout = tracked[0]
    place = argument(node, 1, "dim", 0) % len(layout)
    if any(has_sequence(other[place]) for other in tracked):
        if rest or len(tracked) > 1:
            raise UntrackedSequenceError(node, "it joins the sequence with another one")
        return layout
    open_place = (*layout[:place], (), *layout[place + 1 :])
    for part in rest:
        plan.align(node, open_place, part)
    return (*layout[:place], dim(example_sizes(node)[place]), *layout[place + 1 :])


def _getitem(plan: SequencePlan, node: Node) -> Layout:
    source, index = arguments(node)[:2]
    several = plan.layouts.get(source)
    if isinstance(several, list):
        return several[index]
    layout = plan.need(node, source)
    entries = list(index) if isinstance(index, tuple) else [index]
    used = sum(entry is not None and entry is not Ellipsis for entry in entries)
    rest = [slice(None)] * (len(layout) - used)
    if Ellipsis in entries:
        cut = entries.index(Ellipsis)
        entries[cut : cut + 1] = rest
    else:
        entries += rest
    result: list[Dim] = []
    new_entries: list[Any] = []
    place = 0
    wanted = iter(example_sizes(node))
    for entry in entries:
        if entry is None:
            result.append(())
            next(wanted)
            new_entries.append(entry)
            continue
        own = layout[place]
        place += 1
        if isinstance(entry, int):
            if has_sequence(own) and entry not in (0, -1):
                raise UntrackedSequenceError(node, f"it reads position {entry} of the sequence")
            new_entries.append(entry)
            continue
        if not isinstance(entry, slice):
            raise UntrackedSequenceError(node, f"it is indexed by {entry}")
        size = next(wanted)
        kept, new = _sliced(node, own, entry, size)
        result.append(kept)
        new_entries.append(new)
    if new_entries != entries:
        plan.arguments[node] = (source, tuple(new_entries))
    return tuple(result)


def _sliced(node: Node, own: Dim, cut: slice, size: Any) -> tuple[Dim, Any]:
    """A dimension after a slice, and the slice to use once the sequence is narrowed.

    On the sequence only slices that mean the same for any length are followed: all of it, or its last positions.
    """
    start = None if isinstance(cut.start, int) and cut.start == 0 else cut.start
    if start is None and cut.stop is None and cut.step in (None, 1):
        return own, cut
    if not has_sequence(own):
        return dim(size), cut
    if is_sequence(own) and cut.step in (None, 1):
        if start is None and same_size(size, own[0].size):
            return own, slice(cut.start, Kept(own), cut.step)
        if isinstance(start, int) and start < 0 and cut.stop is None:
            return ((Factor(expression(size), "tail"),) if size != 1 else ()), cut
    raise UntrackedSequenceError(node, f"it takes {cut.start}:{cut.stop} of the sequence")
