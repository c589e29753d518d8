"""Tables and pictures of runs: losses of the stages, accuracy and length over GRPO steps.

    python -m assets.report runs/tiny                       # stages: midtrain.md, .png; GRPO: report.md, .png
    python -m assets.report runs/seed1 runs/seed2           # the same of each; then seeds.md, .png, in seed1
    python -m assets.report runs/tiny --behaviours          # what responses do, by step: behaviours.md, .png

A row is a run. Runs in several folders are averaged as seeds if all their settings but the seed are equal.
"""

import itertools
import json
import math
import os
from functools import partial
from pathlib import Path

import midtrain
import verify
from data import files

COLOURS = {name: stage.colour for name, stage in midtrain.RECIPE.items()}
OTHERS = ("#CC6677", "#AA4499", "#44AA99", "#999933", "#882255", "#888888")  # of runs by other names, in turn

# ---- Mid-training ------------------------------------------------------------------------------------------


def read_stages(out: str) -> dict[str, tuple[dict, list[dict]]]:
    """{folder: (its settings, its rows of metrics)} of the stages that have begun, in the recipe's order."""
    found = {}
    for path in Path(out).glob("*/metrics.jsonl"):
        settings, rows = midtrain.read_settings(str(path.parent)), midtrain.read_metrics(str(path))
        if rows and settings and "stage" in settings:
            found[path.parent.name] = settings, rows
    order = list(midtrain.RECIPE)
    return dict(sorted(found.items(), key=lambda x: (order.index(x[1][0]["stage"]), x[0] not in order, x[0])))


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
    figure, axes = figure_of(1, (9, 4.5))
    end: dict = {}
    for stage, (settings, rows) in stages.items():
        begin = end.get(settings["starts_from"], 0)  # branches lie side by side
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
    n = table[0]["n"]
    said = f"Greedy, on {n} held-out problems, with 95 % Wilson intervals; mean lengths in tokens."
    return "\n".join([*lines, "", said, *level_lines([[t] for t in table])])


def calls_lines(runs: dict[str, list[list[dict]]]) -> list[str]:
    """Lines of a table of calls per response by GRPO step, of runs with a calculator: the mean of each one's
    seeds, at the steps that all have."""
    lines = []
    for start, seeds in runs.items():
        found = [{row["step"]: row["eval_calls"] for row in rows if "eval_calls" in row} for rows in seeds]
        if steps := sorted(set.intersection(*map(set, found))):
            calls = [sum(calls[step] for calls in found) / len(found) for step in steps]
            lines += ["", f"| calls per response, {start}, at step | {' | '.join(map(str, steps))} |"]
            lines += ["|---" * (len(steps) + 1) + "|", f"| | {' | '.join(f'{x:.1f}' for x in calls)} |"]
    return lines


def level_lines(tables: list[list[dict]]) -> list[str]:
    """Lines of a table of accuracy by level, a line per list of rows, whose mean it is; none if the problems
    have no levels."""
    common = set.intersection(*(set(row) for table in tables for row in table))
    levels = sorted(key[6:] for key in common if key.startswith("after/"))
    if not levels:
        return []
    lines = ["", "| start, before → after, by level | " + " | ".join(levels) + " |"]
    lines.append("|---" * (1 + len(levels)) + "|")
    for rows in tables:
        mean = {key: 100 * sum(row[key] for row in rows) / len(rows) for key in common if "/" in key}
        cells = (f"{mean[f'before/{x}']:.0f} → {mean[f'after/{x}']:.0f} %" for x in levels)
        lines.append(f"| {rows[0]['start']} | {' | '.join(cells)} |")
    return lines


# ---- Seeds -------------------------------------------------------------------------------------------------

# What seeds may differ in
OF_A_SEED = {"seed", "weights", "prompts_hash", "data", "tokenizer", "starts_from"}


def made_by(out: str, name: str) -> dict[str, dict]:
    """The settings of an RL run and of the stages below it, but for what follows from the seed."""
    found = {"rl": dict(midtrain.read_settings(os.path.join(out, "rl-" + name)) or {})}
    stage, ckpt = found["rl"].get("branch"), found["rl"].get("ckpt") or ""
    _, inside, below = f"/{ckpt}".partition(f"/{os.path.basename(os.path.abspath(out))}/")
    found["rl"]["ckpt"] = below if inside else ckpt  # as it is called in each seed's folder
    while stage and (below := midtrain.read_settings(os.path.join(out, stage))):
        found[below["stage"]], stage = below, below["starts_from"]
    for one in found.values():  # the vocabulary is trained on a seed's text: words more or less
        one["model"] = {k: v for k, v in one.get("model", {}).items() if k != "vocab_size"}
    return {  # what is off (None, False, 0) may be a flag that the version of another run did not have
        x: {k: v for k, v in one.items() if k not in OF_A_SEED and v} for x, one in found.items()}


def group_seeds(outs: list[str]) -> dict[str, list[tuple[dict, list[dict]]]]:
    """{name: [(its row of the table, its evaluations) of each seed]}: runs are of one experiment if all their
    settings but the seed's are equal. Of several experiments of one name each has its folders in its name."""
    groups: dict[str, list] = {}
    for out in outs:
        runs = read_rl(out)
        for row in rl_rows(runs):
            key = json.dumps([row["start"], made_by(out, row["start"])], sort_keys=True)
            groups.setdefault(key, []).append((out, row, runs[row["start"]]))
    found, names = {}, [group[0][1]["start"] for group in groups.values()]
    for name, group in zip(names, groups.values(), strict=True):
        if names.count(name) > 1:
            name += f" ({', '.join(out for out, _, _ in group)})"
        found[name] = [(row | {"start": name}, rows) for _, row, rows in group]
    return found


def seeds_table(groups: dict[str, list]) -> str:
    """Mean and every seed's value of each group."""
    lines = ["| start | before RL | after RL | of each seed | difference | length before | after |"]
    lines.append("|---" * 7 + "|")
    tables = [[row for row, _ in group] for group in groups.values()]
    for name, rows in zip(groups, tables, strict=True):
        keys = ("before", "after", "difference", "length_before", "length_after")
        mean = {key: sum(row[key] for row in rows) / len(rows) for key in keys}
        each = ", ".join(f"{100 * row['before']:.1f} → {100 * row['after']:.1f}" for row in rows)
        lengths = f"{mean['length_before']:.0f} | {mean['length_after']:.0f}"
        ends = f"{mean['before']:.1%} | {mean['after']:.1%} | {each}"
        lines.append(f"| {name} | {ends} | {100 * mean['difference']:+.1f} points | {lengths} |")
    said = ", ".join(f"{name} {len(rows)}" for name, rows in zip(groups, tables, strict=True))
    said = f"Greedy, on {tables[0][0]['n']} held-out problems; mean lengths in tokens. Seeds: {said}."
    return "\n".join([*lines, "", said, *level_lines(tables)])


def plot_rl(groups: dict[str, list[list[dict]]], path: str) -> None:
    """Accuracy and length against the step: a line per starting point, the mean over its runs, which are
    seeds, and a band from the lowest to the highest. All points are on the same problems (--eval-subset)."""
    figure, (left, right) = figure_of(2, (10, 4.2))
    others = itertools.cycle(OTHERS)
    for (name, runs), marker in zip(groups.items(), "osD^v*PX" * 9, strict=False):
        style = {"marker": marker, "markersize": 4, "linewidth": 2, "label": name}
        style["color"] = COLOURS.get(name.split(" ")[0]) or next(others)
        for axes, key, unit in ((left, "accuracy", 100), (right, "length", 1)):
            curve, evaluated = f"curve_{key}", f"eval_{key}"
            values = [{r["step"]: unit * r.get(curve, r[evaluated]) for r in rows} for rows in runs]
            steps = sorted(set.intersection(*map(set, values)))
            seeds = [[value[step] for value in values] for step in steps]
            (line,) = axes.plot(steps, [sum(x) / len(x) for x in seeds], **style)
            low, high = [min(x) for x in seeds], [max(x) for x in seeds]
            axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.15)
    left.set(title="Held-out problems solved, greedy (%)", xlabel="GRPO step", ylim=(0, None))
    right.set(title="Mean length of the responses (tokens)", xlabel="GRPO step", ylim=(0, None))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
    lines = left.get_legend_handles_labels()
    figure.legend(*lines, loc="outside lower center", ncols=min(len(groups), 6), frameon=False)
    counts = [len(runs) for runs in groups.values()]
    few, seeds = min(counts), max(counts)
    of = f": mean and range of {f'{few} to ' * (few < seeds)}{seeds} seeds" * (seeds > 1)
    figure.suptitle(f"GRPO from different starting points{of}")
    figure.savefig(path, dpi=150)


def figure_of(columns: int, size: tuple[float, float]):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt.subplots(1, columns, figsize=size, layout="constrained")


# ---- Command line ------------------------------------------------------------------------------------------


def report_folder(out: str) -> None:
    """Print and write the tables and pictures of a run folder."""
    stages, runs = read_stages(out), read_rl(out)
    if not stages and not runs:
        raise FileNotFoundError(f"no stage and no finished rl-* run in {out}")
    if stages:
        publish(out, "midtrain", stage_table(stages), partial(plot_stages, stages))
    if runs:
        one = {name: [rows] for name, rows in runs.items()}
        text = "\n".join([rl_table(rl_rows(runs)), *calls_lines(one)])
        publish(out, "report", text, partial(plot_rl, one))


def publish(out: str, name: str, text: str, plot) -> None:
    files.write_text(os.path.join(out, f"{name}.md"), text)
    plot(os.path.join(out, f"{name}.png"))
    print(f"{text}\nwrote {out}/{name}.md and {out}/{name}.png")


def main() -> None:
    parser = files.ArgumentParser(prog="python -m assets.report", description=__doc__)
    parser.add_argument("out", nargs="+", metavar="DIR", help="run folders; several: seeds of experiments")
    parser.add_argument("--behaviours", action="store_true", help="what responses do, by GRPO step")
    args = parser.parse_args()
    if args.behaviours:
        from assets import behaviours

        text, plot = behaviours.report(args.out)
        return publish(args.out[0], "behaviours", text, plot)
    for out in args.out:
        report_folder(out)
    if len(args.out) > 1 and (groups := group_seeds(args.out)):
        curves = {name: [rows for _, rows in group] for name, group in groups.items()}
        publish(args.out[0], "seeds", seeds_table(groups), partial(plot_rl, curves))


if __name__ == "__main__":
    files.run_cli(main)
