"""Does the completion's program pass its tests? One sandbox a candidate; the verdict is made outside of it."""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from .ranges import ranged
from .sandbox import Limits, Outcome, SandboxUnavailable, run_python, self_test
from .sandbox.asserts import Check, Unseparable, parse_asserts
from .sandbox.driver import calls_program, inputs_program, read_calls, read_outputs
from .sandbox.limits import MIB
from .sandbox.values import decode, same
from .text import Completion, completion_text

_BLOCK = re.compile(r"^[ \t]*```([^`\n]*)\n(.*?)(?:^[ \t]*```[ \t\r]*$|\Z)", re.DOTALL | re.MULTILINE)
LEAST_MB = 64  # what an interpreter needs to start, and some
_DEFAULT = Limits()


@dataclass(frozen=True)
class Verdict:
    """What became of one candidate.

    Args:
        status: "ok" all tests passed; "wrong" some gave another result; "timeout" and "crash" some gave none, for that
            reason; "infra" the sandbox failed.
        passed: one a test, in order; empty for "infra".
        outcome: the run itself.
    """

    status: str
    passed: tuple[bool, ...]
    outcome: Outcome


@dataclass(frozen=True)
class _Plan:
    """Tests made ready: `program` from the source, and which of them pass from its output."""

    program: Callable[[str], tuple[str, str]]
    passed: Callable[[Outcome, str], list[bool | None]]  # None: no result
    limits: Limits


@ranged(0.0, 1.0)
def code_tests(
    prompts: list[Any],
    completions: list[Completion],
    tests: list[Any],
    entry_point: list[str | None] | str | None = None,
    partial: bool = True,
    seconds: float = 10.0,
    memory_mb: int = 512,
    tolerance: float = 1e-9,
    unseparable: str = "error",
    workers: int = 2,
    unsafe: bool = False,
    **kwargs: Any,
) -> list[float | None]:
    """Run each completion's program against its tests, in a sandbox.

    The program is what `extract_code` finds in the completion. Tests, one of these a completion (or JSON text of it):
    `[{"input": stdin, "output": stdout}, ...]`; `[{"args": [...], "expected": value}, ...]` with `entry_point` (and
    "kwargs", if any); asserts, as a list of strings or one text, `check(candidate)` of HumanEval included.

    An assert is taken apart: the call of the candidate is evaluated inside, its comparison outside. One that cannot be
    taken apart is not run at all, since the candidate could then change what decides about it.

    Args:
        prompts: unused.
        completions: strings or chat messages.
        tests: one a completion.
        entry_point: the function to call, an expression such as `Solution().solve`; one for all or one a completion.
        partial: the share of tests passed; False: 1.0 only where all passed.
        seconds: wall time for all tests of a candidate together.
        memory_mb: address space of a candidate, from 64.
        tolerance: for floats in "expected", relative and absolute; 0: exact.
        unseparable: "error" or "skip" (None) asserts whose check cannot be kept out of the sandbox.
        workers: how many candidates run at a time.
        unsafe: run without a sandbox where none can be had. Full access to the machine.

    Returns:
        0.0 to 1.0 each; None where the tests are None or empty, or the sandbox failed: masked, not punished.

    Raises:
        ValueError: the columns differ in length, tests of an unknown form, `unseparable` ones, a wrong parameter.
        SandboxUnavailable: no sandbox can be had, and not `unsafe`; or every one of this call failed.
    """
    if unseparable not in ("error", "skip") or workers < 1:
        raise ValueError(f'unseparable is "error" or "skip", workers at least 1, not {unseparable!r}, {workers!r}')
    if not 0 < seconds < math.inf or not 0 <= tolerance < math.inf or not memory_mb >= LEAST_MB:
        wrong = f"{seconds!r}, {tolerance!r}, {memory_mb!r}"
        raise ValueError(f"code_tests needs seconds > 0, tolerance >= 0 and memory_mb >= {LEAST_MB}, not {wrong}")
    limits = Limits(seconds=seconds, cpu_seconds=int(seconds) + 2, memory_bytes=int(memory_mb) * MIB)
    names = [entry_point] * len(completions) if entry_point is None or isinstance(entry_point, str) else entry_point
    work: list[tuple[str, _Plan] | None] = []
    for completion, given, name in zip(completions, tests, names, strict=True):
        plan = _plan(given, name, limits, tolerance, unseparable)
        work.append((extract_code(completion_text(completion)), plan) if plan else None)
    if not unsafe and any(work):
        self_test()  # before the threads start, and once
    with ThreadPoolExecutor(workers) as pool:
        verdicts = list(pool.map(lambda item: _judge(item[0], item[1], unsafe) if item else None, work))
    judged = [verdict for verdict in verdicts if verdict]
    if judged and all(verdict.status == "infra" for verdict in judged):  # a run of masked samples would learn nothing
        raise SandboxUnavailable(f"each of {len(judged)} sandboxes failed: {judged[0].outcome.detail}")
    _log(verdicts, kwargs.get("log_metric"), kwargs.get("log_extra"))
    return [_score(verdict, partial) if verdict else None for verdict in verdicts]


def extract_code(text: str) -> str:
    """The last ```python (```py, ```python3) block, or else the last without a language, or else the whole text.

    A block that is cut off goes to the end.
    """
    blocks = [(label.strip().lower(), code) for label, code in _BLOCK.findall(text)]
    for wanted in (("python", "python3", "py"), ("",)):
        found = [code for label, code in blocks if label in wanted]
        if found:
            return found[-1]
    return text


def judge(
    source: str, tests: Any, entry_point: str | None = None, limits: Limits = _DEFAULT, **options: Any
) -> Verdict:
    """The verdict on one program.

    Args:
        source: Python.
        tests: as in `code_tests`, not empty.
        entry_point: as in `code_tests`.
        limits: bounds; room for long inputs and outputs is added.
        options: `tolerance`, `unsafe`.

    Returns:
        The verdict.

    Raises:
        ValueError, SandboxUnavailable: as in `code_tests`.
    """
    plan = _plan(tests, entry_point, limits, options.get("tolerance", 1e-9), "error")
    if plan is None:
        raise ValueError("there are no tests")
    return _judge(source, plan, options.get("unsafe", False))


def _judge(source: str, plan: _Plan, unsafe: bool) -> Verdict:
    program, frame = plan.program(source)
    outcome = run_python(program, limits=plan.limits, unsafe=unsafe)
    if outcome.status == "infra":
        return Verdict("infra", (), outcome)
    results = plan.passed(outcome, frame)
    status = "ok"
    if False in results:
        status = "wrong"
    if None in results:  # it raised or went away
        status = "timeout" if outcome.status == "timeout" else "crash"
    return Verdict(status, tuple(bool(result) for result in results), outcome)


def _score(verdict: Verdict, partial: bool) -> float | None:
    if verdict.status == "infra":
        return None
    return sum(verdict.passed) / len(verdict.passed) if partial else float(all(verdict.passed))


def _log(verdicts: list[Verdict | None], log_metric: Any, log_extra: Any) -> None:
    judged = [verdict for verdict in verdicts if verdict]
    failed = [verdict for verdict in judged if verdict.status == "infra"]
    if failed:
        warnings.warn(
            f"{len(failed)} of {len(judged)} sandboxes failed, their samples are masked: {failed[0].outcome.detail}",
            RuntimeWarning,
            stacklevel=3,
        )
    if log_extra:
        log_extra("code_status", [verdict.status if verdict else None for verdict in verdicts])
    if log_metric and judged:
        for status in ("ok", "wrong", "timeout", "crash", "infra"):
            log_metric(f"code/{status}", sum(verdict.status == status for verdict in judged) / len(judged))


def _plan(tests: Any, name: str | None, limits: Limits, tolerance: float, unseparable: str) -> _Plan | None:
    """Tests of one candidate; None where there are none."""
    if isinstance(tests, str) and tests.lstrip()[:1] in ("[", "{"):
        tests = json.loads(tests)
    tests = [tests] if isinstance(tests, str | dict) else list(tests or [])
    if not tests:
        return None
    if all(isinstance(test, str) for test in tests):
        try:
            return _assert_plan([check for test in tests for check in parse_asserts(test, name)], limits)
        except Unseparable:
            if unseparable == "skip":
                return None
            raise
    if all(isinstance(test, dict) and {"input", "output"} <= test.keys() for test in tests):
        return _output_plan([str(test["input"]) for test in tests], [str(test["output"]) for test in tests], limits)
    if all(isinstance(test, dict) and "expected" in test for test in tests):
        if not name:
            raise ValueError('tests with "args" and "expected" need an entry_point, the function to call')
        return _call_plan(tests, name, limits, tolerance)
    raise ValueError(
        f'tests are {{"input", "output"}}, {{"args", "expected"}} or assert strings, not {tests[0]!r:.200}'
    )


def _output_plan(inputs: list[str], outputs: list[str], limits: Limits) -> _Plan:
    room = replace(
        limits,
        disk_bytes=max(limits.disk_bytes, 8 * max(map(len, inputs)) + MIB),
        output_bytes=max(limits.output_bytes, 4 * sum(map(len, outputs)) + MIB),
    )

    def passed(outcome: Outcome, frame: str) -> list[bool | None]:
        found = read_outputs(outcome.stdout, frame, len(inputs), outcome.status == "ok")
        pairs = zip(found, outputs, strict=True)
        return [None if text is None else _lines(text) == _lines(expected) for text, expected in pairs]

    return _Plan(lambda source: inputs_program(source, inputs), passed, room)


def _call_plan(tests: list[dict], name: str, limits: Limits, tolerance: float) -> _Plan:
    calls = [(name, list(test.get("args") or []), dict(test.get("kwargs") or {})) for test in tests]
    _check_plain(calls)
    expected = [test["expected"] for test in tests]

    def passed(outcome: Outcome, frame: str) -> list[bool | None]:
        found = [_decoded(text) for text in read_calls(outcome.stdout, frame, len(calls))]
        return [value and same(value[0], wanted, tolerance) for value, wanted in zip(found, expected, strict=True)]

    return _Plan(lambda source: calls_program(source, calls), passed, limits)


def _assert_plan(checks: list[Check], limits: Limits) -> _Plan | None:
    calls = [call for check in checks for call in check.calls]

    def passed(outcome: Outcome, frame: str) -> list[bool | None]:
        found = iter([_decoded(text) for text in read_calls(outcome.stdout, frame, len(calls))])
        results: list[bool | None] = []
        for check in checks:
            values = [next(found) for _ in check.calls]
            there = [value[0] for value in values if value is not None]
            results.append(check.holds(there) if len(there) == len(values) else None)
        return results

    return _Plan(lambda source: calls_program(source, calls), passed, limits) if checks else None


def _decoded(text: str | None) -> tuple[Any] | None:
    """The value in a tuple, as it may be None itself; None where there is no value or not a readable one."""
    try:
        return None if text is None else (decode(text),)
    except ValueError:
        return None


def _check_plain(calls: list[Any]) -> None:
    try:
        ast.literal_eval(re.sub(r"\b(nan|-?inf)\b", "0", repr(calls)))
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"arguments of tests are plain built-in values: {error}") from error


def _lines(text: str) -> list[str]:
    """White space at the ends of lines and of the whole does not count."""
    return [line.rstrip() for line in text.strip().splitlines()]
