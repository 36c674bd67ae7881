"""The sizes of a language model on which its time depends."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..kernels.spec import dtype_name


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of a dense decoder; weights are counted in elements of its matrices.

    layer_weights: of one decoder layer (the mean). other_weights: those that a token reads outside of the layers, the
    head; looking a token up reads one row of the embedding, shared with the head or not. weight_bytes: of all
    parameters, tied ones once.
    """

    dtype: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    layer_weights: int
    other_weights: int
    weight_bytes: int

    @staticmethod
    def of(model: Any) -> ModelSizes:
        """The sizes of a Hugging Face model, or of the model that a configuration describes (nothing is allocated).

        Raises ``ValueError`` for a model of experts, of which a token reads a part, for an encoder, and for anything
        without a Hugging Face configuration.
        """
        if not hasattr(model, "parameters"):
            model = _described(model)
        if not hasattr(getattr(model, "config", None), "get_text_config"):
            raise ValueError(f"a Hugging Face model or its configuration is needed; found {type(model).__name__}")
        config = model.config.get_text_config()
        if any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")):
            raise ValueError(f"{type(model).__name__} is a mixture of experts, whose weights are not modelled yet")
        if model.get_output_embeddings() is None:
            raise ValueError(f"{type(model).__name__} predicts no next token; only decoders are modelled")
        head = model.get_output_embeddings().weight
        outside = {id(head), id(model.get_input_embeddings().weight)}
        parameters = list(model.parameters())
        inside = sum(p.numel() for p in parameters if p.ndim >= 2 and id(p) not in outside)
        heads = config.num_attention_heads
        return ModelSizes(
            dtype=dtype_name(parameters[0].dtype),
            layers=config.num_hidden_layers,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            layer_weights=inside // config.num_hidden_layers,
            other_weights=head.numel(),
            weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        )


def _described(config: Any) -> Any:
    """The model of a configuration, on the meta device, in the configuration's dtype or bfloat16."""
    try:
        from transformers import AutoModelForCausalLM, PretrainedConfig
    except ImportError as error:
        raise ValueError('configurations are read by transformers: pip install "torchaccel[transformers]"') from error
    if not isinstance(config, PretrainedConfig):
        raise ValueError(f"a Hugging Face model or its configuration is needed; found {type(config).__name__}")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model.to(getattr(config, "dtype", None) or torch.bfloat16)
