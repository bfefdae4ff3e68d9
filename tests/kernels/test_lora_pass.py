"""What the adapters need of dy in one pass: under the error budget, at odd sizes, and nothing beside it is written."""

import pytest
import torch
from slothrl_kernels import lora_pass as module
from slothrl_kernels.lora_pass import lora_pass, lora_pass_reference, serves

from tests.kernels.budget import check_budget

# Outputs of each, rank, tokens: strips of 128; tokens that fill no tile, several, one; ranks that fill no 16 columns.
CASES = [((256, 128, 128), 16, 200), ((256,), 8, 70), ((128, 128), 24, 1), ((128, 256), 3, 64)]


def stacked(sizes, rank, dtype, device, seed=None):
    """Every (N_i, r) one below the other in memory; NaN where nothing is to be read."""
    made = torch.full((sum(sizes) * rank,), float("nan"))
    if seed is not None:
        made = torch.randn(made.shape, generator=torch.Generator().manual_seed(seed))
    return [x.view(-1, rank) for x in made.to(device, dtype).split([n * rank for n in sizes])]


def inputs(sizes, rank, tokens, dtype, device):
    """dy to the left of where dy B goes, as a layer has it; x A'^T to the right of something else."""
    g = torch.Generator().manual_seed(0)
    wide = torch.full((tokens, sum(sizes) + rank * len(sizes) + 8), float("nan"))
    wide[:, : sum(sizes)] = torch.randn(tokens, sum(sizes), generator=g)
    both = torch.randn(tokens, 40 + rank * len(sizes), generator=g)
    return wide.to(device, dtype), both.to(device, dtype)[:, 40:], stacked(sizes, rank, dtype, device, seed=1)


def results(function, wide, xa, sizes, b, **options):
    wide, found = wide.clone(), stacked(sizes, b[0].size(1), wide.dtype, wide.device)
    outputs = sum(sizes)
    function(wide[:, :outputs], xa, sizes, b, wide[:, outputs:], found, **options)
    used = outputs + sum(x.size(1) for x in b)
    assert wide[:, used:].isnan().all()
    return [wide[:, outputs:used], *found]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("sizes, rank, tokens", CASES)
def test_error_budget(kernel_device, sizes, rank, tokens, dtype):
    wide, xa, b = inputs(sizes, rank, tokens, dtype, kernel_device)
    exact = results(lora_pass_reference, wide.double(), xa.double(), sizes, [x.double() for x in b])
    plain = results(lora_pass_reference, wide, xa, sizes, b)
    ours = results(lora_pass, wide, xa, sizes, b, impl="triton")
    check_budget(["dy B", *("dB" for _ in sizes)], exact, plain, ours)
    again = results(lora_pass, wide, xa, sizes, b, impl="triton")
    assert all(torch.equal(x, y) for x, y in zip(ours, again, strict=True))


def test_several_programs_along_the_tokens(kernel_device, monkeypatch):
    """Each leaves a sum of its own, also where the last has no tokens for all of its turns."""
    monkeypatch.setattr(module, "processors", lambda device: 3)
    wide, xa, b = inputs((128, 128), 4, 900, torch.float32, kernel_device)
    exact = results(lora_pass_reference, wide.double(), xa.double(), (128, 128), [x.double() for x in b])
    ours = results(lora_pass, wide, xa, (128, 128), b, impl="triton")
    assert all((x - y).abs().max() < 1e-3 for x, y in zip(ours, exact, strict=True))


def test_one_without_adapter_and_other_ranks():
    """The columns of x A'^T are those of the adapters there are; its output's gradient is passed over."""
    g = torch.Generator().manual_seed(0)
    to_y, xa, to_xa = (torch.randn(5, n, generator=g).double() for n in (24, 8, 8))
    b, found = [torch.randn(8, 3).double(), None, torch.randn(12, 2).double()], [torch.empty(8, 3).double(), None]
    found, before = [*found, torch.empty(12, 2).double()], to_xa.clone()
    lora_pass(to_y, xa, [8, 4, 12], b, to_xa, found)
    torch.testing.assert_close(to_xa[:, :3], to_y[:, :8] @ b[0])
    torch.testing.assert_close(to_xa[:, 3:5], to_y[:, 12:] @ b[2])
    torch.testing.assert_close(found[0], to_y[:, :8].T @ xa[:, :3])
    torch.testing.assert_close(found[2], to_y[:, 12:].T @ xa[:, 3:5])
    assert torch.equal(to_xa[:, 5:], before[:, 5:])


def test_no_tokens(kernel_device):
    _, *found = results(lora_pass, *inputs((128,), 16, 0, torch.float16, kernel_device)[:2], (128,),
                        stacked((128,), 16, torch.float16, kernel_device, seed=1), impl="triton")  # fmt: skip
    assert found[0].eq(0).all()


def test_what_the_kernels_serve():
    """Strips of one projection each, one rank, B and its gradients one below the other, at most three."""

    def served(sizes, rank=16, dtype=torch.float16, b=None):
        b = b or stacked(sizes, rank, dtype, "cpu", seed=0)
        return serves(torch.empty(2, sum(sizes), dtype=dtype), b, stacked(sizes, rank, dtype, "cpu"), "triton")

    assert served((256, 128)) and served((128,), 64)
    assert not served((256, 64)) and not served((128,), 65) and not served((128,) * 4)
    assert not served((128,), dtype=torch.float64)
    apart = [torch.empty(128, 16, dtype=torch.float16) for _ in range(2)]
    assert not served((128, 128), b=[apart[0], torch.empty(1), apart[1]][::2])
    assert not serves(torch.empty(2, 128), stacked((128,), 4, torch.float32, "cpu", 0), [torch.empty(128, 4)], "torch")


def test_what_does_not_fit():
    to_y, small, b = torch.empty(3, 8), torch.empty(3, 2), [torch.empty(8, 2)]
    for given in (
        (to_y, small, [7], b, small, b),
        (to_y, small, [8], b, small[:2], b),
        (to_y, small[:, :1], [8], b, small, b),
        (to_y, small, [8], b, small, [torch.empty(8, 3)]),
        (to_y, small, [4, 4], [*b, None], small, [*b, None]),
    ):
        with pytest.raises(ValueError):
            lora_pass(*given)
