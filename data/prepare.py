r"""Documents → token shards, and the format of a shard.

    python -m data.prepare --data DIR --out DIR                     every "real" source of recipes.py
    python -m data.prepare --data DIR --out DIR --tokenizer FILE --sources math_text,short_cot --max-tokens 1000000

OUT then holds tokenizer.model, for each source NAME.train.bin and NAME.val.bin (held-out documents), and index.json,
which is written last: a folder that has one is complete, and running the same command again does nothing.

A shard describes itself. Its first 4,096 bytes are text (`head -1 FILE`): magic, version, then a JSON object padded with
spaces. Three arrays follow, so that a shard of any size is opened by np.memmap, without reading it:

    tokens  (N,) uint16, or uint32 for more than 65,536 ids; padded to 8 bytes
    starts  (D,) int64: where in `tokens` each document begins
    used    (R,) int64: how many tokens of each packed row are real (kind "document" only)

Every document ends in the end-of-text token. Kind "text" is one stream of documents. Kind "document" has R rows of
seq_len + 1 tokens (inputs, and targets shifted by one), packed first-fit and filled up with padding, which is known by
`used`, never by its value. A document that is longer than a row is cut into rows that overlap by one token, so that each of
its tokens but the first is a target once.
"""

import gzip
import hashlib
import json
import os
import zlib
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import zip_longest
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import Parser, recipes, run_cli, tokenizer
from data.tokenizer import Tokenizer

MAGIC, VERSION, HEADER_BYTES = "octothinker-shard", 1, 4096
OPEN_ROWS = 256  # rows that packing keeps open; more waste less padding and take longer to search
VAL_EVERY = 64  # of a real source, every 64th document is held out

# ----------------------------------------------------------------------------------------------------------------------
# A shard, read


class Shard:
    """One shard, memory-mapped. header: dict; tokens (N,), starts (D,), used (R,): arrays as in the file.

    Opening compares the file's size with the header's; check() reads everything and compares the checksum. Both raise
    ValueError and name the file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.header = h = _read_header(self.path)
        self.kind, self.seq_len = h["kind"], h["seq_len"]
        width = np.dtype(h["dtype"]).itemsize
        starts_at = HEADER_BYTES + -(-h["tokens"] * width // 8) * 8
        used_at = starts_at + 8 * h["documents"]
        size, expected = self.path.stat().st_size, used_at + 8 * h["rows"]
        if size != expected:
            raise ValueError(f"{self.path} is truncated or damaged: {size} bytes, not {expected}; prepare it again")
        self.tokens = self._map(h["dtype"], HEADER_BYTES, h["tokens"])
        self.starts = self._map("int64", starts_at, h["documents"])
        self.used = self._map("int64", used_at, h["rows"])

    def _map(self, dtype: str, offset: int, count: int) -> np.ndarray:
        if count == 0:  # np.memmap refuses empty arrays
            return np.empty(0, dtype)
        return np.asarray(np.memmap(self.path, dtype, "r", offset, (count,)))  # a plain view: memmap slices slowly

    def check(self) -> None:
        with open(self.path, "rb") as f:
            if _checksum(f) != self.header["sha256"]:
                raise ValueError(f"{self.path} is damaged: its checksum is not the header's; prepare it again")


def _checksum(f) -> str:
    """Hex SHA-256 of an open shard's arrays."""
    digest = hashlib.sha256()
    f.seek(HEADER_BYTES)
    while block := f.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _read_header(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"no shard at {path}: prepare the data again")
    with open(path, "rb") as f:
        magic, version, text = (f.read(HEADER_BYTES).split(b" ", 2) + [b"", b""])[:3]
    if (magic, version) != (MAGIC.encode(), b"%d" % VERSION):
        raise ValueError(f"{path} is not a token shard of version {VERSION}: prepare it again")
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(f"{path} is truncated or damaged in its header: prepare it again") from None


# ----------------------------------------------------------------------------------------------------------------------
# A shard, written


def write_shard(
    path: Path, kind: str, texts: Iterable[str], tok: Tokenizer, seq_len: int, max_tokens: int | None = None
) -> dict:
    """Tokenise documents into one shard until there are max_tokens (padding aside); returns the shard's header."""
    dtype = np.dtype("uint16" if tok.vocab_size <= 1 << 16 else "uint32")
    header = {"kind": kind, "dtype": dtype.name, "seq_len": seq_len, "tokenizer": tok.hash}
    documents = _tokenize(texts, tok, max_tokens, label=path.name)
    rows = pack(documents, seq_len + 1) if kind == "document" else ((ids, [0]) for ids in documents)
    starts, used, count = array("q"), array("q"), 0  # array("q"): int64 that grows, 8 bytes each
    aside = path.with_name(path.name + ".tmp")
    try:
        with open(aside, "w+b") as f:
            f.write(b" " * HEADER_BYTES)
            for ids, begins in rows:
                starts.extend(count + begin for begin in begins)
                if kind == "document":
                    used.append(len(ids))
                    ids = ids + [tok.eos_id] * (seq_len + 1 - len(ids))
                f.write(np.array(ids, dtype).tobytes())
                count += len(ids)
            f.write(b"\0" * (-count * dtype.itemsize % 8) + starts.tobytes() + used.tobytes())
            header |= {"tokens": count, "documents": len(starts), "rows": len(used)}
            header |= {"padding": count - sum(used) if used else 0, "sha256": _checksum(f)}
            f.seek(0)
            f.write(f"{MAGIC} {VERSION} {json.dumps(header)}".ljust(HEADER_BYTES - 1).encode() + b"\n")
        os.replace(aside, path)
    except OSError as error:
        raise OSError(f"{path} could not be written ({error})") from None
    finally:
        aside.unlink(missing_ok=True)  # what a failure leaves, a full disk first of all
    return header


def _tokenize(texts: Iterable[str], tok: Tokenizer, max_tokens: int | None, label: str) -> Iterator[list[int]]:
    total = 0
    with tqdm(desc=label, total=max_tokens, unit="tok", unit_scale=True, disable=None) as bar:
        for text in texts:
            ids = [*tok.encode(text), tok.eos_id]
            total += len(ids)
            bar.update(len(ids))
            yield ids
            if max_tokens is not None and total >= max_tokens:
                return


def pack(documents: Iterable[list[int]], capacity: int) -> Iterator[tuple[list[int], list[int]]]:
    """First-fit: each document goes into the first open row that has room. Yields (row, where documents begin in it).

    At most OPEN_ROWS rows are open; when one more is needed the fullest is closed, so memory does not grow with the
    corpus, and the same documents always give the same rows.
    """
    rows: list[tuple[list[int], list[int]]] = []
    free: list[int] = []
    for ids in documents:
        for begin in range(0, max(len(ids) - 1, 1), capacity - 1):  # one round, unless the document must be cut
            part = ids[begin : begin + capacity]
            place = next((i for i, room in enumerate(free) if room >= len(part)), len(rows))
            if place == len(rows) == OPEN_ROWS:
                place = free.index(min(free))
                yield rows[place]
                rows[place], free[place] = ([], []), capacity
            elif place == len(rows):
                rows.append(([], []))
                free.append(capacity)
            rows[place][1].append(len(rows[place][0]))
            rows[place][0].extend(part)
            free[place] -= len(part)
    yield from rows


# ----------------------------------------------------------------------------------------------------------------------
# A folder of shards

Source = tuple[str, Callable[[str], Iterator[str]], int | None]  # kind, split → documents, training tokens (None: all)


def prepare(out: Path, sources: dict[str, Source], make_tokenizer, seq_len: int, settings: dict) -> dict:
    """Write a folder of shards unless it is there already; returns its index.

    settings: whatever decides the contents, JSON-able; a folder with other settings is refused, naming the keys.
    make_tokenizer: () → Tokenizer, called only when there is work to do.
    """
    out = Path(out)
    settings = json.loads(json.dumps(settings | {"seq_len": seq_len}))  # as they will be read back
    if (index := read_index(out)) is not None:
        _same_settings(out, index["settings"], settings)
        return index
    for name, (_, documents, _) in sources.items():  # before the hours of work, not after them
        for split in ("train", "val"):
            if next(documents(split), None) is None:
                raise ValueError(f"source {name!r} has no {split} documents: leave it out, or give it more")
    out.mkdir(parents=True, exist_ok=True)
    tok = make_tokenizer()
    tok.save(out / tokenizer.FILE_NAME)
    index = {"settings": settings, "tokenizer": tok.hash, "vocab_size": tok.vocab_size, "sources": {}}
    for name, (kind, documents, tokens) in sources.items():
        index["sources"][name] = {"kind": kind}
        for split, budget in (("train", tokens), ("val", tokens and max(tokens // 20, 4 * seq_len))):
            header = write_shard(out / f"{name}.{split}.bin", kind, documents(split), tok, seq_len, budget)
            index["sources"][name][split] = {k: header[k] for k in ("tokens", "padding", "documents")}
    aside = out / "index.json.tmp"
    aside.write_text(json.dumps(index, indent=1) + "\n")
    os.replace(aside, out / "index.json")
    return index


def read_index(folder: str | os.PathLike, check: bool = False) -> dict | None:
    """The index of a prepared folder, after opening every shard that it names; None if the folder has no index.

    check: also compare the shards' checksums, which reads them whole.
    """
    path = Path(folder) / "index.json"
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text())
        names, _, _ = list(index["sources"]), index["settings"]["world"], index["tokenizer"]  # what readers rely on
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is damaged: delete it and prepare again") from None
    for name in names:
        for split in ("train", "val"):
            shard = Shard(Path(folder) / f"{name}.{split}.bin")
            if check:
                shard.check()
    return index


def _same_settings(out: Path, old: dict, new: dict) -> None:
    changed = [f"{k} {old.get(k)} → {new.get(k)}" for k in sorted(old | new) if old.get(k) != new.get(k)]
    if changed:
        raise ValueError(f"{out} was prepared with other settings ({'; '.join(changed)}): use another folder")


def train_tokenizer(sources: dict[str, Source], vocab_size: int, characters: int = 2_000_000) -> Tokenizer:
    """A vocabulary from the beginnings of all sources, each with the same number of characters."""
    texts = []
    for _, documents, _ in sources.values():
        room = characters // len(sources)
        for text in documents("train"):
            texts.append(text[:room])
            room -= len(text)
            if room <= 0:
                break
    return tokenizer.train(texts, vocab_size)


def prepare_synth(out, vocab_size: int, seq_len: int, tokens_per_source: dict[str, int], seed: int = 0) -> dict:
    """Shards of the generated world; tokens_per_source: training tokens, {"general": 1_000_000, ...}."""
    from data import synth

    def source(name: str) -> Source:
        return recipes.SOURCES["tiny"][name], lambda split: synth.documents(name, seed, split), tokens_per_source[name]

    sources = {name: source(name) for name in tokens_per_source}
    settings = {"world": "tiny", "vocab_size": vocab_size, "tokens": tokens_per_source, "seed": seed}
    return prepare(Path(out), sources, lambda: train_tokenizer(sources, vocab_size), seq_len, settings)


# ----------------------------------------------------------------------------------------------------------------------
# Real files


def read_rows(path: Path) -> Iterator[dict]:
    """The rows of a .jsonl or .jsonl.gz file; a damaged one is a ValueError that names the line."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}: see the README for where the public files come from")
    number = 0
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as f:
            for number, line in enumerate(f, 1):  # noqa: B007 (the error names it)
                yield dict(json.loads(line))
    except (ValueError, TypeError, EOFError, zlib.error):
        raise ValueError(f"{path}, line {number}: not one JSON object a line in UTF-8, or truncated") from None


def read_documents(folder: Path, source: recipes.Files, split: str, keep_overlaps: bool = False) -> Iterator[str]:
    """Documents of a real source, its files in turns, a row of each; every VAL_EVERY-th is in split "val".

    A row whose "overlaps" names a benchmark's problem would teach the test: it is left out.
    """
    readers = [((path, row) for row in read_rows(folder / path)) for path in source.files]
    rows = (row for turn in zip_longest(*readers) for row in turn if row is not None)
    kept = 0
    for path, row in rows:
        if row.get("overlaps") and not keep_overlaps:
            continue
        if (kept % VAL_EVERY == 0) == (split == "val"):
            try:
                yield "".join((source.format(row),))  # a TypeError if it is not text
            except (KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{folder / path}: a row does not fit its source: {error!r}") from None
        kept += 1
    if kept == 0:
        raise ValueError(
            f"nothing to read in {', '.join(source.files)}: no rows, or each answers a problem of a benchmark "
            "(--keep-overlaps keeps them: then leave those problems out of the evaluation; --sources leaves files out)"
        )


def main() -> None:
    parser = Parser(prog="python -m data.prepare", description=__doc__)
    parser.add_argument("--data", type=Path, required=True, metavar="DIR", help="folder of the public files")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument("--tokenizer", metavar="FILE", help="tiktoken file; without it, one is trained on the sources")
    parser.add_argument("--vocab-size", type=int, default=4096, help="of the tokenizer that is trained (default 4096)")
    parser.add_argument("--seq-len", type=int, default=256, help="length of packed rows, as in training (default 256)")
    parser.add_argument("--sources", help="comma-separated; default: all, " + ",".join(recipes.REAL_FILES))
    parser.add_argument("--max-tokens", type=int, metavar="N", help="training tokens of each source; default: all")
    parser.add_argument("--keep-overlaps", action="store_true", help="keep rows that answer problems of a benchmark")
    parser.add_argument("--check", action="store_true", help="read finished shards again and compare their checksums")
    args = parser.parse_args()
    names = args.sources.split(",") if args.sources else list(recipes.REAL_FILES)
    if unknown := [name for name in names if name not in recipes.REAL_FILES]:
        parser.error(f"unknown source {unknown[0]!r} (valid: {', '.join(recipes.REAL_FILES)})")
    if min(args.seq_len, args.max_tokens or 1, args.vocab_size) < 1:
        parser.error("--seq-len, --max-tokens and --vocab-size must be at least 1")

    def source(name: str) -> Source:
        files = recipes.REAL_FILES[name]
        return files.kind, lambda split: read_documents(args.data, files, split, args.keep_overlaps), args.max_tokens

    sources = {name: source(name) for name in names}
    tok = tokenizer.load(args.tokenizer) if args.tokenizer else None
    settings = {
        "world": "real", "sources": names, "max_tokens": args.max_tokens, "keep_overlaps": args.keep_overlaps,
        "tokenizer": tok.hash if tok else f"trained, {args.vocab_size} words",
    }  # fmt: skip
    index = prepare(args.out, sources, lambda: tok or train_tokenizer(sources, args.vocab_size), args.seq_len, settings)
    read_index(args.out, check=args.check)
    for name, entry in index["sources"].items():
        train, val = (entry[split]["tokens"] - entry[split]["padding"] for split in ("train", "val"))
        print(f"{name:14} {train:14,} tokens in {entry['train']['documents']:,} documents, {val:,} tokens held out")
    print(f"ready: {args.out}")


if __name__ == "__main__":
    run_cli(main)
