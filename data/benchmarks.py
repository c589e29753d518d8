r"""Problems with answers: the paper's thirteen benchmarks (arXiv 2506.20512, appendix), AIME 2024, the test
problems of the generated corpus, own files, and data sets of the Hugging Face hub.

`load_problems` is the one door to all of them. A benchmark is read from a file in the layout of the README
or, where its set on the hub is known to us, from there.
"""

import os
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from data import prompts, recipes, synth
from data.files import numbered_rows, print0, read_json
from data.recipes import last_box


class Hub(NamedTuple):
    """Where problems lie on the hub, and how a row, of our names, becomes (problem, answer)."""
    spec: recipes.SourceSpec
    row: Callable[[dict], tuple[str, str]]


class Benchmark(NamedTuple):
    file: str  # inside --data
    shots: str  # the style of the solved examples before a question: a key of prompts.SHOTS
    count: int  # of solved examples in the paper
    hub: Hub | None = None


def _hub(name: str, row: Callable[[dict], tuple[str, str]], part: str = "", split: str = "test") -> Hub:
    return Hub(recipes.SourceSpec("qa", hub=name, part=part, split=split), row)


def _with_options(row: dict) -> tuple[str, str]:
    letters = ", ".join(f"({letter}) {text}" for letter, text in zip("ABCDEFGH", row["choices"]))
    task = "What of the following is the right choice? Explain your answer."
    return f"{row['question']}\n{task}\n{letters}", "ABCDEFGH"[row["answer"]]


def _usual_columns(row: dict) -> tuple[str, str]:
    return recipes.asked(row), recipes.solved(row)[1]


BENCHMARKS = {
    "gsm8k": Benchmark("gsm8k/test.jsonl", "word", 8, _hub("openai/gsm8k", _usual_columns, "main")),
    "math": Benchmark("math/test.jsonl", "math", 4, _hub("DigitalLearningGmbH/MATH-lighteval",
        lambda r: (r["problem"], last_box(r["solution"])), "default")),
    "math500": Benchmark("eval/math500.jsonl", "math", 4, _hub("HuggingFaceH4/MATH-500", _usual_columns)),
    "olympiadbench": Benchmark("eval/olympiadbench.jsonl", "math", 4, _hub("Hothan/OlympiadBench",
        lambda r: (r["question"], ", ".join(r["final_answer"])), "OE_TO_maths_en_COMP", "train")),
    "amc23": Benchmark("eval/amc23.jsonl", "math", 0, _hub("math-ai/amc23", _usual_columns)),
    "sat_math": Benchmark("eval/sat_math.jsonl", "choice", 4),
    "ocwcourses": Benchmark("eval/ocwcourses.jsonl", "course", 4),
    "mmlu_stem": Benchmark("eval/mmlu_stem.jsonl", "choice", 4, _hub("TIGER-Lab/MMLU-STEM", _with_options)),
    "mathqa": Benchmark("eval/mathqa.jsonl", "choice", 4),
    "svamp": Benchmark("eval/svamp.jsonl", "word", 8, _hub("ChilleD/SVAMP",
        lambda r: (f"{r['Body']} {r['Question']}", str(r["Answer"])))),
    "asdiv": Benchmark("eval/asdiv.jsonl", "word", 8, _hub("EleutherAI/asdiv",
        lambda r: (f"{r['body']} {r['question']}", r["answer"].partition(" (")[0]), split="validation")),
    "mawps": Benchmark("eval/mawps.jsonl", "word", 8),
    "tabmwp": Benchmark("eval/tabmwp_test1k.jsonl", "table", 8),
    "aime24": Benchmark("eval/aime24.jsonl", "math", 0),
    "math8k": Benchmark("math8k/train.jsonl", "math", 0, Hub(recipes.MATH8K, _usual_columns)),  # to train on
    "synth": Benchmark("", "word", 0),
}
THIRTEEN = tuple(name for name in BENCHMARKS if name not in ("aime24", "math8k", "synth"))


def load_problems(source: str, data_dir=None, limit=None, seed=0, columns=(), to_train=False) -> list[dict]:
    """Rows {"problem", "answer", ...}, both of them text, at most `limit`.

    source: a benchmark's name, a file, or hub:ID[:PART[:SPLIT]]; what is a name and a file is the file.
    data_dir: folder of the benchmarks' files; None: they come from the hub. columns: as in SourceSpec. Of a
    file or hub:… rows without an answer or marked as wrong are left out. to_train: so are bad rows, up to
    prepare.py's share; else the first is a ValueError: a benchmark of fewer items would be another benchmark.
    synth: problems of the generated corpus's test split, made from the seed, 500 if there is no limit."""
    from data import prepare

    bench, spec, pick = None, prepare.source_spec("qa", source), _usual_columns
    if not os.path.isfile(source) and (bench := BENCHMARKS.get(source)):
        if source == "synth":
            return synth.problems("test", limit or 500, seed)
        if data_dir is None and not bench.hub:
            raise ValueError(f"where {source} lies on the hub is not known here: "
                             f"--data DIR reads DIR/{bench.file}")
        spec, pick = bench.hub if data_dir is None else (spec, pick)
    if columns:
        spec, pick = spec._replace(columns=columns), _usual_columns

    def read(row: dict) -> dict | prepare.Dropped:
        problem, answer = pick(recipes.renamed(row, spec.columns))
        if not problem and not to_train:
            raise ValueError("its problem is empty")
        if not bench and not (problem and recipes.is_answer(answer)):
            return prepare.Dropped("without a problem or an answer")
        if not bench and not recipes.is_valid(row):
            return prepare.Dropped(prepare.INVALID)
        if re.search("[\ud800-\udfff]", problem + answer):  # it could not be written to a file again
            raise ValueError("it has half of a surrogate pair, which is no character")
        return ({} if spec.hub else row) | {"problem": problem, "answer": answer}

    path = str(Path(data_dir) / bench.file) if bench and data_dir is not None else source
    rows = prepare.source_rows(spec, broken_ok=True) if spec.hub else (
        (path, *place) for place in numbered_rows(path, broken_ok=True))
    problems, left_out, first, bad_rows = [], Counter(), "", prepare.BAD_ROWS * to_train
    for row in prepare.made_of(rows, read, "is no problem with an answer", bad_rows):
        if row:
            problems.append(row)
        else:
            left_out[row.why] += 1
            first = first or row.error
        if len(problems) == limit:
            break
    if left_out:
        why = ", ".join(f"{n:,} {why}" for why, n in left_out.items())
        print0(f"{source}: left out: {why}{first and f' (the first: {first})'}")
    if not problems:
        raise ValueError(f"{source} holds no problem")
    return problems


def find(source: str) -> tuple[str, Benchmark]:
    """(name, benchmark) of a benchmark's name, or of one's own file or hub:…, taken to be like MATH."""
    if os.path.isfile(source) or source.startswith("hub:"):
        name = re.sub(r"\W+", "-", os.path.basename(source).removeprefix("hub:").partition(".")[0])
        return name, Benchmark("", "math", 0)
    if source not in BENCHMARKS:
        valid = f"valid: {', '.join(BENCHMARKS)}, paper for its thirteen, a file, or hub:ID[:PART[:SPLIT]]"
        raise ValueError(f"no benchmark {source!r} ({valid})")
    return source, BENCHMARKS[source]


def prompt(source: str, problem: str, shots: int | None, template: str) -> str:
    """The text that the model continues. shots: number of solved examples; None: as many as in the paper."""
    name, bench = find(source)
    examples = prompts.SHOTS[bench.shots]
    wanted = bench.count if shots is None else shots
    if wanted > len(examples):
        raise ValueError(f"there are {len(examples)} solved examples in the style of {name}, not {wanted}")
    return prompts.few_shot(examples[:wanted], problem, template)


def options(row: dict) -> dict[str, str]:
    """{letter: text} of a row whose answer is a letter among those that its problem lists; else {}."""
    if not re.fullmatch(r"[A-H]", row["answer"]):
        return {}
    listed = row["problem"].rpartition("right choice?")[2]
    if "(A. " in listed:  # SAT's: (A. 1 B. 2 C. 3
        listed = re.sub(r"(?<=\s)\(?([A-H])\. ", r"(\1) ", listed)
    found = dict(re.findall(r"(?s)(?<!\w)\(([A-H])\)\s*(.*?)\s*(?=,?\s*(?<!\w)\([A-H]\)|$)", listed))
    if isinstance(row.get("choices"), list):
        found = dict(zip("ABCDEFGH", map(str, row["choices"])))
    return found if row["answer"] in found else {}


def seen_in_training(folder: str, name: str, rows: list[dict]) -> list[str]:
    """Warnings: what is known of a stage's training that makes its score on these rows doubtful.
    folder: of the stage. An RL run's prompts are compared with the problems, text by text."""
    warnings, stage = [], Path(folder)
    config = read_json(stage / "config.json", missing_ok=True) or {}
    if (path := config.get("prompts")) and (path in BENCHMARKS or Path(path).is_file()):
        columns = recipes.columns_of(("prompts", "eval"), config.get("columns"))["prompts"]
        trained = load_problems(path, config.get("data"), columns=columns, to_train=True)
        if same := shared(rows, trained):
            warnings.append(f"{same} of the {len(rows)} problems of {name} are among the prompts of its RL, "
                            f"{path}" + "; report math500 instead" * (name == "math"))
    index = read_json(stage.parent / "data/index.json", missing_ok=True) or {}
    if kept := (index.get("settings") or {}).get("keep_overlaps"):
        kept = f"({', '.join(kept)}, by --keep-overlaps)"
        warnings.append(f"its data kept answers to problems of benchmarks {kept}: {name} may suffer")
    return warnings


def shared(rows: list[dict], others: list[dict]) -> int:
    """How many of the rows have a problem that others have too, whatever the spaces and capitals."""
    known = {plain(row["problem"]) for row in others}
    return sum(plain(row["problem"]) in known for row in rows)


def plain(problem: str) -> str:
    return "".join(problem.split()).lower()
