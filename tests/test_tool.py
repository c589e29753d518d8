"""A branch that thinks with a calculator: what it says, what it is given, what of it is learned."""

import itertools
import json
import random
import re
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import test_rl  # noqa: E402
import test_sample  # noqa: E402

import midtrain  # noqa: E402
import rl  # noqa: E402
import sample  # noqa: E402
import verify  # noqa: E402
from data import prepare, recipes, synth, tokenizer  # noqa: E402
from data.loader import Loader, _results  # noqa: E402
from model import Llama, LlamaConfig  # noqa: E402
from sample import Sampler, SamplingParams, stream_keys, uniforms  # noqa: E402

torch.set_num_threads(1)

# A vocabulary in which a random model often calls; the marks can be said in several ways
PIECES = ["<calc>", "<calc>", "<calc>1", "<calc>30", "</calc>", "</calc>", "</calc>", "</calc", ">\n", "</",
          "calc", ">", "calc>3", "+2", "*3", "/7", "(", "a", "<result>", "</result>\n", "error", "-", "/",
          "\n", *"0123456789"]
EOS = len(PIECES)
HOSTILE = {
    "deep": "(" * 50 + "1" + ")" * 50, "signs": "-" * 99 + "1", "power": "10**10**10", "tower": "9^9^9^9",
    "long": "9" * 101, "large": "9^99", "zero": "1/0", "zero to a power": "0^-1", "none": "", "space": " ",
    "code": "__import__('os')", "name": "x", "words": "5 apples", "latex": r"\frac{1}{2}", "digits": "٣+4",
    "times": "2×3", "open": "(1", "two": "3 4", "two and a power": "2 3^2", "thousands": "100 200",
    "equation": "1+1=2", "list": "1,2", "root": "2^0.5", "factorial": "9!",
    "mark": "<calc>1+1", "dots": "1..2", "bytes": "1\0+1",
}


class Pieces:
    """A tokenizer of PIECES: ids of a text are the longest pieces from its left."""

    vocab_size, stop_ids, eos_id = EOS + 1, (EOS,), EOS

    def encode(self, text):
        ids = []
        while text:
            ids.append(max((p for p in PIECES if text.startswith(p)), key=len))
            text = text[len(ids[-1]) :]
        return [PIECES.index(piece) for piece in ids]

    def decode_bytes(self, ids):
        return "".join(PIECES[i] for i in ids if i != EOS).encode()


def random_llama(seed: int = 0) -> Llama:
    model = Llama(LlamaConfig(EOS + 1, 2, 32, 4, 2, 8, 48, rope_theta=100.0, max_position=512))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            drawn = torch.randn(p.shape, generator=generator) if p.ndim > 1 else torch.ones(p.shape)
            p.copy_(drawn / p.shape[-1] ** 0.5 * 0.7 if p.ndim > 1 else drawn)
    return model


TOK = Pieces()
PROMPTS = [TOK.encode(text) for text in ("a<calc>1+2", "30", "<calc>1+2</calc>", "aa(a", "<calc>")]


def naive(model, prompt, key: int, limit: int, stop=(), max_calls=16):
    """One row; for every token all of it is computed, and all of its text read again → (ids, given, results,
    text, reason)."""
    ids, given, results, since, shown = [], [], [], 0, ""

    def text_of(tokens):
        return TOK.decode_bytes(tokens).decode()

    while True:
        h = model.hidden(torch.tensor([[*prompt, *ids]]))[:, -1]
        u = uniforms(torch.tensor([key]), torch.tensor([len(ids)]))
        ids.append(int(SamplingParams().draw(model.logits(h), u[:, None])[0]))
        given.append(False)
        own, before = text_of(ids[since:]), text_of(ids[since:-1])
        if any(s in own for s in stop):
            cut = min((own.index(s) for s in stop if s in own), default=len(own))
            return ids, given, results, shown + own[:cut], "stop"
        if len(ids) == limit:
            return ids, given, results, shown + own, "length"
        calls = list(re.finditer(r"<calc>((?:(?!<calc>).)*)</calc>", own, re.S))
        if calls and calls[-1].end() > len(before):  # else a closing mark alone, or the one that was answered
            result = verify.calculate(calls[-1][1].strip()) if len(results) < max_calls else "error"
            results.append(result)
            line = "" if own[calls[-1].end() :].startswith("\n") else "\n"
            more = TOK.encode(f"{line}<result>{result}</result>\n")[: limit - len(ids)]
            ids, given = ids + more, given + [True] * len(more)
            shown, since = text_of(ids), len(ids)
            if len(ids) == limit:
                return ids, given, results, shown, "length"


def facts(completion):
    c = completion
    return c.tokens, c.given, list(c.results), c.text, c.finish_reason


LIMITS = (40, 70, 33, 51, 60)
STOPS = ("aa", "</r", "((")


@pytest.fixture(scope="module")
def reference():
    """The naive rows of PROMPTS, six samples each."""
    model = random_llama()
    keys = stream_keys(3, range(len(PROMPTS)), 6).tolist()
    with torch.no_grad():
        return model, [[naive(model, prompt, key, limit, STOPS) for key in row]
                       for prompt, row, limit in zip(PROMPTS, keys, LIMITS)]


def generate(model, prompts=PROMPTS, limits=LIMITS, ids=None, **options):
    sampler = Sampler(model, TOK, max_calls=16, **options)
    return sampler.generate(prompts, n=6, max_new_tokens=list(limits), seed=3, stop=STOPS, request_ids=ids)


CACHES = [{"slots": 1}, {"slots": 3}, {"slots": 64}, {"block_len": 4}, {"block_len": 4, "cache_tokens": 150}]


@pytest.mark.parametrize("options", CACHES, ids=str)
def test_a_row_is_what_a_naive_loop_makes(options, reference):
    """Whatever is computed beside it: tokens, which of them are results, text and end. Also when a row is
    preempted, perhaps in the middle of a result."""
    model, expected = reference
    found = generate(model, **options)
    assert [[facts(c) for c in group] for group in found] == expected
    rows = [row for group in expected for row in group]
    results = [result for row in rows for result in row[2]]
    assert len(results) > 10 and len({*results} - {"error"}) > 2 and "error" in results
    assert any(row[1][-1] for row in rows), "a result that the limit cuts"
    assert {row[4] for row in rows} == {"stop", "length"}
    assert any("</r" in row[3] for row in rows), "a stop string in a result, which stops nothing"


@pytest.mark.parametrize("only", range(len(PROMPTS)))
def test_a_row_alone_is_the_row_among_others(only, reference):
    model, expected = reference
    found = generate(model, [PROMPTS[only]], LIMITS[only : only + 1], [only])
    assert [facts(c) for c in found[0]] == expected[only]


@pytest.mark.parametrize("block_len", [0, 4])
def test_looking_seldom_and_whole_rungs_change_nothing(block_len, reference, monkeypatch):
    """What a GPU does, on a CPU: see test_sample.py."""
    model, expected = reference
    init = sample.Rollout.__init__

    class Replay:
        def __init__(self, rollout, B):
            self.replay = lambda: rollout.decode(B)

    def like_a_gpu(self, *args):
        init(self, *args)
        self.use_graphs, self.look_every = True, 8

    monkeypatch.setattr(sample.Rollout, "__init__", like_a_gpu)
    monkeypatch.setattr(sample, "capture", Replay)
    found = generate(model, slots=11, block_len=block_len)
    assert [[facts(c) for c in group] for group in found] == expected


def test_a_decode_step_reads_nothing_back():
    """It runs on meta tensors, which have no numbers to read."""
    sampler = Sampler(random_llama(), TOK, max_calls=2)
    test_sample.decode_without_numbers(sampler._rollout(PROMPTS, 2, 20, SamplingParams(), 0, STOPS))


def test_no_calls_are_the_sampler_without_the_calculator():
    """A row up to its first result; and nothing is looked for where there is no calculator."""
    model = random_llama()
    plain = Sampler(model, TOK).generate(PROMPTS, n=6, max_new_tokens=60, seed=3, stop=EOS)
    calls = Sampler(model, TOK, max_calls=4).generate(PROMPTS, n=6, max_new_tokens=60, seed=3, stop=EOS)
    for a, b in zip(sum(plain, []), sum(calls, [])):
        first = b.given.index(True) if True in b.given else len(b.tokens)
        assert a.tokens[:first] == b.tokens[:first] and a.logprobs[:first] == b.logprobs[:first]
        assert a.given is None and a.results == ()
    assert sum(bool(c.results) for group in calls for c in group) > 5


def test_every_limit_is_kept():
    """The tokens of a lower limit are the first of a higher one's, also inside a result."""
    model, cut = random_llama(), 0
    sampler = Sampler(model, TOK, max_calls=16)
    whole = sampler.generate(PROMPTS[:1], n=6, max_new_tokens=40, seed=3, stop=())[0]
    for limit in range(1, 40):
        cuts = sampler.generate(PROMPTS[:1], n=6, max_new_tokens=limit, seed=3, stop=())[0]
        for c, full in zip(cuts, whole, strict=True):
            assert c.tokens == full.tokens[:limit] and c.given == full.given[:limit]
            assert len(c.logprobs) == limit and c.finish_reason == "length"
            cut += c.given[-1]
    assert cut > 10


def test_calls_beyond_the_limit_are_errors():
    model = random_llama()
    few, many = (Sampler(model, TOK, max_calls=n).generate(PROMPTS, n=6, max_new_tokens=200, seed=3, stop=())
                 for n in (1, 99))
    results = [c.results for group in few for c in group]
    assert max(map(len, results)) > 3 and all({*r[1:]} <= {"error"} for r in results)
    assert [r[:1] for r in results] == [c.results[:1] for group in many for c in group]
    assert any({*c.results[1:]} - {"error"} for group in many for c in group)


def test_a_stream_is_the_text(reference):
    model, expected = reference
    calls, sampler = 0, Sampler(model, TOK, max_calls=16)
    for prompt, seed in itertools.product(PROMPTS, (3, 4, 5)):
        text = "".join(sampler.stream(prompt, 90, seed=seed, stop=(EOS, "\n1")))
        whole = sampler.generate([prompt], max_new_tokens=90, seed=seed, stop=(EOS, "\n1"))[0][0]
        assert text == whole.text
        calls += len(whole.results)
    assert calls > 3


class NoMarks(Pieces):
    def decode_bytes(self, ids):
        return super().decode_bytes(ids).replace(b"<", b"")


@pytest.mark.parametrize("tok", [None, NoMarks()])
def test_a_tokenizer_that_cannot_mark_a_call_is_refused(tok):
    with pytest.raises(ValueError, match="calls of the tool are marked by <calc> and <result>"):
        Sampler(random_llama(), tok, max_calls=1)
    Sampler(random_llama(), tok)


# ------------------------------------------------------------------------------------------------------------
# The calculator


def test_the_calculator():
    said = {"47+38": "85", "3-8": "-5", "58/2": "29", "1/3": "1/3", "3*4": "12", "(1+2)*3": "9",
            "2^10": "1024", "2**3": "8", "0.1+0.2": "3/10", "-(2+3)": "-5", " 1 + 1 ": "2", "6/4": "3/2",
            "2^-1": "1/2"}
    assert {text: verify.calculate(text) for text in said} == said


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_expressions_are_errors_at_once(what):
    start = time.process_time()
    assert verify.calculate(HOSTILE[what]) == "error"
    assert time.process_time() - start < 1


def test_random_expressions_are_bounded():
    rng = random.Random(0)
    for _ in range(3000):
        text = "".join(rng.choice("0123456789+-*/^(). ") for _ in range(rng.randint(0, 100)))
        result = verify.calculate(text)
        assert len(result) <= 16 and re.fullmatch(r"error|-?\d+(/\d+)?", result)


# ------------------------------------------------------------------------------------------------------------
# The documents


def test_documents_call_what_they_need_and_state_the_result():
    for text in itertools.islice(synth.documents("tool_cot", 0), 300):
        calls = re.findall(r"<calc>(.*?)</calc>\n<result>(.*?)</result>\n", text)
        assert calls and text.count("calc>") == text.count("result>") == 2 * len(calls)
        assert all(verify.calculate(a) == b for a, b in calls)
        assert re.search(r"\\boxed\{(\d+)\}", text)[1] == calls[-1][1]


@pytest.mark.parametrize("source, size", [("long_cot", 600), ("tool_cot", 600), ("tool_cot", 258)])
def test_a_result_has_the_same_tokens_in_a_document_and_in_the_sampler(source, size):
    """What is before, what is given, and what follows are the document's tokens, in whatever vocabulary."""
    tok = tokenizer.train(list(itertools.islice(synth.documents(source, 0), 200)), size)
    for text in itertools.islice(synth.documents("tool_cot", 1), 100):
        parts = re.split(r"(<result>.*?</result>\n)", text)
        assert sum(map(tok.encode, parts), []) == tok.encode(text)
        targets = np.array(tok.encode(text))
        inside = _results(targets, lambda token: tok.decode_bytes([token]))
        assert tok.decode(targets[inside].tolist()) == "".join(parts[1::2])


@pytest.mark.parametrize("row, masked", [
    ("a|<result>-5</result>|\n\n|b", "<result>-5</result>\n\n"), ("5</res|ult>\n|b", "5</result>\n"),
    ("a|<result>5", "<result>5"), ("a|<result>5||b", "<result>5"), ("5||a|</result>\n", "a</result>\n"),
    ("5</result>\n|a|<res|ult>7|</result>\n|b", "5</result>\n<result>7</result>\n"), ("a||b|\n", ""),
])
def test_results_are_found_in_bytes(row, masked):
    """Whatever the tokens are (between |; an empty one: a document begins), and where the row is cut."""
    tokens = row.split("|")
    targets = np.array([i if tokens[i] else -1 for i in range(len(tokens))])
    inside = _results(targets, lambda i: tokens[i].encode())
    assert "".join(token for token, hidden in zip(tokens, inside) if hidden) == masked


def test_rollouts_that_become_a_source():
    row = {"problem": "1+1?", "response": "2", "correct": True, "reward": -1}
    assert recipes.rollout(row) == "1+1?\n2"
    assert recipes.rollout(row | {"correct": False, "reward": 1}) is None
    assert recipes.rollout(row | {"finish": "length"}) is None
    assert recipes.rollout(row | {"truncated": True}) is None  # verify.py's word for it
    old = {"problem": "1+1?", "response": "2", "reward": 1.0}
    assert recipes.rollout(old) and not recipes.rollout(old | {"reward": 0.0})


@pytest.mark.parametrize("seq_len", [512, 128])  # 128: most documents are cut, some in a result
def test_results_are_no_targets(tmp_path, seq_len):
    prepare.prepare_synth(tmp_path, 300, seq_len, {"tool_cot": 20_000, "long_cot": 20_000})
    tok = tokenizer.load(tmp_path)
    loader = Loader(tmp_path, {"tool_cot": 0.5, "long_cot": 0.5}, seq_len, 4)
    batches = [loader.batch(step) for step in range(4)]
    batches += [batch for _, batch in loader.validation(1)]
    results = 0
    for batch in batches:
        for tokens, targets, source in zip(batch.tokens, batch.targets, batch.source):
            text = tok.decode(targets[targets >= 0].tolist())
            if loader.names[source] == "tool_cot":  # what is left has every call, and no result
                assert "</calc>\n" in text or seq_len < 512
                results += text.count("<result>") + text.count("</result>")
            hidden = tok.decode(tokens[1:][targets[:-1] < 0].tolist())
            assert (loader.names[source] == "tool_cot") == ("<result>" in hidden) or seq_len < 512
    assert results == 0


def test_the_paper_has_no_such_branch(tmp_path, monkeypatch):
    assert "tool" in midtrain.RECIPE and "tool" in recipes.STAGES["tiny"]
    assert not {"tool"} & {*recipes.STAGE_NAMES, *recipes.PAPER, *recipes.REAL}
    assert "tool_cot" not in synth.WORDS_FROM
    (tmp_path / "index.json").write_text('{"settings": {"corpus": "paper"}}')
    monkeypatch.setattr(sys, "argv", ["midtrain.py", "--preset", "1b", "--branch", "tool"])
    args = midtrain.parse_args()
    with pytest.raises(ValueError, match="stage tool needs --mix.*mixtures for stable, long, short, hybrid"):
        midtrain.mixture_of("tool", args, str(tmp_path))
    args.mix = {"web_pro": 1.0}
    assert midtrain.mixture_of("tool", args, str(tmp_path)) == args.mix


# ------------------------------------------------------------------------------------------------------------
# GRPO


def samples_of(model, n=4):
    args = test_rl.settings(stop=(EOS,), row_tokens=200, micro_tokens=400)
    asked = [{"tokens": prompt, "answer": "1"} for prompt in PROMPTS]
    sampler = Sampler(model, TOK, slots=7, max_calls=16)
    made = rl.rollout(sampler, asked, n, 60, 1.0, 0, args, test_rl.ALONE)
    return [replace(s, advantage=1.0 - 2 * (i % 2), signal=True) for i, s in enumerate(made)], args


def test_sampler_and_trainer_agree_on_what_was_sampled():
    """Of each token that the model said, and of no other."""
    model = random_llama()
    samples, args = samples_of(model)
    assert sum(len(s.results) for s in samples) > 10
    own = 0
    for b in rl.micro_batches(samples, args, test_rl.ALONE):
        logp = rl.log_probs(model, b, 1.0)
        assert ((logp - b.sampler_logp) * b.mask).abs().max() < 1e-4
        assert b.mask.sum() == (b.targets >= 0).sum()
        own += int(b.mask.sum())
    assert own == sum(s.own for s in samples) == sum(s.given.count(False) for s in samples)
    for s in samples:
        assert all(logp == 0 for logp, given in zip(s.logprobs, s.given) if given)
        text = TOK.decode_bytes([t for t, given in zip(s.tokens, s.given) if given]).decode()
        lines = "".join(f"<result>{r}</result>" for r in s.results)
        assert lines.startswith(text.replace("\n", ""))
    metrics = rl.rollout_metrics(samples, test_rl.ALONE)
    assert metrics["entropy"] == pytest.approx(-sum(sum(s.logprobs) for s in samples) / own)
    assert metrics["calls"] == sum(len(s.results) for s in samples) / len(samples)
    errors = sum(s.results.count("error") for s in samples)
    assert metrics["call_errors"] == errors / sum(len(s.results) for s in samples) > 0
    plain = [replace(s, given=None, results=()) for s in samples]
    assert not {"calls", "call_errors"} & {*rl.rollout_metrics(plain, test_rl.ALONE)}


@pytest.mark.parametrize("agg", ["token", "sequence", "constant"])
def test_the_gradient_is_of_what_was_sampled(agg):
    """Against a sum written out, over the tokens of each response that are no result."""
    model = random_llama()
    samples, args = samples_of(model)
    args.loss_agg = agg
    n, own = len(samples), sum(s.own for s in samples)
    total, loss = {"token": own, "sequence": n, "constant": 60 * n}[agg], 0.0
    for s in samples:
        row = torch.tensor([s.prompt + s.tokens])
        logp = -model(row[:, :-1], row[:, 1:])[0, len(s.prompt) - 1 :]
        logp = logp[~torch.tensor(s.given)]
        loss = loss - s.advantage * logp.sum() / (s.own if agg == "sequence" else 1) / total
    expected = torch.autograd.grad(loss, list(model.parameters()))
    config = rl.LossConfig(loss_agg=agg)
    for b in rl.micro_batches(samples, args, test_rl.ALONE):
        logp = rl.log_probs(model, b, 1.0)
        rl.grpo_loss(logp, logp.detach(), b.advantages, b.mask, config, total)[0].backward()
    for p, wanted in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, wanted, rtol=1e-4, atol=1e-6)
    sums = rl.update(model, None, torch.optim.SGD(model.parameters(), 0.0), samples, 60,
                     args, test_rl.ALONE, groups=len(PROMPTS))
    assert sums["trained_tokens"] == sum(s.own for s in samples) and sums["gap_max"] < 1e-4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A model that calls often: its prompts' vocabulary is of documents with calls, its weights are large."""
    path = str(tmp_path_factory.mktemp("start") / "micro")
    words = tokenizer.train(["<calc>1+2</calc>\n<result>"] * 9, 262)
    model = Llama(replace(test_rl.MICRO, vocab_size=words.vocab_size, max_position=800))
    model.init_weights(0)
    model.save_pretrained(path)
    words.save(path)
    return path


def test_a_run_that_crashes_goes_on_bit_for_bit(checkpoint, tmp_path, monkeypatch):
    """Three tokens are a call here, so that results are given all the time."""

    class Always(sample.Calculator):
        def answer(self, row, pieces):
            ids = self.tokenizer.encode("<result>7</result>\n") if len(row.tokens) - row.own > 2 else []
            if ids:
                row.calls.append((len(row.tokens), ids, "7"))

    looks = lambda stop, *a, calls=False, init=sample.Stop.__init__: (  # noqa: E731
        init(stop, *a, calls=calls), stop.look.logical_or_(torch.tensor(calls)))[0]
    monkeypatch.setattr(sample, "Calculator", Always)
    monkeypatch.setattr(sample.Stop, "__init__", looks)
    argv = lambda out: test_rl.command(checkpoint, out, "--tool", "--max-prompt", "600",  # noqa: E731
                                       "--length-schedule", "0:40")
    test_rl.run(monkeypatch, argv(tmp_path / "whole"))
    step, steps = rl.optimizer_step, itertools.count(1)

    def crash(model, optimizer):
        if next(steps) == 8:
            raise test_rl.Crash
        return step(model, optimizer)

    with monkeypatch.context() as patch:
        patch.setattr(rl, "optimizer_step", crash)
        with pytest.raises(test_rl.Crash):
            test_rl.run(patch, argv(tmp_path / "crashed"))
    test_rl.run(monkeypatch, argv(tmp_path / "crashed"))
    whole = test_rl.outcome(tmp_path / "whole")
    assert test_rl.outcome(tmp_path / "crashed") == whole
    assert all(row["calls"] > 1 for row in whole[1][1:]) and whole[1][0]["eval_calls"] > 1
    saved = json.loads((tmp_path / "whole/rl-micro/config.json").read_text())
    assert saved["tool"] is True
    with pytest.raises(ValueError, match="tool True → None"):
        test_rl.run(monkeypatch, [x for x in argv(tmp_path / "whole") if x != "--tool"])


MADE = {  # what a checkpoint says of itself, and whether it has a calculator
    "a stage": ({"settings": {"mixture": {"web": 0.7, "tool_cot": 0.3}}}, True),
    "another": ({"settings": {"mixture": {"web": 1.0}}}, False),
    "an RL run": ({"settings": {"tool": True, "branch": "tool"}}, True),
    "another of it": ({"settings": {"tool": None}}, False), "a foreign one": (None, False),
}


@pytest.mark.parametrize("case", MADE)
def test_a_model_has_its_tool_unless_told_otherwise(case, tmp_path):
    meta, on = MADE[case]
    if meta:
        (tmp_path / "meta.json").write_text(json.dumps(meta))
    asked = [sample.calls_of(str(tmp_path), x) for x in (None, True, False)]
    assert asked == [sample.MAX_CALLS * on, sample.MAX_CALLS, 0]
