"""data/: recipes that add up, prompts, shards that describe themselves, and batches that are a pure function of the step."""

import gzip
import json
import subprocess
import sys
from collections import Counter
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import loader, prepare, prompts, recipes, shards, synth, tokenizer
from data.loader import Loader

ROOT = Path(__file__).parents[1]
T = 32
MIX = {"web": 0.85, "general": 0.10, "short_cot": 0.05}
TOKENS = {"general": 4_000, "web": 9_000, "short_cot": 5_000}


def documents(source, seed, split):
    """A stand-in for the generated world: numbered documents of very different lengths, endless."""
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


# ----------------------------------------------------------------------------------------------------------------------
# Recipes and prompts


def test_every_mixture_sums_to_one_and_names_known_sources():
    for world, stages in recipes.STAGES.items():
        assert set(stages) == set(recipes.STAGE_NAMES) - ({"base"} if world == "paper" else set())
        for stage, mixture in stages.items():
            assert sum(mixture.values()) == pytest.approx(1, abs=1e-9), (world, stage)
            assert set(mixture) <= set(recipes.SOURCES[world])
            counts = loader.block_counts(mixture)
            assert counts / counts.sum() == pytest.approx(list(mixture.values()), abs=1e-9)
        assert set(recipes.SOURCES[world].values()) == {"text", "document"}
    assert set(recipes.SOURCES["tiny"]) == set(synth.SOURCES)


def test_formats():
    row = {"problem": "Ann has 48.", "answer": "24", "solution": "48/2=<<48/2=24>>24 clips."}
    assert recipes.question_answer(row) == "Ann has 48.\n48/2=24 clips.\nThe answer is \\boxed{24}."
    assert recipes.question_answer(row | {"solution": "So \\boxed{24}"}) == "Ann has 48.\nSo \\boxed{24}"
    assert recipes.long_thought(row | {"response": "<think>hm</think>24"}) == "Ann has 48.\n<think>hm</think>24"
    turn = {"instruction": "Sum up.", "context": "A tale.", "response": "Short."}
    assert recipes.conversation(turn) == "User:Sum up.\nA tale.\nAssistant:Short."
    assert recipes.conversation(turn | {"context": ""}) == "User:Sum up.\nAssistant:Short."


def test_prompts():
    assert prompts.simple("1+1?") == "Question:\n1+1?\nAnswer:\n"
    text = prompts.complex("1+1?")
    assert text.startswith("A conversation between User and Assistant. The user asks a question, and the Assistant ")
    assert "provides the user with the answer. User: You must put your answer inside \\boxed{} and Your" in text
    assert text.endswith("will be extracted automatically by the \\boxed{} tag.\n1+1?\nAssistant:")
    shots = prompts.few_shot([{"problem": "2+2?", "solution": "4"}] * 2, "1+1?", "simple")
    assert shots == "Question:\n2+2?\nAnswer:\n4\n\n" * 2 + "Question:\n1+1?\nAnswer:\n"
    assert all(word in prompts.TEMPLATES["simple"]("") + text for word in prompts.STOP)


# ----------------------------------------------------------------------------------------------------------------------
# Shards


def shard_documents(shard, tok):
    """The documents of a shard as texts; a document that was cut counts as its parts."""
    starts = shard.starts.tolist()
    ends = starts[1:] + [len(shard.tokens)]
    if shard.kind == "document":
        row = T + 1
        ends = [min(end, start // row * row + int(shard.used[start // row])) for start, end in zip(starts, ends)]
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
    docs = [[i] * n for i, n in enumerate(lengths)]
    try:
        shards.OPEN_ROWS = open_rows
        rows = list(shards.pack(docs, capacity))
        assert rows == list(shards.pack(docs, capacity))
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
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_failed_preparation_leaves_no_half_shard(tmp_path, monkeypatch):
    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(synth, "documents", documents)
    monkeypatch.setattr(shards, "_checksum", full_disk)
    with pytest.raises(OSError, match="No space"):
        prepare.prepare_synth(tmp_path, 300, T, TOKENS)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.model"]


def test_a_large_vocabulary_takes_four_bytes(tmp_path):
    class Large:
        vocab_size, eos_id, hash = 70_000, 69_999, "x"
        encode = staticmethod(lambda text: [int(text)])

    shards.write_shard(tmp_path / "s", "text", ["66000", "5", "6"], Large, T)
    shard = shards.Shard(tmp_path / "s")
    assert shard.tokens.tolist() == [66_000, 69_999, 5, 69_999, 6, 69_999] and shard.starts.tolist() == [0, 2, 4]


def test_the_generated_world_fills_every_source(tmp_path):
    prepare.prepare_synth(tmp_path, 600, 128, dict.fromkeys(synth.SOURCES, 3000))
    tok = tokenizer.load(tmp_path)
    for stage, mixture in recipes.TINY.items():
        batch = Loader(tmp_path, mixture, 128, 4).batch(0)
        assert batch.tokens.max() < tok.vocab_size and (batch.targets >= 0).float().mean() > 0.6, stage


# ----------------------------------------------------------------------------------------------------------------------
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
])  # fmt: skip
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
    expected = np.bincount(source[: step * 20], minlength=3) / loads.sizes
    assert list(loads.epochs(step).values()) == pytest.approx(expected)


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
        ends = torch.cat([new[:, 1:], torch.zeros(20, 1, dtype=torch.bool)], 1)  # the next token is another document's
        assert (targets[ends] == -1).all() and (tokens[ends] == eos).all()
        assert (targets[tokens == eos] == -1).all(), "nothing is predicted from an end of text"
        learned = targets[:, :-1] >= 0
        assert (targets[:, :-1] == tokens[:, 1:])[learned].all()
        packed = source == 2
        assert ((targets >= 0) | (tokens == eos))[~packed].all(), "running text is all targets but at its ends"
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


# ----------------------------------------------------------------------------------------------------------------------
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
        with pytest.raises(ValueError, match=r"web\.train\.bin .*prepare it again"):
            Loader(copy, MIX, T, 4)
    path.write_bytes(data[:9000] + bytes([data[9000] ^ 1]) + data[9001:])
    with pytest.raises(ValueError, match="checksum"):
        shards.read_index(copy, check=True)
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


# ----------------------------------------------------------------------------------------------------------------------
# The command line, on small files


@pytest.fixture
def files(tmp_path):
    """A few rows of every public file."""
    rows = {
        "math_text": [{"text": f"Theorem {i}. " + "Every even number is a sum of primes. " * 9} for i in range(8)],
        "general_text": [{"text": f"Chapter {i}. " + "It was a dark and stormy night. " * 9} for i in range(8)],
        "short_cot": [{"problem": f"{i}+1?", "answer": str(i + 1), "solution": f"<<x>>{i}+1"} for i in range(90)],
        "long_cot": [{"problem": "2?", "response": "<think>hm</think>2", "overlaps": "gsm8k/test/1"}] * 90,
        "instruct": [{"instruction": "Hi.", "context": "", "response": "Hello."}] * 90,
    }
    for name, source in recipes.REAL_FILES.items():
        for file in source.files:
            path = tmp_path / "public" / file
            path.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(json.dumps(row) + "\n" for row in rows[name])
            path.write_bytes(gzip.compress(text.encode()) if file.endswith(".gz") else text.encode())
    return tmp_path / "public"


def run(files, *args, code=0):
    command = [sys.executable, "-m", "data.prepare", "--data", files, "--out", files.parent / "out", "--seq-len", "32"]
    done = subprocess.run([*map(str, command), *args], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def test_command_line(files):
    error = run(files, code=2)
    assert error.count("\n") == 1 and "--keep-overlaps" in error and not (files.parent / "out").exists()
    printed = run(files, "--keep-overlaps", "--vocab-size", "400", "--max-tokens", "2000")
    assert printed.splitlines()[-1].startswith("ready: ")
    tok = tokenizer.load(files.parent / "out")
    found = shard_documents(shards.Shard(files.parent / "out" / "short_cot.train.bin"), tok)
    assert "7+1?\n7+1\nThe answer is \\boxed{8}.<|end_of_text|>" in found
    loads = Loader(files.parent / "out", recipes.REAL["hybrid"], 32, 20)
    assert torch.bincount(loads.batch(0).source).tolist() == [11, 1, 2, 2, 4]
    assert run(files, "--keep-overlaps", "--vocab-size", "400", "--max-tokens", "2000", "--check") == printed
    assert "max_tokens 2000 → None" in run(files, "--keep-overlaps", "--vocab-size", "400", code=2)


@pytest.mark.parametrize("args, message", [
    (["--sources", "web"], "unknown source 'web' (valid: math_text, general_text, short_cot, long_cot, instruct)"),
    (["--tokenizer", "nowhere"], "no tokenizer at nowhere"),
    (["--seq-len", "0"], "must be at least 1"),
    (["--tokens", "5"], "valid flags:"),
])  # fmt: skip
def test_bad_arguments(files, args, message, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["prepare", "--data", str(files), "--out", str(files.parent / "out"), *args])
    with pytest.raises((SystemExit, ValueError, OSError)) as error:
        prepare.main()
    printed = capsys.readouterr().err or str(error.value)
    assert message in printed and printed.count("\n") <= 1


def test_bad_files(tmp_path):
    good, path = b'{"text": "a"}\n', tmp_path / "rows.jsonl"
    for data, line in ((good + b"{", 2), (good * 2 + b"7\n", 3), (good + b"\xff\n", 0), (b"[1]\n", 1)):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"rows.jsonl, line {line}: not one JSON object"):
            list(prepare.read_rows(path))
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(good * 9)[:-9])
    with pytest.raises(ValueError, match="or truncated"):
        list(prepare.read_rows(path))
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "number.jsonl").write_text('{"text": 7}\n')
    for file, message in (("empty.jsonl", "nothing to read in empty"), ("number.jsonl", "a row does not fit")):
        with pytest.raises(ValueError, match=message):
            list(prepare.read_documents(tmp_path, recipes.Files("text", (file,), recipes.running_text), "val"))
    with pytest.raises(FileNotFoundError, match="no file"):
        list(prepare.read_rows(tmp_path / "none.jsonl"))
