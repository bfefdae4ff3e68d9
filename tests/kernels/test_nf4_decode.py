"""The look-up's PTX, run by a few lines of Python over every byte."""

import re

import pytest
import torch
from slothrl_kernels.nf4_decode import NF4_CODE, lookup_ptx


def prmt(a: int, b: int, selectors: int) -> int:
    """PTX's byte permute: 4 bytes out of 8; a selector's top bit repeats the sign instead."""
    source = [(a | b << 32) >> 8 * i & 255 for i in range(8)]
    picked = 0
    for i in range(4):
        selector = selectors >> 4 * i & 15
        byte = source[selector & 7]
        picked |= (255 * (byte >> 7) if selector & 8 else byte) << 8 * i
    return picked


def half(bits: int) -> float:
    return torch.tensor(bits, dtype=torch.uint16).view(torch.float16).item()


OPERATIONS = {
    "and.b32": lambda a, b: a & b,
    "shl.b32": lambda a, b: a << b & 0xFFFFFFFF,
    "shr.u32": lambda a, b: a >> b,
    "prmt.b32": prmt,
    "lop3.b32": lambda a, b, c, table: (a & c) | (b & ~c) if table == 0xE4 else 1 // 0,
    "cvt.f32.f16": half,
    "mul.f32": lambda a, b: a * b,
    "cvt.rn.bf16x2.f32": lambda high, low: (low, high),
    "cvt.rn.f16x2.f32": lambda high, low: (low, high),
}


def run(text: str, word: int, scale: float) -> list[tuple[float, float]]:
    """What $0 to $3 hold, before they are rounded."""
    registers = {"$4": word, "$5": scale}
    for name, operands in re.findall(r"([\w.]+) ([^;]+);", text):
        if name == ".reg":
            continue
        if name == "mov.b32":  # a register taken apart
            first, second, pair = re.findall(r"\w+", operands)
            registers[first], registers[second] = registers[pair] & 0xFFFF, registers[pair] >> 16
            continue
        target, *sources = (operand.strip() for operand in operands.split(","))
        values = [registers[s] if s in registers else int(s, 0) for s in sources]
        registers[target] = OPERATIONS[name](*values)
    return [registers[f"${i}"] for i in range(4)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_byte_in_every_place(dtype):
    text = lookup_ptx(dtype).strip("{}\n").replace("pair<4>", "pair")
    assert f"cvt.rn.{'bf16x2' if dtype == torch.bfloat16 else 'f16x2'}.f32" in text
    for byte in range(256):
        packed = [(byte + 67 * i) % 256 for i in range(4)]
        weights = [NF4_CODE[nibble] for value in packed for nibble in (value >> 4, value & 15)]
        pairs = run(text, sum(value << 8 * i for i, value in enumerate(packed)), 0.25)
        for i, (low, high) in enumerate(pairs):  # weight i of the first unit of four beside weight i of the second
            assert abs(low - weights[i] / 4) <= abs(weights[i] / 4) * 2**-11
            assert abs(high - weights[4 + i] / 4) <= abs(weights[4 + i] / 4) * 2**-11


def test_decoded_weights_are_the_dequantised_ones():
    """Codes in float16 times absmax, rounded to bfloat16: one in fifty is one step beside."""
    codes, scales = torch.tensor(NF4_CODE), torch.rand(4096, generator=torch.Generator().manual_seed(0)) * 0.1 + 1e-3
    truth = (codes * scales[:, None]).bfloat16()
    decoded = (codes.half().float() * scales[:, None]).bfloat16()
    beside = decoded != truth
    assert 0.005 < beside.float().mean() < 0.03
    assert ((decoded.float() - truth.float()).abs() <= 2**-7 * truth.float().abs()).all()


def test_code_is_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert functional.get_4bit_type("nf4", device="cpu").tolist() == list(NF4_CODE)
