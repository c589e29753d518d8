r"""The prompts of RL and evaluation: the paper's two templates, literally, and few-shot prompts made of them.

A base model knows no chat format, so a template is only a text that is most likely to go on with an answer.
Nothing comes before it, not even a begin-of-text token, and a response ends at the end-of-text token or at
one of STOP.
"""

from collections.abc import Sequence
from pathlib import Path

from data.files import read_jsonl

# A base model that has answered goes on to invent the next question: these strings, which are those of the
# released scripts, end a response there.
STOP = ("User:", "Assistant:", "Question:", "Answer:")


def simple(question: str) -> str:
    return f"Question:\n{question}\nAnswer:\n"


def complex(question: str) -> str:
    return (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
        "The assistant first thinks about the reasoning process in the mind and then provides the user with "
        "the answer. User: You must put your answer inside \\boxed{} and Your final answer will be extracted "
        "automatically by the \\boxed{} tag.\n" + question + "\nAssistant:")


TEMPLATES = {"simple": simple, "complex": complex}

# A call of the calculator, and what is put behind it, on a line of its own: there no tokenizer of ours joins
# the marks to what stands around them, so a result has the same tokens in a document and in a sampler.
CALL, END_CALL = "<calc>", "</calc>"
RESULT, END_RESULT = "<result>", "</result>\n"


def few_shot(examples: Sequence[tuple[str, str]], question: str, template: str = "simple") -> str:
    """Solved examples (problem, solution), then the question, all in one template."""
    fill = TEMPLATES[template]
    return "".join(f"{fill(problem)}{solution}\n\n" for problem, solution in examples) + fill(question)


def read_shots(path: Path) -> dict[str, list[tuple[str, str]]]:
    """{style: [(problem, solution), ...]} of a file of rows {"style", "problem", "solution"}."""
    shots: dict[str, list[tuple[str, str]]] = {}
    for row in read_jsonl(path):
        shots.setdefault(row["style"], []).append((row["problem"], row["solution"]))
    return shots


# The solved examples of few-shot prompts. They are ours: each in the style of a benchmark, none of them from
# one, all ending in a box. word: GSM8K and its like, a story of two to four steps; math: MATH and its like,
# LaTeX and an exact answer; choice: options in letters (MMLU-STEM, SAT, MathQA); course: OCWCourses,
# undergraduate science; table: TabMWP, a small table and a question.
SHOTS = read_shots(Path(__file__).with_name("shots.jsonl"))
