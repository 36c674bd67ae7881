"""The process that runs kvpress in an environment of its own: ``python -m`` this module answers requests until the end.

It imports torch, transformers and kvpress of that environment and, of torchaccel, only the code that measures.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from ..allocated import tensor_bytes
from ..generate import generate, sample
from ..memory import transient_peak
from .child import serve


class Worker:
    """One model under one press."""

    def __init__(self) -> None:
        self.model: Any = None
        self.press: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do what ``request["do"]`` names: load, sample, or peak."""
        if request["do"] == "load":
            return self._load(request)
        prompt = torch.tensor(request["prompt"], device=self.model.device)
        if request["do"] == "peak":
            with self.press(self.model):
                held = transient_peak(lambda: generate(self.model, prompt, request["new_tokens"]), prompt.device)
            return {"bytes": held}
        with self.press(self.model):
            found = sample(self.model, prompt, request["new_tokens"], lambda cache: tensor_bytes(cache.layers))
        times = {"ms": found.ms, "ttft_ms": found.ttft_ms, "tpot_ms": found.tpot_ms}
        return {"tokens": found.tokens.tolist(), "kv_bytes": found.kv_bytes, **times}

    def _load(self, request: dict[str, Any]) -> dict[str, Any]:
        import kvpress
        import transformers

        torch.set_num_threads(request["threads"])
        *wrappers, innermost = request["presses"]
        self.press = getattr(kvpress, innermost)(compression_ratio=request["compression_ratio"])
        for wrapper in reversed(wrappers):
            self.press = getattr(kvpress, wrapper)(press=self.press)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            request["folder"], dtype="auto", local_files_only=True, attn_implementation=request["attention"]
        )
        self.model.to(request["device"]).eval()
        return {"transformers": transformers.__version__, "torch": torch.__version__}


def main() -> None:
    """Answer on the real standard output, and send whatever libraries print there to stderr."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    serve(Worker().answer, sys.stdin, answers)


if __name__ == "__main__":
    main()
