"""data/: recipes, prompts, shards that describe themselves, batches that depend on the step alone."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import loader, overlaps, prepare, prompts, recipes, shards, synth, tokenizer
from data.files import numbered_rows, read_jsonl, run_lock
from data.loader import Loader

ROOT = Path(__file__).parents[1]
T = 32
MIX = {"web": 0.85, "general": 0.10, "short_cot": 0.05}
TOKENS = {"general": 4_000, "web": 9_000, "short_cot": 5_000}


def documents(source, seed, split):
    """A stand-in for the generated corpus: numbered documents of very different lengths, endless."""
    for i in count():
        yield f"{source}, {split} {seed}, document {i}: " + "so it goes " * ((i * 7 + seed) % 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synth, "documents", documents)
        out = tmp_path_factory.mktemp("prepared") / "data"
        prepare.prepare_synth(out, 300, T, TOKENS, seed=3)
    return out


@pytest.fixture
def copy(folder, tmp_path):
    """A copy of the folder that a test may damage."""
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


# ------------------------------------------------------------------------------------------------------------
# Recipes and prompts


def test_every_mixture_sums_to_one_and_names_known_sources():
    for corpus, stages in recipes.STAGES.items():
        kinds = recipes.KINDS[corpus]
        others = {"paper": ({"base"}, set()), "tiny": (set(), {"tool"}), "real": (set(), set())}  # less, more
        assert set(stages) == set(recipes.STAGE_NAMES) - others[corpus][0] | others[corpus][1]
        for stage, mixture in stages.items():
            assert sum(mixture.values()) == pytest.approx(1, abs=1e-9), (corpus, stage)
            assert set(mixture) <= set(kinds)
            counts = loader.block_counts(mixture)
            assert counts / counts.sum() == pytest.approx(list(mixture.values()), abs=1e-9)
        assert set(kinds.values()) == {"text", "document"}
        for name, mixture in recipes.CONTROLLED[corpus].items():
            assert sum(mixture.values()) == pytest.approx(1, abs=1e-9), name
            assert set(mixture) <= set(kinds), name
    assert set(recipes.KINDS["tiny"]) == set(synth.SOURCES)


def test_formats():
    row = {"problem": "Ann has 48.", "answer": "24", "solution": "48/2=<<48/2=24>>24 clips."}
    assert recipes.question_answer(row) == "Ann has 48.\n48/2=24 clips.\nThe answer is \\boxed{24}."
    assert recipes.question_answer(row | {"solution": "So \\boxed{24}"}) == "Ann has 48.\nSo \\boxed{24}"
    generated = {"problem": "1+1?", "generated_solution": "It is 2.", "expected_answer": "2"}
    generated["solution"] = None
    assert recipes.question_answer(generated) == "1+1?\nIt is 2.\nThe answer is \\boxed{2}."
    message = "no column answer or expected_answer or .*; it has: problem"
    with pytest.raises(KeyError, match=message):
        recipes.question_answer({"problem": "1+1?"})
    alone = {"question": "1+1?", "answer": "1+1=<<1+1=2>>2.\n#### 2"}  # GSM8K's own columns
    assert recipes.question_answer(alone) == "1+1?\n1+1=2.\nThe answer is \\boxed{2}."
    assert recipes.question_answer(alone | {"answer": "It is two."}) == "1+1?\nIt is two."
    for nothing in ("proof", "notfound", "", None, "N/A", "Proof.", float("nan")):
        assert recipes.question_answer(row | {"answer": nothing}) == "Ann has 48.\n48/2=24 clips."
    assert recipes.question_answer(row | {"answer": 0}).endswith("\\boxed{0}.")

    thought = "<think>hm</think>24"
    assert recipes.long_thought(row | {"response": thought}) == f"Ann has 48.\n{thought}"
    several = {"problem": "Q", "generations": ["<think>a</think>1", "<think>b</think>2"], "solution": "x"}
    key = "correctness_math_verify"
    assert recipes.long_thought(several | {key: [False, True]}) == "Q\n<think>b</think>2"
    assert recipes.long_thought(several | {key: [False, False]}) is None
    judged = several | {key: [False, False], "correctness_llama": [True, True]}  # as in OpenR1-Math-220k
    assert recipes.long_thought(judged) == "Q\n<think>a</think>1"
    assert recipes.long_thought(judged | {"is_reasoning_complete": [False, True]}) == "Q\n<think>b</think>2"
    answer = {"role": "assistant", "content": "<think>a</think><answer>1</answer>"}
    turns = [{"role": "user", "content": "Q"}, answer]
    assert recipes.long_thought({"messages": turns}) == "Q\n<think>a</think>1"
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "<think>a</think>1"}]
    assert recipes.long_thought({"conversations": turns}) == "Q\n<think>a</think>1"

    turn = {"instruction": "Sum up.", "context": "A tale.", "response": "Short."}
    assert recipes.conversation(turn) == "User:Sum up.\nA tale.\nAssistant:Short."
    assert recipes.conversation(turn | {"context": ""}) == "User:Sum up.\nAssistant:Short."
    alpaca = {"instruction": "Sum up.", "input": "A tale.", "output": "Short."}
    assert recipes.conversation(alpaca) == "User:Sum up.\nA tale.\nAssistant:Short."
    assert recipes.conversation({"prompt": "Hi", "completion": "Hello"}) == "User:Hi\nAssistant:Hello"
    sharegpt = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    assert recipes.conversation(sharegpt) == "User:Hi\nAssistant:Hello"
    chat = {"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi "}]}
    assert recipes.conversation(chat) is None, "nothing is answered"
    yes = {"role": "assistant", "content": "Yes"}
    wild = {"model": "gpt-4-0314", "conversation": [*chat["messages"], yes]}
    assert recipes.conversation(wild) == "User:Hi\nAssistant:Yes"
    assert recipes.conversation(wild | {"model": "gpt-3.5-turbo"}) is None, "high quality only"


def test_prompts():
    assert prompts.simple("1+1?") == "Question:\n1+1?\nAnswer:\n"
    text = prompts.complex("1+1?")
    opening = "A conversation between User and Assistant. The user asks a question, and the Assistant "
    assert text.startswith(opening)
    end = "provides the user with the answer. User: You must put your answer inside \\boxed{} and Your"
    assert end in text
    assert text.endswith("will be extracted automatically by the \\boxed{} tag.\n1+1?\nAssistant:")
    shots = prompts.few_shot([("2+2?", "4")] * 2, "1+1?", "simple")
    assert shots == "Question:\n2+2?\nAnswer:\n4\n\n" * 2 + "Question:\n1+1?\nAnswer:\n"
    assert all(word in prompts.TEMPLATES["simple"]("") + text for word in prompts.STOP)


# ------------------------------------------------------------------------------------------------------------
# Shards


def shard_documents(shard, tok):
    """The documents of a shard as texts; a document that was cut counts as its parts."""
    starts = shard.starts.tolist()
    ends = starts[1:] + [len(shard.tokens)]
    if shard.kind == "document":
        row = T + 1
        used = [start // row * row + int(shard.used[start // row]) for start in starts]
        ends = list(map(min, ends, used))
    return [tok.decode(shard.tokens[a:b].tolist()) for a, b in zip(starts, ends)]


def test_shards_hold_the_documents(folder):
    tok = tokenizer.load(folder)
    eos = "<|end_of_text|>"
    for name, tokens in TOKENS.items():
        shard = shards.Shard(folder / f"{name}.train.bin")
        shard.check()
        real = len(shard.tokens) - shard.header["padding"]
        assert tokens <= real < tokens + 200
        assert shard.header["tokenizer"] == tok.hash and shard.tokens.dtype == np.uint16
        found = shard_documents(shard, tok)
        whole, texts = [], documents(name, 3, "train")
        while sum(len(tok.encode(text)) + 1 for text in whole) < tokens:
            whole.append(next(texts))
        if shard.kind == "text":
            assert found == [text + eos for text in whole]
        else:  # packed: in another order, and each whole unless it is longer than a row
            short = {text + eos for text in whole if len(tok.encode(text)) <= T}
            assert 5 < len(short) < len(whole) - 5 and short <= set(found)
            assert shard.header["padding"] < 0.15 * len(shard.tokens)
    held_out = shards.Shard(folder / "web.val.bin")
    assert shard_documents(held_out, tok)[0] == next(documents("web", 3, "val")) + eos


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(1, 5))
@settings(deadline=None)
def test_packing_keeps_every_token_and_cuts_only_what_is_too_long(lengths, open_rows):
    capacity, first = 16, shards.OPEN_ROWS
    docs = [np.array([i] * n) for i, n in enumerate(lengths)]
    try:
        shards.OPEN_ROWS = open_rows
        rows = [(ids.tolist(), begins) for ids, begins in shards.pack_documents(docs, capacity)]
    finally:
        shards.OPEN_ROWS = first
    parts = [ids[a:b] for ids, starts in rows for a, b in zip(starts, [*starts[1:], len(ids)])]
    assert all(len(ids) <= capacity for ids, _ in rows)
    assert all(len(set(part)) == 1 for part in parts)
    pieces = Counter(part[0] for part in parts)
    # A row that is cut off repeats its last token, so that it is an input once and a target once.
    total = Counter({i: sum(len(part) for part in parts if part[0] == i) for i in pieces})
    assert all(total[i] == n + pieces[i] - 1 for i, n in enumerate(lengths))
    assert all(pieces[i] == max(1, -(-(n - 1) // (capacity - 1))) for i, n in enumerate(lengths))


def test_preparing_again_does_nothing_and_other_settings_are_refused(folder, monkeypatch):
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(synth, "documents", None)
    index = prepare.prepare_synth(folder, 300, T, TOKENS, seed=3)
    assert set(index["sources"]) == set(TOKENS)
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    with pytest.raises(ValueError, match=r"other settings \(seed 3 → 4; seq_len 32 → 64\)"):
        prepare.prepare_synth(folder, 300, 64, TOKENS, seed=4)


def test_preparing_is_deterministic(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(synth, "documents", documents)
    prepare.prepare_synth(tmp_path, 300, T, TOKENS, seed=3)
    assert contents(tmp_path) == contents(folder)


def test_the_vocabulary_is_the_same_whatever_is_mixed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(synth, "documents", documents)
    index = prepare.prepare_synth(tmp_path, 300, T, TOKENS | {"noisy": 3_000}, seed=3)
    assert index["tokenizer"] == shards.read_index(folder)["tokenizer"]
    assert (tmp_path / "web.train.bin").read_bytes() == (folder / "web.train.bin").read_bytes()


def test_a_failed_preparation_leaves_no_half_shard(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synth, "documents", documents)
    monkeypatch.setattr(shards, "file_hash", full_disk)
    with pytest.raises(OSError, match="No space"):
        prepare.prepare_synth(tmp_path, 300, T, TOKENS)
    assert not list(tmp_path.glob("*.bin*")) and not (tmp_path / "index.json").exists()


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    class Large:
        vocab_size, eos_id, hash = 70_000, 69_999, "x"

    ids = [np.array([i, Large.eos_id], np.uint32) for i in (66_000, 5, 6)]
    shards.write_shard(tmp_path / "s", "text", ids, Large, T)
    shard = shards.Shard(tmp_path / "s")
    assert shard.tokens.tolist() == [66_000, 69_999, 5, 69_999, 6, 69_999]
    assert shard.starts.tolist() == [0, 2, 4]


def test_the_generated_corpus_fills_every_source(tmp_path):
    prepare.prepare_synth(tmp_path, 600, 128, dict.fromkeys(synth.SOURCES, 3000))
    tok = tokenizer.load(tmp_path)
    for stage, mixture in recipes.TINY.items():
        batch = Loader(tmp_path, mixture, 128, 4).batch(0)
        assert batch.tokens.max() < tok.vocab_size and (batch.targets >= 0).float().mean() > 0.6, stage


# ------------------------------------------------------------------------------------------------------------
# Batches


def test_mixture_weights_are_exact_in_every_block(folder):
    mixture = Loader(folder, MIX, T, 20, seed=1)
    assert mixture.counts.tolist() == [17, 2, 1]
    orders = set()
    for step in range(30):
        source = mixture.batch(step).source
        assert torch.bincount(source, minlength=3).tolist() == [17, 2, 1]
        orders.add(tuple(source.tolist()))
    assert len(orders) > 25, "each block is in an order of its own"


@pytest.mark.parametrize("weights, counts", [
    ([1.0], [1]), ([0.5, 0.5], [1, 1]), ([1 / 3, 2 / 3], [1, 2]), ([0.55, 0.05, 0.1, 0.3], [11, 1, 2, 6]),
    ([1.0, 0.0], [1, 0]), ([0.725, 0.1, 0.1, 0.05, 0.0125, 0.0125], [58, 8, 8, 4, 1, 1]),
    ([0.123456, 0.876544], [1235, 8765]),  # in no block up to the largest: rounded
])
def test_block_counts(weights, counts):
    assert loader.block_counts({str(i): w for i, w in enumerate(weights)}).tolist() == counts


def test_the_order_is_a_pure_function_of_the_step_and_the_same_on_any_number_of_ranks(folder):
    one, again = Loader(folder, MIX, T, 12, seed=5), Loader(folder, MIX, T, 12, seed=5)
    for step in (7, 0, 1000, 3):
        whole = one.batch(step)
        for world in (1, 2, 4):
            parts = [again.batch(step, rank, world) for rank in range(world)]
            for tensor, slices in zip(whole, zip(*parts)):
                assert tensor.dtype == torch.int64 and torch.equal(tensor, torch.cat(slices))
    assert not torch.equal(one.batch(0).tokens, Loader(folder, MIX, T, 12, seed=6).batch(0).tokens)
    doubled = Loader(folder, MIX, T, 24, seed=5)  # the order is of sequences, whatever the batch
    assert torch.equal(doubled.batch(1).tokens, torch.cat([one.batch(2).tokens, one.batch(3).tokens]))
    with pytest.raises(ValueError, match="12 sequences cannot be divided among 5 ranks"):
        one.batch(0, 0, 5)


def test_an_epoch_is_every_sequence_once_and_the_next_has_another_order(folder):
    loads = Loader(folder, MIX, T, 20, seed=1)
    source, sequence = loads.order(np.arange(20 * 700))
    for s, size in enumerate(loads.sizes):
        seen = sequence[source == s]
        epochs = seen[: len(seen) // size * size].reshape(-1, size)
        assert len(epochs) >= 2
        assert all(sorted(epoch) == list(range(size)) for epoch in epochs.tolist())
        assert len({tuple(epoch) for epoch in epochs.tolist()}) == len(epochs)
    step = 333
    assert list(loads.seen(step).values()) == np.bincount(source[: step * 20], minlength=3).tolist()


@given(st.integers(1, 5000), st.integers(0, 2**32))
@settings(deadline=None, max_examples=50)
def test_permute_is_a_bijection(size, key):
    keys = np.full(size, key, np.uint64)
    y = loader._permute(np.arange(size), np.full(size, size), keys)
    assert sorted(y.tolist()) == list(range(size))


def test_targets_stay_inside_documents_and_out_of_padding(folder):
    eos = tokenizer.load(folder).eos_id
    loads = Loader(folder, MIX, T, 20, seed=2)
    for step in range(40):
        tokens, targets, doc_start, source = loads.batch(step)
        place = torch.arange(T).expand_as(tokens)
        new = doc_start == place  # position 0, and every first token of a document
        assert (new[:, 1:] == (doc_start[:, 1:] != doc_start[:, :-1])).all() and (doc_start <= place).all()
        no = torch.zeros(20, 1, dtype=torch.bool)
        ends = torch.cat([new[:, 1:], no], 1)  # the next token is another document's
        assert (targets[ends] == -1).all() and (tokens[ends] == eos).all()
        assert (targets[tokens == eos] == -1).all(), "nothing is predicted from an end of text"
        learned = targets[:, :-1] >= 0
        assert (targets[:, :-1] == tokens[:, 1:])[learned].all()
        packed = source == 2
        assert ((targets >= 0) | (tokens == eos))[~packed].all(), "running text has targets but at its ends"
        assert (targets == eos).any(), "the end of text is learned"


def test_packed_rows_give_each_document_once_as_inputs_and_targets(folder):
    """From the batches of one epoch, documents and their ends come out exactly as they went in."""
    tok = tokenizer.load(folder)
    loads = Loader(folder, {"short_cot": 1.0}, T, 1)
    shard = loads.train[0]
    found = Counter()
    for step in range(loads.sizes[0]):
        tokens, targets, doc_start, _ = (tensor[0] for tensor in loads.batch(step))
        for start in doc_start.unique().tolist():
            span = torch.nonzero((doc_start == start) & (targets >= 0))[:, 0]
            if len(span):  # padding has no targets
                found[tok.decode([*tokens[span].tolist(), targets[span[-1]].item()])] += 1
    assert found == Counter(shard_documents(shard, tok))


def test_validation_covers_the_held_out_shards_equally_on_all_ranks(folder):
    loads = Loader(folder, MIX, T, 4)
    whole = list(loads.validation(batches=1000))
    assert list(dict(whole)) == list(MIX)
    for name, shard in zip(loads.names, loads.val):
        batches = [batch for source, batch in whole if source == name]
        learned = sum((batch.targets >= 0).sum().item() for batch in batches)
        sequences = loader._sequences(shard, T)
        assert len(batches) == -(-sequences // 4) and all(batch.tokens.shape == (4, T) for batch in batches)
        assert 0 < learned <= sequences * T
    left, right, both = (loads.validation(2, rank, world) for rank, world in ((0, 2), (1, 2), (0, 1)))
    for (name, a), (other, b), (_, ab) in zip(left, right, both, strict=True):
        assert name == other and torch.equal(torch.cat([a.targets, b.targets]), ab.targets)
    assert len(list(loads.validation(2))) <= 2 * len(MIX)


# ------------------------------------------------------------------------------------------------------------
# Bad input


def test_bad_mixtures(folder):
    with pytest.raises(ValueError, match=r"sum to 1, not 0.95: web 0.85 \+ general 0.1"):
        Loader(folder, {"web": 0.85, "general": 0.10}, T, 4)
    with pytest.raises(ValueError, match="0 or more"):
        Loader(folder, {"web": 1.5, "general": -0.5}, T, 4)
    with pytest.raises(ValueError, match="sum to 1, not nan"):
        Loader(folder, {"web": float("nan"), "general": 0.5}, T, 4)
    with pytest.raises(ValueError, match="no source 'wbe' .it has: general, web, short_cot"):
        Loader(folder, {"wbe": 1.0}, T, 4)
    with pytest.raises(ValueError, match="packed for sequences of 32 tokens, not 16"):
        Loader(folder, MIX, 16, 4)
    with pytest.raises(ValueError, match="less than a sequence of 100000"):
        Loader(folder, {"web": 1.0}, 100_000, 4)
    with pytest.raises(FileNotFoundError, match="no prepared data"):
        Loader(folder / "nowhere", MIX, T, 4)


def test_damaged_shards(copy):
    path = copy / "web.train.bin"
    data = path.read_bytes()
    for size in (len(data) - 8, 5000, 100, 0):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"web\.train\.bin .*prepare again"):
            Loader(copy, MIX, T, 4)
    path.write_bytes(data[:9000] + bytes([data[9000] ^ 1]) + data[9001:])
    with pytest.raises(ValueError, match="checksum"):
        shards.read_index(copy, check=True)
    path.write_bytes((copy / "general.train.bin").read_bytes())
    with pytest.raises(ValueError, match="is not the shard that .*index.json names"):
        shards.read_index(copy)
    path.unlink()
    with pytest.raises(FileNotFoundError, match="no shard at"):
        Loader(copy, MIX, T, 4)
    (copy / "index.json").write_text("{")
    with pytest.raises(ValueError, match=r"index\.json is damaged"):
        Loader(copy, MIX, T, 4)


def test_another_tokenizer(copy):
    tokenizer.train(["another text, another tokenizer"] * 3, 270).save(copy)
    with pytest.raises(ValueError, match="another tokenizer"):
        Loader(copy, MIX, T, 4)


# ------------------------------------------------------------------------------------------------------------
# The command line, on small files


@pytest.fixture
def files(tmp_path):
    """A few rows of every public file."""
    rows = {
        "math_text": lambda i: {"text": f"Theorem {i}. " + "Every even number is a sum of primes. " * 9},
        "general_text": lambda i: {"text": f"Chapter {i}. " + "It was a dark and stormy night. " * 9},
        "short_cot": lambda i: {"problem": f"{i}+1?", "answer": str(i + 1), "solution": f"<<x>>{i}+1"},
        "long_cot": lambda i: {
            "problem": f"{i}?", "response": "<think>hm</think>2", "overlaps": "gsm8k/test/1"
        },
        "instruct": lambda i: {"instruction": f"Hi {i}.", "context": "", "response": "Hello."},
    }
    for name, corpus in recipes.REAL_SOURCES.items():
        for file in corpus.files:
            path = tmp_path / "public" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(rows[name](i)) + "\n" for i in range(99 if "text" in name else 90))
            path.write_bytes(gzip.compress(text.encode()) if file.endswith(".gz") else text.encode())
    return tmp_path / "public"


def command(files, *args, out="out"):
    command = [sys.executable, "-m", "data.prepare", "--data", files, "--out", files.parent / out]
    return [*map(str, command), "--seq-len", "32", "--workers", "1", *map(str, args)]


def run(files, *args, code=0, out="out"):
    words = command(files, *args, out=out)
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_command_line(files):
    error = run(files, code=2)
    why = "'long_cot' has fewer than two documents (other rows: 90 marked as a benchmark's): keep them by"
    assert error.count("\n") == 1 and f"{why} --keep-overlaps long_cot, or leave it out" in error
    assert not (files.parent / "out").exists()
    printed = run(files, "--keep-overlaps", "--vocab-size", "400", "--max-tokens", "2000")
    assert printed.splitlines()[-1].startswith("ready: ")
    tok = tokenizer.load(files.parent / "out")
    found = shard_documents(shards.Shard(files.parent / "out" / "short_cot.train.bin"), tok)
    assert "7+1?\n7+1\nThe answer is \\boxed{8}.<|end_of_text|>" in found
    loads = Loader(files.parent / "out", recipes.REAL["hybrid"], 32, 20)
    assert torch.bincount(loads.batch(0).source).tolist() == [11, 1, 2, 3, 3]
    assert run(files, "--keep-overlaps", "--vocab-size", "400", "--max-tokens", "2000", "--check") == printed
    one = run(files, "--keep-overlaps", "long_cot", "--vocab-size", "400", "--max-tokens", "2000", out="one")
    assert one.splitlines()[:-1] == printed.splitlines()[:-1]
    assert "max_tokens." in run(files, "--keep-overlaps", "--vocab-size", "400", code=2)


@pytest.mark.parametrize("args, message", [
    (["--sources", "web"],
     "unknown source 'web' (valid: math_text, general_text, short_cot, long_cot, instruct)"),
    (["--max-tokens", "web=3"], "unknown source 'web' (valid: math_text"),
    (["--max-tokens", "0"], "'0' is not N or NAME=N"),
    (["--source", "web=txt:a.jsonl"], "FORMAT one of text, qa, long_cot, chat"),
    (["--source", "web=text:a.csv"], "no file"),
    (["--source", "web=text:*.jsonl"], "no file"),
    (["--corpus", "tiny"], "invalid choice: 'tiny'"),
    (["--against", "nowhere.jsonl"], "no file nowhere.jsonl to keep out"),
    (["--workers", "0"], "must be at least 1"),
    (["--bad-rows", "1.5"], "--bad-rows 1.5 is not a share"),
    (["--columns", "web.problem=Q"], "unknown source 'web' (valid: math_text"),
    (["--tokenizer", "nowhere"], "no tokenizer at nowhere"),
    (["--seq-len", "0"], "must be at least 1"),
    (["--tokens", "5"], "valid flags:"),
])
def test_bad_arguments(files, args, message, capsys, monkeypatch):
    flags = ["--data", str(files), "--out", str(files.parent / "out"), *args]
    monkeypatch.setattr(sys, "argv", ["prepare", *flags])
    with pytest.raises((SystemExit, ValueError, OSError)) as error:
        prepare.main()
    printed = capsys.readouterr().err or str(error.value)
    assert message in printed and printed.count("\n") <= 1


def test_bad_files(tmp_path):
    good, path = b'{"text": "a"}\n', tmp_path / "rows.jsonl"
    for data, line in ((good + b"{", 2), (good * 2 + b"7\n", 3), (good + b"\xff\n", 2), (b"[1]\n", 1)):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"rows.jsonl, line {line}: not one JSON object"):
            list(read_jsonl(path))
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(good * 9)[:-9])
    with pytest.raises(ValueError, match="or truncated"):
        list(read_jsonl(path))
    (tmp_path / "number.jsonl").write_text('{"text": 7}\n')
    (tmp_path / "other.jsonl").write_text('{"text": "a"}\n{"body": "b", "title": "c"}\n')
    for file, message in (
        ("number", "row 1 .*int instead of text"),
        ("other", "row 2 .*no column text or content; it has: b"),
    ):
        with pytest.raises(ValueError, match=f"{file}.jsonl: {message}"):
            list(prepare.read_documents(recipes.SourceSpec("text", (f"{file}.jsonl",)), tmp_path, False, 0.0))
    with pytest.raises(FileNotFoundError, match="no file"):
        list(prepare.read_documents(recipes.SourceSpec("text", ("none.jsonl",)), tmp_path, False))


# ------------------------------------------------------------------------------------------------------------
# What is dropped


WORDS = "one two, Three 4 fünf’s Пять sixsixsixsixsixsix sixsixsixsixsixsax \0 \xa0 .".split(" ")
WORDS = st.lists(st.sampled_from(WORDS), max_size=60)


@given(st.lists(WORDS, max_size=6), st.lists(WORDS, max_size=6))
@settings(deadline=None)
def test_shared_runs_of_words_are_found(problems, texts):
    """As a set of tuples of words finds them."""
    problems, texts = ([" ".join(words) for words in part] for part in (problems, texts))

    def grams(text):
        text = re.sub("[\x80-\xbf\u2000-\u207f]", " ", re.sub("[A-Z]", lambda match: match[0].lower(), text))
        words = re.findall("(?:[a-z0-9]|[^\x00-\x7f])+", text)
        return {tuple(words[i : i + overlaps.GRAM]) for i in range(len(words) - overlaps.GRAM + 1)}

    forbidden = set().union(*map(grams, problems))
    found = overlaps.Grams(problems).shared_by([text.encode() for text in texts])
    assert found.tolist() == [bool(grams(text) & forbidden) for text in texts]


def test_duplicates_and_benchmark_problems_are_dropped_and_counted(tmp_path):
    folder, out = tmp_path / "in", tmp_path / "out"
    problem = "Natalia sold clips to 48 of her friends in April, and then she sold half as many in May."
    rows = [f"Document {i} says little." for i in range(300)]
    rows[20] = "As an example: " + problem.upper().replace(" ", "  ") + " How many?"
    rows[30] = " ".join(problem.split()[:12]) + " is too little."
    rows[40] = rows[41] = rows[7]
    rows[50] = ""
    write_rows(folder / "a.jsonl", [{"text": row} for row in rows])
    bench = folder / "bench.jsonl"
    write_rows(bench, [{"problem": problem, "answer": "72"}, {"problem": "Short?", "answer": "1"}])
    said = run(folder, "--source", "a=text:a.jsonl", "--against", bench, "--vocab-size", "300")
    dropped = json.loads((out / "index.json").read_text())["sources"]["a"]["dropped"]
    assert dropped == {"seen before": 2, "sharing 13 words with a benchmark": 1, "without a document": 1}
    assert "1 sharing 13 words with a benchmark" in said and "2 problems of" in said
    assert "\n1 of these have fewer words" in said
    found = shard_documents(shards.Shard(out / "a.train.bin"), tokenizer.load(out))
    kept = [text for i, text in enumerate(rows) if i not in (20, 40, 41, 50)]
    assert found == [text + "<|end_of_text|>" for i, text in enumerate(kept) if i % prepare.VAL_EVERY]


# ------------------------------------------------------------------------------------------------------------
# Workers and kills: finished sources stay, the source in work starts over, the bytes are the same


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def many(tmp_path, monkeypatch):
    """A folder of two files of 400 rows, in chunks of about ten."""
    monkeypatch.setattr(prepare, "CHUNK_CHARACTERS", 3000)
    for name in "ab":
        texts = [f"{name}{i}: " + "so it goes, and on it goes " * (i * 7 % 13) for i in range(400)]
        write_rows(tmp_path / f"{name}.jsonl", [{"text": text} for text in texts])
    return tmp_path


def prepared(folder, out, workers=1, max_tokens=None):
    specs = {name: recipes.SourceSpec("qa" if name == "b" else "text", (f"{name}.jsonl",)) for name in "ab"}
    sources = {name: prepare.real_source(spec, folder, max_tokens, False) for name, spec in specs.items()}
    settings, problems = {"corpus": "own", "max_tokens": max_tokens}, ["so it went " * 9]
    return prepare.prepare(folder / out, sources, 300, T, settings, problems, workers)


def stopped(many, out, workers=1, at=1500):
    """Prepared until the input fails, in b: 4 rows to begin with, 800 for the tokenizer, 400 of a."""
    real, calls = prepare.read_documents, count()

    def fail(*args):
        for row in real(*args):
            if next(calls) == at:
                raise OSError("the network is gone")
            yield row

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "read_documents", fail)
        with pytest.raises(OSError, match="^the network is gone"):
            prepared(many, out, workers)


@pytest.mark.parametrize("max_tokens", [None, 2000])
def test_neither_workers_nor_chunks_change_a_byte(many, monkeypatch, max_tokens):
    prepared(many, "one", 1, max_tokens)
    prepared(many, "two", 2, max_tokens)
    monkeypatch.setattr(prepare, "CHUNK_CHARACTERS", 1 << 20)
    prepared(many, "large", 1, max_tokens)
    assert contents(many / "one") == contents(many / "two") == contents(many / "large")


@pytest.mark.parametrize("workers", [1, 2])
def test_after_a_failure_finished_sources_stay_and_the_source_starts_over(many, workers):
    prepared(many, "whole")
    stopped(many, "cut", workers)
    assert sorted(p.name for p in (many / "cut").iterdir()) == [
        "a.train.bin", "a.val.bin", "lock", "tokenizer.model", "unfinished.json"
    ]
    before = {path: path.stat().st_mtime_ns for path in (many / "cut").glob("a.*")}
    (many / "cut/b.train.bin.tmp").write_bytes(b"what a kill leaves")
    prepared(many, "cut")
    assert contents(many / "cut") == contents(many / "whole")
    assert before == {path: path.stat().st_mtime_ns for path in (many / "cut").glob("a.*")}


def test_going_on_reads_only_what_is_missing(many, monkeypatch):
    stopped(many, "cut")
    real, read = prepare.read_documents, []

    def noted(spec, *args):
        read.extend(spec.files)
        return real(spec, *args)

    monkeypatch.setattr(prepare, "read_documents", noted)
    prepared(many, "cut")
    assert read == ["b.jsonl"]


def test_what_another_run_left_is_not_taken(many):
    """A shard and a tokenizer without their unfinished.json; other settings, another tokenizer."""
    prepared(many, "whole")
    stopped(many, "left")
    (many / "left/unfinished.json").unlink()
    (many / "left/a.train.bin").write_bytes((many / "left/a.val.bin").read_bytes())
    tokenizer.train(["something else"] * 3, 270).save(many / "left")
    prepared(many, "left")
    assert contents(many / "left") == contents(many / "whole")

    stopped(many, "other")
    with pytest.raises(ValueError, match="was made with other settings .max_tokens None → 2000"):
        prepared(many, "other", max_tokens=2000)
    tokenizer.train(["something else"] * 3, 270).save(many / "other")
    with pytest.raises(ValueError, match="has another tokenizer than it was begun with"):
        prepared(many, "other")


def test_changed_input_and_a_second_command_are_refused(tmp_path):
    folder = tmp_path / "in"
    texts = [f"document {i}" for i in range(200)]
    write_rows(folder / "a.jsonl", [{"text": text} for text in texts])
    assert "has 19 val tokens, not a sequence of 32" in run(
        folder, "--source", "a=text:a.jsonl", "--vocab-size", "300", code=2, out="short")
    texts = [f"document {i} says it" for i in range(300)]
    write_rows(folder / "a.jsonl", [{"text": text} for text in texts])
    run(folder, "--source", "a=text:a.jsonl", "--vocab-size", "300")
    write_rows(folder / "a.jsonl", [{"text": text} for text in reversed(texts)])
    assert "other settings (files" in run(folder, "--source", "a=text:a.jsonl", "--vocab-size", "300", code=2)
    message = "is working in .*busy: wait for its end"
    with run_lock(tmp_path / "busy"), pytest.raises(ValueError, match=message):
        prepare.prepare(tmp_path / "busy", {}, None, T, {"corpus": "own"})


def test_a_budget_stops_reading(many):
    index = prepared(many, "few", max_tokens=2000)["sources"]
    for name in "ab":
        splits = (index[name][split] for split in ("train", "val"))
        train, val = (split["tokens"] - split["padding"] for split in splits)
        assert 2000 <= train < 2200 and 4 * T <= val < 4 * T + 200
    assert not (many / "few/unfinished.json").exists()


@pytest.fixture
def begun(tmp_path):
    """(folder, its flags, a command that works on b after a, its workers)."""
    folder = tmp_path / "in"
    write_rows(folder / "a.jsonl", [{"text": f"{i} " + "so it goes " * 20} for i in range(200)])
    write_rows(folder / "b.jsonl", [{"text": f"{i} " + "so it goes " * 700} for i in range(4000)])
    args = ("--source", "a=text:a.jsonl", "--source", "b=text:b.jsonl", "--vocab-size", "300")
    args = (*args, "--workers", "2")
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command(folder, *args), cwd=ROOT, **pipes)
    end, shard = time.monotonic() + 60, tmp_path / "out/b.train.bin.tmp"
    while not (shard.exists() and shard.stat().st_size):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.002)
    children = [p.parent for p in Path("/proc").glob("[0-9]*/stat") if stat_field(p, 1) == process.pid]
    workers = [int(p.name) for p in children if b"spawn_main" in (p / "cmdline").read_bytes()]
    assert len(workers) == 2
    yield folder, args, process, workers
    process.kill()


def stat_field(path, number):
    """Of /proc/PID/stat: state (0) or parent (1)."""
    try:
        fields = path.read_text().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return fields[0] if number == 0 else int(fields[1])


def test_a_killed_command_leaves_no_worker_and_the_same_one_goes_on(begun, tmp_path):
    folder, args, process, workers = begun
    process.kill()
    process.wait()
    end = time.monotonic() + 60
    for stat in (Path(f"/proc/{pid}/stat") for pid in workers):
        while stat_field(stat, 0) not in (None, "Z"):
            assert time.monotonic() < end, "a worker outlives the command"
            time.sleep(0.02)
    finished = (tmp_path / "out/a.train.bin").stat().st_mtime_ns
    assert not (tmp_path / "out/b.train.bin").exists()
    run(folder, *args)
    run(folder, *args[:-2], out="whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert finished == (tmp_path / "out/a.train.bin").stat().st_mtime_ns


def test_a_worker_that_dies_is_one_line(begun, tmp_path):
    folder, args, process, workers = begun
    os.kill(workers[0], signal.SIGKILL)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2 and error.count("\n") == 1
    assert "a worker died, out of memory perhaps: the same command starts this source over" in error
    assert not list((tmp_path / "out").glob("b.*"))


# ------------------------------------------------------------------------------------------------------------
# Through `datasets`: parquet, and a data set of the hub (here a local folder in the same format)


@pytest.fixture
def hub(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    rows = [{"question": f"{i}+1?", "solution": f"It is {i + 1}.", "answer": str(i + 1)} for i in range(200)]
    for part in ("easy", "hard"):
        (tmp_path / "set" / part).mkdir(parents=True)
        table = pyarrow.Table.from_pylist([row | {"question": f"{part} {row['question']}"} for row in rows])
        parquet.write_table(table, tmp_path / "set" / part / "train-0.parquet")
    configs = "".join(f"- config_name: {p}\n  data_files: {p}/train-*.parquet\n" for p in ("easy", "hard"))
    (tmp_path / "set/README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    return tmp_path


def test_parquet_and_the_hub(hub):
    where = hub / "set"
    texts = []
    for source in (f"hub:{where}:easy", f"hub:{where}:easy/*.parquet", f"{where}/easy/*.parquet"):
        name, corpus = prepare.own_source(f"qa=qa:{source}")
        texts.append(list(prepare.read_documents(corpus, Path("/"), False)))
        assert name == "qa"
    assert texts[0] == texts[1] == texts[2] and len(texts[0]) == 200
    assert texts[0][4] == "easy 4+1?\nIt is 5.\nThe answer is \\boxed{5}."
    said = run(where, "--source", f"qa=qa:hub:{where}:hard", "--vocab-size", "300", "--max-tokens", "qa=900")
    assert "\nqa  " in said and "ready" in said and said.startswith("no benchmark's problems are kept out")


@pytest.mark.parametrize("part, message", [
    ("easy:test", "split test cannot be read: .*test.*train"),
    ("middling", "cannot be read: .*middling.*easy.*hard"),
    ("easy/*.csv", "cannot be read: "),
])
def test_what_the_hub_does_not_have(hub, part, message, monkeypatch):
    _, corpus = prepare.own_source(f"qa=qa:hub:{hub / 'set'}:{part}")
    with pytest.raises(ValueError, match=message):
        list(prepare.read_documents(corpus, hub, False))
    _, corpus = prepare.own_source(f"web=text:hub:{hub / 'set'}:easy")
    corpus = corpus._replace(columns=(("text", "body"),))
    message = "row 1 does not fit the format 'text': no column body; it has: question"
    with pytest.raises(ValueError, match=message):
        list(prepare.read_documents(corpus, hub, False))
    datasets = pytest.importorskip("datasets")
    hub_constants = pytest.importorskip("huggingface_hub").constants
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)  # no waiting for a network
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="nowhere/at-all, split train cannot be read: "):
        list(prepare.read_documents(recipes.SourceSpec("text", hub="nowhere/at-all"), hub, False))


# ------------------------------------------------------------------------------------------------------------
# Sets as they come: rows that are bad, wrong or of other columns, packed files, a hub that moves on


def documents_of(folder, *names, format="text", **changes):
    spec = recipes.SourceSpec(format, names, **changes)
    return [text for text in prepare.read_documents(spec, folder, False) if text]


def test_bad_rows_are_dropped_and_counted_up_to_a_share(tmp_path):
    folder, where = tmp_path / "in", tmp_path / "in/a.jsonl"
    rows = [json.dumps({"text": f"Document {i} says little."}) for i in range(400)]
    rows[5:5] = ["", '{"text": NaN}', "{", '{"text": null}', '{"body": "x"}', " \t", "7"]
    folder.mkdir()
    where.write_text("\ufeff" + "\n".join(rows))
    said = run(folder, "--source", "a=text:a.jsonl", "--vocab-size", "300")
    entry = json.loads((tmp_path / "out/index.json").read_text())["sources"]["a"]
    assert entry["dropped"] == {"bad rows": 4, "without a document": 1}
    assert entry["train"]["documents"] + entry["val"]["documents"] == 400
    first = f"{where}: row 7 does not fit the format 'text': text is float instead of text"
    assert entry["first_bad_row"] == first
    assert f"dropped: 4 bad rows, 1 without a document (the first: {first})" in said
    for share, counted in ("0.009", "4 bad rows of 405"), ("0", "1 bad rows of 6"):  # at the end, at once
        error = run(folder, "--source", "a=text:a.jsonl", "--bad-rows", share, code=2, out="strict")
        assert error.startswith(f"prepare.py: error: {first} ({counted}") and error.count("\n") == 1


def test_a_source_of_bad_rows_alone_fails_at_once(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "x", "title": "y"}\n' * 5000)
    message = r"a.jsonl: row 1 .*no column text or content; it has: body, title \(11 bad rows of 11"
    with pytest.raises(ValueError, match=message):
        documents_of(tmp_path, "a.jsonl")
    (tmp_path / "b.jsonl").write_text('{"text": "a"}\n{"text": 1}\n{"text": 2}\n')
    with pytest.raises(ValueError, match=r"b.jsonl: row 2 .*\(2 bad rows of 3"):
        documents_of(tmp_path, "b.jsonl")
    (tmp_path / "c.jsonl").write_text('{"text": 1}\n' + '{"text": "a"}\n' * 50)
    spec = recipes.SourceSpec("text", ("c.jsonl",))
    assert len(list(prepare.read_documents(spec, tmp_path, False, 0.0001))) == 51, "one may be"


def test_parquet_files_need_not_have_the_same_columns(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow as pa

    tables = [
        pa.table({"text": pa.array([], pa.string()), "score": pa.array([], pa.int64())}),
        pa.table({"text": ["a", "b"], "score": [1, 2]}), pa.table({"text": ["c"], "score": ["high"]}),
        pa.table({"text": ["d", None]})]
    (tmp_path / "set").mkdir()
    for i, table in enumerate(tables):
        parquet.write_table(table, tmp_path / f"set/{i}.parquet")
    assert sorted(documents_of(tmp_path, "set/*.parquet")) == list("abcd")
    assert documents_of(Path(), hub=str(tmp_path / "set")) == list("abcd")
    (tmp_path / "set/1.parquet").write_bytes((tmp_path / "set/1.parquet").read_bytes()[:-9])
    with pytest.raises(ValueError, match="1.parquet, line 0: not a parquet file, or truncated"):
        documents_of(tmp_path, "set/*.parquet")


def test_packed_files_and_arrays(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    lines = "".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(300)).encode()
    data = zstandard.compress(lines[:4000]) + zstandard.compress(lines[4000:])  # two frames
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    (tmp_path / "b.json").write_text(json.dumps([json.loads(line) for line in lines.splitlines()], indent=1))
    texts = [f"document {i}" for i in range(300)]
    assert documents_of(tmp_path, "a.jsonl.zst") == documents_of(tmp_path, "b.json") == texts
    remote = numbered_rows(f"file://{tmp_path}/a.jsonl.zst")  # as a file of the hub is opened
    assert [row["text"] for _, row in remote] == texts
    for name, bytes in ("a.jsonl.zst", data), ("a.jsonl.gz", gzip.compress(lines)):
        (tmp_path / name).write_bytes(bytes[:-9])
        with pytest.raises(ValueError, match=f"{name}, line .*truncated"):
            documents_of(tmp_path, name)


def test_rows_marked_as_wrong_are_dropped_and_named(tmp_path):
    row = {"problem": "1+1?", "solution": "It is 2.", "answer": "2"}  # as in NuminaMath-1.5
    marks = ["Yes", "Incomplete", "Problem not solved", "No", None, True, False]
    rows = [row | {"problem_is_valid": "Yes", "solution_is_valid": mark} for mark in marks]
    write_rows(tmp_path / "a.jsonl", [*rows, row | {"correct": False}, row | {"correct": "B"}])
    read = list(prepare.read_documents(recipes.SourceSpec("qa", ("a.jsonl",)), tmp_path, False, 0.0))
    assert [bool(text) for text in read] == [True, False, False, False, True, True, False, False, True]
    assert {text.why for text in read if not text} == {"marked as wrong"}


def test_a_map_of_columns(tmp_path):
    row = {"Q": "1+1?", "info": {"A": "2"}, "problem": "another", "text": "no", "why": "It is two."}
    write_rows(tmp_path / "in/a.jsonl", [row] * 2)
    columns = recipes.column_map("problem=Q,qa.answer=info.A,qa.solution=why,web.text=problem")
    document = "1+1?\nIt is two.\nThe answer is \\boxed{2}."
    for name, format, text in ("qa", "qa", document), ("web", "text", "another"):
        pairs = recipes.columns_of(("qa", "web"), columns)[name]
        assert documents_of(tmp_path / "in", "a.jsonl", format=format, columns=pairs) == [text] * 2
    error = run(tmp_path / "in", "--source", "a=qa:a.jsonl", "--columns", "problem=q", code=2)
    assert "no column q; it has: Q, info, problem" in error
    error = run(tmp_path / "in", "--source", "a=qa:a.jsonl", "--columns", "title=q", code=2)
    assert "COLUMN one of text, problem, answer, solution, messages" in error


@pytest.mark.parametrize("format, row", [
    ("qa", {"question": None, "answer": "It is 2."}), ("qa", {"problem": "1+1?", "solution": " "}),
    ("qa", {"text": "\n"}), ("text", {"text": " "}), ("text", {"problem": "", "solution": "2"}),
    ("long_cot", {"problem": "", "response": "2"}), ("long_cot", {"problem": "1+1?", "response": ""}),
    ("long_cot", {"messages": [{"role": "user", "content": "1+1?"}]}),
    ("long_cot", {"messages": [{"role": "assistant", "content": "2"}, {"role": "user", "content": "1+1?"}]}),
    ("chat", {"instruction": None, "output": "2"}), ("chat", {"instruction": "1+1?", "output": ""}),
    ("chat", {"messages": [{"role": "assistant", "content": "2"}]}),
    ("chat", {"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": ""}]}),
])
def test_no_question_or_no_answer_is_no_document(format, row, tmp_path):
    write_rows(tmp_path / "a.jsonl", [row])
    read = list(prepare.read_documents(recipes.SourceSpec(format, ("a.jsonl",)), tmp_path, False))
    assert read == [prepare.Dropped(prepare.EMPTY)]


def test_who_says_what_in_conversations():
    said = [("System", "Be kind."), ("User", "Hi"), ("ChatGPT", "Hello"), ("human", "1+1?"), ("model", "2"),
            ("user", "Thanks")]
    talk = {"conversations": [{"from": who, "value": text} for who, text in said]}
    document = "User:Hi\nAssistant:Hello\nUser:1+1?\nAssistant:2\nUser:Thanks"
    assert recipes.conversation(talk) == document
    assert recipes.long_thought(talk) == "1+1?\n2", "the last question that is answered"
    parts = [{"role": who, "content": [{"type": "text", "text": x} for x in (text[:1], text[1:])]}
             for who, text in said[:5]]
    assert recipes.conversation({"messages": parts + [{"role": "USER", "content": "Thanks"}]}) == document
    lists = {"prompt": parts[:4], "completion": parts[4:]}
    assert recipes.conversation(lists) == document.removesuffix("\nUser:Thanks")
    assert recipes.conversation(lists | {"completion": "2"}) == recipes.conversation(lists)
    assert recipes.long_thought(lists) == recipes.question_answer(lists) == "1+1?\n2"
    for make in (recipes.conversation, recipes.long_thought):
        with pytest.raises(KeyError, match="unknown speaker 'critic'; known: system, user, human, assistant"):
            make({"messages": [*parts, {"role": "critic", "content": "No."}]})
    with pytest.raises(TypeError, match="a part of the content of a message is NoneType instead of text"):
        recipes.conversation({"messages": [{"role": "user", "content": [{"type": "image"}]}]})


def test_verdicts_and_answers_in_many_words():
    for says, valid in (("NO", 0), ("0", 0), (0.0, 0), ("wrong", 0), (False, 0), ("Not valid.", 0),
                        (1.0, 1), ("yes", 1), (None, 1), (True, 1), ("B", 1)):
        assert all(recipes.is_valid({name: says}) == valid for name in recipes.VALIDITY), says
    for text in ("not-found", "no answer", r"\text{proof}", "See proof", "see solution", "?", "--", "$-$",
                 "N/A", r"\boxed{}", r"\boxed{\text{Not found.}}", r"\(\text{None}\)"):
        assert not recipes.is_answer(text), text
    for text in ("-1", "D", r"\text{no solution}", r"\{\}", "<", r"\infty", r"\frac{1}{2}"):
        assert recipes.is_answer(text), text
    row = {"problem": "Why?", "solution": r"So it is. \boxed{\text{proof}}"}
    assert recipes.question_answer(row) == "Why?\nSo it is. \\text{proof}", "this box is not taught"
    assert recipes.question_answer(row | {"answer": "7"}).endswith("\nThe answer is \\boxed{7}.")
    thought = {"problem": "Why?", "response": r"<think>So.</think>\boxed{3}, \boxed{}"}
    assert recipes.long_thought(thought) == "Why?\n<think>So.</think>\\boxed{3},"


def test_what_stands_beside_a_question_belongs_to_it():
    alpaca = {"instruction": "Add.", "input": "1 and 1", "output": "It is 2."}
    assert recipes.question_answer(alpaca) == "Add.\n1 and 1\nIt is 2."
    mapped = recipes.renamed(alpaca, (("problem", "input"),))
    assert recipes.question_answer(mapped) == "1 and 1\nIt is 2.", "once"
    assert recipes.running_text({"question": "1+1?", "response": "2"}) == "1+1?\n\n2"


def test_a_row_that_is_no_object_is_a_bad_row(tmp_path):
    array = [{"text": "a"}, 7, {"text": "b"}]
    (tmp_path / "array.json").write_text(json.dumps(array, indent=1))
    (tmp_path / "line.json").write_text(json.dumps(array) + "\n")
    (tmp_path / "lines.jsonl").write_text('[1]\n{"text": "a"}\n\n{"text": "b"}')
    for name, line in ("array.json", 2), ("line.json", 2), ("lines.jsonl", 1):
        assert documents_of(tmp_path, name) == ["a", "b"]
        with pytest.raises(ValueError, match=f"{name}, line {line}: not one JSON object"):
            list(read_jsonl(tmp_path / name))
    (tmp_path / "cut.json").write_text(json.dumps(array, indent=1)[:-2])
    with pytest.raises(ValueError, match="cut.json, line 0: .* or truncated"):
        documents_of(tmp_path, "cut.json")


def test_a_folder_that_is_not_there_is_said_once(tmp_path):
    pytest.importorskip("datasets")
    words = command(tmp_path / "in", "--source", "a=text:hub:/not/there")
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "/not/there, split train cannot be read" in done.stderr
    assert "revision" not in done.stdout


def test_cut_documents_count_once(tmp_path):
    rows = [{"problem": f"{i}?", "solution": "so it goes " * 99} for i in range(70)]
    write_rows(tmp_path / "in/a.jsonl", rows)
    said = run(tmp_path / "in", "--source", "a=qa:a.jsonl", "--vocab-size", "300")
    entry = json.loads((tmp_path / "out/index.json").read_text())["sources"]["a"]
    assert (entry["train"]["documents"], entry["val"]["documents"]) == (68, 2) and "in 68 documents" in said
    assert shards.Shard(tmp_path / "out/a.train.bin").header["documents"] > 68 * 3, "of pieces"


def test_a_hub_set_stays_at_the_commit_it_was_begun_with(hub, monkeypatch):
    datasets = pytest.importorskip("datasets")
    huggingface_hub = pytest.importorskip("huggingface_hub")
    builder, asked, shas = datasets.load_dataset_builder, [], iter(["one", "two"])

    def local(path, revision, **part):
        asked.append((path, revision))
        if len(asked) == 6:  # two to begin with, two for the tokenizer, and easy is done
            raise OSError("the network is gone")
        return builder(str(hub / "set"), **part)

    class Api:
        def dataset_info(self, name):
            return type("Info", (), {"sha": next(shas)})

    monkeypatch.setattr(datasets, "load_dataset_builder", local)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    sources = ("--source", "easy=qa:hub:own/sums:easy", "--source", "hard=qa:hub:own/sums:hard")
    flags = ["--out", str(hub / "out"), "--vocab-size", "300", "--seq-len", "32", "--workers", "1", *sources]
    monkeypatch.setattr(sys, "argv", ["prepare", *flags])
    with pytest.raises(ValueError, match="own/sums hard, split train cannot be read: the network is gone"):
        prepare.main()
    begun = json.loads((hub / "out/unfinished.json").read_text())
    assert begun["settings"]["revisions"] == {"own/sums": "one"} and list(begun["sources"]) == ["easy"]
    prepare.main()
    assert set(asked) == {("own/sums", "one")} and len(asked) == 7
    assert json.loads((hub / "out/index.json").read_text())["settings"]["revisions"] == {"own/sums": "one"}
    prepare.main()  # finished: nobody is asked
    assert next(shas) == "two"


def test_a_hub_that_does_not_answer_is_said(tmp_path, monkeypatch, capsys):
    class Api:
        def dataset_info(self, name):
            raise OSError("no network")

    monkeypatch.setattr(pytest.importorskip("huggingface_hub"), "HfApi", Api)
    assert prepare.pinned_revisions(tmp_path, ["own/sums"]) == {"own/sums": ""}
    assert "own/sums: its revision is not known, so it is not pinned (OSError)" in capsys.readouterr().out


def test_from_any_folder_and_as_a_file(many, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    flags = ("--source", "a=text:a.jsonl", "--vocab-size", "300")
    run(many, *flags, out="module")
    words = command(many, *flags, "--workers", "2", out="file")
    words = [words[0], ROOT / "data/prepare.py", *words[3:]]
    done = subprocess.run(words, cwd=elsewhere, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert contents(many.parent / "file") == contents(many.parent / "module") and not os.listdir(elsewhere)


def test_epochs_of_each_source(folder):
    loads = Loader(folder, MIX, T, 20, seed=1)
    seen = loads.seen(333)
    expected = {name: seen[name] / size for name, size in zip(MIX, loads.sizes.tolist())}
    assert loads.epochs(333) == pytest.approx(expected) and loads.epochs(0) == dict.fromkeys(MIX, 0)
