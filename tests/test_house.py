"""The house: the idea first in every file, lines and functions that fit a screen, a README that is true."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("model.py", "midtrain.py", "rl.py", "sample.py", "verify.py")
CODE = sorted([*ROOT.glob("*.py"), *ROOT.glob("data/*.py"), *ROOT.glob("assets/*.py")])


def spine(name: str) -> int:
    """Lines before the ruler that ends a file's idea."""
    lines = (ROOT / name).read_text().splitlines()
    return next(i for i, line in enumerate(lines) if line.startswith("# ---- Below: "))


def test_every_program_begins_with_its_idea():
    assert sum(map(spine, PROGRAMS)) <= 2600
    assert spine("model.py") <= 400 and spine("verify.py") <= 200


@pytest.mark.parametrize("path", [*CODE, *sorted(ROOT.glob("tests/*.py"))], ids=lambda path: path.name)
def test_a_line_and_a_function_fit_a_screen(path):
    text = path.read_text()
    long = [i for i, line in enumerate(text.splitlines(), 1) if len(line) > 110]
    assert not long, f"{path.name}: lines {long} are longer than 110 columns"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef) and path in CODE:
            assert node.end_lineno - node.lineno < 65, f"{path.name}: {node.name} does not fit a screen"


def test_nothing_heavy_is_imported_for_a_verdict():
    import subprocess
    import sys

    heavy = "import sys, verify; print({'torch', 'numpy', 'sympy', 'datasets'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", heavy], cwd=ROOT, text=True) == "set()\n"


def test_the_readme_is_a_first_screen_and_its_reading_order_is_true():
    text = (ROOT / "README.md").read_text()
    lines = text.splitlines()
    assert len(lines) <= 200 and len(text.split()) <= 2500 and max(map(len, lines)) <= 120
    rows = re.findall(r"^\| `([\w/.]+)` \| (\d*) \| (\d+) \|", text, re.M)
    assert {name for name, _, _ in rows} >= {*PROGRAMS, "data/synth.py", "data/prepare.py", "data/files.py"}
    for name, begin, whole in rows:
        count = len((ROOT / name).read_text().splitlines())
        assert abs(int(whole) - count) <= 0.03 * count, f"{name} has {count} lines, the README says {whole}"
        if begin:
            assert abs(int(begin) - spine(name)) <= 0.03 * spine(name), f"{name}: {spine(name)} of spine"
