"""The 8-bit AdamW in few launches on a GPU: bitsandbytes' own bits, fewer kernels, no wait, right on any stream."""

import pytest
import torch
from bitsandbytes.optim import AdamW8bit
from torch import nn

import slothrl.flat_adamw as flat_adamw
from slothrl.flat_adamw import FlatAdamW8bit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LAYER = [(16, 4096), (4096, 16), (1024, 16), (16, 14336), (14336, 16), (20, 333), (64,)]  # broken blocks and 32 bits


def parameters(dtype, layers=4) -> list[nn.Parameter]:
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = LAYER * layers
    return [nn.Parameter(torch.randn(s, device="cuda", generator=generator).to(dtype) * 0.02) for s in shapes]


def with_gradients(found: list[nn.Parameter], turn: int, missing=()) -> None:
    generator = torch.Generator("cuda").manual_seed(turn + 1)
    for i, p in enumerate(found):
        gradient = torch.randn(p.shape, device="cuda", generator=generator).to(p.dtype) * 10.0 ** (i % 7 - 6)
        p.grad = None if i in missing else gradient


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("most", [flat_adamw.MOST, 300_000])
def test_every_bit(dtype, most, monkeypatch):
    monkeypatch.setattr(flat_adamw, "MOST", most)
    results = []
    for make in (AdamW8bit, FlatAdamW8bit):
        found = parameters(dtype)
        optimizer = make(found, lr=1e-3, weight_decay=0.05)
        for turn in range(5):
            with_gradients(found, turn, missing=(3, 8) if turn == 2 else ())
            optimizer.step()
        results.append((found, optimizer.state_dict()["state"]))
    (theirs, their_state), (ours, our_state) = results
    assert all(map(torch.equal, ours, theirs))
    for key, state in their_state.items():
        wrapped = state.pop("__bnb_optimizer_quant_state__")
        mine = our_state[key].pop("__bnb_optimizer_quant_state__")
        assert our_state[key] == state and mine.keys() == wrapped.keys()
        assert all(torch.equal(mine[name], wrapped[name]) for name in wrapped), key


def kernels(step) -> int:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        torch.cuda.synchronize()
    return sum(event.count for event in profile.key_averages() if "Memset" not in event.key)


def test_launches_do_not_grow_with_the_tensors():
    counts = []
    for make in (AdamW8bit, FlatAdamW8bit):
        found = parameters(torch.float32, layers=16)  # 112 tensors
        optimizer = make(found)
        for turn in range(2):
            with_gradients(found, turn)
            optimizer.step()
        counts.append(kernels(optimizer.step))
    assert counts[0] >= 112 and counts[1] <= 40, counts


def test_on_another_stream():
    """bitsandbytes' kernels run on the default stream, whatever made the gradients."""
    results = []
    for stream in (torch.cuda.default_stream(), torch.cuda.Stream()):
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            found = parameters(torch.float32)
            optimizer = FlatAdamW8bit(found)
            for turn in range(4):
                torch.cuda._sleep(20_000_000)  # the gradients come late
                with_gradients(found, turn)
                optimizer.step()
        torch.cuda.synchronize()
        results.append(found)
    assert all(map(torch.equal, *results))


def test_transient_memory():
    """Two buckets' worth at most: values and gradients."""
    found = parameters(torch.float32, layers=16)
    optimizer = FlatAdamW8bit(found)
    with_gradients(found, 0)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before
    assert extra <= 2 * 4 * min(flat_adamw.MOST, sum(p.numel() + 256 for p in found)) + 2**20
