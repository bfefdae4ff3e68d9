"""Rows into a wider buffer: every bit, whatever way they go, and nothing beside them."""

import pytest
import torch
from slothrl_kernels import row_copy
from slothrl_kernels.row_copy import copy_rows


def bits(x):
    return x.contiguous().view(torch.uint8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("columns, right, begin", [(64, 16, 0), (64, 16, 8), (64, 3, 0), (7, 9, 0), (64, 0, 0)])
def test_every_bit(dtype, columns, right, begin):
    """Infinities, NaNs and signed zeros too; words or not."""
    x = torch.randn(5, columns).to(dtype)
    x[0, :4] = torch.tensor([float("inf"), float("nan"), -0.0, float("-inf")])
    out = torch.full((5, begin + columns + right), 7.0, dtype=dtype)
    target = out[:, begin : begin + columns]
    assert copy_rows(target, x) is target
    assert torch.equal(bits(target), bits(x))
    assert out[:, :begin].eq(7).all() and out[:, begin + columns :].eq(7).all()
    back = torch.empty(5, columns, dtype=dtype)
    assert torch.equal(bits(copy_rows(back, target)), bits(x))


def test_which_go_as_words(monkeypatch):
    asked = []
    real = row_copy._fits
    monkeypatch.setattr(row_copy, "_fits", lambda *given: asked.append(real(*given)) or asked[-1])
    x, wide = torch.randn(4, 16).bfloat16(), torch.zeros(4, 40).bfloat16()
    odd = torch.zeros(4, 20).bfloat16()[:, :16]
    for target in (wide[:, :16], wide[:, 8:24], wide[:, 4:20], odd, wide.view(-1)[1:65].view(4, 16)):
        copy_rows(target, x)
    assert asked == [True, True, False, False, False]
    copy_rows(torch.zeros(4, 16), x)  # a cast is no copy of bits
    with pytest.raises(RuntimeError):
        copy_rows(torch.zeros(4, 15), torch.zeros(4, 16))


def test_in_another_order():
    """A gradient by heads into where they lie beside each other, token by token."""
    heads, out = torch.randn(2, 3, 5, 16).half(), torch.zeros(10, 64).half()
    target = out[:, 8:56].view(2, 5, 3, 16)
    copy_rows(target, heads.transpose(1, 2))
    assert torch.equal(target.transpose(1, 2), heads) and row_copy._fits(target, 8, heads.transpose(1, 2))
