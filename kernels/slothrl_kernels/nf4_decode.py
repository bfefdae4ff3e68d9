"""Decoding packed nf4 codes inside a kernel: eight at once by byte permutes, or a table in memory.

A 16-bit code is two bytes, so the code book is two tables of 16 bytes, each in four registers. PTX's `prmt` picks four
bytes out of eight by four selectors of 3 bits; two of them and a select by the nibble's top bit look up 16 entries for
four nibbles: 23 integer instructions for 8 weights in 16 bits, 26 in float32. Other targets read the code book from
memory.

Units of 16 and of 32 bits go in, not bytes: packing and unpacking bytes took as many instructions as the look-ups.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from slothrl_kernels.switch import HAS_TRITON, jit

if TYPE_CHECKING or HAS_TRITON:
    import triton.language as tl

NF4_CODE = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)  # arXiv:2305.14314, appendix E, as bitsandbytes has it

# Which bytes of (low plane, high plane) make up the outputs: byte 0 to 3 of the low plane, 4 to 7 of the high one.
# Nibble 0 of a half is the second weight of its first byte, nibble 1 the first: bitsandbytes' order.
_PICK_16 = ("0x7351", "0x6240")  # two 16-bit codes a register
_PICK_32 = ("0x5111", "0x4000", "0x7333", "0x6222")  # a float32 whose three low bytes are the low byte repeated


def code_entries(dtype: torch.dtype) -> list[int]:
    """The 16 codes as the 16 bits that the look-up holds; for float32 the upper 16 of which the last 8 repeat."""
    codes = torch.tensor(NF4_CODE)
    if dtype != torch.float32:
        return [int(bits) & 0xFFFF for bits in codes.to(dtype).view(torch.int16)]
    upper = (codes.view(torch.int32) >> 16)[:, None] + torch.tensor([-1, 0, 1])  # (16, 3) candidates
    upper[7] = 0  # the code 0.0 has no neighbours to try
    value = ((upper << 16) | (upper & 255) * 257).int().view(torch.float32)
    nearest = (value - codes[:, None]).abs().argmin(1)
    return [int(bits) & 0xFFFF for bits in upper[torch.arange(16), nearest]]


def lookup_ptx(dtype: torch.dtype) -> str:
    """PTX that decodes its last operand, 8 packed weights.

    float32: eight registers, the weights in order. 16 bits: the operand is two units of 4 weights, and register i holds
    weight i of the first unit and weight i of the second, as a tensor core wants neighbours in k.
    """
    wide = dtype == torch.float32
    entries, picks, source = code_entries(dtype), _PICK_32 if wide else _PICK_16, "$8" if wide else "$4"
    lines = [".reg .b32 word, index, top, mask, under, over, high, low;"]
    # Units next to each other in the first two bytes, and in the last two.
    lines.append(f"mov.b32 word, {source};" if wide else f"prmt.b32 word, {source}, 0, 0x3120;")
    lines += ["and.b32 index, word, 0x77777777;", "shr.u32 top, word, 1;"]
    for half in range(2):
        if half:
            lines += ["shr.u32 index, index, 16;", "shr.u32 top, top, 16;"]
        # A selector of `top` is a nibble's upper three bits: from 4 on, thus for codes from 8 on, it picks a 0xff.
        lines.append("prmt.b32 mask, 0, 0xffffffff, top;")
        for plane, shift in (("high", 8), ("low", 0)):
            table = [sum((entries[4 * q + i] >> shift & 255) << 8 * i for i in range(4)) for q in range(4)]
            lines.append(f"prmt.b32 under, {table[0]:#010x}, {table[1]:#010x}, index;")
            lines.append(f"prmt.b32 over, {table[2]:#010x}, {table[3]:#010x}, index;")
            lines.append(f"lop3.b32 {plane}, over, under, mask, 0xE4;")  # mask ? over : under
        lines += [f"prmt.b32 ${half * len(picks) + i}, low, high, {pick};" for i, pick in enumerate(picks)]
    return "{\n" + "\n".join(lines) + "\n}"


if TYPE_CHECKING or HAS_TRITON:
    _BF16 = tl.constexpr(lookup_ptx(torch.bfloat16))
    _FP16 = tl.constexpr(lookup_ptx(torch.float16))
    _FP32 = tl.constexpr(lookup_ptx(torch.float32))


@jit
def _read(units, code, shift: tl.constexpr, DTYPE: tl.constexpr):
    return tl.load(code + ((units >> shift) & 15)).to(DTYPE)


@jit
def decode_4(units, code, DTYPE: tl.constexpr, PTX: tl.constexpr):
    """int16 of any shape -> the 4 weights of each unit in DTYPE, 16 bits; each thread needs units in pairs."""
    if not PTX:
        wide = units.to(tl.int32)
        a, b = _read(wide, code, 4, DTYPE), _read(wide, code, 0, DTYPE)
        c, d = _read(wide, code, 12, DTYPE), _read(wide, code, 8, DTYPE)
    elif DTYPE == tl.float16:  # noqa: SIM300
        # Written out: inside of a tuple a constexpr is not taken for a dtype.
        a, b, c, d = tl.inline_asm_elementwise(
            _FP16,  # pyright: ignore
            "=r,=r,=r,=r,r",
            [units],
            (tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            _BF16,  # pyright: ignore
            "=r,=r,=r,=r,r",
            [units],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    return a, b, c, d


@jit
def decode_8(words, code, PTX: tl.constexpr):
    """int32 of any shape -> the 8 weights of each word in float32."""
    if not PTX:
        a, b = _read(words, code, 4, tl.float32), _read(words, code, 0, tl.float32)
        c, d = _read(words, code, 12, tl.float32), _read(words, code, 8, tl.float32)
        e, f = _read(words, code, 20, tl.float32), _read(words, code, 16, tl.float32)
        g, h = _read(words, code, 28, tl.float32), _read(words, code, 24, tl.float32)
    else:
        a, b, c, d, e, f, g, h = tl.inline_asm_elementwise(
            _FP32,  # pyright: ignore
            "=r,=r,=r,=r,=r,=r,=r,=r,r",
            [words],
            (tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32, tl.float32),
            is_pure=True,
            pack=1,
        )
    return a, b, c, d, e, f, g, h
