"""The sampler: what it samples, that nothing around a row changes it, when it stops, and what it costs."""

import json
import os
import random
import re
import shutil
import sys
import types
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from processes import on_ranks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import sample
from data import files, tokenizer
from data.files import run_cli
from data.prompts import STOP
from model import Llama, LlamaConfig
from sample import Sampler, SamplingParams, Stop, inverse_cdf, stream_keys, truncate, uniforms, unsharded

torch.set_num_threads(1)  # on matrices this small a second thread is only waited for

CONFIG = LlamaConfig(61, 2, 32, 4, 2, 8, 48, rope_theta=100.0)
PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [12, 13], [14] * 12, [15, 16, 17]]
WORDS = "the cat sat on the mat, naïve 😀 User: hello End of it."


def random_llama(config: LlamaConfig = CONFIG, seed: int = 0) -> Llama:
    """Logits of a few units, so that a token's probability is neither 1 nor 1 / vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    model = Llama(config)
    with torch.no_grad():
        for p in model.parameters():
            drawn = torch.randn(p.shape, generator=generator) if p.ndim > 1 else torch.ones(())
            p.copy_(drawn / p.shape[-1] ** 0.5 * 1.5 if p.ndim > 1 else drawn)
    return model


@pytest.fixture(scope="module")
def words() -> tokenizer.Tokenizer:
    return tokenizer.train([WORDS * 3], 280)


class Script(nn.Module):
    """A stand-in for a Llama that says what it is told: after a prompt that starts with i, answers[i] and 0s.

    Which prompt a slot holds is read from the KV cache: a slot that was filled wrongly says the wrong thing.
    """

    def __init__(self, answers: list[list[int]], vocab_size: int):
        super().__init__()
        self.config = LlamaConfig(vocab_size, 1, 4, 1, 1, 2, 4)
        self.compute_dtype, self.embed, self.answers = torch.float32, nn.Embedding(1, 1), answers
        self.blocks, self.shapes = [], []  # (B, T) of every forward

    def hidden(self, tokens, cache):
        B, T = tokens.shape
        self.shapes.append((B, T))
        positions = cache.lengths[:B, None] + torch.arange(T)
        ids = torch.stack((tokens, torch.zeros_like(tokens)), -1)[:, :, None].float()  # (B, T, 1, 2)
        cache.write(0, cache.places(positions), ids, ids)
        out = torch.zeros(B, T, 1)
        for b in range(B):
            seen = cache.k[0, b, 0, :, 0].long().tolist()
            answer = self.answers[seen[0]]
            for t in range(T):
                said = int(positions[b, t]) - prompt_length(seen[0]) + 1  # tokens of the answer seen by t
                if said >= 0:
                    if T == 1:  # in a prompt's forward, what comes after its last token is padding
                        assert seen[prompt_length(seen[0]) :][:said] == (answer + [0] * said)[:said]
                    out[b, t] = answer[said] if said < len(answer) else 0
        return out

    def logits(self, h):
        return 50.0 * F.one_hot(h[..., 0].long(), self.config.vocab_size).float()


def prompt_length(i: int) -> int:
    return 2 + i % 5


def say(answers: list[list[int]], words=None, slots=64, vocab_size=280, **options):
    """(completions of prompts that have these answers, the stand-in that gave them)."""
    model = Script(answers, vocab_size)
    prompts = [[i] * prompt_length(i) for i in range(len(answers))]
    options = {"max_new_tokens": 50} | options
    return [group[0] for group in Sampler(model, words, slots).generate(prompts, **options)], model


def assert_close(a: list[float], b: list[float]) -> None:
    torch.testing.assert_close(torch.tensor(a), torch.tensor(b), rtol=0, atol=1e-5)


def tokens_of(results) -> list[list[list[int]]]:
    return [[completion.tokens for completion in group] for group in results]


# ------------------------------------------------------------------------------------------------------------
# What is sampled


@pytest.mark.parametrize("slots", [1, 3, 64])
def test_greedy_is_the_argmax_of_the_full_forward(slots):
    model = random_llama()
    limits = [9, 1, 20, 13, 4, 17]
    expected = []
    for prompt, limit in zip(PROMPTS, limits):
        row = list(prompt)
        for _ in range(limit):
            row.append(int(model(torch.tensor([row]))[0, -1].argmax()))
        expected.append([row[len(prompt) :]] * 2)
    order = [3, 0, 5, 2, 4, 1]
    for run in (range(6), order):
        results = Sampler(model, None, slots).generate(
            [PROMPTS[i] for i in run], n=2, max_new_tokens=[limits[i] for i in run], temperature=0
        )
        assert tokens_of(results) == [expected[i] for i in run]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_log_probabilities_are_the_trainers(temperature):
    """Against one training forward over prompt and completion; greedy ones are those of temperature 1."""
    model = random_llama()
    for dtype, mean, worst in ((torch.float32, 1e-6, 1e-5), (torch.bfloat16, 0.03, 0.5)):
        model.compute_dtype = dtype
        gaps = []
        results = Sampler(model, None, 7).generate(PROMPTS, n=3, max_new_tokens=20, temperature=temperature)
        for prompt, group in zip(PROMPTS, results):
            for completion in group:
                row = torch.tensor([prompt + completion.tokens])
                logp = -model(row[:, :-1], row[:, 1:], temperature=temperature or 1.0)[0, len(prompt) - 1 :]
                gaps.append((torch.tensor(completion.logprobs) - logp).abs())
        gaps = torch.cat(gaps)
        assert gaps.mean() < mean and gaps.max() < worst
    assert all(p.dtype == torch.float32 and p.requires_grad for p in model.parameters())


def test_log_probabilities_after_truncation_are_of_what_was_kept():
    model = random_llama()
    how = {"max_new_tokens": 15, "temperature": 0.8, "top_k": 5, "top_p": 0.9}
    completion = Sampler(model, None).generate([[1, 2]], **how)[0][0]
    logits = model(torch.tensor([[1, 2] + completion.tokens]))[0, 1:-1] / 0.8
    probs = truncate(logits.softmax(-1), 0.9, 5, 0.0)
    expected = probs.gather(1, torch.tensor(completion.tokens)[:, None])[:, 0].log()
    torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.5])
def test_draws_follow_the_softmax(temperature):
    """Chi-squared of 200,000 draws, all words likely enough to be counted."""
    logits = 1.5 * torch.randn(1, 50, generator=torch.Generator().manual_seed(3)).clamp(-2, 2)
    keys = stream_keys(0, range(1000), 1).T  # (1, 1000)
    u = torch.cat([uniforms(keys, torch.full_like(keys, t)) for t in range(200)], 1)
    tokens, logps = SamplingParams(temperature).draw(logits, u)
    probs = (logits[0] / temperature).softmax(-1)
    torch.testing.assert_close(logps[0].exp(), probs[tokens[0]])
    expected = probs * u.shape[1]
    chi2 = ((tokens[0].bincount(minlength=50) - expected) ** 2 / expected).sum()
    assert 49 - 4 * 10 < chi2 < 49 + 5 * 10  # mean 49, standard deviation sqrt(2 * 49)


def test_temperature_to_zero_and_min_p_of_one_are_greedy():
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    u = torch.rand(20, 8, generator=torch.Generator().manual_seed(1))
    best = logits.argmax(-1, keepdim=True).expand(20, 8)
    rules = {"temperature": (0.0, 1e-4, 1e-30), "min_p": (1.0,), "top_k": (1,), "top_p": (0.0,)}
    for params in (SamplingParams(**{name: value}) for name, values in rules.items() for value in values):
        assert torch.equal(params.draw(logits, u)[0], best), params


def kept_by_definition(probs: list[float], top_p: float, top_k: int, min_p: float) -> set[int]:
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    keep = order
    if top_k:
        keep = [i for i in order if probs[i] >= probs[order[min(top_k, len(order)) - 1]]]
    if top_p < 1:
        mass, total, last = 0.0, sum(probs[i] for i in keep), keep[0]
        for i in keep:
            if mass >= top_p * total:
                break
            mass, last = mass + probs[i], i
        keep = [i for i in keep if probs[i] >= probs[last]]
    return {i for i in keep if probs[i] >= min_p * probs[order[0]]}


def test_truncation_keeps_what_the_definitions_say():
    """Powers of two: many ties, exact sums, so that there is one right answer even on the edges."""
    rng = random.Random(0)
    for _ in range(300):
        weights = [2.0 ** -rng.randrange(1, 6) for _ in range(16)]
        weights[rng.randrange(16)] = 0.0
        choices = [0.25, 0.5, 0.75, 1.0], [0, 1, 3, 8, 16, 99], [0.0, 0.25, 0.5, 1.0]
        rules = [rng.choice(values) for values in choices]
        kept = truncate(torch.tensor([weights]), *rules)[0]
        alive = {i for i in range(16) if kept[i] > 0}
        assert alive == kept_by_definition(weights, *rules) - {i for i in range(16) if weights[i] == 0}, rules
        assert abs(float(kept.sum()) - 1) < 1e-6


def test_inverse_cdf_at_its_edges():
    last = 1 - 2.0**-53  # the largest uniform
    probs = torch.tensor([[0.0, 0.5, 0.0, 0.5, 0.0]])
    u = torch.tensor([[0.0, 0.5 - 1e-9, 0.5, last]], dtype=torch.float64)
    assert inverse_cdf(probs, u).tolist() == [[1, 3, 3, 3]]
    for scale in (1 - 1e-3, 1 - 1e-7, 1 + 1e-7, 1e-30):  # rows that do not sum to 1
        u = torch.tensor([[0.0, last]], dtype=torch.float64)
        assert inverse_cdf(probs * scale, u).tolist() == [[1, 3]]
    wide = torch.rand(3, 128_256, generator=torch.Generator().manual_seed(0)) ** 20
    wide[:, -1000:] = wide[:, :1000] = 0
    wide /= wide.sum(-1, keepdim=True)
    u = torch.cat((torch.rand(3, 5000, dtype=torch.float64), torch.tensor([[0.0, last]] * 3)), 1)
    assert wide.gather(1, inverse_cdf(wide, u)).min() > 0


def test_logits_that_are_not_numbers_are_an_error():
    model = random_llama()
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        Sampler(model, None).generate([[1]])


# ------------------------------------------------------------------------------------------------------------
# Random numbers


def test_uniforms_are_splitmix64s():
    """The published generator's first outputs from state 0, and its arithmetic on signed numbers."""
    first = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    got = uniforms(torch.zeros(3, dtype=torch.int64), torch.arange(3))
    assert got.tolist() == [(x >> 11) * 2.0**-53 for x in first]
    for key in (-1, 2**63 - 1, -(2**63)):
        assert 0 <= float(uniforms(torch.tensor([key]), torch.tensor([5]))) < 1


def test_streams_differ_in_each_of_their_parts():
    keys = {key for seed in range(12) for key in stream_keys(seed, range(-3, 40), 16).flatten().tolist()}
    assert len(keys) == 12 * 43 * 16
    keys = stream_keys(0, range(32), 32)
    u = torch.stack([uniforms(keys, torch.full_like(keys, t)) for t in range(64)], -1)  # place last
    assert abs(float(u.mean()) - 0.5) < 5 * (1 / 12 / u.numel()) ** 0.5
    for shifted in (u.roll(1, 0), u.roll(1, 1), u.roll(1, 2)):
        correlation = torch.corrcoef(torch.stack((u.flatten(), shifted.flatten())))[0, 1]
        assert abs(float(correlation)) < 5 / u.numel() ** 0.5


def test_each_token_has_the_uniform_of_its_place():
    """A model for which all words are equally likely turns its uniforms into tokens as they are."""
    model = random_llama()
    nn.init.zeros_(model.norm.weight)
    how = {"n": 2, "max_new_tokens": 30, "seed": 4, "request_ids": [8, 5]}
    results = Sampler(model, None, slots=3).generate([[1], [2, 3]], **how)
    keys = stream_keys(4, [8, 5], 2)
    for group, streams in zip(results, keys):
        for completion, key in zip(group, streams):
            assert completion.tokens == (61 * uniforms(key, torch.arange(30))).long().tolist()


def test_a_rollout_depends_on_nothing_around_it():
    """Alone, among others, in other slots or another order, after a refill, beside longer ones: the same."""
    model = random_llama()
    rng = random.Random(0)
    prompts = [[rng.randrange(61) for _ in range(rng.randrange(1, 14))] for _ in range(40)]
    limits = [rng.randrange(1, 25) for _ in prompts]
    everything = Sampler(model, None, slots=64).generate(prompts, n=2, max_new_tokens=limits, seed=7)
    assert sorted({len(group[0].tokens) for group in everything}) == sorted(set(limits))
    parts = ((5, range(40), 2), (3, range(39, -1, -3), 2), (1, [11], 1), (64, [11, 11, 4], 2))
    for slots, picked, n in parts:
        part = Sampler(model, None, slots).generate(
            [prompts[i] for i in picked], n, [limits[i] for i in picked], seed=7, request_ids=list(picked)
        )
        for i, group in zip(picked, part):
            for a, b in zip(group, everything[i]):
                assert a.tokens == b.tokens
                assert_close(a.logprobs, b.logprobs)


def test_seeds_requests_and_samples_differ():
    sampler = Sampler(random_llama(), None)
    how = {"n": 4, "max_new_tokens": 20}
    results = sampler.generate([[1, 2]] * 3, **how)
    assert len({tuple(c.tokens) for group in results for c in group}) == 12
    assert tokens_of(results) == tokens_of(sampler.generate([[1, 2]] * 3, **how))
    assert tokens_of(results) != tokens_of(sampler.generate([[1, 2]] * 3, **how, seed=1))
    assert tokens_of(results[2:]) == tokens_of(sampler.generate([[1, 2]], **how, request_ids=[2]))


# ------------------------------------------------------------------------------------------------------------
# When it stops


def test_stop_ids():
    answers = [[9], [5, 9, 5], [5, 8], [5, 6, 7], [5, 6, 9]]
    for slots in (1, 2, 64):
        got, _ = say(answers, stop=(9, 8), slots=slots, max_new_tokens=3)
        assert [c.tokens for c in got] == [[9], [5, 9], [5, 8], [5, 6, 7], [5, 6, 9]]
        assert [c.finish_reason for c in got] == ["stop", "stop", "stop", "length", "stop"]
        assert all(len(c.logprobs) == len(c.tokens) and c.text == "" for c in got)
    got, _ = say(answers, stop=(), max_new_tokens=4)
    assert [c.tokens for c in got] == [(a + [0] * 4)[:4] for a in answers]


def test_the_tokenizers_stop_is_the_default(words):
    eos = words.eos_id
    answers = [words.encode("hello") + [eos, 5], [eos], words.encode("hello the cat")]
    got, _ = say(answers, words, max_new_tokens=[9, 9, len(answers[2])])
    assert [c.text for c in got] == ["hello", "", "hello the cat"]
    assert [c.tokens[-1] for c in got] == [eos, eos, answers[2][-1]]
    assert [c.finish_reason for c in got] == ["stop", "stop", "length"]
    got, _ = say(answers[1:2], words, max_new_tokens=3, stop=())
    assert got[0].tokens == [eos, 0, 0] and got[0].finish_reason == "length"


def split_everywhere(words, text: str, rng: random.Random) -> list[int]:
    """Some tokens of the text's bytes, cut where the tokenizer never would: a stop may fall anywhere."""
    data, out = text.encode(), []
    while data:
        fits = [token for token, rank in words.ranks.items() if data.startswith(token)]
        token = rng.choice(fits)
        out.append(words.ranks[token])
        data = data[len(token) :]
    return out


@pytest.mark.parametrize("stop", ["User:", "End", "😀", "ï", " the", "cat sat on the mat"])
def test_stop_strings(stop, words):
    """Over several tokens, inside one, at its start or end, inside characters, after near misses."""
    rng = random.Random(0)
    texts = [
        "Us U UserUser: hello",
        "naïve: EnEnd of it",
        "😀😁 sat the",
        "",
        "User: first",
        "the cat sat on the mat, naïve",
    ]
    answers = [split_everywhere(words, text, rng) for text in texts * 3]
    answers += [words.encode(text) for text in texts]
    limits = [len(answer) + 1 for answer in answers]
    got, _ = say(answers, words, stop=(stop, words.eos_id), max_new_tokens=limits, slots=4)
    for text, answer, c in zip(texts * 4, answers, got):
        if stop not in text:
            assert (c.tokens, c.finish_reason) == (answer + [0], "length")  # 0 is what the stand-in says last
            assert c.text == text + "\0"
            continue
        assert (c.text, c.finish_reason) == (text[: text.index(stop)], "stop")
        assert c.tokens == answer[: len(c.tokens)]  # the sampled ids, not the text encoded again
        assert stop.encode() in words.decode_bytes(c.tokens)
        assert stop.encode() not in words.decode_bytes(c.tokens[:-1])


def test_a_stop_at_the_limit_is_a_stop_and_a_cut_character_is_marked(words):
    answer = words.encode("sat User:")
    assert say([answer], words, max_new_tokens=len(answer), stop="User:")[0][0].finish_reason == "stop"
    face = [words.ranks[bytes([b])] for b in "😀".encode()]
    got, _ = say([face], words, max_new_tokens=2)
    assert got[0].text == "\ufffd" and got[0].tokens == face[:2]


def test_of_two_stop_strings_the_first_in_the_text_cuts(words):
    stop = Stop(("mat", "cat sat on the mat"), words, words.vocab_size, "cpu")
    assert stop.visible(words.encode("the cat sat on the mat")) == b"the "


# ------------------------------------------------------------------------------------------------------------
# What it costs, and what it reads


@pytest.mark.parametrize("slots", [1, 4, 100])
def test_each_prompt_is_computed_once_and_no_step_for_a_finished_row(slots, monkeypatch):
    """Prescribed lengths, n = 3: every request returns once, in order, at the least possible cost."""
    monkeypatch.setattr(sample, "PREFILL_TOKENS", 12)
    rng = random.Random(slots)
    answers = [[rng.randrange(1, 9) for _ in range(rng.randrange(12))] + [9] for _ in range(23)]
    model = Script(answers, 30)
    prompts = [[i] * prompt_length(i) for i in range(23)]
    results = Sampler(model, None, slots).generate(prompts, n=3, stop=(9,))
    assert tokens_of(results) == [[answer] * 3 for answer in answers]
    prefills = [(B, T) for B, T in model.shapes if T > 1]
    steps = [B for B, T in model.shapes if T == 1]
    assert sum(B for B, _ in prefills) == 23 and all(B * T <= 12 for B, T in prefills)
    work = 3 * sum(len(answer) - 1 for answer in answers)  # the first token comes with the prompt
    assert sum(steps) == work  # a row a token: no padding, no finished rows, no refill delayed
    assert len(steps) <= work / slots + max(map(len, answers))


def test_a_shared_prompt_and_a_cache_that_grows_change_nothing(monkeypatch):
    model = random_llama()
    shared = tokens_of(Sampler(model, None).generate(PROMPTS, n=4, max_new_tokens=40))
    alone = Sampler(model, None).generate(PROMPTS, n=1, max_new_tokens=40)
    assert [group[:1] for group in shared] == tokens_of(alone)
    monkeypatch.setattr(sample, "CACHE_CHUNK", 1)
    assert tokens_of(Sampler(model, None, slots=5).generate(PROMPTS, n=4, max_new_tokens=40)) == shared


@pytest.fixture
def rollouts(monkeypatch):
    """The rollouts of the test, and how often a row was preempted."""
    made, init, preempt = [], sample.Rollout.__init__, sample.Rollout.preempt

    def remember(self, *args):
        init(self, *args)
        self.preemptions = 0
        made.append(self)

    def count(self):
        self.preemptions += 1
        preempt(self)

    monkeypatch.setattr(sample.Rollout, "__init__", remember)
    monkeypatch.setattr(sample.Rollout, "preempt", count)
    return made


def assert_no_block_is_lost(rollout):
    allocator = rollout.cache.allocator
    assert len(allocator.available) == len(allocator.users) - 1 and not any(allocator.users)


@pytest.mark.parametrize(
    "block_len, cache_tokens", [(1, None), (4, None), (4, 56), (16, 64), (64, None), (7, 63)]
)
def test_a_paged_cache_changes_nothing(block_len, cache_tokens, rollouts):
    """Blocks of any length, prompts longer and shorter than one, and so few that rows must be preempted."""
    model, how = random_llama(), {"n": 4, "max_new_tokens": 40, "stop": (3, 50)}
    dense = Sampler(model, None, slots=6).generate(PROMPTS, **how)
    paged = Sampler(model, None, 6, block_len=block_len, cache_tokens=cache_tokens).generate(PROMPTS, **how)
    assert tokens_of(paged) == tokens_of(dense)
    for a, b in zip((c for g in dense for c in g), (c for g in paged for c in g)):
        assert_close(a.logprobs, b.logprobs)
    rollout = rollouts[-1]
    assert (rollout.preemptions > 0) == (cache_tokens is not None)
    assert_no_block_is_lost(rollout)


@pytest.mark.parametrize("seed", range(40))
def test_any_pool_gives_the_same_tokens(seed, rollouts, monkeypatch):
    """Prompts, limits, stops, slots, blocks and looks of all kinds: if the longest request fits, all do."""
    model, rng = random_llama(), random.Random(seed)
    prompts = []
    for _ in range(rng.randint(1, 7)):
        length = rng.randint(1, rng.choice((3, 20, 40)))
        prompts.append([rng.randrange(61) for _ in range(length)])
    n, size = rng.randint(1, 5), rng.randint(1, 16)
    limits = [[rng.randint(1, rng.choice((2, 10, 40))) for _ in range(n)] for _ in prompts]
    how = {"n": n, "max_new_tokens": limits, "stop": rng.choice(((), (3,), (3, 7, 11, 50))), "seed": seed}
    least = max(-(-(len(prompt) + max(limit)) // size) for prompt, limit in zip(prompts, limits))
    dense = Sampler(model, None).generate(prompts, **how)
    monkeypatch.setattr(sample, "LOOK_EVERY", rng.randint(1, 8))
    remember = sample.Rollout.__init__

    def like_a_gpu(self, *args):
        remember(self, *args)
        self.look_every = sample.LOOK_EVERY

    monkeypatch.setattr(sample.Rollout, "__init__", like_a_gpu)
    pool = {"block_len": size, "cache_tokens": size * (least + rng.choice((0, 0, 1, 6, 99)))}
    paged = Sampler(model, None, rng.randint(1, 10), **pool).generate(prompts, **how)
    assert tokens_of(paged) == tokens_of(dense)
    assert_no_block_is_lost(rollouts[-1])


def test_a_preempted_row_is_computed_again(rollouts, monkeypatch):
    """From its prompt and its tokens. What it has sampled stays as it is; what follows is as without."""
    model, how = random_llama(), {"n": 4, "max_new_tokens": 40, "stop": (3, 50)}
    dense = Sampler(model, None, slots=6).generate(PROMPTS, **how)
    hidden, preempt, forwards, preempted = model.hidden, sample.Rollout.preempt, [], []
    model.hidden = lambda tokens, cache: forwards.append(tokens.tolist()) or hidden(tokens, cache=cache)

    def remember(rollout):
        row = rollout.rows[-1]
        preempted.append((row, list(row.tokens), list(row.logprobs)))
        preempt(rollout)

    monkeypatch.setattr(sample.Rollout, "preempt", remember)
    paged = Sampler(model, None, 6, block_len=4, cache_tokens=56).generate(PROMPTS, **how)
    assert tokens_of(paged) == tokens_of(dense) and max(len(tokens) for _, tokens, _ in preempted) > 5
    for row, tokens, logprobs in preempted:
        assert row.completion.tokens[: len(tokens)] == tokens
        assert row.completion.logprobs[: len(tokens)] == logprobs
        assert [row.prompt + tokens[:-1]] in forwards


@pytest.mark.parametrize("block_len", [0, 4])
@pytest.mark.parametrize("params", [{}, {"temperature": 0}, {"top_p": 0.9, "top_k": 9, "min_p": 0.01}])
def test_a_decode_step_reads_nothing_back(block_len, params):
    """It runs on meta tensors, which have no numbers to read."""
    sampler = Sampler(random_llama(), None, block_len=block_len)
    decode_without_numbers(sampler._rollout(PROMPTS, 2, 20, SamplingParams(**params), 0, (3, 50)))


def decode_without_numbers(rollout):
    """A step, and then one on meta tensors."""
    rollout.step()
    for part in (rollout, rollout.stop, rollout.cache.kv):
        for name, value in vars(part).items():
            if isinstance(value, torch.Tensor):
                setattr(part, name, value.to("meta"))
    rollout.model.to("meta")
    rollout.decode(len(rollout.rows))
    with pytest.raises(RuntimeError):
        rollout.count[0].item()


def test_rows_share_the_whole_blocks_of_their_prompt(rollouts):
    sampler = Sampler(random_llama(), None, slots=8, block_len=4)
    rollout = sampler._rollout([[5] * 11], 8, 20, SamplingParams(), 0, ())
    rollout.step()
    first, *others = (row.blocks for row in rollout.rows)
    assert all(blocks[:2] == first[:2] and blocks[2] != first[2] for blocks in others)
    assert [rollout.cache.allocator.users[b] for b in first[:3]] == [8, 8, 1]


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that is made."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max(self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)), 0)
        return out


@pytest.mark.parametrize("what", ["a prompt", "a preempted row"])
def test_a_long_prompt_makes_no_matrix_of_all_pairs(what):
    model, T, largest = random_llama(), 2048, Largest()
    sampler, prompt = Sampler(model, None, block_len=64), torch.arange(T).remainder(61).tolist()
    with sample.sampling_mode(model), torch.inference_mode():
        rollout = sampler._rollout([prompt], 1, 9, SamplingParams(), 0, ())
        largest.numel = 0
        with largest:
            if what == "a prompt":
                rollout.step()
            else:
                rollout.cache._recompute(sample.Row(prompt, 9, 0, [5, 6]))
    assert T * CONFIG.intermediate_size <= largest.numel < T * T // 4


def test_the_pool_is_sized_once(monkeypatch):
    """Memory that training takes between two rollouts does not change what is preempted."""
    def free(gib):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (gib << 30, 80 << 30))

    class OnGPU:  # what make_cache() reads of a model on a GPU
        config, compute_dtype = CONFIG, torch.bfloat16
        embed = types.SimpleNamespace(weight=types.SimpleNamespace(is_cuda=True, device="cuda"))

    pools = []
    monkeypatch.setattr(sample, "PagedCache", lambda *how: pools.append(how[-1]))
    sampler, rows = Sampler(OnGPU, None, slots=1 << 30), [[sample.Row([1] * 9, 1 << 12, 0)] * (1 << 20)]
    for gib in (10, 3):
        free(gib)
        sample.make_cache(sampler, rows)
    token = 2 * 2 * 2 * 8 * 2  # keys and values, layers, heads, width, bytes
    assert sampler.cache_tokens == int(0.9 * ((10 << 30) // token))
    assert pools == [sampler.cache_tokens // 64 + 1] * 2  # and the scratch block


def test_a_request_that_no_cache_can_hold_is_refused():
    message = "room for 3 blocks of 8 tokens, and a request needs up to 6.*cache_tokens"
    with pytest.raises(ValueError, match=message):
        Sampler(random_llama(), None, block_len=8, cache_tokens=30).generate(PROMPTS, max_new_tokens=36)


@pytest.mark.parametrize("block_len", [0, 4])
def test_looking_seldom_and_whole_rungs_change_nothing(block_len, rollouts, monkeypatch, words):
    """What a GPU does, on a CPU: the host looks every few tokens, a rung's empty slots are computed."""
    model = random_llama(replace(CONFIG, vocab_size=words.vocab_size))
    prompts = [words.encode(text) for text in ("the cat", "sat on", "naïve", "User", "End of")]
    how = {"n": 5, "max_new_tokens": [30, 23, 17, 12, 27], "stop": (7, "t", "o")}
    plain = Sampler(model, words, slots=11, block_len=block_len).generate(prompts, **how)
    widths = []

    class Replay:
        def __init__(self, rollout, B):
            self.replay = lambda: (widths.append((B, len(rollout.rows))), rollout.decode(B))

    init, decode = sample.Rollout.__init__, sample.Rollout.decode

    def counted(self, B):
        widths.append((B, len(self.rows)))
        decode(self, B)

    def like_a_gpu(self, *args):
        init(self, *args)
        self.use_graphs, self.look_every = True, 8

    monkeypatch.setattr(sample.Rollout, "__init__", like_a_gpu)
    monkeypatch.setattr(sample.Rollout, "decode", counted)
    monkeypatch.setattr(sample, "capture", Replay)
    seldom = Sampler(model, words, slots=11, block_len=block_len).generate(prompts, **how)
    assert tokens_of(seldom) == tokens_of(plain)
    assert [[(c.text, c.finish_reason) for c in g] for g in seldom] == [
        [(c.text, c.finish_reason) for c in g] for g in plain
    ]
    assert {c.finish_reason for g in plain for c in g} == {"stop", "length"}
    assert {B for B, _ in widths} <= {1, 2, 4, 8, 11} and any(rows < B for B, rows in widths)


def test_a_limit_for_each_sample():
    limits = [[3, 9, 1], [5, 2, 8]]
    results = Sampler(random_llama(), None).generate(PROMPTS[:2], n=3, max_new_tokens=limits, stop=())
    assert [[len(c.tokens) for c in group] for group in results] == limits
    with pytest.raises(ValueError, match="with n numbers per prompt"):
        Sampler(random_llama(), None).generate(PROMPTS[:2], n=3, max_new_tokens=[[1, 2], [3, 4]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_next_rollout_has_the_updated_weights(dtype):
    model = random_llama()
    model.compute_dtype = dtype
    sampler = Sampler(model, None)
    before = tokens_of(sampler.generate(PROMPTS, max_new_tokens=10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])).mean().backward()
    optimizer.step()  # in place, and possible at all: what was sampled with are no inference tensors
    after = tokens_of(sampler.generate(PROMPTS, max_new_tokens=10))
    fresh = random_llama(seed=1)
    fresh.load_state_dict(model.state_dict())
    fresh.compute_dtype = dtype
    assert after == tokens_of(Sampler(fresh, None).generate(PROMPTS, max_new_tokens=10)) != before


def test_the_weights_are_restored_when_a_rollout_fails():
    model = random_llama()
    model.compute_dtype = torch.bfloat16
    storage = model.embed.weight.data_ptr()
    with torch.no_grad():
        model.norm.weight[0] = torch.nan
    with pytest.raises(ValueError):
        Sampler(model, None).generate([[1]])
    assert model.embed.weight.dtype == torch.float32 and model.embed.weight.data_ptr() == storage


def test_max_len_ends_a_completion():
    results = Sampler(random_llama(), None, max_len=14).generate(PROMPTS, max_new_tokens=8)
    assert [len(group[0].tokens) for group in results] == [min(8, 14 - len(p)) for p in PROMPTS]


STACKS = {"a Llama": {}, "a Qwen": {"qkv_bias": True}, "no GQA": {"num_kv_heads": 4}}


def in_place(model: Llama, change: float) -> None:
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p += change * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))


@pytest.mark.parametrize("case", STACKS)
def test_stacked_matrices_change_nothing(case, monkeypatch):
    """While sampled, q, k, v are one product, and gate, up. Each call takes the weights as they are."""
    monkeypatch.setattr(sample, "STACK_ON", ("cpu",))
    model, tokens = random_llama(replace(CONFIG, **STACKS[case])), torch.arange(40).view(2, 20)
    for change in (0.05, 0.3):  # two updates of the policy
        in_place(model, change)
        state, expected = {k: v.clone() for k, v in model.state_dict().items()}, model(tokens)
        with sample.sampling_mode(model):
            assert all(module.stacked is not None for module, _ in sample.stackable(model))
            torch.testing.assert_close(model(tokens), expected, rtol=0, atol=1e-5)
        assert all(module.stacked is None for module, _ in sample.stackable(model))
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
        assert torch.equal(model(tokens), expected)
        ours = Sampler(model, None).generate(PROMPTS, n=2, temperature=0.0, max_new_tokens=20)
        with monkeypatch.context() as m:
            m.setattr(sample, "STACKED", 0)
            theirs = Sampler(model, None).generate(PROMPTS, n=2, temperature=0.0, max_new_tokens=20)
        assert tokens_of(ours) == tokens_of(theirs)
        for a, b in zip(sum(ours, []), sum(theirs, [])):
            assert_close(a.logprobs, b.logprobs)


def test_stacked_matrices_take_no_memory_beside_a_cast_and_little_else(monkeypatch):
    monkeypatch.setattr(sample, "STACK_ON", ("cpu",))
    model = random_llama()
    assert sample.stacked(CONFIG, torch.float32) == 2 * (32 * (32 + 2 * 16) + 2 * 32 * 48) * 4
    monkeypatch.setattr(sample, "STACKED", sample.stacked(CONFIG, torch.float32) - 1)
    with sample.sampling_mode(model):  # a copy of more than is allowed
        assert all(module.stacked is None for module, _ in sample.stackable(model))
    masters = [w.weight.data_ptr() for _, linears in sample.stackable(model) for w in linears]
    model.compute_dtype = torch.bfloat16
    with sample.sampling_mode(model):
        for module, linears in sample.stackable(model):
            memory = module.stacked[0].untyped_storage().data_ptr()
            assert all(w.weight.untyped_storage().data_ptr() == memory for w in linears)
            assert torch.equal(torch.cat([w.weight for w in linears]), module.stacked[0])
    assert masters == [w.weight.data_ptr() for _, linears in sample.stackable(model) for w in linears]


def test_attention_reads_no_further_than_the_longest_row():
    model, prompts = random_llama(), [list(range(9)), [5, 6]]
    expected = Sampler(model, None).generate(prompts, max_new_tokens=60, temperature=0.0)
    with sample.sampling_mode(model):
        rollout = Sampler(model, None)._rollout(prompts, 1, 60, SamplingParams(0.0), 0, ())
        rollout.step()
        for cached in (rollout.cache.kv.k, rollout.cache.kv.v):
            assert cached.shape[3] == 69
            cached[..., 16:, :] = torch.nan
        for _ in range(6):  # up to the 16th token of the longer
            rollout.step()
    assert rollout.cache.kv.reach == 16 and rollout.rows[0].cached == 16
    assert [row.tokens for row in rollout.rows] == [group[0].tokens[:8] for group in expected]


def test_nothing_to_do():
    assert Sampler(random_llama(), None).generate([]) == []


BAD = {
    "an empty prompt": ({"prompts": [[1], []]}, "prompt 1 is empty"),
    "a prompt beyond max_len": ({"prompts": [[1] * 20]}, "prompt 0 has 20 tokens.*max_len 20"),
    "an id beyond the vocabulary": ({"prompts": [[1, 61]]}, "the id 61.*0 to 60"),
    "a negative id": ({"prompts": [[-1]]}, "the id -1"),
    "limits of another number": ({"max_new_tokens": [3, 4]}, "max_new_tokens has 2 numbers for 1 prompts"),
    "request ids of another number": ({"request_ids": [3, 4]}, "request_ids has 2"),
    "no new tokens": ({"max_new_tokens": 0}, "at least 1"),
    "no samples": ({"n": 0}, "at least 1"),
    "a negative temperature": ({"temperature": -1}, "temperature=-1"),
    "no temperature": ({"temperature": float("nan")}, "temperature=nan"),
    "top-p above 1": ({"top_p": 1.5}, "top_p=1.5"),
    "a negative top-k": ({"top_k": -1}, "top_k=-1"),
    "min-p above 1": ({"min_p": 2}, "min_p=2"),
    "a stop id beyond the vocabulary": ({"stop": (61,)}, "61"),
    "a stop string without tokenizer": ({"stop": ("User:",)}, "need a tokenizer"),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_requests(what):
    options, message = BAD[what]
    with pytest.raises(ValueError, match=message) as error:
        Sampler(random_llama(), None, max_len=20).generate(**{"prompts": [[1]]} | options)
    assert "\n" not in str(error.value)


def test_a_tokenizer_of_another_vocabulary(words):
    with pytest.raises(ValueError, match="280 tokens, the model 61"):
        Sampler(random_llama(), words)


# ------------------------------------------------------------------------------------------------------------
# Streaming, checkpoints, the command line


def test_a_stream_is_the_text_in_whole_characters(words):
    rng = random.Random(1)
    text = "naïve 😀😁 UsUser the cat"
    for _ in range(20):
        answer = split_everywhere(words, text + "User: no more", rng)
        sampler = Sampler(Script([answer], 280), words)
        pieces = list(sampler.stream([0, 0], stop=("User:",)))
        assert "".join(pieces) == text and len(pieces) > 3 and "" not in pieces
    sampler = Sampler(random_llama(replace(CONFIG, vocab_size=280)), words)
    for seed in range(5):  # bytes at random: what is no character is marked, as in generate()
        text = "".join(sampler.stream([1, 2], seed=seed, temperature=2.0, stop=("e",)))
        assert text == sampler.generate([[1, 2]], seed=seed, temperature=2.0, stop=("e",))[0][0].text


@pytest.fixture(scope="module")
def stage(words, tmp_path_factory):
    """A stage's folder as training leaves it."""
    stage = tmp_path_factory.mktemp("runs") / "long"
    for step in (5, 10):
        folder = stage / "checkpoints" / f"step_{step:06d}"
        random_llama(replace(CONFIG, vocab_size=280), seed=step).save_pretrained(folder)
        words.save(folder)
        names = sorted(os.listdir(folder))
        sizes = {name: os.path.getsize(folder / name) for name in names}
        sums = {name: files.file_hash(folder / name) for name in names}
        files.write_json(folder / "meta.json", {"files": sizes, "sha256": sums})
    (stage / "config.json").write_text("{}")
    (stage / "checkpoints" / "latest").write_text("step_000010\n")
    return stage


def test_find_checkpoint(stage, tmp_path):
    newest = stage / "checkpoints" / "step_000010"
    assert files.find_checkpoint(str(stage)) == str(newest)
    assert files.find_checkpoint(str(stage / "checkpoints")) == str(newest)
    older = str(stage / "checkpoints" / "step_000005")
    assert files.find_checkpoint(older) == older
    model, words = sample.load_model(older)
    assert words.vocab_size == model.config.vocab_size == 280 and not model.training
    for bad, message in ((tmp_path / "no", "not a folder"), (tmp_path, "no checkpoint in")):
        with pytest.raises(FileNotFoundError, match=message):
            files.find_checkpoint(str(bad))


def test_a_damaged_checkpoint_is_never_loaded(stage, tmp_path, capsys):
    """The newest whole one is taken, by the rule of midtrain.py; one that is named itself is refused."""
    shutil.copytree(stage, tmp_path / "long")
    newest, older = (tmp_path / f"long/checkpoints/step_{step:06d}" for step in (10, 5))
    for path, found in ((newest, older), (older, None)):
        data = bytearray((path / "model.safetensors").read_bytes())
        data[1000:2000] = bytes(1000)
        (path / "model.safetensors").write_bytes(data)
        with pytest.raises(ValueError, match=f"{path.name} is damaged"):
            files.find_checkpoint(str(path))
        files.print0_once.cache_clear()
        if found:
            assert files.find_checkpoint(str(tmp_path / "long")) == str(found)
            assert f"{path} is damaged: passed over" in capsys.readouterr().out
            assert sample.load_model(files.find_checkpoint(str(tmp_path / "long")))
    with pytest.raises(FileNotFoundError, match="no whole checkpoint in .*long: all of them are damaged"):
        files.find_checkpoint(str(tmp_path / "long"))


@pytest.mark.parametrize("kind", ["safetensors", "state"])
def test_the_dtype_of_what_is_sampled(kind, stage, words, tmp_path):
    """Matrices in the dtype asked for; norms and the rotary table, which bf16 would damage, stay exact."""
    folder = str(stage / "checkpoints" / "step_000010")
    stored = sample.load_model(folder)[0]
    if kind == "state":  # as checkpoints of large models are: without model.safetensors
        import torch.distributed.checkpoint as dcp

        folder = shutil.copytree(folder, tmp_path / "large")
        (folder / "model.safetensors").unlink()
        dcp.save({"model": stored.state_dict()}, checkpoint_id=str(folder / "state"), no_dist=True)
    half = sample.load_model(str(folder), "cpu", "bf16")[0]
    assert stored.compute_dtype == torch.float32 and half.compute_dtype == torch.bfloat16
    assert half.inv_freq.dtype == torch.float32 and torch.equal(half.inv_freq, stored.inv_freq)
    for p, q in zip(half.parameters(), stored.parameters(), strict=True):
        assert p.dtype == (torch.bfloat16 if p.ndim > 1 else torch.float32) and torch.equal(p, q.to(p.dtype))
    assert sample.load_model(str(folder))[0].embed.weight.dtype == torch.float32


@pytest.mark.parametrize("capability, asked, used", [
    ((9, 0), "auto", torch.bfloat16), ((8, 0), "fp32", torch.float32), ((7, 5), "auto", None),
])
def test_a_gpu_samples_in_bf16(capability, asked, used, stage, monkeypatch):
    loaded = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    monkeypatch.setattr(Llama, "from_pretrained", lambda *how: loaded.append(how) or random_llama())
    folder = str(stage / "checkpoints" / "step_000010")
    sample.load_model(folder, "cuda:0", asked)
    assert loaded == [(folder, torch.device("cuda:0"), used)]


def test_load_refuses_another_tokenizer_of_the_same_size(words, tmp_path):
    random_llama(replace(CONFIG, vocab_size=280)).save_pretrained(tmp_path)
    words.save(tmp_path)
    (tmp_path / "meta.json").write_text(json.dumps({"tokenizer": words.hash}))
    assert sample.load_model(str(tmp_path))
    swapped = dict(words.ranks)
    swapped[b"a"], swapped[b"b"] = swapped[b"b"], swapped[b"a"]
    tokenizer.Tokenizer(dict(sorted(swapped.items(), key=lambda item: item[1]))).save(tmp_path)
    with pytest.raises(ValueError, match="not the one that this model was trained with"):
        sample.load_model(str(tmp_path))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_weights_that_are_not_numbers_are_noticed(temperature):
    model = random_llama(CONFIG)
    model.norm.weight.data[:] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        Sampler(model, None).generate([[1, 2]], max_new_tokens=3, temperature=temperature)


def test_load_refuses_a_tokenizer_that_does_not_fit(stage, tmp_path):
    Llama(CONFIG).save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="no tokenizer"):
        sample.load_model(str(tmp_path))
    shutil.copy(stage / "checkpoints/step_000005/tokenizer.model", tmp_path)
    with pytest.raises(ValueError, match="280 tokens, the model 61"):
        Sampler(*sample.load_model(str(tmp_path)))


def command(monkeypatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, args)])
    with pytest.raises(SystemExit) as end:
        run_cli(sample.main)
    return end.value.code


def test_command_line(stage, words, monkeypatch, capsys):
    call = ("--ckpt", stage, "the cat", "--max-new-tokens", 12, "--seed", 3)
    assert command(monkeypatch, *call, "--template", "none") == 0
    sampler = Sampler(*sample.load_model(files.find_checkpoint(str(stage))))
    completion = sampler.generate([words.encode("the cat")], max_new_tokens=12, seed=3)[0][0]
    said = capsys.readouterr()
    assert said.out == completion.text + "\n" and said.err.startswith("float32 on cpu\n")
    assert command(monkeypatch, *call, "--dtype", "bf16") == 0
    assert capsys.readouterr().err.startswith("bfloat16 on cpu\n")
    assert command(monkeypatch, *call, "--n", 3, "--template", "simple", "--top-k", 5) == 0
    assert capsys.readouterr().out.count("--- ") == 3
    assert command(monkeypatch, *call, "--greedy", "--template", "complex") == 0


def test_our_checkpoints_get_the_simple_template(stage, words, tmp_path, monkeypatch, capsys):
    """A prompt to a foreign checkpoint stays raw, a conversation with it does not; --template decides."""
    foreign, newest = tmp_path / "foreign", stage / "checkpoints" / "step_000010"
    shutil.copytree(newest, foreign)
    (foreign / "meta.json").unlink()
    sampler = Sampler(*sample.load_model(str(foreign)))
    texts = {"none": "cat?", "simple": "Question:\ncat?\nAnswer:\n"}
    stops = {"none": words.stop_ids, "simple": (*words.stop_ids, *STOP)}
    cases = (
        (stage, (), "simple"), (newest, (), "simple"), (foreign, (), "none"),
        (stage, ("--template", "none"), "none"), (foreign, ("--template", "simple"), "simple"),
    )
    for ckpt, given, used in cases:
        assert command(monkeypatch, "--ckpt", ckpt, "cat?", "--max-new-tokens", 9, "--seed", 4, *given) == 0
        out, err = capsys.readouterr()
        how = {"max_new_tokens": 9, "seed": 4, "stop": stops[used]}
        assert out == sampler.generate([words.encode(texts[used])], **how)[0][0].text + "\n"
        assert f"template {used}" in err
    monkeypatch.setattr("builtins.input", lambda _: "")
    assert command(monkeypatch, "--ckpt", foreign) == 0
    assert "template simple" in capsys.readouterr().err


def test_conversation(stage, monkeypatch, capsys):
    lines = iter(["the cat?", "the mat?"])
    monkeypatch.setattr("builtins.input", lambda _: next(lines, ""))
    assert command(monkeypatch, "--ckpt", stage, "--max-new-tokens", 5) == 0
    assert "template simple" in capsys.readouterr().err

    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.input", interrupt)
    assert command(monkeypatch, "--ckpt", stage) == 130


@pytest.mark.parametrize(
    "args, message",
    [
        (("--ckpt", "no/such", "x"), "no/such is not a folder"),
        (("x",), "--ckpt"),
        (("--ckpt", "STAGE", ""), "prompt 0 is empty"),
        (("--ckpt", "STAGE", "x", "--temperature", "-1"), "temperature=-1"),
        (("--ckpt", "STAGE", "x", "--template", "chat"), "'none', 'simple', 'complex'"),
        (("--ckpt", "STAGE", "x", "--topp", "1"), "valid flags: .*--top-p"),
    ],
)
def test_command_line_errors(args, message, stage, monkeypatch, capsys):
    assert command(monkeypatch, *(str(stage) if arg == "STAGE" else arg for arg in args)) == 2
    captured = capsys.readouterr()
    assert re.fullmatch(r"(float32 on cpu\n)?.+\n", captured.err) and re.search(message, captured.err)


# ------------------------------------------------------------------------------------------------------------
# FSDP2: two ranks on a CPU


def check_alias(plain: Llama, model: Llama) -> None:
    """A plain Llama, which CUDA graphs can record, on the very tensors that were gathered."""
    assert plain is not model and not any(hasattr(m, "unshard") for m in plain.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks or "forward" in vars(m) for m in plain.modules())
    gathered = dict(model.named_parameters())
    for name, p in plain.named_parameters():
        assert not hasattr(p, "device_mesh") and p.data_ptr() == gathered[name].data_ptr(), name


def test_options_of_training_are_not_the_samplers():
    """Compiled or recomputed blocks are sampled plain, on the same weights: no rollout compiles anything."""
    import midtrain

    model = midtrain.add_options(random_llama(), compile=True, checkpointing=True)
    sampler, counters = Sampler(model, None), torch._dynamo.utils.counters
    counters.clear()
    with unsharded(sampler):
        check_alias(sampler.model, model)
        said = tokens_of(sampler.generate(PROMPTS, max_new_tokens=9))
    assert sampler.model is model and not counters["stats"]
    assert said == tokens_of(Sampler(random_llama(), None).generate(PROMPTS, max_new_tokens=9))
    with unsharded(sampler := Sampler(plain := random_llama(), None)):
        assert sampler.model is plain


def fsdp_rank(folder: str) -> None:
    """Roll out, train a step, roll out again: first with unequal prompts on each rank, then all on one."""
    import torch.distributed as dist
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
    model = random_llama()
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh, mp_policy=MixedPrecisionPolicy(torch.float32, cast_forward_inputs=False))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    results = []
    for mine in (range(rank, len(PROMPTS), 2), [] if rank else range(len(PROMPTS))):
        sampler = Sampler(model, None, slots=3)
        with unsharded(sampler):
            check_alias(sampler.model, model)
            limits = [5 + 7 * i for i in mine]
            prompts, ids = [PROMPTS[i] for i in mine], list(mine)
            part = sampler.generate(prompts, 2, limits, request_ids=ids)
        assert sampler.model is model
        local = sum(p.to_local().numel() for p in model.parameters())  # DTensors again, and half of them here
        assert abs(2 * local / model.config.num_params() - 1) < 0.01  # 61 rows split unevenly
        gathered = [None, None]
        dist.all_gather_object(gathered, dict(zip(mine, tokens_of(part))))
        results.append([tokens for _, tokens in sorted((gathered[0] | gathered[1]).items())])
        optimizer.zero_grad()
        model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])).mean().backward()
        optimizer.step()
    if rank == 0:
        with open(os.path.join(folder, "results.json"), "w") as f:
            json.dump(results, f)
    dist.barrier()


def test_fsdp_ranks_sample_what_one_process_samples(tmp_path):
    on_ranks(2, tmp_path, fsdp_rank, str(tmp_path))
    model, expected = random_llama(), []
    for _ in range(2):
        results = Sampler(model, None).generate(PROMPTS, 2, [5 + 7 * i for i in range(len(PROMPTS))])
        expected.append(tokens_of(results))
        model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]])).mean().backward()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.5 * p.grad
    assert json.loads((tmp_path / "results.json").read_text()) == expected


def test_a_checkpoint_copied_without_its_state_is_sampled(stage, tmp_path):
    """What only a resume reads may be missing in a folder that is named itself."""
    copy = tmp_path / "copied"
    shutil.copytree(stage / "checkpoints/step_000010", copy)
    meta = json.loads((copy / "meta.json").read_text())
    meta["files"]["state/__0_0.distcp"], meta["sha256"]["state/__0_0.distcp"] = 7, "0"
    (copy / "meta.json").write_text(json.dumps(meta))
    assert sample.load_model(files.find_checkpoint(str(copy)))
    assert not files.is_whole(str(copy))
