r"""The prompts of RL and evaluation: the paper's two templates, literally, and few-shot prompts made of them.

A base model knows no chat format, so a template is only a text that is most likely to go on with an answer. Nothing
comes before it, not even a begin-of-text token, and a response ends at the end-of-text token or at one of STOP.

The solved examples in SHOTS are ours: each in the style of a benchmark, none of them from one, all ending in a box.
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


def few_shot(examples: Sequence[tuple[str, str]], question: str, style: str = "simple") -> str:
    """Solved examples (problem, solution), then the question, all in one template."""
    template = TEMPLATES[style]
    return "".join(f"{template(problem)}{solution}\n\n" for problem, solution in examples) + template(question)


_WORD = (  # GSM8K and its like: a story, two to four steps
    (
        "A baker fills 6 trays with 12 rolls each. In the morning he sells 45 rolls. How many rolls are left?",
        "The baker makes 6 * 12 = 72 rolls. After the morning 72 - 45 = 27 are left. The answer is \\boxed{27}.",
    ),
    (
        "Tom reads 15 pages on Monday, twice as many on Tuesday and 10 fewer on Wednesday than on Tuesday. "
        "How many pages does he read on the three days?",
        "On Tuesday he reads 2 * 15 = 30 pages, on Wednesday 30 - 10 = 20. Together that is 15 + 30 + 20 = 65 pages. "
        "The answer is \\boxed{65}.",
    ),
    (
        "A ticket costs $8 for an adult and half of that for a child. What do 3 adults and 5 children pay?",
        "A child pays 8 / 2 = 4 dollars. Three adults pay 3 * 8 = 24 dollars, five children 5 * 4 = 20 dollars. "
        "Together they pay 24 + 20 = 44 dollars. The answer is \\boxed{44}.",
    ),
    (
        "A tank holds 240 litres and is a quarter full. Water runs in at 9 litres a minute. "
        "After how many minutes is the tank full?",
        "There are 240 / 4 = 60 litres in the tank, so 240 - 60 = 180 litres are missing. That takes 180 / 9 = 20 minutes. "
        "The answer is \\boxed{20}.",
    ),
    (
        "Nora saves 20% of her wage of $450 each week. How much has she saved after 6 weeks?",
        "She saves 0.2 * 450 = 90 dollars a week. After six weeks that is 6 * 90 = 540 dollars. The answer is \\boxed{540}.",
    ),
    (
        "Omar is three times as old as Lena. In 8 years their ages will add up to 48. How old is Lena now?",
        "In 8 years both together will be 16 years older, so today their ages add up to 48 - 16 = 32. "
        "That is four times Lena's age, so she is 32 / 4 = 8. The answer is \\boxed{8}.",
    ),
    (
        "A farmer packs 150 eggs into boxes of 12. How many eggs remain when all the boxes that can be filled are full?",
        "150 / 12 is 12 with a remainder: 12 boxes take 12 * 12 = 144 eggs, and 150 - 144 = 6 remain. "
        "The answer is \\boxed{6}.",
    ),
    (
        "Two cars start at the same place in opposite directions, one at 50 and one at 70 miles per hour. "
        "How many miles are they apart after 2.5 hours?",
        "Each hour the distance grows by 50 + 70 = 120 miles. After 2.5 hours it is 2.5 * 120 = 300 miles. "
        "The answer is \\boxed{300}.",
    ),
)
_MATH = (  # MATH and its like: LaTeX, an exact answer
    (
        "Find the sum of the two solutions of $x^2 - 7x + 3 = 0$.",
        "By Vieta's formulas the solutions of $x^2 + bx + c = 0$ add up to $-b$. Here $b = -7$, so their sum is $7$. "
        "The answer is $\\boxed{7}$.",
    ),
    (
        "What is the probability that two fair dice show a sum of $5$? Express your answer as a common fraction.",
        "Of the $36$ equally likely outcomes, $(1,4)$, $(2,3)$, $(3,2)$ and $(4,1)$ have the sum $5$. "
        "The probability is $\\frac{4}{36} = \\frac{1}{9}$. The answer is $\\boxed{\\frac{1}{9}}$.",
    ),
    (
        "Simplify $\\sqrt{72} - \\sqrt{18}$.",
        "We have $\\sqrt{72} = 6\\sqrt{2}$ and $\\sqrt{18} = 3\\sqrt{2}$, so the difference is $3\\sqrt{2}$. "
        "The answer is $\\boxed{3\\sqrt{2}}$.",
    ),
    (
        "For which real $x$ is $|2x - 1| < 5$? Give your answer in interval notation.",
        "The inequality means $-5 < 2x - 1 < 5$. Adding $1$ gives $-4 < 2x < 6$, and halving gives $-2 < x < 3$. "
        "The answer is $\\boxed{(-2, 3)}$.",
    ),
)
_CHOICE = (  # options in letters: MMLU-STEM, SAT, MathQA
    (
        "Which of these is a prime number?\nWhat of the following is the right choice? Explain your answer.\n"
        "(A) 51, (B) 57, (C) 59, (D) 63",
        "51 = 3 * 17, 57 = 3 * 19 and 63 = 7 * 9 are products. 59 is divisible by none of 2, 3, 5 and 7, so it is prime. "
        "The answer is \\boxed{C}.",
    ),
    (
        "A body at rest is accelerated at 3 m/s^2 for 4 s. How far does it move?\n"
        "What of the following is the right choice? Explain your answer.\n(A) 12 m, (B) 24 m, (C) 36 m, (D) 48 m",
        "From rest the distance is a t^2 / 2 = 3 * 16 / 2 = 24 m. The answer is \\boxed{B}.",
    ),
    (
        "If $3x + 2 = 17$, what is the value of $6x$?\n"
        "What of the following is the right choice? Explain your answer.\n(A) 5 (B) 15 (C) 20 (D) 30",
        "$3x = 15$, so $6x = 30$. The answer is \\boxed{D}.",
    ),
    (
        "Which part of a cell holds most of its DNA?\nWhat of the following is the right choice? Explain your answer.\n"
        "(A) the nucleus, (B) the ribosomes, (C) the membrane, (D) the vacuole",
        "Chromosomes lie in the nucleus; mitochondria hold only a little DNA. The answer is \\boxed{A}.",
    ),
)
_COURSE = (  # OCWCourses: undergraduate science, a number or an expression
    (
        "A capacitor of $2.0 \\mu\\mathrm{F}$ is charged to $50 \\mathrm{~V}$. What energy, in joules, does it store?",
        "The energy is $\\frac{1}{2} C V^2 = \\frac{1}{2} \\cdot 2.0 \\times 10^{-6} \\cdot 2500 = 2.5 \\times 10^{-3}$ "
        "joules. The answer is $\\boxed{2.5 \\times 10^{-3}}$.",
    ),
    (
        "Solve $y' = -3y$ with $y(0) = 4$ for $y(t)$.",
        "The equation is linear with constant coefficient, so $y(t) = y(0) e^{-3t}$. The answer is $\\boxed{4 e^{-3t}}$.",
    ),
    (
        "A star is $10$ parsecs away. What is its parallax in arc seconds?",
        "The parallax in arc seconds is the inverse of the distance in parsecs: $1/10$. The answer is $\\boxed{0.1}$.",
    ),
    (
        "How many grams of water form when $4.0 \\mathrm{~g}$ of hydrogen burn completely? "
        "Take $2.0$ and $18.0 \\mathrm{~g/mol}$ for $\\mathrm{H_2}$ and $\\mathrm{H_2O}$.",
        "$4.0 / 2.0 = 2.0$ mol of hydrogen give $2.0$ mol of water, which is $36.0$ g. The answer is $\\boxed{36.0}$.",
    ),
)
_TABLE = (  # TabMWP: a small table, then a question
    (
        'Read the following table regarding "Apples picked" and answer a question:\nName | Apples\nIda | 14\n'
        "Jon | 9\nKim | 22\nHow many more apples did Kim pick than Jon?",
        "Kim picked 22 apples and Jon 9. The difference is 22 - 9 = 13. The answer is \\boxed{13}.",
    ),
    (
        'Read the following table regarding "Prices" and answer a question:\npencil | $0.35\neraser | $0.60\nruler | $1.25\n'
        "How much do 2 pencils and a ruler cost? (Unit: $)",
        "Two pencils cost 2 * 0.35 = 0.70 dollars. With the ruler that is 0.70 + 1.25 = 1.95. The answer is \\boxed{1.95}.",
    ),
    (
        'Read the following table regarding "Goals a game" and answer a question:\nStem | Leaf\n1 | 0, 2, 2\n2 | 1, 5\n'
        "How many games had exactly 12 goals?",
        "A stem of 1 with a leaf of 2 means 12 goals. There are two such leaves. The answer is \\boxed{2}.",
    ),
    (
        'Read the following table regarding "Train times" and answer a question:\nOak Street | 9:15 A.M. | 10:05 A.M.\n'
        "Mill Lane | 9:40 A.M. | 10:30 A.M.\nHow many minutes does the ride from Oak Street to Mill Lane take?",
        "The first train leaves at 9:15 and arrives at 9:40, which is 25 minutes later. The answer is \\boxed{25}.",
    ),
    (
        'Read the following table regarding "Rainy days" and answer a question:\nMonth | Days\nMay | 6\nJune | 3\nJuly | 6\n'
        "What is the mean of the numbers?",
        "The numbers add up to 6 + 3 + 6 = 15, and there are 3 of them: 15 / 3 = 5. The answer is \\boxed{5}.",
    ),
    (
        'Read the following table regarding "Supply of shirts" and answer a question:\nPrice | Wanted | Offered\n'
        "$10 | 90 | 40\n$20 | 60 | 60\nLook at the table. At $10, is there a shortage or a surplus?\n"
        "Please select from the following options: shortage, surplus.",
        "At $10, 90 shirts are wanted and only 40 offered. Too few are offered: a shortage. The answer is \\boxed{shortage}.",
    ),
    (
        'Read the following table regarding "Pets" and answer a question:\n | Cats | Dogs\nboys | 3 | 5\ngirls | 4 | 8\n'
        "What is the probability that a randomly chosen pet is a cat of a girl? Simplify any fractions.",
        "There are 3 + 5 + 4 + 8 = 20 pets, and 4 of them are cats of girls: 4 / 20 = 1/5. The answer is \\boxed{1/5}.",
    ),
    (
        'Read the following table regarding "Steps walked" and answer a question:\nDay | Steps\nMonday | 4,200\n'
        "Tuesday | 3,900\nWhat was the rate of change between Monday and Tuesday?",
        "The number of steps went from 4,200 to 3,900: 3,900 - 4,200 = -300. The answer is \\boxed{-300}.",
    ),
)
SHOTS = {"word": _WORD, "math": _MATH, "choice": _CHOICE, "course": _COURSE, "table": _TABLE}
