"""Train the demo model from a folder of plain text: tokenizer, tokens, training, scores, weights.

    python benchmarks/train_demo_model.py TEXTS OUT --minutes 110                   # the shipped size, two cores
    python benchmarks/train_demo_model.py TEXTS OUT --hidden 384 --layers 12        # 19 M parameters, a GPU

Running the same command again resumes from the last checkpoint in OUT until the minutes are used up.
"""

from __future__ import annotations

import json
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from corpus import END, PAD, prepare
from mixture import ASKED, FIRST_TOKEN, Mixture, weighted_loss
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from torchaccel.evaluation.recall import TASKS, recall_score

CONSOLE_WIDTH = 120
PROBE_EVERY = 50
SAVE_EVERY = 200
# Short sequences are where induction heads form; the long ones come once they have.
STAGES = ((0.5, 16), (0.8, 4), (1.0, 2))


@dataclass
class State:
    """Where training stands: kept next to the weights, so that a run can be resumed."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0
    copying: float = 0.0
    recall: float = 0.0


class Trainer:
    """A model, its optimizers, its data and its state, all in the folder ``out``."""

    def __init__(
        self, model: LlamaForCausalLM, mixture: Mixture, out: Path, device: torch.device, budget: float
    ) -> None:
        self.model = model.to(device)
        self.mixture = mixture
        self.out = out
        self.device = device
        self.budget = budget
        self.state = State()
        named = list(model.named_parameters())
        matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name]
        others = [p for name, p in named if p.ndim != 2 or "embed" in name]
        # Muon orthogonalises the updates of matrices: induction heads form several times sooner than with AdamW.
        self.optimizers = [
            torch.optim.Muon(matrices, lr=0.012, momentum=0.95, weight_decay=0.01),
            torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.rates = [group["lr"] for optimizer in self.optimizers for group in optimizer.param_groups]

    @property
    def progress(self) -> float:
        """Share of the time budget that is used."""
        return self.state.seconds / self.budget

    def step(self, context: int, tokens_per_step: int) -> float:
        """One optimizer step; returns its loss."""
        began = time.perf_counter()
        length = max(32, context // next(part for end, part in STAGES if self.progress < end or end == 1.0))
        self._set_rates()
        tokens, weights = (t.to(self.device) for t in self.mixture.batch(max(1, tokens_per_step // length), length))
        loss = weighted_loss(self._logits(tokens[:, :-1]), tokens, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        value = loss.item()
        self.state.step += 1
        self.state.tokens += tokens.numel()
        self.state.seconds += time.perf_counter() - began
        return value

    def probe(self) -> None:
        """Measure copying and recall, on which the mixture depends."""
        probe = Mixture(self.mixture.tokenizer, self.mixture.text, self.mixture.vocabulary, random.Random(7))
        noise = [[probe.rng.randrange(FIRST_TOKEN, probe.vocabulary) for _ in range(60)] * 2 for _ in range(4)]
        repeated = torch.tensor(noise, device=self.device)
        guesses = self._guess(repeated)
        self.state.copying = (guesses[:, 62:] == repeated[:, 63:]).float().mean().item()
        drawn = [probe.recall_example(400) for _ in range(6)]
        tokens = torch.tensor([ids for ids, _ in drawn], device=self.device)
        asked = torch.tensor([weights for _, weights in drawn], device=self.device)[:, 1:] == ASKED
        self.state.recall = (self._guess(tokens) == tokens[:, 1:])[asked].float().mean().item()
        self.mixture.copying, self.mixture.recall = self.state.copying, self.state.recall

    def save(self) -> None:
        """Keep weights, optimizer moments and state, each file replaced at once."""
        moments = {}
        for index, optimizer in enumerate(self.optimizers):
            for number, values in optimizer.state_dict()["state"].items():
                moments |= {f"{index}.{number}.{name}": torch.as_tensor(v).clone() for name, v in values.items()}
        weights = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        for name, tensors in (("weights", weights), ("moments", moments)):
            save_file(tensors, self.out / f"{name}.new")
            (self.out / f"{name}.new").replace(self.out / f"{name}.safetensors")
        (self.out / "state.json").write_text(json.dumps(asdict(self.state), indent=1))

    def resume(self) -> bool:
        """Continue from what ``save`` kept, if anything; tells whether there was something."""
        if not (self.out / "state.json").is_file():
            return False
        self.state = State(**json.loads((self.out / "state.json").read_text()))
        kept = load_file(self.out / "weights.safetensors", device=str(self.device))
        # The head shares the embedding's tensor, so it is not kept twice.
        self.model.load_state_dict(kept | {"lm_head.weight": kept["model.embed_tokens.weight"]})
        moments = load_file(self.out / "moments.safetensors", device=str(self.device))
        for index, optimizer in enumerate(self.optimizers):
            state: dict[int, dict[str, Tensor]] = {}
            for key, value in moments.items():
                owner, number, name = key.split(".", 2)
                if int(owner) == index:
                    state.setdefault(int(number), {})[name] = value
            optimizer.load_state_dict(optimizer.state_dict() | {"state": state})
        self.mixture.copying, self.mixture.recall = self.state.copying, self.state.recall
        self.mixture.rng.seed(self.state.step)
        return True

    def _logits(self, tokens: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16):
            return self.model(tokens, use_cache=False).logits

    @torch.no_grad()
    def _guess(self, tokens: Tensor) -> Tensor:
        return self._logits(tokens[:, :-1]).argmax(-1)

    def _set_rates(self) -> None:
        warm = min(1.0, (self.state.step + 1) / 100)
        decay = 1.0 if self.progress < 0.5 else max(0.02, 2 * (1 - self.progress))
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        for group, rate in zip(groups, self.rates, strict=True):
            group["lr"] = rate * warm * decay


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokenizer: Any, held_out: np.ndarray, context: int) -> dict[str, float]:
    """Nats per token of held-out text and exact-match recall at an eighth, a quarter and half of ``context``."""
    model.eval()
    scores: dict[str, float] = {}
    device = next(model.parameters()).device
    for length in (context // 8, context // 4, context // 2):
        starts = range(0, max(1, len(held_out) - length - 1), max(1, len(held_out) // 6))
        losses = []
        for start in starts:
            ids = torch.from_numpy(held_out[start : start + length + 1].astype(np.int64))[None].to(device)
            losses.append(model(ids, labels=ids, use_cache=False).loss.item())
        scores[f"text_nll@{length}"] = round(sum(losses) / len(losses), 3)
        for task in TASKS:
            if length >= 256:
                scores[f"{task.name}@{length}"] = recall_score(model, tokenizer, task, length, 20)
    return scores


def main(
    texts: Annotated[Path, typer.Argument(help="Folder of .txt or .txt.xz files, named Author_Title.")],
    out: Annotated[Path, typer.Argument(help="Folder for tokens, checkpoints and the final model.")],
    minutes: Annotated[float, typer.Option(help="Training time, resumed runs together.")] = 110.0,
    hidden: Annotated[int, typer.Option(help="Width.")] = 192,
    intermediate: Annotated[int | None, typer.Option(help="MLP width; 8/3 of the width by default.")] = None,
    layers: int = 8,
    heads: int = 6,
    kv_heads: int = 2,
    vocabulary: Annotated[int, typer.Option(max=65535, help="Tokens of the vocabulary.")] = 2048,
    context: Annotated[int, typer.Option(min=512, help="Twice the longest training sequence.")] = 4096,
    tokens_per_step: int = 8192,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    compiled: Annotated[bool, typer.Option(help="Compile the decoder for training.")] = True,
) -> None:
    """Train a small Llama on text, copying and recall, and save it in the Hugging Face format under OUT/model."""
    console = Console(width=CONSOLE_WIDTH)
    torch.manual_seed(1)
    tokens, train, held_out = prepare(texts, out, vocabulary)
    console.print(f"{len(train):,} training tokens, {len(held_out):,} held out")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token=END, pad_token=PAD)
    end, pad = tokens.token_to_id(END), tokens.token_to_id(PAD)
    config = LlamaConfig(
        vocab_size=tokens.get_vocab_size(), hidden_size=hidden, intermediate_size=intermediate or hidden * 8 // 3,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=hidden // heads,
        max_position_embeddings=context, rms_norm_eps=1e-5, tie_word_embeddings=True,
        bos_token_id=end, eos_token_id=end, pad_token_id=pad,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    mixture = Mixture(tokens, train, config.vocab_size)
    trainer = Trainer(model, mixture, out, torch.device(device), minutes * 60)
    resumed = trainer.resume()
    console.print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {'resumed' if resumed else 'new'}")
    if compiled:
        model.model.compile()
    while trainer.progress < 1:
        loss = trainer.step(context, tokens_per_step)
        state = trainer.state
        if state.step % PROBE_EVERY == 0:
            trainer.probe()
            console.print(
                f"step {state.step}  {state.tokens / 1e6:.2f} M tokens  {trainer.progress:.0%}  loss {loss:.3f}  "
                f"copying {state.copying:.2f}  recall {state.recall:.2f}",
                highlight=False,
            )
        if state.step % SAVE_EVERY == 0:
            trainer.save()
    trainer.save()
    trained = LlamaForCausalLM(config).to(device)
    trained.load_state_dict(model.state_dict())
    scores = evaluate(trained, tokenizer, held_out, context)
    console.print(scores)
    folder = out / "model"
    trained.to(torch.bfloat16).save_pretrained(folder)
    tokens.save(str(folder / "tokenizer.json"))
    (folder / "scores.json").write_text(json.dumps(scores, indent=1))
    console.print(f"saved in {folder}")


if __name__ == "__main__":
    typer.run(main)
