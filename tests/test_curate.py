"""data/curate.py: labels of every form, a threshold that keeps what was asked for, the same bytes however
often the command was killed, nobody's files touched, and no rewriting that loses or invents a number."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data import classifier, curate, files, prepare, recipes, shards, synth, tokenizer
from model import Llama, LlamaConfig
from sample import Completion

ROOT = Path(__file__).parents[1]
TEXT = recipes.SourceSpec("text")
MICRO = LlamaConfig(300, 1, 16, 2, 1, 8, 32, rope_theta=10_000.0, max_position=4096)


def pages(n, seed):
    rng = random.Random(seed)
    return [dict(zip(("text", "useful"), synth.page(rng, "train"))) for _ in range(n)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A crawl of 600 pages, and labels of 600 others."""
    folder = tmp_path_factory.mktemp("world")
    files.write_jsonl(folder / "crawl.jsonl", pages(600, 0))
    files.write_jsonl(folder / "labels.jsonl", pages(600, 1))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model and its tokenizer."""
    path = str(tmp_path_factory.mktemp("model") / "micro")
    texts = [row["text"] for row in pages(100, 2)] + 20 * [*curate.POINTS, *curate.REWRITE]  # short prompts
    words = tokenizer.train(texts, 600)
    Llama(replace(MICRO, vocab_size=words.vocab_size)).init_weights(0).save_pretrained(path)
    words.save(path)
    return path


def run(world, out, *args, labels=True):
    """The command, in this process."""
    flags = ["--in", str(world / "crawl.jsonl"), "--out", str(out), "--recall", "0.9", "--workers", "1"]
    flags += args
    flags += ["--labels", str(world / "labels.jsonl")] * labels
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["curate", *flags])
        patch.setattr(curate, "PART_CHARACTERS", 40_000)  # several parts
        patch.setattr(curate, "REFINE_BATCH", 10)
        curate.main()


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    run(world, out)
    return out


def contents(folder):
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}


def kept(folder):
    return [row["text"] for row in files.read_jsonl(folder / "kept.jsonl.gz")]


# ------------------------------------------------------------------------------------------------------------
# Labels


@pytest.mark.parametrize("yes, no", [
    ({"label": 1}, {"label": 0}), ({"label": True}, {"label": False}), ({"useful": True}, {"useful": False}),
    ({"score": 3}, {"score": 2.99}), ({"score": 5.0}, {"score": 0}), ({"label": 1.0}, {"score": 1}),
])
def test_labels_of_every_form(tmp_path, yes, no):
    rows = [{"text": f"page {i}"} | (yes if i % 3 == 0 else no) for i in range(90)]
    rows += [{"text": "page 0"} | no, {"text": " "} | yes]  # a repeated text and an empty one
    files.write_jsonl(tmp_path / "labels.jsonl", rows)
    texts, useful = curate.read_labels(tmp_path / "labels.jsonl", TEXT)
    assert texts == [row["text"] for row in rows[:90]]
    assert useful.tolist() == [i % 3 == 0 for i in range(90)]


@pytest.mark.parametrize("row, message", [
    ({"text": "a"}, 'no label: give it "label" 0 or 1, "useful" true or false, or "score" 0 to 5'),
    ({"text": "a", "label": 2}, '"label" is 2, not 0 or 1'),
    ({"text": "a", "label": 0.5}, '"label" is 0.5, not 0 or 1'),
    ({"text": "a", "useful": "yes"}, "\"useful\" is 'yes', not 0 or 1"),
    ({"text": "a", "score": 5.1}, '"score" is 5.1, not from 0 to 5'),
    ({"text": "a", "score": float("nan")}, '"score" is nan, not from 0 to 5'),
    ({"text": 7, "label": 1}, "text"),
    ({"label": 1}, "text"),
])
def test_a_bad_label_is_named(tmp_path, row, message):
    files.write_jsonl(tmp_path / "labels.jsonl", [{"text": "b", "label": 1}, row])
    with pytest.raises(ValueError, match="labels.jsonl, line 2: ") as error:
        curate.read_labels(tmp_path / "labels.jsonl", TEXT)
    assert message in str(error.value)


def test_too_few_labels_of_a_kind(tmp_path):
    files.write_jsonl(tmp_path / "labels.jsonl", [{"text": f"{i}", "score": i % 3} for i in range(60)])
    with pytest.raises(ValueError, match="0 documents as of use and 60 as of none: give it 20 of each"):
        curate.read_labels(tmp_path / "labels.jsonl", TEXT)


def test_points_are_the_expected_digit(checkpoint):
    sampler = curate.load(checkpoint)
    model, tok = sampler.model, sampler.tokenizer
    texts = ["7+1=8.", "Ben has 3 pens. " * 40, "x"]
    before, after = curate.POINTS
    found = curate.expected_points(model, tok, texts)
    for text, points in zip(texts, found):
        ids = tok.encode(before) + tok.encode(text) + tok.encode(after)
        with torch.no_grad():
            logits = model(torch.tensor([ids]))[0, -1].double()
        weights = np.exp([logits[tok.encode(digit)[0]].item() for digit in "012345"])
        assert points == pytest.approx(weights @ np.arange(6) / weights.sum(), abs=1e-5)
        assert 0 <= points <= 5
    assert len({round(points, 6) for points in found}) == 3  # only the text matters


def test_a_model_scores_a_sample_and_goes_on_where_it_was_killed(world, checkpoint, tmp_path, monkeypatch):
    truth = {row["text"]: row["useful"] for row in pages(600, 0)}
    judged = []

    def judge(model, tok, texts):
        judged.extend(texts)
        if len(judged) == 200:
            raise KeyboardInterrupt
        return [3.5 if truth[text] else 1.25 for text in texts]

    monkeypatch.setattr(curate, "expected_points", judge)
    flags = ("--score", checkpoint, "--sample", "300")
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path, *flags, labels=False)
    run(world, tmp_path, *flags, labels=False)
    rows = list(files.read_jsonl(tmp_path / "scored.jsonl"))
    assert len(rows) == len({row["text"] for row in rows}) == 300
    assert all((row["score"] >= 3) == truth[row["text"]] for row in rows)
    assert len(judged) == 200 + 300 - 192  # 24 files of 8 were there
    order = {text: i for i, text in enumerate(truth)}
    assert np.mean([order[row["text"]] for row in rows]) == pytest.approx(300, abs=40)  # of all the crawl
    assert files.read_json(tmp_path / "index.json")["measured"]["labels"] == 300


def test_labels_have_the_columns_and_the_format_of_the_crawl(tmp_path):
    """Or a text, whatever the crawl's format is."""
    body = recipes.SourceSpec("text", columns=(("text", "page.body"),))
    asked = recipes.SourceSpec("chat")
    mixed = [{"page": {"body": "a"}, "text": "<a>", "label": 1}, {"text": "b", "label": 0}]
    talk = [{"instruction": "1+1?", "response": "2", "label": 1}, {"text": "b", "score": 2.5}]
    for spec, rows, texts in (body, mixed, ["a", "b"]), (asked, talk, ["User:1+1?\nAssistant:2", "b"]):
        assert [curate.labelled(row, spec) for row in rows] == [*zip(texts, (True, False))]
    for format in recipes.FORMATS:
        assert curate.labelled({"text": "b", "score": 4}, recipes.SourceSpec(format)) == ("b", True)
    files.write_jsonl(tmp_path / "labels.jsonl", [{"web": "b", "label": 1}])
    with pytest.raises(ValueError, match="line 1: no column page.body; it has: web, label"):
        curate.read_labels(tmp_path / "labels.jsonl", body)


def test_columns_are_of_the_labels_too(world, whole, tmp_path):
    for name in "crawl", "labels":
        rows = [{"body": x["text"], "useful": x["useful"]} for x in files.read_jsonl(world / f"{name}.jsonl")]
        files.write_jsonl(tmp_path / f"{name}.jsonl", rows)
    run(tmp_path, tmp_path / "out", "--columns", "text=body")
    assert kept(tmp_path / "out") == kept(whole)


def test_half_a_character_is_no_obstacle(world, checkpoint, tmp_path, monkeypatch):
    """JSON allows one. The model and its tokenizer are real here, its points are not."""
    lines = [json.dumps(row) for row in pages(50, 0)] + ['{"text": "\\ud83d has 3 pens."}']
    (tmp_path / "crawl.jsonl").write_text("\n".join(lines))
    points = curate.expected_points

    def judge(model, tok, texts):
        assert len(points(model, tok, texts)) == len(texts)
        return [5.0 * ("4" in text) for text in texts]

    monkeypatch.setattr(curate, "expected_points", judge)
    monkeypatch.setattr(curate, "FEWEST", 5)
    run(tmp_path, tmp_path / "out", "--score", checkpoint, labels=False)
    assert "? has 3 pens." in [row["text"] for row in files.read_jsonl(tmp_path / "out/scored.jsonl")]


def test_a_model_that_the_prompt_does_not_fit(checkpoint):
    sampler = curate.load(checkpoint)
    model, tok = sampler.model, sampler.tokenizer
    model.config = replace(model.config, max_position=100)
    with pytest.raises(ValueError, match="the prompt does not fit this model"):
        curate.expected_points(model, tok, ["a"])


# ------------------------------------------------------------------------------------------------------------
# The classifier


WORDS = st.sampled_from(["Area", "of", "a", "circle,", "r^2", "é", "12.5", "x" * 9, "line\nbreak"])


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(WORDS, max_size=12).map(" ".join), min_size=1, max_size=5))
def test_a_score_depends_on_nothing_but_its_text(texts):
    model = {"weights": np.sin(np.arange(1 << classifier.BITS, dtype=np.float32)), "bias": 0.5}
    together = classifier.scores(model, texts)
    assert together.tolist() == [classifier.scores(model, [text])[0] for text in texts]
    # case, line breaks and spaces are nothing, and neither are over-long words
    same = [text.upper().replace(" ", " \n ") + " " + "http" * 20 for text in texts]
    assert classifier.scores(model, same).tolist() == together.tolist()


def test_what_tells_texts_apart():
    texts = ["one two", "two one", "", "abcdefghijklmnop", "abcdefghjiklmnop", "17", "35", "10"]
    word, pair, begin = classifier.hashed(texts)
    of = [{*word[a:b].tolist()} for a, b in zip(begin, begin[1:])]
    pairs = [{*pair[a:b].tolist()} for a, b in zip(begin, begin[1:])]
    assert of[0] == of[1] and len(of[0]) == 3 and len(of[2]) == 1  # words, and the beginning
    assert not pairs[0] & pairs[1]  # order
    assert of[3] != of[4] and of[5] == of[6] != of[7]  # a digit is 0 or not
    assert len(word) == begin[-1] and word.max() < 1 << classifier.BITS


@given(st.lists(st.integers(0, 9), min_size=1, max_size=60), st.integers(1, 100))
def test_the_threshold_is_the_highest_that_keeps_the_recall(points, percent):
    points, recall = np.array(points, float), percent / 100
    threshold = classifier.threshold_for(points, recall)
    assert (points >= threshold).mean() >= recall - 1e-9
    assert (points > threshold).mean() < recall


def test_the_classifier_is_better_than_no_choice_and_is_measured_on_other_labels(whole):
    index = files.read_json(whole / "index.json")
    truth = {row["text"]: row["useful"] for row in pages(600, 0)}
    texts = kept(whole)
    hits = sum(truth[text] for text in texts)
    assert index["counts"]["kept"] == len(texts) and index["counts"]["read"] == 600
    assert index["counts"]["below the threshold"] == 600 - len(texts)
    assert hits / len(texts) > 1.4 * np.mean([*truth.values()])
    assert hits / sum(truth.values()) > 0.8
    for name in ("precision", "recall"):
        value, low, high = index["measured"][name]
        assert low <= value <= high < 1.001 and high - low < 0.4
    assert index["measured"]["measured_on"] == 120 and (whole / "curve.png").read_bytes()[1:4] == b"PNG"


# ------------------------------------------------------------------------------------------------------------
# Killed, resumed, finished, refused


def dying(function, calls):
    """The function, until it was called so often."""
    left = iter(range(calls))

    def called(*args):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return function(*args)

    return called


@pytest.mark.parametrize("broken, calls, parts", [
    (classifier.draw_curve, 0, 0), (curate.write_part, 0, 0), (curate.write_part, 3, 3)])
def test_the_same_bytes_after_a_kill(world, whole, tmp_path, monkeypatch, broken, calls, parts):
    monkeypatch.setattr(sys.modules[broken.__module__], broken.__name__, dying(broken, calls))
    with pytest.raises(KeyboardInterrupt):
        run(world, tmp_path)
    monkeypatch.undo()
    assert len(list(tmp_path.glob("*.parts/*.json"))) == parts and not (tmp_path / "index.json").exists()
    with pytest.raises(ValueError, match=r"other settings \(recall 0.9 → 0.5\)"):
        run(world, tmp_path, "--recall", "0.5")
    first = tmp_path / "unfinished.parts/000000.jsonl.gz"
    before = first.stat().st_mtime_ns if parts else None
    monkeypatch.setattr(curate.shutil, "rmtree", lambda *args, **options: None)  # to look at the parts
    run(world, tmp_path)
    assert contents(tmp_path) == contents(whole)
    assert before in (None, first.stat().st_mtime_ns) and len(list(tmp_path.glob("*.parts/*.json"))) > 3


def test_workers_change_nothing(world, whole, tmp_path):
    run(world, tmp_path, "--workers", "2")
    assert contents(tmp_path) == contents(whole) and len(kept(whole)) > 100


def test_a_killed_command_goes_on(world, whole, tmp_path):
    """By SIGKILL, and with parts of the usual size: the same texts."""
    words = [sys.executable, "-m", "data.curate", "--in", str(world / "crawl.jsonl"), "--labels",
             str(world / "labels.jsonl"), "--out", str(tmp_path), "--recall", "0.9", "--workers", "1"]
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.DEVNULL)
    end = time.monotonic() + 60
    while not (tmp_path / "unfinished.json").exists() and time.monotonic() < end:
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "index.json").exists()
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == f"ready: {tmp_path}/kept.jsonl.gz"
    assert kept(tmp_path) == kept(whole)


def test_a_finished_folder_does_nothing(world, whole, monkeypatch, capsys):
    before = {p: p.stat().st_mtime_ns for p in whole.iterdir()}
    monkeypatch.setattr(curate, "curate", None)
    run(world, whole)
    assert before == {p: p.stat().st_mtime_ns for p in whole.iterdir()}
    assert "precision 0." in capsys.readouterr().out
    with pytest.raises(ValueError, match="other settings"):
        run(world, whole, "--bad-rows", "0.5")


def test_the_folder_of_the_crawl_keeps_its_files(world, whole, tmp_path):
    """Also such as have names that parts, labels and a folder of them may have."""
    (tmp_path / "parts").mkdir()
    theirs = {"parts/000000.jsonl": (world / "crawl.jsonl").read_bytes(), "parts/000000.jsonl.gz": b"old",
              "labels.jsonl": b"mine", "parts/000000.json": b"{}"}
    for name, content in theirs.items():
        (tmp_path / name).write_bytes(content)
    for _ in range(2):  # the second time it is finished
        run(world, tmp_path, "--in", str(tmp_path / "parts/*.jsonl"))
        assert theirs == {name: (tmp_path / name).read_bytes() for name in theirs}
        assert kept(tmp_path) == kept(whole)
        assert not (tmp_path / "unfinished.parts").exists()
    (tmp_path / "unfinished.parts").mkdir()  # not made by the command that finds the folder finished
    run(world, tmp_path, "--in", str(tmp_path / "parts/*.jsonl"))
    assert (tmp_path / "unfinished.parts").exists()


@pytest.mark.parametrize("name", ["unfinished.parts/a.jsonl", "kept.jsonl.gz", "scored.jsonl"])
@pytest.mark.parametrize("flag", ["--in", "--labels"])
def test_what_the_command_writes_is_no_input(world, tmp_path, name, flag):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"mine")
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="is, or holds, what is written to"):
        run(world, tmp_path / "link", flag, str(path), labels=flag != "--labels")
    assert path.read_bytes() == b"mine" and not (tmp_path / "unfinished.json").exists()


def test_a_data_set_that_holds_the_folder_is_no_input(world, tmp_path):
    files.write_jsonl(tmp_path / "train.jsonl", pages(9, 0))
    with pytest.raises(ValueError, match="is, or holds, what is written to"):
        run(world, tmp_path / "out", "--in", f"hub:{tmp_path}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("gone", [["index.json"], ["index.json", "classifier.npz", "curve.png"]])
def test_what_is_left_of_other_settings_is_refused(world, whole, tmp_path, gone):
    for name in {*contents(whole)} - {*gone}:
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="kept.jsonl.gz and no index.json: delete them, or use"):
        run(world, tmp_path, "--recall", "0.2")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["scored.jsonl", "unfinished.parts", "classifier.npz"])
def test_a_file_of_the_same_name_is_not_taken_for_ours(world, checkpoint, tmp_path, name):
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(ValueError, match=f"{name} and no index.json: delete them, or use another --out"):
        run(world, tmp_path, "--score", checkpoint, labels=False)
    assert (tmp_path / name).read_bytes() == b"mine"


@pytest.mark.parametrize("name", ["index.json", "unfinished.json"])
def test_an_index_of_somebody_else_is_refused(world, tmp_path, name):
    (tmp_path / name).write_text('{"version": 3}')
    with pytest.raises(ValueError, match="was made with other settings"):
        run(world, tmp_path)
    assert (tmp_path / name).read_text() == '{"version": 3}'


def test_what_was_dropped_and_why(world, tmp_path):
    lines = [json.dumps(row) for row in pages(60, 3)]
    lines += ["{", '{"text": " "}', '{"text": "7+1=8", "overlaps": ["gsm8k/1"]}']
    (tmp_path / "odd.jsonl").write_text("\n".join(lines))
    run(world, tmp_path / "out", "--in", str(tmp_path / "odd.jsonl"), "--bad-rows", "0.1")
    index = files.read_json(tmp_path / "out/index.json")
    counts = Counter(index["counts"])
    assert [counts[why] for why in ("read", prepare.BAD, prepare.EMPTY, prepare.MARKED)] == [63, 1, 1, 1]
    assert counts["kept"] + counts["below the threshold"] == 60
    assert "odd.jsonl: row 61 does not fit" in index["first_bad_row"][0]


@pytest.mark.parametrize("args, message", [
    (["--precision", "1"], "valid flags: --bad-rows"),
    (["--recall", "0"], "--recall and --bad-rows are shares"),
    (["--recall", "1.2"], "--recall and --bad-rows are shares"),
    (["--workers", "0"], "--workers and --sample are at least 1"),
    (["--score", "nowhere"], "not allowed with argument"),
    (["--refine", "nowhere"], "nowhere is not a folder"),
    (["--in", "nowhere.jsonl"], "nowhere.jsonl: data/README.md says"),
    (["--in", "README.md"], "README.md: only .jsonl"),
    (["--in", "hub:a", "b.jsonl"], "--in takes files, or one data set of the hub"),
    (["--labels", "nowhere.jsonl"], "no file nowhere.jsonl: --labels takes rows"),
    (["--columns", "web.text=body"], "unknown source 'web'"),
    (["--columns", "text=body"], "row 1 does not fit the format 'text'"),
    (["--format", "prose"], "choose from"),
])
def test_bad_arguments(world, tmp_path, args, message, capsys):
    with pytest.raises((SystemExit, ValueError, OSError)) as error:
        run(world, tmp_path / "out", *args, labels="--labels" not in args)
    printed = capsys.readouterr().err or str(error.value)
    assert message in printed and printed.count("\n") <= 1
    assert not (tmp_path / "out").exists()


def test_data_prepare_takes_what_was_kept(whole, tmp_path, monkeypatch):
    flags = ["--source", f"curated=text:{whole}/kept.jsonl.gz", "--out", str(tmp_path), "--workers", "1"]
    monkeypatch.setattr(sys, "argv", ["prepare", *flags, "--seq-len", "64", "--vocab-size", "400"])
    prepare.main()
    entry = shards.read_index(tmp_path)["sources"]["curated"]
    assert sum(entry[split]["documents"] for split in ("train", "val")) == len({*kept(whole)})


# ------------------------------------------------------------------------------------------------------------
# Rewriting


class Writer:
    """A sampler that answers what it is told to."""

    def __init__(self, checkpoint, new, reason):
        sampler = curate.load(checkpoint)
        self.model, self.tokenizer, self.prompts = sampler.model, sampler.tokenizer, []
        self.answer = Completion([], [], new, reason)

    def generate(self, prompts, max_new_tokens, temperature, stop):
        assert temperature == 0 and {*stop} == {"</rewritten>", *self.tokenizer.stop_ids}
        self.prompts, self.most = [self.tokenizer.decode(prompt) for prompt in prompts], max_new_tokens
        return [[self.answer] for _ in prompts]


@pytest.mark.parametrize("old, new, reason, why", [
    ("Login Ben has 3 pens. 3+1,204=1,207.", " Ben has 3 pens: 3+1,204=1,207.\n", "stop", ""),
    ("Ben has 3 pens and 12.5 cups.", "Ben has 3 pens and 12 cups.", "stop", "rewritten without a number"),
    ("Ben has 3 pens.", "Ben has 31 pens.", "stop", "rewritten without a number"),
    ("3 pens and buys 3 more, 6", "3 pens. 6", "stop", "rewritten without a number"),
    ("Ben has 3 pens", "Ben has 3 pens, so 999", "stop", "rewritten with a new number"),
    ("Ben has 3 pens", "Ben has 3 pens, and 3 it is", "stop", ""),
    ("Ben has 3 pens.", "Ben has 3 pens.", "length", "rewritten to nothing or without end"),
    ("Ben has pens.", " \n", "stop", "rewritten to nothing or without end"),
])
def test_a_rewriting_that_loses_or_invents_a_number_is_refused(checkpoint, old, new, reason, why):
    writer = Writer(checkpoint, new, reason)
    long = "pens and " * 3000  # with its prompt more than the model was made for
    found = curate.rewritten([old, long, old], writer)
    assert found == [(old if why else new.strip(), why), (long, "too long to rewrite")] + found[:1]
    assert len(writer.prompts) == 2 and all(f"<text>\n{old}\n</text>" in prompt for prompt in writer.prompts)
    size = len(writer.tokenizer.encode(old))
    assert all(size < most <= size * 1.25 + 1 for most in writer.most)


def test_a_random_model_changes_nothing_and_goes_on_where_it_was_killed(world, checkpoint, tmp_path):
    files.write_jsonl(tmp_path / "few.jsonl", pages(40, 0))
    flags, out = ("--in", str(tmp_path / "few.jsonl")), tmp_path / "out"
    run(world, tmp_path / "plain", *flags)
    old = kept(tmp_path / "plain")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(curate, "rewritten", dying(curate.rewritten, 1))
        run(world, out, *flags, "--refine", checkpoint)
    assert len(list(out.glob("unfinished.parts/refined-*.json"))) == 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curate, "rewritten", dying(curate.rewritten, -(-len(old) // 10) - 1))  # those missing
        run(world, out, *flags, "--refine", checkpoint)
    counts = files.read_json(out / "index.json")["counts"]
    assert kept(out) == old and "rewritten" not in counts and len(old) > 10
    assert sum(n for why, n in counts.items() if why.startswith(("rewritten", "too long"))) == len(old)
