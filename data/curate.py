r"""A noisy crawl → a corpus like MegaMath-Web-Pro-Max (OctoThinker, arXiv 2506.20512, section 3).

    python -m data.curate --in 'crawl/*.jsonl' --labels labels.jsonl --out DIR --recall 0.9
    python -m data.curate --in hub:ID --score CKPT --refine CKPT --out DIR --recall 0.4
    python -m data.prepare --source curated=text:DIR/kept.jsonl.gz --out SHARDS

1. Label a few thousand documents: of use to somebody who studies mathematics, or not. Rows of yours say it,
   or a model gives points.
2. Classify: such a model is too slow for a crawl, so a linear one learns its judgement. Some of the labels
   choose the threshold that keeps --recall of what is of use; others measure what that does.
3. Refine: a model rewrites what is kept; where a number is lost or new, the old text stays.

DIR then holds kept.jsonl.gz, classifier.npz, curve.png and index.json, written last. Kill the command at any
moment: the same command goes on part by part and writes the same bytes, with any number of --workers.
"""

import argparse
import gzip
import itertools
import json
import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import classifier, files, prepare, recipes

# ---- 1. Label ----------------------------------------------------------------------------------------------

PARTS = "unfinished.parts"  # folder in OUT: what a killed command goes on from
WRITTEN = PARTS, "scored.jsonl", "classifier.npz", "curve.png", "kept.jsonl.gz"  # to OUT
ENOUGH, FEWEST = 3, 20  # points of 5 for what is of use (the paper's); labels of a kind for a threshold
SCORED_TOKENS, SCORE_BATCH = 1024, 8  # of a document that a model reads; documents in a file. Ours
POINTS = """Below is the beginning of a page of the web. How useful is it to somebody who studies mathematics?
0: no mathematics. 1: some numbers in passing. 2: mathematics, but broken, wrong or without context.
3: a definition, a problem or an explanation that one can follow. 4: it is clear and worked out step by step.
5: as good as a chapter of a textbook.\n\nPage:\n""", "\n\nPoints, one digit from 0 to 5:\n"


def read_labels(path: files.Path, spec: recipes.SourceSpec) -> tuple[list[str], np.ndarray]:
    """(texts, are they of use (n,) bool) of rows with "label", "useful" or "score", and spec's columns or a
    text; repeated texts are left out. ValueError for a row without these, and for too few of a kind."""
    labels: dict[str, bool] = {}
    for number, row in files.numbered_rows(path):
        try:
            labels.setdefault(*labelled(row, spec))
        except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
            raise ValueError(f"{path}, line {number}: {error.args[0]}") from None
    labels.pop("", None)
    texts, useful = [*labels], np.array([*labels.values()], bool)
    if min(useful.sum(), (~useful).sum()) < FEWEST:
        have = f"labels {useful.sum():,} documents as of use and {(~useful).sum():,} as of none"
        raise ValueError(f"{path} {have}: give it {FEWEST} of each at least, better a thousand")
    return texts, useful


def labelled(row: dict, spec: recipes.SourceSpec) -> tuple[str, bool]:
    try:
        text = recipes.FORMATS[spec.format](recipes.renamed(row, spec.columns))
    except KeyError:
        if "text" not in row:
            raise
        text = recipes.running_text({"text": row["text"]})  # not cut from the crawl, or what --score wrote
    for name, most, least in ("label", 1, 1), ("useful", 1, 1), ("score", 5, ENOUGH):
        if (value := row.get(name)) is not None:
            if not isinstance(value, (int, float)) or not 0 <= value <= most or value % 1 and most == 1:
                raise TypeError(f'"{name}" is {value!r}, not {"0 or 1" if most == 1 else "from 0 to 5"}')
            return text or "", value >= least
    raise KeyError('no label: give it "label" 0 or 1, "useful" true or false, or "score" 0 to 5')


def expected_points(model, tok, texts: Sequence[str]) -> list[float]:
    """The mean of 0 to 5 under the probabilities of these six digits as the next token."""
    import torch

    (before, after), digits = map(tok.encode, POINTS), [tok.encode(str(i)) for i in range(6)]
    room = min(SCORED_TOKENS, model.config.max_position - len(before + after))
    if room < 1 or max(map(len, digits)) > 1:
        raise ValueError("--score: the prompt does not fit this model, or digits are no tokens of it")
    prompts = [torch.tensor(before + tok.encode(text[: 16 * room])[:room] + after) for text in texts]
    tokens = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True).to(model.embed.weight.device)
    with torch.inference_mode():
        h = model.hidden(tokens)[range(len(prompts)), [len(prompt) - 1 for prompt in prompts]]  # (b, hidden)
        probs = model.logits(h)[:, sum(digits, [])].softmax(-1)  # (b, 6)
        return (probs @ torch.arange(6.0, device=probs.device)).tolist()


def score_sample(source: prepare.Source, n: int, checkpoint: str, out: Path) -> Path:
    """Write points for n documents, any of the source as likely as another (reservoir sampling)."""
    path, rng, texts, rows = out / "scored.jsonl", random.Random(0), [], []
    if path.exists():
        return path
    for i, text in enumerate(filter(None, tqdm(source.read(), desc="sample", disable=None))):
        if (place := i if i < n else rng.randrange(i + 1)) < n:  # half a character cannot be written
            texts[place : place + 1] = [text.encode("utf-8", "replace").decode()]
    (out / PARTS).mkdir(exist_ok=True)
    sampler = load(checkpoint)
    for i in tqdm(range(0, len(texts), SCORE_BATCH), desc="score", disable=None):
        if not (part := out / PARTS / f"points-{i:06d}.jsonl").exists():
            points = expected_points(sampler.model, sampler.tokenizer, few := texts[i : i + SCORE_BATCH])
            files.write_jsonl(part, ({"text": text, "score": score} for text, score in zip(few, points)))
        rows += files.read_jsonl(part)
    files.write_jsonl(path, rows)
    return path


def load(checkpoint: str):
    from sample import Sampler, load_model, pick_device

    return Sampler(*load_model(files.find_checkpoint(checkpoint), str(pick_device())))


# ---- 2. Classify, by data/classifier.py, part by part ------------------------------------------------------

PART_CHARACTERS = 1 << 23  # of text in a part: a second of work
_tools: dict = {}  # of this process, for classify(): the model, and "parts", its folder


def classify(part: tuple[int, list[str | prepare.Dropped]]) -> dict:
    """Write what is kept of a part, unless it is there → its counts."""
    number, documents = part
    path = _tools["parts"] / f"{number:06d}"
    if made := files.read_json(f"{path}.json", missing_ok=True):
        return made
    texts, dropped = [*filter(None, documents)], [text for text in documents if not text]
    kept = [*itertools.compress(texts, classifier.scores(_tools, texts) >= _tools["threshold"])]
    counts = {"read": len(documents), "kept": len(kept), "below the threshold": len(texts) - len(kept)}
    errors = [row.error for row in dropped if row.error][:1]
    return write_part(path, kept, {"first_bad_row": errors, **counts, **Counter(row.why for row in dropped)})


def write_part(path: Path, texts: Sequence[str], counts: dict) -> dict:
    """PATH.jsonl.gz, and last PATH.json, which says that it is whole."""
    rows = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    with files.atomic_write(f"{path}.jsonl.gz", "wb") as file:
        file.write(gzip.compress(rows.encode("utf-8", "replace"), 3, mtime=0))
    files.write_json(f"{path}.json", counts)
    return counts


def begin(out: Path) -> None:
    with np.load(out / "classifier.npz") as model:
        _tools.update(model, parts=out / PARTS)
    _tools["parts"].mkdir(exist_ok=True)


def classify_all(source: prepare.Source, out: Path, workers: int) -> list[dict]:
    """The counts of all parts."""
    begin(out)
    with tqdm(desc="classify", total=source.size or None, unit="B", unit_scale=True, disable=None) as bar:
        parts = enumerate(prepare.in_chunks(source.read(bar.update), PART_CHARACTERS))
        parts = ((i, [] if (out / PARTS / f"{i:06d}.json").exists() else texts) for i, texts in parts)
        with prepare.worker_pool(workers, begin, out) as pool:
            return list(prepare.in_order(classify, parts, pool, workers, "goes on"))


# ---- 3. Refine ---------------------------------------------------------------------------------------------

REFINED_TOKENS, REFINE_BATCH = 4096, 256  # a longer document stays as it is; documents between two files
REWRITE = """Rewrite the text below, a page of the web, for somebody who studies mathematics. Leave out menus,
advertisements and whatever else is not its subject; mend broken lines and formulas. Keep every fact, number
and step, in this order, add nothing, and make it about as long as it is.

<text>\n""", "\n</text>\n\n<rewritten>\n"
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")


def rewritten(texts: Sequence[str], sampler) -> list[tuple[str, str]]:
    """(text, "") or (the old text, why it is not rewritten) of each; greedy, a quarter longer at most."""
    tok, found = sampler.tokenizer, [(text, "too long to rewrite") for text in texts]
    before, after = map(tok.encode, REWRITE)
    room = min(REFINED_TOKENS, (sampler.model.config.max_position - len(before + after)) * 4 // 9)
    ids = {i: tok.encode(text) for i, text in enumerate(texts) if len(text) < 16 * REFINED_TOKENS}
    ids = {i: tokens for i, tokens in ids.items() if len(tokens) <= room}
    most = [len(tokens) * 5 // 4 + 1 for tokens in ids.values()]
    groups = sampler.generate([before + tokens + after for tokens in ids.values()], max_new_tokens=most,
                              temperature=0.0, stop=(*tok.stop_ids, "</rewritten>"))
    for i, (new,) in zip(ids, groups):
        text = new.text.strip()
        old, now = (Counter(NUMBER.findall(x)) for x in (texts[i], text))
        wrong = {"rewritten to nothing or without end": new.finish_reason == "length" or not text,
                 "rewritten without a number": old - now, "rewritten with a new number": now.keys() - old}
        why = next((why for why, so in wrong.items() if so), "")
        found[i] = (texts[i] if why else text, why)
    return found


def refine(kept: Iterator[str], total: int, checkpoint: str, out: Path) -> list[dict]:
    """Rewrite all that was kept → {"rewritten": n, why another is not: n} of each file."""
    sampler, made = None, []
    with tqdm(desc="refine", total=total, unit="doc", disable=None) as bar:
        while texts := list(itertools.islice(kept, REFINE_BATCH)):
            path = out / PARTS / f"refined-{len(made):06d}"
            if (counts := files.read_json(f"{path}.json", missing_ok=True)) is None:
                sampler = sampler or load(checkpoint)
                new, whys = zip(*rewritten(texts, sampler))
                counts = write_part(path, new, Counter(why or "rewritten" for why in whys))
            made.append(counts)
            bar.update(len(texts))
    return made


# ---- Command line ------------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = files.ArgumentParser(prog="python -m data.curate", description=__doc__)
    add = parser.add_argument
    add("--in", dest="pages", nargs="+", required=True, metavar="FILE",
        help="documents, as data.prepare reads them: files, * allowed, or a hub:ID[:PART[:SPLIT]]")
    add("--format", choices=recipes.FORMATS, default="text", help="of their rows (default text)")
    add("--columns", type=recipes.column_map, metavar="MAP", help="columns of other names: text=body")
    add("--bad-rows", type=float, default=prepare.BAD_ROWS, metavar="SHARE",
        help="share of the rows that may be bad and are dropped (default %(default)s)")
    who = parser.add_mutually_exclusive_group(required=True).add_argument
    who("--labels", metavar="FILE", help='such rows or texts with "label" 0 or 1, "useful" or "score" 0 to 5')
    who("--score", metavar="CKPT", help="in their place a model, which gives points (OUT/scored.jsonl)")
    add("--sample", type=int, default=3000, metavar="N", help="to how many documents (default 3000)")
    add("--out", type=Path, required=True, metavar="DIR", help="folder of the corpus")
    add("--recall", type=float, default=0.4, metavar="SHARE", help="of useful pages to keep (default 0.4)")
    add("--refine", metavar="CKPT", help="model that rewrites what is kept")
    add("--workers", type=int, default=os.cpu_count(), help="processes that classify (default: one per core)")
    args = parser.parse_args()
    if not 0 < args.recall <= 1 or not 0 <= args.bad_rows <= 1 or min(args.workers, args.sample) < 1:
        parser.error("--recall and --bad-rows are shares, up to 1; --workers and --sample are at least 1")
    if len(args.pages) > 1 and any(name.startswith("hub:") for name in args.pages):
        parser.error("--in takes files, or one data set of the hub")
    if args.labels and not os.path.isfile(args.labels):
        parser.error(f"no file {args.labels}: --labels takes rows with a text and a label")
    return args


def source_of(args) -> tuple[recipes.SourceSpec, prepare.Source, dict]:
    """(what --in names, the same to be read, all settings that decide the corpus)"""
    spec, revisions = prepare.source_spec(args.format, args.pages[0]), {}
    if spec.hub and not os.path.isdir(spec.hub):
        revisions = prepare.pinned_revisions(args.out, [spec.hub])
    spec = spec._replace(files=() if spec.hub else tuple(args.pages), revision=revisions.get(spec.hub, ""),
                         columns=recipes.columns_of(["in"], args.columns)["in"])
    source = prepare.real_source(spec, Path(), None, False, args.bad_rows)
    own = [(args.out / name).resolve() for name in WRITTEN]
    for name in filter(os.path.exists, [*prepare.source_files(spec, Path()), spec.hub, args.labels or ""]):
        path = Path(name).resolve()
        if any(path == x or path in x.parents or x in path.parents for x in own):
            raise ValueError(f"{name} is, or holds, what is written to {args.out}: use another --out")
    settings = {"in": [*spec[:5], *spec.columns], "files": source.prints, "revisions": revisions,
                "recall": args.recall, "bad_rows": args.bad_rows,
                "labels": prepare.fingerprint(args.labels)[0] if args.labels else args.sample}
    for name in filter(vars(args).get, ("score", "refine")):
        path = files.find_checkpoint(getattr(args, name))
        settings[name] = [os.path.realpath(path), os.path.getmtime(os.path.join(path, "config.json"))]
    return spec, source, settings


def curate(args, spec: recipes.SourceSpec, source: prepare.Source, settings: dict) -> None:
    """All chapters, up to the index."""
    out, labels = args.out, read_labels(args.labels, spec) if args.labels else None
    if next(filter(None, source.read()), None) is None:  # said before the work, as what is wrong with labels
        raise ValueError(f"no documents in {' '.join(args.pages)}: --columns gives columns their names")
    with files.run_lock(out):
        if begun := files.read_json(out / "unfinished.json", missing_ok=True):
            files.check_same_settings(out, begun.get("settings", {}), settings)
        elif found := ", ".join(name for name in WRITTEN if (out / name).exists()):
            raise ValueError(f"{out} has {found} and no index.json: delete them, or use another --out")
        files.write_json(out / "unfinished.json", {"settings": settings})
        if not (out / "classifier.npz").exists():
            labels = labels or read_labels(score_sample(source, args.sample, args.score, out), spec)
            classifier.train(*labels, args.recall, out)
        made = classify_all(source, out, args.workers)
        errors = sum((part.pop("first_bad_row") for part in made), [])[:1]
        counts, parts, prefix = sum(map(Counter, made), Counter(kept=0)), out / PARTS, ""
        if args.refine:
            kept = (x["text"] for i in range(len(made)) for x in files.read_jsonl(f"{parts}/{i:06}.jsonl.gz"))
            made, prefix = refine(kept, counts["kept"], args.refine, out), "refined-"
            counts = sum(map(Counter, made), counts)
        with files.atomic_write(out / "kept.jsonl.gz", "wb") as whole:
            for i in range(len(made)):  # compressed files behind one another are one
                whole.write((parts / f"{prefix}{i:06d}.jsonl.gz").read_bytes())
        index = {"settings": settings, "threshold": float(_tools["threshold"]), "counts": counts,
                 "measured": json.loads(str(_tools["measured"])), "first_bad_row": errors}
        files.write_json(out / "unfinished.json", index)
        os.replace(out / "unfinished.json", out / "index.json")
        shutil.rmtree(parts, ignore_errors=True)


def main() -> None:
    args = parse_args()
    spec, source, settings = source_of(args)
    if not (args.out / "index.json").exists():
        curate(args, spec, source, settings)
    index = files.read_json(args.out / "index.json")
    files.check_same_settings(args.out, index.get("settings", {}), settings)
    print(f"on {index['measured'].pop('measured_on'):,} labels held out, with 95 % intervals:")
    for name in "precision", "recall":
        print("{} {:.3f} ({:.3f} to {:.3f})".format(name, *index["measured"][name]))
    counts = ", ".join(f"{n:,} {why}" for why, n in index["counts"].items())
    print(counts, *index["first_bad_row"], sep="\nfirst bad row: ")
    print(f"ready: {args.out}/kept.jsonl.gz")


if __name__ == "__main__":
    files.run_cli(main)
