"""(mixture, seed, step, rank) → a packed batch. No iterator, no state: resuming is a step number.

The global batch of step s is sequences s·B … s·B + B-1 of one endless order, which is a pure function of the
mixture and the seed; rank r of w takes the r-th of w equal slices. So any number of ranks has the same order.

1. Mixture: the order is made of blocks, each the smallest number of sequences in which all weights are whole
   counts (20 for 0.85 / 0.10 / 0.05). A block has the sources in these counts, in a random order.
2. Inside a source: its sequences in a random order, each once before any comes again; epochs differ in order.
3. Randomness is a hash of (seed, where), never a generator that is drawn from: it can be entered anywhere. It
   does not change with numpy's version.
"""

import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data import prompts, recipes, tokenizer
from data.shards import AGAIN, Shard, read_index

LARGEST_BLOCK = 10_000  # a weight that is no whole count in any block up to here is rounded to 1/10,000


class Batch(NamedTuple):
    """tokens, targets, doc_start (B, T) and source (B,), all int64."""

    tokens: torch.Tensor
    targets: torch.Tensor  # the next token; -1 where there is nothing to learn: after the end-of-text token,
    # in padding, and of what a tool said
    doc_start: torch.Tensor  # where in the row the token's document begins (0 if in an earlier row)
    source: torch.Tensor  # index into Loader.names


class Loader:
    """Batches of a prepared folder. mixture: {source: weight}; batch_size B: sequences of all ranks.
    Raises ValueError or FileNotFoundError for a folder, a mixture or a length that does not fit."""

    def __init__(self, data_dir, mixture: dict[str, float], seq_len: int, batch_size: int, seed: int = 0):
        self.names, self.seq_len, self.batch_size, self.seed = tuple(mixture), seq_len, batch_size, seed
        if (index := read_index(data_dir)) is None:
            what = f"{data_dir} has no prepared data (no index.json)"
            raise FileNotFoundError(f"{what}: run python -m data.prepare")
        tok = tokenizer.load(data_dir)
        self.train, self.val = _open_shards(Path(data_dir), index, tok.hash, mixture, seq_len)
        self.tools = [s for s, name in enumerate(mixture) if has_results(index, name)]
        self.piece = cache(lambda token: tok.decode_bytes([token]))
        self.counts = block_counts(mixture)  # (sources,) sequences of each in a block
        self.sizes = np.array([_sequences(shard, seq_len) for shard in self.train])  # (sources,)

    def batch(self, step: int, rank: int = 0, ranks: int = 1) -> Batch:
        """Rank's B / ranks rows of the batch of this step."""
        rows = self._rows(ranks)
        source, sequence = self.order(np.arange(rows) + step * self.batch_size + rank * rows)
        return self._batch([self.train[s] for s in source], sequence, source)

    def _batch(self, shards: list[Shard], sequence: np.ndarray, source: np.ndarray) -> Batch:
        """Row i is sequence[i] of shards[i]; what a tool said is no target."""
        batch = _assemble(shards, sequence, source, self.seq_len)
        for row in np.flatnonzero(np.isin(source, self.tools)):
            targets = batch.targets[row]
            targets[torch.from_numpy(_results(targets.numpy(), self.piece))] = -1
        return batch

    def _rows(self, ranks: int) -> int:
        if self.batch_size % ranks:
            raise ValueError(f"a batch of {self.batch_size} sequences cannot be divided among {ranks} ranks")
        return self.batch_size // ranks

    def order(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions (n,) of the endless order → (source, sequence inside the source's shard), each (n,)."""
        source, index = self._mix(position)
        epoch, place = np.divmod(index, self.sizes[source])
        return source, _permute(place, self.sizes[source], _hash(self.seed, 1, source, epoch))

    def _mix(self, position: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions (n,) → (source, how many sequences of that source came before), each (n,)."""
        size = self.counts.sum()
        blocks, row = np.unique(position // size, return_inverse=True)
        keys = _hash(self.seed, 0, blocks[:, None] * size + np.arange(size))  # (blocks, size)
        sources = np.repeat(np.arange(len(self.counts)), self.counts)  # (size,) a block before it is shuffled
        shuffled = sources[np.argsort(keys, axis=1, kind="stable")]  # (blocks, size)
        # How many of its source stand before a place of the block: number each source's places from the left.
        before = np.empty_like(shuffled)
        numbers = np.concatenate([np.arange(count) for count in self.counts])[None]  # (1, size)
        np.put_along_axis(before, np.argsort(shuffled, axis=1, kind="stable"), numbers, axis=1)
        source = shuffled[row, position % size]  # (n,)
        return source, position // size * self.counts[source] + before[row, position % size]

    def seen(self, step: int) -> dict[str, int]:
        """How many sequences of each source came up in the first `step` steps."""
        blocks, rest = divmod(step * self.batch_size, int(self.counts.sum()))
        source, _ = self._mix(blocks * self.counts.sum() + np.arange(rest))
        seen = blocks * self.counts + np.bincount(source, minlength=len(self.counts))
        return dict(zip(self.names, seen.tolist(), strict=True))

    def epochs(self, step: int) -> dict[str, float]:
        """How often the first `step` steps went through each source."""
        return {name: seen / size for (name, seen), size in zip(self.seen(step).items(), self.sizes.tolist())}

    def validation(self, batches: int, rank: int = 0, ranks: int = 1) -> Iterator[tuple[str, Batch]]:
        """(source, batch) over the beginning of each source's held-out shard, at most `batches` per source.
        Every rank gets as many batches, of the same shape: behind a shard's end are rows without targets."""
        rows = self._rows(ranks)
        for s, (name, shard) in enumerate(zip(self.names, self.val, strict=True)):
            total = _sequences(shard, self.seq_len)
            for first in range(0, min(total, batches * self.batch_size), self.batch_size):
                sequence = np.arange(rows) + first + rank * rows
                inside = np.minimum(sequence, total - 1)
                batch = self._batch([shard] * rows, inside, np.full(rows, s))
                batch.targets[torch.from_numpy(sequence >= total)] = -1
                yield name, batch


# ---- The order ---------------------------------------------------------------------------------------------


def block_counts(mixture: dict[str, float]) -> np.ndarray:
    """Sequences of each source in the smallest block with whole counts; else of the largest, rounded."""
    weights = np.array(list(mixture.values()), float)
    if not mixture or not (weights.min() >= 0 and abs(weights.sum() - 1) <= 1e-6):
        terms, total = " + ".join(f"{name} {weight:g}" for name, weight in mixture.items()), weights.sum()
        raise ValueError(f"the weights of a mixture must be 0 or more and sum to 1, not {total:g}: {terms}")
    sizes = np.arange(1, LARGEST_BLOCK + 1)
    exact = sizes[:, None] * weights
    whole = np.flatnonzero(np.abs(exact - np.rint(exact)).max(axis=1) < 1e-9 * sizes)
    size = sizes[whole[0]] if len(whole) else LARGEST_BLOCK
    exact = exact[size - 1]
    counts = np.floor(exact + 1e-9 * size).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: size - counts.sum()]] += 1  # the largest remainders
    return counts


def _hash(*parts) -> np.ndarray:
    """Integers (broadcast against each other) → uint64 that look random: splitmix64's finaliser, per part."""
    out = np.zeros(1, np.uint64)
    for part in parts:
        out = (out ^ np.asarray(part).astype(np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
        out = (out ^ (out >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        out = (out ^ (out >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        out = out ^ (out >> np.uint64(31))
    return out


def _permute(x: np.ndarray, size: np.ndarray, key: np.ndarray) -> np.ndarray:
    """A bijection of 0 … size-1 for each key, without a table: all three (n,). A Feistel network on pairs
    (left, right) below √size: each round adds a hash of one half to the other, which can be undone whatever
    the hash is. A pair that encodes a number ≥ size goes through again."""
    side = np.ceil(np.sqrt(size)).astype(np.int64)
    y, todo = x, np.ones(len(x), bool)
    while todo.any():
        left, right = np.divmod(y, side)
        for turn in range(4):
            left, right = right, (left + (_hash(key, turn, right) >> np.uint64(1)).astype(np.int64)) % side
        y = np.where(todo, left * side + right, y)
        todo = y >= size
    return y


# ---- The rows ----------------------------------------------------------------------------------------------


def _open_shards(folder: Path, index: dict, words: str, mixture: dict, seq_len: int):
    """(shards to train on, held-out ones) of the sources of a mixture; words: the tokenizer's hash."""
    if unknown := [name for name in mixture if name not in index["sources"]]:
        raise ValueError(f"{folder} has no source {unknown[0]!r} (it has: {', '.join(index['sources'])})")
    train, val = ([Shard(folder / f"{name}.{split}.bin") for name in mixture] for split in ("train", "val"))
    for shard in train + val:
        if shard.header["tokenizer"] != words:
            raise ValueError(f"{shard.path} was made with another tokenizer than {folder}'s: {AGAIN}")
        if shard.kind == "document" and shard.seq_len != seq_len:
            raise ValueError(f"{shard.path} is packed for sequences of {shard.seq_len} tokens, not {seq_len}")
        if _sequences(shard, seq_len) == 0:
            size = len(shard.tokens)
            raise ValueError(f"{shard.path} has {size} tokens, less than a sequence of {seq_len}")
    return train, val


def has_results(index: dict, name: str) -> bool:
    """May a source have results of a calculator? The generated one does, and rollouts may."""
    made_of = index["sources"][name].get("of", index["settings"]).get("sources") or {}
    return name in recipes.TOOL_SOURCES or made_of.get(name, [""])[0] == "rollouts"


def _sequences(shard: Shard, seq_len: int) -> int:
    return len(shard.used) if shard.kind == "document" else (len(shard.tokens) - 1) // seq_len


def _assemble(shards: list[Shard], sequence: np.ndarray, source: np.ndarray, seq_len: int) -> Batch:
    """Row i of the batch is sequence[i] of shards[i]."""
    tokens = np.empty((len(shards), seq_len + 1), np.int64)  # inputs, and one more for the last target
    begins = np.zeros((len(shards), seq_len + 1), bool)  # a document, or the padding, begins here
    real = np.full((len(shards), 1), seq_len + 1)  # tokens before the padding
    for i, (shard, n) in enumerate(zip(shards, sequence.tolist(), strict=True)):
        # Slices of running text share one token: the last target of one is the first input of the next.
        begin = n * (seq_len + 1) if shard.kind == "document" else n * seq_len
        tokens[i] = shard.tokens[begin : begin + seq_len + 1]
        low, high = shard.starts.searchsorted((begin, begin + seq_len + 1))
        begins[i, shard.starts[low:high] - begin] = True
        if shard.kind == "document" and shard.used[n] <= seq_len:
            real[i] = shard.used[n]
            begins[i, real[i]] = True
    place = np.arange(seq_len + 1)
    doc_start = np.maximum.accumulate(np.where(begins, place, 0), axis=1)
    targets = np.where(begins | (place >= real), -1, tokens)
    arrays = tokens[:, :-1], targets[:, 1:], doc_start[:, :-1], source
    return Batch(*(torch.from_numpy(np.ascontiguousarray(array, np.int64)) for array in arrays))


_RESULTS = re.compile(f"{prompts.RESULT}.*?(?:{prompts.END_RESULT}|\\Z)".encode(), re.DOTALL)


def _results(targets: np.ndarray, piece: Callable[[int], bytes]) -> np.ndarray:
    """Which of a row's targets (T,) are of a tool's result or its marks. piece: the bytes of an id. A row may
    begin or end inside a result; none goes on into the next document (target -1)."""
    found, begin, end = np.zeros(len(targets), bool), prompts.RESULT.encode(), prompts.END_RESULT.encode()
    for part in np.split(np.arange(len(targets)), np.flatnonzero(targets < 0)):
        part = part[targets[part] >= 0]
        if not len(part):  # padding
            continue
        pieces = [piece(i) for i in targets[part].tolist()]
        text, sizes = b"".join(pieces), np.array([len(x) for x in pieces])
        stops, spans = sizes.cumsum(), [x.span() for x in _RESULTS.finditer(text)]
        if end in text.partition(begin)[0]:
            spans.append((0, text.index(end) + len(end)))
        for first, behind in spans:
            found[part[(stops > first) & (stops - sizes < behind)]] = True
    return found
