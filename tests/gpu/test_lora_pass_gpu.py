"""One pass over dy, and adapters cast in one launch, at real sizes: error budgets, bits, CUDA graphs, times."""

import pytest
import torch
from slothrl_kernels import lora_pass as module
from slothrl_kernels.adapter_cast import cast_into, cast_into_reference
from slothrl_kernels.lora_pass import LARGE, SMALL, lora_pass, lora_pass_reference

from tests.gpu.test_nf4_group_gpu import graphed_ms
from tests.kernels.budget import check_budget
from tests.kernels.test_lora_pass import inputs, results

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPES = {"q, k, v of 8B": (4096, 1024, 1024), "o of 8B": (4096,), "q, k, v of 0.6B": (2048, 1024, 1024)}


@pytest.mark.parametrize("tile", [SMALL, LARGE])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("sizes, tokens", [((4096, 1024, 1024), 4096), ((4096,), 1000), ((256, 256), 33)])
def test_error_budget(sizes, tokens, dtype, tile, monkeypatch):
    if dtype != torch.float32 and tile != module.tile_of(torch.device("cuda")) == SMALL:
        pytest.skip("not enough shared memory")
    monkeypatch.setattr(module, "tile_of", lambda device: tile)
    wide, xa, b = inputs(sizes, 16, tokens, dtype, "cuda")
    exact = results(lora_pass_reference, wide.double(), xa.double(), sizes, [x.double() for x in b])
    plain = results(lora_pass_reference, wide, xa, sizes, b)
    ours = results(lora_pass, wide, xa, sizes, b, impl="triton")
    check_budget(["dy B", *("dB" for _ in sizes)], exact, plain, ours)
    again = results(lora_pass, wide, xa, sizes, b, impl="triton")
    assert all(torch.equal(x, y) for x, y in zip(ours, again, strict=True))


def test_addresses_beyond_32_bits():
    """The last rows of dy lie more than 2**31 values behind the first."""
    tokens, outputs = 2**20 + 64, 2048
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GB of free memory")
    to_y = torch.zeros(tokens, outputs, dtype=torch.bfloat16, device="cuda")
    xa, to_xa = (torch.zeros(tokens, 16, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    to_y[-1], xa[-1] = 1.0, 2.0
    b, found = (torch.full((outputs, 16), value, dtype=torch.bfloat16, device="cuda") for value in (0.5, 9.0))
    lora_pass(to_y, xa, [outputs], [b], to_xa, [found])
    assert found.eq(2).all() and to_xa[-1].eq(outputs / 2).all() and to_xa[:-1].eq(0).all()


@pytest.mark.parametrize("case", SHAPES)
def test_time(case, capsys):
    sizes, tokens = SHAPES[case], 8192
    wide, xa, b = inputs(sizes, 16, tokens, torch.bfloat16, "cuda")
    outputs, found = sum(sizes), torch.empty(sum(sizes) * 16, dtype=torch.bfloat16, device="cuda")
    found = [x.view(-1, 16) for x in found.split([n * 16 for n in sizes])]
    given = (wide[:, :outputs], xa, sizes, b, wide[:, outputs:], found)
    times: dict = {lora_pass: [], lora_pass_reference: []}
    for f in 3 * (lora_pass, lora_pass_reference):  # a card that did nothing begins slowly
        times[f].append(graphed_ms(lambda f=f: f(*given)))
    ours, theirs = (min(times[f]) for f in (lora_pass, lora_pass_reference))
    with capsys.disabled():
        print(f"\nRESULT dy B and dB, {case}, {tokens} tokens: {1e3 * ours:.1f} us, by GEMMs {1e3 * theirs:.1f}")
    assert not wide[:, : outputs + 16 * len(sizes)].isnan().any()


def test_adapters_of_a_layer(capsys):
    """An 8B layer's: torch's bits, where a graph replays it with other values too."""
    shapes = [(16, 4096), (4096, 16), (16, 4096), (1024, 16), (16, 4096), (1024, 16), (16, 4096), (4096, 16)]
    shapes += [(16, 4096), (14336, 16), (16, 4096), (14336, 16), (16, 14336), (4096, 16)]
    sources = [torch.randn(shape, device="cuda") for shape in shapes]
    begins = [sum(x.numel() for x in sources[:i]) for i in range(len(shapes))]
    factors = [2.0, 1.0] * 7
    count = sum(x.numel() for x in sources)
    out, expected = (torch.zeros(count, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    cast_into(out, sources, begins, factors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        cast_into(out, sources, begins, factors)
    for x in sources:
        x.mul_(3)
    graph.replay()
    cast_into_reference(expected, sources, begins, factors)
    assert torch.equal(out, expected) and expected.abs().max() > 1
    times = [1e3 * graphed_ms(lambda f=f: f(out, sources, begins, factors)) for f in (cast_into, cast_into_reference)]
    with capsys.disabled():
        print(f"\nRESULT an 8B layer's adapters cast: {times[0]:.1f} us, by torch {times[1]:.1f}")
