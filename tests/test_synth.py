"""data/synth.py: splits that share no structure, right arithmetic, the same text from the same seed."""

import itertools
import random
import re

import pytest

import verify
from data import prompts, synth

EQUATION = re.compile(r"(?<![-+*/\d])(\d+)([-+*/])(\d+)=(-?\d+)")

SEVERAL = re.compile(r"\d[-+*/]\d+[-+*/]\d")  # operations in one look


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


def test_every_level_has_held_out_structures():
    for split in ("val", "test"):
        rows = synth.problems(split, 500)
        kinds = {level: {row["structure"] for row in rows if row["level"] == level} for level in (1, 2, 3, 4)}
        assert len(kinds[1]) >= 8 and len(kinds[2]) >= 20 and min(len(kinds[3]), len(kinds[4])) >= 50


def test_structure_does_not_know_the_order_of_two_who_are_asked_about():
    """ "Ben and Ann together" is the question "Ann and Ben together", and who is ahead lies in the
    numbers: both must be in one split."""
    rng = random.Random(0)
    ends = [synth.make_problem(rng, 3, "train").structure.split()[-1] for _ in range(2000)]
    pairs = [re.fullmatch(r"(?:total|difference)(\d)(\d)", end) for end in ends]
    assert sum(map(bool, pairs)) > 100 and all(m[1] < m[2] for m in pairs if m)


def test_level_is_the_number_of_operations():
    """Of the long chain too, in which each operation has a place of its own behind its sentence."""
    rng = random.Random(0)
    for i in range(400):
        p = synth.make_problem(rng, i % synth.MAX_LEVEL + 1, "train")
        assert len(p.steps) == i % synth.MAX_LEVEL + 1 and p.steps[-1].result <= synth.MAX_COUNT
        lines = synth.long_thoughts(rng, p, slips=0, checks=0).split("\n")
        assert [line.startswith(x) for line, x in zip(lines, p.sentences)] == [True] * len(p.sentences)
        assert sum("=" in line for line in lines) == len(p.steps)


def test_short_chains_write_one_equation_a_person_and_long_ones_one_operation():
    compound = 0
    for row in synth.problems("train", 400):
        people = re.findall(r"(\w+) has \d+[-+*/]", row["solution"])
        assert len(people) == len(set(people)), row
        compound += (several := bool(SEVERAL.search(row["solution"])))
        assert not (several and row["level"] == 1)
    assert 120 < compound < 250
    assert not any(map(SEVERAL.search, take("long_cot", 200)))


def test_a_tenth_of_the_chains_is_in_each_of_the_templates():
    for source in ("short_cot", "long_cot"):
        texts = take(source, 1000)
        for template in prompts.TEMPLATES.values():
            begin, end = template("\0").split("\0")
            assert 60 < sum(text.startswith(begin) and end in text for text in texts) < 140


def test_base_pages_go_on_behind_a_bare_answer():
    pages = take("general", 50)
    answers = [page[m.end() :] for page in pages for m in re.finditer(r"\nAnswer:\s", page)]
    assert len(answers) > 60 and sum(len(rest.split()) > 20 for rest in answers) > 0.9 * len(answers)


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
    for text in take("long_cot", 400):
        head, thoughts = text.split("<think>\n")
        problem = head.removeprefix(prompts.complex("").removesuffix("\nAssistant:"))
        problem = re.sub(r"^Question:\s|\n(Answer:\s|Assistant:)?$", "", problem)
        thoughts, answer = thoughts.split("\n</think>\n")
        for line in thoughts.split("\n"):  # a wrong result is taken back at once
            wrong = [e for e in EQUATION.findall(line) if not right(*e)]
            assert re.findall(r"(\d+)([-+*/])(\d+)=(-?\d+), no, \1\2\3=", line) == wrong, line
            slips += len(wrong)
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


def test_pieces_of_an_operation_are_right_and_within_one_look():
    """All that can come up: each piece has a number below ten or a multiple of ten, the last the result."""
    for a in range(1, synth.MAX_COUNT + 1):
        for op, numbers in (("+", range(1, 100 - a)), ("-", range(1, a)), ("*", (2, 3, 4)), ("/", (2,))):
            for b in numbers:
                if op == "/" and a % 2:
                    continue
                parts = synth.pieces(a, op, b)
                assert synth.compute(*parts[-1]) == synth.compute(a, op, b)
                for x, o, y in parts:
                    assert (min(x, y) < 10 or 0 in (x % 10, y % 10)) and (o != "/" or x % y == 0), (a, op, b)
                text = synth.work_out(a, op, b)
                assert all(right(*e) for e in EQUATION.findall(text))
                assert text.startswith(f"{a}{op}{b}") and text.endswith(f"={synth.compute(a, op, b)}")


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="valid: general"):
        next(synth.documents("poems", 0))
    with pytest.raises(ValueError, match="valid: train"):
        synth.problems("dev", 1)
