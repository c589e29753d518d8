"""Tables and pictures of runs, made of what midtrain.py and rl.py leave behind."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

pytest.importorskip("matplotlib")
from assets import report  # noqa: E402


def show(monkeypatch, *folders) -> None:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, folders)])
    report.main()


def write(folder: Path, rows: list[dict], settings: dict) -> None:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_stages(tmp_path, monkeypatch, capsys):
    settings = {"batch": 8, "seq_len": 64}
    for stage in ("base", "stable", "short"):
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
    assert (
        "| long | 10.0% (10.0% to 10.0%) | 50.0% (50.0% to 50.0%) | +40.0 points" in capsys.readouterr().out
    )
    assert "by level" not in "".join(lines)  # of problems that have none
    for name in ("long", "base"):
        levels = [row | {"eval_accuracy/1": 2 * row["eval_accuracy"], "eval_accuracy/2": 0} for row in rows]
        write(tmp_path / f"rl-{name}", [row | {"steps": row["step"] or 3} for row in levels], {})
    show(monkeypatch, tmp_path, tmp_path)
    text = capsys.readouterr().out  # of the folder, of the folder, of both
    assert text.count("| start, before → after, by level | 1 | 2 |\n|---|---|---|\n") == 3
    assert text.count("| long | 20 → 180 % | 0 → 0 % |") == 3
    other = tmp_path / "other"
    other.mkdir()
    write(other / "rl-hybrid", [row | {"steps": row["step"] or 3} for row in rows], {})
    with pytest.raises(ValueError, match="do not hold runs from the same starting points"):
        show(monkeypatch, tmp_path, other)
