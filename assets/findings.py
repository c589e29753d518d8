"""The paper's findings (arXiv 2506.20512, sections 2 to 5) asked again in the generated world.

    make findings                        # all of them, three seeds: hours on two cores
    make findings ONLY=F1 SEEDS=1        # one finding, one seed
    python -m assets.findings --only F1,F4 --seeds 3 --dry       # what would run, and for how long

An *arm* is a stage of midtrain.py and GRPO on it, both with the sizes of `make`; the arms of a seed share its
data, base and stable stage, in runs/seed1, … What is there already is not run again. A *claim* compares two
arms on the same 500 held-out problems. Its interval is a bootstrap over seeds and problems (both drawn anew,
95 %): the claim is shown if all of it is above 0, reversed if all of it is below, else not shown.
"""

import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from assets import report
from data import files


class Arm(NamedTuple):
    minutes: float  # measured, one thread, fp32: stage and GRPO
    stage: str = ""  # flags of midtrain.py; "": the arm has no stage of its own
    rl: str = ""  # of rl.py; "": --branch and the arm's name


CONTROLLED = "--branch controlled --mix"
DECAY = "--branch long --mix general=0.05,instruct=0.1"
ARMS = {
    "base": Arm(1, "--branch base"),
    "stable": Arm(2, "--branch stable"),
    "short": Arm(6, "--branch short"),
    "long": Arm(9, "--branch long"),
    "hybrid": Arm(9, "--branch hybrid"),
    "schooled": Arm(16, "--branch base --steps 2800 --mix general=0.4,web=0.45,short_cot=0.15"),
    "web": Arm(6, f"{CONTROLLED} web"),
    "noisy": Arm(6, f"{CONTROLLED} noisy"),
    "qa_short": Arm(6, f"{CONTROLLED} qa_short"),
    "qa_long": Arm(6, f"{CONTROLLED} qa_long"),
    "instruct_short": Arm(6, f"{CONTROLLED} instruct_short"),
    "instruct_long": Arm(6, f"{CONTROLLED} instruct_long"),
    "long_complex": Arm(5, rl="--branch long --template complex"),
    "long_staged": Arm(5, rl="--branch long --length-schedule 0:64,20:128,40:224"),
    "complex_staged": Arm(5, rl="--branch long --template complex --length-schedule 0:64,20:128,40:224"),
    "stable_25": Arm(2, rl="--ckpt {out}/stable@600"),
    "stable_50": Arm(2, rl="--ckpt {out}/stable@1200"),
    "long_10": Arm(9, f"{DECAY},web=0.75,long_cot=0.1"),
    "long_20": Arm(9, f"{DECAY},web=0.65,long_cot=0.2"),
    "long_40": Arm(9, f"{DECAY},web=0.45,long_cot=0.4"),
    "hybrid_10_20": Arm(9, f"{DECAY},web=0.55,long_cot=0.1,short_cot=0.2"),
    "hybrid_20_10": Arm(9, f"{DECAY},web=0.55,long_cot=0.2,short_cot=0.1"),
    "qa_prose": Arm(6, f"{CONTROLLED} qa_prose=0.1,web=0.9"),
    "prose_qa": Arm(6, f"{CONTROLLED} prose_qa=0.1,web=0.9"),
    "short_one": Arm(6, f"{DECAY},web=0.55,short_one=0.3"),
    "long_whole": Arm(9, f"{DECAY},web=0.55,long_whole=0.3"),
}


class Claim(NamedTuple):
    text: str
    more: str  # the arm that is to have more
    less: str
    what: str = "after"  # accuracy after RL | before | gain: after - before | fall: best - last, of one arm


class Finding(NamedTuple):
    title: str
    paper: str  # its figures: accuracy on MATH500, per cent
    claims: tuple[Claim, ...]


FINDINGS = {
    "F0": Finding(
        "Without mid-training RL does little, unless the base has seen mathematics and questions",
        "Llama-3.2-3B 0 → 9.6, Qwen2.5-3B 14.2 → 67.0; branches of Llama 56.6 to 65.2",
        (Claim("a schooled base gains more than the base", "schooled", "base", "gain"),
         Claim("what was mid-trained gains more than the base", "long", "base", "gain"),
         Claim("long ends above short", "long", "short"), Claim("hybrid ends above short", "hybrid", "short"),
         Claim("long ends above hybrid", "long", "hybrid"))),
    "F1": Finding(
        "Clean web text before RL is better than noisy",
        "FineMath-4plus 11.0, MegaMath-Web-Pro 36.6, Pro-Max 31.8",
        (Claim("after RL, clean above noisy", "web", "noisy"),
         Claim("before RL, clean above noisy", "web", "noisy", "before"))),
    "F2": Finding(
        "A tenth of question–answer data beside web text: short gives nothing, long a peak and a collapse",
        "web 36.6; with MegaMath-QA 34.6; with OpenR1 a peak of 47.6, then 7.2",
        (Claim("short above web alone (the paper: it is not)", "qa_short", "web"),
         Claim("long above web alone", "qa_long", "web"),
         Claim("long falls after its best", "qa_long", "", "fall"))),
    "F3": Finding(
        "One per cent of instructions beside it helps",
        "with MegaMath-QA 34.6 → 40.8; with OpenR1 a peak of 47.6 → 50.6, then 0.0",
        (Claim("short with instructions above without", "instruct_short", "qa_short"),
         Claim("long with instructions above without", "instruct_long", "qa_long"))),
    "F4": Finding(
        "The complex template lifts the start of long, and a cap in stages keeps RL stable",
        "step 0: 0.2 → 33.0; with stages 52.4 at the end, without a decline",
        (Claim("before RL, complex above simple", "long_complex", "long", "before"),
         Claim("after RL, complex with stages above complex", "complex_staged", "long_complex"),
         Claim("after RL, simple with stages above simple", "long_staged", "long"),
         Claim("complex falls after its best", "long_complex", "", "fall"))),
    "F5": Finding(
        "More stable tokens, more after RL, though scores before RL barely move",
        "20B, 70B, 100B: 33.0, 38.8, 39.4",
        (Claim("half of stable above a quarter", "stable_50", "stable_25"),
         Claim("all of stable above half", "stable", "stable_50"),
         Claim("before RL, all above a quarter (the paper: barely)", "stable", "stable_25", "before"))),
    "F6": Finding(
        "More chains in the decay help, and level off past 30 %",
        "10 to 40 % of QA in a decay of 10B tokens: gains level off past 30 %",
        (Claim("20 % above 10 %", "long_20", "long_10"), Claim("30 % above 20 %", "long", "long_20"),
         Claim("40 % above 30 % (the paper: hardly)", "long_40", "long"),
         Claim("long:short 20:10 above 10:20", "hybrid_20_10", "hybrid_10_20"),
         Claim("long:short 15:15 above 10:20", "hybrid", "hybrid_10_20"))),
    "QA": Finding(
        "What is it about question–answer data, its form or its content?",
        "an open question of the paper",
        (Claim("questions and answers above the same as prose", "qa_short", "qa_prose"),
         Claim("that prose above web alone", "qa_prose", "web"),
         Claim("talk in question–answer form above web alone", "prose_qa", "web"))),
    "W": Finding(
        "What in this world gives long chains their advantage?",
        "a question of this project, whose world was designed",
        (Claim("short with one operation an equation above short", "short_one", "short"),
         Claim("long above short with one operation an equation", "long", "short_one"),
         Claim("long above long without pieces", "long", "long_whole"),
         Claim("long without pieces above short", "long_whole", "short"))),
}


def arms_of(finding: Finding) -> list[str]:
    return list(dict.fromkeys(arm for c in finding.claims for arm in (c.more, c.less) if arm))


# ---- Running -----------------------------------------------------------------------------------------------


def run_seed(out: str, seed: int, arms: list[str], jobs: int) -> None:
    """Run what of these arms is not there yet: first the stages that others stand on."""
    todo = [arm for arm in arms if arm not in report.read_rl(out)]
    rl_only = {ARMS[arm].rl.split()[1] for arm in todo if not ARMS[arm].stage and "--branch" in ARMS[arm].rl}
    first = ["base --keep-every 600", "stable --keep-every 600", *sorted(rl_only)]
    for stage in first if todo else ():
        command(out, "midtrain.py", f"--branch {stage} --threads {jobs}", seed, stage.split()[0])
    minutes = sum(ARMS[arm].minutes for arm in todo)
    bar = tqdm(desc=out, total=minutes, unit="min of one core", disable=not todo)
    with ThreadPoolExecutor(jobs) as pool:
        todo.sort(key=lambda arm: -ARMS[arm].minutes)
        for arm, _ in zip(todo, pool.map(lambda arm: run_arm(out, arm, seed), todo)):
            bar.update(ARMS[arm].minutes)


def run_arm(out: str, name: str, seed: int) -> None:
    arm = ARMS[name]
    if arm.stage:
        command(out, "midtrain.py", f"{arm.stage} --name {name} --threads 1", seed, name)
    rl = arm.rl.format(out=out) or f"--branch {name}"
    command(out, "rl.py", f"{rl} --name {name} --threads 1", seed, name)


def command(out: str, program: str, flags: str, seed: int, log: str) -> None:
    """Run a program, its lines to OUT/logs; ValueError with the last of them if it fails."""
    path = Path(out) / "logs" / f"{log}.log"
    path.parent.mkdir(parents=True, exist_ok=True)
    args = [sys.executable, program, *shlex.split(flags), "--out", out, "--seed", str(seed)]
    with open(path, "a", encoding="utf-8") as file:
        code = subprocess.run(args, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        last = path.read_text("utf-8").strip().rpartition("\n")[2]
        raise ValueError(f"{shlex.join(args)} ended with {code}: {last} (all of it: {path})")


# ---- Comparing ---------------------------------------------------------------------------------------------


def correct(out: str, arm: str, step: int) -> np.ndarray:
    """(problems,) 1.0 where the greedy response after a step of GRPO was right."""
    rows = files.read_jsonl(Path(out) / f"rl-{arm}/evals/step_{step:06d}.jsonl")
    return np.array([row["reward"] > 0 for row in rows], float)


def scores(out: str, arm: str, what: str) -> np.ndarray:
    """(problems,) what a claim compares, of one seed."""
    rows = report.read_rl(out)[arm]
    last = rows[-1]["step"]
    if what == "fall":  # the best step is chosen on every other problem, the fall measured on the rest
        found = {row["step"]: correct(out, arm, row["step"]) for row in rows}
        few = min(map(len, found.values()))  # those that all evaluations have
        best = max(found, key=lambda step: found[step][0:few:2].mean())
        return found[best][1:few:2] - found[last][1:few:2]
    after, before = correct(out, arm, last), correct(out, arm, 0)
    return {"after": after, "before": before, "gain": after - before}[what]


def interval(d: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    """d (seeds, problems) → (mean, low, high): a bootstrap over both, 95 %; one seed stays as it is."""
    rng = np.random.default_rng(0)
    seeds, problems = d.shape
    means = [d[np.ix_(rng.integers(seeds, size=seeds), rng.integers(problems, size=problems))].mean()
             for _ in range(draws)]
    return (float(d.mean()), *map(float, np.quantile(means, (0.025, 0.975))))


def judge(claim: Claim, outs: list[str]) -> tuple[float, float, float, str]:
    """(mean, low, high, in words) of a claim, in points."""
    d = np.stack([scores(out, claim.more, claim.what) for out in outs])
    if claim.less:
        d = d - np.stack([scores(out, claim.less, claim.what) for out in outs])
    mean, low, high = (100 * x for x in interval(d))
    return mean, low, high, "shown" if low > 0 else "reversed" if high < 0 else "not shown"


def section(key: str, outs: list[str]) -> list[str]:
    """The lines of a finding: its arms, its claims."""
    finding, groups = FINDINGS[key], report.group_seeds(outs)
    lines = [f"\n## {key}. {finding.title}", f"\nThe paper: {finding.paper}.\n"]
    lines.append("| claim | points, 95 % interval | |\n|---|---|---|")
    for claim in finding.claims:
        mean, low, high, verdict = judge(claim, outs)
        lines.append(f"| {claim.text} | {mean:+.1f} ({low:+.1f} to {high:+.1f}) | {verdict} |")
    of = {arm: groups[arm] for arm in arms_of(finding)}
    return [*lines, "", report.seeds_table(of), f"\n![Accuracy and length by GRPO step](findings-{key}.png)"]


def main() -> None:
    parser = files.ArgumentParser(prog="python -m assets.findings", description=__doc__)
    add = parser.add_argument
    add("--only", default=",".join(FINDINGS), help=f"some of {', '.join(FINDINGS)}")
    add("--seeds", type=int, default=3, metavar="N", help="seeds 1 to N (default 3)")
    add("--runs", default="runs", metavar="DIR", help="the seeds' folders are DIR/seed1, … (default runs)")
    add("--to", metavar="DIR", help="where findings.md and its pictures go (default: --runs)")
    add("--jobs", type=int, default=2, metavar="N", help="arms side by side (default 2)")
    add("--dry", action="store_true", help="only say what would run")
    add("--report", action="store_true", help="run nothing, report of what is there")
    args = parser.parse_args()
    keys = args.only.split(",")
    if unknown := [key for key in keys if key not in FINDINGS]:
        raise ValueError(f"no finding {unknown[0]} (valid: {', '.join(FINDINGS)})")
    arms = list(dict.fromkeys(arm for key in keys for arm in arms_of(FINDINGS[key])))
    outs = [f"{args.runs}/seed{seed}" for seed in range(1, args.seeds + 1)]
    minutes = sum(ARMS[arm].minutes for arm in arms)
    each = ", ".join(f"{arm} {ARMS[arm].minutes:g}" for arm in arms)
    hours = (minutes + 14) * args.seeds / args.jobs / 60
    files.print0(f"{len(arms)} arms a seed, minutes of one core: {each}; base and stable 14")
    files.print0(f"about {hours:.1f} hours for all, if none is there yet")
    if args.dry:
        return
    for seed, out in enumerate(outs, 1):
        if not args.report:
            run_seed(out, seed, arms, args.jobs)
    outs = [out for out in outs if set(arms) <= report.read_rl(out).keys()]
    if not outs:
        raise ValueError(f"no seed in {args.runs} has all of the arms {', '.join(arms)}: run them first")
    to = Path(args.to or args.runs)
    lines = ["# The paper's findings in the generated world", f"\nSeeds: {len(outs)}. {__doc__.strip()}"]
    for key in keys:
        lines += section(key, outs)
        groups = report.group_seeds(outs)
        curves = {arm: [rows for _, rows in groups[arm]] for arm in arms_of(FINDINGS[key])}
        report.plot_rl(curves, str(to / f"findings-{key}.png"))
    files.write_text(to / "findings.md", "\n".join(lines))
    files.print0("\n".join(lines) + f"\nwrote {to}/findings.md")


if __name__ == "__main__":
    files.run_cli(partial(main))
