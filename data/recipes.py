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
from collections.abc import Iterable
from itertools import pairwise, zip_longest
from typing import NamedTuple

STAGE_NAMES = ("base", "stable", "long", "short", "hybrid")  # base stands in for Llama's own pre-training
TOOL_SOURCES = ("tool_cot",)  # with results of a calculator, which are read and not learned


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
# source each. "noisy" takes the place of "web" when the quality of the web text is what is studied. Hybrid
# is 15:15, of the paper's section 3, not the 10:20 of its branch: these are shares of tokens, and a long
# document is nearly twice as long, so at 10:20 a long one comes to three or four short ones.

TINY = {
    "base": {"general": 1.0},
    "stable": {"web": 0.85, "general": 0.10, "short_cot": 0.05},
    "long": {"web": 0.55, "general": 0.05, "instruct": 0.1, "long_cot": 0.3},
    "short": {"web": 0.55, "general": 0.05, "instruct": 0.1, "short_cot": 0.3},
    "hybrid": {"web": 0.55, "general": 0.05, "instruct": 0.1, "long_cot": 0.15, "short_cot": 0.15},
}
_TOOL = {"web": 0.55, "general": 0.05, "instruct": 0.1, "tool_cot": 0.3}  # ours: the paper has no such branch

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

STAGES = {"paper": PAPER, "tiny": TINY | {"tool": _TOOL}, "real": REAL}
CORPORA = {"paper": PAPER_SOURCES, "real": REAL_SOURCES}
KINDS = {corpus: {name: spec.kind for name, spec in specs.items()} for corpus, specs in CORPORA.items()}
KINDS["tiny"] = dict.fromkeys(("general", "web", "noisy", "crawl", "qa_prose"), "text")
KINDS["tiny"] |= dict.fromkeys(("short_cot", "long_cot", "instruct", "prose_qa"), "document")
KINDS["tiny"] |= dict.fromkeys(("short_one", "long_whole", "tool_cot"), "document")

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
    "tiny": _controlled("web", "short_cot", "long_cot", "instruct")
    | {x: {x: 1.0} for x in ("web", "noisy", "crawl")},
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
NO_ANSWER = {"", "proof", "seeproof", "solution", "seesolution", "seeabove", "notfound", "noanswer"}
NO_ANSWER |= {"na", "none", "null", "nan", "unknown", "notavailable"}
VALIDITY = ("problem_is_valid", "solution_is_valid", "is_valid", "correct", "is_correct")
SPEAKERS = {"system": "", "user": "User", "human": "User"}
SPEAKERS |= dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "Assistant")


def column_map(text: str) -> dict[str, str]:
    """ "problem=Q,exam.answer=x.A" → {"problem": "Q", "exam.answer": "x.A"}; A is a part of column x."""
    pairs = dict(part.partition("=")[::2] for part in text.split(","))
    if any(ours.rpartition(".")[2] not in COLUMNS or not theirs for ours, theirs in pairs.items()):
        how = f"[SOURCE.]COLUMN=NAME,…, COLUMN one of {', '.join(COLUMNS)}"
        raise argparse.ArgumentTypeError(f"{text!r} is not {how}")
    return pairs


def columns_of(names: Iterable[str], columns: dict[str, str] | None) -> dict[str, tuple]:
    """{source: what a column map says of it}; ValueError if it says something of another source."""
    found = {name: () for name in names}
    for key, theirs in (columns or {}).items():
        source, _, ours = key.rpartition(".")
        if source and source not in found:
            raise ValueError(f"--columns: unknown source {source!r} (valid: {', '.join(found)})")
        for name in [source] if source else found:
            found[name] += ((ours, theirs),)
    return found


def renamed(row: dict, columns: tuple[tuple[str, str], ...]) -> dict:
    """The row with these columns under our names, in place of all that usually have their meaning."""
    found = {}
    for ours, theirs in columns:
        found[ours] = row
        for part in theirs.split("."):
            if part not in found[ours]:
                raise KeyError(f"no column {theirs}; it has: {', '.join(row)}")
            found[ours] = found[ours][part]
    replaced = {name for ours in found for name in COLUMNS[ours]} | {theirs for _, theirs in columns}
    return {name: row[name] for name in row if name not in replaced} | found if found else row


def column(row: dict, *names: str) -> str:
    """The first of these columns that has a value; "" if they have none."""
    for name in names:
        if row.get(name) is not None:
            return checked(row[name], name)
    if any(name in row for name in names):
        return ""
    raise KeyError(f"no column {' or '.join(names)}; it has: {', '.join(row)}")


def has(row: dict, meaning: str) -> bool:
    """Is one of the columns there that usually mean this?"""
    return any(name in row for name in COLUMNS[meaning])


def checked(text, name: str) -> str:
    """Text, in parts too: [{"type": "text", "text": …}]; of a list of messages the last one's."""
    if isinstance(text, list) and text and all(isinstance(part, dict) for part in text):
        if "content" in text[-1]:
            return checked(text[-1]["content"], f"the content of {name}")
        return "".join(checked(part.get("text"), f"a part of {name}") for part in text)
    if not isinstance(text, str):
        raise TypeError(f"{name} is {type(text).__name__} instead of text")
    return text


def messages(row: dict) -> list[dict]:
    """Of a conversation in one column, or in a prompt's and a completion's; else []."""
    if said := next((row[name] for name in COLUMNS["messages"] if row.get(name)), None):
        return said
    said, reply = (next((row[x] for x in COLUMNS[y] if row.get(x)), None) for y in ("problem", "solution"))
    reply = reply if isinstance(reply, list) else [{"role": "assistant", "content": reply}]
    return said + reply if isinstance(said, list) else []


def turns(row: dict) -> list[tuple[str, str]]:
    """("User" or "Assistant", text) of a conversation, as role and content or as ShareGPT's from and value.
    What the system said is no turn."""
    said = []
    for message in messages(row):
        who = str(message.get("role") or message.get("from")).lower()
        if who not in SPEAKERS:
            raise KeyError(f"unknown speaker {who!r}; known: {', '.join(SPEAKERS)}")
        text = message.get("content", message.get("value"))
        said.append((SPEAKERS[who], checked(text, "the content of a message").strip()))
    return [(who, text) for who, text in said if who]


def says_no(value) -> bool:
    """Of a verdict in words, as a number or a bool: NuminaMath's are Yes, Problem not solved, …"""
    said = str(value).strip(" .").lower()
    return "not " in said or said in (
        "no", "false", "0", "0.0", "wrong", "incorrect", "invalid", "incomplete")


def is_valid(row: dict) -> bool:
    """Does no column say that problem or solution is wrong?"""
    return not any(says_no(row[name]) for name in VALIDITY if name in row)


def is_answer(text: str) -> bool:
    r"""Is it more than "see proof", \text{N/A}, $?$ or --?"""
    bare = re.sub(r"\\(text\w*|mathrm|mbox|boxed)|\\[()[\]]|(?<!\\)[{}]|[\s.,:;!?$/_()[\]–—-]", "", text)
    return bare.lower() not in NO_ANSWER


def last_box(solution: str) -> str:
    r"""What stands in the last \boxed{}, braces counted; "" without one."""
    _, found, rest = solution.rpartition("\\boxed{")
    depth = 1
    for place, character in enumerate(rest if found else ""):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return rest[:place]
    return ""


def asked(row: dict) -> str:
    """The problem; below it Alpaca's input or Dolly's context."""
    beside = [checked(row[name], name).strip() for name in ("context", "input") if row.get(name)]
    return "\n".join(filter(None, [column(row, *COLUMNS["problem"]).strip(), *beside]))


def solved(row: dict) -> tuple[str, str]:
    r"""(solution, answer), "" for what is not there. The answer has a column, or stands after the solution's
    ####, or in its last \boxed{}. If no column is for solutions, the answer's has them, as GSM8K's."""
    found = next((row[x] for x in COLUMNS["answer"] if row.get(x) is not None), "")
    answer = str(found).strip() if type(found) in (str, int, float) else ""
    if has(row, "solution"):
        solution = column(row, *COLUMNS["solution"])
    else:
        solution = answer or column(row, *COLUMNS["answer"])
        answer = "" if "####" in answer else answer
    text, marked, final = solution.rpartition("####")
    final = final.strip() if marked else last_box(solution)
    return (text if marked else solution).strip(), answer if is_answer(answer) else final or answer


def unboxed(solution: str) -> str:
    r"""Without the last \boxed{} if it has no answer: \boxed{proof} → proof."""
    box = last_box(solution)
    return solution if is_answer(box) else solution.replace(f"\\boxed{{{box}}}", box)


def joined(question: str, answer: str, between: str = "\n") -> str | None:
    """One document; None if there is no question, or no answer."""
    question, answer = question.strip(), answer.strip()
    return f"{question}{between}{answer}" if question and answer else None


def running_text(row: dict) -> str | None:
    """A page of text, or an exercise and its solution as one."""
    if has(row, "problem") and not has(row, "text"):
        return joined(column(row, *COLUMNS["problem"]), column(row, *COLUMNS["solution"]), "\n\n")
    text = column(row, *COLUMNS["text"])
    return text if text.strip() else None


def question_answer(row: dict) -> str | None:
    r"""Problem, newline, solution with its final \boxed{answer}, without GSM8K's marks (<<48/2=24>>)."""
    if "text" in row and "problem" not in row:  # MegaMath-QA is written out already
        return running_text({"text": row["text"]})
    solution, answer = solved(row)
    solution = unboxed(re.sub(r"<<.*?>>", "", solution)).strip()
    if "\\boxed" not in solution and solution and is_answer(answer) and answer != solution:
        solution += f"\nThe answer is \\boxed{{{last_box(answer) or answer}}}."
    return joined(asked(row), solution)


def long_thought(row: dict) -> str | None:
    """Question, newline, <think>…</think>, answer. Of several generations the first correct and whole one; of
    a conversation the last question that is answered."""
    if "generations" in row:
        judged = (row.get(name) or () for name in ("correctness_math_verify", "correctness_llama"))
        whole = row.get("is_reasoning_complete") or [True] * len(row["generations"])
        found = zip(row["generations"], map(any, zip_longest(*judged)), whole)
        thought = next((text for text, correct, complete in found if correct and complete), None)
    elif "problem" not in row and messages(row):
        pairs = [(a[1], b[1]) for a, b in pairwise(turns(row)) if (a[0], b[0]) == ("User", "Assistant")]
        question, thought = pairs[-1] if pairs else ("", "")
        row = {"problem": question}
    else:
        thought = column(row, "response", "generation", *COLUMNS["solution"])
    return joined(asked(row), unboxed(re.sub("</?answer>", "", thought or "")))


def conversation(row: dict) -> str | None:
    """User:… and Assistant:… in turns. None without a question, an answer or the text of a turn, and where
    the row names a model that is not of GPT-4's class."""
    if not str(row.get("model") or "gpt-4").startswith("gpt-4"):
        return None
    if messages(row):
        said = turns(row)
    else:
        answer = column(row, *COLUMNS["solution"], *COLUMNS["answer"])
        said = [("User", asked(row)), ("Assistant", answer.strip())]
    whole = {who for who, _ in said} == {"User", "Assistant"} and all(text for _, text in said)
    return "\n".join(f"{who}:{text}" for who, text in said) if whole else None


def rollout(row: dict) -> str | None:
    """A right response that rl.py or verify.py wrote down, as it stands: the problem, newline, what the model
    said. None for a wrong one, or one that was cut off: a model is to learn to end."""
    right = row["correct"] if "correct" in row else row["reward"] > 0
    whole = row.get("finish", "stop") == "stop" and not row.get("truncated")
    return joined(asked(row), column(row, "response")) if right and whole else None


FORMATS = {"text": running_text, "qa": question_answer, "long_cot": long_thought, "chat": conversation}
FORMATS |= {"rollouts": rollout}
