r"""Is this the right answer? Final answers of responses, mathematical equivalence, rewards, benchmarks.

    python verify.py --grade FILE.jsonl           grade responses (or reference solutions) against golds
    python verify.py --ckpt DIR --bench synth     evaluate a checkpoint on generated held-out problems
    python verify.py --ckpt DIR --bench gsm8k,math500 --data DIR

Reward decides what RL learns, so a verifier has two enemies: a policy that searches for strings it wrongly
accepts, and a string that hangs it or runs code. Hence the choices made here:

1. Text is never evaluated by Python (or sympy, whose parsing is eval). A small recursive-descent parser turns
   LaTeX or plain text into nested tuples; what it does not understand is equal only to the same text.
2. Numbers are exact fractions. Irrational ones have 60 digits; expressions in variables are compared at
   several points. Nothing is simplified or solved, and no float tolerance calls 0.33 a third.
3. Everything is bounded by counting (characters, tokens, depth, digits, steps), never by clocks, signals,
   threads or processes. So a verdict is the same every time and in every thread, and every input gets one.

The conventions, where people may differ, and [where to change them]:

    no box       reward: no credit. --grade: "####", "the answer is", the last formula or number [_from_prose]
    which box    the last closed \boxed{}, after </think> if there is one there; neighbours joined by ","
                 "and" "or" are one list; empty, "?" or "..." is no answer [_last_box]
    text         what is not mathematics: all of it counts, but for the capital of a word [visible]; "no
                 solution" is ∅ [REWRITTEN]; a choice "C) 12" is C, and c is the gold C [same_choice]
    units        words behind a number: known ones [UNITS], or a plural of what is counted, but none that
                 calculates [NO_UNIT, SCALES]. Ignored if one side has none; two must be the same (not
                 converted). The answer 3s (m, h, g, L) is 3 if the gold is a number [_bare]
    percent      28% = 28% = 0.28, and 28% = 28 (it said "in percent"); but 28 is not 0.28 [same_values]
    degrees      90° = 90; inside sin, cos, ... a degree is π/180. Not 90° = π/2 [call]
    lists, sets  without brackets or in {}: any order. ± stands for both values: a list of two [same_lists]
    tuples       in order; (1,2) = "1, 2" = "x=1, y=2" (by name), but not {1,2} [same_assignments]
    intervals    brackets count; x > 2 is (2,∞), 1 < x ≤ 3 is x ∈ (1,3] is (1,3]; inequalities in a list that
                 overlap hold together: x > -2, x < 3 [segments]
    assignment   x = 5 is 5; but x = 5 is not y = 5, x² = 4 not 4, 5 = 6 nothing; f(x) = 2x is y = 2x; the
                 answer m+n = 5 is the gold 5; of √2 ≈ 1.41 the exact value counts [defined, _bare]
    equations    a constant multiple (positive, for inequalities); without variables side by side [same_links]
    f(x)         an unknown for each x if the bracket holds no sum (I(0), P(A)), with f and g always; else a
                 product, as in n(n+1) [APPLICATION]
    domains      real, unless there is an i; n, m, k (i-n, p, q, M, N) whole by floors, powers of -1 [points]
    rounding     never: 0.333 is not 1/3. A decimal of 14 or more digits is, in its last place [tolerance]
    numbers      3\frac12 and 3 1/2 are 7/2; 204_5 is not 204_6, nor 204; 3:2 is no fraction; log is base 10,
                 ln natural; odd roots of negative numbers are real; i, e, π always the constants
"""

import contextlib
import functools
import math
import os
import re
import time
import unicodedata
import zlib
from argparse import BooleanOptionalAction
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from statistics import fmean

import mpmath

from data import files

MAX_CHARS, MAX_TOKENS = 2_000, 800  # of an answer; longer ones are only equal to themselves
MAX_DEPTH = 32  # of nested groups
MAX_BITS = 40_000  # of a numerator or denominator: 2006! has 19,000
MAX_STEPS = 12_000  # of evaluation and comparison, together well below 100 ms
MAX_RESPONSE = 200_000  # characters of a response that are looked at, from its end


def reward(response: str, gold: str) -> float:
    """+1 if the last box of the response is equivalent to the gold answer; -1 if not, or without a box."""
    answer = extract_answer(response, box_only=True)  # no format reward, no length penalty (arXiv 2506.20512)
    return 1.0 if answer is not None and is_equivalent(answer, gold) else -1.0


def extract_answer(response: str, box_only: bool = False) -> str | None:
    """The final answer that a response gives, as text, or None: the last box. Without any, and unless
    `box_only`, what follows "####" or the last "the answer is", else the last formula or number."""
    response = response[-MAX_RESPONSE:]
    final = response.rpartition("</think>")[2]
    run_on = RUN_ON.search(final, 1)  # not at the start: a response may begin by repeating the question
    if run_on and final[: run_on.start()].strip():
        final = final[: run_on.start()]
    answer = _last_box(final)
    if answer is None and len(final) < len(response):
        answer = _last_box(response)
    if answer is None and not box_only:
        answer = _from_prose(final[-4_000:])
    answer = answer.strip() if answer else ""
    return answer if answer.strip("?.…-_ \\$") else None


def is_equivalent(answer: str, gold: str) -> bool:
    """Is the answer mathematically the gold answer, by the conventions above? Never raises on any two texts.
    Equal texts are equal; else both become trees, and the trees are compared."""
    if len(answer) > MAX_CHARS or len(gold) > MAX_CHARS:
        return answer.strip() == gold.strip()
    answer, gold = clean(answer), clean(gold)
    if not answer or not gold or answer == gold:
        return answer == gold != ""
    if visible(answer) == visible(gold) != "" or same_choice(answer, gold):
        return True
    a, b = parse(answer), parse(gold)
    is_text = None in (a, b) or is_prose(answer) and is_prose(gold)
    with contextlib.suppress(OutOfSteps, ArithmeticError, RecursionError):
        return not is_text and same(_bare(a, b), b, Work())
    return False


def same(a: tuple, b: tuple, work: "Work") -> bool:
    """Are two trees equal? Each rule says True or False, or None where it has no opinion."""
    work.spend(5)
    if a == b:
        return True
    for rule in (same_assignments, same_sets, same_lists, same_relations, same_units, same_shapes):
        if (verdict := rule(a, b, work)) is not None:
            return verdict
    return same_values(a, b, work)


def same_values(a: tuple, b: tuple, work: "Work") -> bool:
    """Expressions: equal at every point where both have a value, at least three if there is a variable."""
    one_percent = ("%" in kinds(a)) != ("%" in kinds(b))
    for percent in (Fraction(1, 100), ONE) if one_percent else (Fraction(1, 100),):
        work.percent, checked = percent, 0
        for x, y in samples(a, b, work):
            if not close(x, y, work, tolerance(a, b)):
                break
            checked += 1
        else:
            if checked >= (3 if names(a) | names(b) else 1):
                return True
    return False


# ---- Below: tokens, parser, numbers, equality, evaluation --------------------------------------------------

BOX_TOKENS = re.compile(r"\\(?:boxed|fbox)\s*\{|\\(?:boxed|fbox)\s+([^\s{}$\\]+)|\\.|[{}]", re.S)
JOINT = re.compile(  # what may stand between two boxes of one list
    r"(?:[\s$.,;&]|\\[\[\]()]|\\quad|\\qquad|\\text\s*\{\s*(?:,?\s*and|or)\s*\}|\band\b|\bor\b)*")
RUN_ON = re.compile(r"<\|[a-z_]+\|>|</s>|\n[ \t]*(?:Problem|Question|User|Human|Q):")  # the model went on
ANSWER_IS = re.compile(
    r"(?i)(?:answer|correct (?:choice|option)|答案|respuesta|réponse|antwort|resposta|ответ)"
    r"(?:\s*(?:is|are|(?:must|should) be|es|est|ist|é|是|为)\b\s*:?|\s*[:：=]|\s*\n|\s*(?=[$\\]))\s*"
    r"|\b(?:pick|choose) (?:option )?(?=(?-i:\(?[A-J]\b))|(?=(?-i:\b[A-J])\)? is (?:the )?(?:correct|right))")
FORMULA = re.compile(  # in "$2 and $3" there is no formula, nor in "$ 2 and $ 3"
    r"\$\$(.{1,400}?)\$\$|\\\[(.{1,400}?)\\\]|\\\((.{1,400}?)\\\)|\$(?!\s)([^$]+)(?<!\s)\$(?!\d)"
    r"|\$\s+(\([^$]{1,200}\)|[^$]{0,200}[\\^=][^$]{0,200})\s\$(?!\d)", re.S)
NUMBER = re.compile(  # a minus after a digit or a bracket is a subtraction
    r"(?:(?<![\w)%.])[-−])?\$?(?:\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?:\.\d+)?(?:/\d+)?(?:\s?\\?%)?")
MATHS = re.compile(  # a formula without dollars; a single letter is none before a word, as in "5 a day"
    r"(?:\\[A-Za-z]+\s*|(?:sin|cos|tan|ln|log|sqrt|pi|[pb]matrix)\b|[\d\s.,:;()\[\]{}+\-*/^_=<>≤≥≠≈|!%$°π√∞]"
    r"|\\.|[½²³−×÷·'′&€£¥₹]|(?<![A-Za-z])[A-Za-z](?![A-Za-z'’]|\s+[A-Za-z]{2}))*")


def _last_box(text: str) -> str | None:
    """Content of the last closed box, joined with the boxes right before it that belong to the same list.
    One pass: 100 kB of braces cost no more than 100 kB of anything else."""
    first = re.search(r"\\(?:boxed|fbox)", text)
    if not first:
        return None
    begin = len(text[: first.start()].rstrip("\\"))  # before the backslashes that may escape it
    boxes: list[tuple[int, int, str]] = []  # (start, end, content), outermost only
    stack: list[tuple[int, int]] = []  # (start of \boxed or -1 for a plain brace, start of its content)
    for token in BOX_TOKENS.finditer(text, begin):
        if token[1]:  # \boxed 5
            boxes.append((token.start(), token.end(), token[1].rstrip(".,;")))
        elif token[0] == "}" and stack:
            start, inside = stack.pop()
            if start >= 0:
                while boxes and boxes[-1][0] > start:  # a box inside this one
                    boxes.pop()
                boxes.append((start, token.end(), text[inside : token.start()]))
        elif token[0][-1] == "{" and token[0] != "\\{":
            stack.append((token.start() if len(token[0]) > 1 else -1, token.end()))
    answers = [content for _, _, content in boxes[-1:]]
    for left, right in zip(boxes[-2::-1], boxes[::-1]):
        between = text[left[1] : right[0]]
        if len(answers) == 20 or len(between) > 60 or not JOINT.fullmatch(between) or not left[2].strip():
            break
        answers.append(left[2])
    return ", ".join(reversed(answers)) if answers else None


def _from_prose(text: str) -> str | None:
    """The answer of a response without a box: by its marker, else the last formula, bold text or number."""
    text = text.replace("**", " ").strip()
    if "####" in text:
        return text.rpartition("####")[2].strip(": ").split("\n")[0]
    ends = [found.end() for found in ANSWER_IS.finditer(text)]
    if ends and text[ends[-1] :].strip():
        return _first_answer(text[ends[-1] :].strip())
    last_line = text.rpartition("\n")[2]
    if formulas := list(FORMULA.finditer(last_line)):
        behind = NUMBER.findall(last_line[formulas[-1].end() :])
        return behind[-1] if behind else formulas[-1][formulas[-1].lastindex]
    # "…she needs 120/24 = 5 hours to read 120 pages": in a last line with a calculation, its result
    before, equals, result = last_line.rpartition("=")
    if equals and (numbers := NUMBER.findall(result) or NUMBER.findall(before)[-1:]):  # or "6 = x"
        return numbers[0]
    return (NUMBER.findall(text) or [None])[-1]


def _first_answer(text: str) -> str | None:
    """What follows "the answer is": a formula, a choice letter, a number of the sentence, or the sentence."""
    if formula := FORMULA.match(text):
        return formula[formula.lastindex]
    if choice := re.match(r"\(?([A-J])\)?(?!,? (?:and |or )?\(?[A-J]\b)(?=[.):,]|\s*$|\s+[a-z—–])", text):
        return choice[1]
    line = re.split(r"\n|\.(?:\s|$)", text)[0]
    formula = MATHS.match(line)[0]
    behind = line[len(formula) :]
    if re.search(r"[\d\\]", formula) or not behind:
        is_more = re.match(r"(?i)(?:or|and|to|plus|minus|times|[ap]\.?m|\w+ion|\w+ and \d+)\b", behind)
        return line if is_more else formula.rstrip(" ,;:([{-−!")
    is_more = re.search(r"(?i)\b(?:not|least|most|than|between|twice|half)\b", line)
    return line if is_more else next(iter(NUMBER.findall(line)), line)


# ---- Tokens: (kind, value, is there a space before it?), kinds num, sym, fn, word, text, op ----------------

UNICODE = str.maketrans("×·⋅∗÷⁄−–—′’", "****//---''") | str.maketrans({"≤": "<=", "⩽": "<=", "≥": ">=",
    "⩾": ">=", "∛": r"\sqrt[3]", "¢": " cent", "ℝ": r"\mathbb{R}"}) | {
    ord(sign): f"\\{name} " for sign, name in zip("≠≈∞°º∪∈∅±∓√∖αβγδεθλμπρστφω", (
        "ne approx infty degree degree cup in emptyset pm mp sqrt setminus alpha beta gamma delta epsilon "
        "theta lambda mu pi rho sigma tau phi omega").split())}
WRAPPER = r"\\(?:text(?:bf|it|rm|sf|normal)?|mbox|emph|math(?:rm|bf|it|sf)|operatorname|bold)\s*\{([^{}]*)\}"
TOKEN = re.compile(rf"(?P<wrapped>{WRAPPER})"
    r"|(?P<env>\\(?:begin|end)\s*\{(?:[pbB]?matrix|array|cases|aligned)\}(?:\{[lcr| ]*\})?)"
    r"|(?P<row>\\\\(?:\[[^\]]{0,9}\])?)"
    r"|(?P<skip>[\s~$]+|\\[,;:!()\[\] \n]|\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|limits"
    r"|q?quad|rm|bf|phantom|thinspace|[lL]arge|LARGE|[hH]uge|small|tiny|normalsize|underline|boldsymbol|bm)"
    r"(?![A-Za-z])|\\(?:text)?color\s*\{[^{}]*\})"
    r"|(?P<num>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3}(?![\d.]))?)"
    r"|(?P<word>[A-Za-z]+)|(?P<cmd>\\(?:[A-Za-z]+|.))|(?P<op><=|>=|==|\*\*|.)", re.S)
THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")  # 1,234,567
GROUPED = re.compile(r"(?<=\d)(?:\{,\}|,?\\! ?|\\,|\\;|\\ | )(?=\d{3}(?!\d))")  # 10{,}000  10\,000  10 000
OPERATORS = {word: names.split()[0] for names in (
    *r"+ - _ { } ! & ' sqrt in cup pm mp setminus over choose lfloor rfloor lceil rceil row or".split(),
    *r"\$ € £ ¥ ₹".split(), "( langle", ") rangle", "* times cdot ast", "/ div", "^ **", "[ lbrack",
    "] rbrack", r"\{ lbrace", r"\} rbrace", r"| \| lvert rvert vert", "= == equiv", "approx simeq",
    "< lt", "> gt", "<= le leq leqslant", ">= ge geq geqslant", "ne neq", ": colon", r"% \% percent pct",
    ", ; and", "frac dfrac tfrac cfrac nicefrac", "binom dbinom tbinom", "degree circ degrees",
    "inf infty infinity oo", "emptyset varnothing") for word in names.split()}
COMMANDS = set("in le ne ge lt gt frac cup pm over choose".split())  # operators only behind a backslash
FUNCTIONS = set("sin cos tan cot sec csc arcsin arccos arctan arccot arcsec arccsc log ln lg exp cis".split())
APPLIED = set("max min gcd lcm".split())
REFUSED = set("sum prod int iint oint lim dots ldots cdots bmod pmod mod begin end sinh cosh tanh".split())
UNITS = {word: names.split()[0] for names in (  # plurals of others are units too, but have no other names
    "mm millimeter", "cm centimeter", "m meter metre", "km kilometer", "inch inche in", "ft foot feet",
    "yd yard", "mi mile", "ml milliliter", "L l liter litre", "mg milligram", "g gram", "kg kilogram",
    "lb pound", "oz ounce", "s sec second", "min minute", "h hr hour", "year yr", "C celsius", "F fahrenheit",
    "€ euro eur", "£ gbp", "$ \\$ dollar usd buck", "¥ yen", "₹ rupee", *"day week month unit mph am".split(),
    *"pm cent people old mol rad N J W V A K Hz eV kJ kW kPa kWh mu".split()) for word in names.split()}
CURRENCIES = ("\\$", "€", "£", "¥", "₹")
SCALES = dict(dozen=12, hundred=100, thousand=1000, million=10**6, billion=10**9, trillion=10**12)
SCALES |= {word: Fraction(1, n) for word, n in dict(half=2, halve=2, tenth=10, hundredth=100).items()}
NO_UNIT = re.compile(  # words that do something to a number
    r"plu|minu|time|over|by|more|les|fewer|than|at|least|most|up|to|or|not|no|if|for|from|between|else|"
    r"except|otherwise|without|is|are|wa|ha|mod|.*teen|.*[tx]y|one|two|three|.*th|third|percent|.*u|"
    r"power|negative|quarter|pair|factorial|reciprocal|inverse|fold|zero")


def tokenize(text: str, words: str = "word") -> list[tuple[str, str, bool]]:
    r"""words: the kind of words, "text" in \text{...}; there a letter may be a unit, a point is nothing."""
    tokens, spaced = [], False
    for match in TOKEN.finditer(text):
        kind, value = match.lastgroup, match[0]
        if kind == "wrapped":
            tokens[-1:] = [("letter", "mu", False)] if tokens and tokens[-1][1] == "mu" else tokens[-1:]
            content = match[2] if re.search(r"\d", match[2]) else match[2].replace(".", "").strip(" ()~")
            tokens += tokenize(content.removeprefix("-") if len(content) > 2 else content, "text")
        elif kind in ("env", "row"):
            tokens.append(("op", {"b": "begin", "e": "end"}.get(value[1], "row"), spaced))
        elif kind != "skip":
            tokens.append((kind, value, spaced) if kind == "num" else _named(kind, value, spaced, words))
        spaced = kind == "skip"
        if len(tokens) > MAX_TOKENS:
            raise ValueError
    return tokens


def _named(kind: str, value: str, spaced: bool, words: str) -> tuple[str, str, bool]:
    """A command, a word or a sign."""
    name = value[1:] if kind == "cmd" and value[1].isalpha() else value
    if not name[0].isalpha() and name not in OPERATORS or name in REFUSED:
        raise ValueError
    if name in FUNCTIONS:
        return "fn", name, spaced
    if name in OPERATORS and not (kind == "word" and name in COMMANDS):
        return "op", OPERATORS[name], spaced
    if kind == "word" and len(name) > 1 and name not in ("pi", "theta", *APPLIED):
        return words, name, spaced
    if words == "text" and name in UNITS:
        return "letter", name, spaced
    return "sym", name.replace("var", "") if kind == "cmd" else name, spaced


# ---- Parser: from tokens to a tree. A node is (kind, child, ...); every child that is a tuple is a node ----
#    answer = relation {"," relation}                relation = union {("=" | "<" | ... | "in") union}
#    union  = ratio {"cup" ratio}                    ratio    = sum {":" sum} [unit]
#    sum    = term {("+" | "-" | "±") term}          term     = ["-"] power {("*" | "/" | nothing) power}
#    power  = atom {"^" exponent | "!" | "%" | "°"}  atom     = number, name, function, group, \frac, ...

ZERO, ONE = Fraction(0), Fraction(1)
CLOSING = {"{": ("}",), "\\{": ("\\}",), "(": (")", "]"), "[": ("]", ")")}
AROUND = {"lfloor": "rfloor", "lceil": "rceil", "|": "|"}  # one term
APPLICATION = re.compile(  # a letter before a bracket without a sum in it
    r"(?<![A-Za-z\\])(\\?[A-Za-z]+)(?:_\w|_\{\w*\}|')*\s*\(\s*-?[^()+\-±]*(?:\([^()]*\)[^()+\-±]*)*\)")
STARTERS = set("( [ { frac sqrt binom lfloor lceil begin".split())


class Parser:
    def __init__(self, tokens: list, applied: Iterable[str]):
        self.tokens = tokens + [("end", "", False)] * 3  # so that looking ahead needs no check
        self.at = self.depth = self.bars = 0
        self.applied = {"f", "g", "F", "G", *APPLIED, *applied}

    def peek(self, *values: str) -> bool:
        return self.tokens[self.at][0] == "op" and self.tokens[self.at][1] in values

    def take(self, *values: str) -> str | None:
        found = self.peek(*values)
        self.at += found
        return self.tokens[self.at - 1][1] if found else None

    def expect(self, *values: str) -> str:
        if not self.peek(*values):
            raise ValueError
        return self.take(*values)

    def nested(self, rule: Callable) -> tuple:
        """Every recursion passes here: by counting, the limit does not depend on the caller's stack."""
        if self.depth == MAX_DEPTH:
            raise ValueError
        self.depth += 1
        node = rule()
        self.depth -= 1
        return node

    def chain(self, kind: str, rule: Callable, *between: str) -> tuple:
        """A rule once, or several times with signs between: then a node of this kind."""
        nodes, signs = [rule()], []
        while sign := self.take(*between):
            signs.append(sign)
            nodes.append(_signed(sign, rule()))
        head = (kind, " ".join(signs))[: 1 + (kind == "rel")]
        return (*head, *nodes) if signs else nodes[0]

    def answer(self) -> tuple:
        items = self.items()
        if self.tokens[self.at][0] != "end" or not items:
            raise ValueError
        return ("list", *items) if len(items) > 1 else items[0]

    def items(self) -> list[tuple]:
        """Relations with commas between; "1, 2, and 3" and a trailing comma are forgiven."""
        items, signs, more = [], set(), True
        while more and self.tokens[self.at][0] != "end" and not self.peek(")", "]", "}", "\\}"):
            items.append(self.relation())
            more = items[-1][0] == "unit" and self.tokens[self.at][0] == "num"  # 2 hours 30 minutes
            while sign := self.take(",", "or"):
                signs.add(more := sign)
        if "or" in signs and all(item[0] == "rel" and item[1] != "=" for item in items):
            return [("union", *items)]
        return items

    def relation(self) -> tuple:
        return self.chain("rel", self.union, "=", "<", ">", "<=", ">=", "ne", "in", "approx")

    def union(self) -> tuple:
        node = self.chain("union", self.ratio, "cup")
        return ("minus", node, self.ratio()) if self.take("setminus") else node

    def ratio(self) -> tuple:
        node = self.chain("ratio", self.sum, ":")
        unit = self.unit()
        if unit and (names(node) or node[0] == "%"):  # 25% profit
            raise ValueError
        return ("unit", node, unit) if unit else node

    def unit(self) -> str:
        r"""The unit behind a value, as in `5 square inches`, `100 km/h` or `15\text{ cm}^2`, or ""."""
        words: list[str] = []
        while True:
            kind, value, _ = self.tokens[self.at]
            is_sign = value in ("*", "/", "^", "{", "-") or value == "}" and "{" in words[-3:]
            if not (kind in ("text", "word", "letter") or (is_sign if words else value in CURRENCIES) or (
                    words and words[-1] in {"num": ("^", "{", "-"), "sym": ("*", "/")}.get(kind, ()))):
                return _unit(words) if words else ""
            words.append(value)
            self.at += 1

    def sum(self) -> tuple:
        return self.chain("add", self.term, "+", "-", "pm", "mp")

    def term(self) -> tuple:
        sign = self.take("+", "-", "pm", "mp")
        return _signed(sign, self.nested(self.term)) if sign else self.product()

    def product(self) -> tuple:
        factors = [self.power()]
        while True:
            kind, value, _ = self.tokens[self.at]
            if kind in ("text", "word") and (scale := SCALES.get(value.casefold().removesuffix("s"))):
                self.at += 1
                factors.append(("num", scale))  # 1.5 million
            elif (sign := self.take("*", "/")) or self.follows_factor(factors):
                factor = _signed(self.take("-") if sign else None, self.power())
                factors.append(("inv", factor) if sign == "/" else factor)
            else:
                break
        if factors[-1][0] == "matrix" and len(factors) > 1:  # a number times a matrix
            rows = ((("mul", *factors[:-1], cell) for cell in row[1:]) for row in factors[-1][1:])
            return ("matrix", *(("row", *row) for row in rows))
        return ("mul", *factors) if len(factors) > 1 else factors[0]

    def follows_factor(self, factors: list) -> bool:
        """Does a factor follow without a sign? A number only after a bracket, or with a power of its own
        (n2^{n-1}): `x2` is no product."""
        kind, value, spaced = self.tokens[self.at]
        if kind == "num":
            before, _, sign, *power = (t[1] for t in self.tokens[self.at - 1 : self.at + 4] if t[1] != "{")
            return before in (")", "}", "!") or sign == "^" and (spaced or not power[0].isdigit())
        if kind == "word":  # letters to multiply, unless it is the unit of what came before
            return UNITS.get(value) is None and (value.isupper() or not (spaced and len(value) > 2))
        if kind == "letter":
            return any(map(names, factors))
        return kind in ("sym", "fn") or kind == "op" and (value in STARTERS or value == "|" and not self.bars)

    def power(self) -> tuple:
        node, signs = self.nested(self.atom), 0
        while sign := self.take("^", "!", "%", "degree"):
            if (signs := signs + 1) > 8:
                raise ValueError
            minus = self.take("-", "+") if sign == "^" else None
            node = ("pow", node, _signed(minus, self.nested(self.power))) if sign == "^" else (sign, node)
        return node

    def atom(self) -> tuple:
        kind, value, _ = self.tokens[self.at]
        self.at += 1
        rules = dict(num=self.number, sym=self.name, letter=self.name, fn=self.function, word=self.word)
        return rules.get(kind, self.bracketed)(value)

    def bracketed(self, opening: str) -> tuple:
        """What starts with a sign or a command that takes arguments."""
        if opening in CLOSING:
            return self.group(opening)
        if opening in ("frac", "binom"):
            top, bottom = self.argument(), self.argument()
            return ("mul", top, ("inv", bottom)) if opening == "frac" else ("binom", top, bottom)
        if opening == "sqrt":
            root = self.group("[") if self.take("[") else ("num", Fraction(2))
            return ("pow", self.nested(self.atom), ("inv", root))
        if opening in CURRENCIES:
            return ("unit", self.product(), _unit([opening]))
        if opening in AROUND:
            self.bars += opening == "|"
            node = ("abs" if opening == "|" else opening, self.sum())
            self.bars -= self.expect(AROUND[opening]) == "|"
            return node
        if opening == "begin":
            return self.matrix()
        if opening in ("inf", "emptyset"):
            return (opening,)
        raise ValueError

    def group(self, opening: str) -> tuple:
        bars, self.bars = self.bars, 0
        items = self.items()
        if opening == "{" and len(items) == 1 and (sign := self.take("over", "choose")):
            below = self.sum()
            items = [("mul", items[0], ("inv", below)) if sign == "over" else ("binom", items[0], below)]
        closing = self.expect(*CLOSING[opening])
        self.bars = bars
        if opening == "\\{" or opening == "{" and len(items) > 1:
            return ("set", *items) if items else ("emptyset",)
        if not items or len(items) == 1 and opening + closing in ("(]", "[)"):
            raise ValueError
        return ("seq", opening + closing, *items) if len(items) > 1 else items[0]

    def matrix(self) -> tuple:
        """Rows, one below the other. A system of equations is a list of them."""
        rows, row, sign = [], [], ""
        while sign != "end":
            if not self.peek("&", "row", "end"):
                row.append(self.relation())
                self.take(",")
            sign = self.expect("&", "row", "end")
            if sign != "&" and row:
                rows, row = [*rows, ("row", *row)], []
        if all(len(row) == 2 and row[1][0] == "rel" for row in rows):
            return ("list", *(row[1] for row in rows))
        return ("matrix", *rows)

    def argument(self) -> tuple:
        r"""One argument of \frac: a group or a token, of a number only the first digit: \frac12 is 1/2."""
        kind, value, _ = self.tokens[self.at]
        if kind != "num":
            return self.nested(self.atom)
        self.at += 1
        if value.isdigit() and len(value) > 1:
            self.tokens[self.at - 1 : self.at] = [("num", value[0], False), ("num", value[1:], False)]
        return _num(self.tokens[self.at - 1][1])

    def number(self, digits: str) -> tuple:
        return ("based", digits, self.subscript()) if self.take("_") else _num(digits)

    def name(self, name: str) -> tuple:
        """A variable, or a function of the kind f(x): an unknown of its own for each argument."""
        while mark := self.take("_", "'"):
            name += "_" + self.subscript() if mark == "_" else mark
        plain = name.partition("_")[0].rstrip("'")
        is_applied = plain in self.applied and plain not in CONSTANTS
        if not is_applied or not self.peek("(", "\\{" if plain in APPLIED else "("):
            return ("sym", name)
        opening, arguments = self.take("(", "\\{"), self.nested(self.items)
        self.expect(*CLOSING[opening])
        return ("apply", name, *arguments)

    def subscript(self) -> str:
        ahead = [value for _, value, _ in self.tokens[self.at :]]
        end = ahead.index("}") if ahead[0] == "{" else 0
        self.at += end + 1
        return " ".join(ahead[1:end]) or ahead[0]

    def word(self, word: str) -> tuple:
        """Letters without a space: a product (`xy`), or the name of a figure (`ABC`); else it is text."""
        if len(word) > 2 and word.isupper():
            currency = self.tokens[self.at][0] == "num" and UNITS.get(word.casefold())  # USD 5
            return ("unit", self.power(), _unit([word])) if currency else ("sym", word)
        if len(word) > 4 or len(word) > 2 and not word.islower() or word == "no":
            raise ValueError
        self.tokens[self.at - 1 : self.at] = [("sym", letter, False) for letter in word]
        return self.name(word[0])

    def function(self, name: str) -> tuple:
        base = self.argument() if self.take("_") else None
        power = _signed(self.take("-", "+"), self.nested(self.power)) if self.take("^") else None
        if power == ("neg", ("num", ONE)):
            name, power = "arc" + name, None
        if self.peek("(", "{", "|"):
            argument = self.nested(self.atom)
        else:  # \sin 2x \cos x: everything up to the next function, bracket or sign
            factors = [_signed(self.take("-"), self.power())]
            while self.tokens[self.at][1] not in FUNCTIONS | {"(", "begin"} and self.follows_factor(factors):
                factors.append(self.power())
            argument = ("mul", *factors)
        node = ("call", name, argument, base) if base else ("call", name, argument)
        return ("pow", node, power) if power else node


def _unit(words: list[str]) -> str:
    """A unit as text, each name in its first form. Known ones, or at least plurals, like what is counted
    (`5 students`); ValueError for words that may change a value (`5 squared`)."""
    unit, is_unit = "", False
    for word in words:
        singular = word.casefold().removesuffix("s") if len(word) > 2 else word
        name = UNITS.get(word) or UNITS.get(word.casefold()) or UNITS.get(singular)
        if word.isalpha():
            is_unit = name is not None or word[-1] == "s"
        if name is None and NO_UNIT.fullmatch(singular):
            raise ValueError
        unit += " " * word.isalpha() + (name or singular) * (word not in "{}")
    if not is_unit and words[0] not in CURRENCIES:
        raise ValueError
    return unit.strip().replace(" per ", "/ ")


def _num(digits: str) -> tuple:
    if len(digits) > 1_000:
        raise ValueError
    significant = re.sub(r"[eE].*|\.", "", digits).lstrip("0")  # of a decimal they are counted
    return ("num", Fraction(digits), *([] if digits.isdigit() else [len(significant)]))


def _signed(sign: str | None, node: tuple) -> tuple:
    node = ("neg", node) if sign in ("-", "mp") else node
    return ("pm", node) if sign in ("pm", "mp") else node


@functools.lru_cache(maxsize=512)  # a gold answer is compared with many responses
def parse(text: str) -> tuple | None:
    """The tree of an answer, or None if it is not in the language: then it is text."""
    try:
        text = re.sub(r"\\(?:left|right)(?![A-Za-z])", "", GROUPED.sub("", text))
        if not re.search(r"[(\[]|\\{", text):  # in (1,234) there are two numbers
            text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
        applied = [name[1:] if name[0] == "\\" else name[-1] for name in APPLICATION.findall(text)]
        return Parser(tokenize(text), applied).answer()
    except (ValueError, KeyError, RecursionError):  # how the parser says so
        return None


# ---- Numbers: exact fractions; where they end, mpmath's real (mpf) and complex (mpc) ones of 60 digits -----

MP = mpmath.MPContext()  # our own: nobody else changes its precision
MP.dps = 60
MP.pi(prec=1000), MP.ln2(prec=1000)  # mpmath keeps these; threads could err while longer ones replace them
NOISE = -133  # bits, 1e-40: a sum that cancels to this share of its terms is zero
CLOSE = MP.mpf("1e-35")  # relative difference at which two numbers of 60 digits are one
EXP_LIMIT, ANGLE_LIMIT = 2_302_500, 10**9  # e to that power has a million digits; radians
CONSTANTS = {"pi": +MP.pi, "e": +MP.e, "i": MP.mpc(0, 1)}


class OutOfSteps(Exception):
    """The comparison took more than MAX_STEPS; the verdict is False."""


class Work:
    """What an evaluation needs: steps left, values of the names, what a percent and a degree are worth."""
    steps, names, percent, degree, is_real = MAX_STEPS, {}, Fraction(1, 100), ONE, False

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise OutOfSteps


def settled(x, work: Work, before=MP.zero):
    """The result of an operation, paid for; ArithmeticError if it is a fraction that is too long.
    Other numbers lose their noise: a part is zero if it is tiny beside the other part, or beside the same
    part of `before`, to which something was added. So a real number is an mpf."""
    if isinstance(x, Fraction):
        bits = x.numerator.bit_length() + x.denominator.bit_length()
        if bits > 2 * MAX_BITS:
            raise ArithmeticError
        work.spend(bits * bits >> 20)
        return x
    work.spend(1)
    if not x.imag and not before.imag:
        return x.real if not before or MP.mag(x) > MP.mag(before) + NOISE else MP.zero
    re, im = MP.mag(x.real), MP.mag(x.imag)
    has_re = re > max(im, MP.mag(before.real)) + NOISE
    has_im = im > max(re, MP.mag(before.imag)) + NOISE
    if has_im and work.is_real:
        raise ArithmeticError
    return MP.mpc(x.real if has_re else 0, x.imag) if has_im else x.real if has_re else MP.zero


def close(a, b, work: Work, tolerance=CLOSE) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction) and tolerance is CLOSE:
        return a == b
    a, b = MP.convert(a), MP.convert(b)
    return abs(settled(a - b, work, a)) <= tolerance * max(abs(a), abs(b))


def exact(x) -> Fraction:
    """A number that must be rational, as in a factorial: itself, or the whole number that it is close to."""
    if isinstance(x, Fraction):
        return x
    if x.imag or abs(x) > 10**30:
        raise ArithmeticError
    nearest = MP.nint(x)
    is_whole = MP.mag(x - nearest) <= MP.mag(1 + abs(x)) + NOISE
    return Fraction(int(nearest)) if is_whole else Fraction(int(x * 2**200), 2**200)


# ---- The value of a tree at a point ------------------------------------------------------------------------

UNARY = {"neg": lambda x: -x, "inv": lambda x: 1 / x, "abs": abs, "unit": lambda x: x,
         "lfloor": lambda x: Fraction(math.floor(exact(x))), "lceil": lambda x: Fraction(math.ceil(exact(x)))}
ARCS = {"arcsin": MP.asin, "arccos": MP.acos, "arctan": MP.atan, "arccot": lambda x: MP.pi / 2 - MP.atan(x),
        "arcsec": lambda x: MP.acos(1 / x), "arccsc": lambda x: MP.asin(1 / x)}


def value(node: tuple, work: Work):
    """Fraction, mpf or mpc; ArithmeticError if there is none, or one beyond the limits."""
    work.spend(1)
    kind = node[0]
    if kind == "num":
        return node[1]
    if kind == "sym":
        return CONSTANTS.get(node[1]) or work.names[node[1]]
    if kind in ("add", "mul"):
        total = value(node[1], work)
        for child in node[2:]:
            term = value(child, work)
            total = settled(total + term, work, total) if kind == "add" else settled(total * term, work)
        return total
    if kind in UNARY:
        return UNARY[kind](value(node[1], work))
    if kind == "pow":
        return power(value(node[1], work), value(node[2], work), work)
    if kind in ("%", "degree"):
        return settled(value(node[1], work) * (work.percent if kind == "%" else work.degree), work)
    if kind == "call":
        return call(node, work)
    if kind == "apply":
        return applied(node[1], [value(child, work) for child in node[2:]], work)
    if kind in ("!", "binom"):
        return counting(kind, [exact(value(child, work)) for child in node[1:]], work)
    raise ArithmeticError  # a set, a text, infinity, ...


def power(base, exponent, work: Work):
    """Exact for whole exponents of fractions; else the principal value, but real odd roots of negatives."""
    is_whole = isinstance(exponent, Fraction) and exponent.denominator == 1
    if is_whole and isinstance(base, Fraction):
        size = max(base.numerator.bit_length(), base.denominator.bit_length())
        if not base and exponent > 0:
            return ZERO
        if not base or size > 1 and size * abs(exponent) > MAX_BITS:
            raise ArithmeticError
        # ±1 to a huge power is the one case that would get past the size check
        return settled(base ** (int(exponent) if size > 1 else int(exponent) % 2), work)
    if is_whole and abs(exponent) <= 12:
        return settled(base ** int(exponent), work)
    work.spend(60)
    base = MP.convert(base)
    if not base:
        return ZERO if exponent.real > 0 else 1 / base
    if exponent == 0.5:
        return settled(MP.sqrt(base), work)
    is_odd_root = isinstance(exponent, Fraction) and exponent.denominator % 2 and not base.imag and base < 0
    log = MP.ln(-base if is_odd_root else base) * exponent
    if abs(log.real) > EXP_LIMIT or abs(log.imag) > ANGLE_LIMIT:
        raise ArithmeticError
    result = settled(MP.exp(log), work)
    return -result if is_odd_root and exponent.numerator % 2 else result


def counting(kind: str, arguments: list[Fraction], work: Work) -> Fraction:
    """n! and binomial coefficients of whole numbers whose result is not too long."""
    if any(x.denominator != 1 or not 0 <= x < 10**6 for x in arguments):
        raise ArithmeticError
    n, k = int(arguments[0]), int(arguments[-1])
    factors = n if kind == "!" else min(k, n - k)
    if factors * n.bit_length() > MAX_BITS:
        raise ArithmeticError
    work.spend(1 + factors // 10)
    return Fraction(math.factorial(n) if kind == "!" else math.comb(n, k))


def applied(name: str, arguments: list, work: Work):
    """max and min; any other function is an unknown that its arguments determine, by a checksum."""
    if name in ("max", "min") and not any(x.imag for x in arguments):
        return (max if name == "max" else min)(arguments)
    digits = [x if isinstance(x, Fraction) else MP.nstr(x, 30) for x in arguments]
    work.spend(20)
    return Fraction(zlib.crc32(f"{name} {work.names[name + '(']} {digits}".encode()), 2**29) + 1


def call(node: tuple, work: Work):
    """Elementary functions. A sine or cosine that is tiny beside its argument is noise: sin 2π is 0."""
    name = node[1]
    circular = name in ("sin", "cos", "tan", "cot", "sec", "csc", "cis")
    degree, work.degree = work.degree, MP.pi / 180 if circular else work.degree
    x = MP.convert(value(node[2], work))
    work.degree = degree
    if name in ("exp", "cis") and len(node) == 3:
        return power(CONSTANTS["e"], x if name == "exp" else x * CONSTANTS["i"], work)
    work.spend(60)
    if name in ("log", "lg", "ln"):
        base = value(node[3], work) if len(node) > 3 else CONSTANTS["e"] if name == "ln" else MP.mpf(10)
        if not x or not base:
            raise ArithmeticError
        return settled(MP.ln(x) / MP.ln(MP.convert(base)), work)
    if name in ARCS and len(node) == 3 and not (name == "arctan" and x * x == -1):
        return settled(ARCS[name](x), work)
    if len(node) > 3 or not circular or abs(x.real) > ANGLE_LIMIT or abs(x.imag) > EXP_LIMIT:
        raise ArithmeticError
    sin, cos = (y if MP.mag(y) > MP.mag(x) + NOISE else MP.zero for y in (MP.sin(x), MP.cos(x)))
    table = {"sin": (sin, 1), "cos": (cos, 1), "tan": (sin, cos), "cot": (cos, sin), "sec": (1, cos)}
    top, bottom = table.get(name, (1, sin))  # what is left is csc
    return settled(top / bottom, work)


# ---- A calculator, for a model that asks one while it thinks (sample.py) -----------------------------------

EXPRESSION = re.compile(r"[\d\s.+\-*/^()]{1,100}", re.ASCII)
RESULT_BITS = 40  # of numerator and denominator together: no result is longer than 15 characters
ERROR = "error"


def calculate(text: str) -> str:
    """The value of numbers, + - * / ^ and brackets, a whole number or a fraction, exact, as text. ERROR for
    anything else: what the parser does not know, 1/0, a root, a value that is long. Never raises."""
    tree = parse(text) if EXPRESSION.fullmatch(text) and not re.search(r"[\d.]\s+[\d.]", text) else None
    with contextlib.suppress(OutOfSteps, ArithmeticError, RecursionError):
        x = value(tree, Work()) if tree else None
        if isinstance(x, Fraction) and x.numerator.bit_length() + x.denominator.bit_length() <= RESULT_BITS:
            return str(x)
    return ERROR


# ---- Equality: texts, then the rules of `same` for trees ---------------------------------------------------

REAL_SETS = {"union", "minus", "emptyset", "rel", "[]", "[)", "(]"}
WHOLE = [*range(1, 38), *(n + k for n in (49, 64, 81, 100, 128, 1000, 1024) for k in (-1, 0, 1)), 10**6]


def _mixed(found: re.Match) -> str:
    whole, top, bottom = filter(None, found.groups())
    return f"({whole}+{top}/{bottom})" if 0 < int(top) < int(bottom) else found[0]


REWRITTEN = [(inside, re.compile(pattern), new) for inside, pattern, new in (  # inside: must be in the text
    ("prime", r"\^\s*\{?\\prime\}?", "'"), ("*", r"\^\s*\{?\*\}?(?!\*)", "_{*}"),
    ("out of", r"\\text\{ ?out of ?\}|\bout of\b", "/"),
    ("", r"(?i)(?<=\d)\s*([ap])\.?m\b\.?", lambda m: f" {m[1].lower()}m"),  # 4:30 P.M.
    ("frac", r"(?<![\w.^}])(\d+)\s*\\[dtc]?frac\s*(?:\{(\d{1,20})\}|(\d))\s*(?:\{(\d{1,20})\}|(\d))", _mixed),
    ("/", r"(?<![\w.^}])(\d+) +(\d{1,20})/(\d{1,20})(?!\.?\d)", _mixed),
    (".", r"(\d*)\.(\d*)\\(?:overline|bar|dot)\s*\{(\d+)\}", lambda m:  # 0.1\overline{6}
     f"({int(m[1] + m[2] + m[3]) - int(m[1] + m[2] or 0)}/{'9' * len(m[3])}{'0' * len(m[2])})"),
    ("=", r"(^|,)\s*(\\text\s*\{[^{}=<>,]*\}[^=<>,]*|[A-Za-z]{4,}[^=<>,\\\d]*)=", r"\1\\label_{\2}="),
    ("base", r"(?:\\text\s*\{)?\s*(?:\bin )?\(?\bbase\s*\}?\s*(\d+)\)?\s*\}?", r"_{\1}"),
    (" real", r"(?i)^(?:\\text\s*\{)?(?:the set of )?all real(?: number)?s\}?$", r"\\mathbb{R}"),
    ("olution", r"(?i)^(?:\\text\s*\{)?no (?:real )?solutions?\}?$", r"\\emptyset"),
    ("mathbb", r"(\\mathbb\s*\{?R\}?)\s*(?:-|\\backslash)\s*(?=\\\{)", r"\1\\setminus"),
    ("mathbb", r"\\mathbb\s*\{?R\}?", r"(-\\infty,\\infty)"), ("sq", r"\b(?:square|sq\.?) +(\w+)", r"\1^2"),
    ("^", r"\^\s*(?:\{\s*\\(?:circ|degree)\s*\}|\\(?:circ|degree)(?![a-z]))", r"\\degree "),
    ("'", r"^(\d+\s*\\degree)\s*(\d+)\s*'$", r"\1+\2/60\\degree"),  # 30°15'
    ("degree", r"(\\degree)\s*([CF])\b(?!\s*\})", r"\1\\text{\2}"),
    ("^", r"\b([fgFG])\s*\^\s*\{?(-?\d+)\}?\s*\(", r"\1_{^\2}("),  # f^{-1}(2)
    ("_", r"([A-Za-z])\s*\^\s*(\{\w+\}|\d)\s*_\s*(\{\w+\}|\w)", r"\1_\3^\2"),  # x^2_1
    ("\\", r"\\(?:mathbf|vec|hat|bm|boldsymbol)\s*\{?\s*\\?([ijk])(?:math)?\b\s*\}?", r"{\\vec\1}"),
    ("right.", r"^\\left\s*\\\{(.*)\\right\.$", r"\1"),  # \left\{ … \right.
    ("\\{", r"^\\\{\s*[a-z]\s*(?:\\in\s*\(-\\infty,\\infty\))?\s*(?:\\mid|\||:)(.*)\\\}$", r"\1"),  # {x | A}
    ("\\in", r"(.)[,\s]*\(?\s*\b[a-z]\s*\\in\s*\\mathbb\s*\{?[ZN]\}?\s*\)?$", r"\1"),  # k ∈ Z
)]
LABEL = re.compile(  # what only says that the answer comes
    r"(?i)(\\text\s*\{)?\s*(?:the |my )?(?:final |correct )?(?:answer|option|choice)\b(?: is)?:?\s*(?(1)\})"
    r"(?=.)(?!\s*=)|\s*(?:=|\\approx|\\sim|\\therefore)")
TAIL = re.compile(r"\\*(?:[,;:! ]\\|dauqq?\\|[~\s,:;]|\.(?!\.))*")  # backwards


@functools.lru_cache(maxsize=512)
def clean(text: str) -> str:
    """Without the wrapping: boxes, dollars, bold, what only says that it is the answer, the final stop."""
    if not text.isascii():
        text = re.sub("[⁰¹²³⁴-⁹⁺⁻ⁿ]+", r"^{\g<0>}", re.sub("[₀-₉]+", r"_{\g<0>}", text.translate(UNICODE)))
        text = unicodedata.normalize("NFKC", re.sub("[¼-¾⅐-⅞]", r"\\frac{\g<0>}", text))  # 3\frac{1⁄2}
        text = re.sub(r"(\\frac\{\d)⁄", r"\1}{", text).translate(UNICODE)
    text = re.sub(r"(?s)\\(?:boxed|fbox)\s*\{(.*)\}", r"\1", text.removeprefix("**").removesuffix("**"))
    text = text.strip()
    if whole := re.fullmatch(r"\$+([^$]*[^$\\])\$+[\s.,:;]*|\\[\[(](.*)\\[\])]|" + WRAPPER, text, re.S):
        text = whole[whole.lastindex]  # "$43_5.$": the stop inside is one too
    if not text.isdigit():
        text = text[label.end() :] if (label := LABEL.match(text)) else text
        for inside, pattern, new in REWRITTEN:
            text = pattern.sub(new, text) if inside in text else text
    return text[: len(text) - len(TAIL.match(text[::-1])[0])].strip()


def visible(text: str) -> str:
    """What there is to see of a text. `Even` is `even`, `No` is `no`, but `AB` is not `ab`."""
    text = re.sub(WRAPPER, r" \1 ", text)
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])|\\[,;!:]|\$|~", " ", text)
    text = re.sub(r"\b(?:[A-Z][a-z]{2,}|No|NO|YES|TRUE|FALSE)\b", lambda m: m[0].lower(), text)
    return re.sub(r"(?<![A-Za-z0-9]) +| +(?![A-Za-z0-9])", "", " ".join(text.split()))


def same_choice(answer: str, gold: str) -> bool:
    """The same letter, at least once alone: `C`, `(C)`, `C) 12`, `C Cecile`, or c for the gold C."""
    texts = [re.sub(WRAPPER, r"\1", text).strip().strip("()") for text in (answer, gold)]
    if len(texts[1]) == 1 and texts[1] in "ABCDEFGH" and texts[0] == texts[1].lower():
        return True
    found = [re.fullmatch(r"([A-Z])(?:\s*[).]\s*\S.*|:\s[^=]*|\s[A-Z][a-z]+)?", text, re.S) for text in texts]
    return all(found) and found[0][1] == found[1][1] and min(map(len, texts)) == 1


def is_prose(text: str) -> bool:
    """Nothing but words, one of three letters at least: a word is no product of its letters."""
    words = re.findall(r"[A-Za-z]{3,}", text)
    return bool(re.fullmatch(r"[A-Za-z' .,-]+", text)) and not FUNCTIONS | {"and", "sqrt"} >= set(words)


def _bare(a: tuple, gold: tuple) -> tuple:
    """3s as 3, m+n=371 as 371: only in an answer, where the gold is known to be no equation nor variable."""
    if a[0] == "mul" and len(a) == 3 and a[1][0] == "num" and a[2][1] in tuple("smhgL") and not names(gold):
        return ("unit", a[1], _unit([a[2][1]]))
    is_equation = a[:2] == ("rel", "=") and len(a) == 4 and "rel" not in kinds(gold)
    is_named = is_equation and names(a[2]) and not names(a[3]) and not {"num", "pow"} & kinds(a[2])
    return a[3] if is_named else a


@functools.lru_cache(maxsize=2048)
def names(node: tuple) -> frozenset[str]:
    """The variables of a tree."""
    own = {node[1]} - CONSTANTS.keys() if node[0] == "sym" else {node[1] + "("} if node[0] == "apply" else ()
    return frozenset(own).union(*(names(child) for child in node[1:] if isinstance(child, tuple)))


@functools.lru_cache(maxsize=2048)
def kinds(node: tuple) -> frozenset:
    """A tree's kinds of nodes, numbers, brackets; "i", "root" (of even degree), "sign" (a power of -1)."""
    own = {"i"} if node == ("sym", "i") else {*node[:2]} if node[0] in ("num", "seq") else {node[0]}
    if node[0] == "inv" and node[1][0] == "num" and node[1][1] % 2 == 0:
        own.add("root")
    if node[0] == "pow" and node[1][0] == "neg" and not names(node[1]) and names(node[2]):
        own.add("sign")
    return frozenset(own).union(*(kinds(child) for child in node[1:] if isinstance(child, tuple)))


def assignments(node: tuple) -> dict | None:
    """{name: value} of `x=2, y=3` or `(x,y)=(2,3)`, sorted; None of anything else."""
    pairs = []
    if node[:2] == ("rel", "=") and len(node) == 4 and node[2][0] == node[3][0] == "seq":
        pairs = list(zip(node[2][2:], node[3][2:])) if len(node[2]) == len(node[3]) else []
    elif node[0] == "list" and all(child[:2] == ("rel", "=") and len(child) == 4 for child in node[1:]):
        pairs = [child[2:] for child in node[1:]]
    found = dict(pairs)
    are_names = len(found) == len(pairs) > 1 and all(name[0] == "sym" for name in found)
    return {name[1]: found[name] for name in sorted(found)} if are_names else None


def same_assignments(a: tuple, b: tuple, work: Work) -> bool | None:
    """Values with names: the same names; values without, in the order of the names."""
    left, right = assignments(a), assignments(b)
    if left and right and left.keys() != right.keys():
        return False
    if not (left or right) or not (left or "rel" not in kinds(a)) or not (right or "rel" not in kinds(b)):
        return None
    a, b = (("seq", "()", *named.values()) if named else node for named, node in ((left, a), (right, b)))
    return same(a, b, work)


def same_sets(a: tuple, b: tuple, work: Work) -> bool | None:
    """Intervals, unions, inequalities in one variable, as sorted lists of pieces of the real line."""
    both_relations = a[0] == b[0] == "rel" and "in" not in (a[1], b[1])
    if not REAL_SETS & (kinds(a) | kinds(b)) or both_relations or len(names(a) | names(b)) > 1:
        return None
    pieces = segments(a, work), segments(b, work)
    return None if None in pieces else pieces[0] == pieces[1]


def segments(node: tuple, work: Work) -> list | None:
    """[(low, is low missing?, high, is high there?)], or None if the tree is not a set of real numbers."""
    if node[0] == "seq" and len(node) == 4:
        low, high = _end(node[2], work), _end(node[3], work)
        is_one = None not in (low, high) and low <= high
        return [(low, node[1][0] == "(", high, node[1][1] == "]")] if is_one else None
    if node[0] not in ("rel", "set", "union", "list", "minus", "emptyset"):
        return None
    if node[0] == "rel":
        parts = [_half_lines(*link, work) for link in _links(node)]
    else:  # the elements of a set are points
        parts = [segments(("seq", "[]", x, x) if node[0] == "set" else x, work) for x in node[1:]]
    if None in parts:
        return None
    if node[0] == "rel":
        return functools.reduce(_intersection, parts)
    if node[0] == "minus":  # the real line without points
        gaps = [[(-MP.inf, True, low, False), (low, True, MP.inf, False)] for low, *_ in parts[1]]
        return functools.reduce(_intersection, gaps, parts[0])
    merged: list = []
    for piece in sorted(sum(parts, [])):
        if merged and piece[:2] <= merged[-1][2:]:  # touches or overlaps the one before
            if node[0] == "list":  # "x > -2, x < 3": all of it holds
                return functools.reduce(_intersection, parts)
            low, missing, high, there = merged.pop()
            piece = (low, missing, *max((high, there), piece[2:]))
        merged.append(piece)
    return merged


def _half_lines(sign: str, left: tuple, right: tuple, work: Work) -> list | None:
    """The pieces where x < 2, 2 <= x, |x| < 2, x ≠ 2 or x ∈ A."""
    is_below = _is_name(left)  # its name is on the left
    if sign == "in" and is_below:
        return segments(right, work)
    name, end = (left, _end(right, work)) if is_below else (right, _end(left, work))
    if not _is_name(name) or end is None or sign not in ("<", "<=", "ne"):
        return None
    low = -end if name[0] == "abs" else end
    below, above = (-MP.inf, True, low, sign == "<="), (end, sign != "<=", MP.inf, False)
    if name[0] == "abs" and is_below:
        return [(low, sign != "<=", end, sign == "<=")]
    return [below, above] if sign == "ne" or name[0] == "abs" else [below] if is_below else [above]


def _intersection(left: list, right: list) -> list:
    pieces = [(*max(x[:2], y[:2]), *min(x[2:], y[2:])) for x in left for y in right]
    return [(low, missing, high, there) for low, missing, high, there in sorted(pieces)
            if low < high or low == high and there and not missing]


def _end(node: tuple, work: Work):
    """An end of an interval, to 40 digits so that equal ends are identical; None if it is no real number."""
    sign, inner = (-1, node[1]) if node[0] == "neg" else (1, node)
    if inner == ("inf",):
        return sign * MP.inf
    number = next((x for x, _ in samples(node, node, work)), None) if not names(node) else None
    return None if number is None or number.imag else MP.mpf(MP.convert(number), dps=40)


def _is_name(node: tuple) -> bool:
    r"""Does it only name something: x, AB, f(2), |AB|, \angle ABC, V_1:V_2, \frac{AO}{BO}, (x, y)?"""
    if node[0] in ("sym", "apply"):
        return True
    if node[0] == "mul" and any(child[0] == "sym" and re.fullmatch("[a-z]", child[1]) for child in node[1:]):
        return False  # xy = 5 is an equation
    inner = [child for child in node[1:] if isinstance(child, tuple)]
    return node[0] in ("mul", "inv", "abs", "ratio", "seq") and all(_is_name(child) for child in inner)


def same_lists(a: tuple, b: tuple, work: Work) -> bool | None:
    for one, other in ((a, b), (b, a)):
        if one[0] == "list" and other[0] == "seq":  # 1, 2 for (1, 2): in order
            return len(one) == len(other) - 1 and all(same(x, y, work) for x, y in zip(one[1:], other[2:]))
    left, right = members(a), members(b)
    if left is None and right is None:
        return None
    if left is None or right is None:  # a list is one answer only if all its items are that answer
        items, single = (left, b) if right is None else (right, a)
        is_one = items and (len(items) == 1 or items[0][0] != "rel")
        return bool(is_one) and all(same(item, single, work) for item in items)
    return matched(left, right, lambda x, y: same(x, y, work))


def members(node: tuple) -> list[tuple] | None:
    """The elements of a list or set, with both values of every ±; None if it is neither."""
    if node[0] in ("list", "set", "emptyset"):
        nested = [members(child) if child[0] != "set" else [child] for child in node[1:]]
        return [item for child, inner in zip(node[1:], nested) for item in inner or [child]]
    return [_signs_chosen(node, 1), _signs_chosen(node, -1)] if "pm" in kinds(node) else None


def _signs_chosen(node, sign: int):
    if not isinstance(node, tuple):
        return node
    parts = tuple(_signs_chosen(child, sign) for child in node)
    return parts if node[0] != "pm" else parts[1] if sign > 0 else ("neg", parts[1])


def matched(left: Iterable, right: Iterable, equal: Callable) -> bool:
    """Can the items of two lists be paired off? Greedily: equal to the same thing is equal to each other."""
    right = list(right)
    for item in left:
        if (match := next((i for i, other in enumerate(right) if equal(item, other)), None)) is None:
            return False
        del right[match]
    return not right


def same_relations(a: tuple, b: tuple, work: Work) -> bool | None:
    if a[0] != "rel" and b[0] != "rel":
        return None
    left, right = defined(a, work), defined(b, work)
    if a[0] == b[0] == "rel":
        if matched(_links(a), _links(b), lambda x, y: same_links(x, y, work)):
            return True
        if None in (left, right):
            return False
        one_y = ("sym", "y") in (left[0], right[0]) and "apply" in (left[0][0], right[0][0])
        return (left[0] == right[0] or one_y) and same(left[1], right[1], work)
    definition, other = (left, b) if a[0] == "rel" else (right, a)
    return definition is not None and same(definition[1], other, work)


def defined(relation: tuple, work: Work) -> tuple[tuple, tuple] | None:
    r"""(name, value) of x = 5, 10/2 = 5, \sqrt{2} \approx 1.41; None of an equation, 5 = 6 or 5 \approx 7."""
    if relation[0] != "rel":
        return None
    signs, sides = relation[1].split(), relation[2:]
    if signs[-1] == "approx" and not names(sides[-2]):
        if any(abs(x - y) * 10 > abs(x) for x, y in samples(*sides[-2:], work)):
            return None
        signs, sides = signs[:-1], sides[:-1]
    if not {"=", "approx"} >= set(signs) and signs != ["in"]:
        return None
    values = [side for side in sides if not _is_name(side)] or sides[-1:]
    name = next((side for side in sides if _is_name(side)), ("none",))
    if name == ("none",) and names(values[0]) or not all(same(values[-1], x, work) for x in values[:-1]):
        return None
    return name, values[-1]


def _links(relation: tuple) -> Iterator[tuple]:
    """Every sign of a chain with its sides, turned so that > does not occur."""
    for sign, left, right in zip(relation[1].split(), relation[2:], relation[3:]):
        yield (sign.replace(">", "<"), right, left) if ">" in sign else (sign, left, right)


def same_links(a: tuple, b: tuple, work: Work) -> bool:
    """With variables by the difference of the sides, without side by side."""
    if a[0] == b[0] != "approx" and any(map(names, a[1:])):
        return proportional(a[0], *(("add", x, ("neg", y)) for _, x, y in (a, b)), work)
    return a[0] == b[0] and same(a[1], b[1], work) and same(a[2], b[2], work)


def proportional(sign: str, a: tuple, b: tuple, work: Work) -> bool:
    """Is a a constant multiple of b, a positive one if the sign between a and 0 is < or <=?"""
    ratios = []
    for x, y in samples(a, b, work):
        if x and y:
            ratio = x * (1 / y)
            ratios.append(settled(ratio, work) if ratio.imag else ratio)
        elif x or y:
            return False
    return len(ratios) >= (3 if names(a) | names(b) else 1) and all(
        close(ratios[0], x, work) and not x.imag and ("<" not in sign or x > 0) for x in ratios)


def same_shapes(a: tuple, b: tuple, work: Work) -> bool | None:
    """Tuples, matrices, ratios."""
    both = {a[0], b[0]}
    if len(both) == 1 and a[0] in ("ratio", "seq", "matrix", "row"):
        return len(a) == len(b) and all(
            same(x, y, work) if isinstance(x, tuple) else x == y for x, y in zip(a[1:], b[1:]))
    return False if both & {"seq", "matrix", "based", "inf", "ratio", "emptyset"} else None


def same_units(a: tuple, b: tuple, work: Work) -> bool | None:
    if a[0] != "unit" and b[0] != "unit":
        return None
    units = {node[2:] or node[:1] for node in (a, b) if node[0] in ("unit", "%", "degree")}
    if len(units) > 1:
        return False
    return same(*(node[1] if node[0] == "unit" else node for node in (a, b)), work)


def tolerance(a: tuple, b: tuple):
    """CLOSE, but for a decimal with so many digits that it must be a rounded one: its last place."""
    numbers = [node[1] if node[0] == "neg" else node for node in (a, b)]
    digits = [node[2] for node in numbers if node[0] == "num" and len(node) > 2]
    return MP.mpf(10) ** (1 - max(digits)) if digits and max(digits) >= 14 else CLOSE


def samples(a: tuple, b: tuple, work: Work) -> Iterator[tuple]:
    """Pairs of values of two trees at points; one pair if there is no variable. With variables and without i
    all is real: branches of roots and logarithms of negative numbers differ between equal forms."""
    both = sorted(names(a) | names(b))
    work.is_real = bool(both) and "i" not in kinds(a) | kinds(b)
    for point in points(both, kinds(a) | kinds(b)) if both else ((),):
        work.names, work.degree = dict(zip(both, point)), ONE
        with contextlib.suppress(ArithmeticError, KeyError):
            yield value(a, work), value(b, work)


def points(both: list[str], every: frozenset) -> Iterator[list[Fraction]]:
    """Three points below 1, three more of fractions, three whole, three negative. Where a tree has a step, a
    sign or a bend: on both sides of whole numbers and of its own numbers, and far away."""
    is_stepped = bool(every & {"lfloor", "lceil", "sign"})
    whole = [is_stepped and name[0] in "ijklmnpqMN" for name in both]
    for point in range(12):
        count, below = 10 if point < 3 else 40, 11 if point < 6 else -13
        scattered = ((point * 7919 + k * 104_729 + 12_345) * 2_654_435_761 % 2**32 >> 12 for k in range(9999))
        yield [Fraction(2 + x % 23) if is_whole or 6 <= point < 9 else Fraction(1 + x % count, below)
               for x, is_whole in zip(scattered, whole)]
    if not is_stepped and not every & {"abs", "root", "apply"}:
        return
    ends = sorted(x for x in every if isinstance(x, Fraction) and abs(x) < 10**12)[:12]
    far = WHOLE if is_stepped else (1000, 10**6, -1000)
    near = [x + side / Fraction(14) for x in (*ends, *(-x for x in ends), *far) for side in (-2, 0, 7)]
    for point in range(len(far) if is_stepped else len(near)):
        yield [Fraction(WHOLE[point * (2 * k + 1) % 59]) if is_whole else
               near[point * (6 * k + 1) % len(near)] for k, is_whole in enumerate(whole)]


# ---- Evaluation of checkpoints. torch is imported only here, so that `import verify` stays light -----------


def wilson(correct: float, total: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927): unlike ±1.96 errors, sane for few items, near 0 and 1."""
    if total == 0:
        return 0.0, 1.0
    share, z2 = correct / total, z * z
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def is_correct(answer: str | None, row: dict) -> bool:
    """Is an answer equivalent to row["answer"]? If the problem lists options (MMLU, SAT, MathQA), the letter
    is correct, and so is the text of its option if no other option says the same."""
    if answer is None or is_equivalent(answer, row["answer"]):
        return answer is not None
    from data.benchmarks import options

    said = [letter for letter, text in options(row).items() if is_equivalent(answer, text)]
    return said == [row["answer"]] and not re.fullmatch(r"\W*(text\W*)?[A-H]\W*", answer)  # another letter


def sample_and_grade(sampler, problems: list[dict], prompts: list[list[int]], grade: Callable, n=1,
                     max_new_tokens=1024, temperature=0.0, seed=0, stop=None, request_ids=None) -> list[list]:
    """n responses to each problem → per problem n pairs (sample.Completion, grade(its text, problem)).
    prompts: token ids of each problem; grade: whatever the caller wants to know of a response; stop: as in
    Sampler.generate, None for end-of-text and the strings at which a base model starts the next question;
    request_ids: numbers of the problems, by which they draw their random numbers (0, 1, ... if None)."""
    from data.prompts import STOP

    stop = (*sampler.tokenizer.stop_ids, *STOP) if stop is None else stop
    groups = sampler.generate(prompts, n=n, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed,
                              stop=stop, request_ids=request_ids)
    return [[(c, grade(c.text, row)) for c in group] for row, group in zip(problems, groups, strict=True)]


def summarise(rows: list[dict], n: int = 1) -> dict:
    """Metrics of n rows per item. The interval counts items: samples of one item are not independent.
    pass: {k: share of items that one of k samples solves}, k = 1, 2, 4, … n, without bias (Chen et al. 2021);
    majority: share of items whose most frequent answer is correct."""
    groups = [rows[i : i + n] for i in range(0, len(rows), n)]
    counts = [sum(row["correct"] for row in group) for group in groups]
    low, high = wilson(sum(counts) / n, len(groups))
    powers = sorted({*(1 << i for i in range(n.bit_length())), n})
    return {
        "items": len(groups), "accuracy": fmean(row["correct"] for row in rows), "low": low, "high": high,
        "length": fmean(row["tokens"] for row in rows), "truncated": fmean(row["truncated"] for row in rows),
        "length_correct": fmean([row["tokens"] for row in rows if row["correct"]] or [0]),
        "no_answer": fmean(row["answer"] is None for row in rows), "majority": fmean(map(majority, groups)),
        "pass": {k: fmean(pass_at_k(n, count, k) for count in counts) for k in powers}}


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that k of n samples hold one of the `correct` ones: 1 - C(n - correct, k) / C(n, k)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(group: list[dict]) -> bool:
    """Is the most frequent answer correct, or of several such ones the first? Equivalent answers are one."""
    found: list[list] = []  # [an answer, how often, correct?]
    for row in (row for row in group if row["answer"] is not None):
        entry = next((entry for entry in found if is_equivalent(row["answer"], entry[0])), None)
        if entry is None:
            found.append(entry := [row["answer"], 0, row["correct"]])
        entry[1] += 1
    return max(found, key=lambda entry: entry[1])[2] if found else False


def run_benches(args) -> None:
    """Every benchmark that is not finished yet, its problems spread over the ranks that torchrun started."""
    from data import benchmarks, recipes

    chosen = benchmarks.THIRTEEN if args.bench == "paper" else args.bench.split(",")
    for source in chosen:  # an unknown name and too many shots are errors before anything is fetched
        benchmarks.prompt(source, "", args.shots, args.template)
    names = {source: benchmarks.find(source)[0] for source in chosen}
    if len({*names.values()}) < len(names):
        raise ValueError(f"two benchmarks of --bench {args.bench} have the same name")
    if not os.path.isdir(args.ckpt) and "@" not in args.ckpt:
        raise FileNotFoundError(f"{args.ckpt}: no such folder")
    columns = recipes.columns_of(names.values(), args.columns)
    suites = {source: benchmarks.load_problems(source, args.data, args.limit, args.seed, columns[name])
              for source, name in names.items()}
    import midtrain  # imports torch, which takes a second
    from sample import Sampler, calls_of, in_use, load_model

    world, results = midtrain.setup(), {}
    folder = midtrain.on_rank0(lambda: files.find_checkpoint(args.ckpt))
    out = args.out or os.path.join(args.ckpt if os.path.isdir(args.ckpt) else folder, "bench")
    calls = calls_of(folder, args.tool)
    sampler = Sampler(*load_model(folder, str(world.device), args.dtype), max_calls=calls)
    args.tool = calls > 0
    files.print0(f"{folder}: {in_use(sampler)}")
    args.dtype = in_use(sampler).split()[0]
    for source, problems in suites.items():
        name, bench = benchmarks.find(source)
        for warning in benchmarks.seen_in_training(os.path.dirname(os.path.dirname(folder)), name, problems):
            files.print0(f"warning: {warning}")
        keys = ("dtype", "limit", "template", "shots", "n", "temperature", "max_new_tokens", "seed")
        settings = {
            "checkpoint": os.path.realpath(folder), "weights": os.path.getmtime(f"{folder}/config.json"),
            "items": len(problems), **{key: getattr(args, key) for key in keys}}
        settings |= {"tool": True} if args.tool else {}
        if benchmarks.BENCHMARKS.get(source) is not bench:  # of one's own: it may change
            settings["problems"] = zlib.crc32(repr(problems).encode())
        path = os.path.join(out, f"{name}.jsonl")
        results[name] = midtrain.on_rank0(lambda: finished(path, settings))  # noqa: B023
        if results[name] is None:
            rows = bench_rows(sampler, source, problems, args, world)
            results[name] = midtrain.on_rank0(lambda: finish(path, rows, settings))  # noqa: B023
    files.print0(f"{as_table(results, args.n)}\nresponses: {os.path.join(out, '*.jsonl')}")


def bench_rows(sampler, source: str, problems: list[dict], args, world) -> list[dict]:
    """Sample and grade, on every rank each size-th problem → rows; on rank 0 those of all, by problem."""
    import torch.distributed as dist
    from tqdm import tqdm

    from data import benchmarks

    def grade(text: str, problem: dict) -> dict:
        answer = extract_answer(text, box_only=args.shots == 0)
        return {"problem": problem["problem"], "gold": problem["answer"], "response": text, "answer": answer,
                "correct": is_correct(answer, problem)}

    rows, mine, step = [], range(world.rank, len(problems), world.size), 4 * sampler.slots
    for start in tqdm(range(0, len(mine), step), desc=source, disable=world.rank > 0 or None):
        items = mine[start : start + step]
        texts = [benchmarks.prompt(source, problems[i]["problem"], args.shots, args.template) for i in items]
        groups = sample_and_grade(
            sampler, [problems[i] for i in items], list(map(sampler.tokenizer.encode, texts)), grade, args.n,
            args.max_new_tokens, args.temperature, args.seed, request_ids=items)
        rows += [{"item": i, **row, "tokens": len(c.tokens), "truncated": c.finish_reason == "length"}
                 | ({"results": c.results} if args.tool else {})
                 for i, group in zip(items, groups) for c, row in group]
    if world.size > 1:
        parts = [None] * world.size if world.rank == 0 else None
        dist.gather_object(rows, parts)
        rows = sum(parts or [], [])
    return sorted(rows, key=lambda row: row["item"])


def finish(path: str, rows: list[dict], settings: dict) -> dict:
    """Write a benchmark's rows, and last its settings beside them: a run that was killed has none."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    files.write_jsonl(path, rows)
    files.write_json(path.removesuffix("l"), settings)
    return summarise(rows, settings["n"])


def finished(path: str, settings: dict) -> dict | None:
    """Metrics of a benchmark that was finished with the same settings; None if it was not finished."""
    made = files.read_json(path.removesuffix("l"), missing_ok=True)
    if made is None or not os.path.isfile(path):
        return None
    files.check_same_settings(path, made, settings)
    rows = list(files.read_jsonl(path))
    if len(rows) < settings["items"] * settings["n"]:
        return None
    files.print0(f"{path} is finished: skipped")
    return summarise(rows, settings["n"])


def as_table(results: dict[str, dict], n: int) -> str:
    """Markdown, to be pasted into a paper."""
    rows = []
    for name, m in results.items():
        row = {"benchmark": name, "items": f"{m['items']:,}", "accuracy": f"{100 * m['accuracy']:.1f}"}
        row["95% interval"] = f"{100 * m['low']:.1f}–{100 * m['high']:.1f}"
        if n > 1:
            row |= {f"pass@{k}": f"{100 * share:.1f}" for k, share in m["pass"].items() if k > 1}
            row[f"maj@{n}"] = f"{100 * m['majority']:.1f}"
        row |= {"length": f"{m['length']:.0f}", "of correct ones": f"{m['length_correct']:.0f}"}
        rows.append(row | {"truncated": f"{m['truncated']:.1%}", "no answer": f"{m['no_answer']:.1%}"})
    if len(rows) > 1:
        mean = fmean(m["accuracy"] for m in results.values())
        rows.append({"benchmark": "mean", "accuracy": f"{100 * mean:.1f}"})
    cells = [list(rows[0])] + [[row.get(column, "") for column in rows[0]] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in cells)


# ---- The command line --------------------------------------------------------------------------------------


def grade_file(path: str, out: str | None) -> None:
    """Grade a file's responses, print the share of correct ones, write the rows to `out`."""
    from tqdm import tqdm

    pairs, graded = (("response", "gold"), ("solution", "answer")), []  # the names of (text, gold)
    rows = list(files.numbered_rows(path))
    if not rows:
        raise ValueError(f"{path} has no rows")
    start = time.perf_counter()
    for number, row in tqdm(rows, desc="grading", delay=1, disable=None):
        text, gold = next(((row[a], row[b]) for a, b in pairs if a in row and b in row), ("", None))
        if not isinstance(text, str) or type(gold) not in (str, int, float):
            wanted = '"response" and "gold" or "solution" and "answer"'
            raise ValueError(f"{path}, line {number}: a row needs {wanted}, as text")
        answer, gold = extract_answer(text), str(gold)
        correct = answer is not None and is_equivalent(answer, gold)
        graded.append(row | {"gold": gold, "answer": answer, "correct": correct})
    seconds, n = time.perf_counter() - start, len(graded)
    if out:
        files.write_jsonl(out, graded)
    correct, none = sum(row["correct"] for row in graded), sum(row["answer"] is None for row in graded)
    low, high = wilson(correct, n)
    print(f"{path}: {correct} of {n} correct, {correct / n:.2%} (95% interval {low:.2%}–{high:.2%}), "
          f"{none / n:.2%} without an answer, {n / seconds:,.0f} rows/s")


def main() -> None:
    from data import benchmarks, prompts, recipes

    parser = files.ArgumentParser(description=__doc__[: __doc__.index("\n\nReward")])
    add = parser.add_argument
    add("--grade", metavar="FILE", help='grade JSON lines {"response", "gold"} or {"solution", "answer"}')
    add("--out", metavar="PATH", help="file for graded rows, or folder for responses (default CKPT/bench)")
    add("--ckpt", metavar="DIR", help="evaluate this checkpoint: one of ours or a Hugging Face Llama")
    add("--bench", metavar="NAME[,NAME]", default="synth",
        help=f"{', '.join(benchmarks.BENCHMARKS)}; paper for its thirteen; a file of problems, or "
        "hub:ID[:PART[:SPLIT]] (default synth)")
    add("--columns", type=recipes.column_map, metavar="MAP",
        help="its columns, if they have other names than usual: problem=Q,answer=A")
    add("--data", metavar="DIR", help="folder of the public files; without it, from the Hugging Face hub")
    add("--shots", default="0", metavar="N", help="number of solved examples before the question; paper: as "
        "many as there; 0 (default): none, and only a box is an answer, as in RL")
    add("--template", choices=prompts.TEMPLATES, default="simple", help="template (default %(default)s)")
    add("--n", "--samples", type=int, default=1, metavar="K",
        help="number of responses to each problem, for pass@k and maj@k (under torchrun: --samples)")
    add("--temperature", type=float, default=0.0, help="temperature of sampling; 0 is greedy (default)")
    add("--max-new-tokens", type=int, default=1024, help="longest response in tokens (default %(default)s)")
    add("--limit", type=int, help="take only the first LIMIT problems (synth: make so many, default 500)")
    add("--seed", type=int, default=0, help="seed of the sampling, and of synth's problems")
    add("--tool", action=BooleanOptionalAction,
        help="answer calls of the calculator (default: for a model that was trained with it)")
    add("--dtype", default="auto", choices=("auto", "fp32", "bf16"),
        help="dtype of weights and activations (default auto: bf16 on a GPU, else as stored)")
    args = parser.parse_args()
    if (args.grade is None) == (args.ckpt is None):
        parser.error("give --grade FILE or --ckpt DIR, one of the two")
    for name in ("n", "limit", "max_new_tokens"):
        if (number := getattr(args, name)) is not None and number < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {number}")
    if args.n > 1 and args.temperature <= 0:
        parser.error("--n greater than 1 needs --temperature above 0: greedy answers are all the same")
    if args.shots != "paper" and not args.shots.isdecimal():
        parser.error(f"argument --shots: {args.shots!r} is not a number, nor paper")
    args.shots = None if args.shots == "paper" else int(args.shots)
    if args.grade:
        return grade_file(args.grade, args.out)
    from midtrain import clean_exit

    with clean_exit():
        run_benches(args)


if __name__ == "__main__":
    files.run_cli(main)
