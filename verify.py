r"""Is this the right answer? Extraction of final answers, mathematical equivalence, rewards, and checkpoint evaluation.

    python verify.py --grade FILE.jsonl                  grade responses (or reference solutions) against gold answers
    python verify.py --ckpt DIR --bench synth            evaluate a checkpoint on generated held-out problems
    python verify.py --ckpt DIR --bench gsm8k,math500 --data DIR

Reward decides what RL learns, so a verifier has two enemies: a policy that searches for strings it wrongly accepts, and
a string that hangs it or runs code. Hence the choices made here:

1. Text is never evaluated by Python (or sympy, whose parsing is eval). A small recursive-descent parser turns LaTeX
   or plain text into nested tuples; what it does not understand is equal only to the same text.
2. Numbers are exact fractions. Irrational ones have 60 digits; expressions in variables are compared at several
   points. Nothing is simplified or solved, and there is no float tolerance that calls 0.33 a third.
3. Everything is bounded by counting (characters, tokens, depth, digits, steps), never by clocks, signals, threads or
   processes. So a verdict is the same every time and in every thread, and every input gets True or False.

The conventions, where people may differ:

    no box            reward: no credit. Grading falls back on "####", "the answer is", the last formula or number
    which box         the last closed \boxed{} after </think> if there is one there, else of the whole response;
                      neighbours joined by "," "and" "or" are one list; empty, "?" or "..." is no answer
    percent           28% = 28% = 0.28, and 28% = 28 (the question said "in percent"); but 28 is not 0.28
    units, currency   ignored if one side has none; if both have a known one, it must be the same (not converted)
    bare letter units the answer 3s (or m, h, g, L) is 3 if the gold is a plain number; a gold 3s is a variable
    degrees           90° = 90; inside sin, cos, ... a degree is π/180. Not 90° = π/2
    lists, sets       without brackets or in {}: any order. ± stands for both values: a list of two
    tuples            in order; (1,2) = "1, 2" = "x=1, y=2", but not {1,2}
    intervals         brackets count; unions are merged; x > 2 is (2,∞), 1 < x ≤ 3 is x ∈ (1,3] is (1,3]
    assignment        x = 5 is 5; but x = 5 is not y = 5, and x² = 4 is not 4
    equations         equal if one is a constant multiple of the other (positive, for inequalities)
    rounding          never: 0.333 is not 1/3. A decimal of 14 or more digits is read as rounded in its last place
    mixed numbers     3\frac12 and 3 1/2 are 7/2
    base subscripts   part of the value: 204_5 is not 204_6, nor 204
    ratios            3:2 = 3/2, but not 6:4; 12:30 is only itself
    log, roots        log is base 10, ln is natural; odd roots of negative numbers are real
    i, e, π           always the constants
    text              letters count, case does not (for words); a choice "C) 12" is "C"
"""

import contextlib
import functools
import json
import math
import os
import re
import time
import unicodedata
from collections.abc import Iterable
from decimal import Context, Decimal, DivisionByZero, InvalidOperation, Overflow, Underflow, localcontext
from fractions import Fraction

from data import files

MAX_CHARS = 2_000  # of an answer; longer ones are only equal to themselves
MAX_TOKENS = 800
MAX_DEPTH = 30  # of nested groups
MAX_BITS = 40_000  # of a numerator or denominator: 2006! has 19,000
MAX_STEPS = 12_000  # of evaluation and comparison, together well below 100 ms
MAX_RESPONSE = 200_000  # characters of a response that are looked at, from its end


class Unparsed(Exception):
    """The text is not in the language of this parser."""


class Undefined(Exception):
    """The expression has no value here: a division by zero, a limit exceeded, an unbound thing."""


class OutOfSteps(Exception):
    """The comparison took more than MAX_STEPS; the verdict is False."""


# ----------------------------------------------------------------------------------------------------------------------
# 1. From a response to its answer

BOX_TOKENS = re.compile(r"\\(?:boxed|fbox)\s*\{|\\(?:boxed|fbox)\s+([^\s{}$\\]+)|\\.|[{}]", re.S)
JOINT = re.compile(r"(?:[\s$.,;&]|\\[\[\]()]|\\quad|\\qquad|\\text\s*\{\s*(?:,?\s*and|or)\s*\}|\band\b|\bor\b)*")
RUN_ON = re.compile(r"<\|[a-z_]+\|>|</s>|\n[ \t]*(?:Problem|Question|User|Human|Q):")  # the model went on by itself
HOPE = re.compile(r"I hope it is correct\.?$", re.I)
ANSWER_IS = re.compile(
    r"(?:answer|correct (?:choice|option)|答案|respuesta|réponse|antwort|resposta|ответ)"
    r"(?:\s*(?:is|are|es|est|ist|é|是|为)\b\s*:?|\s*[:：=]|\s*\n|\s*(?=[$\\]))\s*(?:the final answer is)?\s*",
    re.I,
)
FORMULA = re.compile(
    r"\$\$(.{1,400}?)\$\$|\\\[(.{1,400}?)\\\]|\\\((.{1,400}?)\\\)"
    r"|\$(?!\s)([^$]+)(?<!\s)\$(?!\d)",
    re.S,
)  # in "$2 and $3" there is no formula
NUMBER = re.compile(  # a minus after a digit or a bracket is a subtraction
    r"(?:(?<![\w)%.])[-−])?\$?(?:\d{1,3}(?:,\d{3})+|\d+|(?=\.\d))(?:\.\d+)?(?:/\d+)?(?:\s?\\?%)?"
)

ROUNDED = re.compile(
    rf"\brounds?(?:ed)?(?: off)?(?: up| down)? to (?:about )?({NUMBER.pattern})(?!\s*(?:decimal|significant|place|digit))"
)


def extract_answer(response: str, box_only: bool = False) -> str | None:
    """The final answer that a response gives, as text, or None.

    The last box wins wherever there is one. Without any, and unless `box_only`, the answer is what follows "####" or
    the last "the answer is", else the last formula or number.
    """
    response = response[-MAX_RESPONSE:]
    final = _without_run_on(response.rpartition("</think>")[2])
    answer = _last_box(final)
    if answer is None and len(final) < len(response):
        answer = _last_box(response)
    if answer is None and not box_only:
        answer = _from_prose(final[-4_000:])
    answer = answer.strip() if answer else ""
    return answer if answer.strip("?.…-_ \\$") else None


def _without_run_on(text: str) -> str:
    found = RUN_ON.search(text, 1)  # not at the start: a response may begin by repeating the question
    return text[: found.start()] if found and text[: found.start()].strip() else text


def _last_box(text: str) -> str | None:
    """Content of the last closed box, joined with the boxes right before it that belong to the same list.

    One pass with a stack of open braces, so that 100 kB of braces cost no more than 100 kB of anything else.
    """
    if "\\boxed" not in text and "\\fbox" not in text:
        return None
    boxes: list[tuple[int, int, str]] = []  # (start, end, content), outermost only
    stack: list[tuple[int, int]] = []  # (start of \boxed or -1 for a plain brace, start of its content)
    for token in BOX_TOKENS.finditer(text):
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
    if not boxes:
        return None
    answers = [boxes[-1][2]]
    for left, right in zip(boxes[-2::-1], boxes[::-1]):
        between = text[left[1] : right[0]]
        if len(answers) == 20 or len(between) > 60 or not JOINT.fullmatch(between) or not left[2].strip():
            break
        answers.append(left[2])
    return ", ".join(reversed(answers))


def _from_prose(text: str) -> str | None:
    """The answer of a response without a box: by its marker, else the last formula, bold text or number."""
    text = HOPE.sub("", text.strip()).replace("**", " ").strip()
    if "####" in text:
        return text.rpartition("####")[2].strip().split("\n")[0]
    ends = [found.end() for found in ANSWER_IS.finditer(text)]
    if ends and text[ends[-1] :].strip():
        return _first_answer(text[ends[-1] :].strip())
    last_line = text.rpartition("\n")[2]
    if re.match(r"A\s*:", last_line):
        return last_line.partition(":")[2].strip()
    formulas = list(FORMULA.finditer(last_line))
    if formulas:
        behind = NUMBER.findall(last_line[formulas[-1].end() :])
        return behind[-1].strip() if behind else next(group for group in formulas[-1].groups() if group)
    if rounded := ROUNDED.findall(last_line):
        return rounded[-1].strip()
    claim, _, reason = last_line.rpartition(" because ")
    if "=" not in reason and NUMBER.search(claim):  # "It costs $50 because 50 < 52"
        return NUMBER.findall(claim)[-1].strip()
    # "…she needs 120/24 = 5 hours to read 120 pages": in a last line with a calculation, its result
    before, equals, result = last_line.rpartition("=")
    if equals and (numbers := NUMBER.findall(result) or NUMBER.findall(before)[-1:]):  # or "6 = x"
        return numbers[0].strip()
    numbers = NUMBER.findall(text)
    # "7 + 26 = 33\nThere are 33 ounces in those 3 boxes": a result that is said again, else the last number
    results = NUMBER.findall(text.rpartition("\n")[0].rpartition("=")[2])
    again = results and results[0].strip(" $") in (number.strip(" $") for number in NUMBER.findall(last_line))
    return (results[0] if again else numbers[-1]).strip() if numbers else None


def _first_answer(text: str) -> str | None:
    """What stands right after "the answer is": a formula, a choice letter, else the rest of the sentence's numbers."""
    formula = FORMULA.match(text)
    if formula:
        return next(group for group in formula.groups() if group)
    choice = re.match(r"\(?([A-J])\)?(?=[\s).:,]|$)", text)
    if choice:
        return choice[1]
    line = re.split(r"\n|\.(?:\s|$)", text)[0]
    number = NUMBER.findall(line)
    return number[-1 if "=" in line else 0].strip() if number else line.strip()


# ----------------------------------------------------------------------------------------------------------------------
# 2. From text to tokens: (kind, value, is there a space before it?), kinds num, sym, fn, word, text, op

UNICODE = str.maketrans({
    "×": "*", "·": "*", "⋅": "*", "∗": "*", "÷": "/", "⁄": "/", "−": "-", "–": "-", "—": "-", "≤": "<=", "≥": ">=",
    "⩽": "<=", "⩾": ">=", "≠": r"\ne ", "≈": r"\approx ", "π": r"\pi ", "∞": r"\infty ", "°": r"\degree ",
    "º": r"\degree ", "∪": r"\cup ", "∈": r"\in ", "∅": r"\emptyset ", "±": r"\pm ", "∓": r"\mp ", "√": r"\sqrt ",
    "∛": r"\sqrt[3]", "θ": r"\theta ", "²": "^2", "³": "^3", "⁴": "^4", "½": r"\frac{1}{2}", "⅓": r"\frac{1}{3}",
    "⅔": r"\frac{2}{3}", "¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "€": r"\$", "£": r"\$", "′": "'", "’": "'",
})  # fmt: skip
WRAPPER = r"\\(?:text(?:bf|it|rm|sf|normal)?|mbox|math(?:rm|bf|it|sf)|operatorname|bold)\s*\{([^{}]*)\}"
TOKEN = re.compile(
    rf"(?P<wrapped>{WRAPPER})"
    r"|(?P<env>\\(?:begin|end)\s*\{(?:[pbBvV]?matrix|array)\}(?:\{[lcr| ]*\})?)"
    r"|(?P<row>\\\\(?:\[[^\]]{0,9}\])?)"
    r"|(?P<skip>[\s~$]+|\\[,;:!()\[\] \n]|\\(?:left|right|middle|[bB]igg?[lrm]?|displaystyle|textstyle|limits|q?quad"
    r"|rm|bf|phantom|thinspace)(?![A-Za-z]))"
    r"|(?P<num>(?:\d+(?:\.\d+)?|\.\d+)(?:[eE][+-]?\d{1,3}(?![\d.]))?)"
    r"|(?P<word>[A-Za-z]+)|(?P<cmd>\\(?:[A-Za-z]+|.))|(?P<op><=|>=|==|\*\*|.)", re.S)  # fmt: skip
THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?![\d,])")  # 1,234,567
GROUPED = re.compile(r"(?<=\d)(?:\{,\}|,?\\!|\\,|\\;|\\ | )(?=\d{3}(?!\d))")  # 10{,}000  10,\!000  10\,000  10 000
OPERATORS = {name: name for name in (
    "+ - * / ^ _ ( ) [ ] { } | ! = < > <= >= : , & ' % frac binom sqrt in cup pm mp lfloor rfloor lceil rceil "
    "begin end row").split()} | {
    "\\{": "\\{", "\\}": "\\}", "\\$": "\\$", "\\%": "%", ";": ",", "**": "^", "==": "=", "dfrac": "frac",
    "tfrac": "frac", "cfrac": "frac", "dbinom": "binom", "tbinom": "binom", "le": "<=", "leq": "<=", "leqslant": "<=",
    "ge": ">=", "geq": ">=", "geqslant": ">=", "lt": "<", "gt": ">", "ne": "ne", "neq": "ne", "approx": "=",
    "equiv": "=", "times": "*", "cdot": "*", "ast": "*", "div": "/", "lvert": "|", "rvert": "|", "vert": "|",
    "colon": ":", "circ": "deg", "degree": "deg", "degrees": "deg", "infty": "inf", "infinity": "inf", "inf": "inf",
    "oo": "inf", "emptyset": "emptyset", "varnothing": "emptyset", "lbrace": "\\{", "rbrace": "\\}", "lbrack": "[",
    "rbrack": "]", "and": ",", "or": ",", "percent": "%", "pct": "%",
}  # fmt: skip
FUNCTIONS = frozenset("sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln lg exp".split())
NOT_SUPPORTED = frozenset("sum prod int iint oint lim dots ldots cdots vdots overline bmod pmod mod begin end".split())
UNITS = {alias: names.split()[0] for names in (
    "mm millimeter millimetre", "cm centimeter centimetre", "m meter metre", "km kilometer kilometre", "inch inches in",
    "ft foot feet", "yd yard", "mile mi", "acre", "ml milliliter", "liter litre l", "gallon gal", "quart", "pint",
    "cup", "mg milligram", "g gram gm", "kg kilogram", "lb pound", "oz ounce", "ton", "s sec second", "min minute",
    "hour hr h", "day", "week", "month", "year yr", "cent", "dollar usd buck", "euro", "mph", "am", "pm", "newton n",
    "joule j", "watt w", "volt v", "hz hertz", "kmh kph", "deg degree") for alias in names.split()}  # fmt: skip
LETTER_UNITS = [("sym", letter) for letter in "smhgL"]


def tokenize(text: str) -> list[tuple[str, str, bool]]:
    tokens: list[tuple[str, str, bool]] = []
    spaced = False
    for match in TOKEN.finditer(text):
        kind, value = match.lastgroup, match[0]
        if kind == "wrapped":
            tokens += _wrapped(next(group for group in match.groups()[1:] if group is not None))
        elif kind == "env":
            tokens.append(("op", "begin" if value[1] == "b" else "end", spaced))
        elif kind == "row":
            tokens.append(("op", "row", spaced))
        elif kind == "num":
            tokens.append(("num", value, spaced))
        elif kind != "skip":
            tokens.append(_named(kind, value, spaced))
        spaced = kind == "skip"
        if len(tokens) > MAX_TOKENS:
            raise Unparsed
    return tokens


def _named(kind: str, value: str, spaced: bool) -> tuple[str, str, bool]:
    """A command, a word or a sign."""
    name = value[1:] if kind == "cmd" and value[1].isalpha() else value
    if not name[0].isalpha() and name not in OPERATORS or name in NOT_SUPPORTED:
        raise Unparsed
    if name in FUNCTIONS:
        return "fn", name, spaced
    if name in OPERATORS and not (kind == "word" and name in ("in", "le", "ne", "ge", "lt", "gt", "frac", "cup", "pm")):
        return "op", OPERATORS[name], spaced
    if kind == "word" and len(name) > 1 and name not in ("pi", "theta"):
        return "word", name, spaced
    return "sym", name.replace("var", "") if kind == "cmd" else name, spaced


def _wrapped(content: str) -> list[tuple[str, str, bool]]:
    r"""The inside of \text{...}: words, or mathematics if it is one letter or has digits; "and", "or", "," separate."""
    if re.search(r"\d", content):
        return tokenize(content)
    tokens = []
    for i, piece in enumerate(re.split(r"[,;]|\band\b|\bor\b", content)):
        tokens += [("op", ",", True)] * (i > 0)
        if re.fullmatch(r"\s*\(?[A-Za-z]\)?\s*", piece):
            tokens += tokenize(piece)
        elif letters := _letters(piece):
            tokens.append(("text", letters, True))
    return tokens


def _letters(text: str) -> str:
    """Only what counts of a text: `p.m.` and `PM`, `Square  units` and `square units` are the same."""
    return " ".join(re.findall(r"[^\W_]+|[/^]", text.replace(".", "").casefold()))


# ----------------------------------------------------------------------------------------------------------------------
# 3. From tokens to a tree. A node is (kind, child, ...); every child that is a tuple is a node
#
#    answer   = relation {"," relation}                    relation = union {("=" | "<" | ... | "in") union}
#    union    = ratio {"cup" ratio}                        ratio    = sum {":" sum} [unit]
#    sum      = term {("+" | "-" | "±") term}              term     = ["-"] power {("*" | "/" | nothing) power}
#    power    = atom {"^" exponent | "!" | "%" | "°"}      atom     = number, name, function, group, \frac, \sqrt, ...

ZERO, ONE = Fraction(0), Fraction(1)
CLOSING = {"{": ("}",), "\\{": ("\\}",), "(": (")", "]"), "[": ("]", ")")}
MIXED = re.compile(r"frac (?:\{ n \}|n) (?:\{ n \}|n)|frac n|n / n")  # the n are numbers
STARTERS = frozenset(("(", "[", "{", "frac", "sqrt", "binom", "lfloor", "lceil", "begin"))


class Parser:
    def __init__(self, tokens: list):
        self.tokens = tokens + [("end", "", False)] * 3  # so that looking ahead needs no check
        self.at = self.depth = self.bars = 0

    def peek(self, *values: str) -> bool:
        kind, value, _ = self.tokens[self.at]
        return kind == "op" and value in values

    def take(self, *values: str) -> str | None:
        if self.peek(*values):
            self.at += 1
            return self.tokens[self.at - 1][1]
        return None

    def expect(self, *values: str) -> str:
        found = self.take(*values)
        if found is None:
            raise Unparsed
        return found

    def nested(self, rule) -> tuple:
        """Every recursion passes here: by counting, so that the limit does not depend on the caller's stack."""
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unparsed
        node = rule()
        self.depth -= 1
        return node

    def answer(self) -> tuple:
        items = self.items()
        if self.tokens[self.at][0] != "end" or not items:
            raise Unparsed
        return items[0] if len(items) == 1 else ("list", *items)

    def items(self) -> list[tuple]:
        """Relations with commas between; "1, 2, and 3" and a trailing comma are forgiven."""
        items = []
        while self.tokens[self.at][0] != "end" and not self.peek(")", "]", "}", "\\}"):
            items.append(self.relation())
            if not self.take(","):
                break
            while self.take(","):
                pass
        return items

    def relation(self) -> tuple:
        operands, signs = [self.union()], []
        while sign := self.take("=", "<", ">", "<=", ">=", "ne", "in"):
            signs.append(sign)
            operands.append(self.union())
        return ("rel", " ".join(signs), *operands) if signs else operands[0]

    def union(self) -> tuple:
        parts = [self.ratio()]
        while self.take("cup"):
            parts.append(self.ratio())
        return ("union", *parts) if len(parts) > 1 else parts[0]

    def ratio(self) -> tuple:
        parts = [self.sum()]
        while self.take(":"):
            parts.append(self.sum())
        node = ("ratio", *parts) if len(parts) > 1 else parts[0]
        unit = self.unit()
        return ("unit", node, unit) if unit else node

    def unit(self) -> str:
        """Words after a value, as in `5 square inches`, `100 km/h` or `15\\text{ cm}^2`, as text."""
        words = []
        while (
            self.tokens[self.at][0] in ("text", "word")
            or words
            and (self.tokens[self.at][0] in ("num", "sym") or self.peek("/", "^", "{", "}"))
        ):
            words.append(self.tokens[self.at][1])
            self.at += 1
        return _letters(" ".join(word for word in words if word not in "{}"))

    def sum(self) -> tuple:
        terms = [self.term()]
        while sign := self.take("+", "-", "pm", "mp"):
            terms.append(_signed(sign, self.term()))
        return ("add", *terms) if len(terms) > 1 else terms[0]

    def term(self) -> tuple:
        signs = []
        while sign := self.take("+", "-", "pm", "mp"):
            signs.append(sign)
        node = self.product()
        if "pm" in signs or "mp" in signs:
            node = ("pm", node)
        return ("neg", node) if (signs.count("-") + signs.count("mp")) % 2 else node

    def product(self) -> tuple:
        factors = [self.power()]
        while True:
            if self.take("*"):
                factors.append(_signed(self.take("-"), self.power()))
            elif self.take("/"):
                factors.append(("inv", _signed(self.take("-"), self.power())))
            elif self.follows_factor():
                factors.append(self.power())
            else:
                return ("mul", *factors) if len(factors) > 1 else factors[0]

    def follows_factor(self) -> bool:
        """Does the next token continue a product without a sign? A number only after a bracket: `x2` is no product."""
        kind, value, spaced = self.tokens[self.at]
        if kind == "num":
            return self.tokens[self.at - 1][1] in (")", "}", "!")
        if kind == "word":  # letters to multiply, unless it is the unit of what came before
            return UNITS.get(value) is None and not (spaced and len(value) > 3)
        return kind in ("sym", "fn") or kind == "op" and (value in STARTERS or value == "|" and not self.bars)

    def power(self) -> tuple:
        node, signs = self.nested(self.atom), 0
        while sign := self.take("^", "!", "%", "deg"):
            if (signs := signs + 1) > 8:
                raise Unparsed
            if sign != "^":
                node = (sign, node)
            elif self.peek("{") and self.tokens[self.at + 1][:2] == ("op", "deg"):  # 90^{\circ}
                self.at += 2
                self.expect("}")
                node = ("deg", node)
            elif self.take("deg"):
                node = ("deg", node)
            else:
                node = ("pow", node, self.exponent())
        return node

    def exponent(self) -> tuple:
        return _signed(self.take("-", "+"), self.nested(self.power))

    def atom(self) -> tuple:
        kind, value, _ = self.tokens[self.at]
        self.at += 1
        if kind == "num":
            return self.number(value)
        if kind == "sym":
            return self.name(value)
        if kind == "fn":
            return self.function(value)
        if kind == "text":
            return ("text", value)
        if kind == "word":
            return self.word(value)
        if kind == "op":
            return self.bracketed(value)
        raise Unparsed

    def bracketed(self, opening: str) -> tuple:
        """What starts with a sign or a command that takes arguments."""
        if opening in CLOSING:
            return self.group(opening)
        if opening == "frac":
            top = self.argument()
            return ("mul", top, ("inv", self.argument()))
        if opening == "binom":
            return ("binom", self.argument(), self.argument())
        if opening == "sqrt":
            root = self.group("[") if self.take("[") else ("num", Fraction(2))
            return ("pow", self.nested(self.atom), ("inv", root))
        if opening == "\\$":
            return ("unit", self.power(), "dollar")
        if opening in ("lfloor", "lceil"):
            node = (opening, self.sum())
            self.expect("r" + opening[1:])
            return node
        if opening == "|":
            self.bars += 1
            node = ("abs", self.sum())
            self.expect("|")
            self.bars -= 1
            return node
        if opening == "begin":
            return self.matrix()
        if opening in ("inf", "emptyset"):
            return (opening,)
        raise Unparsed

    def group(self, opening: str) -> tuple:
        bars, self.bars = self.bars, 0
        items = self.items()
        closing = self.expect(*CLOSING[opening])
        self.bars = bars
        if opening == "\\{" or opening == "{" and len(items) > 1:
            return ("set", *items) if items else ("emptyset",)
        if not items:
            raise Unparsed
        if len(items) > 1:
            return ("seq", opening + closing, *items)
        return items[0]

    def matrix(self) -> tuple:
        rows, row = [], []
        while True:
            if not self.peek("&", "row", "end"):
                row.append(self.relation())
            if self.take("&"):
                continue
            if row:
                rows.append(("row", *row))
            row = []
            if self.take("end"):
                return ("matrix", *rows)
            self.expect("row")

    def argument(self) -> tuple:
        r"""One argument of \frac: a group or a single token, of a number only the first digit: \frac12 is 1/2."""
        kind, value, _ = self.tokens[self.at]
        if kind == "num" and len(value) > 1 and value.isdigit():
            self.tokens[self.at : self.at + 1] = [("num", value[0], False), ("num", value[1:], False)]
        if kind == "num":
            self.at += 1
            return _num(self.tokens[self.at - 1][1])
        return self.nested(self.atom)

    def number(self, digits: str) -> tuple:
        if self.take("_"):
            return ("based", digits, self.subscript())
        return ("num", Fraction(digits) + fraction) if digits.isdigit() and (fraction := self.mixed()) else _num(digits)

    def mixed(self) -> Fraction | None:
        r"""The proper fraction after a whole number, taken, if there is one: 3\frac{1}{2}, 3\frac12, 3 1/2."""
        ahead = self.tokens[self.at : self.at + 7]
        shape = " ".join("n" if kind == "num" else value for kind, value, _ in ahead)
        found = MIXED.match(shape)
        if not found or shape[0] == "n" and not ahead[0][2]:
            return None
        length = len(found[0].split())
        digits = [value for kind, value, _ in ahead[:length] if kind == "num"]
        top, bottom = digits if len(digits) == 2 else (digits[0][0], digits[0][1:])
        if not (top + bottom).isdigit() or len(bottom) > 20 or not 0 < int(top) < int(bottom or 0):
            return None
        self.at += length
        return Fraction(int(top), int(bottom))

    def name(self, name: str) -> tuple:
        while True:
            if self.take("_"):
                name += "_" + self.subscript()
            elif self.take("'"):
                name += "'"
            else:
                return ("sym", name)

    def subscript(self) -> str:
        if not self.take("{"):
            self.at += 1
            return self.tokens[self.at - 1][1]
        start = self.at
        while not self.take("}"):
            if self.tokens[self.at][0] == "end":
                raise Unparsed
            self.at += 1
        return " ".join(value for _, value, _ in self.tokens[start : self.at - 1])

    def word(self, word: str) -> tuple:
        """Letters without a space: a product (`xy`), unless it looks like a word or a name (`east`, `CBAD`)."""
        if len(word) > 4 or len(word) > 2 and not word.islower():
            return ("text", word.casefold())
        self.tokens[self.at - 1 : self.at] = [("sym", letter, False) for letter in word]
        return self.name(word[0])

    def function(self, name: str) -> tuple:
        base = power = None
        if self.take("_"):
            base = self.argument()
        if self.take("^"):
            power = self.exponent()
            if power in (("neg", _num("1")), _num("-1")):
                name, power = "arc" + name, None
        if self.peek("(", "{", "|"):
            argument = self.nested(self.atom)
        else:  # \sin 2x \cos x: everything up to the next function, bracket or sign
            factors = [_signed(self.take("-"), self.power())]
            while self.follows_factor() and self.tokens[self.at][0] != "fn" and not self.peek("(", "begin"):
                factors.append(self.power())
            argument = ("mul", *factors)
        node = ("call", name, argument, base) if base else ("call", name, argument)
        return ("pow", node, power) if power else node


def _num(digits: str) -> tuple:
    if len(digits) > 1_000:
        raise Unparsed
    if re.search(r"[.eE]", digits):  # ("num", value, count of significant digits)
        return ("num", Fraction(digits), len(re.sub(r"[eE].*|\.", "", digits).lstrip("0")))
    return ("num", Fraction(digits))


def _signed(sign: str | None, node: tuple) -> tuple:
    if sign in ("pm", "mp"):
        return ("pm", node if sign == "pm" else ("neg", node))
    return ("neg", node) if sign == "-" else node


@functools.lru_cache(maxsize=512)  # a gold answer is compared with many responses
def parse(text: str, thousands: bool = True) -> tuple | None:
    """The tree of an answer, or None if it is not in the language."""
    if len(text) > MAX_CHARS:
        return None
    try:
        text = GROUPED.sub("", text)
        if thousands and not re.search(r"[(\[]|\\{", text):  # in (1,234) there are two numbers
            text = THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
        return Parser(tokenize(text)).answer()
    except (Unparsed, RecursionError):
        return None


# ----------------------------------------------------------------------------------------------------------------------
# 4. Numbers: exact fractions, and complex numbers of 60 digits where fractions end

CONTEXT = Context(prec=60, traps=[InvalidOperation, DivisionByZero, Overflow, Underflow])
NOISE = Decimal("1e-40")  # a sum that cancels to this share of its terms is zero
CLOSE = Decimal("1e-35")  # relative difference at which two numbers of 60 digits are one
PI = Decimal("3.14159265358979323846264338327950288419716939937510582097494459230781640628620899")


class Complex:
    """re + im·i in Decimals; mixes with Fraction in + and *. The caller holds localcontext(CONTEXT)."""

    __slots__ = ("re", "im")

    def __init__(self, re: Decimal, im: Decimal = Decimal(0)):
        self.re, self.im = re, im

    def __add__(self, other):
        other = lift(other)
        return Complex(_add(self.re, other.re), _add(self.im, other.im))

    def __mul__(self, other):
        other = lift(other)
        re = _add(self.re * other.re, -self.im * other.im)
        return Complex(re, _add(self.re * other.im, self.im * other.re))

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self):
        return Complex(-self.re, -self.im)

    def inverse(self):
        square = self.re * self.re + self.im * self.im
        if not square:
            raise Undefined
        return Complex(self.re / square, -self.im / square)

    def modulus(self) -> Decimal:
        return (self.re * self.re + self.im * self.im).sqrt()

    def is_real(self) -> bool:
        return abs(self.im) <= CLOSE * abs(self.re)

    def exp(self):
        size, (cos, sin) = self.re.exp(), cos_sin(self.im)
        return Complex(size * cos, size * sin)

    def log(self):
        if not (size := self.modulus()):
            raise Undefined
        # The angle: half-angle formula, then three halvings, so that the Taylor series of the arctangent is short.
        if self.is_real():
            return Complex(size.ln(), PI if self.re < 0 else Decimal(0))
        tangent, scale = self.im / (size + self.re), 2
        for _ in range(3):
            tangent, scale = tangent / (1 + (1 + tangent * tangent).sqrt()), scale * 2
        angle = power = tangent
        for n in range(3, 120, 2):
            power = -power * tangent * tangent
            angle += power / n
        return Complex(size.ln(), scale * angle)


def _add(a: Decimal, b: Decimal) -> Decimal:
    total = a + b
    return total if abs(total) > NOISE * abs(a) else Decimal(0)


def cos_sin(x: Decimal) -> tuple[Decimal, Decimal]:
    """Taylor series, after taking away whole turns."""
    if abs(x) > 10**9:
        raise Undefined
    x -= 2 * PI * (x / (2 * PI)).to_integral_value()
    sums, term = [Decimal(0), Decimal(0), Decimal(0), Decimal(0)], Decimal(1)
    for n in range(1, 70):
        sums[n % 4 - 1] += term  # powers 0, 1, 2, 3 (mod 4) go to sums 0, 1, 2, 3
        term = term * x / n
    return _add(sums[0], -sums[2]), _add(sums[1], -sums[3])


def lift(x) -> Complex:
    return x if isinstance(x, Complex) else Complex(Decimal(x.numerator) / Decimal(x.denominator))


def close(a, b, tolerance: Decimal = CLOSE) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction) and tolerance is CLOSE:
        return a == b
    a, b = lift(a), lift(b)
    return (a + -b).modulus() <= tolerance * max(a.modulus(), b.modulus())


def is_real(x) -> bool:
    return isinstance(x, Fraction) or x.is_real()


def exact(x) -> Fraction:
    """A number that must be rational here (in a factorial, a floor): itself, or the whole number it is close to."""
    if isinstance(x, Fraction):
        return x
    if not x.is_real() or abs(x.re) > 10**30:
        raise Undefined
    nearest = x.re.to_integral_value()
    return Fraction(nearest if abs(x.re - nearest) <= NOISE * (1 + abs(x.re)) else x.re)


# ----------------------------------------------------------------------------------------------------------------------
# 5. The value of a tree at a point

CONSTANTS = {"pi": Complex(PI), "e": Complex(Decimal(1).exp(CONTEXT)), "i": Complex(Decimal(0), Decimal(1))}
LN_10 = Complex(Decimal(10).ln(CONTEXT))
HALF = Fraction(1, 2)


class Work:
    """What an evaluation needs to know: steps left, values of the names, what a percent and a degree are worth."""

    def __init__(self):
        self.steps, self.names = MAX_STEPS, {}
        self.percent, self.degree = Fraction(1, 100), ONE

    def spend(self, steps: int) -> None:
        self.steps -= steps
        if self.steps < 0:
            raise OutOfSteps


def value(node: tuple, work: Work):
    """Fraction or Complex; Undefined if there is none."""
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
            total = bounded(total + term if kind == "add" else total * term, work)
        return total
    if kind == "neg":
        return -value(node[1], work)
    if kind == "unit":
        return value(node[1], work)
    if kind == "inv":
        return inverse(value(node[1], work))
    if kind == "pow":
        return power(value(node[1], work), value(node[2], work), work)
    if kind == "%":
        return value(node[1], work) * work.percent
    if kind == "deg":
        return value(node[1], work) * work.degree
    if kind == "call":
        return call(node, work)
    if kind == "abs":
        inner = value(node[1], work)
        return abs(inner) if isinstance(inner, Fraction) else Complex(inner.modulus())
    if kind in ("lfloor", "lceil"):
        return Fraction((math.floor if kind == "lfloor" else math.ceil)(exact(value(node[1], work))))
    if kind in ("!", "binom"):
        return counting(kind, [exact(value(child, work)) for child in node[1:]], work)
    raise Undefined  # a set, a text, infinity, ...


def bounded(x, work: Work):
    """The same number, if it is not too long: paid for by its length."""
    if isinstance(x, Fraction):
        bits = x.numerator.bit_length() + x.denominator.bit_length()
        if bits > 2 * MAX_BITS:
            raise Undefined
        work.spend(bits * bits >> 20)
    else:
        work.spend(1)
    return x


def inverse(x):
    if not isinstance(x, Fraction):
        return x.inverse()
    if not x:
        raise Undefined
    return 1 / x


def power(base, exponent, work: Work):
    """Exact for whole exponents of fractions; else the principal value, but real odd roots of negative numbers."""
    if isinstance(exponent, Fraction):
        whole = exponent.denominator == 1
        if whole and isinstance(base, Fraction):
            size = max(base.numerator.bit_length(), base.denominator.bit_length())
            if not base and exponent <= 0 or size > 1 and size * abs(exponent) > MAX_BITS:
                raise Undefined
            # ±1 to a huge power is the one case that would get past the size check
            return bounded(base ** (int(exponent) if size > 1 else int(exponent) % 2), work)
        if whole and abs(exponent) <= 12:
            result = ONE
            for _ in range(abs(int(exponent))):
                result = base * result
            return inverse(result) if exponent < 0 else result
    work.spend(60)
    base = lift(base)
    if not base.re and not base.im:
        if lift(exponent).re <= 0:
            raise Undefined
        return ZERO
    if isinstance(exponent, Fraction) and exponent.denominator % 2 and base.is_real() and base.re < 0:
        root = ((-base).log() * exponent).exp()  # an odd root of a negative number is real
        return -root if exponent.numerator % 2 else root
    return (base.log() * exponent).exp()


def counting(kind: str, arguments: list[Fraction], work: Work) -> Fraction:
    """n! and binomial coefficients of whole numbers whose result is not too long."""
    if any(x.denominator != 1 or not 0 <= x < 10**6 for x in arguments):
        raise Undefined
    n, k = int(arguments[0]), int(arguments[-1])
    factors = n if kind == "!" else min(k, n - k)
    if factors * n.bit_length() > MAX_BITS:
        raise Undefined
    work.spend(1 + factors // 10)
    return Fraction(math.factorial(n) if kind == "!" else math.comb(n, k))


def call(node: tuple, work: Work):
    """Elementary functions of a complex number, all from exp and log."""
    name = node[1]
    circular = name in ("sin", "cos", "tan", "cot", "sec", "csc")
    degree, work.degree = work.degree, Fraction(PI) / 180 if circular else work.degree
    x = lift(value(node[2], work))
    work.degree = degree
    work.spend(60)
    if name in ("log", "ln", "lg"):
        base = lift(value(node[3], work)).log() if len(node) > 3 else CONSTANTS["e"].log() if name == "ln" else LN_10
        return x.log() * base.inverse()
    if len(node) > 3:
        raise Undefined
    if name == "exp":
        return x.exp()
    i = CONSTANTS["i"]
    if name.startswith("arc"):
        return inverse_circular(name[3:], x)
    turn = x if name.endswith("h") else x * i
    plus, minus = turn.exp(), (-turn).exp()
    cos = (plus + minus) * HALF
    sin = (plus + -minus) * HALF * (ONE if name.endswith("h") else -i)
    table = {"sin": (sin, ONE), "cos": (cos, ONE), "tan": (sin, cos), "cot": (cos, sin), "sec": (ONE, cos)}
    top, bottom = table.get(name.rstrip("h"), (ONE, sin))  # what is left is csc
    return top * inverse(bottom)


def inverse_circular(name: str, x: Complex):
    i = CONSTANTS["i"]
    if name == "tan":
        return (i * HALF) * ((-i * x + ONE).log() + -(i * x + ONE).log())
    arcsin = -i * (i * x + power(-(x * x) + ONE, HALF, Work())).log()
    if name == "sin":
        return arcsin
    if name == "cos":
        return -arcsin + Complex(PI / 2)
    raise Undefined


# ----------------------------------------------------------------------------------------------------------------------
# 6. Equality of trees. Each rule says True or False, or None where it has no opinion

POINTS = 9  # the first three are fractions, the next three whole numbers, the last three negative


def is_equivalent(answer: str, gold: str) -> bool:
    """Is the answer mathematically the gold answer, by the conventions above? Never raises on any two strings."""
    if len(answer) > MAX_CHARS or len(gold) > MAX_CHARS:
        return answer.strip() == gold.strip()
    answer, gold = clean(answer), clean(gold)
    if not answer or not gold:
        return False
    if _key(answer) == _key(gold) or _words(answer) == _words(gold) != "":
        return True
    for thousands in (True, False) if re.search(r"\d,\d{3}", answer + gold) else (True,):
        a, b = parse(answer, thousands), parse(gold, thousands)
        if a is None or b is None:
            continue
        if a[0] == "mul" and len(a) == 3 and a[1][0] == "num" and a[2] in LETTER_UNITS and not names(b):
            a = a[1]  # 3s for 3: only here, where the gold is known to have no variable
        try:
            with localcontext(CONTEXT):
                if same(a, b, Work()):
                    return True
        except (OutOfSteps, RecursionError):
            pass
    return _choice(answer) == _choice(gold) != ""


def clean(text: str) -> str:
    """Without the wrapping: boxes, dollars, bold, the final stop."""
    text = unicodedata.normalize("NFKC", text.translate(UNICODE)) if not text.isascii() else text
    text = re.sub(r"\\(?:boxed|fbox)\s*\{(.*)\}", r"\1", text.removeprefix("**").removesuffix("**"), flags=re.S)
    text = re.sub(r"\^\s*\{?\\prime\}?", "'", text)
    text = re.sub(r"(?<=\d)\s*([ap])\.?m\b\.?", lambda half: f" {half[1]}m".lower(), text, flags=re.I)  # 4:30 P.M.
    if whole := re.fullmatch(r"\s*\$+([^$]*[^$\\])\$+[\s.,:;]*", text):
        text = whole[1]  # "$43_5.$": the stop inside is one too
    return re.sub(r"^\s*(?:=|\\approx)", "", text).strip().rstrip(".,:; ").strip()


def _key(text: str) -> str:
    """The text without what LaTeX does not show; the same key is the same answer, whatever it means."""
    text = re.sub(r"\\(?:left|right)(?![A-Za-z])|\\[,;!:]|\$", "", re.sub(WRAPPER, r" \1 ", text))
    return re.sub(r"(?<!\d) +| +(?!\d)", "", " ".join(text.split()))


def _words(text: str) -> str:
    """The letters of an answer in words, in lower case; "" if it is not one."""
    text = re.sub(WRAPPER, r" \1 ", text).strip(" ()")
    return _letters(text) if re.fullmatch(r"[^\W\d_](?:[^\W\d_]|[ .,'&-])+[^\W\d_]", text) else ""


def _choice(text: str) -> str:
    r"""The letter of `C`, `(C)`, `\text{(C)}`, `C) 12`, `C Cecile`; "" if the text is not like that."""
    text = re.sub(WRAPPER, r" \1 ", text).strip()
    found = re.fullmatch(r"\(?([A-Z])(?:\)?|\s*[).:]\s*\S.*|\s[A-Z][a-z]+)", text, re.S)
    return found[1] if found else ""


@functools.lru_cache(maxsize=2048)
def names(node: tuple) -> frozenset[str]:
    """The variables of a tree, and the markers "±" and "%" if it has such parts."""
    if node[0] == "sym":
        return frozenset() if node[1] in CONSTANTS else frozenset((node[1],))
    inner = [names(child) for child in node[1:] if isinstance(child, tuple)]
    mark = {"pm": "±", "%": "%"}.get(node[0])
    return frozenset().union(*inner, (mark,) if mark else ())


def same(a: tuple, b: tuple, work: Work) -> bool:
    work.spend(5)
    if a == b:
        return True
    for rule in (same_sets, same_lists, same_relations, same_shapes, same_units):
        verdict = rule(a, b, work)
        if verdict is not None:
            return verdict
    return same_values(a, b, work)


def same_sets(a: tuple, b: tuple, work: Work) -> bool | None:
    """Intervals, unions and inequalities in one variable, as sorted lists of disjoint pieces of the real line."""
    if not (_is_real_set(a) or _is_real_set(b)) or a[0] == b[0] == "rel" and "in" not in (a[1], b[1]):
        return None
    pieces = segments(a, work), segments(b, work)
    return None if None in pieces else pieces[0] == pieces[1]


def _is_real_set(node: tuple) -> bool:
    return (node[0] in ("union", "emptyset") or node[0] == "seq" and len(node) == 4 and node[1] != "()"
            or node[0] == "rel" and node[1] != "=")  # fmt: skip


def segments(node: tuple, work: Work) -> list | None:
    """[(low, is low missing?, high, is high there?)], or None if the tree is not a set of real numbers."""
    kind, pieces = node[0], []
    if kind == "seq" and len(node) == 4:
        pieces = [_piece(node[2], node[1][0] == "[", node[3], node[1][1] == "]", work)]
    elif kind == "set":
        pieces = [_piece(child, True, child, True, work) for child in node[1:]]
    elif kind == "rel":
        pieces = _solved(node, work)
    elif kind in ("union", "list"):
        parts = [segments(child, work) for child in node[1:] if child[0] != "list"]
        pieces = [None] if None in parts else sum(parts, [])
    elif kind != "emptyset":
        return None
    if None in pieces:
        return None
    merged: list = []
    for piece in sorted(pieces):
        if merged and (piece[0], piece[1]) <= (merged[-1][2], merged[-1][3]):  # touches or overlaps the one before
            if kind == "list":  # "x < 1, x < 3": no union was meant
                return None
            low, missing, high, there = merged.pop()
            piece = (low, missing, *max((high, there), piece[2:]))
        merged.append(piece)
    return merged


def _piece(low: tuple, has_low: bool, high: tuple, has_high: bool, work: Work) -> tuple | None:
    ends = _end(low, work), _end(high, work)
    return (ends[0], not has_low, ends[1], has_high) if None not in ends and ends[0] <= ends[1] else None


def _end(node: tuple, work: Work) -> Decimal | None:
    """An end of an interval, to 40 digits so that equal ends are identical."""
    sign, inner = (-1, node[1]) if node[0] == "neg" else (1, node)
    if inner == ("inf",):
        return sign * Decimal("Infinity")
    work.names, work.degree = {}, ONE
    try:
        number = lift(value(node, work))
        return number.re.normalize(Context(prec=40)) if number.is_real() else None
    except (Undefined, ArithmeticError, KeyError):
        return None


def _solved(relation: tuple, work: Work) -> list:
    """x > 2, 1 < x <= 3, x in [1,2]: the pieces of the line where the relation holds; [None] if it is not so simple."""
    signs, operands = relation[1].split(), list(relation[2:])
    if signs == ["in"]:
        return segments(operands[1], work) or [None] if _is_name(operands[0]) else [None]
    if signs[0] in (">", ">="):
        signs, operands = [sign.replace(">", "<") for sign in reversed(signs)], operands[::-1]
    if any(sign not in ("<", "<=") for sign in signs) or len(operands) > 3:
        return [None]
    if len(operands) == 2:
        if _is_name(operands[0]):
            signs, operands = ["<", *signs], [("neg", ("inf",)), *operands]
        else:
            signs, operands = [*signs, "<"], [*operands, ("inf",)]
    if not _is_name(operands[1]):
        return [None]
    return [_piece(operands[0], signs[0] == "<=", operands[2], signs[1] == "<=", work)]


def _is_name(node: tuple) -> bool:
    r"""Does it only name something: x, AB, f(x), |AB|, V_1:V_2, \frac{AO}{BO}, (x, y), \text{Area}?"""
    if node[0] in ("sym", "text"):
        return True
    inner = [child for child in node[1:] if isinstance(child, tuple)]
    return node[0] in ("mul", "inv", "abs", "ratio", "seq") and all(_is_name(child) for child in inner)


def members(node: tuple) -> list[tuple] | None:
    """The elements of a list or set, with both values of every ±; None if it is neither."""
    if node[0] in ("list", "set", "emptyset"):
        nested = [members(child) if child[0] != "set" else [child] for child in node[1:]]
        return [item for child, inner in zip(node[1:], nested) for item in inner or [child]]
    return [_choose(node, 1), _choose(node, -1)] if "±" in names(node) else None


def _choose(node, sign: int):
    if not isinstance(node, tuple):
        return node
    if node[0] == "pm":
        inner = _choose(node[1], sign)
        return inner if sign > 0 else ("neg", inner)
    return tuple(_choose(child, sign) for child in node)


def same_lists(a: tuple, b: tuple, work: Work) -> bool | None:
    for one, other in ((a, b), (b, a)):
        if one[0] == "list" and other[0] == "seq":  # 1, 2 for (1, 2): in order
            return len(one) == len(other) - 1 and all(same(x, y, work) for x, y in zip(one[1:], other[2:]))
    left, right = members(a), members(b)
    if left is None and right is None:
        return None
    if left is None or right is None:  # a list is one answer only if all its items are that answer
        items, single = (left, b) if right is None else (right, a)
        return bool(items) and all(same(item, single, work) for item in items)
    return matched(left, right, lambda x, y: same(x, y, work))


def matched(left: list, right: list, equal) -> bool:
    """Can the items of the two lists be paired off? Greedily: things equal to one thing are equal to each other."""
    right = list(right)
    for item in left:
        match = next((i for i, other in enumerate(right) if equal(item, other)), None)
        if match is None:
            return False
        del right[match]
    return not right


def same_relations(a: tuple, b: tuple, work: Work) -> bool | None:
    if a[0] != "rel" and b[0] != "rel":
        return None
    if a[0] == "rel" and b[0] == "rel":
        if matched(_differences(a), _differences(b), lambda x, y: x[0] == y[0] and proportional(*x, y[1], work)):
            return True
        # f(x) = 2x and y = 2x define the same, x = 5 and y = 5 do not
        if a[1] == b[1] == "=" and not (a[2][0] == b[2][0] == "sym") and _is_name(a[2]) and _is_name(b[2]):
            return same(a[3], b[3], work)
        return False
    relation, other = (a, b) if a[0] == "rel" else (b, a)
    if set(relation[1].split()) == {"="} and (_is_name(relation[2]) or not names(relation[2])) or (
        relation[1] == "in" and _is_name(relation[2])
    ):  # fmt: skip
        return same(relation[-1], other, work)
    return False


def _differences(relation: tuple) -> list[tuple[str, tuple]]:
    """Every sign of a chain with the difference of its sides, turned so that > does not occur."""
    out = []
    for sign, left, right in zip(relation[1].split(), relation[2:], relation[3:]):
        if ">" in sign:
            sign, left, right = sign.replace(">", "<"), right, left
        out.append((sign, ("add", left, ("neg", right))))
    return out


def same_shapes(a: tuple, b: tuple, work: Work) -> bool | None:
    """Tuples, matrices, ratios, texts."""
    kinds = {a[0], b[0]}
    if kinds == {"ratio"} or kinds == {"seq"} or kinds == {"matrix"} or kinds == {"row"}:
        pairs = [(x, y) for x, y in zip(a[1:], b[1:]) if isinstance(x, tuple)]
        brackets = a[0] != "seq" or a[1] == b[1]
        return len(a) == len(b) and brackets and all(same(x, y, work) for x, y in pairs)
    if "ratio" in kinds and len(ratio := a if a[0] == "ratio" else b) == 3:
        return same(("mul", ratio[1], ("inv", ratio[2])), b if ratio is a else a, work)
    return False if kinds & {"seq", "matrix", "text", "based", "inf", "ratio", "emptyset"} else None


def same_units(a: tuple, b: tuple, work: Work) -> bool | None:
    if a[0] != "unit" and b[0] != "unit":
        return None
    units = [unit_name(node[2]) if node[0] == "unit" else {"%": "%", "deg": "deg"}.get(node[0]) for node in (a, b)]
    if None not in units and units[0] != units[1]:
        return False
    return same(*(node[1] if node[0] == "unit" else node for node in (a, b)), work)


def unit_name(text: str) -> str | None:
    """`sq. inches`, `inch^2` → `inch^2`; None if a word is no unit we know: then it says what is counted, not how."""
    out, power = "", ""
    for word in re.findall(r"[a-z]+|\d+|[/^]", text.replace(" per ", "/")):
        if word in ("square", "sq", "cubic", "cu"):
            power = "^2" if word[0] == "s" else "^3"
        elif word.isalpha():
            name = UNITS.get(word) or UNITS.get(word[:-1] if word.endswith("s") else word)
            if name is None:
                return None
            out, power = out + name + power, ""
        else:
            out += word
    return out


def same_values(a: tuple, b: tuple, work: Work) -> bool:
    """Expressions: equal at every point where both have a value (at least three, unless there is no variable)."""
    one_percent = ("%" in names(a)) != ("%" in names(b))
    for percent in (Fraction(1, 100), ONE) if one_percent else (Fraction(1, 100),):
        work.percent = percent
        checked = 0
        for x, y in samples(a, b, work):
            if not close(x, y, tolerance(a, b)):
                break
            checked += 1
        else:
            if checked >= (3 if variables(a, b) else 1):
                return True
    return False


def tolerance(a: tuple, b: tuple) -> Decimal:
    """CLOSE, but for a decimal with so many digits that it must be a rounded one: its last place."""
    numbers = [node[1] if node[0] == "neg" else node for node in (a, b)]
    digits = [node[2] for node in numbers if node[0] == "num" and len(node) > 2]
    return Decimal(10) ** (1 - max(digits)) if digits and max(digits) >= 14 else CLOSE


def proportional(sign: str, a: tuple, b: tuple, work: Work) -> bool:
    """Is a a constant multiple of b, a positive one if the sign between a and 0 is < or <=?"""
    ratios = []
    for x, y in samples(a, b, work):
        if lift(y).modulus() == 0 or lift(x).modulus() == 0:
            if lift(x).modulus() != lift(y).modulus():
                return False
            continue
        ratios.append(x * inverse(y))
    return len(ratios) >= (3 if variables(a, b) else 1) and all(
        close(ratios[0], ratio) and is_real(ratio) and ("<" not in sign or lift(ratio).re > 0) for ratio in ratios
    )


def variables(a: tuple, b: tuple) -> list[str]:
    return sorted((names(a) | names(b)) - {"%"})


def samples(a: tuple, b: tuple, work: Work):
    """Pairs of values of two trees at the same points. Where a name is negative, only pairs of real values: there the
    branches of roots and logarithms differ between forms that everybody calls equal."""
    both = variables(a, b)
    for point in range(POINTS if both else 1):
        work.names, work.degree = {name: _coordinate(point, k) for k, name in enumerate(both)}, ONE
        try:
            pair = value(a, work), value(b, work)
        except (Undefined, ArithmeticError, KeyError):
            continue
        if point < 6 or is_real(pair[0]) and is_real(pair[1]):
            yield pair


def _coordinate(point: int, k: int) -> Fraction:
    """Scattered by multiplication (Knuth's constant), so that no simple relation holds between coordinates."""
    scattered = (point * 7919 + k * 104_729 + 12_345) * 2_654_435_761 % 2**32 >> 12
    if 3 <= point < 6:
        return Fraction(2 + scattered % 23)
    return Fraction(1 + scattered % 40, 11 if point < 3 else -13)


# ----------------------------------------------------------------------------------------------------------------------
# 7. Reward

RIGHT, WRONG = 1.0, -1.0  # arXiv 2506.20512: no format reward, no length penalty


def reward(response: str, gold: str) -> float:
    """+1 if the last box of the response is equivalent to the gold answer, -1 if it is not or if there is no box."""
    answer = extract_answer(response, box_only=True)
    return RIGHT if answer is not None and is_equivalent(answer, gold) else WRONG


# ----------------------------------------------------------------------------------------------------------------------
# 8. Evaluating a checkpoint. torch and the sampler are imported only here, so that `import verify` stays light


def wilson(correct: float, total: int, z: float = 1.96) -> tuple[float, float]:
    """95% interval of a proportion (Wilson 1927): unlike ±1.96 standard errors, sane for few items, near 0 and 1."""
    if total == 0:
        return 0.0, 1.0
    share, z2 = correct / total, z * z
    middle = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = z / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


def is_right(answer: str | None, row: dict) -> bool:
    """Whether an answer is equivalent to row["answer"]; where options are listed (MMLU, SAT, MathQA), their letter or the
    text of the right one, if it is no other one's."""
    if answer is None or is_equivalent(answer, row["answer"]):
        return answer is not None
    from data.benchmarks import options

    texts = options(row)
    if not texts or is_letter(answer):
        return False
    return [letter for letter, text in texts.items() if is_equivalent(answer, text)] == [row["answer"]]


def is_letter(answer: str) -> bool:
    return re.fullmatch(r"\W*(text\W*)?[A-H]\W*", answer) is not None


def sample_and_grade(sampler, problems, prompts, grade, n=1, max_new_tokens=1024, temperature=0.0, seed=0, stop=None, request_ids=None):
    made = sampler.generate(prompts, n=n, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed, stop=stop, request_ids=request_ids)
    return [[(c, grade(c.text, problem)) for c in group] for problem, group in zip(problems, made, strict=True)]


def evaluate(
    sampler, problems, prompt, max_new_tokens, n=1, temperature=0.0, seed=0, stop=None, box_only=True, ids=None
) -> list[dict]:
    """Sample n answers to each problem and grade them → n rows a problem, in order.

    problems: dicts with "problem" and "answer"; prompt: question → prompt text; box_only: as the reward does, by the last
    box; ids: the problems' numbers, which decide the random numbers; stop: as in Sampler.generate, None for end-of-text
    and the strings at which a base model starts the next question.
    """
    from data.prompts import STOP

    tokenizer = sampler.tokenizer
    completions = sampler.generate(
        [tokenizer.encode(prompt(problem["problem"])) for problem in problems], n=n, max_new_tokens=max_new_tokens,
        temperature=temperature, seed=seed, stop=(*tokenizer.stop_ids, *STOP) if stop is None else stop,
        request_ids=ids)  # fmt: skip
    rows = []
    for number, (problem, group) in enumerate(zip(problems, completions)):
        for completion in group:
            answer = extract_answer(completion.text, box_only=box_only)
            rows.append({
                "item": number if ids is None else ids[number], "problem": problem["problem"], "gold": problem["answer"],
                "response": completion.text, "answer": answer, "correct": is_right(answer, problem),
                "tokens": len(completion.tokens), "truncated": completion.finish_reason == "length",
            })  # fmt: skip
    return rows


def metrics(rows: list[dict], n: int = 1) -> dict:
    """Of n rows an item. The interval counts items, not samples: samples of one item are not independent.

    pass: {k: share of items that one of k samples solves}, for k = 1, 2, 4, … n, without bias (Chen et al. 2021, eq. 1);
    majority: share of items whose most frequent answer is right.
    """
    groups = [rows[i : i + n] for i in range(0, len(rows), n)]
    right = [sum(row["correct"] for row in group) for group in groups]

    def mean(values: Iterable[float]) -> float:
        values = list(values)
        return sum(values) / len(values) if values else 0.0

    accuracy = mean(row["correct"] for row in rows)
    low, high = wilson(accuracy * len(groups), len(groups))
    powers = sorted({*(1 << i for i in range(n.bit_length())), n})
    return {
        "items": len(groups), "accuracy": accuracy, "low": low, "high": high,
        "length": mean(row["tokens"] for row in rows),
        "length_correct": mean(row["tokens"] for row in rows if row["correct"]),
        "truncated": mean(row["truncated"] for row in rows),
        "no_answer": mean(row["answer"] is None for row in rows),
        "pass": {k: mean(pass_at_k(n, c, k) for c in right) for k in powers},
        "majority": mean(majority(group) for group in groups),
    }  # fmt: skip


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that k of n samples, `correct` of which are right, hold a right one: 1 - C(n - correct, k) / C(n, k)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority(group: list[dict]) -> bool:
    """Whether the answer that most samples give is right; among equally frequent ones the first. Equivalent answers are one;
    none is no answer."""
    found: list[list] = []  # [an answer, how often, right?]
    for row in group:
        if row["answer"] is not None:
            same = next((entry for entry in found if is_equivalent(row["answer"], entry[0])), None)
            if same is None:
                found.append(same := [row["answer"], 0, row["correct"]])
            same[1] += 1
    return max(found, key=lambda entry: entry[1])[2] if found else False


def run_benches(args) -> None:
    """Every benchmark in turn: its items, those that are not answered yet, spread over the ranks that torchrun started."""
    from tqdm import tqdm

    from data import benchmarks

    names = list(benchmarks.PAPER) if args.bench == "paper" else args.bench.split(",")
    if not os.path.isdir(args.ckpt):  # before anything is fetched
        raise FileNotFoundError(f"{args.ckpt}: no such folder")
    suites = {name: benchmarks.read(name, args.data, args.limit, args.seed) for name in names}
    for name in names:  # too many shots are an error before the model is loaded
        benchmarks.prompt(name, "", args.shots, args.template)
    import torch  # after the files were found: it takes a second

    import midtrain
    from sample import Sampler, load_model

    world = midtrain.setup()
    folder, out = files.find_checkpoint(args.ckpt), args.out or os.path.join(args.ckpt, "bench")
    sampler, table = Sampler(*load_model(args.ckpt, str(world.device))), []
    for name, problems in suites.items():
        for warning in benchmarks.seen_in_training(os.path.dirname(os.path.dirname(folder)), name, problems):
            files.print0(f"warning: {warning}")
        settings = {
            "checkpoint": os.path.realpath(folder), "weights": os.path.getmtime(os.path.join(folder, "config.json")),
            "items": len(problems), "limit": args.limit, "template": args.template, "shots": args.shots, "n": args.n,
            "temperature": args.temperature, "max_new_tokens": args.max_new_tokens, "seed": args.seed,
        }  # fmt: skip
        done = midtrain.on_rank0(lambda: open_results(out, name, settings, args.n))  # noqa: B023
        mine = [i for i in range(len(problems)) if i not in done][world.rank :: world.size]
        step, path = 4 * sampler.slots, os.path.join(out, f"{name}.{world.rank}.part")
        with open(path, "a", encoding="utf-8") as file:
            for start in tqdm(range(0, len(mine), step), desc=name, disable=None if world.rank == 0 else True):
                ids = mine[start : start + step]
                rows = evaluate(
                    sampler, [problems[i] for i in ids],
                    lambda question: benchmarks.prompt(name, question, args.shots, args.template),  # noqa: B023
                    args.max_new_tokens, args.n, args.temperature, args.seed, box_only=args.shots == 0, ids=ids)  # fmt: skip
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                file.flush()
        midtrain.all_sum(torch.zeros(1, device=world.device), world)  # everybody is done
        table.append((name, midtrain.on_rank0(lambda: finish_results(out, name, args.n))))  # noqa: B023
    files.print0(as_table(table, args.n))
    files.print0(f"responses: {os.path.join(out, '*.jsonl')}")


def open_results(out: str, name: str, settings: dict, n: int) -> set[int]:
    """The items that a run with the same settings has answered; ValueError if the folder holds another run's."""
    os.makedirs(out, exist_ok=True)
    path = os.path.join(out, f"{name}.json")
    if os.path.exists(path):
        with open(path) as file:
            before = json.load(file)
        if changed := [
            f"{key} {before.get(key)} → {settings[key]}" for key in settings if before.get(key) != settings[key]
        ]:
            raise ValueError(f"{path} is of a run with other settings ({'; '.join(changed)}): use another --out")
    with open(f"{path}.tmp", "w") as file:
        json.dump(settings, file, indent=1)
    os.replace(f"{path}.tmp", path)
    finish_results(out, name, n)  # what the ranks of a run that was killed have left
    with open(os.path.join(out, f"{name}.jsonl"), encoding="utf-8") as file:
        return {json.loads(line)["item"] for line in file}


def finish_results(out: str, name: str, n: int) -> dict:
    """Merge what the ranks wrote into NAME.jsonl, sorted by item; rows of an item that is not complete are dropped."""
    path = os.path.join(out, f"{name}.jsonl")
    parts = [os.path.join(out, part) for part in os.listdir(out) if re.fullmatch(rf"{name}\.\d+\.part", part)]
    items: dict[int, list[dict]] = {}
    for source in [path, *parts]:
        if os.path.exists(source):
            with open(source, encoding="utf-8") as file:
                for line in file:
                    with contextlib.suppress(ValueError):  # the last line of a process that was killed
                        row = json.loads(line)
                        items.setdefault(row["item"], []).append(row)
    rows = [row for item in sorted(items) if len(items[item]) >= n for row in items[item][:n]]
    files.write_jsonl(path, rows)
    for part in parts:
        os.remove(part)
    return metrics(rows, n)


def as_table(table: list[tuple[str, dict]], n: int) -> str:
    """Markdown, to be pasted into a paper."""
    several = [f"pass@{k}" for k in table[0][1]["pass"]][1:] + [f"maj@{n}"] if n > 1 else []
    head = [
        "benchmark",
        "items",
        "accuracy",
        "95% interval",
        *several,
        "length",
        "of right ones",
        "truncated",
        "no answer",
    ]
    rows = []
    for name, m in table:
        more = [f"{100 * x:.1f}" for x in (*list(m["pass"].values())[1:], m["majority"])] if n > 1 else []
        rows.append([
            name, f"{m['items']:,}", f"{100 * m['accuracy']:.1f}", f"{100 * m['low']:.1f}–{100 * m['high']:.1f}", *more,
            f"{m['length']:.0f}", f"{m['length_correct']:.0f}", f"{m['truncated']:.1%}", f"{m['no_answer']:.1%}",
        ])  # fmt: skip
    if len(rows) > 1:
        mean = sum(m["accuracy"] for _, m in table) / len(table)
        rows.append(["mean", "", f"{100 * mean:.1f}", *[""] * (len(head) - 3)])
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])


# ----------------------------------------------------------------------------------------------------------------------
# 9. The command line

RESPONSES = (("response", "gold"), ("solution", "answer"))  # the names of (text, gold) in a row of --grade


def read_rows(path: str, names: tuple[tuple[str, str], ...]):
    """Rows of JSON lines that have both names of one of the pairs, as text. A bad row is named by file and line."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file (a file of JSON lines is wanted)")
    wanted = " or ".join(" and ".join(f'"{name}"' for name in pair) for pair in names)
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                raise ValueError(f"{path}:{number}: not JSON; every line is an object with {wanted}") from None
            pair = next((pair for pair in names if isinstance(row, dict) and pair[0] in row and pair[1] in row), None)
            if pair is None or not isinstance(row[pair[0]], str) or type(row[pair[1]]) not in (str, int, float):
                raise ValueError(f"{path}:{number}: a row needs {wanted}, as text")
            yield {**row, pair[1]: str(row[pair[1]])}


def grade(args) -> None:
    from tqdm import tqdm

    rows, out = list(read_rows(args.grade, RESPONSES)), []
    if not rows:
        raise ValueError(f"{args.grade} has no rows")
    start = time.perf_counter()
    for row in tqdm(rows, desc="grading", delay=1, disable=None):
        text, gold = next(pair for pair in RESPONSES if pair[0] in row and pair[1] in row)
        answer = extract_answer(row[text])
        out.append({**row, "answer": answer, "correct": answer is not None and is_equivalent(answer, row[gold])})
        if gold == "answer":
            out[-1]["gold"] = row[gold]  # "answer" is now what was extracted
    seconds = time.perf_counter() - start
    if args.out:
        files.write_jsonl(args.out, out)
    right, none = sum(row["correct"] for row in out), sum(row["answer"] is None for row in out)
    low, high = wilson(right, len(out))
    print(f"{args.grade}: {right} of {len(out)} right, {right / len(out):.2%} (95% interval {low:.2%}–{high:.2%}), "
          f"{none / len(out):.2%} without an answer, {len(out) / seconds:,.0f} rows/s")  # fmt: skip


def shots(text: str) -> int | None:
    """ "4" → 4; "paper" → None"""
    if text != "paper" and not text.isdecimal():
        import argparse

        raise argparse.ArgumentTypeError(f"{text!r} is not a number, nor paper")
    return None if text == "paper" else int(text)


def main() -> None:
    from data import benchmarks, prompts

    parser = files.ArgumentParser(description=__doc__[: __doc__.index("\n\nReward")])
    parser.add_argument("--grade", metavar="FILE", help=(
        'grade a file of JSON lines: rows {"response", "gold"}, or the public data format {"problem", "answer", '
        '"solution"}, whose solution is graded against its answer (GSM8K: "#### 72", MATH: a box)'))  # fmt: skip
    parser.add_argument("--out", metavar="PATH", help=(
        '--grade: a file for the rows, with "answer" and "correct" added; --ckpt: a folder for all responses, where '
        "the same command goes on (default CKPT/bench)"))  # fmt: skip
    parser.add_argument("--ckpt", metavar="DIR", help="evaluate this checkpoint: one of ours or a Hugging Face Llama")
    parser.add_argument("--bench", metavar="NAME[,NAME]", default="synth", help=(
        f"{', '.join(benchmarks.BENCHMARKS)}; paper for its thirteen (default: synth, the generated world)"))  # fmt: skip
    parser.add_argument(
        "--data", metavar="DIR", help="folder of the public files; without it, from the Hugging Face hub"
    )
    parser.add_argument("--shots", type=shots, default=0, metavar="N", help=(
        "solved examples first; paper: as many as there; 0 (default): the last box counts, as in RL"))  # fmt: skip
    parser.add_argument("--template", choices=prompts.TEMPLATES, default="simple", help="(default: %(default)s)")
    parser.add_argument("--n", "--samples", type=int, default=1, metavar="K", help=(
        "answers to each problem, with --temperature: pass@k, maj@k (under torchrun: --samples)"))  # fmt: skip
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="longest response (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="only the first LIMIT problems (synth: how many, default 500)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling, and of synth's problems")
    args = parser.parse_args()
    if (args.grade is None) == (args.ckpt is None):
        parser.error("give --grade FILE or --ckpt DIR, one of the two")
    for name in ("n", "limit", "max_new_tokens"):
        if (number := getattr(args, name)) is not None and number < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, not {number}")
    if args.n > 1 and args.temperature <= 0:
        parser.error("--n greater than 1 needs --temperature above 0: greedy answers are all the same")
    if args.grade:
        return grade(args)
    from midtrain import clean_exit

    with clean_exit():
        run_benches(args)


if __name__ == "__main__":
    files.run_cli(main)
