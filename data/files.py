"""Files and command lines, once for everybody: atomic writes, JSON, whole checkpoints, the lock on a folder,
the comparison of settings, and what all programs do with bad input and Ctrl-C. Nothing heavy is imported."""

import argparse
import contextlib
import errno
import functools
import gzip
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NoReturn

try:
    import fcntl
except ImportError:  # Windows: nothing keeps two programs out of one folder there
    fcntl = None

Path = str | os.PathLike
BLANK = b"\xef\xbb\xbf \t\r\n"  # what may stand before a row: a byte-order mark, white space

# ---- Reading and writing -----------------------------------------------------------------------------------


@contextlib.contextmanager
def atomic_write(path: Path, mode: str = "w"):
    """An open file that becomes `path` at the end: readers find the old content or the new, never a part."""
    aside = f"{path}.tmp"
    try:
        with open(aside, mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())  # else a machine that crashes may keep the name and lose the content
        os.replace(aside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(aside)  # what a failure leaves, a full disk first of all
        raise


def write_text(path: Path, text: str) -> None:
    """The text and a final line break; an empty text is an empty file."""
    with atomic_write(path) as file:
        file.write(text + "\n" * (text != ""))


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1))


def write_jsonl(path: Path, rows: Iterable[dict]) -> None:
    with atomic_write(path) as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_json(path: Path, missing_ok: bool = False) -> dict | None:
    """The object in a JSON file; None for no file if missing_ok. Other errors name the file."""
    try:
        with open(path, encoding="utf-8") as file:
            value = json.load(file)
    except FileNotFoundError:
        if missing_ok:
            return None
        raise FileNotFoundError(f"{path} not found") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: not JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} is damaged: no JSON object")
    return value


def numbered_rows(path: Path, count: Callable[[int], None] = lambda size: None, broken_ok=False) -> Iterator:
    """(line or row number, row) of a file or URL: JSON lines (also .gz, .zst), a JSON array, or .parquet.
    Empty lines and byte-order marks are nothing. count: is told the bytes of each line. A row that is no
    JSON object is a ValueError that names it, or with broken_ok a row None; a truncated file is a ValueError,
    no such file a FileNotFoundError."""
    number = 0
    try:
        with _open(str(path)) as file:
            rows = _parquet_rows(file) if str(path).endswith(".parquet") else _lines_or_array(file)
            for number, row in enumerate(rows, 1):  # noqa: B007 (the error names it)
                if isinstance(row, bytes):
                    if not (line := row.lstrip(BLANK)):
                        continue
                    count(len(line))
                    with contextlib.suppress(ValueError, RecursionError):
                        row = json.loads(line.decode())
                if not isinstance(row, dict) and not broken_ok:
                    raise ValueError
                yield number, row if isinstance(row, dict) else None
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file (public ones: data/README.md)") from None
    except (ValueError, TypeError, EOFError, RecursionError, OSError, zlib.error) as error:
        if getattr(error, "errno", None):  # the system's: no permission, say
            raise
        what = "not a parquet file" if str(path).endswith(".parquet") else "not one JSON object in UTF-8"
        raise ValueError(f"{path}, line {number}: {what}, or truncated") from None


def _lines_or_array(file) -> Iterable:
    """Its lines, as bytes; or, if all of it is a JSON array, what that holds."""
    head = file.readline().lstrip(BLANK)
    if head[:1] != b"[":
        return itertools.chain([head], file)
    body = file.read()
    try:
        return json.loads(head + body)
    except ValueError:
        json.loads(head)  # a row that is a list; else the array is truncated
        return [head, *body.splitlines()]


def _open(path: str):
    """A file's bytes, unpacked."""
    if "://" in path:
        import fsspec

        file = fsspec.open(path).open()
    else:
        file = open(path, "rb")
    if path.endswith(".gz"):
        return io.BufferedReader(gzip.GzipFile(fileobj=file), 1 << 20)
    if path.endswith(".zst"):
        import pyarrow  # unlike zstandard's reader it notices a truncated file

        return io.BufferedReader(pyarrow.CompressedInputStream(file, "zstd"), 1 << 20)
    return file


def _parquet_rows(file) -> Iterator[dict]:
    """Of every file by itself: its columns need not be those of its neighbours."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file, buffer_size=1 << 20) as table:
        for batch in table.iter_batches(64):
            yield from batch.to_pylist()


def read_jsonl(path: Path) -> Iterator[dict]:
    """The rows alone."""
    return (row for _, row in numbered_rows(path))


# ------------------------------------------------------------------------------------------------------------
# Checkpoints: RUN/checkpoints/step_000123, whose meta.json has size and SHA-256 of every other file


def file_hash(path: Path, skip: int = 0) -> str:
    """Hex SHA-256 of a file without its first `skip` bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        file.seek(skip)
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


KNOWN: dict[tuple[str, int], str] = {}  # checksums that other ranks have computed, by path and time of change


def file_hashes(paths: Sequence[str]) -> list[str]:
    """Several at once: hashing leaves Python's lock, and a checkpoint has a file for each rank."""
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda p: KNOWN.get((p, os.stat(p).st_mtime_ns)) or file_hash(p), paths))


def sync(folder: str) -> None:
    """Wait until all that is in a folder is on the disk, names and contents."""
    for root, _, names in os.walk(folder):
        for path in [*(os.path.join(root, name) for name in names), root]:
            with contextlib.suppress(PermissionError):  # Windows opens no folder
                file = os.open(path, os.O_RDONLY)
                os.fsync(file)
                os.close(file)


def remove(path: str) -> None:
    """A folder, or the link to one: what is behind the link stays."""
    os.unlink(path) if os.path.islink(path) else shutil.rmtree(path)


def checkpoints(run_dir: str) -> list[str]:
    """The checkpoints of a run, whole or not, newest first."""
    folder = os.path.join(run_dir, "checkpoints")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    steps = [int(name[5:]) for name in names if name.startswith("step_") and name[5:].isdigit()]
    return [os.path.join(folder, f"step_{step:06d}") for step in sorted(steps, reverse=True)]


def latest_checkpoint(run_dir: str) -> str | None:
    """The newest whole checkpoint of a run, or None. Every program takes this one."""
    for path in checkpoints(run_dir):
        if is_whole(path):
            return path
        print0_once(f"{path} is damaged: passed over")
    return None


def is_whole(path: str, state: bool = True) -> bool:
    """Do a checkpoint's files have the sizes and checksums they were written with? state: that part too?"""
    try:
        meta = read_json(os.path.join(path, "meta.json"))
        names = [name for name in meta["files"] if state or not name.startswith("state")]
        files, sums = tuple(os.path.join(path, name) for name in names), tuple(map(meta["sha256"].get, names))
        modified = tuple(os.stat(file).st_mtime_ns for file in files)
        return _matches(files, tuple(map(meta["files"].get, names)), sums, modified)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


@functools.cache  # a program asks several times, and a large checkpoint takes seconds to read
def _matches(files: tuple[str, ...], sizes: tuple, sums: tuple, _modified: tuple) -> bool:
    return tuple(map(os.path.getsize, files)) == sizes and tuple(file_hashes(files)) == sums


def find_checkpoint(path: str) -> str:
    """What --ckpt means: a checkpoint's folder, ours or Hugging Face's, or a run's, for its newest whole one,
    or RUN@STEP, or of an RL run RUN@best. FileNotFoundError if there is none; ValueError if the one that is
    named is damaged."""
    run_dir, _, step = path.rpartition("@")
    if step == "best" and os.path.isfile(best := os.path.join(run_dir, "checkpoints", "best")):
        with open(best, encoding="utf-8") as file:
            step = file.read().strip().removeprefix("step_")
    if step.isdigit() and os.path.isdir(run_dir) and not os.path.isdir(path):
        path = os.path.join(run_dir, "checkpoints", f"step_{int(step):06d}")
        if not os.path.isdir(path):
            kept = ", ".join(str(int(name[-6:])) for name in reversed(checkpoints(run_dir)))
            raise FileNotFoundError(f"{run_dir} has no checkpoint of step {step}; it has: {kept or 'none'}")
    if not os.path.isdir(path):
        raise FileNotFoundError(f"{path} is not a folder: give a run's, as runs/tiny/long, or a checkpoint's")
    parent, name = os.path.split(os.path.abspath(path))
    run_dir = parent if name == "checkpoints" else path
    if found := latest_checkpoint(run_dir):
        return found
    if checkpoints(run_dir):
        raise FileNotFoundError(f"no whole checkpoint in {path}: all of them are damaged")
    in_state = not weight_files(path)
    meta = read_json(os.path.join(path, "meta.json"), missing_ok=True) or {}  # none of Hugging Face's has one
    if "files" in meta and not is_whole(path, in_state):
        raise ValueError(f"{path} is damaged: give another one, or its run's folder for the newest whole one")
    return path


INDEX = "model.safetensors.index.json"


def weight_files(path: str) -> dict[str, set | None]:
    """A checkpoint's safetensors files and the tensors to read from each, None for all: what an index names,
    else model.safetensors, else all of them but Meta's own format. {}: only state/ has the weights."""
    names, index = os.listdir(path), read_json(os.path.join(path, INDEX), missing_ok=True)
    found = ["model.safetensors"] if "model.safetensors" in names else sorted(
        name for name in names if name.endswith(".safetensors") and not name.startswith("consolidated"))
    if index:
        if not isinstance(tensors := index.get("weight_map"), dict) or not tensors:
            raise ValueError(f"{path}/{INDEX} is damaged: no weight_map")
        if missing := {*tensors.values()} - {*names}:
            raise FileNotFoundError(f"{path} lacks {min(missing)}, which its {INDEX} names")
        return {file: {name for name in tensors if tensors[name] == file} for file in tensors.values()}
    if not found and not os.path.exists(os.path.join(path, "state", ".metadata")):
        weights = re.compile(r"pytorch_model.*\.bin|.*\.(pth|safetensors)")
        if other := list(filter(weights.fullmatch, sorted(names))):
            how = "save_pretrained(), or convert_llama_weights_to_hf.py for Meta's own format"
            raise ValueError(f"{path} has only {other[0]}: convert it to safetensors, by transformers' {how}")
        raise FileNotFoundError(f"no checkpoint in {path}: it has neither checkpoints/ nor *.safetensors")
    return dict.fromkeys(found)


# ---- Folders: one program at a time, and always with the same settings -------------------------------------


@contextlib.contextmanager
def run_lock(folder: Path, wait: float = 0.0):
    """Nobody else works in this folder meanwhile; a killed process lets go of it. ValueError if another still
    works there after `wait` seconds."""
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "lock"), "a+") as file:
        end = time.monotonic() + wait
        while fcntl and (owner := _owner_if_busy(file)):
            busy = f"process {owner} is working in {folder}"
            if time.monotonic() > end:
                raise ValueError(f"{busy}: wait for its end, or use another --out")
            print0_once(f"waiting: {busy}")
            time.sleep(0.2)
        file.truncate(0)
        print(os.getpid(), file=file, flush=True)
        try:
            yield
        finally:
            file.truncate(0)  # a finished folder tells nothing of the process that made it


def _owner_if_busy(file) -> str:
    """Try to lock → the process that has the lock; "" if that is ours now, or if there are no locks here."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        return file.read().strip() or "unknown"
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        print0_once(f"no locks on the file system of {file.name}: keep a second run out of it yourself")
    return ""


def differences(old: dict, new: dict) -> str:
    """What differs between nested dicts: "lr 0.1 → 0.2; model.num_layers 4 → 2"; "" if nothing does."""
    changed = []
    for key in old | new:
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            changed += [f"{key}.{part}" for part in differences(a, b).split("; ") if part]
        elif a != b:
            changed.append(f"{key} {a} → {b}")
    return "; ".join(changed)


def check_same_settings(made: Path, old: dict, new: dict) -> None:
    """ValueError that names what differs, if `made` was made with other settings. old: as read from JSON."""
    if changed := differences(old, json.loads(json.dumps(new))):
        raise ValueError(f"{made} was made with other settings ({changed}): use another --out, or delete it")


# ---- Programs ----------------------------------------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are one line; an unknown flag gets the valid ones named. Only rank 0 speaks."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments"):
            flags = sorted(s for a in self._actions for s in a.option_strings if s.startswith("--"))
            message += f" (valid flags: {' '.join(flags)})"
        self.exit(2, f"{self.prog}: error: {message}\n" if is_rank0() else None)


def plain_name(text: str) -> str:
    """What may name a run: a folder of one level."""
    if not re.fullmatch(r"\w[\w.-]*", text) or text.startswith("rl-") or text == "data":
        how = "letters, digits, _ . and -, not data or rl-…"
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a run: {how}")
    return text


def is_rank0() -> bool:
    """Of the processes that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def print0(text: str) -> None:
    """Print on rank 0."""
    if is_rank0():
        print(text, flush=True)


print0_once = functools.cache(print0)


def run_cli(main: Callable[[], None]) -> NoReturn:
    """Run a program's main(). Ctrl-C becomes exit code 130. Bad input (a wrong flag, file or shape, a full
    disk) is reported by ValueError and OSError and becomes one line that says what to do and exit code 2;
    OCTO_TRACEBACK=1 shows where it was raised."""
    try:
        main()
        sys.exit(0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        if os.environ.get("OCTO_TRACEBACK"):
            raise
        text = " ".join(str(error).split()) or type(error).__name__
        print(f"{os.path.basename(sys.argv[0])}: error: {text}", file=sys.stderr)
        sys.exit(2)
