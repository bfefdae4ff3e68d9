"""The look-up's PTX, run by a few lines of Python over every byte."""

import re

import pytest
import torch
from slothrl_kernels.nf4_decode import NF4_CODE, code_entries, lookup_ptx


def prmt(a: int, b: int, selectors: int) -> int:
    """PTX's byte permute: 4 bytes out of 8; a selector's top bit repeats the sign instead."""
    source = [(a | b << 32) >> 8 * i & 255 for i in range(8)]
    picked = 0
    for i in range(4):
        selector = selectors >> 4 * i & 15
        byte = source[selector & 7]
        picked |= (255 * (byte >> 7) if selector & 8 else byte) << 8 * i
    return picked


OPERATIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": prmt,
    "lop3.b32": lambda a, b, c, table: (a & c) | (b & ~c) if table == 0xE4 else 1 // 0,
}


def run(text: str, word: int, outputs: int) -> list[int]:
    registers = {f"${outputs}": word}
    for name, operands in re.findall(r"([\w.]+) ([^;]+);", text):
        if name != ".reg":
            target, *sources = (operand.strip() for operand in operands.split(","))
            values = [registers[s] if s in registers else int(s, 0) for s in sources]
            registers[target] = OPERATIONS[name](*values)
    return [registers[f"${i}"] for i in range(outputs)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_byte_in_every_place(dtype):
    text = re.sub(r"\.reg [^;]+;", "", lookup_ptx(dtype)).strip("{}\n")
    wide = dtype == torch.float32
    half_step = 2**-11 if dtype == torch.float16 else 2**-8
    for byte in range(256):
        packed = [(byte + 67 * i) % 256 for i in range(4)]
        weights = torch.tensor([NF4_CODE[nibble] for value in packed for nibble in (value >> 4, value & 15)])
        # float32: in order. 16 bits: weight i of the first unit of four beside weight i of the second.
        expected = (weights if wide else weights.view(2, 4).t().flatten()).double()
        registers = run(text, sum(value << 8 * i for i, value in enumerate(packed)), 8 if wide else 4)
        found = torch.tensor(registers, dtype=torch.int64).to(torch.uint32).view(dtype).double()
        assert ((found - expected).abs() <= expected.abs() * half_step).all()


def test_entries_are_the_nearest():
    assert code_entries(torch.bfloat16)[7] == code_entries(torch.float32)[7] == 0
    assert code_entries(torch.bfloat16)[15] == 0x3F80 and code_entries(torch.float16)[0] == 0xBC00


def test_code_is_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert functional.get_4bit_type("nf4", device="cpu").tolist() == list(NF4_CODE)
