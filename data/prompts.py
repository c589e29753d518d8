r"""The prompts of RL and evaluation: the paper's two templates, literally, and few-shot prompts made of them.

A base model knows no chat format, so a template is only a text that is most likely to go on with an answer. Nothing
comes before it, not even a begin-of-text token, and a response ends at the end-of-text token or at one of STOP.
"""

from collections.abc import Sequence

# A base model that has answered goes on to invent the next question: cut it there (the released scripts' stop strings).
STOP = ("User:", "Assistant:", "Question:", "Answer:")


def simple(question: str) -> str:
    return f"Question:\n{question}\nAnswer:\n"


def complex(question: str) -> str:
    return (
        "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. "
        "The assistant first thinks about the reasoning process in the mind and then provides the user with the answer."
        " User: You must put your answer inside \\boxed{} and Your final answer will be extracted automatically by "
        "the \\boxed{} tag.\n" + question + "\nAssistant:"
    )


TEMPLATES = {"simple": simple, "complex": complex}


def few_shot(examples: Sequence[dict], question: str, style: str = "simple") -> str:
    """Solved examples (rows with "problem" and "solution"), then the question, all in one template."""
    template = TEMPLATES[style]
    shots = "".join(f"{template(row['problem'])}{row['solution']}\n\n" for row in examples)
    return shots + template(question)
