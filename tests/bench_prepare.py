"""Preparing data beside tiktoken alone, one process, CPU seconds.

    python tests/bench_prepare.py [DIR [TOKENIZER]]

DIR: the public files (data/README.md); without it, documents of the generated corpus as JSON lines.
TOKENIZER: a tiktoken file, Llama 3's say; without it, one of 4,096 words is trained. Prints what the command
costs with all it does (reading, formats, benchmark problems, duplicates, packing, shards, checksums), and
what encode_ordinary() costs.
"""

import itertools
import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import tiktoken

sys.path.insert(0, str(Path(__file__).parents[1]))

from data import overlaps, prepare, recipes, synth, tokenizer


def generated(folder: Path) -> dict[str, recipes.SourceSpec]:
    for name in ("web", "long_cot"):
        with open(folder / f"{name}.jsonl", "w") as f:
            for text in itertools.islice(synth.documents(name, 0, "train"), 60_000):
                f.write(json.dumps({"text": text}) + "\n")
    with open(folder / "test.jsonl", "w") as f:
        f.writelines(json.dumps(problem) + "\n" for problem in synth.problems("test", 500))
    return {name: recipes.SourceSpec("text", (f"{name}.jsonl",)) for name in ("web", "long_cot")}


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        given = [Path(word) for word in sys.argv[1:]]
        folder, out = given[0] if given else Path(temporary), Path(temporary) / "out"
        specs = {name: recipes.REAL_SOURCES[name] for name in ("math_text", "short_cot", "instruct")}
        specs = specs if given else generated(folder)
        sources = {name: prepare.real_source(spec, folder, None, False) for name, spec in specs.items()}
        _, problems = overlaps.benchmark_problems(None if given else str(folder / "test.jsonl"), folder)
        tok = tokenizer.load(given[1]) if given[1:] else prepare.train_tokenizer(sources, 4096)
        start = time.process_time()
        index = prepare.prepare(out, sources, tok, 1024, {"corpus": "own"}, problems)
        ours = time.process_time() - start
        texts = [text for source in sources.values() for text in source.read() if text]
        start = time.process_time()
        tokens = sum(len(tok.encoding.encode_ordinary(text)) for text in texts)
        alone = time.process_time() - start
    print(f"tiktoken {tiktoken.__version__}, Python {platform.python_version()}, {len(texts):,} documents")
    print(f"tiktoken alone  {tokens / alone:12,.0f} tokens/s, {alone:.1f} s for {tokens:,} tokens")
    print(f"data.prepare    {tokens / ours:12,.0f} tokens/s, {ours:.1f} s, {ours / alone:.2f} times as long")
    dropped = {name: entry.get("dropped", {}) for name, entry in index["sources"].items()}
    print(f"against {len(problems):,} problems; dropped: {dropped}")


if __name__ == "__main__":
    main()
