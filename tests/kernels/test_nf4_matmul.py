"""The nf4 GEMM under an error budget against float64; its dispatch, its gradient and torch.compile."""

import dataclasses

import pytest
import torch
from slothrl_kernels import Nf4Weight, nf4_matmul, nf4_matmul_reference
from slothrl_kernels.nf4_config import DEFAULTS, ROW_BUCKETS, Nf4Config, bucket, candidates, complete
from slothrl_kernels.nf4_launches import SHIPPED, cache_file, choose_config, found_launches, keep, untuned

from tests.kernels.nf4_cases import quantized

# Relative to the largest value, on top of the reference's own error: what codes in float16 move.
TOLERANCE = {torch.bfloat16: 2**-9, torch.float16: 2**-11}
SMALL, WIDE = Nf4Config(16, 32, 2), Nf4Config(16, 32, 4, parts=1, apart=1)
NARROW = Nf4Config(32, 16, 1, parts=2, apart=1)


def check_budget(x, weight, bias, config=None):
    exact = nf4_matmul_reference(x.double(), weight, None if bias is None else bias.double())
    plain = nf4_matmul_reference(x, weight, bias)
    ours = nf4_matmul(x, weight, bias, "triton", config)
    assert ours.isfinite().all() and ours.dtype == x.dtype and ours.shape == plain.shape
    tolerance = TOLERANCE[x.dtype]
    if x.dtype == torch.bfloat16 and not x.is_cuda:
        tolerance = 2**-7  # Triton 3.9's interpreter truncates to bfloat16
    allowed = (plain.double() - exact).abs().max() + tolerance * exact.abs().max()
    assert (ours.double() - exact).abs().max() <= allowed


def case(rows, outputs, inputs, dtype, device, nested=False, blocksize=64):
    weight = quantized((outputs, inputs), blocksize, nested, device)[2]
    generator = torch.Generator().manual_seed(rows)
    x, bias = torch.randn(rows, inputs, generator=generator), torch.randn(outputs, generator=generator)
    return x.to(dtype).to(device), weight, bias.to(dtype).to(device)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("config", [SMALL, WIDE, NARROW], ids=["two chunks", "four", "one"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows, outputs, inputs", [(1, 37, 256), (5, 64, 192), (19, 33, 320)])
def test_error_budget(kernel_device, rows, outputs, inputs, dtype, config, splits):
    x, weight, bias = case(rows, outputs, inputs, dtype, kernel_device)
    check_budget(x, weight, bias if splits > 1 else None, dataclasses.replace(config, splits=splits))


@pytest.mark.parametrize("config", [SMALL, WIDE, NARROW], ids=["two chunks", "four", "one"])
@pytest.mark.parametrize("blocksize", [64, 128, 4096])
@pytest.mark.parametrize("nested", [False, True])
def test_absmax(kernel_device, nested, blocksize, config):
    """K is not a multiple of the larger blocks, which then run over the ends of rows."""
    x, weight, bias = case(3, 20, 320, torch.float16, kernel_device, nested, blocksize)
    check_budget(x, weight, bias, config)


@pytest.mark.parametrize("rows", [1, 3, 17, 33])
def test_default_configs(kernel_device, rows):
    check_budget(*case(rows, 65, 64, torch.float16, kernel_device))
    check_budget(*case(rows, 1, 512, torch.bfloat16, kernel_device))


@pytest.mark.parametrize("inputs, blocksize", [(100, 64), (64, 32)])
def test_weights_that_the_gemm_does_not_take(kernel_device, inputs, blocksize):
    x, weight, bias = case(2, 6, inputs, torch.float16, kernel_device, blocksize=blocksize)
    torch.testing.assert_close(nf4_matmul(x, weight, bias, "triton"), nf4_matmul_reference(x, weight, bias))


def test_many_rows_and_none(kernel_device):
    x, weight, bias = case(257, 6, 64, torch.float16, kernel_device)
    torch.testing.assert_close(nf4_matmul(x, weight, bias, "triton"), nf4_matmul_reference(x, weight, bias))
    assert nf4_matmul(x[:0], weight, bias, "triton").shape == (0, 6)


def test_any_strides_and_leading_dimensions(kernel_device):
    x, weight, bias = case(4, 20, 128, torch.float16, kernel_device)
    wide = torch.full((2, 2, 301), float("nan"), dtype=torch.float16, device=kernel_device)
    wide[..., 1:129] = x.view(2, 2, 128)
    ours = nf4_matmul(wide[..., 1:129], weight, bias, "triton")
    assert torch.equal(ours, nf4_matmul(x, weight, bias, "triton").view(2, 2, 20))
    assert torch.equal(nf4_matmul(x[0], weight, bias, "triton", SMALL), ours[0, 0])


def test_shards_in_one_launch(kernel_device):
    """A fused projection's shards, quantised one by one, are one weight with their absmax in one tensor."""
    shards = [quantized((rows, 128), device=kernel_device) for rows in (24, 8, 9)]
    fused = Nf4Weight(
        torch.cat([shard[0].flatten() for shard in shards]),
        torch.cat([shard[2].absmax for shard in shards]),
        shards[0][2].code,
        (41, 128),
    )
    x = torch.randn(3, 128, dtype=torch.float16, device=kernel_device)
    ours = torch.cat([nf4_matmul(x, shard[2], impl="triton", config=SMALL) for shard in shards], 1)
    assert torch.equal(nf4_matmul(x, fused, impl="triton", config=SMALL), ours)


@pytest.mark.parametrize("impl", ["triton", "torch"])
def test_gradient(kernel_device, impl):
    x, weight, bias = case(5, 20, 128, torch.float16, kernel_device)
    gradients = []
    for function in (lambda *a: nf4_matmul(*a, impl=impl), nf4_matmul_reference):
        leaves = x.clone().requires_grad_(), bias.clone().requires_grad_()
        y = function(leaves[0], weight, leaves[1])
        (y * torch.linspace(-1, 1, 20, device=kernel_device)).sum().backward()
        gradients.append((leaves[0].grad, leaves[1].grad))
    torch.testing.assert_close(*gradients)


def test_gradient_is_autograds():
    """The operator's backward in float64, which its reference path runs in."""
    x, weight, bias = case(3, 6, 64, torch.float64, "cpu")
    assert torch.autograd.gradcheck(lambda a, b: nf4_matmul(a, weight, b), (x.requires_grad_(), bias.requires_grad_()))


def test_compiles_in_one_graph():
    x, weight, bias = case(3, 6, 64, torch.float32, "cpu", nested=True)
    compiled = torch.compile(lambda t: nf4_matmul(t, weight, bias) * 2, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), 2 * nf4_matmul_reference(x, weight, bias))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled(ours).sum().backward()
    (2 * nf4_matmul_reference(theirs, weight, bias)).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("nested", [False, True])
def test_operator_keeps_torchs_rules(nested):
    x, weight, bias = case(3, 6, 64, torch.float32, "cpu", nested)
    inner = weight.nested
    tensors = (inner.code, inner.absmax, inner.offset, 256) if inner else (None, None, None, 0)
    arguments = (weight.packed, weight.absmax, weight.code, list(weight.shape), weight.blocksize, *tensors)
    torch.library.opcheck(torch.ops.slothrl_kernels.nf4_matmul, (x.requires_grad_(), *arguments, bias, "auto", []))


def test_refuses():
    x, weight, bias = case(3, 6, 64, torch.float32, "cpu")
    for wrong in ((x[:, :32],), (x.long(),), (x, bias.half()), (x, bias[:5])):
        arguments = (wrong[0], weight, *wrong[1:])
        for function in (nf4_matmul, nf4_matmul_reference):
            with pytest.raises(ValueError):
                function(*arguments)


def test_configs():
    assert [bucket(rows) for rows in (1, 3, 16, 17, 256)] == [16, 16, 16, 32, 256]
    for rows in DEFAULTS:
        assert DEFAULTS[rows] in candidates(rows) and len(candidates(rows)) <= 14
        for outputs, inputs in ((1, 64), (6144, 4096), (4096, 14336), (896, 4864)):
            config = choose_config(rows, outputs, inputs, torch.device("cpu"))
            steps = inputs // 64 / config.chunks
            assert steps == int(steps) and 1 <= config.splits <= steps
    assert complete(Nf4Config(16, 64, 4), 16, 64, 64 * 6, 132).chunks == 2


def test_winners_are_kept_by_gpu(tmp_path, monkeypatch):
    """A file that is damaged, or of another GPU, is as good as none; writing keeps what others have."""
    from slothrl_kernels import nf4_launches

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name, device = ["one"], torch.device("cpu")
    monkeypatch.setattr(nf4_launches, "gpu_key", lambda _: name[0])
    found_launches.cache_clear()
    assert found_launches(device) == {}
    first, second = Nf4Config(16, 64, 2, 4, 3, 5), Nf4Config(128, 128, 2, 8, 3, 2, 128)
    keep({(16, 6144, 4096): first}, device)
    name[0] = "two"
    found_launches.cache_clear()
    assert found_launches(device) == {}
    keep({(256, 6144, 4096): second}, device)
    assert found_launches(device) == {(256, 6144, 4096): second}
    name[0] = "one"
    found_launches.cache_clear()
    assert found_launches(device) == {(16, 6144, 4096): first}
    cache_file().write_text("{")
    found_launches.cache_clear()
    assert found_launches(device) == {}
    found_launches.cache_clear()


def test_what_was_not_timed_on_this_gpu(tmp_path, monkeypatch):
    """Shipped launches serve the GPUs that they were timed on; a user's own come first and fill the gaps."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    card, device = ["NVIDIA H200"], torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: card[0])
    found_launches.cache_clear()
    assert untuned([(6144, 4096), (6144, 4096)], device) == []
    assert untuned([(2560, 2048)], device) == [(32, 2560, 2048)]
    keep({(32, 2560, 2048): Nf4Config(32, 64, 2)}, device)
    assert untuned([(2560, 2048)], device) == []
    card[0] = "a card that nobody has"
    found_launches.cache_clear()
    assert untuned([(64, 64)], device) == [(rows, 64, 64) for rows in ROW_BUCKETS]
    found_launches.cache_clear()
    choose_config.cache_clear()


def test_shipped_launches_fit_their_shapes():
    for winners in SHIPPED.values():
        for (rows, outputs, inputs), config in winners.items():
            assert bucket(rows) == rows and (inputs // 64) % config.chunks == 0
            assert complete(config, rows, outputs, inputs, 132) == config
