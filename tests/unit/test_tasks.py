"""Generated tasks: distinct, repeatable, solvable, and never the same problem in training and held out."""

import re
from fractions import Fraction

import pytest

from slothrl.errors import UserError
from slothrl.tasks import TASKS, arithmetic, countdown, generate


def value_of(expression: str) -> Fraction:
    """Exact value; every number becomes a Fraction, so that division does not round."""
    assert re.fullmatch(r"[0-9+\-*/() ]+", expression)
    return eval(re.sub(r"\d+", r"Fraction(\g<0>)", expression), {"Fraction": Fraction})


def prompts(rows):
    return [row["prompt"] for row in rows]


def test_one_digit_sums_are_all_hundred_once_and_shuffled():
    rows = arithmetic(1000, seed=0)
    assert {(row["a"], row["b"]) for row in rows} == {(a, b) for a in range(10) for b in range(10)}
    assert len(rows) == 100
    assert prompts(rows) != sorted(prompts(rows))
    assert all(row["prompt"] == f"{row['a']} + {row['b']}" for row in rows)
    assert all(row["answer"] == str(row["a"] + row["b"]) for row in rows)


@pytest.mark.parametrize(
    ("knobs", "low", "high"),
    [({"digits": 2}, 10, 99), ({"digits": 2, "min_digits": 1}, 0, 99), ({"digits": 9}, 10**8, 10**9 - 1)],
)
def test_operands_have_the_asked_digits(knobs, low, high):
    rows = arithmetic(500, seed=3, **knobs)
    operands = [row[name] for row in rows for name in "ab"]
    assert low <= min(operands) and max(operands) <= high
    assert len(set(prompts(rows))) == 500


def test_all_operations_are_drawn_and_right():
    rows = arithmetic(300, seed=1, digits=2, operations=["+", "-", "*"])
    assert {row["operation"] for row in rows} == {"+", "-", "*"}
    assert all(value_of(row["prompt"]) == int(row["answer"]) for row in rows)
    assert any(row["answer"].startswith("-") for row in rows)


@pytest.mark.parametrize("digits", [1, 3, 9])
def test_a_larger_size_only_appends(digits):
    few, many = arithmetic(20, seed=5, digits=digits), arithmetic(60, seed=5, digits=digits)
    assert many[:20] == few
    assert arithmetic(20, seed=6, digits=digits) != few


def test_a_large_space_can_be_used_up():
    assert len(set(prompts(arithmetic(10**5, seed=0, digits=2, operations="+-*")))) == 3 * 90**2


@pytest.mark.parametrize("numbers", [2, 3, 6])
def test_countdown_solutions_use_each_number_once_and_hit_the_target(numbers):
    rows = countdown(200, seed=2, numbers=numbers, max_number=25, max_target=60)
    assert len(rows) == 200
    for row in rows:
        assert value_of(row["answer"]) == row["target"]
        assert sorted(map(int, re.findall(r"\d+", row["answer"]))) == sorted(row["numbers"])
        assert len(row["numbers"]) == numbers and max(row["numbers"]) <= 25 and 1 <= row["target"] <= 60
        assert str(row["target"]) in row["prompt"] and ", ".join(map(str, row["numbers"])) in row["prompt"]


def test_countdown_problems_differ_beyond_the_order_of_their_numbers():
    rows = countdown(400, seed=0, numbers=2, max_number=9, max_target=30)
    assert len({(*sorted(row["numbers"]), row["target"]) for row in rows}) == len(rows)


def test_countdown_gives_up_on_a_used_up_space():
    rows = countdown(500, seed=0, numbers=2, max_number=2, max_target=100)
    # 1,1: 1 2 (0 is no target); 1,2: 1 2 3; 2,2: 1 4. Division 1/2 is no whole number.
    assert {(*sorted(row["numbers"]), row["target"]) for row in rows} == {
        (1, 1, 1), (1, 1, 2), (1, 2, 1), (1, 2, 2), (1, 2, 3), (2, 2, 1), (2, 2, 4),
    }  # fmt: skip


@pytest.mark.parametrize("source", list(TASKS))
def test_held_out_problems_are_never_trained_on_and_stay_the_same(source):
    train, held_out = generate(source, 50, 20, seed=7)
    assert (len(train), len(held_out)) == (50, 20)
    assert not set(prompts(train)) & set(prompts(held_out))
    assert generate(source, 50, 20, seed=7) == (train, held_out)
    assert generate(source, 500, 20, seed=7)[1] == held_out
    assert generate(source, 50, 20, seed=8)[1] != held_out


def test_a_tiny_space_keeps_eval_size_and_trains_on_the_rest():
    train, held_out = generate("arithmetic", 1000, 30, seed=0, digits=1)
    assert (len(train), len(held_out)) == (70, 30)
    assert not set(prompts(train)) & set(prompts(held_out))
    assert len(generate("arithmetic", 1000, 99, seed=0)[0]) == 1
    assert generate("arithmetic", 5, 0, seed=0)[1] == []


@pytest.mark.parametrize(
    ("source", "size", "eval_size", "task", "message"),
    [
        ("arithmetic", 10, 100, {}, r"only 100 different problems.*data\.eval_size=100"),
        ("arithmetc", 10, 1, {}, r"did you mean 'arithmetic'\?.*arithmetic, countdown"),
        ("arithmetic", 10, 1, {"digit": 2}, r"data\.task\.digit is no knob.*'digits'.*digits, operations, min_digits"),
        ("arithmetic", 10, 1, {"digits": "2"}, r"data\.task\.digits must be a whole number from 1 to 9, not '2'"),
        ("arithmetic", 10, 1, {"digits": 1, "min_digits": 2}, r"data\.task\.min_digits .* from 1 to 1, not 2"),
        ("arithmetic", 10, 1, {"operations": ["+", "/"]}, r"data\.task\.operations must be some of \+, -, \*.*'/'"),
        ("arithmetic", 10, 1, {"operations": []}, r"data\.task\.operations"),
        ("arithmetic", 10, 1, {"operations": 3}, r"data\.task\.operations"),
        ("arithmetic", 0, 1, {}, r"data\.train_size"),
        ("arithmetic", 1, -1, {}, r"data\.eval_size"),
        ("countdown", 10, 1, {"n": 3}, r"data\.task\.n is no knob of countdown.*numbers, max_number, max_target"),
        ("countdown", 10, 1, {"numbers": 1}, r"data\.task\.numbers must be a whole number from 2 to 6"),
        ("countdown", 10, 1, {"max_target": True}, r"data\.task\.max_target"),
    ],
)
def test_mistakes_name_the_knob(source, size, eval_size, task, message):
    with pytest.raises(UserError, match=message) as caught:
        generate(source, size, eval_size, seed=0, **task)
    assert "\n" not in str(caught.value)
