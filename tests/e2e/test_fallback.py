"""Whatever cannot be accelerated runs exactly, or fails with an error the user can act on; never a crash."""

import inspect
import subprocess
import sys
import warnings

import pytest
import torch
from transformers import DynamicCache

import torchaccel
from tests.e2e.generation import compiled, greedy, prompt
from tests.models.families import build
from torchaccel.errors import DeclinedError, OptionsError


def test_training_declines_and_gives_the_same_gradients():
    eager, fast = compiled("llama")
    ids = prompt(2, 9)["input_ids"]
    for model in (eager, fast):
        model(ids, labels=ids).loss.backward()
    for ours, theirs in zip(fast.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, atol=1e-4, rtol=1e-4)
    assert "gradients are needed" in torchaccel.report(fast).declines[0]


def test_unknown_options_raise_before_anything_is_compiled():
    with pytest.raises(OptionsError, match="did you mean 'kv_compression'"):
        torchaccel.compile(build("llama"), kv_compresssion="int8")


def test_unknown_options_through_torch_compile_raise_too():
    model = build("llama")
    model.compile(backend="torchaccel", options={"kv_compression": "int3"})
    with pytest.raises(Exception, match="int3"), torch.no_grad():
        model(prompt(1, 4)["input_ids"])


def test_a_declined_method_warns_with_site_and_reason_and_stays_exact():
    eager, fast = compiled("llama", options={"token_pruning": {"method": "fastv", "layer": 30}})
    inputs = prompt(1, 9)
    with pytest.warns(UserWarning, match=r"fastv left 1 site.*too few layers.*layer 30 of 3"):
        got = greedy(fast, inputs, 4)
    assert torch.equal(got, greedy(eager, inputs, 4))


def test_strict_raises_what_otherwise_declines():
    _, fast = compiled("llama", options={"token_pruning": {"method": "fastv", "layer": 30}, "strict": True})
    with pytest.raises(Exception, match="too few layers") as caught:
        greedy(fast, prompt(1, 9), 4)
    assert isinstance(caught.value, DeclinedError) or "DeclinedError" in repr(caught.value)


def test_a_failing_pass_leaves_the_graph_exact(monkeypatch):
    from torchaccel.passes.kv_compression.int8 import Int8

    def fail(self, context):
        context.graph.erase_node(next(n for n in reversed(context.graph.nodes) if n.op == "output"))
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(Int8, "apply", fail)
    eager, fast = compiled("llama", options={"kv_compression": "int8"})
    inputs = prompt(1, 9)
    with pytest.warns(UserWarning, match="int8 failed.*broken on purpose"):
        got = greedy(fast, inputs, 4)
    assert torch.equal(got, greedy(eager, inputs, 4))


@pytest.mark.parametrize("length", [1, 2])
def test_the_shortest_prompts(length):
    eager, fast = compiled("llama")
    assert torch.equal(greedy(fast, prompt(1, length), 6), greedy(eager, prompt(1, length), 6))


def test_batch_zero_is_an_error_in_eager_and_here_and_the_model_still_works():
    eager, fast = compiled("llama")
    empty = torch.zeros(0, 5, dtype=torch.int64)
    for model in (eager, fast):
        with torch.no_grad(), pytest.raises(Exception, match="cannot reshape tensor of 0 elements"):
            model(empty)
    assert torch.equal(greedy(fast, prompt(1, 5), 3), greedy(eager, prompt(1, 5), 3))


def test_nan_in_the_input_spreads_as_in_eager():
    hidden = torch.randn(1, 6, 64)
    hidden[0, 2] = torch.nan
    found = []
    for model in compiled("llama"):
        with torch.no_grad():
            cache = DynamicCache(config=model.config)
            logits = model(inputs_embeds=hidden, past_key_values=cache, use_cache=True).logits
            step = model(prompt(1, 1)["input_ids"], past_key_values=cache, use_cache=True).logits
        found.append((logits.isnan(), step.isnan()))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True)) and found[0][1].all()


def test_a_function_without_attention_compiles():
    fast = torch.compile(lambda x: torch.relu(x) @ x.T, backend="torchaccel")
    x = torch.randn(5, 7)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), torch.relu(x) @ x.T)


def test_two_compilations_do_not_know_of_each_other():
    eager, exact = compiled("llama")
    _, lossy = compiled("llama", options={"sparse_attention": {"method": "streaming_llm", "sinks": 1, "window": 2}})
    inputs = prompt(1, 20)
    sparse = greedy(lossy, inputs, 16)
    assert torch.equal(greedy(exact, inputs, 16), greedy(eager, inputs, 16))
    assert not torch.equal(sparse, greedy(eager, inputs, 16))
    assert torchaccel.report(exact).requested == {} and "streaming_llm" in torchaccel.report(lossy).effective


@pytest.mark.skipif(
    "isolate_recompiles" not in inspect.signature(torch.compile).parameters, reason="this torch shares the limit"
)
def test_many_models_of_one_class_do_not_exhaust_the_limit_of_recompiles():
    inputs = prompt(1, 9)
    for number in range(5):
        eager, fast = compiled("llama", layers=1, seed=number)
        assert torch.equal(greedy(fast, inputs, 4), greedy(eager, inputs, 4))
        assert torchaccel.report(fast).graphs == 2 and torchaccel.report(fast).records[-1].counter.calls == 3


def test_fuel_applies_only_the_first_rewrites(monkeypatch):
    monkeypatch.setenv("TORCHACCEL_FUEL", "2")
    _, fast = compiled("llama", options={"kv_compression": "int8"})
    with torch.no_grad():
        fast(prompt(1, 9)["input_ids"], use_cache=True)
    assert torchaccel.report(fast).effective == {"int8": {"prefill": 2}}


def test_fuel_must_be_a_number(monkeypatch):
    monkeypatch.setenv("TORCHACCEL_FUEL", "some")
    _, fast = compiled("llama", layers=1)
    with pytest.raises(Exception, match=r"TORCHACCEL_FUEL must be the number of rewrites.*'some'"), torch.no_grad():
        fast(prompt(1, 4)["input_ids"])


def test_dump_writes_the_graph_before_and_after_each_pass(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHACCEL_DUMP", str(tmp_path))
    _, fast = compiled("llama", options={"kv_compression": "int8"})
    with torch.no_grad():
        fast(prompt(1, 9)["input_ids"], use_cache=True)
    names = sorted(path.name.split("-", 2)[2] for path in tmp_path.iterdir())
    assert names == ["canonicalize.py", "captured.py", "int8.py", "lowered.py"]


def test_a_backend_that_never_got_a_graph_says_so_at_exit():
    code = "import torch; m = torch.compile(torch.nn.Linear(2, 2), backend='torchaccel')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr.count("never received a graph") == 1
    code += "\nwith torch.no_grad(): m(torch.ones(1, 2))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "never received a graph" not in done.stderr


def test_explain_says_what_would_happen_without_compiling():
    model = build("llama")
    found = torchaccel.explain(model, prompt(1, 9)["input_ids"], options={"kv_compression": "int8"})
    assert found.effective == {"int8": {"prefill": 3}} and "int8" in str(found)
    assert torchaccel.report(model).graphs == 0


def test_the_exact_road_is_quiet():
    _, fast = compiled("llama")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*torchaccel.*")
        greedy(fast, prompt(1, 9), 3)


def test_dynamo_may_start_over_with_the_numbers_of_another_model():
    """The scale of the second model is another one: Dynamo takes it for a variable, and starts over when it is none."""
    for heads in (4, 2):
        model = torchaccel.compile(build("vit", layers=1, num_attention_heads=heads))
        with torch.no_grad():
            model(torch.randn(1, 3, 16, 16))
        assert not torchaccel.report(model).declines
