"""A model small enough to compile in seconds, saved in the Hugging Face format with the demo model's tokenizer."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from torchaccel.evaluation.models import DEMO_MODEL


def tiny_model() -> LlamaForCausalLM:
    """A random one-layer Llama with 4 query and 2 key-value heads of 16, vocabulary 2,048, in float32."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=2048,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def save_tiny_model(folder: Path) -> Path:
    """Save the tiny model in ``folder`` and return it."""
    tiny_model().save_pretrained(folder)
    shutil.copy(DEMO_MODEL / "tokenizer.json", folder / "tokenizer.json")
    return folder
