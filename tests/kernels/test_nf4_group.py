"""Weights unpacked together are, to the bit, those unpacked one by one; what is beside them is B or zeros."""

import pytest
import torch
from slothrl_kernels.nf4_dequantize import nf4_dequantize
from slothrl_kernels.nf4_group import unpack_group, unpack_group_reference

from tests.kernels.nf4_cases import quantized

GROUPS = [(9,), (70, 5), (48, 16, 16)]  # rows of each weight; 70: more than a program writes of B


def group(rows, nested, dtype, device, ranks=(4, None, 3), columns=64):
    weights = [quantized((n, columns), 64, nested, device)[2] for n in rows]
    beside, starts, start = [], [], 0
    for n, rank in zip(rows, ranks, strict=False):
        beside.append(None if rank is None else torch.randn(n, rank, device=device).to(dtype))
        starts.append(start)
        start += rank or 0
    return weights, beside, starts


def expected(weights, beside, starts, right, dtype):
    blocks = []
    for w, b, start in zip(weights, beside, starts, strict=True):
        block = torch.zeros(w.shape[0], right, dtype=dtype, device=w.packed.device)
        if b is not None:
            block[:, start : start + b.shape[1]] = b
        blocks.append(torch.cat([nf4_dequantize(w, dtype), block], 1))
    return torch.cat(blocks)


@pytest.mark.parametrize("rows", GROUPS, ids=str)
@pytest.mark.parametrize("nested", [False, True])
def test_every_bit(kernel_device, rows, nested):
    weights, beside, starts = group(rows, nested, torch.float16, kernel_device)
    out = torch.empty(sum(rows), 64 + 8, dtype=torch.float16, device=kernel_device)  # NaN until it is written
    assert unpack_group(weights, beside, starts, out, "triton") is out
    assert torch.equal(out, expected(weights, beside, starts, 8, torch.float16))


@pytest.mark.parametrize("columns", [64, 60])
def test_without_adapters_and_what_no_launch_serves(kernel_device, columns):
    """60 columns: a word of 8 weights would end in the next row, so each goes by itself."""
    weights, _, _ = group((8, 6), False, torch.float32, kernel_device, columns=columns)
    out = torch.empty(14, columns, dtype=torch.float32, device=kernel_device)
    unpack_group(weights, [None, None], [0, 0], out, "triton")
    assert torch.equal(out, expected(weights, [None, None], [0, 0], 0, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_reference_and_other_weights(dtype):
    weights, beside, starts = group((16, 8, 8), True, dtype, "cpu")
    out = torch.full((32, 72), float("nan"), dtype=dtype)
    unpack_group_reference(weights, beside, starts, out)
    dense = [nf4_dequantize(w, torch.float32).to(dtype) for w in weights]
    mixed = torch.full((32, 72), float("nan"), dtype=dtype)
    unpack_group([weights[0], *dense[1:]], beside, starts, mixed)
    if dtype == torch.bfloat16:
        assert torch.equal(out, expected(weights, beside, starts, 8, dtype)) and torch.equal(mixed, out)
    else:
        assert (out - mixed).abs().max() < 1e-8
    assert torch.equal(out[:, 64:], mixed[:, 64:])


def test_refuses():
    weights, beside, starts = group((16, 8), False, torch.float32, "cpu", ranks=(4, 4))
    fits = torch.empty(24, 72)
    for wrong in (
        (weights, beside, starts, fits[:16]),
        (weights, beside, starts, torch.empty(24, 80)[:, :72]),
        (weights, beside, [0, 6], fits),
        (weights, [beside[0].half(), None], starts, fits),
        (weights, beside[::-1], starts, fits),
    ):
        with pytest.raises(ValueError):
            unpack_group(*wrong)
