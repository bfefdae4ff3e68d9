"""Weights unpacked together on a GPU, at real sizes: the bits of one by one, in one kernel, and no slower."""

import statistics

import pytest
import torch
from slothrl_kernels.nf4_dequantize import nf4_dequantize
from slothrl_kernels.nf4_group import Part, unpack_group

from tests.kernels.nf4_cases import quantized

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
GROUPS = {"q, k, v": (4096, 1024, 1024), "gate, up": (14336, 14336), "o": (4096,)}
K, RANK = 4096, 16


def group(rows):
    weights = [quantized((n, K), 64, True, "cuda")[2] for n in rows]
    beside = [torch.randn(n, RANK, device="cuda").bfloat16() for n in rows]
    parts = [Part(w, b, RANK * i) for i, (w, b) in enumerate(zip(weights, beside, strict=True))]
    out = torch.full((sum(rows), K + RANK * len(rows)), float("nan"), dtype=torch.bfloat16, device="cuda")
    return parts, out


def one_by_one(parts, out):
    out[:, K:].zero_()
    end = 0
    for w, b, start, _ in parts:
        rows = out[end : end + w.shape[0]]
        nf4_dequantize(w, torch.bfloat16, rows[:, :K])
        rows[:, K + start : K + start + RANK] = b
        end += w.shape[0]
    return out


def graphed_ms(call) -> float:
    """Milliseconds of the GPU alone: replays of a CUDA graph of ten calls."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            call()
    times = []
    for _ in range(7):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 10)
    return statistics.median(times)


@pytest.mark.parametrize("case", GROUPS)
def test_bits_launches_and_time(case, capsys):
    parts = group(GROUPS[case])
    ours = unpack_group(*parts, impl="triton").clone()
    parts[1].fill_(float("nan"))
    assert torch.equal(ours, one_by_one(*parts))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        unpack_group(*parts)
        torch.cuda.synchronize()
    assert sum(event.count for event in profile.key_averages()) == 1
    together, apart = (graphed_ms(lambda f=f: f(*parts)) for f in (unpack_group, one_by_one))
    with capsys.disabled():
        print(f"\n{case}: together {together:.4f} ms, one by one {apart:.4f} ms")
    assert together <= 1.05 * apart
