"""BiFormer: equal to the model with the mask of the paper's region graph, and exact where everything is read."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor
from torchaccel.kernels import ops, sparse_regions
from torchaccel.kernels.candidates import Candidate
from torchaccel.kernels.plan import Plan
from torchaccel.kernels.prompt_selectors.regions import RoutedRegions
from torchaccel.kernels.region_layout import RegionLayout
from torchaccel.kernels.sparse_prompt import SparsePrompt, listed
from torchaccel.kernels.spec import AttentionSpec, KVFormat
from torchaccel.passes.lowering.choice import Chooser
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

import torchaccel
from tests.e2e.generation import compiled, greedy, prompt
from tests.models.families import build
from torchaccel.cost.assumed import assumed_facts
from torchaccel.cost.shape import AttentionShape
from torchaccel.errors import OptionsError
from torchaccel.options import resolve

PREFIX = 1
OPTIONS = {"method": "biformer", "region": 4, "topk": 3}


def regions_read(q: Tensor, k: Tensor, grid: tuple[int, int], side: int, topk: int, prefix: int = PREFIX) -> Tensor:
    """Which of the tokens every token reads, bool ``[S, S]``; q, k: float32 ``[S, C]``, the heads side by side."""
    height, width = grid
    members: dict[tuple[int, int], list[int]] = {}
    for y in range(height):
        for x in range(width):
            members.setdefault((y // side, x // side), []).append(prefix + y * width + x)
    means = {region: (q[tokens].mean(0), k[tokens].mean(0)) for region, tokens in members.items()}
    read = torch.zeros(q.shape[0], q.shape[0], dtype=torch.bool)
    for region, tokens in members.items():
        affinity = {other: float(means[region][0] @ means[other][1]) for other in members}
        for other in sorted(affinity, key=affinity.__getitem__, reverse=True)[:topk]:
            read[torch.tensor(tokens)[:, None], torch.tensor(members[other])] = True
    others = torch.ones(q.shape[0], dtype=torch.bool)
    others[[token for tokens in members.values() for token in tokens]] = False
    return read | others | others[:, None]


def masked(model: Any, grid: tuple[int, int], side: int, topk: int) -> tuple[Any, list[float]]:
    """``model`` (in place) that reads only the regions of the graph, and the parts of the pairs that it reads."""
    shares: list[float] = []

    def attention(
        module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        scores = (q @ k.transpose(2, 3)).float() * scaling
        for b in range(q.shape[0]):
            wide = (x[b].transpose(0, 1).flatten(1).float() for x in (q, k))
            read = regions_read(*wide, grid, side, topk)
            scores[b].masked_fill_(~read, -torch.inf)
            shares.append(float(read.float().mean()))
        return (torch.softmax(scores, -1).to(v.dtype) @ v).transpose(1, 2).contiguous(), None

    name = f"masked_regions_{grid}_{side}_{topk}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, eager_mask)
    model.set_attn_implementation(name)
    return model, shares


def pixels(height: int, width: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height * width))


def vit(grid: tuple[int, int], options: dict[str, Any] | None = None, **arguments: Any) -> Any:
    """A tiny ViT for images of ``grid`` patches of 2 x 2 pixels; compiled with ``options`` unless they are None."""
    model = build("vit", image_size=[2 * size for size in grid], patch_size=2, **arguments)
    return model if options is None else torchaccel.compile(model, **{"gate": False, **options})


def states(model: Any, images: Tensor, **arguments: Any) -> Tensor:
    with torch.no_grad():
        return model(images, **arguments).last_hidden_state


def biformer(**changes: Any) -> dict[str, Any]:
    return {"sparse_attention": {**OPTIONS, **changes}}


def test_the_worked_example_of_four_regions():
    """Regions 0 and 1, and 2 and 3, prefer the same region: the mean of its values comes out."""
    k = torch.tensor([[1.0, 0], [0, 1], [-1, 0], [0, -1]]).view(2, 2, 2).repeat_interleave(2, 0).repeat_interleave(2, 1)
    q = torch.tensor([[1.0, 0], [0, 1]]).repeat_interleave(2, 0)[:, None].expand(4, 4, 2)
    v = torch.arange(16.0)[:, None].expand(16, 2)
    q, k, v = (x.reshape(1, 1, 16, 2) for x in (q, k, v))
    dense = KVFormat("dense", "float32", 2)
    spec = AttentionSpec("prefill", 2, 1, "float32", dense, dense, 0.7, causal=False)
    for topk, share in ((1, 0.25), (4, 1.0)):
        selector = RoutedRegions(4, topk)
        plans = [Plan(of, ((None, Candidate("reference")),)) for of in (listed(spec, selector), spec)]
        out, read = sparse_regions.attend(SparsePrompt(selector, *plans), q, k, v, (4, 4))
        assert float(read) == share
        if topk == 1:
            expected = torch.tensor([2.5, 4.5]).repeat_interleave(8)[:, None].expand(16, 2)
        else:
            expected = torch.softmax(q[0, 0] @ k[0, 0].T * 0.7, -1) @ v[0, 0]
        torch.testing.assert_close(out[0, 0], expected)


@pytest.mark.parametrize("size", [(4, 4, 2, 17, 1), (19, 21, 4, 404, 1), (3, 9, 8, 27, 0), (13, 13, 4, 180, 4)])
def test_every_token_has_one_slot_and_regions_lie_together(size):
    layout = RegionLayout(*size)
    slots = layout.slots(torch.device("cpu"))
    assert sorted(slots[slots >= 0].tolist()) == list(range(layout.tokens))
    assert torch.equal(slots[layout.places(slots)], torch.arange(layout.tokens))
    assert layout.is_padded == bool((slots < 0).any())
    poisoned = layout.arrange(torch.full((1, 2, layout.tokens, 3), torch.nan), slots)
    assert torch.equal(poisoned.isnan().any(-1), (slots >= 0).expand(1, 2, -1)) and poisoned.nan_to_num().eq(0).all()
    for region in range(layout.regions):
        tokens = slots[region * layout.side**2 :][: layout.side**2]
        patches = tokens[tokens >= 0] - layout.prefix
        corner = (patches // layout.width // layout.side, patches % layout.width // layout.side)
        assert {*map(int, corner[0] * layout.columns + corner[1])} == {region}
        assert layout.sizes(slots.device)[region] == len(patches)
    assert layout.sizes(slots.device).shape == (layout.blocks,) and layout.sizes(slots.device).sum() == layout.tokens


# Whole regions, a rectangle, a square and a rectangle with regions that are not filled.
@pytest.mark.parametrize("grid", [(24, 24), (12, 28), (13, 13), (19, 21)])
def test_equals_the_model_with_the_mask_of_the_paper(grid):
    images = pixels(2 * grid[0], 2 * grid[1])
    reference, shares = masked(vit(grid), grid, 4, 3)
    fast = vit(grid, biformer())
    expected, got, exact = (states(model, images) for model in (reference, fast, vit(grid)))
    torch.testing.assert_close(got, expected, atol=5e-5, rtol=5e-5)
    assert (expected - exact).abs().max() > 1e-2
    report = torchaccel.report(fast)
    assert not report.declines and report.effective == {"biformer": {"encoder": 3}}
    assert report.density == pytest.approx(sum(shares) / len(shares), abs=1e-4)
    if grid == (24, 24):
        selector = RoutedRegions(16, 3, grid=grid)
        assert report.density == pytest.approx(selector.share(24 * 24 + 1), abs=1e-4)
        assert {site.sparse_from for site in report.records[0].sites} == {25}  # the least square of four regions


def test_a_row_does_not_depend_on_its_neighbour():
    fast = vit((13, 13), biformer())
    images = pixels(26, 26)
    torch.testing.assert_close(states(fast, images)[:1], states(fast, images[:1]), atol=2e-5, rtol=2e-5)


def test_exact_bit_for_bit_where_everything_is_read():
    images = pixels(38, 42)
    assert torch.equal(states(vit((19, 21), biformer(topk=30)), images), states(vit((19, 21), {}), images))


def test_bfloat16():
    fast, reference = vit((24, 24), biformer(), dtype=torch.bfloat16), masked(vit((24, 24)), (24, 24), 4, 3)[0]
    images = pixels(48, 48)
    expected, got = states(reference, images), states(fast, images.bfloat16()).float()
    # Rounding may turn a choice between regions that are almost alike, so single tokens may differ.
    difference = (got - expected).abs().amax(-1).flatten()
    assert difference.median() < 0.05 * expected.abs().max()
    assert 0 < torchaccel.report(fast).density < 1


def test_images_of_different_sizes_share_a_graph():
    fast = vit((12, 12), biformer())
    for grid in ((12, 12), (16, 20), (20, 16), (13, 19), (8, 4)):
        images = pixels(2 * grid[0], 2 * grid[1])
        got = states(fast, images, interpolate_pos_encoding=True)
        reference = masked(vit((12, 12)), grid, 4, 3)[0]
        expected = states(reference, images, interpolate_pos_encoding=True)
        torch.testing.assert_close(got, expected, atol=5e-5, rtol=5e-5)
    assert torchaccel.report(fast).graphs <= 3


def test_tokens_before_and_behind_the_patches_are_read_by_all():
    """Registers before them, as DINOv2 has, and further tokens behind, as YOLOS has, with grouped heads."""
    torch.manual_seed(0)
    grid, prefix, behind, heads, group = (7, 9), 5, 2, 2, 2
    tokens = prefix + grid[0] * grid[1] + behind
    q, k, v = (torch.randn(2, tokens, n, 6).transpose(1, 2) for n in (heads * group, heads, heads))
    dense = KVFormat("dense", "float32", 6)
    spec = AttentionSpec("prefill", 6, group, "float32", dense, dense, 0.5, causal=False)
    selector = RoutedRegions(16, 2, prefix)
    kernels = [Plan(of, ((None, Candidate("reference")),)) for of in (listed(spec, selector), spec)]
    plan = SparsePrompt(selector, *kernels)
    assert SparsePrompt.from_key(plan.key()) == plan
    ops.library()
    args = (q, k, v, list(grid), plan.key())
    torch.library.opcheck(torch.ops.torchaccel.attend_regions.default, args)
    out, share = torch.ops.torchaccel.attend_regions(*args)
    wide_k, wide_v = (x.repeat_interleave(group, 1) for x in (k, v))
    read = torch.stack(
        [regions_read(*(x[b].transpose(0, 1).flatten(1) for x in (q, wide_k)), grid, 4, 2, prefix) for b in range(2)]
    )
    scores = (q @ wide_k.transpose(2, 3) * 0.5).masked_fill(~read[:, None], -torch.inf)
    torch.testing.assert_close(out, scores.softmax(-1) @ wide_v, atol=1e-5, rtol=1e-5)
    assert float(share) == pytest.approx(float(read.float().mean()), abs=1e-6)
    # A grid that the tokens are not of: everything is read.
    everything, share = torch.ops.torchaccel.attend_regions(q, k, v, [8, 9], plan.key())
    expected = (q @ wide_k.transpose(2, 3) * 0.5).softmax(-1) @ wide_v
    torch.testing.assert_close(everything, expected, atol=1e-5, rtol=1e-5)
    assert share == 1


def test_a_grid_that_is_given_is_that_of_the_graph():
    images = pixels(24, 56)
    found, given = vit((12, 28), biformer()), vit((12, 28), biformer(grid=(12, 28), prefix=1))
    assert torch.equal(states(found, images), states(given, images))
    other = vit((12, 28), biformer(grid=(28, 12)))
    assert not torch.equal(states(found, images), states(other, images))


def test_layers():
    fast = vit((12, 12), biformer(layers=[0, -1]))
    states(fast, pixels(24, 24))
    assert torchaccel.report(fast).effective == {"biformer": {"encoder": 2}}
    assert [bool(site.selector) for site in torchaccel.report(fast).records[0].sites] == [True, False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grid": (10, 12)}, "145 tokens, patches in 10 rows and 12 columns"),  # 25 that are none: too many
        ({"grid": (13, 12)}, "145 tokens, patches in 13 rows and 12 columns"),
        ({"prefix": 2}, "145 tokens, patches in 12 rows and 12 columns; give grid and prefix"),
    ],
)
def test_declines_tokens_that_are_not_of_the_grid(changes, message):
    fast, images = vit((12, 12), biformer(**changes)), pixels(24, 24)
    with pytest.warns(UserWarning, match="biformer left 3 site"):
        got = states(fast, images)
    assert torch.equal(got, states(vit((12, 12), {}), images))
    assert all(message in line for line in torchaccel.report(fast).declines)


@pytest.mark.parametrize(("padded", "message"), [(True, "a mask, as padded text"), (False, "no convolution cuts")])
def test_declines_text(padded, message):
    fast = torchaccel.compile(build("bert"), gate=False, **biformer())
    inputs = prompt(2, 64, padding=(0, 5) if padded else ())
    with pytest.warns(UserWarning, match=message):
        states(fast, inputs["input_ids"], attention_mask=inputs["attention_mask"] if padded else None)
    assert torchaccel.report(fast).effective == {}
    strict = torchaccel.compile(build("bert"), gate=False, strict=True, **biformer())
    with pytest.raises(Exception, match=message):
        states(strict, inputs["input_ids"], attention_mask=inputs["attention_mask"] if padded else None)


def test_is_not_for_decoders():
    _, fast = compiled("llama", layers=1, options=biformer())
    greedy(fast, prompt(1, 70), 2)
    report = torchaccel.report(fast)
    assert report.effective == {} and report.density is None
    assert "not for prefill" in {result.detail for result in report.records[0].passes}


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"prefill": "biformer"}, r"'biformer' in prefill, .*it is for encoder graphs alone: name no phase"),
        ({"decode": {**OPTIONS}}, r"'biformer' in decode, .*name no phase"),
        ({**OPTIONS, "topk": 0}, "topk"),
        ({**OPTIONS, "region": 7}, "region"),
        ({**OPTIONS, "grid": (0, 4)}, "grid"),
        ({**OPTIONS, "prefix": -1}, "prefix"),
        ({**OPTIONS, "regions": 4}, "did you mean 'region'"),
    ],
)
def test_wrong_options(asked, message):
    with pytest.raises(OptionsError, match=message):
        resolve({"sparse_attention": asked}, {})


def test_the_cost_model_compares_with_attention_to_all_pairs(monkeypatch):
    monkeypatch.setattr("torchaccel.cost.assumed._instruction_set", lambda: "avx512_bf16")
    dense = KVFormat("dense", "float32", 64)
    spec = AttentionSpec("prefill", 64, 1, "float32", dense, dense, 0.125, causal=False)
    chooser = Chooser(torch.device("cpu"), assumed_facts(torch.device("cpu")))
    for topk in (8, 16, 32):
        selector = RoutedRegions(64, topk)
        verdict = chooser.sparse_verdict(selector, spec, AttentionShape(1, 12, 4096, 4096))
        assert verdict is not None and selector.share(4096) == topk / 64
        work = selector.share(4096) + selector.effort(4096)
        assert work < verdict.predicted_ms / verdict.exact_ms < work + 0.06  # parts of tiles come on top
        # From more regions than are read on; fewer patches than fill the next regions are not worth it.
        least = verdict.switch_tokens
        assert least is not None and selector.share(least) < 1 and least > topk * 64


def test_few_patches_stay_exact_where_choosing_would_not_pay():
    fast = vit((24, 24), {"gate": True, **biformer()})
    images = pixels(48, 48)
    got = states(fast, images)
    (record,) = torchaccel.report(fast).records
    (gate,) = {site.gate for site in record.sites}
    assert "of the pairs are thought to be read" in gate and "it pays from" in gate
    (least,) = {site.sparse_from for site in record.sites}
    assert torch.equal(got, states(vit((24, 24), {}), images)) == (least > 577)


def test_the_vision_tower_of_a_model_that_also_reads_text():
    """Its tower is a graph of its own: a method for prompts treats the text."""
    vision = hf.CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=26, patch_size=2
    )
    text = hf.LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=99, pad_token_id=0
    )
    model = hf.LlavaForConditionalGeneration(
        hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=98)
    ).eval()
    asked = [OPTIONS, {"method": "a_shape", "sinks": 1, "window": 20}]
    fast = torchaccel.compile(model, gate=False, sparse_attention=asked)
    inputs = prompt(1, 180)
    inputs["input_ids"][:, 5:174] = 98
    with torch.no_grad():
        fast(**inputs, pixel_values=pixels(26, 26, 1))
    assert torchaccel.report(fast).effective == {"biformer": {"encoder": 2}, "a_shape": {"prefill": 1}}
