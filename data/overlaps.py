"""Which texts share GRAM words in a row with a benchmark's problem: an eighth of what tokenising costs.

A word is known by its length, its first and its last eight letters. Upper and lower case are one; letters of
all alphabets and digits count; all other characters, typographic quotes and dashes too, stand between words.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data import files, recipes

GRAM = 13  # words in a row that a document must not share with a benchmark's problem (as in GPT-3's report)

_LETTER = np.zeros(256, np.uint8)  # of each byte; 0 for what stands between words
_LETTER[128:] = np.arange(128, 256)
for _i, _character in enumerate("abcdefghijklmnopqrstuvwxyz0123456789", 1):
    _LETTER[[ord(_character), ord(_character.upper())]] = _i
_FIRST_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)  # of eight, as one number


def word_runs(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """The runs of GRAM words inside each text → (a hash of each (n,) uint64, the text it is in (n,))."""
    odd, other = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)  # odd: no power is 0
    data = np.frombuffer(b"\0" + b"\0".join(texts) + bytes(9), np.uint8)
    letters = _LETTER[data]
    two = np.flatnonzero(data == 0xC2)  # U+0080 to U+00BF
    three = np.flatnonzero((data[:-1] == 0xE2) & ((data[1:] | 1) == 0x81))  # U+2000 to U+207F
    letters[np.concatenate((two, two + 1, three, three + 1, three + 2))] = 0
    edges = np.flatnonzero((letters[1:] > 0) != (letters[:-1] > 0))  # by turns before a word, and its end
    first, last = edges[::2] + 1, edges[1::2]
    length, eight = last - first + 1, np.lib.stride_tricks.sliding_window_view(letters, 8)
    head = np.ascontiguousarray(eight[first]).view(np.uint64)[:, 0] & _FIRST_BYTES[np.minimum(length, 8)]
    tail = np.ascontiguousarray(eight[np.maximum(last - 7, first)]).view(np.uint64)[:, 0]
    word = (head * odd) ^ ((np.where(length > 8, tail, 0) + length.astype(np.uint64)) * other)
    word ^= word >> np.uint64(29)
    two = word[:-1] * odd + word[1:]
    four = two[:-2] * odd**2 + two[2:]
    twelve = (four[:-4] * odd**4 + four[4:])[:-4] * odd**4 + four[8:]
    runs = twelve[:-1] * odd + word[12:]
    ends = np.cumsum([len(text) + 1 for text in texts])
    text_of = np.repeat(np.arange(len(texts)), np.diff(np.searchsorted(first, ends), prepend=0))  # (words,)
    inside = text_of[: len(runs)] == text_of[GRAM - 1 :]
    return runs[inside], text_of[: len(runs)][inside]


class Grams:
    """All runs of GRAM words of some problems; `short` of the problems have fewer words."""

    def __init__(self, problems: Sequence[str]):
        runs, problem_of = word_runs([problem.encode("utf-8", "replace") for problem in problems])
        self.runs, self.short = np.sort(runs), len(problems) - len(np.unique(problem_of))
        self.maybe = np.zeros(1 << 24, bool)  # by the first bits: what is not there need not be searched for
        self.maybe[self.runs >> np.uint64(40)] = True

    def shared_by(self, texts: list[bytes]) -> np.ndarray:
        """(texts,) bool: which have a run in common with a problem."""
        shared = np.zeros(len(texts), bool)
        if len(self.runs):
            runs, text_of = word_runs(texts)
            found = np.flatnonzero(self.maybe[runs >> np.uint64(40)])
            place = np.searchsorted(self.runs, runs[found]).clip(max=len(self.runs) - 1)
            shared[text_of[found[self.runs[place] == runs[found]]]] = True
        return shared


def benchmark_problems(against: str | None, folder: Path | None) -> tuple[list[str], list[str]]:
    """(files, their problems): of the files that are named, or recipes.EVALUATION_FILES in the folder."""
    paths = against.split(",") if against not in (None, "none") else []
    if against is None and folder:
        paths = [str(path) for name in recipes.EVALUATION_FILES for path in sorted(folder.glob(name))]
    problems, columns = [], (*recipes.COLUMNS["problem"], "text")
    for path in paths:
        if not Path(path).is_file():
            raise FileNotFoundError(f"no file {path} to keep out of the training text")
        try:
            problems += [recipes.column(row, *columns) for _, row in files.numbered_rows(path)]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: {error.args[0]}") from None
    return paths, problems
