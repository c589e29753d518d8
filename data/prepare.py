"""Documents → token shards (their format: shards.py), in one pass over each source.

    python -m data.prepare --data DIR --out DIR --keep-overlaps long_cot       public files (data/README.md)
    python -m data.prepare --corpus paper --out DIR --tokenizer FILE --sources dclm,numina --max-tokens 2e9
    python -m data.prepare --out DIR --source notes=text:notes.jsonl --source qa=qa:hub:openai/gsm8k:main
    python -m data.prepare --out runs/tiny/data --add own=rollouts:'runs/tiny/rl-stable/rollouts/*.jsonl'

The pass: the format of a source (recipes.py) makes a document of each row; --workers processes tokenise
chunks of documents, and find those that share 13 words in a row with a benchmark's problem (overlaps.py).
These are dropped, and so is what came before, letter by letter. Of the rest every 64th is held out.

OUT then holds tokenizer.model, NAME.train.bin and NAME.val.bin of each source, and index.json, written last;
if it is there, the same command does nothing. Until then unfinished.json names the finished sources. Kill the
command at any moment: the same command starts the source in work over, and writes the same bytes. --add gives
a finished folder one source more, with its tokenizer.
"""

import argparse
import contextlib
import glob
import hashlib
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
from array import array
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

if not __package__:  # python …/data/prepare.py: `data` is not a module beside it, but its folder
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data import files, recipes, synth, tokenizer
from data.overlaps import GRAM, Grams, benchmark_problems
from data.recipes import SourceSpec
from data.shards import AGAIN, read_index, tok_dtype, write_shard

VAL_EVERY = 64  # of a real source, every 64th document is held out
CHUNK_CHARACTERS = 1 << 20  # of text in a chunk: a tenth of a second of work
VOCABULARY_CHARACTERS = 2_000_000  # of all sources together, to train a tokenizer on
BAD_ROWS = 0.01  # share of a source's rows that may be bad: broken JSON, another type, no such column
READABLE = tuple(kind + pack for kind in (".jsonl", ".json") for pack in ("", ".gz", ".zst")) + (".parquet",)
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
# Why a row is dropped
EMPTY, MARKED, INVALID = "without a document", "marked as a benchmark's", "marked as wrong"
OVERLAP, REPEATED, BAD = f"sharing {GRAM} words with a benchmark", "seen before", "bad rows"
_tools: dict = {}  # of this process, for tokenise(): {"tok": Tokenizer, "grams": Grams}

# ---- One source --------------------------------------------------------------------------------------------


class Dropped(NamedTuple):
    """In place of a document. It is false, so that filter(None, read()) are the documents."""

    why: str
    error: str = ""  # of a bad row: where it is, and what is wrong with it

    def __bool__(self) -> bool:
        return False


class Source(NamedTuple):
    """read(count) yields a document or Dropped per row; count(n), if given, hears of n more bytes read."""

    kind: str  # "text" | "document"
    read: Callable[..., Iterator[str | Dropped]]
    max_tokens: int | None  # of training; None: all
    val_every: int = VAL_EVERY
    unique: bool = True  # drop what came before
    guarded: bool = True  # and what contains a benchmark's problem
    size: int = 0  # bytes that will be read, where this is known
    prints: tuple[str, ...] = ()  # fingerprints of its files


def prepare_source(name: str, source: Source, out: Path, tok, seq_len: int, pool, workers: int) -> dict:
    """Write both shards of a source; returns its entry in the index."""
    entry, read, held_out, dropped = {"kind": source.kind}, 0, [], Counter()

    def count(size: int) -> None:
        nonlocal read
        read += size
        if source.max_tokens is None and source.size:  # what all of it will come to
            bar.total = int(max(bar.n, 1) * max(1.0, source.size / read))

    with tqdm(desc=name, total=source.max_tokens, unit="tok", unit_scale=True, disable=None) as bar:
        rows = tokenised(source, count, pool, workers)
        kept = kept_documents(source, rows, tok_dtype(tok), seq_len, held_out, dropped, entry, bar)
        for split, documents in ("train", kept), ("val", held_out):
            number = itertools.count()  # of documents: a shard's header counts the pieces of long ones
            documents = (ids for ids, _ in zip(documents, number))
            header = write_shard(out / f"{name}.{split}.bin", source.kind, documents, tok, seq_len)
            if header["tokens"] <= (seq_len if source.kind == "text" else 0):
                what = f"source {name!r} has {header['tokens']:,} {split} tokens, not a sequence of {seq_len}"
                raise ValueError(f"{what}: leave it out, or give it more ({dict(dropped)})")
            entry[split] = {key: header[key] for key in ("tokens", "padding", "documents", "sha256")}
            entry[split]["documents"] = next(number)
    return entry | ({"dropped": dict(sorted(dropped.items()))} if dropped else {})


def kept_documents(source, rows, dtype, seq_len, held_out: list, dropped: Counter, entry: dict, bar):
    """The documents to train on, until there are enough tokens; the few to hold out go to held_out, what is
    wrong with the first bad row to entry."""
    train_left = source.max_tokens or float("inf")  # tokens
    val_left = max(train_left / source.val_every, 4 * seq_len)
    seen, number = set(), 0
    for why, digest, ids in rows:
        if why or digest in seen:
            dropped[why or REPEATED] += 1
            if why == BAD:
                entry.setdefault("first_bad_row", digest)
            continue
        if source.unique:
            seen.add(digest)
        ids, is_val = np.frombuffer(ids, dtype), number % source.val_every == 0
        number += 1
        if is_val and val_left > 0:
            val_left -= len(ids)
            held_out.append(ids)
        elif not is_val and train_left > 0:
            train_left -= len(ids)
            bar.update(len(ids))
            yield ids
        elif train_left <= 0 and val_left <= 0:
            return


def tokenised(source: Source, count, pool, workers: int) -> Iterator[tuple[str, bytes | str, bytes]]:
    """tokenise() of all rows of a source, in their order."""
    size = min(CHUNK_CHARACTERS, 4 * (source.max_tokens or CHUNK_CHARACTERS))  # few tokens: little is read
    work, chunks = partial(tokenise, guarded=source.guarded), in_chunks(source.read(count), size)
    for rows in in_order(work, chunks, pool, workers, "starts this source over"):
        yield from rows


def in_order(work: Callable, chunks: Iterable, pool, workers: int, again: str) -> Iterator:
    """work(chunk) of each chunk, in their order: here, or by the pool, some chunks ahead. again: what the
    same command does after a worker died."""
    if pool is None:
        yield from map(work, chunks)
        return
    waiting = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(work, chunk))
            if len(waiting) > 2 * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenExecutor:  # (a multiprocessing.Pool would wait for a killed worker's result for ever)
        how = f"the same command {again}; give it fewer --workers"
        raise OSError(f"a worker died, out of memory perhaps: {how}") from None


def in_chunks(texts: Iterable[str | Dropped], size: int | None = None) -> Iterator[list[str | Dropped]]:
    """Lists of consecutive texts, about CHUNK_CHARACTERS, or size, in each."""
    chunk, characters, size = [], 0, size or CHUNK_CHARACTERS
    for text in texts:
        chunk.append(text)
        characters += 100 + (len(text) if text else 0)
        if characters >= size:
            yield chunk
            chunk, characters = [], 0
    yield chunk


def tokenise(texts: list[str | Dropped], guarded: bool) -> list[tuple[str, bytes | str, bytes]]:
    """Per text: why it is dropped or "", its digest (of a bad row: what is wrong), the bytes of an array of
    its ids and the end of text."""
    tok, data = _tools["tok"], [text.encode("utf-8", "replace") if text else b"" for text in texts]
    overlaps = _tools["grams"].shared_by(data) if guarded else [False] * len(data)
    code, rows = tok_dtype(tok).char, []
    for text, letters, overlap in zip(texts, data, overlaps):
        if not text or overlap:
            rows.append((OVERLAP, b"", b"") if text else (*text, b""))
        else:
            ids = array(code, tok.encode(text) + [tok.eos_id]).tobytes()
            rows.append(("", hashlib.blake2b(letters, digest_size=8).digest(), ids))
    return rows


def worker_pool(workers: int, start: Callable, *args):
    """Processes that begin with start(*args); None in place of one, which is this."""
    spawn = multiprocessing.get_context("spawn")  # a fork would copy the threads of `datasets`
    if workers == 1:
        return contextlib.nullcontext()
    return ProcessPoolExecutor(workers, spawn, _begin, (start, args))


def _begin(start: Callable, args: tuple) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()  # it may be killed
    start(*args)


def _start(folder: Path, problems: list[str]) -> None:
    _tools.update(tok=tokenizer.load(folder), grams=Grams(problems))


# ---- A folder of shards ------------------------------------------------------------------------------------


def prepare(
    out, sources: dict[str, Source], vocab, seq_len: int, settings, problems=(), workers=1, vocab_from=None
) -> dict:
    """Write a folder of shards unless it is there already; returns its index. vocab: a Tokenizer, or the size
    of one to train, on the sources or on vocab_from. settings: all that decides the contents, JSON-able; a
    folder with others is refused, naming the keys. problems: texts that no document may contain."""
    out, settings = Path(out), settings | {"seq_len": seq_len}
    if (index := read_index(out)) is not None:
        files.check_same_settings(out, index["settings"], settings)
        return index
    unfinished = out / "unfinished.json"
    if not unfinished.exists():  # before the hours of work, not after them; what was begun has passed
        for name, source in sources.items():
            check_two_documents(name, source)
    with files.run_lock(out):
        if not unfinished.exists():
            tok = train_tokenizer(vocab_from or sources, vocab) if isinstance(vocab, int) else vocab
            if found := tokenizer.find(out):
                os.unlink(found)
            tok.save(out / tokenizer.FILE_NAME)
            index = {"settings": settings, "tokenizer": tok.hash, "vocab_size": tok.vocab_size, "sources": {}}
            files.write_json(unfinished, index)
        index, tok = files.read_json(unfinished), tokenizer.load(out)
        files.check_same_settings(out, index["settings"], settings)
        if tok.hash != index["tokenizer"]:
            raise ValueError(f"{out} has another tokenizer than it was begun with: {AGAIN}")
        _tools.update(tok=tok, grams=Grams(problems))
        with worker_pool(workers, _start, out, problems) as pool:
            for name in [name for name in sources if name not in index["sources"]]:
                index["sources"][name] = prepare_source(name, sources[name], out, tok, seq_len, pool, workers)
                files.write_json(unfinished, index)
        os.replace(unfinished, out / "index.json")
    return index


def check_two_documents(name: str, source: Source) -> None:
    """ValueError if a source has less, one to train on and one to hold out: with the reasons."""
    dropped = Counter()
    for text in source.read():
        dropped["" if text else text.why] += 1
        if dropped[""] == 2:
            return
    del dropped[""]
    why = ", ".join(f"{n:,} {why}" for why, n in dropped.items()) or "none"
    how = f"keep them by --keep-overlaps {name}, or " if dropped[MARKED] else ""
    what = f"source {name!r} has fewer than two documents (other rows: {why})"
    raise ValueError(f"{what}: {how}leave it out (--sources)")


def train_tokenizer(sources: dict[str, Source], vocab_size: int) -> tokenizer.Tokenizer:
    """A vocabulary from the beginnings of all sources, each with the same number of characters."""
    texts = []
    for source in sources.values():
        room = VOCABULARY_CHARACTERS // len(sources)
        for number, text in enumerate(filter(None, source.read())):
            if number % source.val_every:
                texts.append(text[:room])
                room -= len(text)
            if room <= 0:
                break
    return tokenizer.train(texts, vocab_size)


def prepare_synth(out, vocab_size: int, seq_len: int, tokens_per_source: dict[str, int], seed=0) -> dict:
    """Shards of the generated corpus; tokens_per_source: training tokens, {"general": 1_000_000, ...}.
    A twentieth as many are held out, of other structures. A sentence that comes twice is no mistake here."""

    def read(name: str, count=None) -> Iterator[str]:
        train, val = (synth.documents(name, seed, split) for split in ("train", "val"))
        return (next(train if number % 20 else val) for number in itertools.count())

    def source(name: str) -> Source:
        tokens = tokens_per_source.get(name)
        return Source(recipes.KINDS["tiny"][name], partial(read, name), tokens, val_every=20, unique=False)

    settings = {"corpus": "tiny", "vocab_size": vocab_size, "tokens": tokens_per_source, "seed": seed}
    sources = {name: source(name) for name in tokens_per_source}
    if index := read_index(out):
        return _add_sources(Path(out), index, sources, settings | {"seq_len": seq_len})
    words = {name: source(name) for name in synth.WORDS_FROM}  # the same vocabulary whatever is mixed
    return prepare(out, sources, vocab_size, seq_len, settings, vocab_from=words)


def _add_sources(out: Path, index: dict, sources: dict[str, Source], settings: dict) -> dict:
    """Add to a finished folder the sources that it lacks, the others as they are; returns its index."""
    if not sources.keys() - index["sources"].keys():
        files.check_same_settings(out, index["settings"], settings | {
            "tokens": index["settings"]["tokens"] | settings["tokens"]})
        return index
    with files.run_lock(out, wait=600):
        index = read_index(out)  # as it is now: stages side by side may add to it
        old, tokens = index["settings"], settings["tokens"]
        own = {x: tokens.get(x, n) for x, n in old["tokens"].items()}  # of what others added: theirs
        files.check_same_settings(out, old, settings | {"tokens": own})
        tok = tokenizer.load(out)
        _tools.update(tok=tok, grams=Grams(()))
        for name in [name for name in sources if name not in index["sources"]]:
            entry = prepare_source(name, sources[name], out, tok, settings["seq_len"], None, 1)
            index["sources"][name], old["tokens"][name] = entry, tokens[name]
        files.write_json(out / "index.json", index)
    return index


def add_source(out: Path, name: str, source: Source, made_of: dict, problems=(), workers=1) -> dict:
    """Add a source of files to a finished folder, whatever made that; returns its index. made_of: of what, to
    refuse another source of the same name."""
    if read_index(out) is None:
        raise ValueError(f"--add needs a finished folder, and {out} has no index.json: use --source")
    with files.run_lock(out, wait=600):
        index, made_of = read_index(out), json.loads(json.dumps(made_of))
        if index["settings"]["corpus"] == "tiny" and name in recipes.KINDS["tiny"]:
            raise ValueError(f"{name} is the name of a generated source: give this one a new name")
        if entry := index["sources"].get(name):
            if entry.get("of") != made_of:
                raise ValueError(f"{out} has another source of the name {name}: give this one a new name")
            return index
        check_two_documents(name, source)
        tok = tokenizer.load(out)
        _tools.update(tok=tok, grams=Grams(problems))
        with worker_pool(workers, _start, out, problems) as pool:
            seq_len = index["settings"]["seq_len"]
            entry = prepare_source(name, source, out, tok, seq_len, pool, workers)
        index["sources"][name] = entry | {"of": made_of}
        files.write_json(out / "index.json", index)
    return index


# ---- Rows of files and of the hub --------------------------------------------------------------------------


def source_rows(spec: SourceSpec, folder=Path(), count=lambda size: None, broken_ok=False) -> Iterator:
    """(where, line or row, None or the row) of all rows, as files.numbered_rows() has them. Files are read in
    turns, a row of each, those of the hub one after another, without downloading them whole."""
    if not spec.hub:
        yield from _in_turns(source_files(spec, folder), 64, count, broken_ok)
        return
    import datasets

    datasets.disable_progress_bars()
    part = {"data_files": spec.part} if "*" in spec.part else {"name": spec.part or None}
    try:
        builder = datasets.load_dataset_builder(spec.hub, revision=spec.revision or None, **part)
        paths = (builder.config.data_files or {}).get(spec.split, [])
        if paths and all(path.endswith(READABLE) for path in paths):
            yield from _in_turns(list(paths), 1, lambda size: None, broken_ok)
        else:  # another format, no such split
            rows = builder.as_streaming_dataset(split=spec.split)
            yield from ((spec.hub, number, row) for number, row in enumerate(rows, 1))
    except Exception as error:  # of any kind: a network's, a file's, an unknown name's
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        what = f"{spec.hub} {spec.part}".strip() + f", split {spec.split}"
        raise ValueError(f"{what} cannot be read: {reason}") from None


def pinned_revisions(out: Path, hubs: list[str], added: str = "") -> dict[str, str]:
    """{data set of the hub: commit}: those that a folder, or the source added to it, was begun with, or those
    of now; "": unknown."""
    for name in ("index.json", "unfinished.json"):
        if index := files.read_json(out / name, missing_ok=True):
            made_of = index.get("settings")
            if added and not (made_of := (index.get("sources") or {}).get(added, {}).get("of")):
                break
            return (made_of or {}).get("revisions") or {}
    found = dict.fromkeys(hubs, "")
    for hub in hubs:
        try:
            import huggingface_hub

            found[hub] = huggingface_hub.HfApi().dataset_info(hub).sha or ""
        except Exception as error:  # as above
            print(f"{hub}: its revision is not known, so it is not pinned ({type(error).__name__})")
    return found


def _in_turns(paths: list[str], at_once: int, count, broken_ok: bool) -> Iterator[tuple[str, int, dict]]:
    """A row of each file, again and again. So many are open at a time: thousands are not allowed."""
    waiting = ((path, files.numbered_rows(path, count, broken_ok)) for path in paths)
    turns = deque(itertools.islice(waiting, at_once))
    while turns:
        name, rows = turns.popleft()
        if (found := next(rows, None)) is not None:
            yield name, *found
            turns.append((name, rows))
        else:
            turns.extend(itertools.islice(waiting, 1))


def source_files(spec: SourceSpec, folder: Path) -> list[str]:
    """The files of a source. FileNotFoundError for one that is not there, ValueError for an unknown kind."""
    found: list[str] = []
    for name in spec.files:
        pattern, path = os.path.join(glob.escape(str(folder)), name), os.path.join(folder, name)
        paths = sorted(glob.glob(pattern, recursive=True)) if "*" in name else [path]
        if not paths or not all(map(os.path.isfile, paths)):
            raise FileNotFoundError(f"no file {path}: data/README.md says where the public files are from")
        found += paths
    for path in found:
        if not path.endswith(READABLE):
            raise ValueError(f"{path}: only {', '.join(READABLE)} files can be read")
    return found


def read_documents(spec, folder: Path, keep_overlaps: bool, bad_rows=BAD_ROWS, count=lambda size: None):
    """What Source.read() gives. ValueError, that of the first bad row, if a larger share of the rows is bad:
    at once if so many are too many of a thousand, else at the end. One may be, unless the share is 0."""
    rows = source_rows(spec, folder, count, broken_ok=True)
    what, make = f"does not fit the format {spec.format!r}", partial(_document, spec, keep_overlaps)
    return made_of(rows, make, what, bad_rows, ", --bad-rows allows more")


def made_of(places, make: Callable, what: str, bad_rows: float, more="") -> Iterator:
    """make(row), or Dropped, of each of source_rows(). what, more: for the message."""
    rows, bad, first = 0, 0, ""
    for rows, (where, number, row) in enumerate(places, 1):  # noqa: B007
        try:
            if row is None:
                raise TypeError("not one JSON object in UTF-8")
            made = make(row)
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            reason = error.args[0] if error.args else error
            made = Dropped(BAD, f"{where}: row {number} {what}: {reason}")
            bad, first = bad + 1, first or made.error
            if bad > (bad_rows and max(1, bad_rows * max(rows, 1000))):
                break
        yield made
    if bad and (bad == rows or bad > (bad_rows and max(1, bad_rows * rows))):
        raise ValueError(f"{first} ({bad:,} bad rows of {rows:,}: --columns gives columns their names{more})")


def _document(spec: SourceSpec, keep_overlaps: bool, row: dict) -> str | Dropped:
    """Of a row. If its "overlaps" names a benchmark's problem, it teaches the test."""
    if row.get("overlaps") and not keep_overlaps:
        return Dropped(MARKED)
    if not recipes.is_valid(row):
        return Dropped(INVALID)
    return recipes.FORMATS[spec.format](recipes.renamed(row, spec.columns)) or Dropped(EMPTY)


def real_source(spec: SourceSpec, folder: Path, max_tokens, keep_overlaps: bool, bad_rows=BAD_ROWS) -> Source:
    """A source of files or of the hub."""
    read = partial(read_documents, spec, folder, keep_overlaps, bad_rows)
    prints, sizes = zip(*map(fingerprint, source_files(spec, folder))) if spec.files else ((), ())
    return Source(spec.kind, read, max_tokens, guarded=not keep_overlaps, size=sum(sizes), prints=prints)


def fingerprint(path: str) -> tuple[str, int]:
    """(hash of a file's length, beginning and end, which tells a changed file; its size, unpacked)."""
    with open(path, "rb") as f:
        size, begin = os.path.getsize(path), f.read(1 << 20)
        f.seek(max(0, size - (1 << 20)))
        end = f.read()
    digest = hashlib.sha256(f"{size}".encode() + begin + end).hexdigest()[:16]
    return digest, int.from_bytes(end[-4:], "little") if path.endswith(".gz") else size  # modulo 4 GiB


# ---- Command line ------------------------------------------------------------------------------------------


def own_source(text: str) -> tuple[str, SourceSpec]:
    """ "notes=text:notes.jsonl" or "qa=qa:hub:owner/name[:configuration or files[:split]]" → (name, spec)"""
    name, _, rest = text.partition("=")
    format, _, where = rest.partition(":")
    if format not in recipes.FORMATS or not where or not re.fullmatch(r"\w+", name):
        how = "NAME=FORMAT:FILE or NAME=FORMAT:hub:ID[:PART[:SPLIT]], FORMAT one of "
        raise argparse.ArgumentTypeError(f"{text!r} is not {how}{', '.join(recipes.FORMATS)}")
    return name, source_spec(format, where)


def source_spec(format: str, where: str) -> SourceSpec:
    """Of a file, or of hub:ID[:PART[:SPLIT]], PART being the configuration or the files of a data set."""
    if not where.startswith("hub:"):
        return SourceSpec(format, files=(where,))
    _, hub, part, split = (where.split(":") + ["", ""])[:4]
    return SourceSpec(format, hub=hub, part=part, split=split or "train")


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


def parse_args() -> tuple[argparse.Namespace, dict[str, SourceSpec]]:
    """The flags, and the sources that they choose."""
    parser = files.ArgumentParser(prog="python -m data.prepare", description=__doc__)
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="folder of the public files, or of your own")
    add("--out", type=Path, required=True, metavar="DIR", help="folder for the shards")
    add("--corpus", choices=recipes.CORPORA, default="real", help="corpus to prepare (default real)")
    add("--sources", metavar="NAMES", help="some of its sources, comma-separated (default: all)")
    add("--source", type=own_source, action="append", metavar="NAME=FORMAT:FILE",
        help="source of your own in place of a corpus (repeat it): FORMAT text, qa, long_cot or chat; FILE "
        ".jsonl (.gz, .zst) or .parquet, * allowed, or hub:ID[:PART[:SPLIT]], PART a configuration or files")
    add("--add", type=own_source, metavar="NAME=FORMAT:FILE",
        help="such a source for the finished folder --out; FORMAT rollouts: rl.py's right responses")
    add("--columns", type=recipes.column_map, metavar="MAP",
        help="columns of other names than usual: problem=Q,answer=A of all sources, qa.problem=Q of one")
    add("--bad-rows", type=float, default=BAD_ROWS, metavar="SHARE",
        help="share of a source's rows that may be bad and are dropped (default %(default)s)")
    add("--tokenizer", metavar="FILE", help="tokenizer's file or folder (default: train one on the sources)")
    add("--vocab-size", type=int, default=4096, help="size of a tokenizer that is trained (default 4096)")
    add("--seq-len", type=int, default=256, help="length of packed rows, as in training (default 256)")
    add("--max-tokens", type=token_budgets, default={}, metavar="N",
        help="training tokens of each source, or NAME=N,NAME=N of some (default: all that are there)")
    add("--against", metavar="FILES", help="files of problems that are kept out, comma-separated, or none "
        "(default: gsm8k/test, math/test and eval/* of --data)")
    add("--keep-overlaps", nargs="?", const="all", default="", metavar="SOURCES",
        help="sources (default all) that keep what holds benchmarks' problems: do not evaluate on these")
    add("--workers", type=int, default=os.cpu_count(), help="processes that tokenise (default: one per core)")
    add("--check", action="store_true", help="read finished shards again and compare their checksums")
    args = parser.parse_args()
    if min(args.seq_len, args.vocab_size, args.workers) < 1:
        parser.error("--seq-len, --vocab-size and --workers must be at least 1")
    if not 0 <= args.bad_rows <= 1:
        parser.error(f"--bad-rows {args.bad_rows} is not a share, from 0 to 1")
    if args.add:
        if args.source or args.tokenizer:
            parser.error("--add uses the folder's tokenizer and adds one source: no --source or --tokenizer")
        args.source = [args.add]
    if args.source and args.sources:
        parser.error("--sources chooses among those of --corpus; with --source there are only your own")
    if args.data is None and args.corpus == "real" and not args.source:
        parser.error("--data DIR is needed: the folder of the public files (data/README.md)")
    specs = dict(args.source) if args.source else recipes.CORPORA[args.corpus]
    if args.source and len(specs) < len(args.source):
        parser.error("two --source have the same name")
    names = args.sources.split(",") if args.sources else list(specs)
    kept = list(specs) if args.keep_overlaps == "all" else args.keep_overlaps.split(",")
    for name in [*names, *filter(None, [*kept, *args.max_tokens])]:
        if name not in specs:
            parser.error(f"unknown source {name!r} (valid: {', '.join(specs)})")
    args.keep_overlaps = sorted(set(kept) & set(names))
    columns = recipes.columns_of(specs, args.columns)
    return args, {x: specs[x]._replace(columns=columns[x]) for x in names}


def main() -> None:
    args, specs = parse_args()
    budgets = {name: args.max_tokens.get(name, args.max_tokens.get("")) for name in specs}
    folder, keep = args.data or Path(), args.keep_overlaps
    hubs = {spec.hub for spec in specs.values() if HUB_ID.fullmatch(spec.hub) and not os.path.isdir(spec.hub)}
    revisions = pinned_revisions(args.out, sorted(hubs), args.add[0] if args.add else "")
    specs = {name: spec._replace(revision=revisions.get(spec.hub, "")) for name, spec in specs.items()}
    sources = {
        x: real_source(spec, folder, budgets[x], x in keep, args.bad_rows) for x, spec in specs.items()}
    paths, problems = benchmark_problems(args.against, args.data)
    made_of = {
        "sources": {name: [*spec[:5], *spec.columns] for name, spec in specs.items()},
        "files": {name: source.prints for name, source in sources.items()},
        "max_tokens": budgets, "keep_overlaps": keep,
        "against": hashlib.sha256("\0".join(problems).encode()).hexdigest()[:16] if problems else None,
    }
    made_of |= {"revisions": revisions} if revisions else {}
    tok = tokenizer.load(args.tokenizer) if args.tokenizer else None
    settings = {"corpus": "own" if args.source else args.corpus} | made_of
    settings["tokenizer"] = tok.hash if tok else f"trained, {args.vocab_size} words"
    if problems:
        print(f"kept out: {GRAM} words in a row of one of {len(problems):,} problems of {', '.join(paths)}")
        print(f"{Grams(problems).short:,} of these have fewer words: text that contains them is not found")
    else:
        print("no benchmark's problems are kept out of the text: name their files by --against")
    if args.add:
        index = add_source(args.out, *sources.popitem(), made_of, problems, args.workers)
    else:
        vocab = tok or args.vocab_size
        index = prepare(args.out, sources, vocab, args.seq_len, settings, problems, args.workers)
    read_index(args.out, check=args.check)
    for name, entry in index["sources"].items():
        train, val = (entry[split]["tokens"] - entry[split]["padding"] for split in ("train", "val"))
        said = f"{train:14,} tokens in {entry['train']['documents']:,} documents, {val:,} tokens held out"
        dropped = ", ".join(f"{n:,} {why}" for why, n in entry.get("dropped", {}).items())
        bad = f" (the first: {entry['first_bad_row']})" if "first_bad_row" in entry else ""
        print(f"{name:14} {said}{dropped and '; dropped: '}{dropped}{bad}")
    print(f"ready: {args.out}")


if __name__ == "__main__":
    files.run_cli(main)
