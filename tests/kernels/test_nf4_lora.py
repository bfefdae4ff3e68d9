"""The nf4 GEMM with a LoRA in it, under an error budget against float64."""

import math
from dataclasses import replace

import pytest
import torch
from slothrl_kernels import LoraDelta, nf4_lora_matmul, nf4_lora_matmul_reference

from tests.kernels.nf4_cases import quantized
from tests.kernels.test_nf4_matmul import TOLERANCE


def lora_case(rows, sizes, inputs, rank, dtype, device):
    """x, W, a LoRA whose delta is as large as the base's output, and a bias."""
    weight = quantized((sum(sizes), inputs), device=device)[2]
    generator = torch.Generator().manual_seed(rows + rank)

    def random(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(dtype).to(device)

    x, bias = random(rows, inputs), random(sum(sizes))
    lora = LoraDelta.zeros(rank, inputs, sizes, x)
    for i, size in enumerate(sizes):
        a, b = lora.slice(i)
        a[:rank] = random(rank, inputs, scale=inputs**-0.5)
        b[:, :rank] = random(size, rank, scale=0.3)
    return x, weight, lora, bias


def check_lora(x, weight, lora, bias):
    wide = LoraDelta(lora.a.double(), lora.b.double(), lora.ends, lora.sizes)
    exact = nf4_lora_matmul_reference(x.double(), weight, wide, None if bias is None else bias.double())
    plain = nf4_lora_matmul_reference(x, weight, lora, bias)
    ours = nf4_lora_matmul(x, weight, lora, bias, "triton")
    assert ours.isfinite().all() and (ours.dtype, ours.shape) == (plain.dtype, plain.shape)
    tolerance = TOLERANCE[x.dtype]
    if x.dtype == torch.bfloat16 and not x.is_cuda:
        tolerance = 2**-7  # the interpreter truncates
    allowed = (plain.double() - exact).abs().max() + tolerance * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= allowed
    # The delta itself, which is no smaller than the base's part, is there in every slice.
    begin = 0
    for size in lora.sizes:
        part = slice(begin, begin + size)
        without = nf4_lora_matmul_reference(x, weight, LoraDelta.zeros(16, x.shape[1], lora.sizes, x), bias)
        assert (ours - without)[:, part].norm() > 0.2 * ours[:, part].norm()
        begin += size


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "rows, sizes, inputs, rank",
    [
        (1, (37,), 256, 16),
        (1, (33, 7, 9), 320, 3),
        (5, (20, 45), 192, 8),
        (19, (40, 8, 8), 128, 16),
        (35, (24,), 64, 40),
    ],
)
def test_error_budget(kernel_device, rows, sizes, inputs, rank, dtype):
    x, weight, lora, bias = lora_case(rows, sizes, inputs, rank, dtype, kernel_device)
    check_lora(x, weight, lora, bias if rows > 1 else None)


def test_many_rows_and_leading_dimensions(kernel_device):
    x, weight, lora, bias = lora_case(260, (20, 12), 64, 16, torch.float16, kernel_device)
    whole = nf4_lora_matmul(x.view(2, 130, 64), weight, lora, bias, "triton")
    torch.testing.assert_close(whole.view(260, 32), nf4_lora_matmul_reference(x, weight, lora, bias))
    few = nf4_lora_matmul(x[:6].view(2, 3, 64), weight, lora, bias, "triton")
    torch.testing.assert_close(few.view(6, 32), whole.view(260, 32)[:6], rtol=1e-2, atol=1e-2)


def test_trials_refuse_wrong_results(kernel_device):
    """What a launch costs is asked of a right one only."""
    from slothrl_kernels.nf4_config import Nf4Config
    from slothrl_kernels.nf4_tuning import Trial, cold_weights

    trial = Trial.of(3, cold_weights(16, 128, kernel_device, copies=2))
    config = trial.complete(Nf4Config(16, 16, 2, parts=1))
    assert trial.microseconds(config, timer=lambda call, copies: call(copies - 1).shape[1] + copies) == 18
    wrong = replace(trial, exact=trial.exact.roll(1, 0))
    assert math.isinf(wrong.microseconds(config, timer=lambda *_: 1.0))


def test_operator_keeps_torchs_rules():
    x, weight, lora, bias = lora_case(3, (8, 4), 64, 16, torch.float32, "cpu")
    arguments = (weight.packed, weight.absmax, weight.code, [12, 64], 64, lora.a, lora.b, lora.ends, [8, 4], None, bias)
    torch.library.opcheck(torch.ops.slothrl_kernels.nf4_lora_matmul, (x, *arguments, "auto"))


def test_refuses():
    x, weight, lora, _ = lora_case(3, (8, 4), 64, 16, torch.float32, "cpu")
    with pytest.raises(ValueError):
        LoraDelta(lora.a, lora.b, lora.ends, (8, 5))
    with pytest.raises(ValueError):
        LoraDelta(lora.a, lora.b[:, :8].contiguous(), lora.ends, (8, 4))
    with pytest.raises(ValueError):
        nf4_lora_matmul(x[:, :32], weight, lora)
    nested = quantized((12, 64), nested=True)[2]
    with pytest.raises(ValueError):
        nf4_lora_matmul(x, nested, lora)
    assert [LoraDelta.padded_rank(rank) for rank in (1, 16, 17, 100)] == [16, 16, 32, 128]
