"""The Triton kernels of packed attention: an error budget for outputs and gradients, parts, splits, merging."""

from functools import partial

import pytest
import torch
from slothrl_kernels import PackedLayout, packed_attention, packed_attention_reference
from slothrl_kernels.attention_blocks import key_blocks
from slothrl_kernels.attention_merge import merge_, merge_reference_

from tests.kernels.attention_cases import LAYOUTS, values
from tests.kernels.budget import budget_of, check_budget

CASES = [
    ("one", (8, 1), 64, None, None),
    ("rows", (2, 2), 80, None, None),
    ("tree", (2, 1), 16, None, None),
    ("tree", (3, 1), 96, 7, None),
    ("rows", (2, 1), 20, 9, 2.0),
    ("tree", (1, 1), 128, None, 2.0),
    ("one", (1, 1), 256, 30, None),
]


@pytest.mark.parametrize("layout, heads, head_size, window, softcap", CASES)
def test_error_budget(kernel_device, layout, heads, head_size, window, softcap):
    layout = PackedLayout.build(*LAYOUTS[layout], device=kernel_device)
    *inputs, gradient = values(layout, heads, head_size, device=kernel_device)
    options = {"layout": layout, "window": window, "softcap": softcap}
    kernel = partial(packed_attention, impl="triton", **options)
    budget_of(kernel, partial(packed_attention_reference, **options), inputs, [0, 1, 2], [gradient])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_error_budget_in_16_bits(kernel_device, dtype):
    """Strided as the parts of a fused projection are; a gradient for q alone."""
    layout = PackedLayout.build([7, 3, 12], [-1, 0, 0], device=kernel_device)
    q, k, v, gradient = values(layout, (2, 1), 32, dtype, kernel_device)
    inputs = list(torch.cat([q, k, v], 1).split([2, 1, 1], 1))
    kernel = partial(packed_attention, layout=layout, scale=0.1, impl="triton")
    reference = partial(packed_attention_reference, layout=layout, scale=0.1)
    budget_of(kernel, reference, inputs, [0, 1, 2], [gradient])
    budget_of(kernel, reference, inputs, [0], [gradient])


def test_parts_of_a_shared_prefix_and_splits_of_a_group(kernel_device, monkeypatch):
    """Many children: the prefix's gradients come in parts. Few keys: the heads of a group are shared out."""
    monkeypatch.setattr("slothrl_kernels.attention_blocks.PART", 16)
    layout = PackedLayout.build([34, 20, 33, 3], [-1, 0, 0, -1], device=kernel_device)
    blocks, rows = key_blocks(layout, 32, 16, None)
    assert rows == 34 * 5  # its own queries, and its children's 53 in 4 parts
    assert sorted(block[6] for block in blocks.tolist() if block[6] >= 0) == [
        start + 34 * part for part in range(5) for start in (0, 32)
    ]
    *inputs, gradient = values(layout, (4, 1), 16, device=kernel_device)
    kernel = partial(packed_attention, layout=layout, impl="triton")
    budget_of(kernel, partial(packed_attention_reference, layout=layout), inputs, [0, 1, 2], [gradient])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_merge(kernel_device, dtype):
    generator = torch.Generator().manual_seed(0)
    outs = [torch.randn(9, 3, 20, generator=generator).to(kernel_device, dtype) for _ in range(2)]
    lses = [3 * torch.randn(3, 9, generator=generator).to(kernel_device) for _ in range(2)]
    lses[1][:, 4] = torch.inf  # what FlashAttention says of a query without keys, and not a row to merge
    rows = torch.tensor([0, 3, 8], device=kernel_device)
    results = []
    for precise, impl in ((torch.float64, "torch"), (dtype, "torch"), (dtype, "triton")):
        out, far = (x.to(precise, copy=True) for x in outs)
        lse, far_lse = (x.to(torch.float64 if precise == torch.float64 else torch.float32, copy=True) for x in lses)
        merge_(out, lse, far, far_lse, rows, impl)
        others = torch.tensor([i for i in range(9) if i not in (0, 3, 8)], device=kernel_device)
        assert torch.equal(out[others], outs[0][others].to(precise))
        results.append((out, lse))
    check_budget(["out", "lse"], *results)
    merge_reference_(*results[0], outs[1].double(), lses[1].double(), rows[:0])
