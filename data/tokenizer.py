"""Byte-level BPE: train a small vocabulary, or load Llama 3's. Both are tiktoken encodings.

A tokenizer file, in tiktoken's format, has one line per token: "<base64 of the token's bytes> <rank>". The
rank is the token's id, and when its merge happens: of all adjacent pieces whose concatenation is in the file,
BPE joins those of lowest rank first. Four choices matter:

1. One splitting pattern for everything, Llama 3's: one loader reads our files and Meta's, and a file needs no
   settings beside it. Special tokens are not in the file; their ids follow the last rank.
2. Numbers are words too. The pattern splits digits into groups of up to three (\\p{N}{1,3}); a group that is
   frequent becomes a token, as in Llama's file. A tiny model then copies a number by copying one token, and
   learns sums as a table; with one token per digit it needs several times the text.
3. Text is always ordinary: "<|end_of_text|>" typed by a user is those characters, never the token.
4. Hugging Face's tokenizer.json of a byte-level BPE (Llama 3, Qwen 2.5) becomes a tiktoken encoding too, with
   the pattern and the special tokens that it names, or an error: nothing in it is guessed.

    tok = tokenizer.train(texts, vocab_size=1024)
    tok = tokenizer.load("tokenizer.model")  # or tokenizer.json, or a checkpoint folder with one of them
"""

import base64
import hashlib
import heapq
import json
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import count, pairwise
from pathlib import Path

import regex  # tiktoken's own dependency; the standard library's re does not know \p{L}
from tiktoken import Encoding

from data.files import atomic_write, write_json

FILE_NAME, JSON_NAME = "tokenizer.model", "tokenizer.json"

# Meta's published pattern: contractions | words | up to three digits | punctuation | line breaks | spaces
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>")  # of the tokenizers that we train

# The names that Llama 3.1 and 3.2 checkpoints give to ids 128000–128255.
LLAMA3_RANKS = 128_000
_NAMED = {0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id",
          7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"}
_RESERVED = map("reserved_special_token_{}".format, count())
LLAMA3_SPECIAL_TOKENS = tuple(f"<|{_NAMED.get(i) or next(_RESERVED)}|>" for i in range(256))
# End of a document, of a message, of a turn; and Qwen's names for the first and the last.
_ENDS = ("<|end_of_text|>", "<|endoftext|>")
_STOPS = (*_ENDS, "<|eom_id|>", "<|eot_id|>", "<|im_end|>")

_INVALID_BYTE = re.compile("([\udc80-\udcff])")  # how "surrogateescape" writes a byte that is not UTF-8
_LONGEST_TEXT = 400_000  # characters, Meta's limit: tiktoken's regex overflows its stack on a million spaces
_LONGEST_PIECE = 64  # bytes; longer pieces are rulers and base64, nothing to learn words from


class Tokenizer:
    """encoding: tiktoken's; vocab_size: one more than the largest id; eos_id: ends every document; stop_ids:
    those that end a text when sampled; hash: hex SHA-256 of the file, as shards and checkpoints record it."""

    def __init__(self, ranks: dict[bytes, int], json_file=b"", pattern=PATTERN, special=None, nfc=False):
        self.ranks, self.json_file, self.nfc = ranks, json_file, nfc
        if special is None:
            names = LLAMA3_SPECIAL_TOKENS if len(ranks) == LLAMA3_RANKS else SPECIAL_TOKENS
            special = {name: len(ranks) + i for i, name in enumerate(names)}
        self.pattern, self.special, self.known = pattern, special, {*ranks.values(), *special.values()}
        self.encoding = Encoding("octo", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        self.vocab_size = 1 + max(self.known)
        self.eos_id = next(special[name] for name in _ENDS if name in special)
        self.bos_id = special.get("<|begin_of_text|>")  # only other programs ask: no text of ours begins so
        self.pad_id = special.get("<|finetune_right_pad_id|>", self.eos_id)
        self.stop_ids = tuple(special[name] for name in _STOPS if name in special)
        self.hash = hashlib.sha256(self._file_bytes()).hexdigest()

    def encode(self, text: str) -> list[int]:
        if self.nfc:  # Qwen's: é as one character, not as e and an accent
            text = unicodedata.normalize("NFC", text)
        ids = []
        for i in range(0, len(text), _LONGEST_TEXT):
            ids += self.encoding.encode_ordinary(text[i : i + _LONGEST_TEXT])
        return ids

    def encode_bytes(self, data: bytes) -> list[int]:
        """Any bytes: stretches of valid UTF-8 as text, each invalid byte as the token of that byte."""
        ids = []
        for i, part in enumerate(_INVALID_BYTE.split(data.decode("utf-8", "surrogateescape"))):
            ids += [self.ranks[bytes([ord(part) - 0xDC00])]] if i % 2 else self.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; a character that is cut becomes U+FFFD (decode_bytes loses nothing)."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Ids without a token, which models whose matrices are padded can sample, stand for nothing."""
        return self.encoding.decode_bytes([i for i in ids if i in self.known])

    def agrees(self, other: "Tokenizer") -> bool:
        """Do both give the same ids to any text, be one Meta's file and one Hugging Face's?"""
        return (self.ranks, self.pattern, self.nfc) == (other.ranks, other.pattern, other.nfc)

    def save(self, path: str | os.PathLike) -> None:
        """Write the tiktoken file (FILE_NAME if path is a folder), or the tokenizer.json in its place."""
        path = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
        path = path.with_name(JSON_NAME) if self.json_file else path
        with atomic_write(path, "wb") as file:
            file.write(self._file_bytes())

    def stops(self, generation: dict) -> tuple[int, ...]:
        """stop_ids and, of a generation_config.json, the eos_token_id (an id or several) that are special."""
        found = generation.get("eos_token_id")
        found = [i for i in (found if isinstance(found, list) else [found]) if i in self.special.values()]
        return tuple(dict.fromkeys((*self.stop_ids, *found)))

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """All that a Hugging Face folder says about text. The tiktoken file goes to original/, as in Meta's
        repositories: beside config.json, llama.cpp would take it for SentencePiece's."""
        folder, names = Path(folder), {i: name for name, i in self.special.items()}
        if not self.json_file:
            (folder / "original").mkdir(exist_ok=True)
            self.save(folder / "original")
        with atomic_write(folder / JSON_NAME, "wb") as file:
            file.write(self.json_file or _to_json(self))
        ids = {"bos_token": self.bos_id, "eos_token": self.eos_id, "pad_token": self.pad_id}
        kind = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        write_json(folder / "tokenizer_config.json", kind | {key: names.get(i) for key, i in ids.items()})

    def _file_bytes(self) -> bytes:
        lines = (b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in self.ranks.items())
        return self.json_file or b"".join(lines)


def find(folder: str | os.PathLike) -> Path | None:
    """The tokenizer file of a checkpoint folder, Meta's (in its repositories: in original/) or a .json."""
    files = (Path(folder) / name for name in (f"original/{FILE_NAME}", FILE_NAME, JSON_NAME))
    return next((file for file in files if file.is_file()), None)


def load(path: str | os.PathLike) -> Tokenizer:
    """Read a tiktoken file or a tokenizer.json; of a checkpoint folder, the one that it holds.
    FileNotFoundError and ValueError name the file and the line."""
    path = Path(path)
    if path.is_dir():
        path = find(path) or path / FILE_NAME
    if not path.is_file():
        how = f"give a tiktoken file, or a folder that holds {FILE_NAME} or {JSON_NAME}"
        raise FileNotFoundError(f"no tokenizer at {path}: {how}")
    if path.suffix == ".json":
        return _from_json(path)
    ranks: dict[bytes, int] = {}  # by hand: tiktoken's own reader leaves a copy in the temporary folder
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            token = base64.b64decode(token, validate=True)
            if int(rank) != len(ranks) or not token or token in ranks:
                raise ValueError
        except ValueError:  # or not two fields, not base64, not a number
            raise ValueError(f"{path}, line {number}: not '<base64 of a new token> {len(ranks)}'") from None
        ranks[token] = len(ranks)
    _check_bytes(path, ranks)
    return Tokenizer(ranks)


def _check_bytes(path: Path, ranks: dict[bytes, int]) -> None:
    if missing := sum(bytes([b]) not in ranks for b in range(256)):
        raise ValueError(f"{path} is not byte-level: {missing} of the 256 single bytes have no token")


# ------------------------------------------------------------------------------------------------------------
# Hugging Face's tokenizer.json: GPT-2's splitting, which "use_regex" means there, and its way to write any
# byte as a printable character

_GPT2_PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_BYTE_OF = {chr(b): b for b in _PRINTABLE}
_BYTE_OF |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _PRINTABLE)}
_CHAR_OF = {b: char for char, b in _BYTE_OF.items()}


def _to_json(tok: Tokenizer) -> bytes:
    """A tiktoken vocabulary as tokenizer.json. All splits of a token into two are listed as merges, in the
    order of the ranks, as in Llama 3's: of them only one can occur in a text, the last step of BPE on the
    token's own bytes. ignore_merges: a piece that is a token needs no merges that lead to it."""
    text = {token: "".join(_CHAR_OF[b] for b in token) for token in tok.ranks}
    vocab = dict(zip(text.values(), tok.ranks.values()))
    splits = ((token[:i], token[i:]) for token in tok.ranks for i in range(1, len(token)))
    merges = [f"{text[a]} {text[b]}" for a, b in splits if a in text and b in text]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": tok.pattern}, "behavior": "Isolated", "invert": False}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    spec = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [{"id": i, "content": name} | plain for name, i in tok.special.items()],
        "normalizer": None, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_bytes]},
        "post_processor": to_bytes, "decoder": to_bytes,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
                  "ignore_merges": True, "vocab": vocab, "merges": merges},
    }
    return json.dumps(spec, ensure_ascii=False, indent=1).encode()


def _from_json(path: Path) -> Tokenizer:
    """The ids that Hugging Face's tokenizers give, or ValueError naming what in the file tiktoken cannot do.
    tiktoken joins the pair whose joined token has the lowest rank; a tokenizer.json lists the pairs in order.
    The two are the same if the ids of the joined tokens rise along that list."""
    data = path.read_bytes()
    try:
        spec = json.loads(data)
        model, added = spec["model"], {token["content"]: token["id"] for token in spec["added_tokens"]}
        if model["type"] != "BPE":
            raise ValueError(f"a {model['type']} model, not BPE")
        vocab = {token: i for token, i in model["vocab"].items() if token not in added}
        ranks = {bytes(_BYTE_OF[c] for c in token): i for token, i in vocab.items()}
        joined = [vocab["".join(pair).replace(" ", "")] for pair in model["merges"]]  # "a b" or ["a", "b"]
        made = set(joined)
        for option in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
            if model.get(option):
                raise ValueError(f"its {option} is not supported")
        for token in spec["added_tokens"]:  # <tool_call> is no text, but a run of spaces is
            if not token.get("special", True) and not re.fullmatch(r"<.*>", token["content"]):
                raise ValueError(f"its added token {token['content']!r} is ordinary text")
        pattern, normalizer = _splitting(spec["pre_tokenizer"]), spec.get("normalizer")
        if normalizer and normalizer["type"] != "NFC":
            raise ValueError(f"a normalizer of type {normalizer['type']}")
        if any(a > b for a, b in pairwise(joined)):
            raise ValueError("its merges are not in the order of its ids")
        # A token without a merge is a whole piece of text (ignore_merges): tiktoken must find no way to it.
        for token in (token for token, i in ranks.items() if len(token) > 1 and i not in made):
            halves = any(token[:i] in ranks and token[i:] in ranks for i in range(1, len(token)))
            if halves or not model.get("ignore_merges"):
                raise ValueError(f"no merge makes its token {token!r}")
        if not any(name in added for name in _ENDS):
            raise ValueError(f"it has no token that ends a text: none of {', '.join(_ENDS)}")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error) if type(error) is ValueError else f"not a byte-level BPE ({error!r})"
        raise ValueError(f"{path} cannot be read: {reason}") from None
    _check_bytes(path, ranks)
    return Tokenizer(ranks, data, pattern, added, nfc=bool(normalizer))


def _splitting(spec: dict | None) -> str:
    """The pattern by which a pre_tokenizer cuts text into pieces."""
    steps = spec["pretokenizers"] if spec and spec["type"] == "Sequence" else [spec]
    *before, last = [step or {"type": None} for step in steps]
    if last["type"] != "ByteLevel" or last.get("add_prefix_space"):
        raise ValueError(f"a pre_tokenizer that ends in {last['type']}, not in a plain ByteLevel")
    if not before and last.get("use_regex", True):
        return _GPT2_PATTERN
    if len(before) == 1 and before[0]["type"] == "Split" and not last.get("use_regex", True):
        split = before[0]
        if split["behavior"] == "Isolated" and not split.get("invert") and "Regex" in split["pattern"]:
            return split["pattern"]["Regex"]
    raise ValueError(f"a pre_tokenizer of {' + '.join(step['type'] for step in steps)} with these settings")


# ---- Training ----------------------------------------------------------------------------------------------


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-pair encoding (Gage 1994; Sennrich et al. 2016) on bytes, to vocab_size tokens with special ones.
    Starting from single bytes, join again and again the adjacent pair that is most frequent; ties go to the
    smallest bytes, so the same texts give the same file everywhere. Pairs are counted by what they join to:
    (ab, c) and (a, bc) are one candidate "abc", as they are one token for tiktoken. Training ends early if no
    pair occurs twice (a small corpus has few words): build the model for the vocab_size of the result."""
    least = 256 + len(SPECIAL_TOKENS)
    if vocab_size < least:
        raise ValueError(f"vocab_size {vocab_size} is too small: bytes and special tokens are {least}")
    ranks = {bytes([b]): b for b in range(256)}
    words, freqs = _count_words(texts)

    counts: Counter[bytes] = Counter()  # how often each candidate occurs in the whole text
    where: dict[bytes, set[int]] = defaultdict(set)  # the words that held it at some time
    for i, word in enumerate(words):
        for pair in _pairs(word):
            counts[pair] += freqs[i]
            where[pair].add(i)
    heap = [(-count, pair) for pair, count in counts.items() if count > 1]
    heapq.heapify(heap)

    while heap and len(ranks) + len(SPECIAL_TOKENS) < vocab_size:
        count, pair = heapq.heappop(heap)
        if counts[pair] == -count:
            ranks[pair] = len(ranks)
            stale = _merge(pair, words, freqs, counts, where)
        else:  # another merge took occurrences away since this entry was made
            stale = {pair}
        for pair in stale:
            if counts[pair] > 1:
                heapq.heappush(heap, (-counts[pair], pair))
    return Tokenizer(ranks)


def _count_words(texts: Iterable[str]) -> tuple[list[list[bytes]], list[int]]:
    """The distinct pieces of the texts as lists of single bytes, and how often each occurs."""
    pieces: Counter[str] = Counter()
    for text in texts:
        pieces.update(regex.findall(PATTERN, text))
    encoded = [(piece.encode("utf-8", "replace"), freq) for piece, freq in pieces.items()]
    encoded = [(data, freq) for data, freq in encoded if 2 <= len(data) <= _LONGEST_PIECE]
    return [[bytes([b]) for b in data] for data, _ in encoded], [freq for _, freq in encoded]


def _pairs(word: list[bytes]) -> list[bytes]:
    return [a + b for a, b in pairwise(word)]


def _join(word: list[bytes], pair: bytes) -> list[bytes]:
    """The word with every `pair` joined, left to right, as tiktoken does."""
    out, i = [], 0
    while i < len(word):
        step = 2 if i + 1 < len(word) and word[i] + word[i + 1] == pair else 1
        out.append(b"".join(word[i : i + step]))
        i += step
    return out


def _merge(pair: bytes, words, freqs, counts, where) -> set[bytes]:
    """Join `pair` in every word that holds it; returns the candidates whose counts may have grown."""
    grown = set()
    for i in where.pop(pair):
        for gone in _pairs(words[i]):
            counts[gone] -= freqs[i]
        words[i] = _join(words[i], pair)
        for come in _pairs(words[i]):
            counts[come] += freqs[i]
            where[come].add(i)
            grown.add(come)
    return grown
