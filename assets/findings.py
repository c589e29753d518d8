"""The paper's findings (arXiv 2506.20512, sections 2 to 5) asked again in the generated world.

    make findings                        # all of them, three seeds: hours on two cores
    make findings ONLY=F1 SEEDS=1        # one finding, one seed
    python -m assets.findings --only F1,F4 --seeds 3 --dry       # what would run, and for how long

An *arm* is a stage of midtrain.py and GRPO on it, with the sizes of `make` unless its flags say otherwise;
the arms of a seed share its data, base and stable stage, in runs/seed1, … What is there already is not run
again, nor what has a line in findings.jsonl (in --to), which keeps the results when the runs are gone.

A *claim* compares two arms on the same 500 held-out problems, in the seeds that have both. Its 95 %
interval is a bootstrap over seeds and problems, or Student's interval of the seeds' means where that is
wider: two or three seeds, drawn anew, say too little of others, and one, whose interval is over problems
only, nothing. The claim is shown if all of the interval is above 0, reversed if all of it is below, else
not shown. The results in assets/ were measured in fp32, one thread an arm, on two AMD cores without
AVX512-BF16, torch 2.13.
"""

import hashlib
import json
import shlex
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from assets import report
from data import files


class Arm(NamedTuple):
    minutes: float  # of one idle core: stage and GRPO, estimated from those of `make`
    stage: str = ""  # flags of midtrain.py; "": the arm has no stage of its own
    rl: str = ""  # of rl.py; "": --branch and the arm's name
    needs: str = ""  # an arm that is run before
    data: tuple[str, ...] = ()  # commands that make a source, of what that arm left behind perhaps


# As long as stable: with the 800 steps of the branches nothing that starts from the base gets off the floor
CONTROLLED = "--branch controlled --steps 2400 --mix"
DECAY = "--branch long --mix general=0.05,instruct=0.1"
ARMS = {
    "base": Arm(1, "--branch base"),
    "stable": Arm(2, "--branch stable"),
    "short": Arm(6, "--branch short"),
    "long": Arm(9, "--branch long"),
    "hybrid": Arm(9, "--branch hybrid"),
    "tool": Arm(12, "--branch tool"),
    "schooled": Arm(16, "--branch base --steps 2800 --mix general=0.4,web=0.45,short_cot=0.15"),
    "web": Arm(14, f"{CONTROLLED} web"),
    "noisy": Arm(14, f"{CONTROLLED} noisy"),
    "qa_short": Arm(14, f"{CONTROLLED} qa_short"),
    "qa_long": Arm(14, f"{CONTROLLED} qa_long"),
    "instruct_short": Arm(14, f"{CONTROLLED} instruct_short"),
    "instruct_long": Arm(14, f"{CONTROLLED} instruct_long"),
    "long_complex": Arm(5, rl="--branch long --template complex"),
    "long_staged": Arm(5, rl="--branch long --length-schedule 0:64,20:128,40:224"),
    "complex_staged": Arm(5, rl="--branch long --template complex --length-schedule 0:64,20:128,40:224"),
    "complex_128": Arm(5, rl="--branch long --template complex --length-schedule 0:128,40:224"),
    "stable_25": Arm(2, rl="--ckpt {out}/stable@600"),
    "stable_50": Arm(2, rl="--ckpt {out}/stable@1200"),
    "long_10": Arm(9, f"{DECAY},web=0.75,long_cot=0.1"),
    "long_20": Arm(9, f"{DECAY},web=0.65,long_cot=0.2"),
    "long_40": Arm(9, f"{DECAY},web=0.45,long_cot=0.4"),
    "hybrid_10_20": Arm(9, f"{DECAY},web=0.55,long_cot=0.1,short_cot=0.2"),
    "hybrid_20_10": Arm(9, f"{DECAY},web=0.55,long_cot=0.2,short_cot=0.1"),
    "qa_prose": Arm(14, f"{CONTROLLED} qa_prose=0.1,web=0.9"),
    "prose_qa": Arm(14, f"{CONTROLLED} prose_qa=0.1,web=0.9"),
    "short_one": Arm(6, f"{DECAY},web=0.55,short_one=0.3"),
    "long_whole": Arm(9, f"{DECAY},web=0.55,long_whole=0.3"),
    "own": Arm(7, f"{DECAY},web=0.55,own=0.3", needs="stable", data=(
        "-m data.prepare --out {out}/data --add own=rollouts:{out}/rl-stable/rollouts/*.jsonl",)),
    "crawl": Arm(14, f"{CONTROLLED} crawl=1"),
    "curated": Arm(15, f"{CONTROLLED} curated=1", data=(
        "-m data.synth --source crawl -n 160000 --seed {seed} --jsonl {out}/crawl.jsonl",
        "-m data.synth --source crawl -n 3000 --seed 10{seed} --jsonl {out}/labels.jsonl",
        "-m data.curate --in {out}/crawl.jsonl --labels {out}/labels.jsonl --recall 0.9 --out {out}/clean",
        "-m data.prepare --out {out}/data --add curated=text:{out}/clean/kept.jsonl.gz")),
}


class Claim(NamedTuple):
    text: str
    more: str  # the arm that is to have more
    less: str
    what: str = "after"  # accuracy after RL | before | gain: after - before | fall: best - last, of one arm
    paper: bool = True  # does the paper have it so?

    @property
    def arms(self) -> list[str]:
        return [arm for arm in (self.more, self.less) if arm]


class Finding(NamedTuple):
    title: str
    paper: str  # its figures: accuracy on MATH500, per cent
    claims: tuple[Claim, ...]
    notes: tuple[str, ...] = ()  # what was seen, and tried


FINDINGS = {
    "F0": Finding(
        "Without mid-training RL does little, unless the base has seen mathematics and questions",
        "Llama-3.2-3B 0 → 9.6, Qwen2.5-3B 14.2 → 67.0; branches of Llama 56.6 to 65.2",
        (Claim("a schooled base gains more than the base", "schooled", "base", "gain"),
         Claim("what was mid-trained gains more than the base", "long", "base", "gain"),
         Claim("long ends above short", "long", "short"), Claim("hybrid ends above short", "hybrid", "short"),
         Claim("long ends above hybrid", "long", "hybrid")),
        ("Long gains little where it starts high (seed 1: 66.0 → 72.2), hence the wide interval of its gain; "
         "after RL it is 60 to 71 points above the base in every seed. The schooled base has seen 15 % of "
         "short chains at a constant rate; RL brings their form out, and ends between stable and short.",
         "Hybrid ends between short and long in each seed, in the long form (68 to 77 tokens).")),
    "F1": Finding(
        "Clean web text before RL is better than noisy",
        "FineMath-4plus 11.0, MegaMath-Web-Pro 36.6, Pro-Max 31.8",
        (Claim("after RL, clean above noisy", "web", "noisy"),
         Claim("before RL, clean above noisy", "web", "noisy", "before")),
        ("After RL clean is above noisy in each seed, by 1.0, 9.6 and 10.2 points: too few seeds for so "
         "uneven a difference. In seed 2, RL from noisy text finds no chain at all.",)),
    "C": Finding(
        "What curation makes of a crawl is better to start RL from than the crawl",
        "Pro-Max, a curated and rewritten MegaMath-Web, 31.8 after RL; of the crawl no figure",
        (Claim("after RL, curated above the crawl", "curated", "crawl"),
         Claim("before RL, curated above the crawl", "curated", "crawl", "before"),
         Claim("after RL, clean text above curated", "web", "curated")),
        ("Curation keeps 62,000 to 68,000 of 160,000 pages, of which 64 to 70 % are of use (30 % in the "
         "crawl). Of the 10.4 points between crawl and clean text it closes 8.0 in the mean: all of them in "
         "seeds 1 and 3, none in seed 2, where GRPO finds the short form from clean text only.",)),
    "F2": Finding(
        "A tenth of question–answer data beside web text: short gives nothing, long a peak and a collapse",
        "web 36.6; with MegaMath-QA 34.6; with OpenR1 a peak of 47.6, then 7.2",
        (Claim("short above web alone", "qa_short", "web", paper=False),
         Claim("long above web alone", "qa_long", "web"),
         Claim("long falls after its best", "qa_long", "", "fall")),
        ("Before RL little shows of the tenth (1 to 4 %). GRPO finds the chains in ten steps (long, seed 1: "
         "0.6 → 44.5 % of 200 problems); then lengths stay at 66 to 75 tokens, below the cap: no collapse. "
         "Short chains help too, unlike in the paper: mostly on the easiest level, 66 % for 35 %.",
         "Tried first, with 800 steps of mid-training: nothing gets off the floor. Seeds 1, 2: web 1.8 → "
         "3.4 and 1.4 → 1.8 %, qa_short 1.6 → 4.4 and 1.6 → 1.6 %, qa_long 1.4 → 2.6 (8.5 % of 200 "
         "problems at step 30) and 0.8 → 2.2 %; seed 1: instruct_short 2.4 → 1.8 %.",)),
    "F3": Finding(
        "One per cent of instructions beside it helps",
        "with MegaMath-QA 34.6 → 40.8; with OpenR1 a peak of 47.6 → 50.6, then 0.0",
        (Claim("short with instructions above without", "instruct_short", "qa_short"),
         Claim("long with instructions above without", "instruct_long", "qa_long")),
        ("By seed, short with instructions ends 6.6 points below, 7.0 above and 3.6 below short without, "
         "long 0.8 above, 12.6 and 8.0 below. In seed 2 long with instructions has the long form (69 tokens) "
         "and level 1 (66 %) as without, but 21, 21, 7 % of levels 2 to 4, not 34, 41, 23 %.",)),
    "F4": Finding(
        "The complex template lifts the start of long, and a cap in stages keeps RL stable",
        "step 0: 0.2 → 33.0; with stages 52.4 at the end, without a decline",
        (Claim("before RL, complex above simple", "long_complex", "long", "before"),
         Claim("after RL, complex with stages above complex", "complex_staged", "long_complex"),
         Claim("after RL, complex with stages from 128 above complex", "complex_128", "long_complex"),
         Claim("after RL, simple with stages above simple", "long_staged", "long"),
         Claim("complex falls after its best", "long_complex", "", "fall")),
        ("Before RL the complex template, in which a tenth of the chains stand, brings out bare answers "
         "(`7 rings.`; 5 to 8 tokens in seeds 1 and 2). RL finds the long form by step 10 to 35, and ends "
         "5.8 points below the simple template. No run declines: long responses take 75 tokens of 224, so "
         "stages have nothing to mend.",
         "They can harm: a cap of 64 cuts long responses while RL chooses its form, and in seed 3 complex "
         "stays with short ones (20.4 %, 26 tokens); with stages from 128 on, tried then, not (62.0 %). In "
         "seed 1 it stays with them either way (30.6 and 30.0 %): even without stages the long form comes as "
         "late as step 35. In seed 2 it ends at 54.6 and 54.4 %, without stages at 55.4.",
         "The long stage was trained again for these arms: 64.2, 9.2, 35.8 % before RL by the simple "
         "template, where long of this table has 66.0, 11.0, 31.8.")),
    "F5": Finding(
        "More stable tokens, more after RL, though scores before RL barely move",
        "20B, 70B, 100B: 33.0, 38.8, 39.4",
        (Claim("all of stable above half", "stable", "stable_50"),
         Claim("half of stable above a quarter", "stable_50", "stable_25"),
         Claim("before RL, all above a quarter", "stable", "stable_25", "before", paper=False))),
    "F6": Finding(
        "More chains in the decay help, and level off past 30 %",
        "10 to 40 % of QA in a decay of 10B tokens: gains level off past 30 %",
        (Claim("40 % above 30 %", "long_40", "long", paper=False),
         Claim("30 % above 20 %", "long", "long_20"), Claim("20 % above 10 %", "long_20", "long_10"),
         Claim("long:short 20:10 above 10:20", "hybrid_20_10", "hybrid_10_20"),
         Claim("long:short 15:15 above 10:20", "hybrid", "hybrid_10_20")),
        ("The paper's order in each seed, 10 below 20 below 30 %, and level past it (40 % is below 30 in two "
         "seeds of three); but each step of it is of the size by which seeds differ. Long:short 10:20, 15:15 "
         "and 20:10 also stand in this order in each seed; at 10:20, seed 2 stays with the short form.",
         "What the share changes most is the start: 2, 9, 36, 61 % with 10 to 40 % of long chains. GRPO "
         "makes up for most of it within ten steps.")),
    "QA": Finding(
        "What is it about question–answer data, its form or its content?",
        "an open question of the paper",
        (Claim("questions and answers above the same as prose", "qa_short", "qa_prose"),
         Claim("that prose above web alone", "qa_prose", "web"),
         Claim("talk in question–answer form above web alone", "prose_qa", "web")),
        ("The content: the same short chains as running prose, without a question or a box, end where "
         "questions and answers do, and above web text in each seed (by 16.4, 16.4 and 13.0 points). The "
         "form with other content (who likes what) is 15.0 points above web text in seed 1, 3.4 and 0.8 "
         "below in the others.",
         "What the form gives is time: from questions and answers GRPO has the chains at step 10 (19 to 32 % "
         "of 200 problems), from prose at step 20 in one seed and 30 in two (2.5 to 3 % at step 10).")),
    "W": Finding(
        "What in this world gives long chains their advantage?",
        "a question of this project, whose world was designed",
        (Claim("short with one operation an equation above short", "short_one", "short"),
         Claim("long above short with one operation an equation", "long", "short_one"),
         Claim("long above long without pieces", "long", "long_whole"),
         Claim("long without pieces above short", "long_whole", "short")),
        ("One operation at a time. Short chains that write an equation for each operation, not for each "
         "person, start at 47 to 69 % and end where long does, with 32 tokens in place of 75. That long "
         "chains work out each operation in pieces shows no gain: 72.2, 65.8, 61.0 % with, 72.4, "
         "64.6, 68.6 without. By hand, on one seed: the log, What gives long chains their advantage?",)),
    "T": Finding(
        "A calculator within the chain of thought",
        "left for future work",
        (Claim("with a calculator above long", "tool", "long"),
         Claim("the same before RL", "tool", "long", "before")),
        ("A calculator mends no lost thread: single steps are right in 95 % of cases without it too (the "
         "log). The runs of seeds 1 to 3 learned what a row's end had cut off a result, 0.2 % of results' "
         "tokens; it is masked now.",)),
    "O": Finding(
        "Can the chains of a decay be the model's own? Right rollouts of RL from stable, and RL again",
        "left open: is an RL-friendly model possible without distillation from one that thinks long?",
        (Claim("own chains above RL from stable alone", "own", "stable"),
         Claim("before RL, own chains above short ones", "own", "short", "before"),
         Claim("own chains above short ones", "own", "short"),
         Claim("long ones above own chains", "long", "own")),
        ("The source is small: 596, 478 and 1,049 right responses of 7,680, each once, read 14, 19 and 8 "
         "times. They are short chains: what stable never writes, it cannot teach itself. `own` has had "
         "twice the GRPO steps of `stable`, and a decay, whose web text may help by itself: an arm without "
         "the chains was not run.",)),
}


def arms_of(finding: Finding) -> list[str]:
    return list(dict.fromkeys(arm for claim in finding.claims for arm in claim.arms))


# ---- Running -----------------------------------------------------------------------------------------------

OF_SEED = "--seed {seed} --out {out}"


def run_seed(out: str, seed: int, arms: list[str], jobs: int) -> None:
    """Run what of these arms is not there yet: first the stages that others stand on."""
    done = report.read_rl(out)
    if not (todo := [arm for arm in arms if arm not in done]):
        return
    Path(out, "logs").mkdir(parents=True, exist_ok=True)
    rl_only = {ARMS[arm].rl.split()[1] for arm in todo if not ARMS[arm].stage and "--branch" in ARMS[arm].rl}
    first = ["base --keep-every 600"]
    if not all(ARMS[arm].stage.startswith(("--branch base", CONTROLLED)) for arm in todo):
        first.append("stable --keep-every 600")  # the others stand on it
    for stage in first + sorted(rl_only):
        command(out, seed, f"midtrain.py --branch {stage} --threads {jobs} {OF_SEED}", stage.split()[0])
    todo += sorted({ARMS[arm].needs for arm in todo} - {"", *todo, *done})
    minutes = sum(ARMS[arm].minutes for arm in todo)
    bar = tqdm(desc=out, total=minutes, unit="min of one core")
    todo.sort(key=lambda arm: -ARMS[arm].minutes)
    with ThreadPoolExecutor(jobs) as pool:
        for later in (False, True):
            now = [arm for arm in todo if bool(ARMS[arm].needs) == later]
            for arm, _ in zip(now, pool.map(lambda arm: run_arm(out, arm, seed), now)):
                bar.update(ARMS[arm].minutes)


def run_arm(out: str, name: str, seed: int) -> None:
    arm = ARMS[name]
    files.write_json(Path(out) / f"logs/{name}.json", flags_of(name))
    for line in arm.data:
        command(out, seed, line, f"{name}-data")
    if arm.stage:
        command(out, seed, f"midtrain.py {arm.stage} --name {name} --threads 1 {OF_SEED}", name)
    command(out, seed, f"rl.py {arm.rl or f'--branch {name}'} --name {name} --threads 1 {OF_SEED}", name)


def flags_of(name: str) -> dict:
    return json.loads(json.dumps({"flags": ARMS[name][1:]}))


def command(out: str, seed: int, line: str, log: str) -> None:
    """Run python with these arguments, {out} and {seed} filled in; it prints to OUT/logs. ValueError if it
    fails, with the last line of that."""
    args = [part.format(out=out, seed=seed) for part in shlex.split(line)]
    path = Path(out) / "logs" / f"{log}.log"
    with open(path, "a", encoding="utf-8") as file:
        code = subprocess.run([sys.executable, *args], stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        last = path.read_text("utf-8").strip().rpartition("\n")[2]
        raise ValueError(f"python {shlex.join(args)} ended with {code}: {last} (all of it: {path})")


# ---- Results -----------------------------------------------------------------------------------------------


def result_of(out: str, seed: int, arm: str, rows: list[dict]) -> dict:
    """What is kept of a run, a line of findings.jsonl: its evaluations, which problems it had right (by step:
    how many there were, their bits in hex), the arm's flags, a hash of them and all settings but the seed."""
    right = {}
    for row in rows:
        evals = files.read_jsonl(Path(out) / f"rl-{arm}/evals/step_{row['step']:06d}.jsonl")
        bits = [x.get("correct", x["reward"] > 0) for x in evals]
        right[str(row["step"])] = [len(bits), np.packbits(bits).tobytes().hex()]
    settings = json.dumps([report.made_by(out, arm), ARMS[arm][1:]], sort_keys=True)
    kept = [{k: x for k, x in row.items() if k.startswith(("step", "eval_", "curve_"))} for row in rows]
    digest = hashlib.sha256(settings.encode()).hexdigest()[:16]
    return {"arm": arm, "seed": seed, "settings": digest, **flags_of(arm), "rows": kept, "right": right}


def read_results(path: Path) -> dict[tuple[str, int], dict]:
    """{(arm, seed): its line}; {} if there is no file yet. ValueError for a line of an arm as it once was."""
    results = {}
    for row in files.read_jsonl(path) if path.exists() else ():
        if row["arm"] not in ARMS or {"flags": row["flags"]} != flags_of(row["arm"]):
            what = f"the line of {row['arm']}, seed {row['seed']}, is of other flags than the arm's"
            raise ValueError(f"{path}: {what}: delete it")
        results[row["arm"], row["seed"]] = row
    return results


def gather(runs: str, seeds: Iterable[int], path: Path) -> dict[tuple[str, int], dict]:
    """The lines of a file, and of all runs that have ended since: these are added to it. ValueError for a run
    that was made otherwise than its line, or its arm, says."""
    results = read_results(path)
    for seed in seeds:
        for arm, rows in report.read_rl(out := f"{runs}/seed{seed}").items():
            if arm not in ARMS:
                continue
            new = result_of(out, seed, arm, rows)
            old = results.setdefault((arm, seed), new)
            plain = flags_of(arm) if ARMS[arm].stage == f"--branch {arm}" else None  # by make
            made = files.read_json(Path(out) / f"logs/{arm}.json", missing_ok=True) or plain
            if old["settings"] != new["settings"] or made != flags_of(arm):
                what = f"{out}/rl-{arm} was made with other settings than the arm, or its line in {path}"
                raise ValueError(f"{what}: delete that line, or {out}/{arm}, rl-{arm} and logs/{arm}.json")
            if old["right"] != new["right"]:
                files.print0(f"{out}/rl-{arm} ended otherwise than its line in {path}, which stays")
    if results:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_jsonl(path, (results[key] for key in sorted(results)))
    return results


def seeds_of(results: dict, arms: list[str]) -> list[int]:
    """The seeds that have all of these arms. ValueError if those of one arm were not made alike."""
    for arm in arms:
        made = {seed: row["settings"] for (name, seed), row in results.items() if name == arm}
        if len(set(made.values())) > 1:
            raise ValueError(f"the seeds of {arm} have different settings ({made}): keep equal ones' lines")
    return sorted(seed for seed in {seed for _, seed in results} if all((x, seed) in results for x in arms))


# ---- Comparing ---------------------------------------------------------------------------------------------


def correct(result: dict, step: int) -> np.ndarray:
    """(problems,) 1.0 where the greedy response after a step of GRPO was right."""
    n, bits = result["right"][str(step)]
    return np.unpackbits(np.frombuffer(bytes.fromhex(bits), np.uint8), count=n).astype(float)


def scores(result: dict, what: str) -> np.ndarray:
    """(problems,) what a claim compares, of one seed."""
    steps = [row["step"] for row in result["rows"]]
    if what == "fall":  # the best step is chosen on half of the problems, the fall measured on the others
        every = {step: correct(result, step) for step in steps}
        few = min(map(len, every.values()))  # problems that all evaluations have
        found, falls = {step: right[:few] for step, right in every.items()}, np.empty(few)
        half = np.arange(few) // 4 % 2 == 0  # four levels take turns: each half has all of them
        for chosen in (half, ~half):
            best = max(found, key=lambda step: found[step][chosen].mean())  # noqa: B023
            falls[~chosen] = (found[best] - found[steps[-1]])[~chosen]
        return falls
    after, before = correct(result, steps[-1]), correct(result, 0)
    return {"after": after, "before": before, "gain": after - before}[what]


STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # 97.5 % of t, 1, 2, … degrees of freedom


def interval(d: np.ndarray, draws: int = 2000) -> tuple[float, float, float]:
    """d (seeds, problems) → (mean, low, high), 95 %: a bootstrap over both, or Student's ± t·sd/√seeds of the
    seeds' means where that is wider. Of one seed: over its problems only."""
    rng = np.random.default_rng(0)
    seeds, problems = d.shape
    means = [d[np.ix_(rng.integers(seeds, size=seeds), rng.integers(problems, size=problems))].mean()
             for _ in range(draws)]
    low, high = map(float, np.quantile(means, (0.025, 0.975)))
    mean, wide = float(d.mean()), 0.0
    if seeds > 1:
        wide = STUDENT[min(seeds - 2, len(STUDENT) - 1)] * float(d.mean(1).std(ddof=1)) / seeds**0.5
    return mean, min(low, mean - wide), max(high, mean + wide)


def judge(claim: Claim, results: dict, seeds: list[int]) -> tuple[float, float, float, str]:
    """(mean, low, high, in words) of a claim, in points."""
    d = np.stack([scores(results[claim.more, seed], claim.what) for seed in seeds])
    if claim.less:
        d = d - np.stack([scores(results[claim.less, seed], claim.what) for seed in seeds])
    mean, low, high = (100 * x for x in interval(d))
    if len(seeds) == 1:
        return mean, low, high, "one seed: not judged"
    verdict = "shown" if low > 0 else "reversed" if high < 0 else "not shown"
    if not claim.paper:
        verdict += ", unlike in the paper" if low > 0 else ", nor in the paper"
    return mean, low, high, verdict


def section(key: str, results: dict, picture: Path) -> list[str]:
    """The lines of a finding: its arms, those that a claim can compare, a picture, what was seen."""
    finding, arms = FINDINGS[key], arms_of(FINDINGS[key])
    lines = [f"\n## {key}. {finding.title}\n", *("- " + described(arm) for arm in arms), ""]
    judged = {arm for claim in finding.claims if seeds_of(results, claim.arms) for arm in claim.arms}
    there = [arm for arm in arms if arm in judged]
    rows = {arm: [results[arm, seed]["rows"] for seed in seeds_of(results, [arm])] for arm in there}
    if rows:
        table = {arm: [(report.rl_rows({arm: x})[0], x) for x in each] for arm, each in rows.items()}
        report.plot_rl(rows, str(picture))
        lines += [report.seeds_table(table), *report.calls_lines(rows)]
        lines += [f"\n![Accuracy and length by GRPO step]({picture.name})\n"]
    if missing := ", ".join(arm for arm in arms if not seeds_of(results, [arm])):
        lines.append(f"Not measured yet: {missing}.")
    return [*lines, *(f"\n{note}" for note in finding.notes)]


def described(name: str) -> str:
    """An arm in Markdown, by its commands."""
    arm = ARMS[name]
    stage = f"`midtrain.py {arm.stage}`, then " if arm.stage else ""
    return f"{name}: {stage}`rl.py {arm.rl.replace('{out}', 'RUN') or f'--branch {name}'}`"


def summary(keys: list[str], results: dict) -> list[str]:
    """The lines of one table of all claims."""
    lines = ["\n| | the paper | here: claim | points, 95 % interval | seeds | |", "|---" * 6 + "|"]
    for key in keys:
        finding = FINDINGS[key]
        for i, claim in enumerate(finding.claims):
            seeds = seeds_of(results, claim.arms)
            begin = f"| {key if i == 0 else ''} | {finding.paper if i == 0 else ''} | {claim.text}"
            if not seeds:
                lines.append(f"{begin} | | 0 | not measured yet |")
                continue
            mean, low, high, verdict = judge(claim, results, seeds)
            lines.append(f"{begin} | {mean:+.1f} ({low:+.1f} to {high:+.1f}) | {len(seeds)} | {verdict} |")
    return lines


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
    if min(args.seeds, args.jobs) < 1:
        raise ValueError(f"--seeds {args.seeds} and --jobs {args.jobs} must be at least 1")
    arms = list(dict.fromkeys(arm for key in keys for arm in arms_of(FINDINGS[key])))
    seeds, to = range(1, args.seeds + 1), Path(args.to or args.runs)
    minutes = sum(ARMS[arm].minutes for arm in arms)
    each = ", ".join(f"{arm} {ARMS[arm].minutes:g}" for arm in arms)
    hours = (minutes + 14) * args.seeds / args.jobs / 60
    files.print0(f"{len(arms)} arms a seed, minutes of one core: {each}; base 2, stable 12")
    files.print0(f"about {hours:.1f} hours for all, if none is there yet")
    if args.dry:
        return
    results = gather(args.runs, seeds, to / "findings.jsonl")
    for seed in seeds if not args.report else ():
        run_seed(f"{args.runs}/seed{seed}", seed, [x for x in arms if (x, seed) not in results], args.jobs)
        results = gather(args.runs, [seed], to / "findings.jsonl")
    if not results:
        raise ValueError(f"neither {to}/findings.jsonl nor {args.runs} has a result: leave out --report")
    lines = ["# The paper's findings in the generated world", f"\n{__doc__.strip()}", *summary(keys, results)]
    for key in keys:
        lines += section(key, results, to / f"findings-{key}.png")
    files.write_text(to / "findings.md", "\n".join(lines))
    files.print0("\n".join(lines) + f"\nwrote {to}/findings.md")


if __name__ == "__main__":
    files.run_cli(main)
