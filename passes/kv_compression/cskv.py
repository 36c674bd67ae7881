"""CSKV: fewer channels per token, by a factorisation that is calibrated to the model's keys and values."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor
from torchaccel.kernels.latents import rank_of
from torchaccel.kernels.spec import KVFormat, dtype_name

from torchaccel.calibration.calibrator import Calibrator, Observation, Wanted
from torchaccel.graph.anatomy import AttentionSite
from torchaccel.runtime.factors import Factors, factors

from ..base import Decline, Fidelity, SitePlan
from ..calibrated import CalibratedMethod, CalibratedOptions
from ..layerwise import LayerwiseMethod, LayerwiseOptions, refuse_cache
from ..lowering.latents import key_rotation

KEYS, VALUES = "site{}.keys", "site{}.values"


class CSKVOptions(CalibratedOptions, LayerwiseOptions):
    """key_density, value_density: share of the channels that stays; 1 stores the tokens themselves. window: the most
    recent tokens that are exact, 1 to so many; then they are compressed together."""

    key_density: float = Field(default=0.5, gt=0.0, le=1.0)
    value_density: float = Field(default=0.5, gt=0.0, le=1.0)
    window: Literal[16, 32, 64, 128, 256] = 32

    decided: ClassVar[tuple[str, ...]] = ("key_density", "value_density")


class CSKVCalibrator(Calibrator):
    """Factors whose reconstruction of the keys and values that were seen has the least squared error.

    The publication trains them by gradient descent on that error. It has a closed solution: the span of the leading
    eigenvectors of the second moments of keys (before rotary embedding, which changes no distance) and of values. With
    the identity, or the mean size of each input channel, in place of what was seen, the same is the publication's
    initialisation by SVD, or ASVD, of the weights.
    """

    wanted: ClassVar[tuple[Wanted, ...]] = ("plain_keys", "values")

    options: CSKVOptions

    def __init__(self, options: CSKVOptions, seed: int):
        super().__init__(options, seed)
        self._moments: dict[str, Tensor] = {}
        self._head_dims: dict[str, int] = {}

    def observe(self, seen: Observation) -> None:
        for name, which in ((KEYS, "plain_keys"), (VALUES, "values")):
            tokens = seen.tokens(which).flatten(1).double()
            place = name.format(seen.site)
            self._moments[place] = self._moments.get(place, 0.0) + tokens.T @ tokens
            self._head_dims[place] = seen.shape.head_dim

    def finish(self) -> dict[str, Tensor]:
        densities = {"keys": self.options.key_density, "values": self.options.value_density}
        found = {}
        for place, moments in self._moments.items():
            dim, density = self._head_dims[place], densities[place.rpartition(".")[2]]
            if density < 1:
                found[place] = basis_of(moments, rank_of(density, dim) * (moments.shape[0] // dim)).float()
        return found


def basis_of(moments: Tensor, rank: int) -> Tensor:
    """The orthonormal rows ``[rank, n]`` that lose least of vectors with second moments ``[n, n]``, the best first."""
    return torch.linalg.eigh(moments).eigenvectors.flip(-1)[:, :rank].T.contiguous()


class CSKV(CalibratedMethod, LayerwiseMethod):
    """Old tokens are stored as a share of the numbers of their keys and values, recent ones exactly."""

    name = "cskv"
    family = "kv_compression"
    fidelity = Fidelity.APPROX
    phases = frozenset({"prefill", "extend", "decode"})
    stores = True
    paper = "CSKV: Training-Efficient Channel Shrinking for KV Cache in Long-Context Scenarios (2024)"
    calibration = "required"
    calibrator = CSKVCalibrator
    Options = CSKVOptions

    options: CSKVOptions

    def refuse(self, site: AttentionSite) -> Decline | None:
        problem = refuse_cache(site, sliding=False)
        rotation = key_rotation(site)
        return problem or (rotation if isinstance(rotation, Decline) else None)

    def treat(self, plan: SitePlan, site: AttentionSite) -> None:
        rotation = key_rotation(site)
        turned = 0 if rotation is None or isinstance(rotation, Decline) else rotation.dim
        keys = self._factors(KEYS.format(site.index), site, turned, self.options.key_density)
        values = self._factors(VALUES.format(site.index), site, 0, self.options.value_density)
        if keys is not None or values is not None:
            plan.factors = keys, values
            plan.formats = self._format(site, keys), self._format(site, values)

    def _factors(self, name: str, site: AttentionSite, turned: int, density: float) -> Factors | None:
        calibrated = self.options.plan
        if density == 1 or calibrated is None:
            return None
        device = site.node.meta["example_value"].device
        basis = calibrated.tensors[name].to(device, site.dtype)
        digest = f"{calibrated.digest[:16]}_{name.replace('.', '_')}"
        return factors(digest, turned, basis, site.kv_heads)

    def _format(self, site: AttentionSite, found: Factors | None) -> KVFormat:
        dtype = dtype_name(site.dtype)
        if found is None:
            return KVFormat("dense", dtype, site.head_dim)
        rank = found.basis.shape[0] // site.kv_heads
        # A block leaves when the token behind it arrives, as in the publication: 1 to ``window`` tokens are exact.
        return KVFormat("latent", dtype, site.head_dim, block=self.options.window, window=1, rank=rank)
