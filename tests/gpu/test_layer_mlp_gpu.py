"""A decoder layer whose MLP runs in tiles, on a GPU: no worse than plain torch in bf16, and leaner."""

import pytest
import torch
from slothrl_kernels import layer_mlp
from slothrl_kernels.decoder_layer import decoder_layer
from slothrl_kernels.layer_reference import decoder_layer_reference

from tests.gpu.test_fuse_gpu import TOKENS, assert_no_worse, layer_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
MIB = 2**20


def cut_into(monkeypatch, tiles: int, tokens: int) -> None:
    """8B's MLP into this many tiles."""
    size = tokens * 2 * 14336 * 2 // tiles
    monkeypatch.setattr(layer_mlp, "tile_bytes", lambda total: size)
    assert -(-14336 // layer_mlp.columns_of(tokens, 14336, 2, size)) == tiles


@pytest.mark.parametrize("tiles", [4, 8])
def test_against_float64(tiles, monkeypatch):
    """Tiles or not, float64's truth and the bf16 reference's error are of the whole MLP."""
    cut_into(monkeypatch, tiles, TOKENS)
    layer, group = layer_of("8b", "input")
    ours = lambda x, g: layer(decoder_layer, x, g)  # noqa: E731
    assert_no_worse(ours, lambda x, g: layer(decoder_layer_reference, x, g), group)


def measured(layer, group, x) -> tuple[float, float]:
    """(peak MiB beyond what was there, ms of the GPU and whatever it waits for) of a forward and a backward."""
    leaves = [t for p in group for t in (p.a, p.b)]
    to_y = torch.randn_like(x)

    def call():
        torch.autograd.grad(layer(decoder_layer, x, group), [x, *leaves], to_y)

    call()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    torch.cuda.synchronize()
    peak = (torch.cuda.max_memory_allocated() - before) / MIB
    times = []
    for _ in range(9):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return peak, sorted(times)[4]


def test_memory_and_time(monkeypatch, capsys):
    """8B's layer, 4,096 tokens: two tiles take 100 MiB less than one, which it runs in where memory is plenty."""
    layer, group = layer_of("8b", "input")
    for p in group:
        p.a.requires_grad_(), p.b.requires_grad_()  # pyright: ignore
    x = (torch.randn(4 * TOKENS, 4096, device="cuda") * 0.1).bfloat16().requires_grad_()
    found = {}
    for tiles in (1, 2, 4, 8):
        cut_into(monkeypatch, tiles, 4 * TOKENS)
        found[tiles] = measured(layer, group, x)
    with capsys.disabled():
        for tiles, (peak, ms) in found.items():
            print(f"\n{tiles} tiles: {peak:.0f} MiB, {ms:.2f} ms", end="")
    assert found[2][0] <= found[1][0] - 100 and found[4][0] <= found[1][0] - 250
