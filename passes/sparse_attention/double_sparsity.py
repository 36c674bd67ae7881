"""Double Sparsity: a few channels of the keys, calibrated or their own largest, tell which tokens a query needs."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from torchaccel.calibration.calibrator import Calibrator, Observation, Wanted
from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.labels import LabelSelection

from ..calibrated import CalibratedMethod, CalibratedOptions
from ..retrieving import RetrievingMethod, RetrievingOptions

ORDER = "site{}.channels"


class DoubleSparsityOptions(CalibratedOptions, RetrievingOptions):
    """tokens: that a step reads. density: share of a key's channels that it scores all tokens by. ranking: what a
    plan ranks channels by, the mean size of q * k of the same token, of q or of k. gqa_reduce: how the query heads of a
    KV head agree."""

    tokens: int = Field(default=1024, ge=1)
    density: float = Field(default=0.25, gt=0.0, le=1.0)
    ranking: Literal["qk", "q", "k"] = "qk"
    gqa_reduce: Literal["max", "mean", "softmax"] = "max"

    decided: ClassVar[tuple[str, ...]] = ("ranking",)


class DoubleSparsityCalibrator(Calibrator):
    """Ranks the channels of every KV head: those of its query heads together, for they share its labels.

    As published, products are of queries and keys after rotary embedding, sizes of either are before it. The released
    code keeps the products of the last block of text alone; here all text counts.
    """

    wanted: ClassVar[tuple[Wanted, ...]] = ("queries", "keys", "plain_queries", "plain_keys")

    options: DoubleSparsityOptions

    def __init__(self, options: DoubleSparsityOptions, seed: int):
        super().__init__(options, seed)
        self._sizes: dict[str, Tensor] = {}

    def observe(self, seen: Observation) -> None:
        ranking, heads = self.options.ranking, seen.shape.kv_heads
        q, k = ("queries", "keys") if ranking == "qk" else ("plain_queries", "plain_keys")
        queries, keys = seen.tokens(q).unflatten(1, (heads, -1)).float(), seen.tokens(k).unsqueeze(2).float()
        ranked = {"qk": queries * keys, "q": queries, "k": keys}[ranking]
        place = ORDER.format(seen.site)
        self._sizes[place] = self._sizes.get(place, 0.0) + ranked.abs().sum((0, 2), dtype=torch.float64)

    def finish(self) -> dict[str, Tensor]:
        return {place: size.argsort(dim=-1, descending=True, stable=True).int() for place, size in self._sizes.items()}


class DoubleSparsity(CalibratedMethod, RetrievingMethod):
    """Every step scores all tokens by a few channels of their keys and reads the best; the heads of a KV head together.

    All tokens stay in the cache, and the chosen channels of the keys with them. Without a plan each row takes the
    channels in which the keys of its own prompt are largest.
    """

    name = "double_sparsity"
    family = "sparse_attention"
    paper = "Post-Training Sparse Attention with Double Sparsity (2024)"
    calibration = "optional"
    calibrator = DoubleSparsityCalibrator
    Options = DoubleSparsityOptions

    options: DoubleSparsityOptions

    def policy(self, site: AttentionSite) -> LabelSelection:
        labelled = max(1, round(self.options.density * site.head_dim))
        chosen: tuple[tuple[int, ...], ...] = ()
        if self.options.plan is not None:
            order = self.options.plan.tensors[ORDER.format(site.index)]
            chosen = tuple(tuple(sorted(head)) for head in order[:, :labelled].tolist())
        return LabelSelection(self.options.tokens, labelled, site.head_dim, chosen, self.options.gqa_reduce)
