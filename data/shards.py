"""Token shards: their format, how one is read, and how one is written.

A shard describes itself. Its first 4,096 bytes are text (`head -1 FILE`): magic, version, then a JSON object
padded with spaces. Three arrays follow, so that np.memmap opens a shard of any size without reading it:

    tokens  (N,) uint16, or uint32 for more than 65,536 ids; padded to 8 bytes
    starts  (D,) int64: where in `tokens` each document begins
    used    (R,) int64: how many tokens of each packed row are real (kind "document" only)

Every document ends in the end-of-text token. Kind "text" is one stream of documents. Kind "document" has R
rows of seq_len + 1 tokens (inputs, and targets shifted by one), packed first-fit and filled up with padding,
which is known by `used`, never by its value. A document that is longer than a row is cut into rows that
overlap by one token, so that each of its tokens but the first is a target once.
"""

import hashlib
import itertools
import json
import os
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from data.files import atomic_write, file_hash, read_json
from data.tokenizer import Tokenizer

MAGIC, VERSION, HEADER_BYTES = "octothinker-shard", 1, 4096
AGAIN = "delete its folder and prepare again"
OPEN_ROWS = 256  # rows that packing keeps open; more waste less padding and take longer to search

# ---- Reading a shard ---------------------------------------------------------------------------------------


class Shard:
    """One shard, memory-mapped. header: dict; tokens (N,), starts (D,), used (R,): arrays as in the file.
    Opening compares the file's size with the header's; check() reads everything and compares the checksum.
    Both raise ValueError and name the file."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.header = h = _read_header(self.path)
        self.kind, self.seq_len = h["kind"], h["seq_len"]
        width = np.dtype(h["dtype"]).itemsize
        starts_at = HEADER_BYTES + -(-h["tokens"] * width // 8) * 8
        used_at = starts_at + 8 * h["documents"]
        size, expected = self.path.stat().st_size, used_at + 8 * h["rows"]
        if size != expected:
            raise ValueError(f"{self.path} is truncated or damaged: {size} bytes, not {expected}; {AGAIN}")
        self.tokens = self._map(h["dtype"], HEADER_BYTES, h["tokens"])
        self.starts = self._map("int64", starts_at, h["documents"])
        self.used = self._map("int64", used_at, h["rows"])

    def _map(self, dtype: str, offset: int, count: int) -> np.ndarray:
        if count == 0:  # np.memmap refuses empty arrays
            return np.empty(0, dtype)
        return np.asarray(np.memmap(self.path, dtype, "r", offset, (count,)))  # a plain view is sliced faster

    def check(self) -> None:
        if file_hash(self.path, HEADER_BYTES) != self.header["sha256"]:
            raise ValueError(f"{self.path} is damaged (checksum): {AGAIN}")


def _read_header(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"no shard at {path}: prepare the data again")
    with open(path, "rb") as f:
        magic, version, text = (f.read(HEADER_BYTES).split(b" ", 2) + [b"", b""])[:3]
    if (magic, version) != (MAGIC.encode(), b"%d" % VERSION):
        raise ValueError(f"{path} is not a token shard of version {VERSION}: {AGAIN}")
    try:
        header = json.loads(text)
        for key in ("kind", "dtype", "seq_len", "tokenizer", "tokens", "documents", "rows", "sha256"):
            header[key]
        return header
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is truncated or damaged in its header: {AGAIN}") from None


# ---- Writing a shard ---------------------------------------------------------------------------------------


def write_shard(path: Path, kind: str, documents: Iterable[np.ndarray], tok: Tokenizer, seq_len: int) -> dict:
    """Write documents, each the ids of a text and the end-of-text token, as one shard; returns its header."""
    dtype = tok_dtype(tok)
    header = {"kind": kind, "dtype": dtype.name, "seq_len": seq_len, "tokenizer": tok.hash}
    packed = kind == "document"
    rows = pack_documents(documents, seq_len + 1) if packed else ((ids, [0]) for ids in documents)
    starts, used, count = array("q"), array("q"), 0  # array("q"): int64 that grows, 8 bytes each
    try:
        with atomic_write(path, "wb") as f:
            f.write(b" " * HEADER_BYTES)
            for ids, begins in rows:
                starts.extend(count + begin for begin in begins)
                f.write(ids.astype(dtype, copy=False).data)
                count += len(ids)
                if packed:
                    used.append(len(ids))
                    f.write(np.full(seq_len + 1 - len(ids), tok.eos_id, dtype).data)
                    count += seq_len + 1 - len(ids)
            f.write(b"\0" * (-count * dtype.itemsize % 8) + starts.tobytes() + used.tobytes())
            f.flush()
            header |= {"tokens": count, "documents": len(starts), "rows": len(used)}
            header |= {"padding": count - sum(used) if used else 0, "sha256": file_hash(f.name, HEADER_BYTES)}
            f.seek(0)
            f.write(f"{MAGIC} {VERSION} {json.dumps(header)}".ljust(HEADER_BYTES - 1).encode() + b"\n")
    except OSError as error:
        if error.errno is None or error.filename:  # it says what failed: a file that was read, a worker
            raise
        raise OSError(f"{path} could not be written ({error})") from None
    return header


def tok_dtype(tok: Tokenizer) -> np.dtype:
    """Of the ids in a shard."""
    return np.dtype("uint16" if tok.vocab_size <= 1 << 16 else "uint32")


def pack_documents(documents: Iterable[np.ndarray], capacity: int) -> Iterator[tuple[np.ndarray, list[int]]]:
    """First-fit: each document goes into the first open row with room → (row, where documents begin in it).
    At most OPEN_ROWS rows are open; before another is opened the fullest is closed, so memory is bounded."""
    rows: list[list[np.ndarray]] = []
    free = np.zeros(OPEN_ROWS, np.int64)  # of a row that is not open yet: nothing
    for ids in documents:
        for begin in range(0, max(len(ids) - 1, 1), capacity - 1):  # one round unless it must be cut
            part = ids[begin : begin + capacity]
            place = int((free >= len(part)).argmax())
            if free[place] < len(part):
                place = len(rows) if len(rows) < OPEN_ROWS else int(free.argmin())
                if place < len(rows):
                    yield _row(rows[place])
                    rows[place] = []
                else:
                    rows.append([])
                free[place] = capacity
            rows[place].append(part)
            free[place] -= len(part)
    yield from map(_row, rows)


def _row(parts: list[np.ndarray]) -> tuple[np.ndarray, list[int]]:
    return np.concatenate(parts), [0, *itertools.accumulate(len(part) for part in parts[:-1])]


# ---- A folder of shards ------------------------------------------------------------------------------------


def contents(folder: str | os.PathLike, names: Iterable[str]) -> str:
    """Hash of what a stage reads of a folder: its vocabulary and these sources, whatever else is there."""
    index = read_json(Path(folder) / "index.json")
    said = {name: index["sources"].get(name) for name in sorted(names)}
    return hashlib.sha256(json.dumps([index["tokenizer"], said], sort_keys=True).encode()).hexdigest()


def read_index(folder: str | os.PathLike, check: bool = False) -> dict | None:
    """The index of a prepared folder, after opening every shard that it names; None if there is no index.
    check: also read the shards whole and compare their checksums."""
    path = Path(folder) / "index.json"
    if (index := read_json(path, missing_ok=True)) is None:
        return None
    try:
        names, _, _ = list(index["sources"]), index["settings"]["corpus"], index["tokenizer"]
    except (KeyError, TypeError):
        raise ValueError(f"{path} is damaged or of an older version: {AGAIN}") from None
    for name, split in itertools.product(names, ("train", "val")):
        shard = Shard(Path(folder) / f"{name}.{split}.bin")
        if shard.header["sha256"] != index["sources"][name][split].get("sha256"):
            raise ValueError(f"{shard.path} is not the shard that {path} names: {AGAIN}")
        if check:
            shard.check()
    return index
