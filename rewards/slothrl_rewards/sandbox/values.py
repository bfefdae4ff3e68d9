"""Results on their way out of the sandbox: only values of the built-in types get through.

What comes is JSON. Plain where JSON has the type, else an object of one tag. Of a container's subclass (a Counter, a
named tuple) the plain contents come out, without its methods; any other type counts as no result at all. The text is
written by code that shares its interpreter with the program, so it may say anything: reading it must be safe, believing
it need not be, as the expected values never went in.
"""

from __future__ import annotations

import json
import math
from typing import Any

MAX_DEPTH = 60
MAX_BITS = 100_000
# Of one set or dict: integers can be chosen to collide, and the time to put them in grows with the square.
MAX_KEYS = 5_000

# Runs inside; `quote` is the C encoder of JSON strings, as importing json costs more than the whole rest.
ENCODER = f"""\
def encode(value, depth=0):
    kind = type(value)
    if depth > {MAX_DEPTH}:
        raise ValueError("nested too deep")
    if value is None or kind is bool:
        return "null" if value is None else "true" if value else "false"
    if kind is str:
        return quote(value)
    if kind is int:
        if value.bit_length() > {MAX_BITS}:
            raise ValueError("too large an integer")
        return '{{"int": "%x"}}' % value
    if kind is float:
        return '{{"float": "%s"}}' % value.hex()
    if kind is complex:
        return '{{"complex": ["%s", "%s"]}}' % (value.real.hex(), value.imag.hex())
    if kind is bytes or kind is bytearray:
        return '{{"bytes": "%s"}}' % value.hex()
    if kind is dict:
        pairs = ["[%s, %s]" % (encode(key, depth + 1), encode(item, depth + 1)) for key, item in value.items()]
        return '{{"dict": [%s]}}' % ", ".join(pairs)
    if kind in (list, tuple, set, frozenset):
        items = "[%s]" % ", ".join([encode(item, depth + 1) for item in value])
        return items if kind is list else '{{"%s": %s}}' % (kind.__name__, items)
    for base in (dict, list, tuple, set, frozenset):
        if issubclass(kind, base):
            return encode(base(value), depth)
    raise TypeError("a result must be of built-in types, not " + kind.__name__)
"""


def decode(text: str) -> Any:
    """Read one encoded value.

    Args:
        text: what came out of the sandbox.

    Returns:
        The value.

    Raises:
        ValueError: it is not an encoded value, nests too deep or holds too large an integer.
    """
    try:
        return _value(json.loads(text, parse_constant=_refuse, parse_int=_refuse, parse_float=_refuse), 0)
    except (ValueError, TypeError, KeyError, RecursionError, MemoryError, OverflowError) as error:
        raise ValueError(f"no value: {error}") from error


def same(found: Any, expected: Any, tolerance: float = 0.0) -> bool:
    """Whether a result is the expected one, as Python's `==` has it, but a tuple equals a list of the same elements.

    Args:
        found: from the sandbox.
        expected: plain built-in types.
        tolerance: relative and absolute, for finite floats.
    """
    if isinstance(found, list | tuple) and isinstance(expected, list | tuple):
        if len(found) != len(expected):
            return False
        return all(same(one, other, tolerance) for one, other in zip(found, expected, strict=True))
    if isinstance(found, dict) and isinstance(expected, dict):
        return found.keys() == expected.keys() and all(same(found[key], expected[key], tolerance) for key in found)
    if isinstance(found, bool) != isinstance(expected, bool):
        return False  # JSON tells true from 1, so the data meant one of them
    if isinstance(found, float) and isinstance(expected, float | int) and tolerance:
        try:
            return math.isfinite(found) and math.isclose(found, expected, rel_tol=tolerance, abs_tol=tolerance)
        except OverflowError:
            return False
    return found == expected


def _value(node: Any, depth: int) -> Any:
    if depth > MAX_DEPTH + 1:
        raise ValueError("nested too deep")
    if node is None or isinstance(node, bool | str):
        return node
    if isinstance(node, list):
        return [_value(item, depth + 1) for item in node]
    ((tag, content),) = node.items()
    if tag == "int":
        if len(content) > MAX_BITS // 4 + 2:
            raise ValueError("too large an integer")
        return int(content, 16)
    if tag in ("dict", "set", "frozenset") and len(content) > MAX_KEYS:
        raise ValueError("too large a set or dict")
    if tag == "dict":
        return {_value(key, depth + 1): _value(item, depth + 1) for key, item in content}
    readers = {"float": float.fromhex, "bytes": bytes.fromhex}
    if tag in readers:
        return readers[tag](content)
    if tag == "complex":
        return complex(*map(float.fromhex, content))
    kinds = {"tuple": tuple, "set": set, "frozenset": frozenset}
    return kinds[tag](_value(item, depth + 1) for item in content)


def _refuse(text: str) -> None:
    raise ValueError(f"an untagged number: {text[:20]}")
