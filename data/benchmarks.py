r"""The paper's thirteen benchmarks (arXiv 2506.20512, appendix), AIME 2024 and the generated world's test problems.

Each is read from a file in the layout of the README, rows {"problem", "answer", ...}, or, where its set on the Hugging Face
hub is known to us, from there. `shots` says which of the solved examples of prompts.py lead the question, and how many the
paper gives.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from data import prompts, recipes
from data.files import read_jsonl


class Hub(NamedTuple):
    """Where a benchmark lies on the hub, and how a row of it becomes (problem, answer)."""

    corpus: recipes.SourceSpec
    row: Callable[[dict], tuple[str, str]]


class Benchmark(NamedTuple):
    file: str  # inside --data
    shots: str  # a key of prompts.SHOTS
    count: int  # of them, in the paper
    hub: Hub | None = None


def _hub(name: str, row: Callable[[dict], tuple[str, str]], part: str = "", split: str = "test") -> Hub:
    return Hub(recipes.SourceSpec("qa", hub=name, part=part, split=split), row)


def last_box(solution: str) -> str:
    r"""What stands in the last \boxed{}, braces counted; "" without one."""
    _, found, rest = solution.rpartition("\\boxed{")
    depth = 1
    for place, character in enumerate(rest if found else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:place]
    return ""


def _with_options(question: str, options: list[str], right: int) -> tuple[str, str]:
    letters = ", ".join(f"({letter}) {text}" for letter, text in zip("ABCDEFGH", options))
    return f"{question}\nWhat of the following is the right choice? Explain your answer.\n{letters}", "ABCDEFGH"[right]


BENCHMARKS = {
    "gsm8k": Benchmark("gsm8k/test.jsonl", "word", 8, _hub(
        "openai/gsm8k", lambda r: (r["question"], r["answer"].rpartition("####")[2].strip()), "main")),
    "math": Benchmark("math/test.jsonl", "math", 4, _hub(
        "DigitalLearningGmbH/MATH-lighteval", lambda r: (r["problem"], last_box(r["solution"])), "default")),
    "math500": Benchmark("eval/math500.jsonl", "math", 4, _hub(
        "HuggingFaceH4/MATH-500", lambda r: (r["problem"], r["answer"]))),
    "olympiadbench": Benchmark("eval/olympiadbench.jsonl", "math", 4, _hub(
        "Hothan/OlympiadBench", lambda r: (r["question"], ", ".join(r["final_answer"])), "OE_TO_maths_en_COMP", "train")),
    "amc23": Benchmark("eval/amc23.jsonl", "math", 0, _hub(
        "math-ai/amc23", lambda r: (r["question"], str(r["answer"])))),
    "sat_math": Benchmark("eval/sat_math.jsonl", "choice", 4),
    "ocwcourses": Benchmark("eval/ocwcourses.jsonl", "course", 4),
    "mmlu_stem": Benchmark("eval/mmlu_stem.jsonl", "choice", 4, _hub(
        "TIGER-Lab/MMLU-STEM", lambda r: _with_options(r["question"], r["choices"], r["answer"]))),
    "mathqa": Benchmark("eval/mathqa.jsonl", "choice", 4),
    "svamp": Benchmark("eval/svamp.jsonl", "word", 8, _hub(
        "ChilleD/SVAMP", lambda r: (f"{r['Body']} {r['Question']}", str(r["Answer"])))),
    "asdiv": Benchmark("eval/asdiv.jsonl", "word", 8, _hub(
        "EleutherAI/asdiv", lambda r: (f"{r['body']} {r['question']}", r["answer"].partition(" (")[0]), split="validation")),
    "mawps": Benchmark("eval/mawps.jsonl", "word", 8),
    "tabmwp": Benchmark("eval/tabmwp_test1k.jsonl", "table", 8),
    "aime24": Benchmark("eval/aime24.jsonl", "math", 0),
    "synth": Benchmark("", "word", 0),
}  # fmt: skip
PAPER = ("gsm8k", "math", "math500", "olympiadbench", "amc23", "sat_math", "ocwcourses", "mmlu_stem", "mathqa", "svamp",
         "asdiv", "mawps", "tabmwp")  # fmt: skip


def read(name: str, folder: str | None, limit: int | None, seed: int = 0) -> list[dict]:
    """Rows {"problem", "answer", ...} of a benchmark, at most `limit` (synth: 500 unless said)."""
    if name == "synth":
        from data import synth

        return synth.problems("test", limit or 500, seed)
    if name not in BENCHMARKS:
        raise ValueError(f"no benchmark {name!r} (valid: {', '.join(BENCHMARKS)}, or paper for its thirteen)")
    bench = BENCHMARKS[name]
    if folder is None and bench.hub is None:
        raise ValueError(f"where {name} lies on the hub is not known here: --data DIR reads DIR/{bench.file}")
    found = read_problems(Path(folder) / bench.file) if folder is not None else _from_hub(name, bench.hub)
    rows = [row for _, row in zip(range(limit or 1 << 60), found)]
    if not rows:
        raise ValueError(f"{bench.file} has no rows")
    return rows


def read_problems(path: Path) -> Iterator[dict]:
    """Rows of a file of JSON lines, "problem" and "answer" as text."""
    for number, row in enumerate(read_jsonl(path), 1):
        if not isinstance(row.get("problem"), str) or type(row.get("answer")) not in (str, int, float):
            raise ValueError(f'{path}:{number}: a row needs "problem" and "answer", as text')
        yield row | {"answer": str(row["answer"])}


def _from_hub(name: str, hub: Hub) -> Iterator[dict]:
    from data.prepare import corpus_rows

    for number, (where, row) in enumerate(corpus_rows(hub.corpus, Path(), 0, None), 1):
        try:
            problem, answer = hub.row(row)
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            has = ", ".join(row)
            raise ValueError(f"{where}: row {number} is not what {name} was: {error!r}; columns: {has}") from None
        yield {"problem": problem, "answer": answer, "id": f"{name}/{number - 1}"}


def prompt(name: str, problem: str, shots: int | None, template: str) -> str:
    """The text that is put before the model. shots: so many solved examples; None: as many as in the paper."""
    bench = BENCHMARKS[name]
    examples = prompts.SHOTS[bench.shots]
    wanted = bench.count if shots is None else shots
    if wanted > len(examples):
        raise ValueError(f"there are {len(examples)} solved examples in the style of {name}, not {wanted}")
    return prompts.few_shot(examples[:wanted], problem, template)


_OPTION = re.compile(r"\(([A-H])\)\s*(.*?)\s*(?=,?\s*\([A-H]\)|$)", re.DOTALL)


def options(row: dict) -> dict[str, str]:
    """{letter: text} of a row whose answer is a letter among those that its problem lists; {} for other rows."""
    if not re.fullmatch(r"[A-H]", row["answer"]):
        return {}
    found = dict(_OPTION.findall(row["problem"].rpartition("right choice?")[2]))
    if isinstance(row.get("choices"), list):
        found = dict(zip("ABCDEFGH", map(str, row["choices"])))
    return found if row["answer"] in found else {}


def seen_in_training(folder: str, name: str, rows: list[dict]) -> list[str]:
    """What is known of a stage's training that makes its score on these rows doubtful, a sentence each.

    folder: of the stage. An RL run's prompts are compared with the problems, text by text.
    """
    from data.files import read_json

    said, stage = [], Path(folder)
    config = read_json(stage / "config.json", missing_ok=True) or {}
    if isinstance(path := config.get("prompts"), str) and Path(path).is_file():
        trained = {_plain(str(row.get("problem", ""))) for row in read_jsonl(Path(path))}
        if same := sum(_plain(row["problem"]) in trained for row in rows):
            better = "; report math500 instead" if name == "math" else ""
            said.append(f"{same} of the {len(rows)} problems of {name} are among the prompts of its RL, {path}{better}")
    index = read_json(stage.parent / "data/index.json", missing_ok=True) or {}
    if kept := (index.get("settings") or {}).get("keep_overlaps"):
        said.append(
            f"its data kept answers to problems of benchmarks ({', '.join(kept)}, by --keep-overlaps): {name} may suffer"
        )
    return said


def _plain(problem: str) -> str:
    return "".join(problem.split()).lower()


def load_problems(source, data_dir=None, limit=None, seed=0):
    from data import prepare
    import os
    if source.startswith("hub:"):
        rows=[]
        for number, (what, row) in enumerate(prepare.corpus_rows(prepare.hub_corpus("qa", source[4:]), Path(), 0, None), 1):
            problem, answer = row.get("problem") or row.get("question"), row.get("answer")
            if answer is None:
                answer = last_box(str(row.get("solution")))
            is_text = type(answer) in (str, int, float)
            answer = str(answer).rpartition("####")[2].strip()
            if not isinstance(problem, str) or not answer or not is_text:
                raise ValueError(f"{what}: row {number} has no problem with an answer; its columns: {', '.join(row)}")
            rows.append({"problem": problem, "answer": answer})
        return rows
    if source in BENCHMARKS and not os.path.exists(source):
        return read(source, data_dir, limit, seed)
    rows = list(read_problems(Path(source)))
    if not rows: raise ValueError(f"{source} holds no problem")
    return rows
