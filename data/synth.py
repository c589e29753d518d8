"""The generated corpus: small stories about who has how many of what, as every kind of text in the recipe.

One generator makes problems; everything else is a way of writing about them. A problem is a list of
statements about somebody's count, and a question. Its *structure* is what is left without names, things,
numbers and wording: which relations follow on each other, between whom, and what is asked. Structures are
split by hash into train, val and test, and all text of a split is made of its own structures only. So a test
problem is new by construction, not only in its words: a model that memorised templates fails on it.

Sources, and what each stands for in the paper's recipe:
    general    much talk and little mathematics; answers are stated without steps (Llama's pre-training)
    web        lessons and worked examples in prose, arithmetic drill (MegaMath-Web-Pro-Max)
    noisy      the same with menus, broken lines and wrong results (an unrefined web corpus)
    short_cot  problem, the steps, \\boxed{answer} (OpenMathInstruct, NuminaMath)
    long_cot   problem, <think> explore, slip, notice, correct, check </think>, answer (R1-style distillation)
    instruct   User / Assistant turns (Tulu 3, WildChat, UltraChat)

    python -m data.synth --source long_cot -n 3      # prints documents
    python -m data.synth --problems test -n 5        # prints problems
"""

import random
import zlib
from collections.abc import Iterator
from functools import partial
from itertools import islice
from typing import NamedTuple

from data.files import ArgumentParser, run_cli

SOURCES = ("general", "web", "noisy", "short_cot", "long_cot", "instruct")
SPLITS = ("train", "val", "test")
MAX_LEVEL = 5  # arithmetic steps in a problem
MAX_COUNT = 40  # nobody ever has more

NAMES = """Anna Ben Cara Dan Ella Finn Gina Hugo Iris Jack Kate Liam Mia Noah Olga Paul Rosa Sam Tina Umar
    Vera Will Yara Zoe""".split()
THINGS = """apples books cards coins cups eggs flags hats keys kites lemons maps nuts pears pens plums rings
    shells stamps cans""".split()
PLACES = [f"the {x}" for x in "garden,market,school,river,old mill,harbour,library,hill".split(",")]

# ------------------------------------------------------------------------------------------------------------
# Relations. {A} is somebody already in the story, {B} the one who is introduced or changed, {C} a third; {n}
# and {m} are numbers, {t} things.

WORDINGS = {
    "more": ("{B} has {n} more {t} than {A}.", "{B} has {n} {t} more than {A} has."),
    "fewer": ("{B} has {n} fewer {t} than {A}.", "{B} has {n} {t} fewer than {A} has."),
    "times": ("{B} has {n} times as many {t} as {A}.", "For each of {A}'s {t}, {B} has {n}."),
    "half": ("{B} has half as many {t} as {A}.", "{A} has twice as many {t} as {B}."),
    "both": ("{B} has as many {t} as {A} and {C} together.",),
    "gain": ("{B} buys {n} more {t}.", "Then {B} finds {n} {t}.", "{B} gets {n} {t} as a gift."),
    "lose": ("{B} loses {n} {t}.", "Then {B} sells {n} {t}.", "{B} gives {n} {t} to the school."),
    "boxes": ("{B} buys {m} boxes of {n} {t} each.", "Then {B} gets {m} bags with {n} {t} in each."),
    "give": ("{A} gives {n} {t} to {B}.", "{B} takes {n} of {A}'s {t}."),
}
QUESTIONS = {
    "count": ("How many {t} does {A} have?", "How many {t} does {A} have now?"),
    "total": ("How many {t} do {A} and {B} have together?", "What is the total of {A}'s and {B}'s {t}?"),
    "difference": ("How many more {t} does {A} have than {B}?", "By how many {t} is {A} ahead of {B}?"),
}

# What is known before a step, by relation and operation: a and b are its two numbers
FACTS = {
    ("more", "+"): "{B} has {b} more than {A}, {A} has {a}.", ("lose", "-"): "{B} has {a}, loses {b}.",
    ("fewer", "-"): "{B} has {b} fewer than {A}, {A} has {a}.", ("gain", "+"): "{B} has {a}, gets {b}.",
    ("times", "*"): "{B} has {b} times {A}, {A} has {a}.", ("half", "/"): "{B} has half of {A}, {A} has {a}.",
    ("both", "+"): "{B} has {A} and {C}, {A} has {a}, {C} has {b}.",
    ("boxes", "*"): "{B} gets {a} of {b}.", ("boxes", "+"): "{B} has {a}, gets {b}.",
    ("give", "-"): "{B} has {a}, gives {b}.", ("give", "+"): "{B} has {a}, gets {b}.",
    ("total", "+"): "{B} has {a}, {A} has {b}.", ("difference", "-"): "{B} has {a}, {A} has {b}.",
}


class Step(NamedTuple):
    """One arithmetic step: `who` gets `a op b = result`. `why`: relation; `facts`: what is known before."""

    who: str
    a: int
    op: str  # + - * /
    b: int
    result: int
    why: str
    facts: str


class Problem(NamedTuple):
    """A story, its question, the steps that solve it, and its structure: relations and roles, no words."""

    sentences: list[str]
    steps: list[Step]
    structure: str
    answer: int
    question: str
    thing: str
    asked: str  # whose count is asked for

    @property
    def text(self) -> str:
        return " ".join(self.sentences + [self.question])


def compute(a: int, op: str, b: int) -> int:
    return {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[op]


def split_of(structure: str) -> str:
    """The split a structure belongs to, for ever: a tenth val, two tenths test, by its hash."""
    bucket = zlib.crc32(structure.encode()) % 10
    return "test" if bucket < 2 else "val" if bucket == 2 else "train"


class _Story:
    """A problem in the making: people in order of appearance and what each has."""

    def __init__(self, rng: random.Random):
        self.rng, self.names, self.thing = rng, rng.sample(NAMES, 5), rng.choice(THINGS)
        self.counts, self.sentences, self.steps, self.roles = [], [], [], []
        self.touched = 0  # who changed last

    def introduce(self) -> None:
        """A newcomer with a stated count."""
        self.touched = len(self.counts)
        self.counts.append(self.rng.randint(2, 12))
        self.sentences.append(f"{self.names[self.touched]} has {self.counts[-1]} {self.thing}.")
        self.roles.append(f"have{self.touched}")

    def step(self, who: int, a: int, op: str, b: int, why: str, other: int = 0, third: int = 0) -> int:
        """Note that `who` gets a op b, of what `other` (and `third`) have; returns it."""
        result = compute(a, op, b)
        facts = FACTS[why, op].format(B=self.names[who], A=self.names[other], C=self.names[third], a=a, b=b)
        self.steps.append(Step(self.names[who], a, op, b, result, why, facts))
        return result

    def relate(self, room: int) -> None:
        """One more statement that costs at most `room` steps; none if what is drawn does not fit."""
        rng, counts = self.rng, self.counts
        kind = rng.choice(list(WORDINGS))
        new = len(counts)
        a = self.touched if rng.random() < 0.7 else rng.randrange(new)
        n, m = rng.randint(1, 9), 0
        if kind in ("times", "boxes"):
            n, m = rng.randint(2, 4), rng.randint(2, 3)
        b = new if kind in ("more", "fewer", "times", "half", "both") else a
        c = next((x for x in range(new) if x != a), a)  # a third; a itself if there is nobody else
        if kind == "give":
            a, b = (a, c) if rng.random() < 0.5 else (c, a)
        count, other = counts[a], counts[b if kind == "give" else c]
        op = {"fewer": "-", "lose": "-", "times": "*", "half": "/"}.get(kind, "+")
        number = {"half": 2, "both": other, "boxes": m * n}.get(kind, n)
        result = compute(other if kind == "give" else count, op, number)
        fits = {
            "half": count % 2 == 0 and count > 2, "fewer": count > n, "lose": count > n, "both": new > 1,
            "boxes": room >= 2, "give": room >= 2 and new > 1 and count > n,
        }.get(kind, True)
        if not fits or result > MAX_COUNT or b == new == 4:
            return
        if b == new:
            counts.append(self.step(b, count, op, number, kind, a, c))
        else:
            if kind == "give":
                counts[a] = self.step(a, count, "-", n, kind)
            if kind == "boxes":
                self.step(b, m, "*", n, kind)
            counts[b] = self.step(b, counts[b], op, number, kind)
        names = {"A": self.names[a], "B": self.names[b], "C": self.names[c]}
        self.sentences.append(rng.choice(WORDINGS[kind]).format(t=self.thing, n=n, m=m, **names))
        a, c = sorted((a, c)) if kind == "both" else (a, "")  # "A and C together" is "C and A together"
        self.roles.append(f"{kind}{a}{b}{c}")
        self.touched = b


def make_problem(rng: random.Random, level: int, split: str) -> Problem:
    """A problem of `level` arithmetic steps (1..MAX_LEVEL) whose structure belongs to `split`."""
    while True:
        problem = _draw(rng, level)
        if problem is not None and split_of(problem.structure) == split:
            return problem


def _draw(rng: random.Random, level: int) -> Problem | None:
    story = _Story(rng)
    story.introduce()
    if rng.random() < 0.3:
        story.introduce()
    kind = rng.choices(list(QUESTIONS), (0.6, 0.25, 0.15))[0]
    extra = int(kind != "count")  # a question about two people is a step of its own
    for _ in range(20):
        if room := level - extra - len(story.steps):
            story.relate(room)
    counts, names, last = story.counts, story.names, story.touched
    others = [x for x in range(len(counts)) if x != last]
    if len(story.steps) != level - extra or (extra and not others):
        return None
    other = rng.choice(others) if extra else last
    if kind == "difference":
        if counts[last] == counts[other]:
            return None
        last, other = sorted((last, other), key=lambda x: -counts[x])
    answer = counts[last]
    if extra:
        answer = story.step(last, answer, "+" if kind == "total" else "-", counts[other], kind, other)
    question = rng.choice(QUESTIONS[kind]).format(A=names[last], B=names[other], t=story.thing)
    structure = " ".join(story.roles + [f"{kind}{last}{other}"])
    return Problem(story.sentences, story.steps, structure, answer, question, story.thing, names[last])


# ---- Solutions: short chains of thought, long ones, and prose ----------------------------------------------


def equation(s: Step) -> str:
    return f"{s.a}{s.op}{s.b}={s.result}"


def conclude(p: Problem) -> str:
    return f"The answer is \\boxed{{{p.answer}}}."


def short_steps(p: Problem) -> str:
    """One clause per step: who, and the equation."""
    leads = {("total", "+"): "Together:", ("difference", "-"): "Difference:", ("boxes", "*"): "New:"}
    return " ".join(f"{leads.get((s.why, s.op), f'{s.who} has')} {equation(s)}." for s in p.steps)


def work_out(a: int, op: str, b: int) -> str:
    """a op b in pieces, each within reach of one look: sums and differences by way of the ten between."""
    ten = (a + b) // 10 * 10 if op == "+" else a // 10 * 10
    if op == "+" and a < ten < a + b and b < 10:
        return f"{a}+{ten - a}={ten}, {ten}+{a + b - ten}={a + b}"
    if op == "-" and a - b < ten < a and b < 10:
        return f"{a}-{a - ten}={ten}, {ten}-{b - a + ten}={a - b}"
    if op in "+-" and b > 10 and b % 10:
        mid = compute(a, op, b // 10 * 10)
        return f"{a}{op}{b // 10 * 10}={mid}, {mid}{op}{b % 10}={compute(a, op, b)}"
    return ""


def check(s: Step, r: int) -> tuple[str, int]:
    """The step backwards from a result r: the task, and what it gives; that is s.a if r is right."""
    op, a = {"+": ("-", r - s.b), "-": ("+", r + s.b), "*": ("/", r // s.b), "/": ("*", r * s.b)}[s.op]
    return f"{r}{op}{s.b}", a


def slipped(rng: random.Random, s: Step) -> int:
    """A plausible wrong result: a forgotten carry, one off, the wrong operation, a factor too many."""
    if s.op == "*":
        return s.result + rng.choice((-s.b, s.b))  # so that the check backwards still divides evenly
    wrong = rng.choice((s.result + 10, s.result - 10, s.result + 1, s.result - 1, s.a + s.b, abs(s.a - s.b)))
    return wrong if wrong >= 0 and wrong != s.result else s.result + 1


def long_thoughts(rng: random.Random, p: Problem, slip_rate: float = 0.1) -> str:
    """The same steps, thought aloud, one line each: what is known, the step in pieces, a check backwards.
    Some steps slip: the check brings that to light, and a second attempt mends it."""
    lines = []
    for s in p.steps:
        task = f"{s.a}{s.op}{s.b}"
        pieces = work_out(s.a, s.op, s.b)
        done = (f"{task}: {pieces}" if pieces else equation(s)) + f". Check {check(s, s.result)[0]}={s.a}."
        if rng.random() < slip_rate:
            wrong = slipped(rng, s)
            back, a = check(s, wrong)
            done = f"{task}={wrong}. Check {back}={a}, not {s.a}. Again, {done}"
        lines.append(f"{s.facts} {done}")
    return "\n".join(lines)


# ---- Documents ---------------------------------------------------------------------------------------------


def documents(source: str, seed: int, split: str = "train") -> Iterator[str]:
    """Endless documents of a source: the same for the same (source, seed, split), whatever else is drawn."""
    if source not in SOURCES:
        raise ValueError(f'unknown source "{source}" of the generated corpus; valid: {", ".join(SOURCES)}')
    if split not in SPLITS:
        raise ValueError(f'unknown split "{split}"; valid: {", ".join(SPLITS)}')
    rng = random.Random(f"{source}/{seed}/{split}")
    write = {
        "general": _general, "web": _web, "noisy": _noisy, "instruct": _instruct,
        "short_cot": partial(_solved, long=False), "long_cot": partial(_solved, long=True),
    }[source]
    while True:
        yield write(rng, split)


def _level(rng: random.Random) -> int:
    return rng.choices(range(1, MAX_LEVEL + 1), (2, 3, 3, 2, 1))[0]


# How collections of worked problems write them down, and how often
LAYOUTS = {"{q}\n{a}": 0.7, "Question: {q}\nAnswer: {a}": 0.2, "Question:\n{q}\nAnswer:\n{a}": 0.1}


def _solved(rng: random.Random, split: str, long: bool) -> str:
    p = make_problem(rng, _level(rng), split)
    steps = f"<think>\n{long_thoughts(rng, p)}\n</think>\n" if long else f"{short_steps(p)} "
    return rng.choices(list(LAYOUTS), LAYOUTS.values())[0].format(q=p.text, a=steps + conclude(p))


def _chatter(rng: random.Random) -> str:
    """A sentence without mathematics."""
    a, b = rng.sample(NAMES, 2)
    place, thing = rng.choice(PLACES), rng.choice(THINGS)
    return rng.choice((
        f"{a} and {b} walk to {place}.", f"It is a fine day at {place}.", f"{a} likes {thing} very much.",
        f"The {thing} are for {b}.", f"{a} waits for {b} near {place}.",
        f"In the evening {a} tells {b} about {place}.", f"Nobody at {place} has seen the {thing}.",
        f"{b} puts the {thing} on the table.",
    ))


def _general(rng: random.Random, split: str) -> str:
    """Talk, small stories with their outcome stated, and forum questions answered without steps."""
    kind = rng.random()
    if kind < 0.35:
        return " ".join(_chatter(rng) for _ in range(rng.randint(3, 7)))
    p = make_problem(rng, rng.choice((1, 1, 2, 3)), split)
    if kind < 0.6:
        asks_count = p.question.startswith(f"How many {p.thing} does")
        end = f"So {p.asked} has {p.answer} {p.thing}." if asks_count else ""
        return " ".join([_chatter(rng), *p.sentences, end or _chatter(rng)])
    if kind < 0.8:
        a, b = rng.randint(0, 20), rng.randint(0, 20)
        return f"{_chatter(rng)} The numbers after {a} are {a+1}, {a+2}, {a+3}. {a} and {b} make {a+b}."
    return _forum(rng, p)


def _forum(rng: random.Random, p: Problem) -> str:
    """A question on the web and a bare answer, without a step: what makes a model answer too soon."""
    answer = rng.choice((f"{p.answer}", f"{p.answer} {p.thing}.", conclude(p)))
    return rng.choice(list(LAYOUTS)[1:]).format(q=p.text, a=answer)


def _drill(rng: random.Random) -> str:
    """A few lines of arithmetic, some worked out in pieces."""
    lines = []
    for _ in range(rng.randint(3, 7)):
        op = rng.choice("+++---*/")
        a, b = rng.randint(1, 40), rng.randint(1, 9 if rng.random() < 0.7 else 30)
        if op == "-":
            a, b = max(a, b), min(a, b)
        if op in "*/":
            a, b = rng.randint(2, 12), rng.randint(2, 4)
        if op == "/":
            a = a * b
        pieces = work_out(a, op, b)
        in_pieces = pieces and rng.random() < 0.4
        lines.append(f"{a}{op}{b}: {pieces}." if in_pieces else f"{a}{op}{b}={compute(a, op, b)}.")
    return " ".join(lines)


MEANINGS = {
    "more": "More means add", "fewer": "Fewer means take away", "times": "Times means multiply",
    "half": "Half means divide by 2", "both": "Together means add", "gain": "What is found is added",
    "lose": "What is lost is taken away", "boxes": "Boxes are multiplied, then added",
    "give": "What one gives, the other gets", "total": "The total is a sum",
    "difference": "How many more: subtract",
}


def _web(rng: random.Random, split: str) -> str:
    """Arithmetic drill, a forum's bare answer, or a lesson: an example with each step explained in prose."""
    kind = rng.random()
    if kind < 0.35:
        return _drill(rng)
    p = make_problem(rng, _level(rng), split)
    if kind < 0.45:
        return _forum(rng, p)
    steps = " ".join(f"{MEANINGS[s.why]}: {equation(s)} for {s.who}." for s in p.steps)
    opening = rng.choice(("Example.", "Consider this.", "Here is a case."))
    return f"{opening} {' '.join(p.sentences)} {steps}"


JUNK = ("Home | About | Login", "Accept cookies", "Click here", "[edit]", "Share this page", "&nbsp;")


def _noisy(rng: random.Random, split: str) -> str:
    """The same lesson as a scraper finds it: menus, cut lines, and results that are wrong."""
    text = list(_web(rng, split))
    for i, ch in enumerate(text):
        if ch.isdigit() and rng.random() < 0.08:
            text[i] = str(rng.randint(0, 9))
    words = "".join(text).split(" ")
    for _ in range(rng.randint(1, 4)):
        words.insert(rng.randrange(len(words) + 1), rng.choice(JUNK))
    return " ".join(words[rng.randint(0, 3) :])


def _instruct(rng: random.Random, split: str) -> str:
    """A turn of a helpful assistant: small tasks in words and numbers, problems that say how to answer."""
    kind = rng.randrange(5)
    if kind == 0:
        things = rng.sample(THINGS, 3)
        ask = f"Name {things[0]}, {things[1]} and {things[2]} in reverse."
        reply = ", ".join(reversed(things)) + "."
    elif kind == 1:
        numbers = rng.sample(range(100), 4)
        ask, reply = f"Sort {', '.join(map(str, numbers))}.", ", ".join(map(str, sorted(numbers))) + "."
    elif kind == 2:
        a, b = rng.sample(range(100), 2)
        ask, reply = f"Which is larger, {a} or {b}?", f"{max(a, b)} is larger than {min(a, b)}."
    elif kind == 3:
        p = make_problem(rng, _level(rng), split)
        ask = f"Who is in this story? {' '.join(p.sentences)}"
        reply = f"The story is about {p.asked} and {p.thing}."
    else:
        p = make_problem(rng, rng.choice((1, 2)), split)
        ask, reply = f"Put your answer in \\boxed{{}}. {p.text}", f"{short_steps(p)} {conclude(p)}"
    return f"User:{ask}\nAssistant:{reply}"


def problems(split: str, n: int, seed: int = 0) -> list[dict]:
    """n different problems of a split, levels 1..MAX_LEVEL in turn."""
    if split not in SPLITS:
        raise ValueError(f'unknown split "{split}"; valid: {", ".join(SPLITS)}')
    rng = random.Random(f"problems/{seed}/{split}")
    rows: dict[str, dict] = {}  # by text
    while len(rows) < n:
        level = len(rows) % MAX_LEVEL + 1
        p = make_problem(rng, level, split)
        rows.setdefault(p.text, {
            "problem": p.text, "answer": str(p.answer), "solution": f"{short_steps(p)} {conclude(p)}",
            "level": level, "structure": p.structure, "id": f"{split}-{seed}-{len(rows)}",
        })
    return list(rows.values())


def main() -> None:
    parser = ArgumentParser(prog="python -m data.synth", description="Print samples of the generated corpus.")
    parser.add_argument("--source", default="long_cot", help=f"source of the documents: {', '.join(SOURCES)}")
    parser.add_argument("--problems", metavar="SPLIT", help="print problems of train, val or test instead")
    parser.add_argument("-n", type=int, default=3, help="number of documents or problems (default 3)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the generator (default 0)")
    args = parser.parse_args()
    if args.problems:
        for row in problems(args.problems, args.n, args.seed):
            print(f"[{row['id']}, level {row['level']}] {row['problem']}\n  {row['solution']}\n")
        return
    for text in islice(documents(args.source, args.seed), args.n):
        print(text, end="\n\n")


if __name__ == "__main__":
    run_cli(main)
