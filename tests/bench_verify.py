r"""The verifier on public data, beside math-verify: verdicts, speed, worst cases.

    python tests/bench_verify.py [DIR [CASES.jsonl]]

DIR: the public files of the README. CASES: rows {"gold", "response", "expected", "kind"}. Without DIR, golds
of the tests are changed, answers of the generated corpus graded, and only speed and worst cases say much.
Prints, one line each: labelled cases; every gold answer against itself, its reference solution and rewritten
forms; golds with one thing changed, and pairs of different ones, which must be refused; the options of
MMLU-STEM; time per response; time and exceptions over fuzzed input.
"""

import itertools
import platform
import random
import re
import resource
import statistics
import sys
import time
import tracemalloc
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from test_verify import DIFFERENT, EQUAL, HOSTILE

from data import files, synth
from data.benchmarks import options
from verify import extract_answer, is_correct, is_equivalent, reward

FILES = {
    "gsm8k": ("gsm8k/train.jsonl", "gsm8k/test.jsonl"), "math": ("math/train.jsonl", "math/test.jsonl"),
    "math500": ("eval/math500.jsonl",), "olympiadbench": ("eval/olympiadbench.jsonl",),
    "amc23": ("eval/amc23.jsonl",), "aime24": ("eval/aime24.jsonl",), "asdiv": ("eval/asdiv.jsonl",),
    "ocwcourses": ("eval/ocwcourses.jsonl",), "tabmwp": ("eval/tabmwp_test1k.jsonl",),
}
PAIRS, FUZZED = 100_000, 100_000


# ------------------------------------------------------------------------------------------------------------
# Ten ways to write the same answer; None where a way does not apply


def decimal(gold: str) -> str | None:
    match = re.fullmatch(r"(-?)\\[dt]?frac\{(\d{1,6})\}\{(\d{1,6})\}", gold)
    if not match or int(match[3]) == 0:
        return None
    rest = int(match[3])
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    top = int(match[2]) * 10**12
    if rest != 1 and int(match[2]) % rest or top % int(match[3]):
        return None
    whole, part = divmod(top // int(match[3]), 10**12)
    return f"{match[1]}{whole}.{part:012d}".rstrip("0").rstrip(".")


def reordered(gold: str) -> str | None:
    parts = re.fullmatch(r"([\w^\\{}\s]+?)\s*\+\s*([\w^\\{}\s]+)", gold)
    if not parts or "text" in gold or any(part.count("{") != part.count("}") for part in parts.groups()):
        return None
    return f"{parts[2].strip()} + {parts[1].strip()}"


def changed(pattern: str, new: str):
    def rewrite(gold: str) -> str | None:
        text = re.sub(pattern, new, gold)
        return text if text != gold else None

    return rewrite


def sized(gold: str) -> str | None:
    if "(" not in gold or "left" in gold:
        return None
    return gold.replace("(", r"\left(").replace(")", r"\right)")


REWRITES = {
    "dfrac": changed(r"\\frac", r"\\dfrac"),
    "tfrac": changed(r"\\[d]?frac", r"\\tfrac"),
    "left right": sized,
    "spaces": changed(r"(?<=[\d}a-z])([+=,])(?=[\s\d\\a-z(-])", r" \1\\, "),
    "dollars": lambda g: f"${g}$" if "$" not in g else None,
    "decimal": decimal,
    "reordered": reordered,
    "slash": changed(r"^\\[dt]?frac\{(\d+)\}\{(\d+)\}$", r"\1/\2"),
    "unit": lambda g: rf"{g} \text{{ cm}}" if re.fullmatch(r"-?\d+(\.\d+)?", g) else None,
    "thousands": lambda g: f"{int(g):,}" if re.fullmatch(r"-?\d{4,15}", g) else None,
    "full stop": lambda g: g + "." if not g.endswith(".") else None,
}


def golds(folder: Path) -> None:
    every = []
    for name, paths in FILES.items():
        rows = [row for path in paths for row in files.read_jsonl(folder / path)]
        answers = [str(row["answer"]) for row in rows]
        every += answers
        itself = sum(is_equivalent(a, a) for a in answers)
        said = f"{name:14} {len(rows):6,} golds; against themselves {itself / len(rows):.2%}"
        if name in ("gsm8k", "math", "math500"):
            correct = [is_equivalent(extract_answer(row["solution"]) or "", row["answer"]) for row in rows]
            said += f"; reference solutions {sum(correct) / len(rows):.2%}"
            tried = {way: [g for g in answers if f(g) is not None] for way, f in REWRITES.items()}
            ok = {way: sum(is_equivalent(REWRITES[way](g), g) for g in tried[way]) for way in tried}
            total = sum(map(len, tried.values()))
            said += f"; {total:,} rewritten {sum(ok.values()) / total:.2%} ("
            said += ", ".join(f"{way} {ok[way]}/{len(tried[way])}" for way in tried if tried[way]) + ")"
        print(said, flush=True)
    every = sorted(set(every))
    different(every)
    mutated(every)


def different(answers: list[str]) -> None:
    """Pairs drawn at random, and those called equal, to be looked at."""
    rng, equal, n = random.Random(0), [], 0
    while n < PAIRS:
        a, b = rng.choice(answers), rng.choice(answers)
        if a != b:
            n += 1
            if is_equivalent(a, b):
                equal.append((a, b))
    print(f"{PAIRS:,} pairs of different texts among {len(answers):,} golds: {len(equal)} called equal")
    show(equal[:40])


def show(pairs: list) -> None:
    for pair in pairs:
        print("   ", *pair, sep="   ")


# Ways to change an answer: (places, what stands there instead). A value of zero has no other sign
SWAPPED = {
    "+": "-", "-": "+", "^": "_", "/": "+", r"\cdot": "+", r"\times": "+", r"\cup": r"\cap", r"\sin": r"\cos",
    r"\cos": r"\sin", r"\tan": r"\cot", r"\ln": r"\log", r"\log": r"\ln", r"\sqrt": r"\sqrt[3]", r"\pi": "e",
    "!": "", "[": "(", "]": ")", "<": r"\le ", ">": r"\ge ", r"\le": "<", r"\leq": "<", r"\ge": ">",
    r"\geq": ">", "": "-", "x": "y", "e": "d", "i": "j"}
NO_SIGN = r"0|\\(?:text|mbox|in|c[ua]p|[lg]e|infty|left|right|\W)|\d*[1-9]*$"
CHANGES = {
    "digit": (r"\d", lambda m: str((int(m[0]) + 1) % 10)),
    "sign": (rf"[+-]|(?<![\w)}}\]!^_.\\{{])(?<!\{{ )(?=[\d\\a-zA-Z])(?!{NO_SIGN})",
             lambda m: SWAPPED[m[0]]),
    "operator": (r"\^|\\sqrt|(?<=\S)/|\\cdot|\\times|(?<!\\)!|\\pi|\\cup|\\(?:sin|cos|tan|ln|log)(?![a-z _])",
                 lambda m: SWAPPED[m[0]]),
    "bound": (r"[\[\]]|<|>|\\[lg]eq?(?![a-z])|(?<=infty,)(?! ?0)|(?<=,)(?=\\infty)", lambda m: SWAPPED[m[0]]),
    "name": (r"(?<![A-Za-z\\])(?:[A-Za-z]|[A-Za-z]{4,}(?!\{))(?![A-Za-z])|(?<=text\{)\s*[A-Za-z]+",
             lambda m: SWAPPED.get(m[0], "x" if len(m[0]) == 1 else "other")),
}


def mutated(answers: list[str]) -> None:
    """Every answer with one thing changed, in each of its first four places: accepted ones are printed."""
    for kind, (pattern, new) in CHANGES.items():
        tried, accepted = 0, []
        for gold in answers:
            for place in itertools.islice(re.finditer(pattern, gold), 4):
                answer = gold[: place.start()] + new(place) + gold[place.end() :]
                tried += 1
                if is_equivalent(answer, gold):
                    accepted.append((answer, gold))
        print(f"one {kind} changed: {len(accepted)} of {tried:,} accepted, {len(accepted) / tried:.2%}")
        show(accepted[:40])


def choices(folder: Path) -> None:
    """MMLU-STEM: the text of the right option is correct; two different options are not the same."""
    rows = list(files.read_jsonl(folder / "eval/mmlu_stem.jsonl"))
    right = sum(is_correct(options(row)[row["answer"]], row) for row in rows)
    pairs = [pair for row in rows for pair in itertools.combinations(options(row).values(), 2)]
    equal = [(a, b) for a, b in pairs if a != b and is_equivalent(a, b)]
    print(f"MMLU-STEM: {right} of {len(rows)} texts of right options are correct, {right / len(rows):.2%}; "
          f"of {len(pairs):,} pairs of options {len(equal)} are called equal")
    show(equal)


# ------------------------------------------------------------------------------------------------------------
# Beside math-verify


def math_verify():
    """(response, gold) → bool, as verl calls it; None if it is not installed."""
    try:
        import math_verify as theirs
    except ImportError:
        return None
    boxed, gold_form = theirs.LatexExtractionConfig(), theirs.LatexExtractionConfig()
    forms = (theirs.ExprExtractionConfig(), boxed)

    def grade(response: str, gold: str) -> bool:
        answers = theirs.parse(response, forms, parsing_timeout=None)
        golds = theirs.parse(rf"\boxed{{{gold}}}", (gold_form,), parsing_timeout=None)
        return bool(theirs.verify(golds, answers, timeout_seconds=None))

    return grade


def cases(path: Path, theirs) -> None:
    rows = list(files.read_jsonl(path))
    arms = {"ours": lambda response, gold: is_equivalent(extract_answer(response) or "", gold)}
    arms |= {"math-verify": theirs} if theirs else {}
    for name, grade in arms.items():
        correct, false, wrong = 0, 0, Counter()
        for row in rows:
            try:
                verdict = grade(row["response"], row["gold"])
            except Exception:  # theirs may; ours never
                verdict = False
            correct += verdict == row["expected"]
            false += verdict and not row["expected"]
            wrong[row["kind"]] += verdict != row["expected"]
        negatives = sum(not row["expected"] for row in rows)
        kinds = {kind: count for kind, count in wrong.most_common(5) if count}
        print(f"{name:12} {correct} of {len(rows)} cases correct, {correct / len(rows):.2%}; "
              f"false positives {false} of {negatives}; wrong kinds {kinds}")


def speed(pairs: list[tuple[str, str]], theirs) -> None:
    """Seconds of each response, arms interleaved."""
    arms = {"ours": lambda response, gold: is_equivalent(extract_answer(response) or "", gold)}
    arms |= {"math-verify": theirs} if theirs else {}
    times = {name: [] for name in arms}
    for response, gold in pairs:
        for name, grade in arms.items():
            start = time.perf_counter()
            try:
                grade(response, gold)
            except Exception:
                pass
            times[name].append(time.perf_counter() - start)
    for name, seconds in times.items():
        mean, median = statistics.mean(seconds), statistics.median(seconds)
        said = f"median {median * 1e6:.0f} µs, mean {mean * 1e6:.0f} µs"
        if theirs:
            said += f", {statistics.mean(times['math-verify']) / mean:.0f} times as fast (mean)"
        print(f"{name:12} {len(pairs):,} responses: {said}")


# ------------------------------------------------------------------------------------------------------------
# Worst cases


def fuzzed(rng: random.Random) -> str:
    pieces = (
        r"\frac \sqrt { } ( ) [ ] ^ _ 9 12 x y \pi ! + - * / \left \right | \{ \} \text{ \boxed{ = < \le "
        r", \cup e i \sin \log \binom \begin{pmatrix} \end{pmatrix} & \\ \infty % ° ½ √ \pm \lfloor 1e99 $ "
        r". : ' eval( 9^9^9 99999! \x00").split(" ")
    if rng.random() < 0.02:
        return rng.choice(HOSTILE)
    text = "".join(rng.choices(pieces, k=rng.randrange(1, 60)))
    return text * rng.choice((1, 1, 1, 30, 1000)) if rng.random() < 0.1 else text


def worst(n: int) -> None:
    rng, slowest, errors = random.Random(0), (0.0, ""), Counter()
    is_equivalent("x+1", "1+x")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(n):
        a, b = fuzzed(rng), fuzzed(rng)
        start = time.process_time()
        try:
            assert is_equivalent(a, b) in (True, False)
            reward(rf"\boxed{{{a}}}", b)
        except Exception as error:
            errors[type(error).__name__] += 1
        slowest = max(slowest, ((time.process_time() - start) / 2, a[:60]))
    more = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(f"{n:,} fuzzed pairs: {sum(errors.values())} exceptions; slowest verdict {slowest[0] * 1e3:.0f} ms "
          f"({slowest[1]!r}); {more:.0f} MiB more at the peak")
    each = []
    for text in HOSTILE:
        tracemalloc.start()
        is_equivalent(text, text + "+1")
        reward(rf"\boxed{{{text}}}", "1")
        each.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    print(f"{len(each)} hostile inputs, each alone: at most {max(each) / 2**20:.0f} MiB")


def main() -> None:
    folder = Path(sys.argv[1]) if sys.argv[1:] else None
    print(f"Python {platform.python_version()}, {platform.processor() or platform.machine()}")
    theirs = math_verify()
    if theirs is None:
        print("math-verify is not installed (pip install math-verify): its rows are missing")
    if sys.argv[2:]:
        cases(Path(sys.argv[2]), theirs)
    if folder:
        golds(folder)
        choices(folder)
        rows = list(files.read_jsonl(folder / "math/test.jsonl"))[::10]
        rows += list(files.read_jsonl(folder / "gsm8k/test.jsonl"))[::5]
        pairs = [(row["solution"], row["answer"]) for row in rows]
    else:
        texts = itertools.islice(synth.documents("short_cot", 0, "test"), 400)
        pairs = [(text, "7") for text in texts]
        mutated(sorted({gold for _, gold in EQUAL + DIFFERENT if gold}))
    speed(pairs, theirs)
    worst(FUZZED)


if __name__ == "__main__":
    main()
