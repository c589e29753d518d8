"""Byte-level BPE: train a small vocabulary, or load Llama 3's; both are tiktoken encodings in tiktoken's file format.

A tokenizer file has one line per token, "<base64 of the token's bytes> <rank>". The rank is the token's id, and also
when its merge happens: of all adjacent pieces whose concatenation is in the file, BPE joins those of lowest rank first.
Three choices matter:

1. One splitting pattern for everything, Llama 3's, so one loader reads our files and Meta's, and a file needs no
   settings beside it. Special tokens are not in the file; their ids follow the last rank.
2. Numbers are words too. The pattern splits digits into groups of up to three (\\p{N}{1,3}); as in Llama's file, a
   group that is frequent becomes a token. A tiny model then copies a number by copying one token, and learns sums as
   a table; with a token a digit it needs several times the text.
3. Text is always ordinary: "<|end_of_text|>" typed by a user is encoded as those characters, never as the token.

    from data import tokenizer
    tok = tokenizer.train(texts, vocab_size=1024); tok.save("tokenizer.model")
    tok = tokenizer.load("tokenizer.model")        # or a checkpoint folder that holds one
"""

import base64
import hashlib
import heapq
import os
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path

import regex  # tiktoken's own dependency; the standard library's re does not know \p{L}
import tiktoken

FILE_NAME = "tokenizer.model"

# Meta's published pattern: contractions | words | up to three digits | punctuation | line breaks | spaces
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>")  # of the tokenizers that we train

# The names that Llama 3.1 and 3.2 checkpoints give to ids 128000–128255.
LLAMA3_RANKS = 128_000
_LLAMA3_NAMED = {
    0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id", 6: "start_header_id", 7: "end_header_id",
    8: "eom_id", 9: "eot_id", 10: "python_tag",
}  # fmt: skip
_unnamed = [i for i in range(256) if i not in _LLAMA3_NAMED]
_reserved = {i: f"reserved_special_token_{n}" for n, i in enumerate(_unnamed)}
LLAMA3_SPECIAL_TOKENS = tuple(f"<|{(_LLAMA3_NAMED | _reserved)[i]}|>" for i in range(256))
_STOPS = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")  # end of a document, of a message, of a turn

_INVALID_BYTE = re.compile("([\udc80-\udcff])")  # how "surrogateescape" writes a byte that is not UTF-8
_LONGEST_TEXT = 400_000  # characters, Meta's own limit: tiktoken's regex overflows its stack on a million spaces
_LONGEST_PIECE = 64  # bytes; longer pieces are rulers and base64, nothing to learn words from


class Tokenizer:
    """A tiktoken Encoding, with the few facts that the rest of the project asks for.

    encoding: tiktoken.Encoding; vocab_size: ranks + special tokens; eos_id: ends every document;
    stop_ids: the ids that end a text when sampled; hash: hex SHA-256 of the file, which shards and checkpoints record.
    """

    def __init__(self, ranks: dict[bytes, int]):
        self.ranks = ranks
        names = LLAMA3_SPECIAL_TOKENS if len(ranks) == LLAMA3_RANKS else SPECIAL_TOKENS
        special = {name: len(ranks) + i for i, name in enumerate(names)}
        self.encoding = tiktoken.Encoding("octo", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)
        self.vocab_size = len(ranks) + len(special)
        self.eos_id = special["<|end_of_text|>"]
        self.stop_ids = tuple(special[name] for name in _STOPS if name in special)
        self.hash = hashlib.sha256(self._file_bytes()).hexdigest()

    def encode(self, text: str) -> list[int]:
        if len(text) <= _LONGEST_TEXT:
            return self.encoding.encode_ordinary(text)
        slices = (text[i : i + _LONGEST_TEXT] for i in range(0, len(text), _LONGEST_TEXT))
        return [token for part in slices for token in self.encoding.encode_ordinary(part)]

    def encode_bytes(self, data: bytes) -> list[int]:
        """Any bytes: stretches of valid UTF-8 as text, each invalid byte as the token of that byte."""
        ids = []
        for i, part in enumerate(_INVALID_BYTE.split(data.decode("utf-8", "surrogateescape"))):
            ids += [self.ranks[bytes([ord(part) - 0xDC00])]] if i % 2 else self.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; a character that is cut in the middle becomes U+FFFD (decode_bytes loses nothing)."""
        return self.encoding.decode(ids)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        return self.encoding.decode_bytes(ids)

    def save(self, path: str | os.PathLike) -> None:
        """Write the tiktoken file (written aside, then renamed; into FILE_NAME if path is a folder)."""
        path = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
        aside = path.with_name(path.name + ".tmp")
        aside.write_bytes(self._file_bytes())
        os.replace(aside, path)

    def _file_bytes(self) -> bytes:
        return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in self.ranks.items())


def load(path: str | os.PathLike) -> Tokenizer:
    """Read a tiktoken file, or the FILE_NAME of a checkpoint folder.

    Read by hand because tiktoken's own reader copies whatever it reads into a cache in the temporary folder.
    Raises FileNotFoundError or ValueError, naming the file and the line.
    """
    path = Path(path) / FILE_NAME if Path(path).is_dir() else Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no tokenizer at {path}: give a tiktoken file, or a folder that holds {FILE_NAME}")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            token = base64.b64decode(token, validate=True)
            good = int(rank) == len(ranks) and token and token not in ranks
        except ValueError:  # not two fields, not base64, not a number
            good = False
        if not good:
            raise ValueError(f"{path}, line {number}: not the tiktoken line '<base64 of a new token> {len(ranks)}'")
        ranks[token] = len(ranks)
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise ValueError(f"{path} is no byte-level tokenizer: {len(missing)} of the 256 single bytes have no token")
    return Tokenizer(ranks)


# ----------------------------------------------------------------------------------------------------------------------
# Training


def train(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-pair encoding (Gage 1994; Sennrich et al. 2016) on bytes, to at most vocab_size tokens, special ones included.

    Starting from single bytes, join again and again the adjacent pair that is most frequent; ties go to the smallest
    bytes, so that the same texts give the same file everywhere. Pairs are counted by what they join to: (ab, c) and
    (a, bc) are one candidate "abc", as they are one token for tiktoken. It ends early when no pair occurs twice: a small
    world has only so many words, so build the model for the vocab_size of the result.
    """
    merges = vocab_size - 256 - len(SPECIAL_TOKENS)
    if merges < 0:
        raise ValueError(f"vocab_size {vocab_size} is too small: 256 bytes and {len(SPECIAL_TOKENS)} special tokens")
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

    while heap and len(ranks) < 256 + merges:
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
    words, freqs = [], []
    for piece, freq in pieces.items():
        data = piece.encode("utf-8", "replace")
        if 2 <= len(data) <= _LONGEST_PIECE:
            words.append([data[i : i + 1] for i in range(len(data))])
            freqs.append(freq)
    return words, freqs


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
        new = _join(words[i], pair)
        for gone in _pairs(words[i]):
            counts[gone] -= freqs[i]
        for come in _pairs(new):
            counts[come] += freqs[i]
            where[come].add(i)
            grown.add(come)
        words[i] = new
    return grown
