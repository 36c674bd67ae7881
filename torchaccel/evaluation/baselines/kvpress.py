"""kvpress, the closest peer for KV compression, run by a process in an environment of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..case import Case
from ..generate import Sample
from ..models import ModelFacts
from ..results import Result
from ..runner import Runner
from .child import Child

# Presses that need a ratio and nothing else, by the names their papers use; the last class is given the ratio, those
# before it wrap it.
PRESSES: dict[str, tuple[str, ...]] = {
    "adakv": ("AdaKVPress", "SnapKVPress"),
    "cur": ("CURPress",),
    "expected_attention": ("ExpectedAttentionPress",),
    "h2o": ("ObservedAttentionPress",),
    "keydiff": ("KeyDiffPress",),
    "knorm": ("KnormPress",),
    "lagkv": ("LagKVPress",),
    "leverage": ("LeverageScorePress",),
    "pyramidkv": ("PyramidKVPress",),
    "random": ("RandomPress",),
    "snapkv": ("SnapKVPress",),
    "streaming_llm": ("StreamingLLMPress",),
    "tova": ("TOVAPress",),
}
# Presses that read attention weights need the attention that materialises them.
EAGER_PRESSES = ("h2o",)
# Used where no variant of ours gives a byte budget.
DEFAULT_RATIO = 0.5
START_SECONDS = 300.0
CALL_SECONDS = 600.0


def environment() -> Path:
    """Where ``make peers`` builds the environment of kvpress."""
    import torchaccel

    return Path(torchaccel.__file__).parents[1] / "build" / "peers" / "kvpress"


class KVPress(Runner):
    """``generate()`` under a press, on the same weights and prompt.

    ``options`` hold ``press`` and ``compression_ratio``. Without a ratio the budget is what the first compressed cache
    of ours took: as many tokens are kept as fit into those bytes. Times and bytes are measured in the child, with the
    code that measures every other variant.
    """

    cases = ("generate",)
    follows = True

    def absent(self) -> str | None:
        """How to build its environment, when that is missing."""
        if (environment() / ".installed").is_file():
            return None
        return "kvpress runs in an environment of its own, which is not there; build it with: make peers"

    def settle(self, results: Sequence[Result], facts: ModelFacts, case: Case) -> None:
        """Derive the ratio from the bytes of the first compressed variant, unless it was given."""
        if "compression_ratio" in self.options:
            return
        ours = next((r for r in results if r.kv_bytes and "kv_compression" in r.options and r.status == "ok"), None)
        ratio = DEFAULT_RATIO if ours is None else equal_bytes_ratio(ours.kv_bytes or 0, facts, case)
        self.options |= {"compression_ratio": round(ratio, 4), "budget": "default" if ours is None else ours.variant}

    def build(self, model: Any, case: str) -> RemoteModel:
        """Start the child and hand it the weights, through a folder that both can read."""
        command = [str(environment() / "bin" / "python"), "-I", "-m", f"{__package__}.kvpress_worker"]
        name = self.options["press"]
        press = {"presses": PRESSES[name], "compression_ratio": self.options["compression_ratio"]}
        press["attention"] = "eager" if name in EAGER_PRESSES else "sdpa"
        return RemoteModel(model, command, press)

    def generate(self, model: RemoteModel, prompt: Tensor, new_tokens: int) -> Sample:
        """One call in the child."""
        return model.sample(prompt, new_tokens)

    def generate_peak(self, model: RemoteModel, prompt: Tensor, new_tokens: int, device: torch.device) -> int:
        """The peak in the child."""
        return model.peak(prompt, new_tokens)

    @property
    def methods(self) -> None:
        """Not modelled: which keys are kept is the press's business."""
        return None


def equal_bytes_ratio(budget: int, facts: ModelFacts, case: Case) -> float:
    """Share of the prompt to evict so that the cache ends with ``budget`` bytes; new tokens are all kept."""
    size = torch.empty(0, dtype=getattr(torch, facts.dtype)).element_size()
    token_bytes = 2 * case.batch * facts.layers * facts.kv_heads * facts.head_dim * size
    kept = budget / token_bytes - ((case.new_tokens or 1) - 1)
    return min(max(1 - kept / case.context, 0.0), 0.99)


class RemoteModel:
    """A model in a child process; ``generate`` and ``parameters`` serve whoever asks it recall questions."""

    def __init__(self, model: Any, command: Sequence[str], settings: Mapping[str, Any]) -> None:
        """Start ``command`` and let it load a copy of ``model``; ``settings`` go with the request."""
        self._model = model
        self._child = Child(command, {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"})
        # The weights are in the child's memory once it has answered.
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            where = {"folder": folder, "device": str(model.device), "threads": torch.get_num_threads()}
            self.versions = self._child.ask({"do": "load", **where, **settings}, START_SECONDS)

    def sample(self, prompt: Tensor, new_tokens: int) -> Sample:
        """Generate after ``prompt`` ``[B, S]`` in the child; times and bytes are the child's."""
        found = self._ask("sample", prompt, new_tokens)
        tokens = torch.tensor(found.pop("tokens"), device=prompt.device)
        return Sample(tokens, **found)

    def peak(self, prompt: Tensor, new_tokens: int) -> int:
        """Bytes the child holds at most above its weights."""
        return int(self._ask("peak", prompt, new_tokens)["bytes"])

    def generate(self, prompt: Tensor, *, max_new_tokens: int, **_: Any) -> Tensor:
        """Greedy tokens ``[B, S + n]`` as ``generate`` of transformers returns them."""
        return torch.cat([prompt, self.sample(prompt, max_new_tokens).tokens], 1)

    def parameters(self) -> Any:
        """Those of the original, for the device they are on."""
        return self._model.parameters()

    def _ask(self, what: str, prompt: Tensor, new_tokens: int) -> dict[str, Any]:
        request = {"do": what, "prompt": prompt.tolist(), "new_tokens": new_tokens}
        return self._child.ask(request, CALL_SECONDS)
