"""X in the order of the decoded codes, and X A^T: every launch worth timing, and how K is shared."""

import pytest
import torch
from slothrl_kernels.nf4_inputs import CANDIDATES, MAX_SPLITS, InputsConfig, nf4_inputs


@pytest.mark.parametrize("config", CANDIDATES)
def test_order_and_product(kernel_device, config):
    generator = torch.Generator().manual_seed(0)
    x, a = (torch.randn(n, 1280, generator=generator).to(torch.float16).to(kernel_device) for n in (3, 24))
    ordered, xa = nf4_inputs(x, 2, a, config=config)
    assert xa is not None
    assert torch.equal(ordered, x.view(3, -1, 32, 4).transpose(2, 3).reshape(3, 1280))
    exact = x.double() @ a.double().t()
    assert (xa.double() - exact).abs().max() <= 2**-10 * exact.abs().max()
    assert torch.equal(xa, nf4_inputs(x, 2, a, config=config)[1])
    assert torch.equal(nf4_inputs(x, 2, config=config)[0], ordered)


@pytest.mark.parametrize("share", [64, 256, 512, 1024])
@pytest.mark.parametrize("group", [64, 128, 256])
@pytest.mark.parametrize("inputs", [256, 768, 4096, 4864, 14336])
def test_no_program_is_without_work(inputs, group, share):
    steps = inputs // group
    splits = InputsConfig(share).splits(steps, group)
    each = -(-steps // splits)  # as the kernel shares them
    assert 1 <= splits <= MAX_SPLITS and (splits - 1) * each < steps
