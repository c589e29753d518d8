"""Tables and pictures of runs: losses of the stages, accuracy and length over GRPO steps.

    python -m assets.report runs/tiny                       # stages: midtrain.md, .png; GRPO: report.md, .png
    python -m assets.report runs/tiny runs/seed1 runs/seed2 # the same of each, then means and ranges of all
"""

import math
import os
from functools import partial
from pathlib import Path

import midtrain
import verify
from data import files

# Okabe and Ito's, which colour-blind readers can tell apart
COLOURS = {"base": "#999999", "stable": "#000000", "short": "#E69F00", "long": "#0072B2", "hybrid": "#009E73"}

# ---- Mid-training ------------------------------------------------------------------------------------------


def read_stages(out: str) -> dict[str, tuple[dict, list[dict]]]:
    """{stage: (its settings, its rows of metrics)} of the stages that have begun."""
    found = {}
    for stage in midtrain.RECIPE:
        if rows := midtrain.read_metrics(os.path.join(out, stage, "metrics.jsonl")):
            found[stage] = midtrain.read_settings(os.path.join(out, stage)), rows
    return found


def stage_table(stages: dict) -> str:
    lines = ["| stage | steps | tokens | loss, first steps | last | held out | bits per byte | seen |"]
    lines.append("|" + "---|" * 8)
    for stage, (settings, rows) in stages.items():
        points = twentieths(rows)
        held = next((row for row in reversed(rows) if row.get("val_loss") is not None), None)
        val = f"{held['val_loss']:.3f} | {held['bits_per_byte']:.3f}" if held else "– | –"
        shares = {k[6:]: share for k, share in rows[-1].items() if k.startswith("share/")}
        times = {name: f", {rows[-1].get('epochs/' + name, math.nan):.2g} times" for name in shares}
        seen = "; ".join(f"{name} {share:.1%}{times[name]}" for name, share in shares.items())
        steps = rows[-1]["step"]
        tokens = steps * settings["batch"] * settings["seq_len"]
        ends = f"{points[0][1]:.3f} | {points[-1][1]:.3f}"
        lines.append(f"| {stage} | {steps:,} | {tokens:,} | {ends} | {val} | {seen or 'not finished'} |")
    return "\n".join(lines)


def twentieths(rows: list[dict]) -> list[tuple[float, float]]:
    """(step in the middle, mean loss) of each twentieth of a stage; steps that were left out do not count."""
    few, points = max(1, len(rows) // 20), []
    for i in range(0, len(rows) - few + 1, few):
        losses = [row["loss"] for row in rows[i : i + few] if isinstance(row.get("loss"), float)]
        if losses:
            points.append((i + few / 2, sum(losses) / len(losses)))
    return points or [(0.0, math.nan)]


def plot_stages(stages: dict, path: str) -> None:
    """Training loss (mean of each twentieth of a stage) and held-out loss against tokens."""
    figure, axes = _figure(1, (9, 4.5))
    end: dict = {}
    for stage, (settings, rows) in stages.items():
        begin = end.get(midtrain.RECIPE[stage].stands_on, 0)  # branches lie side by side
        each = settings["batch"] * settings["seq_len"] / 1e6
        end[stage] = begin + rows[-1]["step"] * each
        points = [(begin + each * step, loss) for step, loss in twentieths(rows)]
        (drawn,) = axes.plot(*zip(*points), label=f"{stage}, training")
        held = [row for row in rows if row.get("val_loss") is not None]
        if held := [(begin + each * row["step"], row["val_loss"]) for row in held]:
            axes.plot(*zip(*held), "o--", color=drawn.get_color(), alpha=0.6, label=f"{stage}, held out")
    axes.set(xlabel="tokens, millions", ylabel="loss, nats per token (each stage on its own mixture)")
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, fontsize=8)
    figure.savefig(path, dpi=150)


# ---- GRPO --------------------------------------------------------------------------------------------------


def read_rl(out: str) -> dict[str, list[dict]]:
    """{start: the rows with evaluations} of the finished rl-* runs, in the order of the stages."""
    found = {}
    names = [path.parent.name[3:] for path in Path(out).glob("rl-*/metrics.jsonl")]
    order = list(COLOURS)
    for name in sorted(names, key=lambda name: (order.index(name) if name in order else 99, name)):
        rows = midtrain.read_metrics(os.path.join(out, "rl-" + name, "metrics.jsonl"))
        rows = [row for row in rows if "eval_n" in row]
        if len(rows) > 1 and rows[-1]["step"] == rows[-1]["steps"]:
            found[name] = rows
    return found


def rl_rows(runs: dict[str, list[dict]]) -> list[dict]:
    """A row per run: its first and last evaluations, which are on the same problems, with 95 % intervals."""
    table = []
    for name, rows in runs.items():
        row = {"start": name, "n": rows[-1]["eval_n"], "steps": rows[-1]["step"]}
        for when, e in (("before", rows[0]), ("after", rows[-1])):
            low, high = verify.wilson(round(e["eval_accuracy"] * e["eval_n"]), e["eval_n"])
            row |= {when: e["eval_accuracy"], when + "_low": low, when + "_high": high}
            row["length_" + when] = e["eval_length"]
            row |= {f"{when}/{k[14:]}": x for k, x in e.items() if k.startswith("eval_accuracy/")}
        table.append(row | {"difference": row["after"] - row["before"]})
    return table


def rl_table(table: list[dict]) -> str:
    lines = ["| start | before RL | after RL | difference | length before | after | steps |"]
    lines.append("|---" * 7 + "|")
    for t in table:
        ends = ((t[k], t[k + "_low"], t[k + "_high"]) for k in ("before", "after"))
        before, after = (f"{share:.1%} ({low:.1%} to {high:.1%})" for share, low, high in ends)
        lengths = f"{t['length_before']:.0f} | {t['length_after']:.0f}"
        points = f"{100 * t['difference']:+.1f} points"
        lines.append(f"| {t['start']} | {before} | {after} | {points} | {lengths} | {t['steps']} |")
    said = f"Greedy, on {table[0]['n']} held-out problems, with 95 % Wilson intervals"
    return "\n".join([*lines, "", f"{said}; mean lengths in tokens.", *level_lines([table])])


def level_lines(tables: list[list[dict]]) -> list[str]:
    """Lines of a table of accuracy by level, mean over the folders; none if the problems have no levels."""
    common = set.intersection(*(set(row) for table in tables for row in table))
    levels = sorted(key[6:] for key in common if key.startswith("after/"))
    if not levels:
        return []
    lines = ["", "| start, before → after, by level | " + " | ".join(levels) + " |"]
    lines.append("|---" * (1 + len(levels)) + "|")
    for rows in zip(*tables, strict=True):
        mean = {key: 100 * sum(row[key] for row in rows) / len(rows) for key in common if "/" in key}
        cells = (f"{mean[f'before/{x}']:.0f} → {mean[f'after/{x}']:.0f} %" for x in levels)
        lines.append(f"| {rows[0]['start']} | {' | '.join(cells)} |")
    return lines


def seeds_table(outs: list[str], tables: list[list[dict]]) -> str:
    """Mean and range over several folders: runs with different seeds."""
    mean = f"difference, mean of {len(outs)}"
    lines = [f"| start | before RL | after RL | {mean} | of each | length before | after |", "|---" * 7 + "|"]
    if len({tuple(row["start"] for row in table) for table in tables}) > 1:
        raise ValueError(f"{', '.join(outs)} do not hold runs from the same starting points")
    for rows in zip(*tables, strict=True):
        keys = ("before", "after", "difference", "length_before", "length_after")
        mean = {key: sum(row[key] for row in rows) / len(rows) for key in keys}
        each = ", ".join(f"{100 * row['difference']:+.1f}" for row in rows)
        ends = {key: [row[key] for row in rows] for key in ("before", "after")}
        before, after = (f"{mean[k]:.1%} ({min(x):.1%} to {max(x):.1%})" for k, x in ends.items())
        lengths = f"{mean['length_before']:.0f} | {mean['length_after']:.0f}"
        points = f"{100 * mean['difference']:+.1f} points"
        lines.append(f"| {rows[0]['start']} | {before} | {after} | {points} | {each} | {lengths} |")
    return "\n".join(lines + level_lines(tables))


def plot_rl(runs: dict[str, list[dict]], path: str) -> None:
    """Accuracy and length against the step, a line per starting point."""
    figure, (left, right) = _figure(2, (10, 4.2))
    for (name, rows), marker in zip(runs.items(), "osD^v*PX" * 9, strict=False):
        style = {"marker": marker, "markersize": 4, "linewidth": 2, "color": COLOURS.get(name), "label": name}
        accuracy, length = ([r.get(f"curve_{y}", r[f"eval_{y}"]) for r in rows] for y in ("accuracy", "length"))
        left.plot([r["step"] for r in rows], [100 * y for y in accuracy], **style)
        right.plot([r["step"] for r in rows], length, **style)
    left.set(title="Held-out problems solved, greedy (%)", xlabel="GRPO step", ylim=(0, None))
    right.set(title="Mean length of the responses (tokens)", xlabel="GRPO step", ylim=(0, None))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    lines = left.get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=len(runs), frameon=False)
    figure.suptitle("GRPO from different starting points")
    figure.savefig(path, dpi=150)


def _figure(columns: int, size: tuple[float, float]):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(1, columns, figsize=size, layout="constrained")


# ---- Command line ------------------------------------------------------------------------------------------


def report_folder(out: str) -> list[dict]:
    """Print and write the tables and pictures of a run folder → the rows of the table of its rl-* runs."""
    stages, runs = read_stages(out), read_rl(out)
    if not stages and not runs:
        raise FileNotFoundError(f"no stage and no finished rl-* run in {out}")
    table = rl_rows(runs)
    if stages:
        publish(out, "midtrain", stage_table(stages), partial(plot_stages, stages))
    if runs:
        publish(out, "report", rl_table(table), partial(plot_rl, runs))
    return table


def publish(out: str, name: str, text: str, plot) -> None:
    files.write_text(os.path.join(out, f"{name}.md"), text)
    plot(os.path.join(out, f"{name}.png"))
    print(f"{text}\nwrote {out}/{name}.md and {out}/{name}.png")


def main() -> None:
    parser = files.ArgumentParser(prog="python -m assets.report", description=__doc__)
    parser.add_argument("out", nargs="+", metavar="DIR", help="run folders; several: seeds of one experiment")
    outs = parser.parse_args().out
    tables = [report_folder(out) for out in outs]
    if len(outs) > 1 and any(tables):
        print(seeds_table(outs, tables))


if __name__ == "__main__":
    files.run_cli(main)
