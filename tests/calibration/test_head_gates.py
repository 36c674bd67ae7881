"""Gates of KV heads: which heads a plan names, what passkeys look like, and what training leaves of the model."""

import pytest
import torch
from torchaccel.passes.kv_compression.duo_attention import DuoAttentionOptions

import torchaccel
from tests.e2e.generation import greedy, prompt
from tests.models.families import VOCAB, build
from torchaccel.calibration.calibrate import calibrate
from torchaccel.calibration.head_gates import gates_of, passkeys, rate, retrieval_heads, window
from torchaccel.errors import CalibrationError
from torchaccel.options import resolve

OPTIONS = {"sinks": 3, "recent": 12, "steps": 3}


def test_heads_above_the_quantile_retrieve():
    gates = [torch.tensor([0.9, 0.1]), torch.tensor([0.5, 0.3])]
    assert retrieval_heads(gates, 0.5) == [(0,), (0,)]
    assert retrieval_heads(gates, 0.0) == [(0, 1), (0, 1)] and retrieval_heads(gates, 1.0) == [(), ()]
    # Of equal gates some are taken, the same ones every time.
    equal = [torch.ones(4), torch.ones(4)]
    assert sum(map(len, retrieval_heads(equal, 0.75))) == 2
    assert retrieval_heads(equal, 0.75) == retrieval_heads(equal, 0.75)


def test_passkeys_are_told_and_asked_for():
    text = torch.arange(1000, 1512)
    ids, answers = passkeys(text, torch.Generator().manual_seed(0))
    assert ids.shape == (1, 512) and answers.shape == (8 * 6,)
    body, questions = ids[0, : -8 * 8].tolist(), ids[0, -8 * 8 :].view(8, 8)
    for index, key in enumerate(questions.tolist()):
        places = [i for i in range(len(body) - 7) if body[i : i + 8] == key]
        assert len(places) == 1
        # The last six of the eight tokens are predicted from the token before each.
        assert (ids[0, answers.view(8, 6)[index] + 1] == torch.tensor(key[2:])).all()
        del body[places[0] : places[0] + 8]
    assert body == list(range(1000, 1512 - 2 * 64))


def test_the_window_of_the_specification():
    rows = ["100000", "110000", "111000", "101100", "100110", "100011"]
    assert ["".join(map(str, row)) for row in window(6, 1, 2, torch.device("cpu")).int().tolist()] == rows


def test_the_rate_warms_up_and_decays():
    rates = [rate(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and rates[19] == rates[80] == 1.0 and rates[99] == pytest.approx(0.1)


def test_a_plan_is_made_and_used(tmp_path):
    model = build("llama")
    ids = torch.randint(3, VOCAB, (2, 80), generator=torch.Generator().manual_seed(0))
    weights = [weight.clone() for weight in model.parameters()]
    plan = calibrate(model, "duo_attention", [ids], OPTIONS)
    gates = gates_of(plan.tensors)
    assert [gate.shape for gate in gates] == [(2,)] * 3
    assert 0.9 < torch.cat(gates).min() < torch.cat(gates).max() <= 1.0
    for weight, before in zip(model.parameters(), weights, strict=True):
        assert weight.requires_grad and weight.grad is None and torch.equal(weight, before)
    plan.save(tmp_path / "plan.safetensors")
    asked = {"method": "duo_attention", "plan": str(tmp_path / "plan.safetensors")}
    heads = dict(enumerate(retrieval_heads(gates, 0.5)))
    named = {"method": "duo_attention", "retrieval_heads": heads, "sinks": 3, "recent": 12}
    found = [
        greedy(torchaccel.compile(build("llama"), gate=False, strict=True, kv_compression=one), prompt(1, 60), 6)
        for one in (asked, named)
    ]
    assert torch.equal(*found)


def test_texts_that_cannot_tell_are_refused():
    with pytest.raises(CalibrationError, match=r"no text has twice as many, 30"):
        calibrate(build("llama"), "duo_attention", [torch.full((1, 20), 5)], OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"retrieval_heads": {0: [1]}, "sparsity": 0.3}, "leave out sparsity"),
        ({"retrieval_heads": {-1: [1]}}, "counted from 0"),
        ({"retrieval_heads": {0: [1]}, "recent": 0}, "greater than or equal to 1"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        DuoAttentionOptions(**options)


def test_without_heads_a_plan_is_asked_for():
    with pytest.raises(CalibrationError, match="torchaccel calibrate --method duo_attention"):
        resolve({"kv_compression": "duo_attention"})
