"""Weights unpacked together are, to the bit, those unpacked one by one; what is beside them is B or zeros."""

import pytest
import torch
from slothrl_kernels.nf4_dequantize import nf4_dequantize
from slothrl_kernels.nf4_group import Part, unpack_group, unpack_group_reference

from tests.kernels.nf4_cases import quantized

GROUPS = [(9,), (70, 5), (48, 16, 16)]  # rows of each weight; 70: more than a program writes of B


def group(rows, nested, dtype, device, ranks=(4, None, 3), columns=64):
    parts, start = [], 0
    for n, rank in zip(rows, ranks, strict=False):
        b = None if rank is None else torch.randn(n, rank, device=device).to(dtype)
        parts.append(Part(quantized((n, columns), 64, nested, device)[2], b, start))
        start += rank or 0
    return parts


def expected(parts, right, dtype):
    blocks = []
    for weight, b, start, _ in parts:
        block = torch.zeros(weight.shape[0], right, dtype=dtype, device=weight.packed.device)
        if b is not None:
            block[:, start : start + b.shape[1]] = b
        blocks.append(torch.cat([nf4_dequantize(weight, dtype), block], 1))
    return torch.cat(blocks)


@pytest.mark.parametrize("rows", GROUPS, ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_every_bit(kernel_device, rows, nested):
    parts = group(rows, nested, torch.float16, kernel_device)
    out = torch.empty(sum(rows), 64 + 8, dtype=torch.float16, device=kernel_device)  # NaN until it is written
    assert unpack_group(parts, out, impl="triton") is out
    assert torch.equal(out, expected(parts, 8, torch.float16))


@pytest.mark.parametrize("columns", [slice(0, 192), slice(64, 128), slice(8, 24)], ids=str)
@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_some_rows_and_columns(kernel_device, columns, impl):
    """Of one weight twice, as gate and up in one matrix are; absmax nested in blocks that the rows do not begin."""
    weight = quantized((160, 192), 64, True, kernel_device)[2]
    whole, width = nf4_dequantize(weight, torch.float32), columns.stop - columns.start
    b = torch.randn(70, 2, device=kernel_device)
    parts = [Part(weight, b, 1, slice(5, 75)), Part(weight, None, 0, slice(150, 160))]
    out = torch.empty(80, width + 3, dtype=torch.float32, device=kernel_device)
    unpack_group(parts, out, columns, impl)
    assert torch.equal(out[:70, :width], whole[5:75, columns]) and torch.equal(out[70:, :width], whole[150:, columns])
    assert torch.equal(out[:70, width + 1 :], b) and out[70:, width:].eq(0).all() and out[:70, width].eq(0).all()


@pytest.mark.parametrize("columns", [64, 60])
def test_without_adapters_and_what_no_launch_serves(kernel_device, columns):
    """60 columns: a word of 8 weights would end in the next row, so each goes by itself."""
    parts = group((8, 6), False, torch.float32, kernel_device, (None, None), columns)
    out = torch.empty(14, columns, dtype=torch.float32, device=kernel_device)
    unpack_group(parts, out, impl="triton")
    assert torch.equal(out, expected(parts, 0, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_reference_and_other_weights(dtype):
    parts = group((16, 8, 8), True, dtype, "cpu")
    out = torch.full((32, 72), float("nan"), dtype=dtype)
    unpack_group_reference(parts, out)
    dense = [p._replace(weight=nf4_dequantize(p.weight, torch.float32).to(dtype)) for p in parts]
    mixed = torch.full((32, 72), float("nan"), dtype=dtype)
    unpack_group([parts[0], *dense[1:]], mixed)
    if dtype == torch.bfloat16:
        assert torch.equal(out, expected(parts, 8, dtype)) and torch.equal(mixed, out)
    else:
        assert (out - mixed).abs().max() < 1e-8
    assert torch.equal(out[:, 64:], mixed[:, 64:])


def test_refuses():
    one, two = group((16, 8), False, torch.float32, "cpu", ranks=(4, 4))
    fits = torch.empty(24, 72)
    for parts, out, columns in (
        ([one, two], fits[:16], None),
        ([one, two], torch.empty(24, 80)[:, :72], None),
        ([one, two._replace(start=6)], fits, None),
        ([one._replace(b=one.b.half()), two], fits, None),
        ([one._replace(b=two.b), two], fits, None),
        ([one._replace(rows=slice(1, 17)), two], fits, None),
        ([one, two], fits, slice(8, 72)),
    ):
        with pytest.raises(ValueError):
            unpack_group(parts, out, columns)
