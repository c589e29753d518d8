r"""What is mixed in which stage: plain tables, to be read and edited.

STAGES[corpus][stage] = {source: weight}; a weight is a share of the sequences, that is of the input tokens.
KINDS[corpus][source] says how the documents of a source fill a sequence:

    "text"      running text: one stream of tokens, sliced wherever a sequence is full
    "document"  question and answer, chain of thought, conversation: packed, each whole if it fits

There are three corpora. "paper" is the recipe of OctoThinker (arXiv 2506.20512, tables of section 4 and the
appendix), with the places of its sources on the Hugging Face hub. "tiny" is the same recipe on the generated
corpus (data/synth.py), "real" the same recipe on public files in a folder of your own (data/README.md).
"""

import argparse
import re
from itertools import zip_longest
from typing import NamedTuple

STAGE_NAMES = ("base", "stable", "long", "short", "hybrid")  # base stands in for Llama's own pre-training


class SourceSpec(NamedTuple):
    """Where the documents of a source come from, and what they look like."""

    format: str  # a key of FORMATS
    files: tuple[str, ...] = ()  # in the data folder; read in turns, one row of each at a time
    hub: str = ""  # or a data set of the Hugging Face hub
    part: str = ""  # of which a configuration, or files: a path with * in it
    split: str = "train"
    columns: tuple[tuple[str, str], ...] = ()  # our names of columns and the set's, see renamed()
    revision: str = ""  # commit of the hub's data set; "": the newest

    @property
    def kind(self) -> str:
        return "text" if self.format == "text" else "document"


# ---- The paper's corpus (base = a released Llama, so there is no mixture for it) ---------------------------

MEGAMATH = "LLM360/MegaMath"
PAPER_SOURCES = {
    "web_pro_max": SourceSpec("text", hub="OctoThinker/MegaMath-Web-Pro-Max"),
    "web_pro": SourceSpec("text", hub=MEGAMATH, part="megamath-web-pro/**/*.parquet"),
    "dclm": SourceSpec("text", hub="mlfoundations/dclm-baseline-1.0"),
    "text_code": SourceSpec("text", hub=MEGAMATH, part="megamath-text-code-block/**/*.parquet"),
    "translated_code": SourceSpec("text", hub=MEGAMATH, part="megamath-translated-code/**/*.parquet"),
    "megamath_qa": SourceSpec("qa", hub=MEGAMATH, part="megamath-qa/**/*.parquet"),
    "open_r1": SourceSpec("long_cot", hub="open-r1/OpenR1-Math-220k", part="default"),
    "am_distilled": SourceSpec(
        "long_cot", hub="a-m-team/AM-DeepSeek-R1-Distilled-1.4M", part="am_*.jsonl.zst"),
    "open_math_instruct": SourceSpec("qa", hub="nvidia/OpenMathInstruct-2"),
    "numina": SourceSpec("qa", hub="AI-MO/NuminaMath-1.5"),
    # The paper gives instruction data one weight for three sets; how it is split among them is not published.
    "tulu": SourceSpec("chat", hub="allenai/tulu-3-sft-personas-instruction-following"),
    "wildchat": SourceSpec("chat", hub="allenai/WildChat"),
    "ultrachat": SourceSpec("chat", hub="HuggingFaceH4/ultrachat_200k", split="train_sft"),
    "finemath_4plus": SourceSpec("text", hub="HuggingFaceTB/finemath", part="finemath-4plus"),  # finding F1
}

_DECAY = {"web_pro": 0.55, "dclm": 0.05, "tulu": 0.034, "wildchat": 0.033, "ultrachat": 0.033}
PAPER = {
    # The paper: code and translated_code 0.0125 each. MegaMath-Code is published as pointers to files without
    # their text, so translated_code has the share of both.
    "stable": {
        "web_pro_max": 0.725, "dclm": 0.10, "text_code": 0.10, "megamath_qa": 0.05, "translated_code": 0.025},
    "long": _DECAY | {"open_r1": 0.15, "am_distilled": 0.15},
    "short": _DECAY | {"megamath_qa": 0.025, "open_math_instruct": 0.175, "numina": 0.10},
    "hybrid": _DECAY | {"open_r1": 0.10, "open_math_instruct": 0.10, "numina": 0.10},
}

# The prompts of the paper's RL, 8,523 problems of MATH, levels 3 to 5: rl.py --prompts math8k has them from
# the hub, or from math8k/train.jsonl in --data DIR. 2,934 are in MATH's test set: report MATH500 after them.
MATH8K = SourceSpec("qa", hub="hkust-nlp/SimpleRL-Zoo-Data", part="simplelr_abel_level3to5/train*.parquet",
                    columns=(("problem", "extra_info.question"), ("answer", "extra_info.answer")))

# ------------------------------------------------------------------------------------------------------------
# The generated corpus: web, code and text-code blocks become "web"; short and long chains of thought are one
# source each. "noisy" takes the place of "web" when the quality of the web text is what is studied.

TINY = {
    "base": {"general": 1.0},
    "stable": {"web": 0.85, "general": 0.10, "short_cot": 0.05},
    "long": {"web": 0.55, "general": 0.05, "instruct": 0.1, "long_cot": 0.3},
    "short": {"web": 0.55, "general": 0.05, "instruct": 0.1, "short_cot": 0.3},
    "hybrid": {"web": 0.55, "general": 0.05, "instruct": 0.1, "long_cot": 0.1, "short_cot": 0.2},
}

# ------------------------------------------------------------------------------------------------------------
# Public files, in a folder laid out as in data/README.md: the same mixtures, with the names of their text

_TEXT = {"web": "math_text", "general": "general_text"}
REAL = {stage: {_TEXT.get(name, name): w for name, w in mixture.items()} for stage, mixture in TINY.items()}

REAL_SOURCES = {
    "math_text": SourceSpec("text", (
        "math_text/openstax.jsonl.gz", "math_text/books.jsonl.gz", "math_text/planetmath.jsonl.gz",
        "math_text/stackmathqa_part.jsonl", "math_text/openstax_exercises.jsonl")),
    "general_text": SourceSpec("text", (
        "general_text/public_domain.jsonl.gz", "general_text/openstax_general.jsonl.gz")),
    "short_cot": SourceSpec("qa", ("gsm8k/train.jsonl", "math/train.jsonl")),
    "long_cot": SourceSpec("long_cot", ("cot/long_cot_mip.jsonl.gz",)),
    "instruct": SourceSpec("chat", (
        "instruct/dolly.jsonl.gz", "instruct/self_instruct_seed.jsonl", "instruct/llms_from_scratch.jsonl")),
}
# No training text may contain one of their problems (13 words in a row), where they are in the data folder.
EVALUATION_FILES = ("gsm8k/test.jsonl", "math/test.jsonl", "eval/*.jsonl")

# ---- All three corpora -------------------------------------------------------------------------------------

STAGES = {"paper": PAPER, "tiny": TINY, "real": REAL}
CORPORA = {"paper": PAPER_SOURCES, "real": REAL_SOURCES}
KINDS = {corpus: {name: spec.kind for name, spec in specs.items()} for corpus, specs in CORPORA.items()}
KINDS["tiny"] = dict.fromkeys(("general", "web", "noisy"), "text")
KINDS["tiny"] |= dict.fromkeys(("short_cot", "long_cot", "instruct"), "document")

# Comparisons of a single factor (the paper, section 3; its findings F1, F2, F3, F6): one stage on one mixture
# from the base. python midtrain.py --branch controlled --mix NAME


def _controlled(web: str, short: str, long: str, chat: str) -> dict[str, dict]:
    talk = {chat: 0.01, web: 0.89}
    mixtures = {"qa_short": {web: 0.9, short: 0.1}, "qa_long": {web: 0.9, long: 0.1}}
    mixtures |= {"instruct_short": talk | {short: 0.10}, "instruct_long": talk | {long: 0.10}}
    return mixtures | {f"qa_{x}": {web: 1 - x / 100, long: x / 100} for x in (10, 20, 30, 40)}


CONTROLLED = {
    "paper": _controlled("web_pro_max", "open_math_instruct", "open_r1", "tulu")
    | {name: {name: 1.0} for name in ("finemath_4plus", "web_pro", "web_pro_max")},
    "tiny": _controlled("web", "short_cot", "long_cot", "instruct") | {x: {x: 1.0} for x in ("web", "noisy")},
    "real": _controlled("math_text", "short_cot", "long_cot", "instruct") | {"web": {"math_text": 1.0}},
}

# ------------------------------------------------------------------------------------------------------------
# What a row becomes. The usual names of columns in public sets, for the formats here and for problems
# (benchmarks.py). A row that does not fit is a KeyError or TypeError that says why.

COLUMNS = {
    "text": ("text", "content"),
    "problem": ("problem", "question", "prompt", "instruction", "query"),
    "answer": ("answer", "expected_answer", "gt_answer", "final_answer"),
    "solution": ("solution", "generated_solution", "response", "output", "completion", "generation"),
    "messages": ("messages", "conversations", "conversation"),
}
NO_ANSWER = {"", "proof", "notfound", "not found", "n/a", "na", "none", "null", "nan", "unknown", "-"}
VALIDITY = {"problem_is_valid", "solution_is_valid", "is_valid", "correct", "is_correct"}
UNDOUBTED = ("yes", "true", "1", "none", "nan", "")
SPEAKERS = {"user": "User", "human": "User", "assistant": "Assistant", "gpt": "Assistant"}


def column_map(text: str) -> dict[str, str]:
    """ "problem=Q,exam.answer=x.A" → {"problem": "Q", "exam.answer": "x.A"}; A is a part of column x."""
    pairs = dict(part.partition("=")[::2] for part in text.split(","))
    if any(ours.rpartition(".")[2] not in COLUMNS or not theirs for ours, theirs in pairs.items()):
        how = f"[SOURCE.]COLUMN=NAME,…, COLUMN one of {', '.join(COLUMNS)}"
        raise argparse.ArgumentTypeError(f"{text!r} is not {how}")
    return pairs


def columns_of(name: str, columns: dict[str, str] | None) -> tuple[tuple[str, str], ...]:
    """What a column map says of a source."""
    pairs = ((ours.rpartition("."), theirs) for ours, theirs in (columns or {}).items())
    return tuple((ours, theirs) for (source, _, ours), theirs in pairs if source in ("", name))


def renamed(row: dict, columns: tuple[tuple[str, str], ...]) -> dict:
    """The row with these columns under our names, in place of all that usually have their meaning."""
    found = {}
    for ours, theirs in columns:
        found[ours] = row
        for part in theirs.split("."):
            if part not in found[ours]:
                raise KeyError(f"no column {theirs}; it has: {', '.join(row)}")
            found[ours] = found[ours][part]
    replaced = {name for ours in found for name in COLUMNS[ours]}
    return {name: row[name] for name in row if name not in replaced} | found if found else row


def column(row: dict, *names: str) -> str:
    """The first of these columns that has a value; "" if they have none."""
    for name in names:
        if row.get(name) is not None:
            return checked(row[name], name)
    if any(name in row for name in names):
        return ""
    raise KeyError(f"no column {' or '.join(names)}; it has: {', '.join(row)}")


def checked(text, name: str) -> str:
    if not isinstance(text, str):
        raise TypeError(f"{name} is {type(text).__name__} instead of text")
    return text


def turns(row: dict) -> list[tuple[str, str]]:
    """(who, text) of a conversation, as role and content or as ShareGPT's from and value."""
    name = next(name for name in COLUMNS["messages"] if row.get(name))
    said = [(m.get("role") or m["from"], m["content"] if "content" in m else m["value"]) for m in row[name]]
    return [(who, checked(text, "the content of a message")) for who, text in said]


def is_valid(row: dict) -> bool:
    """Does no column say that problem or solution is wrong? NuminaMath's have Yes, No, Incomplete, …"""
    for name in VALIDITY & row.keys():
        said = str(row[name]).lower()
        if said in ("false", "no") or name.endswith("valid") and said not in UNDOUBTED:
            return False
    return True


def is_answer(text: str) -> bool:
    return text.strip(" .").lower() not in NO_ANSWER


def last_box(solution: str) -> str:
    r"""What stands in the last \boxed{}, braces counted; "" without one."""
    _, found, rest = solution.rpartition("\\boxed{")
    depth = 1
    for place, character in enumerate(rest if found else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:place]
    return ""


def running_text(row: dict) -> str:
    """A page of text, or an exercise and its solution as one."""
    if "problem" in row and "text" not in row:
        return column(row, "problem") + "\n\n" + column(row, *COLUMNS["solution"])
    return column(row, *COLUMNS["text"])


def question_answer(row: dict) -> str | None:
    r"""Problem, newline, solution with its final \boxed{answer}, without GSM8K's marks (<<48/2=24>>). If no
    column is for solutions, the answer's has them, as GSM8K's: the answer itself stands after ####."""
    if "text" in row and "problem" not in row:  # MegaMath-QA is written out already
        return column(row, "text")
    names = [name for name in COLUMNS["solution"] if name in row]
    solution = column(row, *(names or COLUMNS["answer"]))
    answer = next((row[x] for x in COLUMNS["answer"] if names and type(row.get(x)) in (str, int, float)), "")
    if "####" in solution:
        solution, _, answer = solution.rpartition("####")
    solution = re.sub(r"<<.*?>>", "", solution).strip()
    if not solution:
        return None
    if "\\boxed" not in solution and is_answer(answer := str(answer).strip()):
        solution += f"\nThe answer is \\boxed{{{last_box(answer) or answer}}}."
    return f"{column(row, *COLUMNS['problem']).strip()}\n{solution}"


def long_thought(row: dict) -> str | None:
    """Question, newline, <think>…</think>, answer. Of several generations the first correct and whole one."""
    if "generations" in row:
        judged = (row.get(name) or () for name in ("correctness_math_verify", "correctness_llama"))
        whole = row.get("is_reasoning_complete") or [True] * len(row["generations"])
        found = zip(row["generations"], map(any, zip_longest(*judged)), whole)
        thought = next((text for text, correct, complete in found if correct and complete), None)
    elif "problem" not in row and any(row.get(name) for name in COLUMNS["messages"]):
        (_, question), (_, thought) = turns(row)[-2:]
        row = {"problem": question}
    else:
        thought = column(row, "response", "generation", *COLUMNS["solution"])
    question = column(row, *COLUMNS["problem"]).strip()
    return thought and f"{question}\n{re.sub('</?answer>', '', thought).strip()}"


def conversation(row: dict) -> str | None:
    """User:… and Assistant:… in turns. None where the row names a model that is not of GPT-4's class."""
    if not str(row.get("model") or "gpt-4").startswith("gpt-4"):
        return None
    if any(row.get(name) for name in COLUMNS["messages"]):
        said = turns(row)
    else:
        question = [column(row, *COLUMNS["problem"]), *(row[x] for x in ("context", "input") if row.get(x))]
        answer = column(row, *COLUMNS["solution"], *COLUMNS["answer"])
        said = [("user", "\n".join(part.strip() for part in question)), ("assistant", answer)]
    return "\n".join(f"{SPEAKERS[who]}:{text.strip()}" for who, text in said if who in SPEAKERS)


FORMATS = {"text": running_text, "qa": question_answer, "long_cot": long_thought, "chat": conversation}
