"""What a pass is: class-level facts, one method that rewrites, a typed result of what was done and what was not."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.fx import Graph, Node
from torchaccel.kernels.prompt_selectors.base import BlockSelector
from torchaccel.kernels.spec import KVFormat

from torchaccel.calibration.calibrator import Calibrator
from torchaccel.graph.anatomy import Anatomy, AttentionSite, analyze
from torchaccel.runtime.eviction import Eviction
from torchaccel.runtime.factors import Factors
from torchaccel.runtime.listing import Listing
from torchaccel.runtime.mixing import Mixing
from torchaccel.runtime.selection import Selection

Phase = Literal["prefill", "extend", "decode", "encoder"]


class Fidelity(Enum):
    """Whether a pass may change results beyond the rounding of the dtype."""

    EXACT = "exact"
    APPROX = "approx"


class Status(Enum):
    """How a pass ended."""

    APPLIED = "applied"
    NO_MATCH = "no_match"
    DISABLED = "disabled"
    DECLINED = "declined"
    FAILED = "failed"


class Reason(Enum):
    """Why a site was left as it was."""

    NOT_CAUSAL = "the attention is not causal self-attention over a cache"
    NOT_BIDIRECTIONAL = "the attention is not bidirectional self-attention of an encoder"
    NO_PATCHES = "regions are made of the patches of an image, which these tokens are not known to be"
    SLIDING_WINDOW = "the layer already attends to a sliding window"
    STATIC_CACHE = "the cache is a static buffer, in which only the mask knows where the tokens end"
    ALL_LOGITS = "the graph returns logits of every position, so no token may be dropped"
    NO_SUCH_LAYER = "the option layers names a layer that the model does not have"
    TOO_FEW_LAYERS = "the model has too few layers for this setting"
    NO_LAYERS = "no residual layers were found in the graph"
    OPAQUE_SEQUENCE = "the sequence dimension could not be followed through the graph"
    PLAIN_CACHE = "the cache was made without this method, so nothing is known of its tokens"
    KERNEL_UNSUPPORTED = "no generated kernel supports it"
    SHARED_CACHE = "the cached keys or values have other readers in the graph"
    UNEQUAL_HEAD_DIMS = "keys and values have different head dimensions"
    UNALIGNED_CAUSAL = "causal attention of several new tokens over a cache without a mask"
    UNKNOWN_LENGTH = "the number of new tokens cannot be read off an input of the graph"
    RAGGED_CODES = "heads that keep different numbers of tokens store them in full precision"
    RAGGED_WINDOW = "some heads have windows of their own, and attention to fewer keys is not combined with them"
    BOUND_HEADS = "windows of some heads are for plain tokens that the other heads read whole, not by lists"
    NO_SUCH_HEAD = "a head is named that the layer does not have"
    UNSHARED_PREFIX = "rows that begin alike read copies of their tokens"
    PRUNED_LATENTS = "every head is rebuilt from the latents of all, which evicting or pruning tokens takes apart"
    PRUNED_CLASSES = "tokens are sorted into classes when all are there, not after some were evicted or pruned"
    NO_TABLE = "the rotary embedding of the keys was not recognised, so they cannot be embedded when they are read"
    EVICTING_STEPS = "tokens are evicted between steps, so what is remembered of blocks would not hold"
    HOST_ALREADY = "the model runs on the CPU, whose memory is the host's; a folder takes the tokens out of it"
    HOST_CODES = "only tokens in full precision are gathered in host memory; these stay on their device"
    TWO_FORMATS = "another method stores its tokens in a format of its own, and two are not combined"
    NEEDS_PLAIN_TOKENS = "latents, classes of tokens and heads of different lengths are read whole, not by lists"
    MOVED_TOKENS = "layers that store other tokens than each other cannot read by the same list"
    NO_TOKEN_IDS = "the graph is given embeddings, so the ids of the tokens are not known"
    NO_IMAGES = "nothing in the graph tells which tokens are images; give their ids as image_tokens"
    SHORT_PROMPT = "the prompt is too short to prune"
    UNSUPPORTED_DTYPE = "the dtype is none of float32, bfloat16, float16"
    SLOWER = "the cost model predicts that it is slower than the exact site at every length; gate=False keeps it"
    OUT_OF_FUEL = "TORCHACCEL_FUEL is used up"


@dataclass(frozen=True)
class Decline:
    """One site that a pass did not rewrite, and why."""

    site: str
    reason: Reason
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.site}: {self.reason.value}{f' ({self.detail})' if self.detail else ''}"


@dataclass
class PassResult:
    """What one pass did to one graph."""

    name: str
    fidelity: Fidelity
    status: Status
    sites: list[str] = field(default_factory=list)
    declines: list[Decline] = field(default_factory=list)
    detail: str = ""


class MethodOptions(BaseModel):
    """Base of every method's options: immutable, unknown keys are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass
class SitePlan:
    """What the rewrites decided for one attention site; lowering turns it into kernels and cache layouts.

    window, sinks: recent and first tokens that a query sees, None for all. bound: which KV heads they bind, None for
    all. formats: how keys and values are stored, None for dense; factors: of those that are latents. mixing: how tokens
    are sorted into classes with formats of their own. eviction: which tokens stay, None for all. selection: which of
    them a step reads, None for all. leader: index of the site whose lists, and whose choice of the tokens that stay,
    this one shares. offload: folder of the files that hold the tokens, "host" for host memory, None for that of the
    device. keep: node int64 ``[B, K]``, the columns that survived token pruning in prefill. dropped: the layer never
    runs in later phases, so nothing of its cache is stored. selector: which blocks of keys a prompt, or an
    encoder, reads, None for all; grid: rows and columns of the patches that it is for, None for those of the graph.
    """

    window: int | None = None
    sinks: int = 0
    bound: tuple[bool, ...] | None = None
    formats: tuple[KVFormat, KVFormat] | None = None
    factors: tuple[Factors | None, Factors | None] = (None, None)
    mixing: Mixing | None = None
    eviction: Eviction | None = None
    selection: Listing | None = None
    leader: int | None = None
    offload: str | None = None
    keep: Node | None = None
    dropped: bool = False
    selector: BlockSelector | None = None
    grid: tuple[int, int] | None = None

    @property
    def remembered(self) -> Selection | None:
        """The policy of which the site's own keys carry the state."""
        return self.selection if isinstance(self.selection, Selection) and self.leader is None else None

    @property
    def is_formatted(self) -> bool:
        """Whether a method decided in which format tokens are stored."""
        return self.formats is not None or self.mixing is not None

    def reading_all(self) -> SitePlan:
        """This plan without what chooses the tokens that steps read, and without the file they would lie in."""
        return replace(self, selection=None, offload=None)


class Fuel:
    """A budget of rewrites: ``TORCHACCEL_FUEL=n`` applies only the first n, to bisect a wrong result."""

    def __init__(self, amount: int | None):
        self.left = amount

    def take(self) -> bool:
        """Spend one rewrite; False when none is left."""
        if self.left is None:
            return True
        self.left -= 1
        return self.left >= 0


@dataclass
class RewriteContext:
    """The graph being compiled, what was found in it, the plan of its attention sites, and the model's weights."""

    graph: Graph
    module: torch.nn.Module
    device: torch.device
    fuel: Fuel
    anatomy: Anatomy
    plans: dict[int, SitePlan] = field(default_factory=dict)
    parameters: tuple[Tensor, ...] = ()

    def plan(self, site: AttentionSite) -> SitePlan:
        """The plan of a site (made on first use)."""
        return self.plans.setdefault(site.index, SitePlan())

    def refresh(self) -> None:
        """Analyse the graph anew after a rewrite that keeps every attention site but changes what they read."""
        self.anatomy = analyze(self.graph)


class Pass:
    """A rewrite of the whole graph. Subclasses set the facts and implement ``apply``."""

    name: ClassVar[str]
    fidelity: ClassVar[Fidelity]
    phases: frozenset[Phase] = frozenset({"prefill", "extend", "decode", "encoder"})

    def apply(self, context: RewriteContext) -> PassResult:
        """Rewrite ``context.graph`` in place; an exception makes the manager restore the graph."""
        raise NotImplementedError

    def result(self, sites: list[str], declines: list[Decline], detail: str = "") -> PassResult:
        """The typed result for what was rewritten and what was not."""
        status = Status.APPLIED if sites else Status.DECLINED if declines else Status.NO_MATCH
        return PassResult(self.name, self.fidelity, status, sites, declines, detail)


class Method(Pass):
    """A published method: a pass the user asks for by name, with options of its own.

    calibration: whether it runs on a plan, which ``calibrator`` makes; then it derives from ``CalibratedMethod``.
    """

    family: ClassVar[str]
    aliases: ClassVar[tuple[str, ...]] = ()
    calibration: ClassVar[Literal["none", "optional", "required"]] = "none"
    calibrator: ClassVar[type[Calibrator] | None] = None
    paper: ClassVar[str]
    Options: ClassVar[type[MethodOptions]]

    def __init__(self, options: Any):
        self.options = options
        self.phase: str | None = None

    def sparse_in(self, graphs: frozenset[Phase]) -> bool:
        """Whether it changes what ``graphs`` read, so that it can be asked for there alone."""
        return bool(self.phases & graphs)

    def keep_to(self, phase: str, graphs: frozenset[Phase]) -> None:
        """Treat those of ``graphs`` only; ``phase`` is their name in options, noted where the method treats others."""
        if not self.phases <= graphs:
            self.phase = phase
            self.phases = self.phases & graphs
