"""The nf4 GEMM that starts while its inputs are still made: the same bits, eagerly and in CUDA graphs."""

from dataclasses import replace

import pytest
import torch
from slothrl_kernels.early_launch import starts_early
from slothrl_kernels.nf4_config import Nf4Config, complete
from slothrl_kernels.nf4_launches import choose_config
from slothrl_kernels.nf4_matmul import launch

from tests.kernels.test_nf4_lora import lora_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def values(rows, seed):
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn((rows, 4096), generator=generator, device="cuda").to(torch.bfloat16)


@pytest.fixture
def hopper():
    if not starts_early(torch.device("cuda", 0)):
        pytest.skip("kernels start early from compute capability 9.0 on")


@pytest.mark.parametrize("ahead", [1, 8 << 20, 1 << 40])
@pytest.mark.parametrize("rows", [1, 16, 64, 256])
def test_early_and_late_have_the_same_bits(hopper, rows, ahead):
    """Inputs change with every call, so a GEMM that did not wait would be seen; more than all of W asked for, too."""
    _, weight, lora, bias = lora_case(rows, (4096, 1024, 1024), 4096, 16, torch.bfloat16, "cuda")
    config = choose_config(rows, 6144, 4096, torch.device("cuda", 0))
    for splits in (1, 3, 7):
        config = replace(config, splits=splits)
        for seed in range(10):
            x = values(rows, seed)
            early, late = (launch(x, weight, bias, config, lora, size) for size in (ahead, 0))
            assert torch.equal(early, late)
    assert lora.arrived is not None and not lora.arrived.any()


@pytest.mark.parametrize("with_lora", [True, False])
@pytest.mark.parametrize("rows", [16, 64])
def test_a_chain_in_a_cuda_graph(hopper, rows, with_lora):
    """Twelve layers, each on the last one's output: what one leaves behind does not reach into the next."""
    _, weight, lora, _ = lora_case(rows, (4096,), 4096, 16, torch.bfloat16, "cuda")
    lora = lora if with_lora else None
    config = choose_config(rows, 4096, 4096, torch.device("cuda", 0))

    def chain(x, ahead):
        for _ in range(12):
            y = launch(x, weight, None, config, lora, ahead)
            x = torch.nn.functional.rms_norm(y.float(), (4096,)).to(y.dtype)
        return x

    x, stream, graph = values(rows, 0), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    chain(x, 8 << 20)  # compiled before the capture
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        y = chain(x, 8 << 20)
    for seed in range(5):
        x.copy_(values(rows, seed))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, chain(x, 0))


@pytest.mark.parametrize("apart", [0, 1])
@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("shape", [(16, 64, 4, 4, 3), (64, 64, 2, 4, 3), (64, 128, 2, 8, 3), (128, 128, 2, 8, 2)])
def test_parts_and_places(shape, parts, apart):
    """Every way to multiply a step, from every place of K: the same products, within the budget against float64."""
    from slothrl_kernels import nf4_lora_matmul_reference

    rows = shape[0] - 3
    x, weight, lora, bias = lora_case(rows, (256, 77), 4096, 16, torch.bfloat16, "cuda")
    exact = nf4_lora_matmul_reference(x, weight, lora, bias).float()
    for splits in (1, 5):
        config = Nf4Config(*shape, splits=splits, registers=128, parts=parts, apart=apart)
        found = launch(x, weight, bias, complete(config, rows, 333, 4096, 132), lora).float()
        assert (found - exact).norm() <= 5e-3 * exact.norm()
        again = launch(x, weight, bias, complete(config, rows, 333, 4096, 132), lora).float()
        assert torch.equal(found, again)
