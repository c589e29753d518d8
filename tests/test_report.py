"""Tables and pictures of runs, made of what midtrain.py and rl.py leave behind."""

import itertools
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

pytest.importorskip("matplotlib")
import midtrain  # noqa: E402
import rl  # noqa: E402
from assets import behaviours, findings, report  # noqa: E402
from data import recipes  # noqa: E402


def show(monkeypatch, *folders) -> None:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, folders)])
    report.main()


def write(folder: Path, rows: list[dict], settings: dict) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_stages(tmp_path, monkeypatch, capsys):
    for stage, below in (("base", "random"), ("stable", "base"), ("short", "stable")):
        settings = {"batch": 8, "seq_len": 64, "stage": stage, "starts_from": below}
        rows = [{"step": s, "loss": 5.0 - s} for s in (1, 2, 3, 4)]
        for row in rows[1::2]:
            row |= {"val_loss": 4.5 - row["step"], "bits_per_byte": 2.25}
        rows[-1] |= {"share/web": 0.75, "share/short_cot": 0.25, "epochs/web": 2.125, "epochs/short_cot": 0.5}
        write(tmp_path / stage, rows, settings)
    show(monkeypatch, tmp_path)
    table = (tmp_path / "midtrain.md").read_text().splitlines()
    assert table == capsys.readouterr().out.splitlines()[:-1] and len(table) == 5
    seen = "web 75.0%, 2.1 times; short_cot 25.0%, 0.5 times"
    assert table[-1] == f"| short | 4 | 2,048 | 4.000 | 1.000 | 0.500 | 2.250 | {seen} |"
    assert (tmp_path / "midtrain.png").stat().st_size > 9000
    whole = (tmp_path / "short/metrics.jsonl").read_text()
    (tmp_path / "short/metrics.jsonl").write_text(
        whole + '{"step": 5, "loss": null}\n{"step": 6, "lo'
    )  # killed
    (tmp_path / "stable/metrics.jsonl").write_text("")
    show(monkeypatch, tmp_path)
    table = (tmp_path / "midtrain.md").read_text()
    assert "| short | 5 | 2,560 | 4.000 | 1.000 | 0.500 | 2.250 | not finished |" in table
    assert "stable" not in table
    with pytest.raises(FileNotFoundError, match="no stage and no finished rl-"):
        show(monkeypatch, tmp_path / "none")


def test_rl(tmp_path, monkeypatch, capsys):
    for name, after, last in (("long", 0.5, 5), ("base", 0.1, 5), ("short", 0.9, 3)):  # short was interrupted
        ends = ((0, 0.1), (last, after))
        rows = [
            {"step": s, "steps": 5, "eval_n": 100, "eval_accuracy": a, "eval_length": 50 + s} for s, a in ends
        ]
        write(tmp_path / f"rl-{name}", rows, {})
    show(monkeypatch, tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == f"wrote {tmp_path}/report.md and {tmp_path}/report.png"
    assert (tmp_path / "report.png").read_bytes()[:4] == b"\x89PNG"
    assert lines[2].startswith("| base | 10.0%") and "| +40.0 points | 50 | 55 | 5 |" in lines[3]
    assert not any("short" in line for line in lines)
    assert report.rl_rows(report.read_rl(tmp_path))[1]["after_low"] == pytest.approx(0.4038, abs=1e-3)
    show(monkeypatch, tmp_path, tmp_path)  # over seeds
    assert "| long | 10.0% | 50.0% | 10.0 → 50.0, 10.0 → 50.0 | +40.0 points | 50 | 55 |" in (
        tmp_path / "seeds.md").read_text()
    assert (tmp_path / "seeds.png").stat().st_size > 9000
    assert "by level" not in "".join(lines)  # of problems that have none
    for name in ("long", "base"):
        levels = [row | {"eval_accuracy/1": 2 * row["eval_accuracy"], "eval_accuracy/2": 0} for row in rows]
        write(tmp_path / f"rl-{name}", [row | {"steps": row["step"] or 3} for row in levels], {})
    show(monkeypatch, tmp_path, tmp_path)
    text = capsys.readouterr().out  # of the folder, of the folder, of both
    assert text.count("| start, before → after, by level | 1 | 2 |\n|---|---|---|\n") == 3
    assert text.count("| long | 20 → 180 % | 0 → 0 % |") == 3


def test_only_seeds_of_one_experiment_are_averaged(tmp_path):
    """Other settings, of RL or of a stage below, make another experiment, whatever its name; what follows
    from the seed does not."""
    ends = [{"step": s, "steps": 3, "eval_n": 100, "eval_accuracy": s / 10, "eval_length": 9} for s in (0, 3)]
    stage = {"stage": "controlled", "starts_from": "random", "mixture": {"web": 1.0}, "seed": 1, "data": "a"}
    changes = ({}, {"seed": 2, "data": "b"}, {"mixture": {"noisy": 1.0}}, {})
    for i, change in enumerate(changes):
        run = tmp_path / str(i)
        run.mkdir()
        write(run / "mine", [{"step": 1, "loss": 1.0}], stage | change)
        rl = {"branch": "mine", "seed": i, "weights": str(i), "lr": 2e-4 if i == 3 else 1e-4}
        write(run / "rl-mine", ends, rl)
    outs = [str(tmp_path / str(i)) for i in range(4)]
    found = {name: len(group) for name, group in report.group_seeds(outs).items()}
    assert found == {f"mine ({outs[0]}, {outs[1]})": 2, f"mine ({outs[2]})": 1, f"mine ({outs[3]})": 1}
    assert list(report.group_seeds(outs[:2])) == ["mine"]
    assert list(report.read_stages(outs[0])) == ["mine"]


def test_what_responses_do():
    """Pieces, checks, slips taken back, lines again; and how often a sum is right."""
    long = (
        "<think>\nBen has 47 hats.\nBen finds 38 hats. 47+38: 40+30=70, 7+8=14, no, 7+8=15, 70+15=85."
        " Check 85-38=47.\n</think>\nThe answer is \\boxed{85}.")
    wrong = "Ben has 10-3+1=9. Check 9-1=8. Ben has 2*3=6.\nBen has 2*3=6.\nBen has 2*3=6."
    rows = [{"response": long, "reward": 1, "tokens": 40}, {"response": wrong, "reward": -1, "tokens": 10}]
    assert behaviours.measure(rows) == {
        "splits": 0.5, "checks": 1.0, "mends": 0.5, "restarts": 0.5, "checks, real": 0.5, "mends, real": 1.0,
        "steps": 6 / 7, "tokens, right": 40, "tokens, wrong": 10}
    assert behaviours.measure(rows[1:])["mends, real"] is None
    assert behaviours.is_right("24/2+5", "17") and not behaviours.is_right("7/0", "7")


def test_report_of_behaviours(tmp_path, monkeypatch, capsys):
    run = tmp_path / "rl-long"
    for folder in ("rollouts", "evals"):
        (run / folder).mkdir(parents=True)
        for step in range(3):
            row = {"problem": "1 + 1?", "gold": "2", "response": f"1+1={step}", "tokens": 3 + step}
            row["reward"] = 1.0 if step == 2 else -1.0
            (run / folder / f"step_{step:06d}.jsonl").write_text(json.dumps(row) + "\n")
    show(monkeypatch, tmp_path, "--behaviours")
    text = capsys.readouterr().out
    assert "| long, 0 to 0 | 0.0% |" in text and "| long, 2 to 2 | 0.0% |" in text
    assert "**long**: 1 + 1? (answer 2)" in text and (tmp_path / "behaviours.png").stat().st_size > 9000
    with pytest.raises(FileNotFoundError, match="no rl-"):
        show(monkeypatch, tmp_path / "none", "--behaviours")


def test_findings(tmp_path, monkeypatch, capsys):
    """An interval over seeds and problems; claims that hold, fail or are undecided; what is run."""
    mean, low, high = findings.interval(np.array([[1.0, 0.0, 1.0, 1.0] * 50] * 2))
    assert mean == 0.75 and 0.65 < low < mean < high < 0.85
    assert findings.interval(np.ones((2, 9))) == (1.0, 1.0, 1.0)
    assert findings.interval(np.array([[1.0, 0.0] * 50]))[1:] == pytest.approx((0.4, 0.6), abs=0.01)
    # few seeds that differ: by hand 0.5 ± 12.71 · 0.566 / √2, and 0.5 ± 4.30 · 0.4 / √3
    for each, wide in (((0.9, 0.1), 5.08), ((0.1, 0.5, 0.9), 0.993)):
        interval = findings.interval(np.array([[x] * 50 for x in each]))
        assert interval == pytest.approx((0.5, 0.5 - wide, 0.5 + wide), abs=0.01)
    # the best step of fours 1 and 3 is 20, of 2 and 4 it is 10, whose fall is measured on 1 and 3
    bits = {0: [0] * 16, 10: [1] * 8 + [1, 0] * 4, 20: [1, 1, 1, 1, 0, 0, 0, 0] * 2}
    marks = {str(step): [16, np.packbits(x).tobytes().hex()] for step, x in bits.items()}
    fall = findings.scores({"rows": [{"step": step} for step in bits], "right": marks}, "fall")
    assert fall.tolist() == [0] * 8 + [0, -1, 0, -1] + [0] * 4
    right = {"web": (0, 30), "noisy": (0, 10)}
    for seed, (arm, ends) in itertools.product((1, 2), right.items()):
        run = tmp_path / f"seed{seed}" / f"rl-{arm}"
        (run / "evals").mkdir(parents=True)
        rows = []
        for step, n in zip((0, 3), ends):
            marks = [{"reward": 1.0 if i < n else -1.0} for i in range(40)]
            (run / f"evals/step_{step:06d}.jsonl").write_text("".join(json.dumps(m) + "\n" for m in marks))
            rows.append({"step": step, "steps": 3, "eval_n": 40, "eval_accuracy": n / 40, "eval_length": 9})
        write(run, rows, {"branch": arm, "seed": seed})
        (run.parent / "logs").mkdir(exist_ok=True)
        (run.parent / f"logs/{arm}.json").write_text(json.dumps(findings.flags_of(arm)))
    monkeypatch.setattr(sys, "argv", ["findings", "--only", "F1", "--seeds", "2", "--runs", str(tmp_path)])
    findings.main()  # nothing is left to run
    text = (tmp_path / "findings.md").read_text()
    assert "| after RL, clean above noisy | +50.0 (+35.0 to +65.0) | 2 | shown |" in text
    assert "| before RL, clean above noisy | +0.0 (+0.0 to +0.0) | 2 | not shown |" in text
    assert "| web | 0.0% | 75.0% | 0.0 → 75.0, 0.0 → 75.0 |" in text
    stage = "`midtrain.py --branch controlled --steps 2400 --mix web`"
    assert f"- web: {stage}, then `rl.py --branch web`" in text
    assert (tmp_path / "findings-F1.png").stat().st_size > 9000
    for none in ("--seeds", "--jobs"):
        monkeypatch.setattr(sys, "argv", ["findings", "--runs", str(tmp_path), none, "0"])
        with pytest.raises(ValueError, match="--seeds . and --jobs . must be at least 1"):
            findings.main()
    results = findings.read_results(tmp_path / "findings.jsonl")
    assert findings.judge(findings.FINDINGS["F1"].claims[0], results, [1])[3] == "one seed: not judged"
    ran = []
    monkeypatch.setattr(findings, "command", lambda out, seed, line, log: ran.append(line))
    monkeypatch.setattr(sys, "argv", ["findings", "--only", "F5", "--seeds", "1", "--runs", str(tmp_path)])
    findings.main()
    assert "\nNot measured yet: stable, stable_50, stable_25." in (tmp_path / "findings.md").read_text()
    of_seed = "--seed {seed} --out {out}"
    stages = [f"midtrain.py --branch {x} --keep-every 600 --threads 2 {of_seed}" for x in ("base", "stable")]
    assert ran[:2] == stages
    assert f"rl.py --ckpt {{out}}/stable@600 --name stable_25 --threads 1 {of_seed}" in ran
    ran.clear()
    findings.run_seed(f"{tmp_path}/seed1", 1, ["own"], 2)  # what it is made of comes first
    assert [" ".join(line.split()[:3]) for line in ran[2:]] == [
        "midtrain.py --branch stable", "rl.py --branch stable", "-m data.prepare --out",
        "midtrain.py --branch long", "rl.py --branch own"]
    ran.clear()
    findings.run_seed(f"{tmp_path}/seed3", 3, ["noisy"], 2)  # stands on the base: no stable stage
    assert [" ".join(line.split()[1:3]) for line in ran] == [
        "--branch base", "--branch controlled", "--branch noisy"]
    shutil.rmtree(tmp_path / "seed1")  # its lines stay, and are not run again
    ran.clear()
    monkeypatch.setattr(sys, "argv", ["findings", "--only", "F1", "--seeds", "2", "--runs", str(tmp_path)])
    findings.main()
    assert (tmp_path / "findings.md").read_text() == text and not ran
    (tmp_path / "seed2/rl-web/config.json").write_text(json.dumps({"branch": "web", "lr": 3.0}))
    with pytest.raises(ValueError, match="seed2/rl-web was made with other settings than the arm"):
        findings.main()
    lines = (tmp_path / "findings.jsonl").read_text()
    (tmp_path / "findings.jsonl").write_text("".join(x for x in lines.splitlines(True) if '"seed": 1' in x))
    with pytest.raises(ValueError, match="the seeds of web have different settings"):
        findings.main()
    (tmp_path / "findings.jsonl").write_text(lines)
    (tmp_path / "seed2/rl-web/config.json").write_text(json.dumps({"branch": "web", "seed": 2}))
    made = tmp_path / "seed2/logs/web.json"
    made.write_text('{"flags": ["--steps 800"]}')
    with pytest.raises(ValueError, match="seed2/rl-web was made with other settings"):
        findings.main()
    made.unlink()  # by hand, nobody knows how
    with pytest.raises(ValueError, match="seed2/rl-web was made with other settings"):
        findings.main()
    (tmp_path / "findings.jsonl").write_text(lines.replace("--mix web", "--mix noisy"))
    with pytest.raises(ValueError, match="of web, seed 1, is of other flags than the arm's: delete it"):
        findings.main()
    (tmp_path / "findings.jsonl").unlink()
    monkeypatch.setattr(sys, "argv", ["findings", "--report", "--runs", str(tmp_path / "none")])
    with pytest.raises(ValueError, match="neither .*findings.jsonl nor .* has a result"):
        findings.main()
    monkeypatch.setattr(sys, "argv", ["findings", "--only", "F9"])
    with pytest.raises(ValueError, match="no finding F9 .valid: F0, F1"):
        findings.main()


def test_every_arm_has_flags_that_the_programs_know(monkeypatch):
    for name, arm in findings.ARMS.items():
        monkeypatch.setattr(sys, "argv", ["rl.py", *(arm.rl or f"--branch {name}").split(), "--name", name])
        rl.check_args(rl.parse_args())
        monkeypatch.setattr(sys, "argv", ["midtrain.py", *(arm.stage or "--branch base").split()])
        args = midtrain.parse_args()
        mixture = midtrain.resolve_mixture(args.mix, "tiny")
        added = {part.split("=")[0] for line in arm.data for part in line.split() if "=" in part}
        assert set(mixture) <= set(recipes.KINDS["tiny"]) | added and added <= set(mixture)
        assert not mixture or sum(mixture.values()) == pytest.approx(1)
    claimed = {arm for finding in findings.FINDINGS.values() for arm in findings.arms_of(finding)}
    assert claimed == set(findings.ARMS)
