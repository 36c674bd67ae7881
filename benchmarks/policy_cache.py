"""Eviction policies in plain float32, without the compiler: one prefill serves any number of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from torchaccel.runtime.eviction import Eviction, Prompt, RaggedEviction, State, Step

NAME = "policy"
# Queries whose attention is held at once.
CHUNK = 128


@dataclass
class Prefilled:
    """A prompt read once: each layer's queries ``[B, H, S, D]``, keys and values ``[B, H_kv, S, D]``, last logits."""

    tokens: int
    cos: Tensor
    sin: Tensor
    queries: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    mass: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor = field(default_factory=lambda: torch.empty(0))


class Recorder(Cache):
    """Takes the place of a cache while the prompt is read."""

    is_sliding: Any = ()
    is_linear: Any = ()
    is_dummy: Any = ()
    is_compileable = False

    def __init__(self, layers: int, found: Prefilled) -> None:
        self.found, self._layers = found, layers
        self.is_sliding = self.is_linear = self.is_dummy = [False] * layers

    def __len__(self) -> int:
        return self._layers

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """The prompt's keys and values, noted."""
        self.found.keys.append(keys)
        self.found.values.append(values)
        return keys, values

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Nothing came before."""
        return 0

    def get_mask_sizes(self, *_: Any, **__: Any) -> tuple[int, int]:
        """Whatever: no mask is made."""
        return 1, 0


class PolicyCache(Recorder):
    """What a policy keeps of a prompt, and of what comes after; None keeps all."""

    def __init__(self, found: Prefilled, scale: float, policy: Eviction | None) -> None:
        super().__init__(len(found.keys), found)
        self.policy = policy
        self.calls = 0
        self.keys, self.values = list(found.keys), list(found.values)
        self.dead: list[Tensor | None] = [None] * len(self)
        self.states: list[State] = [{} for _ in self.keys]
        self.capacities = [0] * len(self)
        if policy is not None:
            for layer in range(len(self)):
                self._settle(layer, prompt_of(found, layer, scale, policy), policy)

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Everything held, the new token included."""
        self.keys[layer_idx] = torch.cat([self.keys[layer_idx], keys], 2)
        self.values[layer_idx] = torch.cat([self.values[layer_idx], values], 2)
        return self.keys[layer_idx], self.values[layer_idx]

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        """Tokens seen, held or not."""
        return self.found.tokens + self.calls

    def attended(self, layer: int, mass: Tensor, group: int) -> None:
        """Tell the policy what one new token attended to: ``mass`` ``[B, H_kv, n]``."""
        policy = self.policy
        if policy is None or policy.grows:
            return
        state, stored = self.states[layer], mass.shape[2]
        for name, x in state.items():
            state[name] = torch.nn.functional.pad(x, (0, stored - x.shape[2]))
        step = Step(mass if policy.step_mass else None, stored, 1, group, self.calls + 1)
        policy.observe(state, step)
        kept = policy.evict(state, step, self.capacities[layer])
        if kept is not None:
            where = kept[..., None].expand(*kept.shape, self.keys[layer].shape[3])
            self.keys[layer], self.values[layer] = (x[layer].gather(2, where) for x in (self.keys, self.values))
            self.states[layer] = {name: x.gather(2, kept) for name, x in state.items()}

    @property
    def held(self) -> float:
        """Tokens held, the mean over layers and heads."""
        dead = [0.0 if x is None else x.float().sum(-1).mean().item() for x in self.dead]
        return sum(keys.shape[2] - gone for keys, gone in zip(self.keys, dead, strict=True)) / len(self)

    def _settle(self, layer: int, prompt: Prompt, policy: Eviction) -> None:
        if isinstance(policy, RaggedEviction):
            self.dead[layer] = ~policy.kept(prompt)
            return
        kept = policy.keep(prompt)
        self.keys[layer], self.values[layer] = policy.merge(prompt, kept)
        self.states[layer] = policy.state(prompt, kept)
        self.capacities[layer] = policy.capacity(prompt)


def prepare(model: Any) -> None:
    """Let ``model`` attend in a way that tells its cache, a ``Recorder``, what was attended to."""
    ALL_ATTENTION_FUNCTIONS.register(NAME, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, lambda *_, **__: None)
    model.set_attn_implementation(NAME)


@torch.no_grad()
def prefill(model: Any, tokens: Tensor) -> Prefilled:
    """Read prompts ``[B, S]`` without padding."""
    places = torch.arange(tokens.shape[1])[None]
    cos, sin = model.model.rotary_emb(torch.empty(0), places)
    found = Prefilled(tokens.shape[1], cos, sin)
    cache = Recorder(model.config.num_hidden_layers, found)
    out = _forward(model, tokens, cache, places)
    found.logits = out
    return found


@torch.no_grad()
def step(model: Any, cache: PolicyCache, tokens: Tensor) -> Tensor:
    """Logits ``[B, V]`` behind one more token ``[B, 1]``."""
    logits = _forward(model, tokens, cache, torch.full((1, 1), cache.get_seq_length()))
    cache.calls += 1
    return logits


def prompt_of(found: Prefilled, layer: int, scale: float, policy: Eviction) -> Prompt:
    """What ``policy`` is told of a layer."""
    queries, keys = found.queries[layer], found.keys[layer]
    last = queries[:, :, found.tokens - min(policy.last_queries, found.tokens) :]
    cos, sin = found.cos[:, None], found.sin[:, None]
    tables = cos[..., -2:, :], sin[..., -2:, :]
    plain = queries * cos - _turned(queries) * sin if policy.unrotated else None
    if policy.prompt_mass and layer not in found.mass:
        found.mass[layer] = _mass(queries, keys, scale)
    return Prompt(
        queries=last,
        keys=keys,
        values=found.values[layer],
        mass=found.mass[layer] if policy.prompt_mass else None,
        valid=torch.ones(keys.shape[0], found.tokens, dtype=torch.bool),
        scale=scale,
        layer=layer,
        layers=len(found.keys),
        token_bytes=2.0 * keys.shape[1] * keys.shape[3] * keys.element_size(),
        plain_queries=plain,
        tables=tables,
    )


def _forward(model: Any, tokens: Tensor, cache: Recorder, places: Tensor) -> Tensor:
    # Attention functions are not given the cache, but whatever else is passed.
    out = model(
        tokens,
        past_key_values=cache,
        use_cache=True,
        position_ids=places.expand(tokens.shape[0], -1),
        logits_to_keep=1,
        recorder=cache,
    )
    logits: Tensor = out.logits[:, -1]
    return logits


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, _mask: Any, scaling: float, recorder: Recorder, **_: Any
) -> tuple[Tensor, None]:
    group = query.shape[1] // key.shape[1]
    if not isinstance(recorder, PolicyCache):
        recorder.found.queries.append(query)
        k, v = (x.repeat_interleave(group, 1) for x in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, k, v, is_causal=True, scale=scaling)
        return out.transpose(1, 2).contiguous(), None
    scores = torch.einsum("bhgqd,bhsd->bhgqs", query.unflatten(1, (-1, group)), key) * scaling
    dead = recorder.dead[module.layer_idx]
    if dead is not None:
        dead = torch.nn.functional.pad(dead, (0, key.shape[2] - dead.shape[2]))
        scores = scores.masked_fill(dead[:, :, None, None], -torch.inf)
    weights = scores.softmax(-1)
    recorder.attended(module.layer_idx, weights.sum((2, 3)), group)
    out = torch.einsum("bhgqs,bhsd->bhgqd", weights, value).flatten(1, 2)
    return out.transpose(1, 2).contiguous(), None


def _mass(queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Attention that each token receives from all queries, float32 ``[B, H_kv, S]``."""
    total, column = torch.zeros(keys.shape[:3]), torch.arange(keys.shape[2])
    for rows, q in zip(column.split(CHUNK), queries.unflatten(1, (keys.shape[1], -1)).split(CHUNK, 3), strict=True):
        scores = torch.einsum("bhgqd,bhsd->bhgqs", q, keys) * scale
        total += scores.masked_fill(column > rows[:, None], -torch.inf).softmax(-1).sum((2, 3))
    return total


def _turned(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)
