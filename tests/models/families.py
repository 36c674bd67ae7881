"""Tiny random models of the Hugging Face families, built in-process: no network, no checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

VOCAB = 99
WINDOW = 8

_SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "vocab_size": VOCAB,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GQA = {**_SMALL, "num_key_value_heads": 2}

# name -> (config class, model class, arguments of the config, name of the layer-count argument, default layers)
_FAMILIES: dict[str, tuple[Callable[..., Any], Callable[..., nn.Module], dict[str, Any], str, int]] = {
    "llama": (hf.LlamaConfig, hf.LlamaForCausalLM, _GQA, "num_hidden_layers", 3),
    "qwen2": (hf.Qwen2Config, hf.Qwen2ForCausalLM, _GQA, "num_hidden_layers", 3),
    "qwen3": (hf.Qwen3Config, hf.Qwen3ForCausalLM, {**_GQA, "head_dim": 16}, "num_hidden_layers", 3),
    "mistral": (hf.MistralConfig, hf.MistralForCausalLM, {**_GQA, "sliding_window": WINDOW}, "num_hidden_layers", 3),
    "gemma2": (
        hf.Gemma2Config,
        hf.Gemma2ForCausalLM,
        {**_GQA, "head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16},
        "num_hidden_layers",
        4,
    ),
    "phi3": (hf.Phi3Config, hf.Phi3ForCausalLM, {**_GQA, "sliding_window": None}, "num_hidden_layers", 3),
    "mixtral": (hf.MixtralConfig, hf.MixtralForCausalLM, {**_GQA, "num_local_experts": 4}, "num_hidden_layers", 3),
    "gpt2": (
        hf.GPT2Config,
        hf.GPT2LMHeadModel,
        {"n_embd": 64, "n_head": 4, "vocab_size": VOCAB, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None},
        "n_layer",
        3,
    ),
    "gpt_neox": (hf.GPTNeoXConfig, hf.GPTNeoXForCausalLM, _SMALL, "num_hidden_layers", 3),
    "opt": (
        hf.OPTConfig,
        hf.OPTForCausalLM,
        {
            "hidden_size": 64,
            "ffn_dim": 96,
            "num_attention_heads": 4,
            "vocab_size": VOCAB,
            "word_embed_proj_dim": 64,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": None,
        },
        "num_hidden_layers",
        3,
    ),
    "bert": (hf.BertConfig, hf.BertModel, _SMALL, "num_hidden_layers", 3),
    "vit": (
        hf.ViTConfig,
        hf.ViTModel,
        {
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_attention_heads": 4,
            "image_size": 16,
            "patch_size": 4,
            "num_channels": 3,
        },
        "num_hidden_layers",
        3,
    ),
}

ENCODERS = ["bert", "vit"]
CAUSAL = [name for name in _FAMILIES if name not in ENCODERS]


def build(
    name: str,
    seed: int = 0,
    attn_implementation: str | None = None,
    layers: int | None = None,
    dtype: torch.dtype = torch.float32,
    **overrides: Any,
) -> nn.Module:
    """A tiny random model of a family, in eval mode.

    Weights are drawn wider than the library's default, so that leaving out a layer or a token changes the output far
    beyond rounding. No end-of-sequence token is set: ``generate`` runs its full length.

    name: one of ``CAUSAL`` or ``ENCODERS``. layers: number of layers, the family's default when None.
    overrides: further arguments of the family's configuration.
    """
    config_class, model_class, arguments, layers_key, default_layers = _FAMILIES[name]
    config = config_class(**{**arguments, layers_key: layers or default_layers, **overrides})
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = model_class(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.08)
    model = model.to(dtype).eval()
    generation = getattr(model, "generation_config", None)
    if generation is not None:
        generation.eos_token_id = None
        generation.pad_token_id = 0
    return model
