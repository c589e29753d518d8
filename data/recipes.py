r"""What is mixed in which stage: plain tables, to be read and edited.

STAGES[world][stage] = {source: weight}; a weight is the source's share of the sequences, that is of the input tokens.
SOURCES[world][source] says how a source fills a sequence:

    "text"      running text: one stream of tokens, sliced wherever a sequence is full
    "document"  question and answer, chain of thought, conversation: kept whole, packed, cut only if longer than a sequence

There are three worlds. "paper" is the recipe of OctoThinker (arXiv 2506.20512, tables of section 4 and the appendix), with
where on the Hugging Face hub each corpus lives. "tiny" is the same recipe on the generated world (data/synth.py).
"real" is the same recipe on public files in a folder of the reader's own.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

STAGE_NAMES = ("base", "stable", "long", "short", "hybrid")  # the base stage stands in for Llama's own pre-training

# ----------------------------------------------------------------------------------------------------------------------
# The paper's (base = a released Llama, so there is no mixture for it)

PAPER_HUB = {  # source: (hub id, configuration)
    "web_pro_max": ("OctoThinker/MegaMath-Web-Pro-Max", None),
    "web_pro": ("LLM360/MegaMath", "megamath-web-pro"),
    "dclm": ("mlfoundations/dclm-baseline-1.0", None),
    "text_code": ("LLM360/MegaMath", "megamath-text-code-block"),
    "code": ("LLM360/MegaMath", "megamath-code"),
    "translated_code": ("LLM360/MegaMath", "megamath-translated-code"),
    "megamath_qa": ("LLM360/MegaMath", "megamath-qa"),
    "open_r1": ("open-r1/OpenR1-Math-220k", None),
    "am_distilled": ("a-m-team/AM-DeepSeek-R1-Distilled-1.4M", None),
    "open_math_instruct": ("nvidia/OpenMathInstruct-2", None),
    "numina": ("AI-MO/NuminaMath-1.5", None),
    # The paper gives instruction data one weight for three sets; how it is split among them is not published.
    "tulu": ("allenai/tulu-3-sft-personas-instruction-following", None),
    "wildchat": ("allenai/WildChat", None),
    "ultrachat": ("HuggingFaceH4/ultrachat_200k", None),
}
_PAPER_TEXT = ("web_pro_max", "web_pro", "dclm", "text_code", "code", "translated_code")

_DECAY = {"web_pro": 0.55, "dclm": 0.05, "tulu": 0.034, "wildchat": 0.033, "ultrachat": 0.033}
PAPER = {
    "stable": {
        "web_pro_max": 0.725, "dclm": 0.10, "text_code": 0.10, "megamath_qa": 0.05, "code": 0.0125,
        "translated_code": 0.0125,
    },
    "long": _DECAY | {"open_r1": 0.15, "am_distilled": 0.15},
    "short": _DECAY | {"megamath_qa": 0.025, "open_math_instruct": 0.175, "numina": 0.10},
    "hybrid": _DECAY | {"open_r1": 0.10, "open_math_instruct": 0.10, "numina": 0.10},
}  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------
# The generated world's: web, code and text-code blocks become "web"; short and long chains of thought are one source each

TINY = {
    "base": {"general": 1.0},
    "stable": {"web": 0.85, "general": 0.10, "short_cot": 0.05},
    "long": {"web": 0.55, "general": 0.05, "instruct": 0.10, "long_cot": 0.30},
    "short": {"web": 0.55, "general": 0.05, "instruct": 0.10, "short_cot": 0.30},
    "hybrid": {"web": 0.55, "general": 0.05, "instruct": 0.10, "long_cot": 0.10, "short_cot": 0.20},
}  # "noisy" takes the place of "web" when the quality of the web text is what is studied

# ----------------------------------------------------------------------------------------------------------------------
# Public files', in a folder laid out as in the README

REAL = {
    "base": {"general_text": 1.0},
    "stable": {"math_text": 0.85, "general_text": 0.10, "short_cot": 0.05},
    "long": {"math_text": 0.55, "general_text": 0.05, "instruct": 0.10, "long_cot": 0.30},
    "short": {"math_text": 0.55, "general_text": 0.05, "instruct": 0.10, "short_cot": 0.30},
    "hybrid": {"math_text": 0.55, "general_text": 0.05, "instruct": 0.10, "long_cot": 0.10, "short_cot": 0.20},
}


def running_text(row: dict) -> str:
    """A page of text, or an exercise and its solution as one."""
    return row["text"] if "text" in row else f"{row['problem']}\n\n{row['solution']}"


def question_answer(row: dict) -> str:
    r"""Problem, newline, solution with its final \boxed{answer}; GSM8K's calculator marks <<48/2=24>> are dropped."""
    solution = re.sub(r"<<.*?>>", "", row["solution"]).strip()
    if "\\boxed" not in solution:
        solution += f"\nThe answer is \\boxed{{{row['answer']}}}."
    return f"{row['problem'].strip()}\n{solution}"


def long_thought(row: dict) -> str:
    """Question, newline, <think>…</think> and the answer."""
    return f"{row['problem'].strip()}\n{row['response'].strip()}"


def conversation(row: dict) -> str:
    question = "\n".join(part.strip() for part in (row["instruction"], row.get("context")) if part)
    return f"User:{question}\nAssistant:{row['response'].strip()}"


class Files(NamedTuple):
    kind: str  # "text" | "document"
    files: tuple[str, ...]  # inside the data folder; read in turns, a row of each
    format: Callable[[dict], str]  # a row of the file → the document


REAL_FILES = {
    "math_text": Files("text", (
        "math_text/openstax.jsonl.gz", "math_text/books.jsonl.gz", "math_text/planetmath.jsonl.gz",
        "math_text/stackmathqa_part.jsonl", "math_text/openstax_exercises.jsonl",
    ), running_text),
    "general_text": Files("text", (
        "general_text/public_domain.jsonl.gz", "general_text/openstax_general.jsonl.gz"), running_text),
    "short_cot": Files("document", ("gsm8k/train.jsonl", "math/train.jsonl"), question_answer),
    "long_cot": Files("document", ("cot/long_cot_mip.jsonl.gz",), long_thought),
    "instruct": Files("document", (
        "instruct/dolly.jsonl.gz", "instruct/self_instruct_seed.jsonl", "instruct/llms_from_scratch.jsonl",
    ), conversation),
}  # fmt: skip

# ----------------------------------------------------------------------------------------------------------------------

STAGES = {"paper": PAPER, "tiny": TINY, "real": REAL}
SOURCES = {
    "paper": {name: "text" if name in _PAPER_TEXT else "document" for name in PAPER_HUB},
    "tiny": {
        "general": "text", "web": "text", "noisy": "text",
        "short_cot": "document", "long_cot": "document", "instruct": "document",
    },
    "real": {name: source.kind for name, source in REAL_FILES.items()},
}  # fmt: skip
