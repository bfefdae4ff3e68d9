"""Decoding packed nf4 weights inside a kernel: codes by byte permutes, eight at once, times absmax.

A 16-bit code is two bytes, so the code book is two tables of 16 bytes, each in four registers. PTX's `prmt` picks four
bytes out of eight by four selectors of 3 bits; two of them and a select by the nibble's top bit look up 16 entries for
four nibbles. The codes are held in float16, 2^-12 from the true ones; their product with absmax in float32 is rounded
once, to the wanted dtype. That is what dequantisation does from the true codes: one weight in fifty comes out one step
of bfloat16 beside, where rounding the codes to bfloat16 first would move most. Other targets read the true codes from
memory.

Units of 16 bits go in, not bytes: packing and unpacking bytes took as many instructions as the look-ups.
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

# Whether a nibble's top bit is set, as a byte of ones, for the four nibbles of a unit from the lowest on: signs of the
# bytes of (the word shifted up by a nibble, the word) in turn.
_MASKS = ("0xD9C8", "0xFBEA")


def lookup_ptx(dtype: torch.dtype) -> str:
    """PTX that decodes $4, two units of 4 packed weights, with the absmax of both in $5 (and again in $6).

    $0 to $3 get weight i of the first unit in their low half and weight i of the second in their high one, in `dtype`
    (bfloat16 or float16), as a tensor core wants neighbours in k.
    """
    entries = [int(bits) & 0xFFFF for bits in torch.tensor(NF4_CODE).half().view(torch.int16)]
    lines = [".reg .b32 index, shifted, mask, under, over, high, low, pair<4>;"]
    lines += [".reg .b16 first, second;", ".reg .f32 left, right;"]
    lines += ["and.b32 index, $4, 0x77777777;", "shl.b32 shifted, $4, 4;"]
    for unit in range(2):
        if unit:
            lines.append("shr.u32 index, index, 16;")
        lines.append(f"prmt.b32 mask, shifted, $4, {_MASKS[unit]};")
        for plane, shift in (("high", 8), ("low", 0)):
            table = [sum((entries[4 * q + i] >> shift & 255) << 8 * i for i in range(4)) for q in range(4)]
            lines.append(f"prmt.b32 under, {table[0]:#010x}, {table[1]:#010x}, index;")
            lines.append(f"prmt.b32 over, {table[2]:#010x}, {table[3]:#010x}, index;")
            lines.append(f"lop3.b32 {plane}, over, under, mask, 0xE4;")  # mask ? over : under
        lines.append(f"prmt.b32 pair{2 * unit}, low, high, 0x5140;")
        lines.append(f"prmt.b32 pair{2 * unit + 1}, low, high, 0x7362;")
    name = "bf16x2" if dtype == torch.bfloat16 else "f16x2"
    for weight in range(4):
        half = "second" if weight % 2 == 0 else "first"  # bitsandbytes' order: a byte's upper nibble comes first
        for value, pair in (("left", weight // 2), ("right", 2 + weight // 2)):
            lines.append(f"mov.b32 {{first, second}}, pair{pair};")
            lines += [f"cvt.f32.f16 {value}, {half};", f"mul.f32 {value}, {value}, $5;"]
        lines.append(f"cvt.rn.{name}.f32 ${weight}, right, left;")
    return "{\n" + "\n".join(lines) + "\n}"


if TYPE_CHECKING or HAS_TRITON:
    _BF16 = tl.constexpr(lookup_ptx(torch.bfloat16))
    _FP16 = tl.constexpr(lookup_ptx(torch.float16))


@jit
def _read(units, scale, code, shift: tl.constexpr, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    weight = tl.load(code + ((units >> shift) & 15)) * scale
    return weight if INTERPRETED else weight.to(DTYPE)  # the interpreter does no arithmetic in bfloat16


@jit
def decode_4(units, scale, code, DTYPE: tl.constexpr, PTX: tl.constexpr, INTERPRETED: tl.constexpr):
    """int16 and float32 of one shape -> the 4 weights of each unit in DTYPE; each thread needs units in pairs."""
    if not PTX:
        wide = units.to(tl.int32)
        a = _read(wide, scale, code, 4, DTYPE, INTERPRETED)
        b = _read(wide, scale, code, 0, DTYPE, INTERPRETED)
        c = _read(wide, scale, code, 12, DTYPE, INTERPRETED)
        d = _read(wide, scale, code, 8, DTYPE, INTERPRETED)
    elif DTYPE == tl.float16:  # noqa: SIM300
        # Written out: inside of a tuple a constexpr is not taken for a dtype.
        a, b, c, d = tl.inline_asm_elementwise(
            _FP16,  # pyright: ignore
            "=r,=r,=r,=r,r,r,r",
            [units, scale],
            (tl.float16, tl.float16, tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        a, b, c, d = tl.inline_asm_elementwise(
            _BF16,  # pyright: ignore
            "=r,=r,=r,=r,r,r,r",
            [units, scale],
            (tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16),
            is_pure=True,
            pack=2,
        )
    return a, b, c, d
