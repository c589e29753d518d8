"""data/tokenizer.py: round trips of anything, files that reload equal, Llama 3's ids, digits, errors."""

import base64
import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken import Encoding

from data import tokenizer

PUBLIC = Path(os.environ.get("OCTO_DATA", "nowhere"))
LLAMA3 = PUBLIC / "tokenizer/tokenizer.model"
needs_llama3 = pytest.mark.skipif(not LLAMA3.is_file(), reason="no Llama 3 tokenizer file (set OCTO_DATA)")

TEXTS = [
    "Ann had 48 clips. She sold half of them, so 48 / 2 = 24 clips are left.\n",
    "So Ann has 24 clips. How many clips did Ann have? She had 24 + 24 = 48 clips, ½ of 96.\n\n",
    "Überall äußern sich Möglichkeiten, überall äußern sich Zweifel. \\boxed{48} $x^2$ \\boxed{24}",
] * 3
TOK = tokenizer.train(TEXTS, 330)


def public_reader(path: Path) -> Encoding:
    """What any other program does with a tiktoken file."""
    lines = map(bytes.split, path.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    special = {name: len(ranks) + i for i, name in enumerate(tokenizer.SPECIAL_TOKENS)}
    return Encoding("x", pat_str=tokenizer.PATTERN, mergeable_ranks=ranks, special_tokens=special)


@given(st.text() | st.text("aAnclips 0123456789\n.½é'"))
@settings(deadline=None)
def test_text_round_trips(text):
    ids = TOK.encode(text)
    assert TOK.decode(ids) == text
    assert TOK.encode_bytes(text.encode()) == ids


PIECES = [b"Ann ", b"\xff", b"\xc3", b"\xa9", b"\xed\xa0\x80", b"4"]


@given(st.binary() | st.lists(st.sampled_from(PIECES)).map(b"".join))
@settings(deadline=None)
def test_any_bytes_round_trip(data):
    assert TOK.decode_bytes(TOK.encode_bytes(data)) == data


def test_a_million_spaces_do_not_overflow_the_regex():
    text = " " * 1_200_000 + "x" * 500_000
    assert TOK.decode(TOK.encode(text)) == text


@given(st.integers(0, 10**30), st.sampled_from(["{}", "{} clips", "x{}", "\\boxed{{{}}}", "-{}.5", "24{}"]))
@settings(deadline=None)
def test_no_token_holds_more_than_three_digits_or_digits_and_letters(number, form):
    text = form.format(number)
    pieces = [TOK.decode([i]) for i in TOK.encode(text)]
    assert "".join(pieces) == text
    numbers = [piece for piece in pieces if any(c.isdigit() for c in piece)]
    assert all(piece.isdigit() and len(piece) <= 3 for piece in numbers), pieces


def test_a_frequent_number_is_one_token():
    assert len(TOK.encode("48")) == len(TOK.encode("24")) == 1 and len(TOK.encode("71")) == 2


def test_special_tokens_follow_the_ranks_and_are_never_parsed_from_text():
    assert (TOK.vocab_size, TOK.eos_id, TOK.stop_ids) == (330, 329, (329,))
    ids = TOK.encode("a<|end_of_text|>")
    assert TOK.eos_id not in ids and TOK.decode(ids) == "a<|end_of_text|>"
    assert TOK.decode([TOK.eos_id]) == "<|end_of_text|>"


def test_training_is_deterministic_and_joins_what_is_frequent():
    assert tokenizer.train(TEXTS, 330).hash == tokenizer.train(iter(reversed(TEXTS)), 330).hash == TOK.hash
    assert len(TOK.encode(" clips")) == 1


def test_training_is_greedy_bpe():
    """Against the obvious algorithm, which counts everything again for each merge."""
    text = "abab abcabc aaab aaaa bcbc cab cab ababab aaaaa"
    words = [[bytes([b]) for b in word.encode()] for word in tokenizer.regex.findall(tokenizer.PATTERN, text)]
    expected = []
    while len(expected) < 8:
        counts = tokenizer.Counter(a + b for word in words for a, b in tokenizer.pairwise(word))
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        expected.append(best)
        words = [tokenizer._join(word, best) for word in words]
    tok = tokenizer.train([text], 256 + len(expected) + 2)
    assert list(tok.ranks)[256:] == expected
    pieces = [tok.decode_bytes([i]) for i in tok.encode(text)]
    assert pieces == [part for word in words for part in word], "tiktoken encodes as training joined"


def test_training_ends_when_no_pair_occurs_twice():
    assert list(tokenizer.train(["xy xy xy", "zzz"], 1000).ranks)[256:] == [b"xy", b" xy", b"zz"]


def test_saved_file_is_tiktokens(tmp_path):
    TOK.save(tmp_path)  # a folder: into tokenizer.model
    path = tmp_path / "tokenizer.model"
    again, other = tokenizer.load(tmp_path), public_reader(path)
    assert again.hash == TOK.hash == hashlib.sha256(path.read_bytes()).hexdigest()
    for text in TEXTS:
        assert again.encode(text) == TOK.encode(text) == other.encode_ordinary(text)
    assert [p.name for p in tmp_path.iterdir()] == ["tokenizer.model"]


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="no tokenizer at .*folder that holds tokenizer.model"):
        tokenizer.load(tmp_path)
    path = tmp_path / "t.model"
    TOK.save(path)
    lines = path.read_bytes().splitlines(keepends=True)
    bad = {3: b"?? 2\n", 7: b"QQ==\n", 9: b"QQ== 4\n", 70: b"QQ== 69\n", 20: b"\xff\xfe 19\n"}
    for number, line in bad.items():
        path.write_bytes(b"".join(lines[: number - 1] + [line] + lines[number:]))
        with pytest.raises(ValueError, match=f"line {number}: not"):
            tokenizer.load(path)
    path.write_bytes(b"".join(lines[:200]))
    with pytest.raises(ValueError, match="56 of the 256 single bytes have no token"):
        tokenizer.load(path)
    with pytest.raises(ValueError, match="too small"):
        tokenizer.train(TEXTS, 200)


@needs_llama3
def test_llama3():
    tok = tokenizer.load(LLAMA3)
    assert (tok.vocab_size, tok.eos_id, tok.stop_ids) == (128_256, 128_001, (128_001, 128_008, 128_009))
    assert tok.encode("Hello world") == [9906, 1917]
    assert tok.encode("hello world!") == [15339, 1917, 0]
    assert len(tok.encode("1234567")) == 3  # Llama has a token for each group of up to three digits
    special = tok.encoding._special_tokens
    assert len(special) == 256 and sorted(special.values()) == list(range(128_000, 128_256))
    named = {
        "begin_of_text": 0, "reserved_special_token_1": 3, "finetune_right_pad_id": 4, "start_header_id": 6,
        "end_header_id": 7, "eom_id": 8, "eot_id": 9, "python_tag": 10, "reserved_special_token_247": 255,
    }
    assert all(special[f"<|{name}|>"] == 128_000 + i for name, i in named.items())
    assert tok.hash == hashlib.sha256(LLAMA3.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------------------
# tokenizer.json


QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def hugging_face(pattern: str | None, normalizer=None, first=()):
    """A byte-level BPE trained by Hugging Face's library, special tokens after the others or before them."""
    hf = pytest.importorskip("tokenizers")
    trained = hf.Tokenizer(hf.models.BPE())
    pre = hf.pre_tokenizers
    if pattern is None:
        trained.pre_tokenizer = pre.ByteLevel(add_prefix_space=False)
    else:
        bytes_only = pre.ByteLevel(add_prefix_space=False, use_regex=False)
        trained.pre_tokenizer = pre.Sequence([pre.Split(hf.Regex(pattern), "isolated"), bytes_only])
    if normalizer:
        trained.normalizer = normalizer(hf)
    how = {"initial_alphabet": pre.ByteLevel.alphabet(), "special_tokens": list(first)}
    trainer = hf.trainers.BpeTrainer(vocab_size=420, show_progress=False, **how)
    trained.train_from_iterator(TEXTS * 3, trainer)
    trained.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    return trained


JSON_KINDS = {
    "GPT-2": lambda: hugging_face(None),
    "Llama 3": lambda: hugging_face(tokenizer.PATTERN),
    "Qwen": lambda: hugging_face(QWEN_PATTERN, lambda hf: hf.normalizers.NFC()),
    "special tokens first": lambda: hugging_face(QWEN_PATTERN, first=("<|pad|>",)),
}
WILD = [
    "", " ", "a  b\n\n c\t12345.6", "naïve cafe\u0301 \u212b", "日本語 🙂👍🏽", "DON'T don't\r\n  x",
    "<|im_end|> <|endoftext|>", "\x00\x7f\xa0",
]


@pytest.mark.parametrize("kind", JSON_KINDS)
def test_tokenizer_json_gives_the_ids_of_hugging_face(kind, tmp_path):
    theirs = JSON_KINDS[kind]()
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = tokenizer.load(tmp_path)
    assert ours.vocab_size == theirs.get_vocab_size()
    assert ours.eos_id == theirs.token_to_id("<|endoftext|>")
    assert ours.stop_ids == (ours.eos_id, theirs.token_to_id("<|im_end|>"))

    @given(st.text(max_size=40) | st.sampled_from(TEXTS) | st.sampled_from(WILD))
    @settings(max_examples=150, deadline=None)
    def same(text):
        parts = text.split("<|")  # special tokens are no text to us
        expected = [i for part in parts for i in theirs.encode(part).ids]
        assert [i for part in parts for i in ours.encode(part)] == expected

    same()
    assert ours.encode("<|im_end|>") != [theirs.token_to_id("<|im_end|>")]
    text = "The cat's 12 hats, and 3 more."
    assert ours.decode(ours.encode(text)) == text == ours.decode([*ours.encode(text), ours.vocab_size + 5])
    (tmp_path / "copy").mkdir()
    ours.save(tmp_path / "copy" / tokenizer.FILE_NAME)
    again = tokenizer.load(tmp_path / "copy")
    assert again.hash == ours.hash and again.encode(text) == ours.encode(text)


def damaged_json(**changes):
    def damage(spec):
        for key, value in changes.items():
            spec[key] = value

    return damage


def swap_merges(spec):
    merges = spec["model"]["merges"]
    merges[0], merges[-1] = merges[-1], merges[0]


def test_every_split_may_be_listed_as_a_merge_as_llama_3_does(tmp_path):
    """And a token that no merge makes, under ignore_merges, is found as a whole piece."""
    path = tmp_path / "tokenizer.json"
    JSON_KINDS["Llama 3"]().save(str(path))
    spec = json.loads(path.read_text())
    vocab, order = spec["model"]["vocab"], {}
    for a, b in spec["model"]["merges"]:
        for i in range(1, len(a + b)):
            if (a + b)[:i] in vocab and (a + b)[i:] in vocab:
                order.setdefault(a + b, []).append([(a + b)[:i], (a + b)[i:]])
    spec["model"]["merges"] = [pair for token in sorted(order, key=vocab.get) for pair in order[token]]
    spec["model"]["ignore_merges"] = True
    vocab["Zqxj"] = max(*vocab.values(), *(t["id"] for t in spec["added_tokens"])) + 1
    path.write_text(json.dumps(spec))
    ours, theirs = tokenizer.load(path), pytest.importorskip("tokenizers").Tokenizer.from_file(str(path))
    for text in [*TEXTS, *WILD[:-2], "Zqxj", "Zqxjk Zqx"]:
        assert ours.encode(text) == theirs.encode(text).ids, text
    assert ours.encode("Zqxj") == [vocab["Zqxj"]]
    assert ours.agrees(tokenizer.load(path)) and not ours.agrees(TOK)
    spec["model"]["ignore_merges"] = False
    path.write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="no merge makes its token b'Zqxj'"):
        tokenizer.load(path)


SPACES = {"id": 900, "content": "    ", "special": False}


@pytest.mark.parametrize("damage, reason", [
    (lambda spec: spec["model"].update(end_of_word_suffix="</w>"), "its end_of_word_suffix is not supported"),
    (lambda spec: spec["added_tokens"].append(SPACES), "added token '    ' is ordinary text"),
    (damaged_json(model={"type": "WordPiece", "vocab": {}}), "a WordPiece model, not BPE"),
    (damaged_json(pre_tokenizer=None), "pre_tokenizer that ends in None"),
    (damaged_json(pre_tokenizer={"type": "Metaspace"}), "ends in Metaspace"),
    (damaged_json(normalizer={"type": "Lowercase"}), "a normalizer of type Lowercase"),
    (damaged_json(added_tokens=[]), "no token that ends a text"),
    (swap_merges, "not in the order of its ids"),
    (lambda spec: spec["model"]["vocab"].pop("A"), "1 of the 256 single bytes"),
    (lambda spec: spec["model"]["vocab"].update({"▁the": 9999}), "not a byte-level BPE"),
])
def test_a_tokenizer_json_that_tiktoken_cannot_do_is_refused(damage, reason, tmp_path):
    path = tmp_path / "tokenizer.json"
    JSON_KINDS["Qwen"]().save(str(path))
    spec = json.loads(path.read_text())
    damage(spec)
    path.write_text(json.dumps(spec))
    with pytest.raises(ValueError, match=reason):
        tokenizer.load(path)


# ------------------------------------------------------------------------------------------------------------
# AutoTokenizer on what save_pretrained() writes


def named_as_llama3() -> tokenizer.Tokenizer:
    names = enumerate(tokenizer.LLAMA3_SPECIAL_TOKENS, len(TOK.ranks))
    return tokenizer.Tokenizer(TOK.ranks, special={name: i for i, name in names})


def from_json(kind: str, folder: Path) -> tokenizer.Tokenizer:
    path = folder / "given.json"
    JSON_KINDS[kind]().save(str(path))
    return tokenizer.load(path)


SAVED_KINDS = {
    "ours": lambda folder: TOK,
    "ours, named as Llama 3's": lambda folder: named_as_llama3(),
    "Llama 3's": lambda folder: tokenizer.load(LLAMA3),
    "Qwen's": lambda folder: from_json("Qwen", folder),
    "special tokens first": lambda folder: from_json("special tokens first", folder),
}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=needs_llama3) if k == "Llama 3's" else k
                                  for k in SAVED_KINDS])
def test_auto_tokenizer_gives_our_ids(kind, tmp_path):
    """To text as it is; a special token's name is its id there, as everywhere in transformers, and with
    split_special_tokens=True it is text, as it always is to us. Nothing is put in front of a text."""
    transformers = pytest.importorskip("transformers")
    ours, family = SAVED_KINDS[kind](tmp_path), "qwen2" if "Qwen" in kind else "llama"
    ours.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    theirs, special = transformers.AutoTokenizer.from_pretrained(tmp_path), ours.special
    assert theirs.convert_tokens_to_ids(list(special)) == list(special.values())
    assert (len(theirs), theirs.eos_token_id, theirs.bos_token_id) == (
        ours.vocab_size, ours.eos_id, special.get("<|begin_of_text|>"))
    assert theirs.pad_token_id == special.get("<|finetune_right_pad_id|>", ours.eos_id)
    assert "tokenizer.model" not in os.listdir(tmp_path), "llama.cpp would read it as SentencePiece's"
    if kind != "ours, named as Llama 3's":  # by the number of ranks, our own file tells whose names there are
        assert tokenizer.load(tmp_path).hash == ours.hash
        (tmp_path / "alone").mkdir()
        shutil.copy(tmp_path / "tokenizer.json", tmp_path / "alone")
        again = tokenizer.load(tmp_path / "alone")
        assert again.agrees(ours) and again.special == special and again.stop_ids == ours.stop_ids
    pieces = [*(name.encode() for name in list(special)[:12]), *ours.ranks]
    several = st.lists(st.sampled_from(pieces), max_size=7)
    joined = several.map(lambda some: b"".join(some).decode("utf-8", "ignore"))
    parts = re.compile("(" + "|".join(map(re.escape, special)) + ")")

    @given(joined | st.text(max_size=40) | st.sampled_from(TEXTS) | st.sampled_from(WILD))
    @settings(max_examples=150, deadline=None)
    def same(text):
        expected = []
        for part in parts.split(text):
            expected += [special[part]] if part in special else ours.encode(part)
        assert theirs(text).input_ids == expected
        assert theirs(text, split_special_tokens=True).input_ids == ours.encode(text)
        assert ours.json_file or theirs.decode(expected) == ours.decode(expected) == text

    same()


def test_generation_settings_add_stops_that_are_special_tokens():
    tok = named_as_llama3()
    reserved, eos = tok.special["<|reserved_special_token_0|>"], tok.eos_id
    for nothing_new in ({}, {"eos_token_id": None}, {"eos_token_id": 2}):  # an ordinary word
        assert tok.stops(nothing_new) == tok.stop_ids
    assert tok.stops({"eos_token_id": [eos, reserved]}) == (*tok.stop_ids, reserved) == (
        eos, tok.special["<|eom_id|>"], tok.special["<|eot_id|>"], reserved)
