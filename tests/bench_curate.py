"""Curating pages whose labels are known: precision, recall, speed, memory.

    python tests/bench_curate.py            # generated pages: 40,000, with 3,000 labels of another seed
    python tests/bench_curate.py DIR        # public files (data/README.md)

DIR: OpenStax mathematics against OpenStax's other subjects are the labels; what is curated is books,
PlanetMath and StackMathQA mixed with public-domain texts and Dolly's answers, of which no text is among the
labels. Speed is of one worker, reading and writing included, training left out (CPU seconds).
"""

import gzip
import itertools
import json
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import curate, files, prepare, recipes, synth
from verify import wilson

MATHS, OTHER = ("math_text/openstax.jsonl.gz",), ("general_text/openstax_general.jsonl.gz",)
TEST = {
    True: ("math_text/books.jsonl.gz", "math_text/planetmath.jsonl.gz", "math_text/stackmathqa_part.jsonl"),
    False: ("general_text/public_domain.jsonl.gz", "instruct/dolly.jsonl.gz")}


def rows_of(folder: Path, useful: bool, names: tuple[str, ...]) -> list[dict]:
    """{"text", "useful", "from"} of all rows of these files."""
    found = []
    for name in names:
        for row in files.read_jsonl(folder / name):
            text = "\n".join(filter(None, map(row.get, ("instruction", "context", "response"))))
            text = text or recipes.running_text(row)
            found.append({"text": text, "useful": useful, "from": name})
    return found


def pages(folder: Path | None, temporary: Path) -> tuple[Path, Path]:
    """Files of (labels, what is to be curated)."""
    labels, crawl = temporary / "labels.jsonl", temporary / "crawl.jsonl"
    if folder is None:
        for path, n, seed in ((labels, 3000, 1), (crawl, 40_000, 0)):
            rows = itertools.islice(synth.labelled_pages(seed), n)
            files.write_jsonl(path, (row | {"from": str(row["useful"])} for row in rows))
        return labels, crawl
    files.write_jsonl(labels, rows_of(folder, True, MATHS) + rows_of(folder, False, OTHER))
    mixed = [row for useful, names in TEST.items() for row in rows_of(folder, useful, names)]
    random.Random(0).shuffle(mixed)
    known = {row["text"] for row in files.read_jsonl(labels)}
    files.write_jsonl(crawl, (row for row in mixed if row["text"] not in known))
    return labels, crawl


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        temporary = Path(name)
        labels, crawl = pages(Path(sys.argv[1]) if sys.argv[1:] else None, temporary)
        out = temporary / "out"
        flags = ["--in", str(crawl), "--labels", str(labels), "--out", str(out), "--recall", "0.9"]
        sys.argv = ["curate", *flags, "--workers", "1"]
        curate.main()
        rows, kept = list(files.read_jsonl(crawl)), Counter()
        with gzip.open(out / "kept.jsonl.gz", "rt") as file:
            left = Counter(json.loads(line)["text"] for line in file)
        for row in rows:
            kept[row["from"], row["useful"]] += row["text"] in left
        of_use = sum(row["useful"] for row in rows)
        hits, total = sum(n for (_, useful), n in kept.items() if useful), sum(kept.values())
        for what, n in ("precision", total), ("recall", of_use):
            print("of all pages: {} {:.3f} ({:.3f} to {:.3f})".format(what, hits / n, *wilson(hits, n)))
        count = Counter(row["from"] for row in rows)
        print("kept:", ", ".join(f"{n:,} of {count[source]:,} {source}" for (source, _), n in kept.items()))
        (again := temporary / "again").mkdir()
        (again / "classifier.npz").write_bytes((out / "classifier.npz").read_bytes())
        source = prepare.real_source(prepare.source_spec("text", str(crawl)), Path(), None, False)
        start = time.process_time()
        curate.classify_all(source, again, 1)
        took, characters = time.process_time() - start, sum(len(row["text"]) for row in rows)
        print(f"{len(rows) / took:,.0f} documents/s, {characters / len(rows):,.0f} characters each")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(f"peak memory of this program, which holds all pages: {peak:,.0f} MiB")


if __name__ == "__main__":
    main()
