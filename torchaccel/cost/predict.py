"""What a set of methods does to a whole model's time and memory, on a device that need not be present."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ..kernels.candidates import Candidate
from ..kernels.spec import DTYPES, AttentionSpec, LinearSpec
from .calibration import Calibration, shipped
from .facts import DeviceFacts
from .measure import facts_for
from .model import ModelSizes
from .roofline import predict_ms
from .shape import AttentionShape
from .traffic import Methods, Traffic

# What the host does for each layer of a decode step between kernels: guards, Python, calls. Measured on one AMD EPYC
# core as what is left of a step of 8 and 12 layers after its weights and its attention; hardly the GPU's business.
HOST_US = 190.0
# Kernels of a layer besides attention: projections, norms, rotary embedding, MLP, after Inductor's fusion.
LAYER_KERNELS = 10
# Share of the rate of large GEMMs that the projections of a prompt reach.
GEMM_SHARE = 0.85


@dataclass(frozen=True)
class Cost:
    """Predicted milliseconds of one decode step and of one prompt, with their parts, and bytes of the KV cache.

    weights: reading the matrices (decode), multiplying by them (prefill). overhead: whatever the device waits for.
    """

    decode_ms: float
    decode_weights_ms: float
    decode_attention_ms: float
    decode_overhead_ms: float
    prefill_ms: float
    prefill_weights_ms: float
    prefill_attention_ms: float
    prefill_overhead_ms: float
    kv_bytes: int


@dataclass(frozen=True)
class Prediction:
    """The predicted cost of what was asked, and of the exact model, on ``device``; notes say what to bear in mind."""

    device: DeviceFacts
    batch: int
    context: int
    asked: Cost
    exact: Cost
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The prediction as JSON values, with the facts of the device."""
        parts = {"batch": self.batch, "context": self.context, "device": self.device.to_dict()}
        return parts | {"asked": asdict(self.asked), "exact": asdict(self.exact), "notes": list(self.notes)}


def predict_model(
    model: Any,
    inputs: Any,
    methods: Methods,
    device: str | torch.device | DeviceFacts,
    calibration: Calibration | None = None,
) -> Prediction:
    """Predict one decode step after ``inputs``, their prefill and their KV cache.

    model: a Hugging Face model or configuration, or ``ModelSizes``. inputs: token ids ``[B, S]``, a mapping with
    "input_ids" or with "batch" and "context", or the number of tokens of one prompt. methods: canonical options.
    device: a name of ``cost.devices``, "cpu" or "cuda" for this machine's, or facts. Raises ``ValueError`` for an
    unknown device, a model or inputs that cannot be read, and methods whose effect is not modelled.
    """
    sizes = model if isinstance(model, ModelSizes) else ModelSizes.of(model)
    batch, context = _sizes_of(inputs)
    traffic = Traffic(methods)
    if traffic.unknown:
        raise ValueError(f"nothing is predicted for {', '.join(traffic.unknown)}: their work is not modelled yet")
    facts = device if isinstance(device, DeviceFacts) else facts_for(device)
    known = shipped() if calibration is None else calibration
    asked, exact = (_cost(sizes, way, batch, context, facts, known) for way in (traffic, Traffic({})))
    return Prediction(facts, batch, context, asked, exact, tuple(_notes(sizes, asked, facts, known)))


def _sizes_of(inputs: Any) -> tuple[int, int]:
    if isinstance(inputs, int) and not isinstance(inputs, bool) and inputs > 0:
        return 1, inputs
    if isinstance(inputs, Mapping):
        if "context" in inputs:
            return int(inputs.get("batch", 1)), int(inputs["context"])
        inputs = inputs.get("input_ids")
    if isinstance(inputs, torch.Tensor) and inputs.dim() == 2:
        return inputs.shape[0], inputs.shape[1]
    raise ValueError(
        "inputs are token ids [B, S], a mapping with 'input_ids' or with 'batch' and 'context', or a number of tokens; "
        f"found {type(inputs).__name__}"
    )


def _cost(
    sizes: ModelSizes, traffic: Traffic, batch: int, context: int, facts: DeviceFacts, calibration: Calibration
) -> Cost:
    host = HOST_US / 1e3
    running = traffic.decode_layers(sizes.layers)
    weights = sizes.layer_weights * running + sizes.other_weights
    decode_weights = _linear_ms(sizes, weights, batch, facts, calibration)
    decode_attention = prefill_attention = prefill_flops = kv = 0.0
    # Skipped layers are spread evenly, so every part of the depth loses the same share of them.
    share = running / sizes.layers
    for tokens, layers, treated in traffic.depths(sizes.layers, context):
        lists = traffic.retrieving if treated else None
        for part in traffic.parts(tokens, sizes.dtype, sizes.head_dim, sizes.kv_heads, sizes.layers, treated):
            spec = traffic.spec("decode", sizes.dtype, sizes.head_dim, sizes.heads // sizes.kv_heads, part.formats)
            shape = AttentionShape(batch, sizes.kv_heads, 1, round(part.tokens) + 1, sites=sizes.layers)
            remembered = 0.0
            if lists is not None:
                shape = replace(shape, density=lists.read(part.tokens) / part.tokens)
                remembered = lists.state * part.tokens * 2 * sizes.head_dim * DTYPES[sizes.dtype].itemsize
            decode_attention += layers * share * attention_ms(spec, shape, facts, calibration)
            kv += batch * layers * share * sizes.kv_heads * (part.nbytes + remembered)
        spec = traffic.spec("prefill", sizes.dtype, sizes.head_dim, sizes.heads // sizes.kv_heads)
        shape = AttentionShape(batch, sizes.kv_heads, tokens, tokens, sites=sizes.layers)
        prefill_attention += layers * attention_ms(spec, shape, facts, calibration)
        prefill_flops += 2.0 * batch * tokens * layers * sizes.layer_weights
    prefill_flops += 2.0 * batch * sizes.other_weights
    prefill_weights = max(
        prefill_flops / facts.rate(sizes.dtype) / 1e6 / GEMM_SHARE,
        _linear_ms(sizes, sizes.layer_weights * sizes.layers + sizes.other_weights, 1, facts, calibration),
    )
    decode = _overhead(decode_weights + decode_attention, running, host, facts)
    prefill = _overhead(prefill_weights + prefill_attention, sizes.layers, host, facts)
    return Cost(
        decode_weights + decode_attention + decode,
        decode_weights,
        decode_attention,
        decode,
        prefill_weights + prefill_attention + prefill,
        prefill_weights,
        prefill_attention,
        prefill,
        round(kv),
    )


def _overhead(busy: float, layers: int, host: float, facts: DeviceFacts) -> float:
    """A CPU does the host's work itself; a GPU waits for its launches, and for a host that is slower than itself."""
    if facts.kind == "cpu":
        return layers * host
    launches = layers * LAYER_KERNELS * facts.launch_us / 1e3
    return max(launches, layers * host - busy)


def attention_ms(spec: AttentionSpec, shape: AttentionShape, facts: DeviceFacts, calibration: Calibration) -> float:
    """Milliseconds of one layer's attention with the better of generated and stock kernels."""
    generated = Candidate("cpp" if facts.kind == "cpu" else "triton")
    both = (generated, Candidate("composed"))
    return min(predict_ms(spec, candidate, shape, facts, calibration) for candidate in both)


def _linear_ms(sizes: ModelSizes, weights: float, rows: int, facts: DeviceFacts, calibration: Calibration) -> float:
    """Milliseconds of reading ``weights`` elements once for a few rows, or of multiplying by them."""
    spec = LinearSpec(sizes.dtype, min(rows, 8), False)
    found = calibration.of(spec, Candidate("cpp"), facts.kind)
    size = weights * DTYPES[sizes.dtype].itemsize
    cached = size <= facts.cache_bytes
    memory = found.cache * size / facts.cache_gbs if cached else found.memory * size / facts.dram_gbs
    return max(memory, found.flops * 2.0 * rows * weights / facts.rate(sizes.dtype)) / 1e6


def _notes(sizes: ModelSizes, asked: Cost, facts: DeviceFacts, calibration: Calibration) -> list[str]:
    notes = []
    needed = sizes.weight_bytes + asked.kv_bytes
    if facts.memory_bytes and needed > facts.memory_bytes:
        notes.append(
            f"does not fit: {needed / 1e9:.1f} GB of weights and cache, {facts.memory_bytes / 1e9:.1f} GB of memory"
        )
    if not facts.is_measured:
        notes.append(f"facts of {facts.name}: {facts.source}; nothing was measured on it")
    if not any(key.startswith(f"{facts.kind}/") for key in calibration.entries):
        notes.append(f"no kernel was calibrated on a device of the kind {facts.kind!r}: efficiencies are estimates")
    elif not facts.is_measured:
        notes.append(f"kernels were calibrated on {calibration.source}")
    return notes
