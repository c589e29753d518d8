"""data/synth.py: splits that share no structure, right arithmetic, the same text from the same seed."""

import itertools
import random
import re

import pytest

import verify
from data import synth

EQUATION = re.compile(r"(\d+)([-+*/])(\d+)=(-?\d+)")


def right(a: str, op: str, b: str, c: str) -> bool:
    x, y, z = int(a), int(b), int(c)
    return z * y == x if op == "/" else z == {"+": x + y, "-": x - y, "*": x * y}[op]


def take(source: str, n: int, seed: int = 0, split: str = "train") -> list[str]:
    return list(itertools.islice(synth.documents(source, seed, split), n))


def test_splits_share_no_structure_and_no_text():
    rows = {split: synth.problems(split, 600, seed=3) for split in synth.SPLITS}
    for key in ("structure", "problem"):
        seen = [{row[key] for row in rows[split]} for split in synth.SPLITS]
        assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2], key
    for split in synth.SPLITS:
        assert len({row["structure"] for row in rows[split]}) > 150
        assert {row["level"] for row in rows[split]} == set(range(1, synth.MAX_LEVEL + 1))


def test_structure_does_not_know_the_order_of_summands():
    """ "Ben and Ann together" is the problem "Ann and Ben together": both must be in one split."""
    rng = random.Random(0)
    roles = [role for _ in range(2000) for role in synth.make_problem(rng, 3, "train").structure.split()]
    both = [role.removeprefix("both") for role in roles if role.startswith("both")]
    assert len(both) > 100 and all(a < c for a, _, c in both)


def test_documents_of_a_split_use_its_structures_only(monkeypatch):
    seen = []
    draw = synth.make_problem
    monkeypatch.setattr(synth, "make_problem", lambda *args: seen.append(draw(*args)) or seen[-1])
    for source in synth.SOURCES:
        take(source, 100, split="val")
    assert len(seen) > 300 and all(synth.split_of(p.structure) == "val" for p in seen)


def test_statements_determine_the_answer():
    """Replay a problem from its words alone, with a reader of its own, and get the stated answer."""
    for row in synth.problems("train", 400, seed=5):
        assert replay(row["problem"]) == int(row["answer"]), row


def replay(text: str) -> int:
    have: dict[str, int] = {}
    *statements, question = re.split(r"(?<=[.?]) ", text)
    for s in statements:
        who = re.findall(r"\b[A-Z][a-z]+\b", s.replace("Then ", "").replace("For each", ""))
        n = [int(x) for x in re.findall(r"\d+", s)]
        if m := re.match(r"(\w+) has (\d+) \w+\.$", s):
            have[m[1]] = n[0]
        elif "boxes" in s or "bags" in s:
            have[who[0]] += n[0] * n[1]
        elif "together" in s:
            have[who[0]] = have[who[1]] + have[who[2]]
        elif " more " in s and "than" in s:
            have[who[0]] = have[who[1]] + n[0]
        elif "fewer" in s:
            have[who[0]] = have[who[1]] - n[0]
        elif "times" in s:
            have[who[0]] = have[who[1]] * n[0]
        elif "For each" in s:
            have[who[1]] = have[who[0]] * n[0]
        elif "half" in s:
            have[who[0]] = have[who[1]] // 2
        elif "twice" in s:
            have[who[1]] = have[who[0]] // 2
        elif len(who) == 2 and "takes" in s:
            have[who[0]] += n[0]
            have[who[1]] -= n[0]
        elif len(who) == 2 and "gives" in s:
            have[who[0]] -= n[0]
            have[who[1]] += n[0]
        elif re.search("buys|finds|gets", s):
            have[who[0]] += n[0]
        elif re.search("loses|sells|gives", s):
            have[who[0]] -= n[0]
        else:
            raise AssertionError(s)
    asked = [have[w] for w in re.findall(r"\b[A-Z][a-z]+\b", question) if w in have]
    if len(asked) == 1:
        return asked[0]
    return sum(asked) if "total" in question or "together" in question else abs(asked[0] - asked[1])


@pytest.mark.parametrize("source", ["web", "short_cot", "instruct"])
def test_clean_sources_have_no_wrong_equation(source):
    equations = [e for text in take(source, 300) for e in EQUATION.findall(text)]
    assert len(equations) > 50 and all(right(*e) for e in equations)


def test_noisy_source_has_wrong_ones():
    equations = [e for text in take("noisy", 300) for e in EQUATION.findall(text) if int(e[2])]
    assert 0.1 < sum(not right(*e) for e in equations) / len(equations) < 0.5


def test_long_thoughts_slip_notice_and_end_right():
    slips = 0
    for text in take("long_cot", 300):
        problem, thoughts = re.split(r"\n(?:Answer:\s)?<think>\n", re.sub(r"^Question:\s", "", text))
        thoughts, answer = thoughts.split("\n</think>\n")
        for line in thoughts.split("\n"):
            equations = EQUATION.findall(line)
            wrong = [e for e in equations if not right(*e)]
            slips += "Again" in line
            assert len(wrong) == ("Again" in line), line  # a wrong result is there where it is taken back
            assert right(*equations[-1]), line
        assert verify.reward(answer, str(replay(problem))) == 1.0
    assert slips > 25


def test_solutions_earn_the_reward_and_other_answers_do_not():
    for row in synth.problems("test", 100):
        assert verify.reward(row["solution"], row["answer"]) == 1.0
        assert verify.reward(row["solution"], str(int(row["answer"]) + 1)) == -1.0


def test_same_seed_same_text_other_seed_other_text():
    for source in synth.SOURCES:
        assert take(source, 20, seed=1) == take(source, 20, seed=1) != take(source, 20, seed=2)
    assert synth.problems("test", 50, 1) == synth.problems("test", 50, 1)


@pytest.mark.parametrize("a,op,b", [(17, "+", 8), (23, "-", 9), (35, "+", 17), (40, "-", 12), (7, "+", 3)])
def test_pieces_of_a_step_are_right(a, op, b):
    equations = EQUATION.findall(synth.work_out(a, op, b))
    assert all(right(*e) for e in equations)
    assert not equations or int(equations[-1][3]) == (a + b if op == "+" else a - b)


def test_slips_are_wrong_and_never_negative():
    rng = random.Random(0)
    for _ in range(300):
        p = synth.make_problem(rng, 3, "train")
        for s in p.steps:
            wrong = synth.slipped(rng, s)
            assert wrong != s.result and wrong >= 0


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="valid: general"):
        next(synth.documents("poems", 0))
    with pytest.raises(ValueError, match="valid: train"):
        synth.problems("dev", 1)
