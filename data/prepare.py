r"""Documents → token shards (their format: shards.py).

    python -m data.prepare --data DIR --out DIR                     the sources of world "real": public files in DIR
    python -m data.prepare --data DIR --out DIR --tokenizer FILE --sources math_text,short_cot --max-tokens 1000000
    python -m data.prepare --world paper --out DIR --tokenizer Llama-3.2-1B --seq-len 8192 --max-tokens dclm=21e9,numina=2e9
    python -m data.prepare --out DIR --source notes=text:notes.jsonl --source qa=qa:hub:openai/gsm8k:main    your own

What happens to a source, row by row: its format (recipes.py) makes a document of it; one that contains 13 words in a row of
a problem of the evaluation files is dropped, and so is one that came before, letter by letter; every 64th of the rest is
held out; all are tokenised, by --workers processes.

OUT then holds tokenizer.model, for each source NAME.train.bin and NAME.val.bin, and index.json, which is written last: a
folder that has one is complete, and running the same command again does nothing. Until then there are `unfinished.json`
and, for the source in work, NAME.parts/: consecutive rows, tokenised, a few MB a file. What is in them is not done again:
kill the command at any moment, and the same command goes on and writes the same bytes.
"""

import argparse
import contextlib
import glob
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import threading
import zipfile
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from data import files, recipes, tokenizer
from data.files import read_json, read_jsonl
from data.shards import read_index, tok_dtype, write_shard
from data.tokenizer import Tokenizer

VAL_EVERY = 64  # of a real source, every 64th document is held out
PART_CHARACTERS = 4 << 20  # of text in a part: seconds of work
GRAM = 13  # words in a row that a document must not share with a benchmark's problem (as GPT-3's report has it)

# ----------------------------------------------------------------------------------------------------------------------
# A source, tokenised part by part


class Source(NamedTuple):
    """read(n, count): the documents of all rows from row n on, "" where a row has none and None where it is marked as the
    answer to a benchmark's problem; count(bytes), if they come from files of `size` bytes, is told how many were read."""

    kind: str  # "text" | "document"
    read: Callable[[int, Callable[[int], None]], Iterator[str | None]]
    max_tokens: int | None  # of training; None: all
    val_every: int = VAL_EVERY
    unique: bool = True  # drop what came before
    guarded: bool = True  # and what contains a benchmark's problem
    size: int = 0


KEPT, EMPTY, MARKED, OVERLAP = range(4)  # what becomes of a row, as far as its part knows
FATES = {
    EMPTY: "without a document",
    MARKED: "marked as a benchmark's",
    OVERLAP: f"sharing {GRAM} words with a benchmark",
}


_LETTER = np.zeros(
    256, np.uint8
)  # 0 for what stands between words; letters in whatever case and digits, other alphabets
_LETTER[128:] = np.arange(128, 256)
for _i, _character in enumerate("abcdefghijklmnopqrstuvwxyz0123456789", 1):
    _LETTER[[ord(_character), ord(_character.upper())]] = _i
_FIRST_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)  # of eight, as one number


def word_runs(text: bytes) -> tuple[np.ndarray, np.ndarray]:
    """A 64-bit number for each run of GRAM words → (runs (n,) uint64, where words begin (n + GRAM - 1,)).

    A word is known by its length, its first and its last eight letters. All in numpy, a pass over a few hundred kB at a
    time: an eighth of what tokenising costs.
    """
    odd, other = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9)  # powers of an odd number never vanish
    data = np.frombuffer(b"\0" + text + bytes(9), np.uint8)
    letters = _LETTER[data]
    if (
        not text.isascii()
    ):  # typographic quotes, dashes and spaces stand between words too: U+0080 to U+00BF, U+2000 to U+207F
        two = np.flatnonzero(data == 0xC2)
        three = np.flatnonzero((data[:-1] == 0xE2) & ((data[1:] | 1) == 0x81))
        letters[np.concatenate((two, two + 1, three, three + 1, three + 2))] = 0
    edges = np.flatnonzero((letters[1:] > 0) != (letters[:-1] > 0))  # by turns before a word, and its last letter
    first, last = edges[::2] + 1, edges[1::2]
    if len(first) < GRAM:
        return np.empty(0, np.uint64), first - 1
    length, eight = last - first + 1, np.lib.stride_tricks.sliding_window_view(letters, 8)
    head = np.ascontiguousarray(eight[first]).view(np.uint64)[:, 0] & _FIRST_BYTES[np.minimum(length, 8)]
    tail = np.ascontiguousarray(eight[np.maximum(last - 7, first)]).view(np.uint64)[:, 0]
    word = (head * odd) ^ ((np.where(length > 8, tail, 0) + length.astype(np.uint64)) * other)
    word ^= word >> np.uint64(29)
    two = word[:-1] * odd + word[1:]
    four = two[:-2] * odd**2 + two[2:]
    twelve = (four[:-4] * odd**4 + four[4:])[:-4] * odd**4 + four[8:]
    return twelve[:-1] * odd + word[12:], first - 1


def _runs_by_text(texts: list[bytes]) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(runs, the text in which each begins, and ends), for as many texts at a time as fit the processor's cache."""
    ends, begin = np.cumsum([len(text) + 1 for text in texts]), 0
    while begin < len(texts):
        offset = ends[begin - 1] if begin else 0
        end = max(begin + 1, int(np.searchsorted(ends, offset + (1 << 18))))
        runs, words = word_runs(b"\0".join(texts[begin:end]))
        owners = np.repeat(np.arange(begin, end), np.diff(np.searchsorted(words + offset, ends[begin:end]), prepend=0))
        yield runs, owners[: len(runs)], owners[GRAM - 1 :]
        begin = end


class Grams:
    """All runs of GRAM words of some problems; shorter problems have none."""

    def __init__(self, problems: Iterable[str] = ()):
        parts = _runs_by_text([problem.encode("utf-8", "replace") for problem in problems])
        self.runs = np.sort(np.concatenate([np.empty(0, np.uint64), *(r[first == last] for r, first, last in parts)]))
        self.maybe = np.zeros(1 << 24, bool)  # by the first bits: what is not there need not be searched for
        self.maybe[self.runs >> np.uint64(40)] = True

    def shared_by(self, texts: list[bytes]) -> np.ndarray:
        """(texts,) bool: which have a run in common with a problem."""
        out = np.zeros(len(texts), bool)
        for runs, first, last in _runs_by_text(texts) if len(self.runs) else ():
            found = np.flatnonzero(self.maybe[runs >> np.uint64(40)])
            place = np.searchsorted(self.runs, runs[found]).clip(max=len(self.runs) - 1)
            found = found[(self.runs[place] == runs[found]) & (first[found] == last[found])]
            out[first[found]] = True
        return out


def write_part(path: Path, texts: list[str | None], tok: Tokenizer, grams: Grams) -> None:
    """Tokenise a few rows into a file of arrays: tokens; and for each row its length, digest and fate."""
    data = [(text or "").encode("utf-8", "replace") for text in texts]
    fates = np.where(grams.shared_by(data), OVERLAP, KEPT).astype(np.uint8)
    tokens, lengths = array("H" if tok_dtype(tok) == np.uint16 else "I"), np.zeros(len(texts), np.int64)
    for i, text in enumerate(texts):
        if not text:
            fates[i] = MARKED if text is None else EMPTY
        elif fates[i] == KEPT:
            ids = tok.encode(text)
            ids.append(tok.eos_id)
            tokens.fromlist(ids)
            lengths[i] = len(ids)
    digests = np.array(
        [int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") for text in data], np.uint64
    )
    aside = path.with_name(path.name + ".tmp")
    with open(aside, "wb") as f:
        np.savez(f, tokens=np.frombuffer(tokens, tok_dtype(tok)), lengths=lengths, digests=digests, fates=fates)
    os.replace(aside, path)


_worker: dict = {}  # of a process of the pool: its tokenizer and grams


def _start_worker(folder: str, problems: list[str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    _worker.update(tok=tokenizer.load(folder), grams=Grams(problems))
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # a killed parent says nothing


def _work(path: Path, texts: list[str | None], guarded: bool) -> None:
    write_part(path, texts, _worker["tok"], _worker["grams"] if guarded else Grams())


def _parts(source: Source, folder: Path, tok: Tokenizer, grams: Grams, pool: Executor | None, workers: int, count):
    """The parts of a source in their order: those that are in the folder already, then new ones."""
    folder.mkdir(exist_ok=True)
    number = rows = 0
    while (length := _rows_of(path := folder / f"{number:06d}.npz")) is not None:
        rows, number = rows + length, number + 1
        yield path
    waiting: deque = deque()
    try:
        for texts in _slices(source.read(rows, count)):
            path = folder / f"{number:06d}.npz"
            number += 1
            if pool is None:
                write_part(path, texts, tok, grams)
                yield path
                continue
            waiting.append((path, pool.submit(_work, path, texts, source.guarded)))
            if len(waiting) > 2 * workers:
                yield _finished(*waiting.popleft())
        while waiting:
            yield _finished(*waiting.popleft())
    except BrokenProcessPool:
        raise OSError("a worker died, out of memory perhaps: the same command goes on, with fewer --workers") from None
    finally:  # there may be enough before the end: nobody must write into the folder any more
        for _, future in waiting:
            if not future.cancel():
                future.exception()


def _rows_of(path: Path) -> int | None:
    """How many rows a part has; None if it is not there, or was cut off (by a power failure, say)."""
    try:
        with np.load(path) as part:
            return len(part["fates"]) if len(part["tokens"]) == part["lengths"].sum() else None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
        return None


def _slices(texts: Iterable[str | None]) -> Iterator[list[str | None]]:
    rows: list[str | None] = []
    characters = 0
    for text in texts:
        rows.append(text)
        characters += 100 + len(text or "")
        if characters >= PART_CHARACTERS:
            yield rows
            rows, characters = [], 0
    if rows:
        yield rows


def _finished(path: Path, future) -> Path:
    future.result()
    return path


def _choose(source: Source, parts: Iterator[Path], budgets: list[float], bar: tqdm) -> tuple[list, Counter]:
    """Which rows to keep, until there are enough tokens → [(part, (rows,) 0 dropped, 1 train, 2 val)], why some were not."""
    chosen, dropped, seen, kept, tokens = [], Counter(), set(), 0, [0, 0, 0]
    for path in parts:
        with np.load(path) as part:
            rows = zip(part["fates"].tolist(), part["lengths"].tolist(), part["digests"].tolist())
            splits = np.zeros(len(part["fates"]), np.int8)
        for i, (fate, length, digest) in enumerate(rows):
            if fate != KEPT:
                dropped[FATES[fate]] += 1
            elif source.unique and digest in seen:
                dropped["seen before"] += 1
            else:
                seen.add(digest)
                split = 2 if kept % source.val_every == 0 else 1
                kept += 1
                if tokens[split] < budgets[split - 1]:
                    splits[i] = split
                    tokens[split] += length
        chosen.append((path, splits))
        bar.update(tokens[1] - bar.n)
        if all(n >= budget for n, budget in zip(tokens[1:], budgets)):
            break
    return chosen, dropped


def _documents(chosen: list, split: int) -> Iterator[np.ndarray]:
    for path, splits in chosen:
        with np.load(path) as part:
            tokens, ends = part["tokens"], np.cumsum(part["lengths"])
        for i in np.flatnonzero(splits == split).tolist():
            yield tokens[ends[i - 1] if i else 0 : ends[i]]


_MARKED_HINT = " (rows that are marked as answers to a benchmark do not count: --keep-overlaps keeps them)"


def _prepare_source(name: str, source: Source, out: Path, tok: Tokenizer, grams: Grams, pool, workers, seq_len) -> dict:
    """Both shards of a source; returns its entry in the index."""
    folder, read = out / f"{name}.parts", [0]
    budget = source.max_tokens or math.inf
    budgets = [budget, max(budget / source.val_every, 4 * seq_len)]

    def count(size: int) -> None:
        read[0] += size
        if source.max_tokens is None and source.size:
            bar.total = int(max(bar.n, 1) * max(1.0, source.size / read[0]))  # what the rest will come to

    with tqdm(desc=name, total=source.max_tokens, unit="tok", unit_scale=True, disable=None) as bar:
        with contextlib.closing(_parts(source, folder, tok, grams, pool, workers, count)) as parts:
            chosen, dropped = _choose(source, parts, budgets, bar)
    entry = {"kind": source.kind}
    for number, split in enumerate(("train", "val"), 1):
        documents = _documents(chosen, number)
        header = write_shard(out / f"{name}.{split}.bin", source.kind, documents, tok, seq_len)
        if not header["documents"]:
            raise ValueError(
                f"source {name!r} has no {split} documents: leave it out, or give it more ({dict(dropped)})"
            )
        entry[split] = {k: header[k] for k in ("tokens", "padding", "documents", "sha256")}
    return entry | ({"dropped": dict(sorted(dropped.items()))} if dropped else {})


# ----------------------------------------------------------------------------------------------------------------------
# A folder of shards


def prepare(
    out: Path, sources: dict[str, Source], make_tokenizer, seq_len: int, settings: dict, problems=(), workers: int = 1
) -> dict:
    """Write a folder of shards unless it is there already; returns its index.

    settings: whatever decides the contents, JSON-able; a folder with other settings is refused, naming the keys.
    make_tokenizer: () → Tokenizer, called only when there is work to do. problems: texts that no document may contain.
    """
    out = Path(out)
    settings = json.loads(json.dumps(settings | {"seq_len": seq_len}))  # as they will be read back
    if (index := read_index(out)) is not None:
        files.check_same_settings(out, index["settings"], settings)
        _tidy(out)
        return index
    if not (out / "unfinished.json").exists():
        _check_sources(sources)
    with files.run_lock(out):
        index = read_json(out / "unfinished.json", missing_ok=True)
        if index is not None:
            files.check_same_settings(out, index["settings"], settings)
            tok = tokenizer.load(out)
            if tok.hash != index["tokenizer"]:
                raise ValueError(
                    f"{out} has another tokenizer than it was begun with: delete the folder and prepare again"
                )
        else:
            _tidy(out)  # parts of another run
            tok = make_tokenizer()
            if found := tokenizer.find(out):
                os.unlink(found)
            tok.save(out / tokenizer.FILE_NAME)
            index = {"settings": settings, "tokenizer": tok.hash, "vocab_size": tok.vocab_size, "sources": {}}
            files.write_json(out / "unfinished.json", index)
        with _workers(workers, out, problems) as pool:
            grams = Grams(problems)
            for name in [name for name in sources if name not in index["sources"]]:
                guards = grams if sources[name].guarded else Grams()
                entry = _prepare_source(name, sources[name], out, tok, guards, pool, workers, seq_len)
                index["sources"][name] = entry
                files.write_json(out / "unfinished.json", index)
        files.write_json(out / "index.json", index)
        _tidy(out)
    return index


def _tidy(out: Path) -> None:
    """Remove what a finished folder does not need, now or after a kill in these very lines."""
    for path in out.glob("*.parts"):
        shutil.rmtree(path)
    (out / "unfinished.json").unlink(missing_ok=True)


def _check_sources(sources: dict[str, Source]) -> None:
    """Before the hours of work, not after them."""
    for name, source in sources.items():
        if len(list(islice(filter(None, source.read(0, lambda _: None)), 2))) < 2:
            raise ValueError(
                f"source {name!r} has fewer than two documents: leave it out, or give it more{_MARKED_HINT}"
            )


@contextlib.contextmanager
def _workers(workers: int, out: Path, problems):
    """A pool of processes, or None for work that is done here."""
    if workers == 1:
        yield None
        return
    # Not a fork, which would copy the threads of `datasets` in whatever state they are.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, spawn, _start_worker, (str(out), list(problems))) as pool:
        yield pool


def train_tokenizer(sources: dict[str, Source], vocab_size: int, characters: int = 2_000_000) -> Tokenizer:
    """A vocabulary from the beginnings of all sources, each with the same number of characters."""
    texts = []
    for source in sources.values():
        room = characters // len(sources)
        for number, text in enumerate(filter(None, source.read(0, lambda _: None))):
            if number % source.val_every:
                texts.append(text[:room])
                room -= len(text)
            if room <= 0:
                break
    return tokenizer.train(texts, vocab_size)


def prepare_synth(out, vocab_size: int, seq_len: int, tokens_per_source: dict[str, int], seed: int = 0) -> dict:
    """Shards of the generated world; tokens_per_source: training tokens, {"general": 1_000_000, ...}. A twentieth as many
    are held out, from problems of other structures; a sentence that comes twice is no mistake here."""
    from data import synth

    def source(name: str) -> Source:
        def read(begin: int, count) -> Iterator[str]:
            train, val = (synth.documents(name, seed, split) for split in ("train", "val"))
            return islice((next(train if i % 20 else val) for i in itertools.count()), begin, None)

        return Source(recipes.SOURCES["tiny"][name], read, tokens_per_source[name], val_every=20, unique=False)

    sources = {name: source(name) for name in tokens_per_source}
    settings = {"corpus": "tiny", "vocab_size": vocab_size, "tokens": tokens_per_source, "seed": seed}
    return prepare(Path(out), sources, lambda: train_tokenizer(sources, vocab_size), seq_len, settings)


# ----------------------------------------------------------------------------------------------------------------------
# Rows of files and of the hub


def stream(what: str, skip: int, **where) -> Iterator[dict]:
    """The rows of a data set, from row `skip` on, by `datasets` and without downloading it whole."""
    import datasets

    datasets.disable_progress_bars()
    try:
        yield from datasets.load_dataset(**where, streaming=True).skip(skip)
    except Exception as error:  # of any kind: a network's, a file's, an unknown name's
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise ValueError(f"{what} cannot be read: {reason}") from None


def corpus_rows(corpus: recipes.SourceSpec, folder: Path, skip: int, count) -> Iterator[tuple[str, dict]]:
    """(where, row) of a corpus from row `skip` on; files are read in turns, a row of each."""
    if corpus.hub:
        part = {"data_files": corpus.part} if "*" in corpus.part else {"name": corpus.part or None}
        what = f"{corpus.hub} {corpus.part}".strip() + f", split {corpus.split}"
        return ((what, row) for row in stream(what, skip, path=corpus.hub, split=corpus.split, **part))
    files = corpus_files(corpus, folder)
    if all(path.suffix == ".parquet" for path in files):
        what, names = ", ".join(corpus.files), [str(path) for path in files]
        return ((what, row) for row in stream(what, skip, path="parquet", data_files=names, split="train"))
    return islice(_in_turns(files, count), skip, None)


def _in_turns(files: list[Path], count) -> Iterator[tuple[str, dict]]:
    """A row of each file, again and again; of many files 64 at a time, for a process may not open thousands."""
    waiting, open_now = deque(files), deque()
    while waiting or open_now:
        while waiting and len(open_now) < 64:
            path = waiting.popleft()
            open_now.append((str(path), read_jsonl(path, count)))
        name, rows = open_now.popleft()
        if (row := next(rows, None)) is not None:
            open_now.append((name, rows))
            yield name, row


def corpus_files(corpus: recipes.SourceSpec, folder: Path) -> list[Path]:
    """The files of a corpus; one that is not there is a FileNotFoundError, of a kind that nobody reads a ValueError."""
    found: list[Path] = []
    for name in corpus.files:
        pattern = os.path.join(glob.escape(str(folder)), name)
        paths = [Path(path) for path in sorted(glob.glob(pattern, recursive=True))] if "*" in name else [folder / name]
        if not paths or not all(path.is_file() for path in paths):
            raise FileNotFoundError(f"no file {folder / name}: see the README for where the public files come from")
        found += paths
    for path in found:
        if not path.name.endswith((".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")):
            raise ValueError(f"{path}: only .jsonl, .jsonl.gz and .parquet files can be read")
    if len({path.suffix == ".parquet" for path in found}) > 1:
        raise ValueError(f"{', '.join(corpus.files)}: parquet and JSON lines in one source; make two of them")
    return found


def fingerprint(path: Path) -> str:
    """Of a file's length, beginning and end: whoever changes it between a kill and a restart is told so."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        digest = hashlib.sha256(f"{size}".encode() + f.read(1 << 20))
        f.seek(max(0, size - (1 << 20)))
        digest.update(f.read())
    return digest.hexdigest()[:16]


def documents(corpus: recipes.SourceSpec, folder: Path, keep_overlaps: bool, skip: int = 0, count=lambda size: None):
    """What Source.read() gives. A row whose "overlaps" names a benchmark's problem would teach the test: it is marked."""
    make = recipes.FORMATS[corpus.format]
    for number, (where, row) in enumerate(corpus_rows(corpus, folder, skip, count), skip + 1):
        if row.get("overlaps") and not keep_overlaps:
            yield None
            continue
        try:
            text = make(row)
            if not isinstance(text, str | None):
                raise TypeError(f"{type(text).__name__} instead of text")
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            reason = error.args[0] if error.args else error
            raise ValueError(f"{where}: row {number} does not fit the format {corpus.format!r}: {reason}") from None
        yield text or ""


def real_source(corpus: recipes.SourceSpec, folder: Path, max_tokens: int | None, keep_overlaps: bool) -> Source:
    def read(skip: int, count) -> Iterator[str | None]:
        return documents(corpus, folder, keep_overlaps, skip, count)

    plain = [path for path in corpus_files(corpus, folder) if path.suffix != ".parquet"]
    size = sum(_size(path) for path in plain)
    return Source(recipes.kind(corpus), read, max_tokens, guarded=not keep_overlaps, size=size)


def _size(path: Path) -> int:
    """Bytes of a file, unpacked: gzip writes that at the end (modulo 4 GiB)."""
    if path.suffix != ".gz":
        return path.stat().st_size
    with open(path, "rb") as f:
        f.seek(max(0, path.stat().st_size - 4))
        return int.from_bytes(f.read(4), "little")


# ----------------------------------------------------------------------------------------------------------------------
# Command line


def own_source(text: str) -> tuple[str, recipes.SourceSpec]:
    """ "notes=text:notes.jsonl" or "qa=qa:hub:owner/name[:configuration or files[:split]]" → (name, corpus)"""
    name, _, rest = text.partition("=")
    kind, _, where = rest.partition(":")
    if kind not in recipes.FORMATS or not where or not re.fullmatch(r"\w+", name):
        how = f"NAME=FORMAT:FILE or NAME=FORMAT:hub:ID[:PART[:SPLIT]], FORMAT one of {', '.join(recipes.FORMATS)}"
        raise argparse.ArgumentTypeError(f"{text!r} is not {how}")
    if not where.startswith("hub:"):
        return name, recipes.SourceSpec(kind, files=(where,))
    return name, hub_corpus(kind, where[4:])


def hub_corpus(kind: str, where: str) -> recipes.SourceSpec:
    """A data set of the hub, ID[:PART[:SPLIT]], PART being its configuration or files."""
    hub, part, split = (where.split(":") + ["", ""])[:3]
    return recipes.SourceSpec(kind, hub=hub, part=part, split=split or "train")


def token_budgets(text: str) -> dict[str, int]:
    """ "1e6" → {"": 1000000}; "dclm=21e9,numina=2e9" → {"dclm": …, "numina": …}"""
    try:
        pairs = [part.rpartition("=") for part in text.split(",")]
        budgets = {name: int(float(number)) for name, _, number in pairs}
        if min(budgets.values()) < 1:
            raise ValueError
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not N or NAME=N,NAME=N with N at least 1") from None
    return budgets


def benchmark_problems(against: str | None, folder: Path | None) -> dict[str, list[str]]:
    """{file: its problems}: of the files named, or of those of recipes.EVALUATION_FILES that are in the folder."""
    if against == "none":
        return {}
    if against:
        paths = [Path(name) for name in against.split(",")]
    else:
        paths = [path for name in recipes.EVALUATION_FILES for path in sorted((folder or Path()).glob(name)) if folder]
    found = {}
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no file {path} to keep out of the training text")
        try:
            found[str(path)] = [
                str(recipes.column(row, "problem", "question", "prompt", "text")) for row in read_jsonl(path)
            ]
        except KeyError as error:
            raise ValueError(f"{path}: {error.args[0]}") from None
    return found


def parse_arguments():
    parser = files.ArgumentParser(prog="python -m data.prepare", description=__doc__)
    parser.add_argument("--data", type=Path, metavar="DIR", help="folder of the public files, or of your own")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the shards")
    parser.add_argument("--world", choices=recipes.CORPORA, default="real", help="whose sources (default real)")
    parser.add_argument("--sources", help="some of them, comma-separated; default: all")
    parser.add_argument(
        "--source", type=own_source, action="append", metavar="NAME=FORMAT:FILE",
        help="in place of those a source of your own (repeat it): format text, qa, long_cot or chat; FILE .jsonl, .jsonl.gz "
        "or .parquet, * allowed; hub:ID[:PART[:SPLIT]] for a data set of the hub, PART its configuration or files",
    )  # fmt: skip
    parser.add_argument("--tokenizer", metavar="FILE", help="or its folder; without it, one is trained on the sources")
    parser.add_argument("--vocab-size", type=int, default=4096, help="of the tokenizer that is trained (default 4096)")
    parser.add_argument("--seq-len", type=int, default=256, help="length of packed rows, as in training (default 256)")
    parser.add_argument(
        "--max-tokens",
        type=token_budgets,
        default={},
        metavar="N",
        help="training tokens of each source; or NAME=N,NAME=N",
    )
    parser.add_argument(
        "--against", metavar="FILES", help="benchmarks whose problems are kept out, comma-separated JSON lines, or none; "
        "default: gsm8k/test, math/test and eval/* of --data",
    )  # fmt: skip
    parser.add_argument(
        "--keep-overlaps", nargs="?", const="all", default="", metavar="SOURCES",
        help="keep what contains or answers problems of a benchmark, in these sources or all: then leave those problems out "
        "of the evaluation",
    )  # fmt: skip
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes that tokenise (default: all cores)"
    )
    parser.add_argument("--check", action="store_true", help="read finished shards again and compare their checksums")
    args = parser.parse_args()
    if min(args.seq_len, args.vocab_size, args.workers) < 1:
        parser.error("--seq-len, --vocab-size and --workers must be at least 1")
    if args.source and args.sources:
        parser.error("--sources chooses among those of --world; with --source there are only your own")
    if args.data is None and (args.world == "real" and not args.source):
        parser.error("--data DIR is needed: the folder of the public files (README)")
    corpora = dict(args.source) if args.source else recipes.CORPORA[args.world]
    if args.source and len(corpora) < len(args.source):
        parser.error("two --source have the same name")
    names = args.sources.split(",") if args.sources else list(corpora)
    kept = [] if args.keep_overlaps in ("", "all") else args.keep_overlaps.split(",")
    for name in [*names, *kept, *filter(None, args.max_tokens)]:
        if name not in corpora:
            parser.error(f"unknown source {name!r} (valid: {', '.join(corpora)})")
    return args, {name: corpora[name] for name in names}


def main() -> None:
    args, corpora = parse_arguments()
    budgets = {name: args.max_tokens.get(name, args.max_tokens.get("")) for name in corpora}
    folder, kept = args.data or Path(), corpora if args.keep_overlaps == "all" else args.keep_overlaps.split(",")
    sources = {name: real_source(corpus, folder, budgets[name], name in kept) for name, corpus in corpora.items()}
    benchmarks = benchmark_problems(args.against, args.data)
    problems = [problem for rows in benchmarks.values() for problem in rows]
    tok = tokenizer.load(args.tokenizer) if args.tokenizer else None
    settings = {
        "corpus": args.world if not args.source else "own",
        "sources": {name: list(corpus) for name, corpus in corpora.items()},
        "files": {name: [fingerprint(path) for path in corpus_files(corpus, folder)] for name, corpus in corpora.items()},
        "max_tokens": budgets,
        "keep_overlaps": sorted(set(kept) & set(corpora)),
        "against": hashlib.sha256("\0".join(problems).encode()).hexdigest()[:16] if problems else None,
        "tokenizer": tok.hash if tok else f"trained, {args.vocab_size} words",
    }  # fmt: skip
    short = sum(len(word_runs(problem.encode("utf-8", "replace"))[0]) == 0 for problem in problems)
    if problems:
        print(f"kept out: {GRAM} words in a row of one of {len(problems):,} problems of {', '.join(benchmarks)}")
        print(f"{short:,} of these have fewer words: text that contains them is not found")
    else:
        print("no benchmark's problems are kept out of the text: name their files by --against")
    make = lambda: tok or train_tokenizer(sources, args.vocab_size)  # noqa: E731
    index = prepare(args.out, sources, make, args.seq_len, settings, problems, args.workers)
    read_index(args.out, check=args.check)
    for name, entry in index["sources"].items():
        train, val = (entry[split]["tokens"] - entry[split]["padding"] for split in ("train", "val"))
        dropped = "; dropped: " + ", ".join(f"{n:,} {why}" for why, n in entry.get("dropped", {}).items())
        print(
            f"{name:14} {train:14,} tokens in {entry['train']['documents']:,} documents, {val:,} tokens held out"
            f"{dropped if 'dropped' in entry else ''}"
        )
    print(f"ready: {args.out}")


if __name__ == "__main__":
    files.run_cli(main)
