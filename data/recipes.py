r"""What is mixed in which stage: plain tables, to be read and edited.

STAGES[corpus][stage] = {source: weight}; a weight is a share of the sequences, that is of the input tokens.
KINDS[corpus][source] says how the documents of a source fill a sequence:

    "text"      running text: one stream of tokens, sliced wherever a sequence is full
    "document"  question and answer, chain of thought, conversation: packed, each whole if it fits

There are three corpora. "paper" is the recipe of OctoThinker (arXiv 2506.20512, tables of section 4 and the
appendix), with the places of its sources on the Hugging Face hub. "tiny" is the same recipe on the generated
corpus (data/synth.py), "real" the same recipe on public files in a folder of your own (data/README.md).
"""

import re
from typing import NamedTuple

STAGE_NAMES = ("base", "stable", "long", "short", "hybrid")  # base stands in for Llama's own pre-training


class SourceSpec(NamedTuple):
    """Where the documents of a source come from, and what they look like."""

    format: str  # a key of FORMATS
    files: tuple[str, ...] = ()  # in the data folder; read in turns, one row of each at a time
    hub: str = ""  # or a data set of the Hugging Face hub
    part: str = ""  # of which a configuration, or files: a path with * in it
    split: str = "train"

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
    "code": SourceSpec("text", hub=MEGAMATH, part="megamath-code/**/*.parquet"),
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
    "stable": {
        "web_pro_max": 0.725, "dclm": 0.10, "text_code": 0.10, "megamath_qa": 0.05, "code": 0.0125,
        "translated_code": 0.0125},
    "long": _DECAY | {"open_r1": 0.15, "am_distilled": 0.15},
    "short": _DECAY | {"megamath_qa": 0.025, "open_math_instruct": 0.175, "numina": 0.10},
    "hybrid": _DECAY | {"open_r1": 0.10, "open_math_instruct": 0.10, "numina": 0.10},
}

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
# What a row becomes. Columns go by several names in public sets; a row without any of them is a KeyError that
# lists its own.


def column(row: dict, *names: str):
    """The first of these columns that has a value; "" if they have none."""
    found = [row[name] for name in names if name in row]
    if not found:
        raise KeyError(f"no column {' or '.join(names)}; it has: {', '.join(row)}")
    return next((value for value in found if value is not None), "")


def running_text(row: dict) -> str:
    """A page of text, or an exercise and its solution as one."""
    if "problem" in row and "text" not in row:
        return row["problem"] + "\n\n" + row["solution"]
    return column(row, "text", "content")


def question_answer(row: dict) -> str | None:
    r"""Problem, newline, solution with its final \boxed{answer}, without GSM8K's marks (<<48/2=24>>)."""
    if "text" in row:  # MegaMath-QA is written out already
        return row["text"]
    solution = re.sub(r"<<.*?>>", "", column(row, "solution", "generated_solution", "response")).strip()
    answer = row["answer"] if row.get("answer") is not None else row.get("expected_answer")
    if not solution:
        return None
    if "\\boxed" not in solution and answer not in (None, ""):
        solution += f"\nThe answer is \\boxed{{{answer}}}."
    return f"{column(row, 'problem', 'question').strip()}\n{solution}"


def long_thought(row: dict) -> str | None:
    """Question, newline, <think>…</think>, answer. Of several generations the first correct one, or None."""
    if "messages" in row and "problem" not in row:
        question, thought = (row["messages"][i]["content"] for i in (-2, -1))
    elif "generations" in row:
        correct = row.get("correctness_math_verify") or row.get("correctness_llama") or []
        thought = next((text for text, ok in zip(row["generations"], correct) if ok), None)
        question = row["problem"]
    else:
        question, thought = column(row, "problem", "question"), column(row, "response", "generation")
    return thought and f"{question.strip()}\n{re.sub('</?answer>', '', thought).strip()}"


def conversation(row: dict) -> str | None:
    """User:… and Assistant:… in turns. None where the row names a model that is not of GPT-4's class."""
    if not (row.get("model") or "gpt-4").startswith("gpt-4"):
        return None
    if "instruction" in row:
        question = "\n".join(part.strip() for part in (row["instruction"], row.get("context")) if part)
        turns = [("User", question), ("Assistant", row["response"])]
    else:
        names = {"user": "User", "assistant": "Assistant"}
        turns = [(names.get(m["role"]), m["content"]) for m in column(row, "messages", "conversation")]
    return "\n".join(f"{name}:{text.strip()}" for name, text in turns if name)


FORMATS = {"text": running_text, "qa": question_answer, "long_cot": long_thought, "chat": conversation}
