"""Small tensors cast into one piece of memory: torch's own bits, and nothing between them is written."""

import pytest
import torch
from slothrl_kernels import adapter_cast
from slothrl_kernels.adapter_cast import cast_into, cast_into_reference

SHAPES = [(16, 300), (2056, 2), (8,), (1, 24)]
BEGINS = [8, 4816, 9000, 8960]  # out of order, with gaps


def sources(dtype, device):
    return [torch.randn(shape, generator=torch.Generator().manual_seed(i)).to(device, dtype)
            for i, shape in enumerate(SHAPES)]  # fmt: skip


def cast(function, dtype, device, of=torch.float32, factors=(0.375, 1.0, 2.0, 50.0), **options):
    out = torch.full((9100,), 7.0, dtype=dtype, device=device)
    function(out, sources(of, device), BEGINS, factors, **options)
    return out


@pytest.mark.parametrize("dtype, of", [(torch.float16, torch.float32), (torch.float32, torch.float32),
                                       (torch.float32, torch.float16), (torch.float16, torch.float16)])  # fmt: skip
def test_to_the_bit(kernel_device, dtype, of):
    expected = cast(cast_into_reference, dtype, kernel_device, of)
    assert torch.equal(cast(cast_into, dtype, kernel_device, of, impl="triton"), expected)
    assert expected[:8].eq(7).all() and expected[9008:].eq(7).all()
    assert torch.equal(expected[9000:9008], sources(of, kernel_device)[2].to(dtype) * 2)


def test_one_table_for_the_same_tensors(kernel_device):
    """Read where they are at every call; other tensors have another."""
    given, out = sources(torch.float32, kernel_device), torch.zeros(9100, device=kernel_device)
    before = len(adapter_cast._tables)
    for value in (1.0, 2.0):
        given[0].fill_(value)
        cast_into(out, given, BEGINS, (1.0,) * 4, impl="triton")
        assert out[8:4808].eq(value).all()
    assert len(adapter_cast._tables) == before + 1
    cast_into(out, sources(torch.float32, kernel_device), BEGINS, (1.0,) * 4, impl="triton")
    assert len(adapter_cast._tables) == before + 2


@pytest.mark.parametrize("shape, begin, of", [((3, 3), 0, torch.float32), ((8,), 4, torch.float32),
                                              ((8,), 0, torch.float64)])  # fmt: skip
def test_what_the_kernel_does_not_serve(kernel_device, shape, begin, of):
    x, out = torch.randn(shape, device=kernel_device).to(of), torch.zeros(64, device=kernel_device)
    before = len(adapter_cast._tables)
    cast_into(out, [x], [begin], [2.0], impl="triton")
    assert torch.equal(out[begin : begin + x.numel()].view(shape), x.float() * 2)
    cast_into(out, [torch.randn(8, 8, device=kernel_device).T], [0], [1.0], impl="triton")
    assert len(adapter_cast._tables) == before
    cast_into(out, [], [], [])
