"""Tests written as Python asserts, taken apart: the calls go into the sandbox, everything else stays outside.

`assert f(3) == 6` becomes the call `f(3)`, which is evaluated inside, and the check `result == 6`, which is computed
here by a small interpreter over plain values. So neither the expected value nor the verdict is ever within the
candidate's reach.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .values import MAX_KEYS

_MAX_RANGE, _MAX_BITS = 100_000, 4096
_COMPARE: dict[type, Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt,
    ast.GtE: operator.ge, ast.Is: operator.is_, ast.IsNot: operator.is_not,
    ast.In: lambda item, group: item in group, ast.NotIn: lambda item, group: item not in group,
}  # fmt: skip
_BINARY = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
_UNARY = {ast.Not: operator.not_, ast.USub: operator.neg, ast.UAdd: operator.pos}
_HELPERS: dict[str, Callable[..., Any]] = {
    "abs": abs, "bool": bool, "dict": lambda *given, **words: dict(*map(_hashed, given), **words), "float": float,
    "frozenset": lambda *given: frozenset(*map(_hashed, given)), "int": int, "isclose": math.isclose, "len": len,
    "list": list, "max": max, "min": min, "round": round, "set": lambda *given: set(*map(_hashed, given)),
    "sorted": sorted, "str": str,
    "sum": sum, "tuple": tuple, "all": all, "any": any,
}  # fmt: skip


def _hashed(items: Any) -> Any:
    """Items for a set or dict: integers can be chosen to collide, and the time to put them in grows with the square."""
    if len(items) > MAX_KEYS:
        raise ValueError("too large a set or dict")
    return items


class Unseparable(ValueError):
    """A test in which call and check cannot be told apart; the message quotes it."""


@dataclass(frozen=True)
class Check:
    """One assert.

    Args:
        calls: expressions for the sandbox, in order.
        test: what is left; the names `0`, `1`, ... stand for the results of the calls.
    """

    calls: tuple[str, ...]
    test: ast.expr

    def holds(self, results: Sequence[Any]) -> bool:
        """Whether the assert passes with these results of its calls; False too where it would raise."""
        try:
            return bool(_value(self.test, results))
        except (TypeError, ValueError, ArithmeticError, LookupError, RecursionError, MemoryError):
            return False


def parse_asserts(text: str, entry_point: str | None = None) -> list[Check]:
    """Take the asserts of a test apart.

    Args:
        text: asserts, or a function `check(candidate)` made of asserts as HumanEval has it; imports, docstrings, simple
            assignments of constants to unused names (METADATA) and the call of `check` are passed over.
        entry_point: the function under test; default: the outermost call of each assert is taken for it.

    Returns:
        One check an assert that calls anything.

    Raises:
        Unseparable: anything else is in it: loops, helper functions, checks made by other functions, an expected value
            that is not computed here.
    """
    try:
        body = ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise Unseparable(f"a test that does not parse ({error}): {text[:200]}") from error
    checks = [_check(node, entry_point) for node in _asserts(body)]
    return [check for check in checks if check.calls]


def _asserts(body: list[ast.stmt]) -> list[ast.Assert]:
    found: list[ast.Assert] = []
    for node in body:
        if isinstance(node, ast.Assert):
            found.append(node)
        elif isinstance(node, ast.FunctionDef) and node.name == "check":
            found += _asserts(node.body)
        elif not _is_idle(node):
            raise Unseparable(f"a test that is more than asserts: {ast.unparse(node)[:200]}")
    return found


def _is_idle(node: ast.stmt) -> bool:
    if isinstance(node, ast.Assign):
        return all(isinstance(name, ast.Name) and name.id.isupper() for name in node.targets)
    if isinstance(node, ast.Expr):
        value = node.value
        checks = isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "check"
        return checks or isinstance(value, ast.Constant)
    return isinstance(node, ast.Import | ast.ImportFrom | ast.Pass)


def _check(node: ast.Assert, entry_point: str | None) -> Check:
    text = ast.unparse(node)[:200]
    split = _Split(entry_point, _truths(node.test))
    test = split.visit(node.test)
    try:
        _computable(test)
    except (TypeError, ValueError, ArithmeticError, LookupError, RecursionError, MemoryError) as error:
        # Otherwise it would count against every candidate, right ones included.
        raise Unseparable(f"a test whose expected value is not computed here ({error}): {text}") from error
    return Check(tuple(split.calls), test)


def _truths(test: ast.expr) -> set[int]:
    """The `id`s of the expressions of which an assert asks no more than whether they are true."""
    if isinstance(test, ast.BoolOp):
        return set().union(*map(_truths, test.values))
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        return _truths(test.operand)
    return {id(test)}


def _computable(node: ast.AST) -> bool:
    """Compute once every part that depends on no result; whether all of `node` is such a part. Raises as `_value`."""
    parts = [part for part in ast.iter_child_nodes(node) if part is not getattr(node, "func", None)]
    own = [_computable(part) for part in parts]
    if isinstance(node, ast.Name) or not all(own):
        return False
    if isinstance(node, ast.expr):
        _value(node, ())
    return True


class _Split(ast.NodeTransformer):
    """Replaces calls of the candidate by numbered names and refuses what `_value` could not compute.

    Args:
        entry_point: as in `parse_asserts`.
        truths: `id`s of the nodes whose value comes out as a bool, since an object of any type may stand there.
    """

    def __init__(self, entry_point: str | None, truths: set[int]):
        self.entry_point, self.truths, self.calls = entry_point, truths, []

    def visit_Call(self, node: ast.Call) -> ast.expr:
        if _helper(node) and not (self.entry_point and _name(node.func) == self.entry_point):
            if any(word.arg is None for word in node.keywords):
                raise Unseparable(f"a test with **: {ast.unparse(node)[:200]}")
            node.args = [self.visit(argument) for argument in node.args]
            for word in node.keywords:
                word.value = self.visit(word.value)
            return node
        called = _name(node.func)
        if self.entry_point and called not in ("candidate", self.entry_point):
            raise Unseparable(
                f"a test that calls {called} where {self.entry_point} is expected: {ast.unparse(node)[:200]}"
            )
        if any(isinstance(inner, ast.Compare | ast.Lambda | ast.NamedExpr) for inner in ast.walk(node)):
            raise Unseparable(f"a test whose check is part of a call: {ast.unparse(node)[:200]}")
        wanted_as = "not not " if id(node) in self.truths else ""  # an operator: `bool` could be the candidate's own
        self.calls.append(wanted_as + ast.unparse(_Rename(self.entry_point).visit(node)))
        return ast.Name(str(len(self.calls) - 1), ast.Load())

    def visit_Name(self, node: ast.Name) -> ast.expr:
        raise Unseparable(f"a test that uses the name {node.id}")

    def generic_visit(self, node: ast.AST) -> ast.AST:
        allowed = (
            ast.Constant, ast.List, ast.Tuple, ast.Set, ast.Dict, ast.Compare, ast.BoolOp, ast.UnaryOp, ast.BinOp,
            ast.Subscript, ast.expr_context, ast.boolop, *_COMPARE, *_BINARY, *_UNARY, ast.Pow,
        )  # fmt: skip
        if not isinstance(node, allowed) or (isinstance(node, ast.Dict) and None in node.keys):
            raise Unseparable(f"a test with {type(node).__name__}: {ast.unparse(node)[:200]}")
        return super().generic_visit(node)


class _Rename(ast.NodeTransformer):
    def __init__(self, entry_point: str | None):
        self.entry_point = entry_point

    def visit_Name(self, node: ast.Name) -> ast.Name:
        if node.id == "candidate" and self.entry_point:
            return ast.Name(self.entry_point, ast.Load())
        return node


def _helper(node: ast.Call) -> bool:
    function = node.func
    if isinstance(function, ast.Attribute):  # math.isclose
        return isinstance(function.value, ast.Name) and function.value.id == "math" and function.attr == "isclose"
    return isinstance(function, ast.Name) and (function.id in _HELPERS or function.id == "range")


def _name(function: ast.expr) -> str:
    """`f` of `f(...)`, `method` of `Solution().method(...)`."""
    return function.id if isinstance(function, ast.Name) else getattr(function, "attr", "?")


def _value(node: ast.expr, results: Sequence[Any]) -> Any:
    def inner(part: ast.expr) -> Any:
        return _value(part, results)

    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return results[int(node.id)]
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        kind = {ast.List: list, ast.Tuple: tuple, ast.Set: set}[type(node)]
        return kind(map(inner, node.elts))
    if isinstance(node, ast.Dict):
        return {inner(key): inner(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    if isinstance(node, ast.BoolOp):
        values = (inner(part) for part in node.values)
        return all(values) if isinstance(node.op, ast.And) else any(values)
    if isinstance(node, ast.UnaryOp):
        return _UNARY[type(node.op)](inner(node.operand))
    if isinstance(node, ast.BinOp):
        return _binary(node.op, inner(node.left), inner(node.right))
    if isinstance(node, ast.Subscript):
        return inner(node.value)[inner(node.slice)]
    if isinstance(node, ast.Compare):
        sides = [inner(part) for part in (node.left, *node.comparators)]
        return all(
            _COMPARE[type(op)](*pair) for op, pair in zip(node.ops, zip(sides, sides[1:], strict=False), strict=True)
        )
    if isinstance(node, ast.Call):
        arguments, words = (
            [inner(part) for part in node.args],
            {word.arg or "": inner(word.value) for word in node.keywords},
        )
        return _range(*arguments) if _name(node.func) == "range" else _HELPERS[_name(node.func)](*arguments, **words)
    raise TypeError(f"not computed here: {type(node).__name__}")


def _binary(kind: ast.operator, left: Any, right: Any) -> Any:
    """Arithmetic of numbers and sequences whose result stays small: the candidate chose one side."""
    sides = (left, right)
    if isinstance(kind, ast.Add) and type(left) is type(right) and isinstance(left, str | list | tuple):
        return left + right
    if isinstance(kind, ast.Mult) and any(isinstance(side, str | list | tuple) for side in sides):
        text, count = sides if isinstance(right, int) else (right, left)
        if not isinstance(count, int) or len(text) * count > _MAX_RANGE:
            raise TypeError("too long a sequence, or no number of times")
        return text * count
    for side in sides:
        if not isinstance(side, int | float | complex) or (isinstance(side, int) and side.bit_length() > _MAX_BITS):
            raise TypeError("arithmetic is for numbers of a sane size")
    if isinstance(kind, ast.Pow):
        if abs(right) > 64:
            raise ValueError("too large an exponent")
        return left**right
    return _BINARY[type(kind)](left, right)


def _range(*arguments: int) -> range:
    found = range(*arguments)
    if len(found) > _MAX_RANGE:
        raise ValueError("too long a range")
    return found
