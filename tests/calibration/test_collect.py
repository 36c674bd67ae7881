"""What calibrators are shown: the very tensors of the model, layer by layer, and which tokens are no padding."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.e2e.generation import prompt
from tests.models.families import build
from torchaccel.calibration.calibrator import Observation
from torchaccel.calibration.collect import TextCollector
from torchaccel.calibration.identity import SiteShape


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_what_is_shown_is_what_the_model_computes(family: str) -> None:
    model = build(family)
    inputs = prompt(2, 13, padding=(0, 4))
    collector = TextCollector(model, [inputs])
    assert collector.sites == (SiteShape(4, 2, 16),) * 3
    seen: list[Observation] = []
    collector.run(("plain_keys", "keys", "values", "output", "queries"), seen.append)
    assert [found.site for found in seen] == [0, 1, 2]
    assert all(torch.equal(found.valid, inputs["attention_mask"].bool()) for found in seen)
    projected: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Any:
        return lambda module, args, out: projected.__setitem__(name, out)

    for index, layer in enumerate(model.model.layers):
        for name in ("k_proj", "v_proj"):
            getattr(layer.self_attn, name).register_forward_hook(hook(f"{index}.{name}"))
    with torch.no_grad():
        cache = model(**inputs, use_cache=True).past_key_values
    for index, found in enumerate(seen):
        as_heads = {name: projected[f"{index}.{name}"].unflatten(-1, (2, 16)) for name in ("k_proj", "v_proj")}
        torch.testing.assert_close(found.tensors["plain_keys"], as_heads["k_proj"].transpose(1, 2))
        assert torch.equal(found.tokens("values"), as_heads["v_proj"][inputs["attention_mask"].bool()])
        if family == "llama":
            torch.testing.assert_close(found.tensors["keys"], cache.layers[index].keys)
        assert found.tensors["output"].shape == found.tensors["queries"].shape == (2, 4, 13, 16)


def test_batches_are_shown_one_after_another_and_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    batches = [prompt(1, 9, seed=seed) for seed in range(3)]
    collector = TextCollector(build("gpt2"), batches, lambda done, steps: told.append((done, steps)))
    sizes: list[tuple[int, ...]] = []
    collector.run(("values",), lambda seen: sizes.append(tuple(seen.tensors["values"].shape)))
    assert sizes == [(1, 4, 9, 16)] * 9 and told == [(0, 3), (1, 3), (2, 3)]
