"""nf4 dequantisation, bit for bit against bitsandbytes' own."""

import dataclasses

import pytest
import torch
from slothrl_kernels import NestedAbsmax, Nf4Weight, nf4_dequantize, nf4_dequantize_reference

from tests.kernels.nf4_cases import bitsandbytes_weight, quantized

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 64), (37, 128), (5, 100), (3, 7), (130, 192)]  # whole blocks, a broken last one, half bytes and words


def same(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Equal in every bit, but for what Triton 3.9's interpreter does to bfloat16: it truncates where a GPU rounds."""
    if ours.dtype == torch.bfloat16 and not ours.is_cuda:
        return bool(((ours.float() - theirs.float()).abs() <= theirs.float().abs() * 2**-7).all())
    return torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_bit_equal_to_bitsandbytes(kernel_device, shape, nested, dtype):
    packed, state, weight = quantized(shape, 64, nested, kernel_device, dtype)
    ours = nf4_dequantize(weight, dtype, impl="triton")
    assert same(ours, bitsandbytes_weight(packed, state))
    assert same(ours, nf4_dequantize_reference(weight, dtype))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("blocksize", [32, 128, 256, 512, 1024, 2048, 4096])
def test_block_sizes(kernel_device, blocksize, nested):
    packed, state, weight = quantized((11, 1000), blocksize, nested, kernel_device, torch.float16)
    assert same(nf4_dequantize(weight, torch.float16, impl="triton"), bitsandbytes_weight(packed, state))


@pytest.mark.parametrize("columns", [128, 100])
def test_into_the_left_of_a_wider_buffer(kernel_device, columns):
    _, _, weight = quantized((9, columns), device=kernel_device)
    wide = torch.full((9, 160), float("nan"), dtype=torch.float16, device=kernel_device)
    out = wide[:, :columns]
    assert nf4_dequantize(weight, torch.float16, out, impl="triton") is out
    assert torch.equal(out, nf4_dequantize_reference(weight, torch.float16))
    assert wide[:, columns:].isnan().all()


def test_bytes_that_start_anywhere(kernel_device):
    """A shard's bytes may begin off any word."""
    _, _, weight = quantized((6, 64), device=kernel_device)
    bytes_ = torch.empty(1 + weight.packed.numel(), dtype=torch.uint8, device=kernel_device)
    bytes_[1:] = weight.packed.flatten()
    moved = dataclasses.replace(weight, packed=bytes_[1:])
    assert torch.equal(
        nf4_dequantize(moved, torch.float32, impl="triton"), nf4_dequantize_reference(weight, torch.float32)
    )


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_reference_is_bitsandbytes(shape, dtype, nested):
    packed, state, weight = quantized(shape, 64, nested, dtype=dtype)
    assert torch.equal(nf4_dequantize(weight, dtype), bitsandbytes_weight(packed, state))
    exact = nf4_dequantize_reference(weight, torch.float64)
    assert torch.equal(
        exact.to(dtype) if dtype == torch.float32 else exact.float().to(dtype), nf4_dequantize(weight, dtype)
    )


def test_shards_are_one_weight():
    """Shards quantised one by one are one weight once their absmax is one tensor."""
    shards = [quantized((rows, 64)) for rows in (8, 3, 5)]
    packed = torch.cat([shard[0].flatten() for shard in shards])
    absmax = torch.cat([shard[2].absmax for shard in shards])
    fused = Nf4Weight(packed, absmax, shards[0][2].code, (16, 64))
    assert torch.equal(nf4_dequantize(fused), torch.cat([nf4_dequantize(shard[2]) for shard in shards]))


def test_refuses():
    _, state, weight = quantized((4, 64))
    change = dataclasses.replace
    for wrong in (
        {"blocksize": 48},
        {"absmax": weight.absmax[:1]},
        {"packed": weight.packed.float()},
        {"code": weight.code.double()},
        {"nested": NestedAbsmax(torch.zeros(256), torch.zeros(1), torch.zeros(()))},
    ):
        with pytest.raises(ValueError):
            change(weight, **wrong)
    state.quant_type = "fp4"
    with pytest.raises(ValueError, match="fp4"):
        Nf4Weight.from_quant_state(weight.packed, state)
    for out in (torch.zeros(4, 63), torch.zeros(64, 4).t(), torch.zeros(4, 64).half()):
        with pytest.raises(ValueError):
            nf4_dequantize(weight, torch.float32, out)
    with pytest.raises(ValueError):
        nf4_dequantize(weight, torch.int8)
    with pytest.raises(ValueError, match="impl"):
        nf4_dequantize(weight, impl="cuda")
