"""SentenceKV against a mask over eager attention, and the worked examples of its specification."""

import pytest
import torch
import torch.nn.functional as F
from torchaccel.passes.kv_compression.sentence_kv import SentenceSelection, budgeted
from transformers import DynamicCache

import torchaccel
from tests.e2e.generation import all_lowered, compiled, greedy, phases, prompt
from tests.models.families import VOCAB
from tests.passes.kv_compression.a6 import prompt_of
from tests.passes.listed_reference import Lister, listing
from torchaccel.errors import EvictedTokensError
from torchaccel.runtime.selection import Call, Sizes

# So few that every sentence has a vector of its own.
ENDS = tuple(range(0, VOCAB, 33))
SIZES = {"tokens": 40, "factor": 2.0, "window": 8, "kernel": 3, "start": 4, "recent": 6, "longest": 16}


class SentenceRule(Lister):
    """From the specification, a row and a head at a time, over lists of columns."""

    def __init__(self, ids, ends, tokens, factor, window, kernel, start, recent, longest):
        self.ids, self.ends = [row.tolist() for row in ids], ends
        self.tokens, self.retained, self.window, self.kernel = tokens, int(tokens * factor) + window, window, kernel
        self.start, self.recent, self.longest = start, recent, longest
        self.kept, self.queries = {}, {}

    def fed(self, ids):
        for row, new in zip(self.ids, ids.tolist(), strict=True):
            row.extend(new)

    def prompt(self, layer, q, k, weights, valid):
        total = k.shape[2]
        votes = weights[:, :, -self.window :].sum(2).unflatten(1, (k.shape[1], -1)).mean(2)[..., : -self.window]
        votes = F.max_pool1d(votes, self.kernel, 1, self.kernel // 2).masked_fill(
            ~valid[:, None, : -self.window], -torch.inf
        )
        best = votes.sort(dim=-1, descending=True, stable=True).indices[..., : self.retained - self.window]
        recent = torch.arange(total - self.window, total).expand(*best.shape[:2], -1)
        self.kept[layer], self.queries[layer] = torch.cat([best.sort(-1).values, recent], 2), []
        self.total = total

    def sentences(self, row, valid):
        """Number of the sentence of every column."""
        found, number, length = [], -1, 0
        opened = True
        for column, real in enumerate(valid):
            if not real:
                found.append(-1)
                continue
            if opened or length == self.longest:
                number, length, opened = number + 1, 0, False
            found.append(number)
            length += 1
            opened = self.ids[row][column] in self.ends
        return found

    def step(self, layer, q, k, valid):
        batch, kv_heads, total, _ = k.shape
        chosen = torch.zeros(batch, kv_heads, total, dtype=torch.bool)
        self.queries[layer].append(q.unflatten(1, (kv_heads, -1)).mean(2)[:, :, 0])
        for b in range(batch):
            sentence = self.sentences(b, valid[b].tolist())
            own = sum(s == sentence[-1] for s in sentence[self.total :])
            query = torch.stack(self.queries[layer][-own:])[:, b].mean(0)
            for h in range(kv_heads):
                columns = [c for c in self.kept[layer][b, h].tolist() if valid[b, c]] + list(range(self.total, total))
                always = columns[: self.start] + columns[-self.recent :]
                left = self.tokens - len(set(always))
                groups = {}
                for column in columns:
                    groups.setdefault(sentence[column], []).append(column)
                scores = {s: float(k[b, h, group].mean(0) @ query[h]) for s, group in groups.items()}
                picked = []
                for s in sorted(groups, key=lambda s: -scores[s]):
                    picked += [column for column in groups[s] if column not in always]
                chosen[b, h, always + picked[:left]] = True
        return chosen


def generate(model, rule, inputs, tokens):
    """Greedy ids, the rule told of each before it is fed."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    cache = DynamicCache(config=model.config)
    found, step = ids, ids
    with torch.no_grad():
        for _ in range(tokens):
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -step.shape[1] :]
            out = model(step, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True)
            step = out.logits[:, -1:].argmax(-1)
            rule.fed(step)
            found, mask = torch.cat([found, step], 1), F.pad(mask, (0, 1), value=1)
    return found


@pytest.mark.parametrize(("ends", "padding"), [(ENDS, (0, 0)), (ENDS, (0, 21)), ((), (30, 0))])
def test_generation_equals_the_masked_reference(ends, padding):
    method = {"method": "sentence_kv", "ends": ends, **SIZES}
    eager, fast = compiled("llama", options={"kv_compression": method, "strict": True})
    inputs = prompt(2, 150, padding=padding)
    exact = greedy(eager, inputs, 40, eos_token_id=None)
    rule = SentenceRule(inputs["input_ids"], ends, **SIZES)
    found = generate(listing(eager, rule), rule, inputs, 40)
    assert torch.equal(greedy(fast, inputs, 40, eos_token_id=None), found) and not torch.equal(found, exact)
    assert phases(fast) == ["prefill", "decode"] and all_lowered(fast)


def test_budgets_beyond_the_prompt_are_exact():
    eager, fast = compiled("llama", options={"kv_compression": {"method": "sentence_kv", "ends": ENDS}})
    inputs = prompt(2, 42, padding=(5, 0))
    assert torch.equal(greedy(fast, inputs, 12), greedy(eager, inputs, 12))


def state_of(policy, keys, ids):
    tokens = len(ids)
    made = prompt_of(torch.eye(tokens))
    made = type(made)(**{**made.__dict__, "ids": torch.tensor([ids]), "keys": keys})
    state = policy.allocate(Sizes(1, 1, 64, keys.shape[3], torch.float32), torch.device("cpu"))
    policy.begin(state, made, keys, None)
    return state


def test_worked_example():
    """Mean keys (.5, .5), (1, 1.5), (1, .5), queries (1, 2), (3, 0): sentence 1, then 2, then 0."""
    policy = SentenceSelection(2, (9,), 64, 0, 0)
    keys = torch.tensor([(1, 0), (0, 1), (2, 0), (0, 3), (1, 1), (1, 0)]).float()[None, None]
    state = state_of(policy, keys, [1, 9, 2, 9, 3, 4])
    assert state["begins"][0, 0, :3].tolist() == [0, 2, 4] and state["last"].item() == 2
    means = state["totals"][0, 0, :3] / 2
    torch.testing.assert_close(means, torch.tensor([(0.5, 0.5), (1, 1.5), (1, 0.5)]))
    scores = means @ torch.tensor([2.0, 1.0])
    torch.testing.assert_close(scores, torch.tensor([1.5, 3.5, 2.5]))
    assert budgeted(scores, torch.tensor([2, 2, 2]), torch.tensor(2)).tolist() == [0, 2, 0]
    assert budgeted(scores, torch.tensor([2, 2, 2]), torch.tensor(5)).tolist() == [1, 2, 2]


def test_an_end_closes_the_sentence_and_a_crop_opens_it_again():
    policy = SentenceSelection(8, (9,), 3, 1, 1)
    keys = torch.randn(1, 1, 10, 4)
    state = state_of(policy, keys[:, :, :4], [1, 9, 2, 3])
    for slot, token in enumerate([4, 5, 9, 9, 6, 7], 4):
        key = keys[:, :, slot : slot + 1]
        policy.append(state, Call(key, key, torch.tensor([0, slot, slot]), None, torch.tensor([[token]])))
    # Three tokens at most, and those of ends close their own.
    assert state["number"][0, 0, :10].tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 4, 4]
    whole = policy.allocate(Sizes(1, 1, 64, 4, torch.float32), torch.device("cpu"))
    for name, x in state.items():
        whole[name].copy_(x)
    policy.restore(state, lambda begin, end: keys[:, :, begin:end], 6, 6)
    torch.testing.assert_close(state["totals"][0, 0, 2], keys[0, 0, 5])
    assert not state["totals"][0, 0, 3:].any() and state["last"].item() == 2 and state["queries"].item() == 0
    for slot, token in enumerate([9, 9, 6, 7], 6):
        key = keys[:, :, slot : slot + 1]
        policy.append(state, Call(key, key, torch.tensor([0, slot, slot]), None, torch.tensor([[token]])))
    assert state["number"][0, 0, :10].tolist() == [0, 0, 1, 1, 1, 2, 2, 3, 4, 4]
    torch.testing.assert_close(state["totals"], whole["totals"])
    with pytest.raises(EvictedTokensError, match="SentenceSelection"):
        policy.restore(state, lambda begin, end: keys[:, :, begin:end], 4, 6)


def test_several_tokens_at_once_are_one_after_the_other():
    policy = SentenceSelection(8, (9,), 3, 1, 1)
    keys, q = torch.randn(1, 1, 10, 4), torch.randn(1, 2, 10, 4)
    ids = [1, 9, 2, 3, 4, 5, 9, 9, 6, 7]
    one = state_of(policy, keys[:, :, :2], ids[:2])
    many = state_of(policy, keys[:, :, :2], ids[:2])
    for slot in range(2, 10):
        part = slice(slot, slot + 1)
        lens = torch.tensor([0, slot, slot])
        policy.append(one, Call(q[:, :, part], keys[:, :, part], lens, None, torch.tensor([ids[part]])))
    policy.append(many, Call(q[:, :, 2:], keys[:, :, 2:], torch.tensor([0, 2, 2]), None, torch.tensor([ids[2:]])))
    for name in one:
        torch.testing.assert_close(one[name], many[name])


def test_too_many_sentences_share_vectors():
    policy = SentenceSelection(8, (9,), 64, 1, 1)
    keys = torch.randn(1, 1, 60, 4)
    state = state_of(policy, keys, [9] * 60)
    room = state["totals"].shape[2]
    numbers = state["number"][0, 0, :60]
    assert numbers.max() == room - 1 and (numbers.diff() >= 0).all() and room < 60
    torch.testing.assert_close(state["totals"].sum(2), keys.sum(2))


def test_options_are_checked():
    with pytest.raises(torchaccel.errors.OptionsError, match="leave nothing"):
        torchaccel.options.resolve({"kv_compression": {"method": "sentence_kv", "tokens": 64}})
