"""The generated corpus: small stories about who has how many of what, as every kind of text in the recipe.

One generator makes problems; everything else is a way of writing about them. A problem is a list of
statements about somebody's count, and a question. Its *structure* is what is left without names, things,
numbers and wording: which relations follow on each other, between whom, and what is asked. Structures are
split by hash into train, val and test, and all text of a split is made of its own structures only. So a test
problem is new by construction, not only in its words: a model that memorised templates fails on it.

Sources, and what each stands for in the paper's recipe:
    general    long pages of talk with little mathematics; a question gets a bare answer, and the page goes on
               (Llama's pre-training)
    web        arithmetic drill, lessons that go through a story sentence by sentence, a few exercises, a
               forum's bare answers (MegaMath-Web-Pro-Max)
    noisy      the same with menus, broken lines and wrong results (an unrefined web corpus)
    short_cot  problem, one equation a person, \\boxed{answer} (OpenMathInstruct, NuminaMath)
    long_cot   problem, <think> each sentence again, and what it asks for worked out in pieces; slips noticed
               and mended, some steps checked </think>, answer (R1-style distillation)
    instruct   User / Assistant turns (Tulu 3, WildChat, UltraChat)
    qa_prose   what short_cot says without its form: no question, no answer, no box
    prose_qa   its form without what it says: talk, a question about it, a boxed name
    short_one  short_cot with one operation an equation: what remains of long_cot's advantage?
    long_whole long_cot without pieces: each operation in one look
    tool_cot   <think> each sentence again, and what it asks for as a call of a calculator, with its result
               </think>, answer (the tool-integrated reasoning of the paper's outlook)
    crawl      pages of web, of noisy, and such as are no mathematics: what data/curate.py begins with

The world is made so that one can ask whether long chains pay. A small model learns one operation by heart,
but hardly two of which the second needs the first's result. A short chain writes all that happens to a person
as one equation (Ben has 47+38-12=73.) and needs just that wherever a count changes twice; a long one never
does. Where nothing changes twice, which is so in all problems of level 1, the short one is as good.

    python -m data.synth --source long_cot -n 3      # prints documents
    python -m data.synth --problems test -n 5        # prints problems
    python -m data.synth --source crawl -n 9000 --jsonl FILE     # writes rows {"text": …, "useful": …}
"""

import random
import zlib
from collections.abc import Iterator
from functools import partial
from itertools import groupby, islice
from typing import NamedTuple

from data import prompts
from data.files import ArgumentParser, run_cli, write_jsonl

SOURCES = ("general", "web", "noisy", "short_cot", "long_cot", "instruct", "qa_prose", "prose_qa",
           "short_one", "long_whole", "crawl", "tool_cot")
WORDS_FROM = SOURCES[:6]  # whose text the vocabulary is made of
SPLITS = ("train", "val", "test")
MAX_LEVEL = 4  # operations in a problem
MAX_COUNT = 99  # nobody ever has more
DRAW = 2  # of the problems: the first was looked at while this world was made, so results are of the second
SAME = 0.4  # share of the operations that change the person before, and not tell of a newcomer
ASIDE = 0.1  # chance of each of two people aside, times the operations that a story lacks of MAX_LEVEL

NAMES = """Anna Ben Cara Dan Ella Finn Gina Hugo Iris Jack Kate Liam Mia Noah Olga Paul Rosa Sam Tina Umar
    Vera Will Yara Zoe""".split()
THINGS = """apples books cards coins cups eggs flags hats keys kites lemons maps nuts pears pens plums rings
    shells stamps cans""".split()
PLACES = [f"the {x}" for x in "garden,market,school,river,old mill,harbour,library,hill".split(",")]

# ------------------------------------------------------------------------------------------------------------
# Relations. {A} is whom the story is at, {B} the newcomer, or A again; {n} is a number, {t} things.

WORDINGS = {
    "have": ("{B} has {n} {t}.",),
    "more": ("{B} has {n} more {t} than {A}.", "{B} has {n} {t} more than {A} has."),
    "fewer": ("{B} has {n} fewer {t} than {A}.", "{B} has {n} {t} fewer than {A} has."),
    "times": ("{B} has {n} times as many {t} as {A}.", "For each of {A}'s {t}, {B} has {n}."),
    "half": ("{B} has half as many {t} as {A}.", "{A} has twice as many {t} as {B}."),
    "gain": ("{B} buys {n} more {t}.", "Then {B} finds {n} {t}.", "{B} gets {n} {t} as a gift."),
    "lose": ("{B} loses {n} {t}.", "Then {B} sells {n} {t}.", "{B} gives {n} {t} to the school."),
}
QUESTIONS = {
    "count": ("How many {t} does {A} have?", "How many {t} does {A} have now?"),
    "total": ("How many {t} do {A} and {B} have together?", "What is the total of {A}'s and {B}'s {t}?"),
    "difference": ("How many more {t} does {A} have than {B}?", "By how many {t} is {A} ahead of {B}?"),
}
OPERATIONS = {
    "more": "+", "fewer": "-", "times": "*", "half": "/", "gain": "+", "lose": "-", "total": "+",
    "difference": "-",
}


class Step(NamedTuple):
    """One operation, a op b = result. lead: whose count it is ("Ben has"), or "Together:", "Difference:"."""

    lead: str
    a: int
    op: str  # + - * /
    b: int
    result: int
    why: str  # the relation, or the question


class Problem(NamedTuple):
    """A story, its question, the steps that solve it, and its structure: relations and roles, no words."""

    story: list[tuple[str, Step | None]]  # each sentence, and the operation that it asks for
    final: Step | None  # the operation that the question asks for
    structure: str
    answer: int
    question: str
    thing: str
    asked: str  # whose count is asked for

    @property
    def sentences(self) -> list[str]:
        return [sentence for sentence, _ in self.story]

    @property
    def steps(self) -> list[Step]:
        return [step for _, step in [*self.story, ("", self.final)] if step]

    @property
    def text(self) -> str:
        return " ".join([*self.sentences, self.question])


def compute(a: int, op: str, b: int) -> int:
    return a // b if op == "/" else {"+": a + b, "-": a - b, "*": a * b}[op]


def operand(rng: random.Random, a: int, op: str) -> int | None:
    """A number for b, so that a op b is in 1..MAX_COUNT; None if there is none of interest."""
    if op == "/":
        return 2 if a > 2 and a % 2 == 0 else None
    most = {"+": MAX_COUNT - a, "-": a - 1, "*": min(4, MAX_COUNT // a)}[op]
    most = min(most, 9 if rng.random() < 0.6 else 50)
    return rng.randint(2, most) if most > 1 else None


def split_of(structure: str) -> str:
    """The split a structure belongs to, for ever: a tenth val, two tenths test, by its hash."""
    bucket = zlib.crc32(structure.encode()) % 10
    return "test" if bucket < 2 else "val" if bucket == 2 else "train"


class _Story:
    """A problem in the making: people in order of appearance and what each has."""

    def __init__(self, rng: random.Random):
        self.rng, self.names, self.thing = rng, rng.sample(NAMES, 8), rng.choice(THINGS)
        self.counts, self.story, self.roles = [], [], []
        self.current = 0  # whom the story is at

    def say(self, kind: str, who: int, n: int, step: Step | None = None) -> None:
        names = {"A": self.names[self.current], "B": self.names[who]}
        wording = self.rng.choice(WORDINGS[kind])
        self.story.append((wording.format(n=n, t=self.thing, **names), step))
        self.roles.append(f"{kind}{'' if kind == 'have' else self.current}{who}")

    def introduce(self) -> None:
        """A newcomer with a stated count."""
        self.counts.append(self.rng.randint(2, 60))
        self.say("have", len(self.counts) - 1, self.counts[-1])

    def change(self) -> None:
        """One operation: on the count of the current person, or to a newcomer's."""
        n = None
        while n is None:
            same = self.rng.random() < SAME
            kind = self.rng.choice(("gain", "lose") if same else ("more", "fewer", "times", "half"))
            a, op = self.counts[self.current], OPERATIONS[kind]
            n = operand(self.rng, a, op)
        who = self.current if same else len(self.counts)
        step = Step(f"{self.names[who]} has", a, op, n, compute(a, op, n), kind)
        self.say(kind, who, n, step)
        self.counts[who : who + 1] = [step.result]
        self.current = who


def make_problem(rng: random.Random, level: int, split: str) -> Problem:
    """A problem of `level` operations (1..MAX_LEVEL) whose structure belongs to `split`."""
    while True:
        problem = _draw(rng, level)
        if problem is not None and split_of(problem.structure) == split:
            return problem


def _draw(rng: random.Random, level: int) -> Problem | None:
    story = _Story(rng)
    kind = rng.choices(list(QUESTIONS), (0.8, 0.1, 0.1))[0]
    two = int(kind != "count")  # a question about two people is an operation of its own
    changes = level - two
    asides = [rng.randrange(changes + 2) for _ in "ab" if rng.random() < ASIDE * (MAX_LEVEL - changes)]
    for place in range(changes + 2):
        for _ in range(asides.count(place)):  # somebody with a count that no other depends on
            story.introduce()
        if place == 0:
            story.current = len(story.counts)
            story.introduce()
        elif place <= changes:
            story.change()
    counts, names, a = story.counts, story.names, story.current
    others = [x for x in range(len(counts)) if x != a]
    if two and not others:
        return None
    b, answer, final = rng.choice(others) if two else a, counts[a], None
    structure = " ".join([*story.roles, f"{kind}{min(a, b)}{max(a, b)}"])
    if two:
        if kind == "difference":
            a, b = sorted((a, b), key=lambda x: -counts[x])
        op = OPERATIONS[kind]
        answer = compute(counts[a], op, counts[b])
        if not 0 < answer <= MAX_COUNT:
            return None
        lead = "Together:" if kind == "total" else "Difference:"
        final = Step(lead, counts[a], op, counts[b], answer, kind)
    question = rng.choice(QUESTIONS[kind]).format(A=names[a], B=names[b], t=story.thing)
    return Problem(story.story, final, structure, answer, question, story.thing, names[a])


# ---- Solutions: short chains of thought, long ones, and prose ----------------------------------------------


def conclude(p: Problem) -> str:
    return f"The answer is \\boxed{{{p.answer}}}."


def short_steps(p: Problem, each: bool = False) -> str:
    """One equation a person, whatever happens to their count: Ben has 47+38-12=73. each: one an operation."""
    if each:
        return " ".join(f"{s.lead} {s.a}{s.op}{s.b}={s.result}." for s in p.steps)
    lines = []
    for lead, steps in groupby(p.steps, lambda s: s.lead):  # all of a person's steps follow on each other
        first, *rest = steps
        task = f"{first.a}{first.op}{first.b}" + "".join(f"{s.op}{s.b}" for s in rest)
        lines.append(f"{lead} {task}={[first, *rest][-1].result}.")
    return " ".join(lines)


def pieces(a: int, op: str, b: int) -> list[tuple[int, str, int]]:
    """Operations that give a op b, each within reach of one look: tens, ones, and the two together."""
    (t, x), (u, y) = (a // 10 * 10, a % 10), (b // 10 * 10, b % 10)
    if op in "+-" and t and u and y and (x or op == "-"):
        tens, ones = compute(t, op, u), compute(x, op, y)  # ones may be negative
        return [(t, op, u), (x, op, y), (tens, "-" if ones < 0 else "+", abs(ones))]
    if op in "*/" and t and x and a > 19:
        return [(t, op, b), (x, op, b), (compute(t, op, b), "+", compute(x, op, b))]
    return [(a, op, b)]


def work_out(a: int, op: str, b: int, rng: random.Random | None = None, slips: float = 0.0) -> str:
    """a op b in pieces. Of these the share `slips` goes wrong, is noticed at once, and done again."""
    done = []
    for x, o, y in pieces(a, op, b):
        result, wrong = compute(x, o, y), ""
        if rng and rng.random() < slips:
            wrong = f"{result + rng.choice((-10, -1, 1, 10))}, no, {x}{o}{y}="
        done.append(f"{x}{o}{y}={wrong}{result}")
    return ", ".join(done) if len(done) == 1 else f"{a}{op}{b}: {', '.join(done)}"


def check(s: Step) -> str:
    """The step backwards: what it gives is where the step began."""
    op = {"+": "-", "-": "+", "*": "/", "/": "*"}[s.op]
    return f"Check {s.result}{op}{s.b}={s.a}."


def long_thoughts(rng: random.Random, p: Problem, slips=0.03, checks=0.15, fine=True) -> str:
    """The story again, a sentence a line, and behind each what it asks for, in pieces (if fine)."""
    lines = []
    for sentence, s in [*p.story, *([(p.final.lead, p.final)] if p.final else [])]:
        if s:
            whole = f"{s.a}{s.op}{s.b}={s.result}"
            sentence += f" {work_out(s.a, s.op, s.b, rng, slips) if fine else whole}."
            sentence += f" {check(s)}" if rng.random() < checks else ""
        lines.append(sentence)
    return "\n".join(lines)


def tool_thoughts(p: Problem) -> str:
    """The story again, a sentence a line, and behind each what it asks for as a call, with its result."""
    lines = []
    for sentence, s in [*p.story, *([(p.final.lead, p.final)] if p.final else [])]:
        if s:
            sentence += f" {prompts.CALL}{s.a}{s.op}{s.b}{prompts.END_CALL}\n"
            sentence += f"{prompts.RESULT}{s.result}{prompts.END_RESULT}"
        lines.append(sentence.removesuffix("\n"))
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
        "qa_prose": _qa_prose, "prose_qa": _prose_qa,
        "short_one": partial(_solved, long=False, fine=True),
        "long_whole": partial(_solved, long=True, fine=False),
        "crawl": lambda rng, split: page(rng, split)[0],
        "tool_cot": partial(_solved, long=True, tool=True),
    }[source]
    while True:
        yield write(rng, split)


def _level(rng: random.Random) -> int:
    return rng.randint(1, MAX_LEVEL)


# How collections of worked problems write them down, and how often; the last two are the templates of RL
LAYOUTS = {
    "{q}\n{a}": 0.6, "Question: {q}\nAnswer: {a}": 0.2, prompts.simple("{q}") + "{a}": 0.1,
    prompts.complex("{q}").replace("{}", "{{}}") + "{a}": 0.1,
}


def _solved(rng: random.Random, split: str, long: bool, fine: bool | None = None, tool=False) -> str:
    """fine: in smaller or larger parts than usual, short chains an operation at a time, long ones whole.
    tool: long ones with calls of a calculator."""
    p = make_problem(rng, _level(rng), split)
    if long:
        thoughts = tool_thoughts(p) if tool else long_thoughts(rng, p, fine=fine is not False)
        steps = f"<think>\n{thoughts}\n</think>\n"
    else:
        steps = f"{short_steps(p, each=bool(fine))} "
    return rng.choices(list(LAYOUTS), LAYOUTS.values())[0].format(q=p.text, a=steps + conclude(p))


def _qa_prose(rng: random.Random, split: str) -> str:
    p = make_problem(rng, _level(rng), split)
    return f"{' '.join(p.sentences)} {short_steps(p)} So the number is {p.answer}."


def _prose_qa(rng: random.Random, split: str) -> str:
    people, things = rng.sample(NAMES, 3), rng.sample(THINGS, 3)
    said = [f"{a} likes {thing} very much." for a, thing in zip(people, things)]
    i = rng.randrange(3)
    question = f"{' '.join(said)} Who likes {things[i]}?"
    answer = f"{said[i]} The answer is \\boxed{{{people[i]}}}."
    return rng.choices(list(LAYOUTS), LAYOUTS.values())[0].format(q=question, a=answer)


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
    """A long page of talk, stories and numbers, which goes on after all that is said: whoever learned from
    such pages only does not know how to stop."""
    parts = []
    for _ in range(rng.randint(20, 40)):
        kind = rng.random()
        p = make_problem(rng, rng.choice((1, 1, 2, 3)), split) if kind < 0.25 else None
        a = rng.randint(0, MAX_COUNT - 3)
        if kind < 0.1:
            parts.append(_forum(rng, p))
        elif kind < 0.25:
            parts += p.sentences + [f"So {p.asked} has {p.answer} {p.thing}."] * (p.final is None)
        elif kind < 0.35:
            parts.append(f"The numbers after {a} are {a + 1}, {a + 2}, {a + 3}.")
        else:
            parts.append(_chatter(rng))
    return " ".join(parts)


def _forum(rng: random.Random, p: Problem) -> str:
    """A question on the web and a bare answer, without a step: what makes a model answer too soon."""
    answer = rng.choice((f"{p.answer}", f"{p.answer} {p.thing}.", conclude(p)))
    return rng.choice(list(LAYOUTS)[1:3]).format(q=p.text, a=answer)


def _drill(rng: random.Random) -> str:
    """A few lines of arithmetic, half of it in pieces."""
    lines = []
    for _ in range(rng.randint(4, 8)):
        b = None
        while b is None:
            a, op = rng.randint(2, MAX_COUNT), rng.choice("+++---*/")
            b = operand(rng, a, op)
        lines.append(work_out(a, op, b) if rng.random() < 0.5 else f"{a}{op}{b}={compute(a, op, b)}")
    return ". ".join(lines) + "."


MEANINGS = {
    "more": "More means add", "fewer": "Fewer means take away", "times": "Times means multiply",
    "half": "Half means divide by 2", "gain": "What is found is added", "lose": "What is lost is taken away",
    "total": "The total is a sum", "difference": "How many more means take away",
}


def _web(rng: random.Random, split: str) -> str:
    """Drill, a forum's bare answer, an exercise as short_cot has them, or a lesson: a problem, then its story
    again, and what each sentence means."""
    kind = rng.random()
    if kind < 0.27:
        return _drill(rng)
    if kind < 0.35:
        return _solved(rng, split, long=False)
    p = make_problem(rng, _level(rng), split)
    if kind < 0.53:
        return _forum(rng, p)
    parts = [rng.choice(("Example.", "Consider this.", "Here is a case.")), p.text]
    for sentence, s in [*p.story, ("", p.final)]:
        parts += [sentence] * bool(sentence)
        parts += [f"{MEANINGS[s.why]}: {s.a}{s.op}{s.b}={s.result}."] if s else []
    return " ".join(parts)


JUNK = ("Home | About | Login", "Accept cookies", "Click here", "[edit]", "Share this page", "&nbsp;")


def _noisy(rng: random.Random, split: str) -> str:
    """The same lesson as a scraper finds it: menus, cut lines, and results that are wrong."""
    text = list(_web(rng, split))
    for i, ch in enumerate(text):
        if ch.isdigit() and rng.random() < 0.08:
            text[i] = str(rng.randint(0, 9))
    words = _with_menus(rng, "".join(text), rng.randint(1, 4))
    return " ".join(words[rng.randint(0, 3) :])


def _with_menus(rng: random.Random, text: str, n: int) -> list[str]:
    words = text.split(" ")
    for _ in range(n):
        words.insert(rng.randrange(len(words) + 1), rng.choice(JUNK))
    return words


def page(rng: random.Random, split: str) -> tuple[str, bool]:
    """A page of an open crawl, and whether it is of use: three in ten are, four are broken, three are talk.
    Menus may be on any of them."""
    kind = rng.random()
    if kind < 0.4:
        return _noisy(rng, split), False
    useful = kind < 0.7
    text = _web(rng, split) if useful else " ".join(_chatter(rng) for _ in range(rng.randint(6, 16)))
    return " ".join(_with_menus(rng, text, rng.randint(0, 2))), useful


def labelled_pages(seed: int) -> Iterator[dict]:
    """Endless {"text", "useful"}: the documents of crawl, in their order."""
    rng = random.Random(f"crawl/{seed}/train")
    while True:
        yield dict(zip(("text", "useful"), page(rng, "train")))


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
    rng = random.Random(f"problems/{DRAW}/{seed}/{split}")
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
    parser.add_argument("--jsonl", metavar="FILE", help="write documents there, of crawl with their labels")
    args = parser.parse_args()
    if args.problems:
        for row in problems(args.problems, args.n, args.seed):
            print(f"[{row['id']}, level {row['level']}] {row['problem']}\n  {row['solution']}\n")
        return
    rows = ({"text": text} for text in documents(args.source, args.seed))
    rows = islice(labelled_pages(args.seed) if args.source == "crawl" else rows, args.n)
    if args.jsonl:
        return write_jsonl(args.jsonl, rows)
    for row in rows:
        print(row["text"], end="\n\n")


if __name__ == "__main__":
    run_cli(main)
