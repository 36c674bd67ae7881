"""``torchaccel.evaluate``: how fast, how small and how faithful a model is under different options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from .case import Case
from .evaluate import run_evaluate
from .machine import measure_machine
from .models import LoadedModel
from .results import write_document
from .session import Progress, Session, Silent
from .tables import evaluation_table, notes
from .tasks.continuation import TIMED_CALLS
from .tasks.run import EvaluateCase
from .texts import read_texts
from .variants import Variant, torchaccel_variants


class Evaluation:
    """The results document of an evaluation; prints as a table of fidelity beside speed and bytes."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.document = document

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """The record of every variant by its label, as it stands in the document."""
        return {result["variant"]: result for result in self.document["results"]}

    def save(self, path: str | Path) -> None:
        """Write the document as JSON."""
        write_document(self.document, Path(path))

    def __rich__(self) -> Table:
        return evaluation_table(self.document)

    def __str__(self) -> str:
        console = Console(width=160, emoji=False)
        with console.capture() as captured:
            console.print(self.__rich__())
            for line in notes(self.document):
                console.print(line, highlight=False)
        return captured.get()


def evaluate(
    model: Any,
    data: str | Path | Sequence[str],
    *,
    tokenizer: Any,
    options: Mapping[str, Any] | Sequence[Mapping[str, Any]] = (),
    progress: Progress | None = None,
    journal: str | Path | None = None,
    **case: Any,
) -> Evaluation:
    """Evaluate ``model`` in eager, in torchaccel exact, and once for each of ``options``, on ``data``.

    data: a text file, a folder of them, or texts. case: fields of ``EvaluateCase``, such as ``tasks=("perplexity",)``
    or ``window=2048``. journal: a file that keeps finished pieces, so that an interrupted call, repeated, goes on. The
    model keeps its weights and its own compilation, if any. Raises ``ValueError`` for what cannot be evaluated and
    ``OptionsError`` for options torchaccel does not know.
    """
    given = [options] if isinstance(options, Mapping) else list(options)
    texts = read_texts(Path(data)) if isinstance(data, str | Path) else list(data)
    asked = EvaluateCase(text=str(data) if isinstance(data, str | Path) else f"{len(texts)} texts", **case)
    device = next(model.parameters()).device
    session = open_evaluation(
        LoadedModel(type(model).__name__, model, tokenizer), asked, measure_machine(device), progress
    )
    document = run_evaluate(
        asked,
        texts,
        evaluation_variants([{}, *given]),
        session,
        ["torchaccel.evaluate"],
        None if journal is None else Path(journal),
    )
    return Evaluation(document)


def evaluation_variants(options: Sequence[Mapping[str, Any]]) -> list[Variant]:
    """Eager, and one torchaccel variant for each set of options."""
    return [Variant("eager", "eager"), *torchaccel_variants(options)]


def open_evaluation(loaded: LoadedModel, case: EvaluateCase, machine: Any, progress: Progress | None = None) -> Session:
    """A session that times ``generate`` as an evaluation does."""
    timed = Case("evaluate", case.prompt, case.batch, case.new_tokens, rounds=TIMED_CALLS, warmup=0)
    device = next(loaded.model.parameters()).device
    return Session(loaded, machine, timed, device, caches="warm", progress=progress or Silent())
