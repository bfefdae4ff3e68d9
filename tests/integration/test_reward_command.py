"""`python -m slothrl reward`, with real workers: what it prints, what it warns of, how it ends."""

import json

import pytest

from slothrl.__main__ import main
from slothrl.reward_findings import Measured, correlation, percentile, remarks
from slothrl.reward_samples import Sample

REWARDS = """\
import random, time
def text(completion): return completion if isinstance(completion, str) else completion[-1]["content"]
def const(completions, **_): return [0.5] * len(completions)
def flaky(completions, **_): return [random.random() for _ in completions]
def lengthy(completions, **_): return [len(text(c)) / 100 for c in completions]
def empty(completions, **_): return [0.0 if text(c) else 1.0 for c in completions]
def outside(completions, **_): return [2.0 if text(c) else 0.0 for c in completions]
outside.reward_range = (0.0, 1.0)
def boom(completions, **_): raise RuntimeError("out of ideas")
def slow(completions, **_):
    time.sleep(1.05)
    return [float(len(text(c)) % 2) for c in completions]
"""


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "mine.py").write_text(REWARDS, encoding="utf-8")

    def call(*arguments, functions=()):
        named = ",".join(f"./mine.py:{name}" for name in functions)
        custom = ["reward=custom", f"reward.functions=[{named}]"] if functions else []
        code = main(["reward", "gpu=cpu", "rows=4", *custom, *arguments])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out
        return code, printed.out, printed.err

    return call


def test_the_default_task_has_nothing_to_warn_of(run):
    code, out, _ = run()
    assert code == 0 and "warning" not in out
    for word in ("gold in a sentence", "another row's gold", "empty", "garbage", "long repetition", "p99", "0 to 1"):
        assert word in out


def test_gold_in_tags_is_enough_for_the_format_task(run):
    code, out, _ = run("data=format")
    assert code == 0 and "warning" not in out


def test_warnings_in_this_process(run):
    functions = ["const", "flaky", "empty", "outside"]
    code, out, _ = run("reward.isolate=false", functions=functions)
    assert code == 0
    for line in (
        "warning: const: constant: every completion that it scores gets 0.5",
        "warning: flaky: unstable",
        "warning: empty: the empty completion gets the full score of 1 (4 of 4 rows)",
        "warning: empty: 4 of 4 gold answers get less than the full score of 1",
        "outside its range of 0 to 1, such as 2",
    ):
        assert line in out


def test_given_completions(run, tmp_path):
    rows = [{"prompt": "q", "completion": "word " * n, "answer": "1"} for n in range(1, 13)]
    (tmp_path / "given.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    code, out, _ = run("completions=given.jsonl", "reward.isolate=false", functions=["lengthy", "slow"])
    assert code == 0
    assert "scores on 12 rows of given.jsonl" in out
    assert "lengthy: follows length: the correlation of score and characters is +1.00" in out
    assert "slow: slow: a call took 1." in out


@pytest.mark.parametrize("isolate", ["true", "false"])
def test_a_function_that_fails(run, isolate):
    code, _, err = run(f"reward.isolate={isolate}", functions=["boom"])
    assert code == 2
    assert "boom" in err and "out of ideas" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rows=0"], "rows=0: must be a whole number"),
        (["--verbose"], "--verbose: no such option"),
        (["data=mth"], "data is one of"),
        (["completions=gone.jsonl"], "there is no gone.jsonl: set completions"),
        (["reward=custom", "reward.functions=[./mine.py:gone]"], "has no 'gone'"),
    ],
)
def test_mistakes(run, arguments, message):
    code, out, err = run(*arguments)
    assert code == 2 and out == "" and message in err


def test_completions_without_a_prompt(run, tmp_path):
    (tmp_path / "given.jsonl").write_text('{"prompt": "q"}\n', encoding="utf-8")
    code, _, err = run("completions=given.jsonl")
    assert code == 2 and "row 1: no completion" in err


def test_help(run):
    code, out, _ = run("--help")
    assert code == 0 and "completions=FILE" in out


def test_numbers():
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0 and percentile([1.0, 2.0], 0.99) == 2.0
    assert correlation([(0, 0), (1, 2), (2, 4)]) == pytest.approx(1.0)
    assert correlation([(1, 1), (1, 2)]) is None
    sample = Sample("gold", [{"prompt": "q"}], ["a"])
    assert remarks(Measured("f", first=[[None]], second=[[None]]), [sample]) == [
        "scores nothing: None for every completion"
    ]
    assert remarks(Measured("f", error="no"), [sample]) == []
