"""The nf4 GEMM with its work in equal shares, on a GPU: right at all shipped shapes, the same bits, CUDA graphs."""

from dataclasses import replace

import pytest
import torch
from slothrl_kernels.nf4_config import Nf4Config, candidates, complete
from slothrl_kernels.nf4_launches import HOPPER
from slothrl_kernels.nf4_matmul import AHEAD, launch
from slothrl_kernels.nf4_tuning import Trial, cold_weights

from tests.kernels.test_nf4_lora import lora_case
from tests.kernels.test_nf4_shares import check_shares

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SMALL = Nf4Config(64, 64, 2, 4, 4, registers=128, parts=2, slots=2)
WIDE = Nf4Config(64, 128, 2, 8, 3, registers=128, parts=1, slots=2)
LARGE = Nf4Config(128, 128, 2, 8, 2, registers=128, parts=4, slots=2)
LAUNCHES = {64: [SMALL, WIDE], 128: [LARGE], 256: [LARGE]}


@pytest.mark.parametrize("shape", sorted({key[1:] for key in HOPPER}), ids=lambda shape: f"{shape[0]}x{shape[1]}")
def test_all_shapes(shape):
    """Against the reference, with a LoRA, by one to four programs a multiprocessor; the same bits 20 times."""
    weights = cold_weights(*shape, copies=1)
    for rows, configs in LAUNCHES.items():
        trial = Trial.of(rows, weights)
        for config in configs:
            for slots in (1, 2, 3, 4):
                config = trial.complete(replace(config, slots=slots))
                found = trial.call(config, 0)
                assert found.isfinite().all()
                assert (found.float() - trial.exact).norm() <= 1e-2 * trial.exact.norm(), config
                for _ in range(20 if slots == 2 else 2):
                    assert torch.equal(trial.call(config, 0), found), config
        assert trial.lora.arrived is not None and not trial.lora.arrived.any()


@pytest.mark.parametrize("rows", [16, 32, 64, 128])
def test_every_candidate(rows):
    """What tuning may choose: a wrong one would lose there, and be nobody's notice."""
    trial = Trial.of(rows - 3, cold_weights(6144, 4096, copies=1))
    configs = [trial.complete(config) for config in candidates(rows) if config.slots]
    assert configs
    for config in configs:
        try:
            found = trial.call(config, 0)
        except Exception as error:  # a card with less shared memory refuses some
            assert "out of resource" in str(error)
            continue
        assert (found.float() - trial.exact).norm() <= 1e-2 * trial.exact.norm(), config


@pytest.mark.parametrize(
    "rows, sizes, inputs, config",
    [
        (1, (37,), 64, Nf4Config(16, 32, 1, 2, 3, slots=3)),
        (61, (256, 77), 4096, SMALL),
        (130, (1,), 192, replace(LARGE, slots=1)),
        (200, (256, 77), 4096, LARGE),
    ],
)
def test_odd_shapes(rows, sizes, inputs, config):
    """Under the error budget: fewer steps than programs, rows and tokens beyond the end of a tile, slices, a bias."""
    x, weight, lora, bias = lora_case(rows, sizes, inputs, 16, torch.bfloat16, "cuda")
    check_shares(x, weight, config, bias, lora)
    check_shares(x.half(), weight, config, bias.half())


@pytest.mark.parametrize("with_lora", [True, False])
@pytest.mark.parametrize("rows, config", [(64, WIDE), (128, LARGE), (256, LARGE)])
def test_a_chain_in_a_cuda_graph(rows, config, with_lora):
    """Twelve layers, each on the last one's output, as by launches that do not start early: nothing is left behind."""
    _, weight, lora, bias = lora_case(rows, (4096,), 4096, 16, torch.bfloat16, "cuda")
    lora, config = (lora if with_lora else None), complete(config, rows, 4096, 4096, 1)

    def chain(x, ahead=AHEAD):
        for _ in range(12):
            y = launch(x, weight, bias, config, lora, ahead)
            x = torch.nn.functional.rms_norm(y.float(), (4096,)).to(y.dtype)
        return x

    def values(seed):
        generator = torch.Generator("cuda").manual_seed(seed)
        return torch.randn((rows, 4096), generator=generator, device="cuda").to(torch.bfloat16)

    x, stream, graph = values(0), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    chain(x)  # compiled before the capture
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        y = chain(x)
    for seed in range(20):
        x.copy_(values(seed))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, chain(x, 0))
