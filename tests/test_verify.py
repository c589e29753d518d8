"""verify.py: what is equal, which answer a response gives, hostile input, benchmarks, the command line."""

import contextlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import on_ranks

import verify
from data import benchmarks, files, prompts, recipes
from data.files import read_jsonl
from verify import extract_answer, is_equivalent, reward, wilson

ROOT = Path(__file__).parent.parent
DATA = Path(os.environ.get("OCTO_DATA", "nowhere"))

# ------------------------------------------------------------------------------------------------------------
# Equivalence: (answer, gold), by convention

EQUAL = [
    ("1000.0", "1000"), (".4", "0.4"), ("1,234,567", "1234567"), (r"10{,}000", "10000"),
    (r"1\,000\,000", "10^6"), ("0.00003", r"3\times10^{-5}"), ("4.4e7", "44000000"), ("１２", "12"),
    ("−5", "-5"), ("3×4", "12"), (r"\frac12", "0.5"), (r"\dfrac{-3}{4}", r"-\frac34"),
    ("10/9", r"\frac{10}{9}"), ("½", r"\tfrac{1}{2}"), (r"3\frac12", "7/2"), ("3 1/2", "3.5"),
    (r"-1\frac{1}{4}", "-1.25"), (r"12 \frac{3}{5}", r"\frac{63}{5}"), (r"\sqrt{20}", r"2\sqrt5"),
    (r"\frac{1}{\sqrt3}", r"\frac{\sqrt{3}}{3}"), (r"2^{1/3}", r"\sqrt[3]{2}"),
    (r"\sqrt{2+\sqrt3}", r"\frac{\sqrt6+\sqrt2}{2}"), (r"\sqrt[3]{-8}", "-2"),
    ("4.123105625617661", r"\sqrt{17}"), (r"\ln\frac12", r"-\ln 2"), (r"\log_2 8", "3"),
    (r"\sin 30^\circ", r"\frac12"), (r"\cos\frac{\pi}{3}", "0.5"), (r"\arctan 1", r"\frac\pi4"),
    ("e^{i\\pi}", "-1"), (r"\frac{1+i\sqrt3}{2}", r"\frac12+\frac{\sqrt3}{2}i"),
    (r"\binom{2016}{8}", r"\frac{2016!}{8!\,2008!}"), (r"\lfloor 3.7\rfloor", "3"), ("|3+4i|", "5"),
    ("5!", "120"), ("2+3x", "3x+2"), ("(x+1)^2", "x^2+2x+1"), ("a(b+c)", "ab+ac"),
    (r"2\sin x\cos x", r"\sin 2x"), (r"\sqrt{1/n}", r"\frac{1}{\sqrt n}"), (r"\frac{n!}{(n-1)!}", "n"),
    ("\\tan x", r"\frac{\sin x}{\cos x}"), (r"\left(-\infty, 3\right)", r"(-\infty,3)"),
    (r"[1,2]\cup[2,3]", "[1,3]"), (r"x\in[-2,7]", r"-2\le x\le7"), ("x>2", r"(2,\infty)"),
    ("5 >= x", r"x\leq 5"), ("4>x>-1", "-1<x<4"), ("-x >= -1", "x <= 1"),
    (r"x<1\text{ or }x>3", r"(-\infty,1)\cup(3,\infty)"), (r"\varnothing", r"\emptyset"),
    ("5,3,2", "2, 3, 5"), (r"\{0,1,2\}", "0,1,2"), (r"\pm 3", "3,-3"), (r"1\pm\sqrt2", r"1-\sqrt2, 1+\sqrt2"),
    (r"12\text{ and }13", "12,13"), (r"p=-1,p=\frac{15}{8}", r"p=-1\text{ and }p=\dfrac{15}{8}"),
    ("(1,4.5)", r"(1,\frac92)"), ("1, 2", "(1,2)"), (r"x=2,\ y=3", "(2,3)"), ("x = 5", "5"),
    (r"\text{Area}=20", "20"), ("f(x)=2x+1", "y=2x+1"), ("y=3x+13", "3x-y+13=0"),
    ("(y+2)^2+(x-1)^2=3^2", "(x-1)^2+(y+2)^2=9"),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\left[\begin{array}{c}1\\[4pt]\frac42\end{array}\right]"),
    ("28%", r"28\%"), ("28", r"28\%"), ("0.28", r"28\%"), ("28 pct", r"28\%"), (r"20\%", "20"),
    (r"\$18", "18"), ("$18", "18"), (r"5\text{ cm}", "5"), ("30 minutes", "30"), ("3s", "3"), ("60°", "60"),
    (r"15\mbox{ cm}^2", r"15\text{ square centimeters}"), ("5 feet", r"5\text{ ft}"),
    ("11:21", "V_1:V_2=11:21"), ("12:00", "12:00"), ("52_{8}", "52_8"),
    ("Even", r"\text{even}"), (r"\text{(C)}", "C"), ("C) 12", "C"), (r"\text{B, A}", "A,B"),
    ("4:30 p.m.", r"\text{4:30 PM}"),
]

DIFFERENT = [
    ("0.333", "1/3"), ("3.14", r"\pi"), ("0.67", r"\frac23"), ("65537", "65536"), ("0.0009", "0.0001"),
    ("7", "-7"), ("2^{100}+1", "2^{100}"), ("0", "e^{-10^9}"), (r"\frac{1}{2006!}", r"\frac{1}{2004!}"),
    ("10^{-20}", "10^{-21}"), ("2005!", "2004!"), (r"10^{20}+\sqrt2", r"10^{20}+\sqrt3"),
    (r"10^{20}\pi", r"10^{20}\pi+1"), ("2^{1}0", "2^{10}"), ("0x10", "16"), ("2", r"2\sqrt3"),
    ("10", r"10\pi"), (r"\sqrt{35}", r"\sqrt3 5"), ("12", "1,2"), ("34+5", "3(4+5)"), ("x^2", "2x"),
    ("x^2y", "x^{2y}"), ("y+1", "x+1"), ("x-y", "y-x"), (r"\sin^2 x", r"\sin 2x"), ("|x|", "x"),
    (r"\sqrt{x}+1", r"\sqrt{x+1}"), (r"\frac{1}{1-x}", r"\frac{1}{x-1}"), ("X", "x"), (r"\sqrt{x^2}", "x"),
    ("[1,2]", "[1,3]"), ("(1,2]", "(1,2)"), (r"[2,\infty)", "x>2"), ("-1<x", "-1<x<4"),
    (r"(\infty,2)", r"(2,\infty)"), (r"(-\infty,1]\cup[2,\infty)", r"(-\infty,1)\cup(2,\infty)"),
    ("x<5", "x>5"), ("y>2", "x>2"), (r"\{0\}", r"\emptyset"), ("3,4", "3"), (r"3\text{ or }4", "3"),
    (r"\text{either }3\text{ or }5", "3"), (r"\pm5", "5"), ("5;6", "5"), (r"x\geq3", "3"), ("x=2", "x^2=4"),
    ("x=-5", "x=5"), ("y=5", "x=5"), ("0", "a+3z=0"), ("y=2x+100", "y=2x+3"), ("(3,-1)", "(-1,3)"),
    ("3,-1,0", "(3,-1)"), (r"\{1,2\}", "(1,2)"), ("(12,3)", "(1,23)"), ("21,36", "19,46,82"),
    (r"\begin{pmatrix}1&2\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"), (r"2.8\%", r"28\%"),
    ("0.12", "12"), (r"3\text{ minutes}", r"3\text{ hours}"), (r"3\%", r"3\text{ hours}"),
    (r"15\text{ cm}", r"15\text{ cm}^2"), ("5 cents", r"\$5"), ("2", "2s"), ("204_6", "204_5"),
    ("204", "204_5"), ("6:4", "3:2"), ("3:2", r"\frac32"), ("4:30 a.m.", "4:30 p.m."), ("B", "A"),
    ("False", "True"), (r"\text{None}", "0"), (r"\text{True}", "1"), ("i", "1"), ("", "5"), ("5", ""),
    ("abc(", "abd("),
]


# The same by kind: what other verifiers and earlier versions of this one got wrong
EQUAL_KINDS = {
    "units": [
        ("5", r"5\text{ students}"), (r"5\text{ m s}^{-1}", "5"), (r"5\ \mu\mathrm{m}", "5"),
        (r"5\,\mathrm{kg}\cdot\mathrm{m}^2", "5"), (r"5^\circ\text{C}", "5"), (r"5\text{-inch}", "5"),
        (r"5 \text{ (units)}", "5"), (r"5\$", "5"), ("₹5", "5"), ("5€", "€5"), ("USD 5", r"\$5"),
        (r"2\text{ hours and }30\text{ minutes}", r"2 \text{ hours } 30 \text{ minutes}"),
        (r"1.5 \text{ million}", "1500000"), (r"5 \text{ tenths}", "0.5"), (r"3\text{ out of }4", "3/4"),
        (r"45\text{ square units}", r"45\text{ units}^2"), (r"12\text{ sq. cm}", "12")],
    "text": [
        ("No", r"\text{no}"), ("p-q", "p - q"), (r"\text{Tom Smith}", "Tom Smith"),
        ("the fox", "The fox."), (r"\text{no solution}", r"\text{No solutions}"),
        (r"\text{no solution}", r"\emptyset"),
        (r"\frac{1}{7}\triangle ABC", r"\dfrac{1}{7}\triangle ABC")],
    "choices": [
        (r"\text{Option } B", "B"), ("Option B", "B"), ("b", "B"), ("(b)", "B"), ("B: 12", "B")],
    "functions": [
        ("f(x+1)", "f(1+x)"), ("f(1)<f(2)", "f(2)>f(1)"), ("n(n+1)", "n^2+n"), ("f(2)=5", "5"),
        (r"O(n\log n)", "O(n log n)"), (r"\max(a,b)", r"\max(b,a)"), ("f(x)+g(x)", "g(x)+f(x)"),
        ("f^{-1}(2)=5", "5")],
    "relations": [
        ("3^{20}>2^{30}", "2^{30}<3^{20}"), ("2+3=5", "5"), (r"x=\frac{10}{2}=5", "5"), ("6=x", "6"),
        (r"2\sqrt2 \approx 2.83", r"2\sqrt2"), (r"x=\frac13\approx 0.333", r"\frac13"), (r"\sim 5", "5")],
    "names": [
        ("x=2, y=3", "(x,y)=(2,3)"), ("y=3, x=2", "x=2, y=3"), ("(2,3)", "(x,y)=(2,3)"),
        ("m+n=371", "371"), ("a - b = 5", "5"), (r"\angle ABC=60^\circ", "60"), (r"\overline{AB}=5", "5"),
        ("[ABC]=5", "5"), (r"\text{Number of ways} = 5", "5"), (r"\lfloor x \rfloor = 5", "5"),
        ("x^* = 5", "5"), (r"\begin{cases} x=1 \\ y=2\end{cases}", "(1,2)"), ("A:B=1:2", "1:2")],
    "steps": [
        (r"\lceil n/2\rceil", r"\lfloor (n+1)/2\rfloor"),
        (r"\lfloor\log_2 n\rfloor", r"\lceil\log_2(n+1)\rceil-1"), ("|x-5|", "|5-x|"),
        (r"\sqrt{(x-200)^2}", "|x-200|"), (r"(-1)^n", r"\cos(n\pi)"),
        (r"\lfloor 2x\rfloor", r"\lfloor x\rfloor+\lfloor x+\frac12\rfloor")],
    "branches": [
        (r"\ln\frac{1+x}{1-x}", r"-\ln\frac{1-x}{1+x}"),
        (r"\frac12\ln\frac{1+x}{1-x}", r"\frac12(\ln(1+x)-\ln(1-x))"),
        (r"\sqrt{x}\sqrt{x+1}", r"\sqrt{x^2+x}"), (r"\sec^{-1}x", r"\cos^{-1}(1/x)")],
    "sets": [
        (r"\{x\mid x>2\}", r"(2,\infty)"), (r"\{x \in \mathbb{R} : x \ge 2\}", r"[2,\infty)"),
        ("|x|<2", "(-2,2)"), (r"x>-2\text{ and }x<3", "(-2,3)"), ("|x|>2", r"x<-2\text{ or }x>2"),
        (r"\langle1,2\rangle", "(1,2)"), (r"\mathbb R\setminus\{0\}", r"(-\infty,0)\cup(0,\infty)"),
        (r"\text{all real numbers}", r"\mathbb{R}"), (r"x \ne 1, x \neq 3", r"\mathbb{R}\setminus\{1,3\}"),
        (r"[k\pi,k\pi+1] (k\in\mathbb{Z})", r"[k\pi,1+k\pi]")],
    "notation": [
        ("2⁵", "32"), ("10⁻³", "0.001"), ("3⅛", r"\frac{25}{8}"), ("log₂8", "3"), (r"5\,", "5"),
        (r"5\;", "5"), ("n2^{n-1}", r"n\cdot 2^{n-1}"), ("(-1)^n 2^n", "(-2)^n"), ("2^6 3^5", "15552"),
        ("v^2_0", "v_0^2"), (r"11,\! 111,\! 111,\! 100", "11111111100"),
        (r"\operatorname{arctan} 1", r"\arctan 1"), (r"{3\over4}", "3/4"), (r"\mathrm{ln} 2", r"\ln 2"),
        (r"{5\choose2}", "10"), (r"\textcolor{red}{5}", "5"), (r"\Large 5", "5"),
        (r"0.1\overline{6}", "1/6"), (r"52\text{ (base 8)}", "52_8"), ("0^2", "0"),
        (r"x_1^2", r"x^{2}_{1}"), (r"3\hat{i}+4\hat{j}", r"3\mathbf{i}+4\mathbf{j}"), ("α+1", r"1+\alpha"),
        (r"30^\circ 15'", r"30.25^\circ"),
        (r"\frac12\begin{pmatrix}2\\4\end{pmatrix}", r"\begin{pmatrix}1\\2\end{pmatrix}"),
        (r"2\operatorname{cis}(150^\circ)", r"i-\sqrt3")],
}
DIFFERENT_KINDS = {
    "words behind a value": [
        (r"5\text{ plus }7", "5"), (r"17\text{ remainder }2", "17"), ("1 hour 30 minutes", "1"),
        ("3 to 4", "3"), (r"1.5\text{ million}", r"1.5\text{ billion}"), (r"5\text{ squared}", "5"),
        ("5 factorial", "5"), (r"5\text{ tenths}", "5"), (r"5\text{ doubled}", "5"),
        (r"5\text{ more than }x", "5"), ("5 or more", "5"), (r"x^2\text{ plus a constant}", "x^2"),
        ("25% loss", "25% profit"), (r"45\text{ units}^2", r"45\text{ units}^3"),
        (r"21\text{ dogs}", r"21\text{ cats}"), (r"9\text{ multiples}", r"9\text{ min}"), ("€5", r"\$5"),
        (r"5\text{ cm}\times6\text{ cm}", "5"), (r"5\text{ feet }8\text{ inches}", "5"), ("2 mm", "2 m"),
        (r"5^\circ\text{C}", r"5^\circ\text{F}"), (r"3\text{ out of }4", r"3\text{ out of }5")],
    "words": [
        ("not sure", "not enough information"), ("Tom Smith", "Tom Jones"), ("True, False", "False, True"),
        ("a regular hexagon", "a"), ("lap swim", "lap"), ("lap swim", "lapswim"),
        ("no idea", "no real solution"),
        ("Every complete space is compact", "Every compact space is complete"), ("on", "no"),
        ("a car", "a")],
    "letters": [
        ("p q", "p - q"), ("p, q", "p - q"), ("X-Y", "x-y"), ("XYZ", "xyz"), ("r.s", "r-s"), ("ab", "AB"),
        ("a-b-c", "a,b,c"), ("f'", "f"), ("Q", "P"), (r"\sinh 2x", r"2\sinh x")],
    "functions": [
        ("0", "I(0)"), ("f(0)=2", "f(0)=1"), ("f(4)<f(1)<f(2)", "f(2)<f(1)<f(4)"), ("3P", "P(3)"),
        ("5", "y(0)+5"), ("f^2x", "f(f(x))"), (r"I(0)e^{t}", r"I(0)e^{-t}"), ("f(2x)", "2f(x)"),
        ("g(f(x))", "f(g(x))"), ("u(t,x)", "u(x,t)")],
    "relations": [
        ("1<2", "3^{20}>2^{30}"), (r"5.0\approx7", "7"), (r"5.0\approx7", "5"), ("0=5", "5"), ("5=6", "6"),
        ("x=5=6", "5"), (r"\$\frac23\approx\$1.67", r"\$\frac23\approx\$0.67"),
        (r"2\sqrt2\approx2.83", "2.83"), ("2x=5", "5")],
    "names": [
        ("11a+c", "7=11a+c"), ("(y,x)=(2,3)", "(x,y)=(2,3)"), ("AB=5", "AB=5, CD=5"), ("5", "AB=5, CD=5"),
        ("y=2, x=3", "(2,3)"), ("A:B=2:1", "A:B=1:2"), ("A", "A:B=1:2"), ("AB=5", "CD=5"),
        ("g(x)=x", "f(x)=x"), (r"\text{Perimeter}=20", r"\text{Area}=20"), ("a=2, x=3", "a=2, a=3")],
    "steps": [
        (r"\lfloor\sqrt{n-1}\rfloor", r"\lfloor\sqrt{n+1}\rfloor"),
        (r"\lceil\log_2 n\rceil", r"\lfloor\log_2 n\rfloor+1"), ("100-x", "|x-100|"),
        ("30-x", r"\sqrt{(x-30)^2}"), (r"\lfloor x\rfloor", "x"), ("x+50", "|x+50|"),
        (r"\lceil x\rceil", r"\lfloor x\rfloor+1"),
        (r"\lfloor\frac n3\rfloor", r"\lfloor\frac{n-1}3\rfloor"),
        (r"\lfloor x+\frac12\rfloor", r"\lceil x-\frac12\rceil"), ("300", r"\max(x,300)"),
        ("(-1)^{n+1}", "(-1)^n")],
    "sets": [
        ("|x|<3", "(-2,2)"), ("x>-2, y<3", "(-2,3)"), (r"x \ne 2", r"x \ne 1"),
        (r"x<3\text{ or }x<1", "x<1")],
    "notation": [
        ("2⁵", "25"), ("10⁶", "106"), ("1010₂", "10102"), ("12:30", "2/5"), ("0^2", "1"), ("x2", "2x"),
        ("v1^2", "v"), (r"\begin{vmatrix}1&2\end{vmatrix}", r"\begin{pmatrix}1&2\end{pmatrix}"),
        ("5...", "5"), (r"5 \quad 6", "30"), (r"\sqrt[3){2}", r"\sqrt[3]{2}"), (r"3\vec{i}", "3i"),
        (r"3\begin{pmatrix}2\\4\end{pmatrix}", r"\begin{pmatrix}2\\4\end{pmatrix}"),
        (r"0.\overline{3}", "0.3")],
}


@pytest.mark.parametrize("kind", EQUAL_KINDS)
def test_equal_by_kind(kind):
    assert [pair for pair in EQUAL_KINDS[kind] if not is_equivalent(*pair)] == []


@pytest.mark.parametrize("kind", DIFFERENT_KINDS)
def test_different_by_kind(kind):
    assert [pair for pair in DIFFERENT_KINDS[kind] if is_equivalent(*pair)] == []


@pytest.mark.parametrize("answer, gold", EQUAL)
def test_equal_by_convention(answer, gold):
    assert is_equivalent(answer, gold)


@pytest.mark.parametrize("answer, gold", DIFFERENT)
def test_different_by_convention(answer, gold):
    assert not is_equivalent(answer, gold)


def test_verdicts_do_not_depend_on_the_order_but_for_what_only_an_answer_may_say():
    assert is_equivalent("3s", "3") and not is_equivalent("3", "3s")  # s may be a variable in a gold
    assert is_equivalent("m+n=5", "5") and not is_equivalent("5", "m+n=5")  # a gold may be an equation
    assert is_equivalent("b", "B") and not is_equivalent("B", "b")  # B may be a choice, b is a variable
    one_way = {"3s", "2", "m+n=371", "a - b = 5", r"\lfloor x \rfloor = 5", "b", "(b)"}
    for answer, gold in EQUAL + DIFFERENT + sum([*EQUAL_KINDS.values(), *DIFFERENT_KINDS.values()], []):
        if answer not in one_way:
            assert is_equivalent(answer, gold) == is_equivalent(gold, answer), (answer, gold)


# ------------------------------------------------------------------------------------------------------------
# Extraction and reward


@pytest.mark.parametrize("response, answer", [
    (r"so \boxed{42}", "42"), (r"\boxed{\frac{1}{\sqrt{2}}} is it", r"\frac{1}{\sqrt{2}}"),
    (r"first \boxed{1}, then, after a check, \boxed{2}", "2"),
    (r"\[\boxed{-2} \quad \text{and} \quad \boxed{1}.\]", "-2, 1"),
    (r"\boxed{(1, 2)}, \boxed{(2, 1)}", "(1, 2), (2, 1)"), (r"\fbox{5}", "5"), (r"\boxed 5.", "5"),
    (r"\boxed{\{1, 2\}}", r"\{1, 2\}"), (r"\boxed{a} and the cut \boxed{b", "a"),
    (r"<think>\boxed{5}</think> it is \boxed{8}", "8"), (r"<think>\boxed{5}</think> done", "5"),
    ("\\boxed{5}\n\nQuestion: What else? \\boxed{6}", "5"), ("6 + 6 = 12\n#### 12", "12"),
    ("The final answer is $\\frac{3}{4}$. I hope it is correct.", r"\frac{3}{4}"),
    ("The answer is 1/5.", "1/5"), ("Option (A) is wrong. The answer is (C).", "C"),
    ("### Final Answer\n5", "5"), ("She makes $3 x 4 = $12 in 5 days.", "$12"),
    ("Therefore $x \\geq 5$ is the solution.", r"x \geq 5"),
    ("nothing to see", None), (r"\boxed{}", None), (r"\boxed{?}", None), (r"\boxed{...}", None), ("", None),
])
def test_the_answer_a_response_gives(response, answer):
    assert extract_answer(response) == answer


def test_a_box_behind_a_row_break_is_one_and_an_escaped_one_is_not():
    assert extract_answer(r"1 \\\boxed{5}", box_only=True) == "5"
    assert extract_answer(r"1 \\boxed{5}", box_only=True) is None


def test_reward_wants_a_box():
    assert reward(r"Thus \boxed{\frac{1}{2}}.", "0.5") == 1.0
    assert reward(r"Thus \boxed{0.6}.", "0.5") == -1.0
    assert reward("The answer is 0.5", "0.5") == -1.0
    assert reward(r"\boxed{0.5", "0.5") == -1.0
    assert reward("", "0.5") == -1.0


# ------------------------------------------------------------------------------------------------------------
# Properties

PIECES = st.sampled_from((
    r"\frac \sqrt { } ( ) [ ] ^ _ 9 12 x y \pi ! + - * / \left \right | \{ \} \text{ \boxed{ = < \le , \cup "
    r"e i \sin \log \binom \begin{pmatrix} \end{pmatrix} & \\ \infty % ° ½ √ \pm \lfloor \rfloor 1e99 $ . : "
    r"' eval( \mbox{cm}").split(" "))
LATEX = st.lists(PIECES, max_size=25).map("".join)
RATIONAL = st.fractions(min_value=-1000, max_value=1000, max_denominator=500)


@given(st.text() | LATEX, st.text() | LATEX)
@settings(max_examples=300, deadline=None)
def test_any_two_texts_get_a_verdict(a, b):
    assert is_equivalent(a, b) in (True, False)
    assert is_equivalent(a, b) == is_equivalent(a, b)
    assert reward(a, b) in (1.0, -1.0)
    assert extract_answer(a) is None or extract_answer(a)


@given(LATEX)
@settings(max_examples=300, deadline=None)
def test_everything_equals_itself(text):
    if verify.clean(text):
        assert is_equivalent(text, text)


@given(RATIONAL, RATIONAL)
@settings(max_examples=200, deadline=None)
def test_rationals_in_any_form(p, q):
    plain = [f"{x.numerator}/{x.denominator}" for x in (p, q)]
    forms = plain, [rf"\dfrac{{{x.numerator}}}{{{x.denominator}}}" for x in (p, q)]
    assert is_equivalent(forms[0][0], forms[1][1]) == (p == q) == is_equivalent(forms[1][1], forms[0][0])
    total = rf"\frac{{{(p + q).numerator}}}{{{(p + q).denominator}}}"
    assert is_equivalent(f"{forms[0][0]} + ({forms[1][1]})", total)


COEFFICIENTS = st.lists(st.integers(-9, 9), min_size=2, max_size=5)


@given(COEFFICIENTS, COEFFICIENTS)
@settings(max_examples=200, deadline=None)
def test_polynomials_are_their_coefficients(a, b):
    def text(coefficients):
        return " + ".join(rf"{c} \cdot x^{{{k}}}" for k, c in enumerate(coefficients))

    trimmed = [([0] * 5 + c[::-1])[-5:] for c in (a, b)]
    assert is_equivalent(text(a), text(b)) == (trimmed[0] == trimmed[1])
    factored = f"({text(a)})({text(b)})"
    product = [0] * (len(a) + len(b) - 1)
    for (i, x), (j, y) in itertools.product(enumerate(a), enumerate(b)):
        product[i + j] += x * y
    assert is_equivalent(factored, text(product))


# ------------------------------------------------------------------------------------------------------------
# Bounds


@pytest.mark.parametrize("text, answer", [
    ("She needs 4 cans because 8 / 2 = 4", "4"), ("38 - 32 = 32 + x - 32, or, 6 = x", "6"),
    ("There are 33 ounces of cereal in those 3 boxes.", "3"),
    ("we get $\\frac{a}{b} = 2$. So it increases by 100%.", "100%"), ("The answer is 2x+1.", "2x+1"),
    ("The answer is (1, 2).", "(1, 2)"), ("The answer is x > 2.", "x > 2"),
    ("The answer is \\sqrt{2}.", "\\sqrt{2}"), ("The answer is 10\\pi.", "10\\pi"),
    ("The answer is 3:4.", "3:4"), ("The answer is 12 or more.", "12 or more"),
    ("The answer is 5.5 dollars per 2 kg.", "5.5"), ("The answer is not 5.", "not 5"),
    ("The answer is 72, in total.", "72"), ("The answer is 8 a day", "8"),
    ("The answer is 1.5 million.", "1.5 million"), ("The answer is ln 2.", "ln 2"),
    ("It is $ \\frac{1}{2} $.", "\\frac{1}{2}"), ("It costs $ 5 and $ 6", "6"),
    ("The matrix is $ \\binom{1}{2} $.", "\\binom{1}{2}"), ("####: 55", "55"),
    ("The correct answer is d.", "d"), ("I would pick B — a safe choice.", "B"),
    ("Therefore, B is correct.", "B"), ("The answer must be (C).", "C"),
    ("ANSWER: None of the above", "None of the above"), ("The answer is A + B", "A + B"),
])
def test_the_answer_in_prose(text, answer):
    assert extract_answer(text) == answer


HOSTILE = [
    "9^9^9^9^9", "10^{10^{10}}", "2^{100000}-2^{99999}", "9999999!", "(((9!)!)!)!", r"\binom{999999}{499999}",
    "(" * 50_000 + ")" * 50_000, "{" * 100_000, r"\boxed{" * 20_000, r"\[" * 50_000, "-" * 50_000 + "1",
    "9" * 100_000, " " * 100_000, "\n" * 100_000, "$1" * 50_000, r"\frac" * 300, r"\sqrt" * 300,
    "x^" * 300 + "x", r"\sin" * 300 + "x", "(x+1)^{30000}", "+".join([r"\sin(x^{1/3})"] * 120),
    "+".join(rf"\frac{{1}}{{{k}}}" for k in range(1, 150)),
    "+".join(rf"(x+\frac{{1}}{{{k}}})^{{{k}}}" for k in range(2, 90)),
    ",".join(rf"\sqrt{{{k}}}" for k in range(150)), "e^{e^{e^{e^{10}}}}", "e^{-10^9}", r"5\infty",
    r"\sin(10^{30})", "i^i", r"\tan\frac{\pi}{2}", r"\log_1 5", "0^{-1}", r"\arcsin 2", "1e999",
    "__import__('os').system('false')", "eval(\"type('X',(),{'equals':id})()\")", "().__class__",
    "\x00\ud800", "the answer is " * 9000, r"3\frac{" * 30 + "3" + "}{2}" * 30,
]


def test_hostile_input_is_answered_in_time():
    for text in HOSTILE:
        for gold in ("5", text, text + "+1", r"\sqrt{2}", "x+1", r"\{1,2\}", r"\boxed{" + text + "}"):
            start = time.process_time()
            verdict = is_equivalent(text, gold)
            reward(r"\boxed{" + text + "}", gold)
            extract_answer(text)
            seconds = time.process_time() - start
            assert verdict is True if gold == text and text.strip() else verdict in (True, False)
            # 0.1 s on a quiet machine
            assert seconds < 1.0, f"{seconds:.2f} s for {text[:40]!r} against {gold[:40]!r}"


NESTED = "(" * 27 + "e^{{{}}}" + ")^{{12}}" * 27


@pytest.mark.parametrize("text, gold, equal", [
    (r"(10^{4000})^{10^{4000}}", "5", False), (r"\pi^{10^{4000}}", "5", False),
    (r"i^{10^{4000}}", "1", False), (r"(-1)^{10^{4000}}", "1", True), (r"e^{10^{4000}}", "5", False),
    (r"\sin(10^{4000})", "5", False), (r"\sinh(10^{4000})", "5", False),
    (r"\ln(10^{4000})", r"4000\ln 10", True), (r"\lfloor e^{69}\rfloor", "5", False),
    (r"\lceil e^{-2000000}\rceil", "0", True), (r"(\pi^{30})!", "5", False),
    (r"\binom{e^{20}}{3}", "5", False), (NESTED.format("2000000"), "5", False),
    (NESTED.format("-2000000") + "+i", "i", True), (r"e^{2000000}+0", r"e^{2000000}", True),
    ("0." + "3" * 990, "1/3", True), ("9" * 999 + "0", "9" * 999 + "1", False),
    (r"x=\frac{2^{39000}}{3^{24000}}", r"x=\frac{5^{17000}}{7^{14000}}", False),
    (r"f(x)=2^{39000}x", r"y=2^{39000}x", True), (r"\arctan i", r"\arctan i+1", False),
    (r"\tan\frac{\pi}{2}+0", r"\tan\frac{\pi}{2}+1", False),
])
def test_numbers_are_bounded_before_they_are_computed(text, gold, equal):
    start = time.process_time()
    assert is_equivalent(text, gold) == equal
    assert time.process_time() - start < 1.0  # 0.01 s on a quiet machine


@pytest.mark.parametrize("zero", [
    r"\sin\pi", r"\sin(100\pi)", r"\cos\frac{\pi}{2}", r"e^{i\pi}+1", r"\sqrt2^2-2",
    r"(1+i)^{10}-32i", r"(\frac{1+i\sqrt3}{2})^{60}-1", r"\sqrt[3]{-8}+2", r"\log_2 8-3", r"i^i-e^{-\pi/2}",
    r"\ln(-1)-i\pi", r"\sqrt{-4}-2i", r"\sqrt{3+4i}-2-i", r"10^{30}\pi+i-10^{30}\pi-i",
    r"\arcsin 2+\arccos 2-\frac{\pi}{2}",
])
def test_what_cancels_is_zero(zero):
    assert is_equivalent(zero, "0") and not is_equivalent(zero, "10^{-30}")
    quotient = rf"\frac{{1}}{{{zero}}}"
    assert not is_equivalent(quotient + "+1-1", quotient), "it has no value"


def test_code_is_text():
    marker = ROOT / "never-written"
    code = f"__import__('pathlib').Path({str(marker)!r}).touch()"
    assert not is_equivalent(code, "5") and reward(rf"\boxed{{{code}}}", "5") == -1
    assert not marker.exists()


def test_verdicts_are_the_same_in_threads():
    verdicts = []

    def work():
        verdicts.append([is_equivalent(a, b) for a, b in EQUAL[:40] + DIFFERENT[:40]])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == [[True] * 40 + [False] * 40] * 4


def test_precision_is_ours_alone():
    import mpmath

    before = mpmath.mp.prec
    with mpmath.workdps(5):
        assert is_equivalent(r"\sqrt2+10^{-30}", r"10^{-30}+\sqrt2")
        assert not is_equivalent(r"\sqrt2+10^{-30}", r"\sqrt2")
    assert mpmath.mp.prec == before


def test_import_is_light():
    code = "import sys, verify; assert not {'torch', 'sympy', 'numpy', 'sample', 'model'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


# ------------------------------------------------------------------------------------------------------------
# Evaluation


def test_wilson_interval():
    low, high = wilson(50, 100)
    assert (round(low, 4), round(high, 4)) == (0.4038, 0.5962)  # the textbook example
    assert wilson(0, 10)[0] == 0.0 and wilson(10, 10)[1] == 1.0 and wilson(0, 0) == (0.0, 1.0)


class StubSampler:
    """Answers the prompt "...#k..." with k boxed, but never finishes 3; remembers how it was called."""

    slots = 2

    def __init__(self):
        self.tokenizer = SimpleNamespace(encode=lambda text: list(text.encode()), stop_ids=(0,))

    def generate(self, prompts, n, **options):
        self.called = {"prompts": prompts, **options}
        out = []
        for prompt in prompts:
            number = re.search(r"#(\d)", bytes(prompt).decode())[1]
            text = "hm " * 10 if number == "3" else rf"It is \boxed{{{number}}}."
            reason = "length" if number == "3" else "stop"
            out.append([SimpleNamespace(text=text, tokens=[7] * len(text), finish_reason=reason)] * n)
        return out


def test_samples_are_graded_in_order():
    sampler = StubSampler()
    problems = [{"problem": f"#{k}", "answer": str(k)} for k in (4, 1, 2)]
    prompts = [list(f"<{row['problem']}>".encode()) for row in problems]
    groups = verify.sample_and_grade(
        sampler, problems, prompts, lambda text, row: (extract_answer(text), row["answer"]), n=2, seed=3,
        request_ids=[7, 8, 9])
    assert [[verdict for _, verdict in group] for group in groups] == [[(k, k)] * 2 for k in "412"]
    assert groups[1][0][0].text == r"It is \boxed{1}." and sampler.called["request_ids"] == [7, 8, 9]
    assert sampler.called["prompts"] == prompts and sampler.called["temperature"] == 0.0
    assert sampler.called["stop"] == (0, "User:", "Assistant:", "Question:", "Answer:")
    verify.sample_and_grade(sampler, problems, prompts, lambda text, row: None, stop=())
    assert sampler.called["stop"] == ()


def test_benchmarks_count_samples_items_and_lengths():
    sampler = StubSampler()
    problems = [{"problem": f"#{k}", "answer": str(k) if k < 4 else "0"} for k in (1, 2, 3, 4)]
    args = SimpleNamespace(shots=0, template="simple", n=2, max_new_tokens=50, temperature=1.0, seed=5,
                           tool=False)
    rows = verify.bench_rows(sampler, "gsm8k", problems, args, SimpleNamespace(rank=0, size=1))
    assert [row["correct"] for row in rows] == [True] * 4 + [False] * 4
    assert [row["item"] for row in rows] == [0, 0, 1, 1, 2, 2, 3, 3]
    result = verify.summarise(rows, 2)
    assert (result["items"], result["accuracy"]) == (4, 0.5)
    assert (result["truncated"], result["no_answer"]) == (0.25, 0.25)
    assert result["length_correct"] == len(r"It is \boxed{1}.") < result["length"]
    assert (result["low"], result["high"]) == wilson(2, 4)
    assert result["pass"] == {1: 0.5, 2: 0.5} and result["majority"] == 0.5
    assert bytes(sampler.called["prompts"][0]) == b"Question:\n#1\nAnswer:\n"
    assert sampler.called["seed"] == 5 and sampler.called["request_ids"] == range(4)
    assert sampler.called["stop"] == (0, "User:", "Assistant:", "Question:", "Answer:")


@given(st.integers(1, 7), st.data())
def test_pass_at_k_is_the_mean_over_all_choices(n, data):
    right = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    k = data.draw(st.integers(1, n))
    choices = list(itertools.combinations(right, k))
    assert verify.pass_at_k(n, sum(right), k) == pytest.approx(sum(map(any, choices)) / len(choices))


@pytest.mark.parametrize("answers, correct", [
    ("1/2 0.5 3", True), ("3 1/2 3", False), ("3 1/2", False), ("1/2 3", True), ("- - 0.5 -", True),
    ("- -", False)])
def test_majority_counts_equivalent_answers_together(answers, correct):
    rows = [{"answer": None if a == "-" else a, "correct": a in ("1/2", "0.5")} for a in answers.split()]
    assert verify.majority(rows) == correct


@pytest.mark.parametrize("answer, correct", [
    ("B", True), ("(B)", True), (r"\text{B}", True), ("4", True), ("4.0", True), ("C", False), ("2", False),
    ("(A)", False), ("5", False), (None, False), ("0", False)])
def test_options_are_correct_by_letter_and_by_text(answer, correct):
    asked = "What of the following is the right choice? Explain your answer."
    question = f"How many?\n{asked}\n(A) 0, (B) 4, (C) 2, (D) 0.0"
    assert verify.is_correct(answer, {"problem": question, "answer": "B"}) == correct
    row = {"problem": "How many?", "answer": "B", "choices": ["0", "4", "2", "0.0"]}
    assert verify.is_correct(answer, row) == correct
    assert not verify.is_correct("0", {"problem": question, "answer": "A"}), "two options say 0"


def test_benchmarks_have_prompts_in_their_style():
    assert len(benchmarks.THIRTEEN) == 13 and set(benchmarks.THIRTEEN) <= set(benchmarks.BENCHMARKS)
    for name, bench in benchmarks.BENCHMARKS.items():
        text = benchmarks.prompt(name, "What is 1+1?", None, "simple")
        assert text.count("Question:\n") == text.count("boxed{") + 1 == bench.count + 1
        assert text.endswith("Question:\nWhat is 1+1?\nAnswer:\n")
    assert benchmarks.prompt("math", "1+1?", 0, "complex") == prompts.complex("1+1?")
    with pytest.raises(ValueError, match="4 solved examples in the style of math, not 5"):
        benchmarks.prompt("math", "1+1?", 5, "simple")
    for examples in prompts.SHOTS.values():
        for problem, solution in examples:
            assert extract_answer(solution, box_only=True)
            assert not any(word in problem + solution for word in prompts.STOP)


def test_hub_rows_become_problems_and_answers():
    rows = {
        "gsm8k": {"question": "Q", "answer": "So 2 + 2 = 4.\n#### 4"},
        "math": {"problem": "Q", "solution": r"It is \boxed{1}, no, $\boxed{\frac{1}{2}}$.", "level": "1"},
        "math500": {"problem": "Q", "answer": "4"},
        "olympiadbench": {"question": "Q", "final_answer": ["1", "2"]},
        "amc23": {"question": "Q", "answer": 27.0},
        "svamp": {"Body": "B.", "Question": "Q", "Answer": "145.0"},
        "asdiv": {"body": "B.", "question": "Q", "answer": "9 (apples)"},
        "mmlu_stem": {"question": "Q", "choices": ["0", "4"], "answer": 1},
        "math8k": {"prompt": [{"content": "Solve Q."}], "extra_info": {"question": "Q", "answer": "7"}},
    }
    hubs = {name: benchmarks.BENCHMARKS[name].hub for name in rows}
    got = {name: hub.row(recipes.renamed(rows[name], hub.spec.columns)) for name, hub in hubs.items()}
    answers = ["4", r"\frac{1}{2}", "4", "1, 2", "27.0", "145.0", "9", "B", "7"]
    assert [answer for _, answer in got.values()] == answers
    assert all("Q" in problem for problem, _ in got.values()) and got["mmlu_stem"][0].endswith("(A) 0, (B) 4")
    assert {name for name, bench in benchmarks.BENCHMARKS.items() if bench.hub} == set(rows)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """An untrained model of 300 words; greedy and sampled answers are long and wrong, but there are some."""
    from data import tokenizer
    from model import Llama, LlamaConfig

    folder = tmp_path_factory.mktemp("stage") / "checkpoints/step_000001"
    tok = tokenizer.train(["What is 1+1? It is \\boxed{2}. Question: Answer: " * 20], 300)
    model = Llama(LlamaConfig(tok.vocab_size, 2, 32, 4, 2, 8, 64)).init_weights(0)
    model.save_pretrained(str(folder))
    tok.save(folder)
    return folder


def program(*args):
    sys.argv = ["verify.py", *map(str, args)]
    files.run_cli(verify.main)


def bench(checkpoint, folder, *flags, ranks=1):
    args = ["--ckpt", checkpoint, "--data", folder, "--out", folder / "out", "--bench", "gsm8k,mmlu_stem"]
    args += ["--max-new-tokens", "9", "--samples", "2", "--temperature", "1", *flags]
    if ranks > 1:
        return on_ranks(ranks, folder, program, *args)[0]
    done = run(*args)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_finished_benchmarks_are_skipped_and_others_repeated_on_any_number_of_ranks(checkpoint, tmp_path):
    for part in ("one", "cut"):
        for name in ("gsm8k/test", "eval/mmlu_stem"):
            path = tmp_path / part / f"{name}.jsonl"
            path.parent.mkdir(parents=True)
            rows = ({"problem": f"{i}+1? (A) 1, (B) 2", "answer": "AB"[i % 2]} for i in range(20))
            write_lines(path, *rows)
    said = bench(checkpoint, tmp_path / "one", "--shots", "2")
    assert "| gsm8k     | 20    |" in said and "pass@2" in said and "| mean" in said and "skipped" not in said
    rows = [json.loads(line) for line in (tmp_path / "one/out/gsm8k.jsonl").read_text().splitlines()]
    assert [row["item"] for row in rows] == [i for i in range(20) for _ in "ab"]
    assert {row["gold"] for row in rows} == {"A", "B"} and all(1 <= row["tokens"] <= 9 for row in rows)
    assert sorted(os.listdir(tmp_path / "one/out")) == [
        "gsm8k.json", "gsm8k.jsonl", "mmlu_stem.json", "mmlu_stem.jsonl"]

    bench(checkpoint, tmp_path / "cut", "--shots", "2")
    out, kept = tmp_path / "cut/out", (tmp_path / "cut/out/gsm8k.jsonl").stat().st_mtime_ns
    whole = (out / "mmlu_stem.jsonl").read_text().splitlines()
    write_lines(out / "mmlu_stem.jsonl", *whole[:8])
    (out / "mmlu_stem.json").unlink()  # as if killed before the settings were written: rows count for nothing
    again = bench(checkpoint, tmp_path / "cut", "--shots", "2", ranks=2)
    assert again.splitlines()[0] == said.splitlines()[0] == f"{checkpoint}: float32 on cpu"
    assert again.splitlines()[1] == f"{out / 'gsm8k.jsonl'} is finished: skipped"
    assert again.splitlines()[2:-1] == said.splitlines()[1:-1]
    assert (out / "gsm8k.jsonl").stat().st_mtime_ns == kept
    for name in ("gsm8k", "mmlu_stem"):
        assert (out / f"{name}.jsonl").read_text() == (tmp_path / f"one/out/{name}.jsonl").read_text()
    one = tmp_path / "one"
    done = run("--ckpt", checkpoint, "--data", one, "--out", one / "out", "--bench", "gsm8k")
    assert done.returncode == 2
    assert "other settings (shots 2 → 0; n 2 → 1; temperature 1.0 → 0.0" in done.stderr
    where = ("--ckpt", checkpoint, "--data", one, "--out", one / "out", "--bench", "gsm8k")
    done = run(*where, "--dtype", "bf16")
    assert "other settings (dtype float32 → bfloat16; shots 2 → 0" in done.stderr


def test_options_of_a_choice():
    """Letters in brackets, or as SAT's are written; what only looks like a letter's option is text."""
    ask = "Which?\nWhat of the following is the right choice? Explain your answer.\n"
    forms = "(A) 1,190, (B) f(A) = 2, (C) -3", "(A) 1,190 (B) f(A) = 2 (C) -3", "(A. 1,190 B. f(A) = 2 C. -3"
    for listed in forms:
        found = benchmarks.options({"problem": ask + listed, "answer": "B"})
        assert found.keys() == {"A", "B", "C"} and (found["A"], found["C"]) == ("1,190", "-3"), listed
    assert benchmarks.options({"problem": ask + forms[0], "answer": "7"}) == {}
    assert benchmarks.options({"problem": ask + forms[0], "answer": "E"}) == {}


def test_one_door_for_problems(tmp_path, monkeypatch):
    """A benchmark's name, a file, a data set in the hub's format (here a local folder)."""
    write_lines(tmp_path / "own.jsonl", *({"problem": f"{i}?", "answer": i, "id": i} for i in range(4)))
    assert benchmarks.load_problems(str(tmp_path / "own.jsonl"), limit=2) == [
        {"problem": "0?", "answer": "0", "id": 0}, {"problem": "1?", "answer": "1", "id": 1}]
    (tmp_path / "eval").mkdir()
    write_lines(tmp_path / "eval/math500.jsonl", {"problem": "1 + 1?", "answer": "2"})
    assert benchmarks.load_problems("math500", tmp_path) == [{"problem": "1 + 1?", "answer": "2"}]
    assert len(benchmarks.load_problems("synth")) == 500
    assert benchmarks.load_problems("synth", limit=3, seed=1) != benchmarks.load_problems("synth", limit=3)
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "math500", {"problem": "a file of that name", "answer": "2"})
    assert benchmarks.load_problems("math500", tmp_path)[0]["problem"] == "a file of that name"
    write_lines(tmp_path / "none.jsonl")
    write_lines(tmp_path / "key.jsonl", {"problem": "?", "answer": 1}, {"problem": "?"})
    for source, says in (
            ("math501", "math501: no such file"), ("gsm8k", "gsm8k/test.jsonl: no such file"),
            ("none.jsonl", "none.jsonl holds no problem"),
            ("key.jsonl", "key.jsonl: row 2 is no problem with an answer: no column answer")):
        with pytest.raises((FileNotFoundError, ValueError), match=re.escape(says)):
            benchmarks.load_problems(source, tmp_path)
    write_lines(tmp_path / "eval/math500.jsonl", {"problem": "1?", "Q": "2?", "answer": "2"}, "[]")
    os.remove(tmp_path / "math500")
    with pytest.raises(ValueError, match="math500.jsonl: row 2 .* not one JSON object"):
        benchmarks.load_problems("math500", tmp_path)
    named = benchmarks.load_problems("math500", tmp_path, 1, columns=(("problem", "Q"),))
    assert named[0]["problem"] == "2?", "a map of columns goes for a known name too"
    said = [[{"role": "user", "content": "1?"}], [{"role": "assistant", "content": "So \\boxed{1}."}]]
    write_lines(tmp_path / "talk.jsonl", dict(zip(("prompt", "completion"), said)))
    found = benchmarks.load_problems("talk.jsonl")[0]
    assert (found["problem"], found["answer"]) == ("1?", "1")
    with pytest.raises(ValueError, match="where mathqa lies on the hub is not known here: --data DIR"):
        benchmarks.load_problems("mathqa")


def test_problems_of_the_hub(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    solved = r"It is \boxed{3}, no, \boxed{4}."
    marked = [{"question": f"{i} + 1?", "answer": f"It is {i}, and one.\n#### {i + 1}"} for i in range(5)]
    sets = {"set": marked, "solved": [{"problem": "3 + 1?", "solution": solved}], "other": [{"text": "none"}]}
    for name, rows in sets.items():
        (tmp_path / name).mkdir()
        parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / name / "train-0.parquet")
    found = benchmarks.load_problems(f"hub:{tmp_path / 'set'}")
    assert found[4] == {"problem": "4 + 1?", "answer": "5"} and len(found) == 5
    assert benchmarks.load_problems(f"hub:{tmp_path / 'set'}", limit=2) == found[:2]
    assert benchmarks.load_problems(f"hub:{tmp_path / 'solved'}") == [{"problem": "3 + 1?", "answer": "4"}]
    with pytest.raises(ValueError, match="row 1 is no problem with an answer: no column .*; it has: text"):
        benchmarks.load_problems(f"hub:{tmp_path / 'other'}")


@pytest.mark.parametrize("rows, flags, golds", [
    ([{"prompt": "1?", "completion": s} for s in (r"So \boxed{1}.", "I do not know.")], (), ["1"]),
    ([{"Q": "1?", "info": {"A": 1}, "answer": "2"}], ("--columns", "problem=Q,answer=info.A"), ["1"]),
    ([{"question": "1?", "answer": "1", "problem_is_valid": v} for v in ("Yes", "No", None)], (), ["1", "1"]),
])
def test_a_benchmark_of_ones_own(rows, flags, golds, checkpoint, tmp_path):
    """--bench FILE; the same again is skipped, and refused when the file is another."""
    own = write_lines(tmp_path / "own.jsonl", *rows)
    args = ("--ckpt", checkpoint, "--out", tmp_path / "out", "--bench", own, "--max-new-tokens", "4", *flags)
    done = run(*args)
    assert done.returncode == 0 and f"| own       | {len(golds)}     |" in done.stdout, done.stderr
    left_out = f"{own}: left out: 1 "
    assert done.stdout.startswith(left_out) == (len(golds) < len(rows))
    graded = [json.loads(line) for line in (tmp_path / "out/own.jsonl").read_text().splitlines()]
    assert [row["gold"] for row in graded] == golds
    if len(golds) == 2:
        assert "own.jsonl is finished: skipped" in run(*args).stdout
        write_lines(own, *[row | {"answer": "9"} for row in rows])
        assert "other settings (problems " in run(*args).stderr


def test_problems_seen_in_training_are_said(tmp_path):
    prompts_file = write_lines(tmp_path / "math8k.jsonl", {"problem": "What is  $1 + 1$?", "answer": "2"})
    stage = tmp_path / "runs/rl-short"
    stage.mkdir(parents=True)
    (tmp_path / "runs/data").mkdir()
    assert benchmarks.seen_in_training(str(stage), "math", [{"problem": "Q"}]) == []
    (stage / "config.json").write_text(json.dumps({"prompts": str(prompts_file)}))
    (tmp_path / "runs/data/index.json").write_text(json.dumps({"settings": {"keep_overlaps": ["long_cot"]}}))
    said = benchmarks.seen_in_training(str(stage), "math", [{"problem": "what is $1+1$?"}, {"problem": "Q"}])
    assert said[0].startswith("1 of the 2 problems of math are among the prompts")
    assert said[0].endswith("report math500 instead")
    assert "answers to problems of benchmarks (long_cot" in said[1]
    # --prompts may name a benchmark too
    (tmp_path / "math").mkdir()
    write_lines(tmp_path / "math/test.jsonl", {"problem": "What is $1 + 1$?", "answer": "2"})
    (stage / "config.json").write_text(json.dumps({"prompts": "math", "data": str(tmp_path)}))
    said = benchmarks.seen_in_training(str(stage), "math", [{"problem": "what is $1+1$?"}, {"problem": "Q"}])
    assert said[0].startswith("1 of the 2 problems of math are among the prompts of its RL, math")


# ------------------------------------------------------------------------------------------------------------
# The command line


def process(*args):
    command = [sys.executable, str(ROOT / "verify.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)


def run(*args):
    """The same in this process, which has imported torch already."""
    out, err = io.StringIO(), io.StringIO()
    with mock.patch.object(sys, "argv", ["verify.py", *map(str, args)]):
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            with pytest.raises(SystemExit) as code:
                files.run_cli(verify.main)
    return subprocess.CompletedProcess(args, code.value.code, out.getvalue(), err.getvalue())


def write_lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def test_grade_writes_the_rows_back(tmp_path):
    file = write_lines(
        tmp_path / "in.jsonl", {"response": r"\boxed{\frac12}", "gold": "0.5", "id": 7},
        {"response": "no idea", "gold": "0.5"},
        {"problem": "?", "solution": "3 + 4 = 7\n#### 7", "answer": 7})
    done = process("--grade", file, "--out", tmp_path / "out.jsonl")
    assert done.returncode == 0, done.stderr
    assert "2 of 3 correct, 66.67%" in done.stdout and "33.33% without an answer" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    first = {"response": r"\boxed{\frac12}", "gold": "0.5", "id": 7, "answer": r"\frac12", "correct": True}
    assert rows[0] == first and rows[2]["gold"] == "7"
    assert [(row["answer"], row["correct"]) for row in rows[1:]] == [(None, False), ("7", True)]
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "out.jsonl"]


@pytest.mark.parametrize("bad", [
    "{", "[1]", '{"response": "x"}', '{"response": 3, "gold": "x"}', '{"response": "x", "gold": null}'])
def test_a_bad_row_is_named_and_nothing_is_lost(tmp_path, bad):
    file = write_lines(tmp_path / "in.jsonl", {"response": "x", "gold": "x"}, bad)
    out = write_lines(tmp_path / "out.jsonl", "kept")
    done = run("--grade", file, "--out", out)
    assert done.returncode == 2 and f"{file}, line 2: " in done.stderr and done.stderr.count("\n") == 1
    a_row = '"response" and "gold" or "solution" and "answer", as text'
    assert (a_row if "response" in bad else "JSON object") in done.stderr
    assert out.read_text() == "kept\n"


def test_wrong_arguments_are_one_line():
    for args in (["--grade", "missing.jsonl"], [], ["--grade", "a", "--ckpt", "b"], ["--grad", "x"],
                 ["--ckpt", "b", "--n", "0"], ["--ckpt", "b", "--n", "4"], ["--ckpt", "b", "--shots", "x"],
                 ["--ckpt", ".", "--columns", "other.problem=Q"],
                 ["--ckpt", "b", "--bench", "gsm8k"], ["--ckpt", "b", "--bench", "nonsense", "--data", "."]):
        done = run(*args)
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert "Traceback" not in done.stderr
    own = process(*args)
    assert own.returncode == 2 and own.stderr == done.stderr
    assert "no benchmark 'nonsense' (valid: gsm8k, math, " in done.stderr


# ------------------------------------------------------------------------------------------------------------
# Public data, where there is some


@pytest.mark.skipif(not (DATA / "math" / "test.jsonl").exists(), reason="needs the public data (OCTO_DATA)")
def test_public_references():
    # GSM8K's file may lack the "#### 72" that ends a solution
    for name, share in (("math", 0.995), ("gsm8k", 0.985)):
        rows = list(read_jsonl(DATA / name / "test.jsonl"))[:1500]
        assert all(is_equivalent(row["answer"], row["answer"]) for row in rows)
        graded = [is_equivalent(extract_answer(row["solution"]) or "", row["answer"]) for row in rows]
        assert sum(graded) >= share * len(rows)
