"""What responses do while GRPO goes on, counted in the rollouts that rl.py keeps as text.

    python -m assets.report runs/tiny --behaviours

Of each step and starting point, over all responses of its rollouts (several folders: of all of them):

    splits     share of responses that work an operation out in pieces (47+38: 40+30=70, …)
    checks     that check a step backwards (Check 85-38=47.); real: share of all checks whose step was wrong
    mends      that take a result back at once (=14, no, 7+8=15); real: share of these that were wrong
    restarts   that say a line of their thoughts again
    steps      share of single equations whose result is right, results taken back left out
    tokens     mean length of right responses, and of wrong ones

The forms are those of data/synth.py; other text shows up in steps and tokens only.
"""

import itertools
import re
from functools import partial
from pathlib import Path

from assets import report as tables
from data import files

EQUATION = re.compile(r"(?<![\d=])(\d+(?:[-+*/]\d+)+)=(-?\d+)(, no,)?")
SPLIT, CHECK = re.compile(r"\d[-+*/]\d+: "), re.compile(r"Check (\d+(?:[-+*/]\d+)+=-?\d+)")
KEYS = ("splits", "checks", "mends", "restarts")


def is_right(task: str, result: str) -> bool:
    """Is a sum, worked from left to right as synth.py's are, what the text says it is?"""
    first, *rest = re.split(r"([-+*/])", task)
    value = float(first)
    for op, number in zip(rest[::2], rest[1::2]):
        b = float(number)
        value = {"+": value + b, "-": value - b, "*": value * b, "/": value / b if b else float("nan")}[op]
    return value == float(result)


def measure(rows: list[dict]) -> dict[str, float | None]:
    """Rollouts {"response", "reward", "tokens"} → the metrics above; None where there is nothing to count."""
    n = dict.fromkeys((*KEYS, "all_checks", "real_checks", "taken_back", "real_mends", "steps", "right"), 0)
    lengths: dict[bool, list[int]] = {True: [], False: []}
    for row in rows:
        text = row["response"]
        lengths[row["reward"] > 0].append(row["tokens"])
        found = [(m, is_right(m[1], m[2])) for m in EQUATION.finditer(text)]
        checks = [m.start(1) for m in CHECK.finditer(text)]
        kept = [(m, right) for m, right in found if not m[3] and m.start() not in checks]
        before = [[right for m, right in kept if m.start() < at] for at in checks]
        taken = [right for m, right in found if m[3]]
        lines = [line for line in text.splitlines() if any(c.isdigit() for c in line)]
        n["splits"] += bool(SPLIT.search(text))
        n["checks"] += bool(checks)
        n["mends"] += bool(taken)
        n["restarts"] += len(set(lines)) < len(lines)
        n["all_checks"] += len(checks)
        n["real_checks"] += sum(steps[-1:] == [False] for steps in before)
        n["taken_back"] += len(taken)
        n["real_mends"] += taken.count(False)
        n["steps"] += len(kept)
        n["right"] += sum(right for _, right in kept)
    of = lambda a, b: a / b if b else None  # noqa: E731
    return {key: n[key] / len(rows) for key in KEYS} | {
        "checks, real": of(n["real_checks"], n["all_checks"]),
        "mends, real": of(n["real_mends"], n["taken_back"]),
        "steps": of(n["right"], n["steps"]),
        "tokens, right": of(sum(lengths[True]), len(lengths[True])),
        "tokens, wrong": of(sum(lengths[False]), len(lengths[False])),
    }


def read(outs: list[str]) -> dict[str, dict[int, dict]]:
    """{start: {step: metrics}} of all rl-* runs with rollouts."""
    found: dict[str, dict[int, list]] = {}
    for path in sorted(path for out in outs for path in Path(out).glob("rl-*/rollouts/step_*.jsonl")):
        steps = found.setdefault(path.parent.parent.name[3:], {})
        steps.setdefault(int(path.stem[5:]), []).extend(files.read_jsonl(path))
    order = list(tables.COLOURS)
    names = sorted(found, key=lambda name: (order.index(name) if name in order else 99, name))
    return {name: {step: measure(rows) for step, rows in sorted(found[name].items())} for name in names}


def table(runs: dict[str, dict[int, dict]]) -> list[str]:
    """A line for the first steps of each run and one for the last, a tenth of all (one at least)."""
    keys = list(next(iter(next(iter(runs.values())).values())))
    lines = ["| start, steps | " + " | ".join(keys) + " |", "|---" * (1 + len(keys)) + "|"]
    for name, steps in runs.items():
        few = max(1, len(steps) // 10)
        for chosen in (list(steps)[:few], list(steps)[-few:]):
            cells = []
            for key in keys:
                values = [steps[step][key] for step in chosen if steps[step][key] is not None]
                mean = sum(values) / len(values) if values else None
                cells.append("–" if mean is None else f"{mean:.0f}" if "tokens" in key else f"{mean:.1%}")
            lines.append(f"| {name}, {chosen[0]} to {chosen[-1]} | {' | '.join(cells)} |")
    return lines


def examples(outs: list[str], name: str) -> list[str]:
    """A held-out problem that was answered wrong before RL and right after, both responses in full."""
    for out in outs:
        evaluations = sorted(Path(out).glob(f"rl-{name}/evals/step_*.jsonl"))
        if len(evaluations) < 2:
            continue
        first, last = (list(files.read_jsonl(evaluations[i])) for i in (0, -1))
        for a, b in zip(first, last):
            if a["reward"] <= 0 < b["reward"] and a["problem"] == b["problem"]:
                before, after = (f"\n```\n{row['response'].strip()}\n```" for row in (a, b))
                asked = f"\n**{name}**: {a['problem']} (answer {a['gold']})"
                return [asked, "\nbefore:", before, "\nafter:", after]
    return []


def report(outs: list[str]) -> tuple[str, partial]:
    """(table and examples as text, a function that draws the picture to a path)."""
    if not (runs := read(outs)):
        raise FileNotFoundError(f"no rl-*/rollouts in {', '.join(outs)}")
    texts = itertools.chain.from_iterable(examples(outs, name) for name in runs)
    return "\n".join([*table(runs), *texts]), partial(plot, runs)


def plot(runs: dict[str, dict[int, dict]], path: str) -> None:
    """Share of responses by behaviour, of right steps, and lengths of right and wrong responses, by step."""
    figure, axes = tables.figure_of(6, (16, 3.4))
    for axis, key in zip(axes, ("splits", "checks", "mends", "restarts", "steps", "tokens, right")):
        for name, steps in runs.items():
            colour, points = tables.COLOURS.get(name), [(step, m[key]) for step, m in steps.items()]
            scale = 1 if "tokens" in key else 100
            points = [(step, scale * y) for step, y in points if y is not None]
            (line,) = axis.plot(*zip(*points or [(0, 0)]), color=colour, label=name)
            if key == "tokens, right":
                wrong = [(step, y) for step, m in steps.items() if (y := m["tokens, wrong"]) is not None]
                axis.plot(*zip(*wrong or [(0, 0)]), ":", color=line.get_color())
        title = "tokens: right, wrong (dotted)" if "tokens" in key else f"{key} (%)"
        axis.set(title=title, xlabel="GRPO step")
        axis.set_ylim(0, None)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=9, frameon=False)
    figure.savefig(path, dpi=120)
