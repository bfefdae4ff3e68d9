"""The sandbox's system call filter and the values that come out of it, without a sandbox."""

import json
import struct

import pytest
from slothrl_rewards.sandbox import driver, seccomp
from slothrl_rewards.sandbox.values import decode, same


def test_values():
    space = {}
    exec("from _json import encode_basestring_ascii as quote\n" + driver.ENCODER, space)
    for value in (None, True, -7, 2**200, 0.1, -0.0, float("inf"), 2j, "é\n\0", b"\xff", [], (1,), {1, 2}, frozenset(),
                  {1: [None, {"a": (2.5,)}]}, [[[(True, 1, 1.0)]]]):  # fmt: skip
        back = decode(space["encode"](value))
        assert (back, type(back), repr(back)) == (value, type(value), repr(value))
    for text in ("", "1", "1.5", "NaN", '{"int": 5}', '{"what": []}', "{}", '{"dict": [[[], 1]]}', '{"float": "x"}',
                 '{"set": ' + json.dumps(["x"] * 5001) + "}", "[" * 99 + "]" * 99):  # fmt: skip
        with pytest.raises(ValueError, match="no value"):
            decode(text)
    assert same((1, [2.0]), [1, [2.0 + 1e-12]], 1e-9)
    assert not same((1, [2.0]), [1, [2.1]], 1e-9)
    assert not same(True, 1) and not same(float("nan"), float("nan"), 1e-9) and not same(1.0, 10**400, 1e-9)
    assert same({"a": (1, 2)}, {"a": [1, 2]})


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filter_program(machine):
    """Interprets the filter: what it says to every call."""
    steps = list(struct.iter_unpack("=HBBI", seccomp.program(machine)))
    audit = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}[machine]

    def verdict(number, flags=0, arch=audit):
        data, value, here = {0: number, 4: arch, 16: flags}, 0, 0
        while True:
            code, yes, no, operand = steps[here]
            if code == 0x06:
                return operand
            if code == 0x20:
                value = data[operand]
                here += 1
                continue
            true = {0x15: value == operand, 0x35: value >= operand, 0x45: bool(value & operand)}[code]
            here += 1 + (yes if true else no)

    clone, getpid = {"x86_64": (56, 39), "aarch64": (220, 172)}[machine]
    eperm, enosys, allow, kill = 0x50001, 0x50026, 0x7FFF0000, 0x80000000
    for name, number in seccomp.denied(machine).items():
        assert verdict(number) == eperm, name
    assert (verdict(clone, 17), verdict(clone, 0x10000 | 0x100), verdict(435)) == (eperm, allow, enosys)
    assert (verdict(getpid), verdict(getpid, arch=0x40000003)) == (allow, kill)
    assert verdict(0x40000000 | getpid) == (eperm if machine == "x86_64" else allow)
    allowed = {number for number in range(500) if verdict(number, 0x10000) == allow}
    assert allowed.isdisjoint(seccomp.denied(machine).values())
    assert len(seccomp.program(machine)) < 4096
    with pytest.raises(seccomp.UnknownMachine, match="no table of system calls for vax"):
        seccomp.program("vax")
