"""Two partial attentions over different keys made one by their log-sum-exps (Dao, arXiv:2307.08691, section 3.1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from slothrl_kernels.switch import HAS_TRITON, Impl, jit, takes_triton

if TYPE_CHECKING or HAS_TRITON:
    import triton
    import triton.language as tl


def merge_reference_(out: Tensor, lse: Tensor, far_out: Tensor, far_lse: Tensor, rows: Tensor) -> None:
    """The plain-torch truth of `merge_`, with the same arguments."""
    near, far = lse[:, rows], far_lse[:, rows]
    both = torch.logaddexp(near, far)
    precise = torch.promote_types(out.dtype, torch.float32)
    shares = [(part - both).exp().T[:, :, None].to(precise) for part in (near, far)]  # (rows, H, 1)
    out[rows] = (out[rows].to(precise) * shares[0] + far_out[rows].to(precise) * shares[1]).to(out.dtype)
    lse[:, rows] = both


def merge_(out: Tensor, lse: Tensor, far_out: Tensor, far_lse: Tensor, rows: Tensor, impl: Impl = "auto") -> None:
    """Make `out` and `lse` those over both parts' keys, in place, in the given rows; the others are not touched.

    Args:
        out, far_out: (T, H, d) of one dtype, the last dimension contiguous: softmax(S) V over each part's keys.
        lse, far_lse: (H, T) float32 (float64 for the reference), natural logarithms, contiguous.
        rows: (n,) int64, without repetitions.
        impl: "auto" runs Triton where it serves, else the reference.

    Raises:
        RuntimeError: impl="triton" and Triton is not installed.
    """
    if not takes_triton(impl, out) or lse.dtype == torch.float64:
        return merge_reference_(out, lse, far_out, far_lse, rows)
    if rows.numel():
        with torch.cuda.device_of(out):
            _merge_kernel[(rows.numel(),)](
                out, lse, far_out, far_lse, rows, *out.stride()[:2], *far_out.stride()[:2], lse.size(1), out.size(1),
                out.size(2), HEADS=triton.next_power_of_2(out.size(1)), WIDTH=triton.next_power_of_2(out.size(2)),
            )  # fmt: skip
    return None


@jit(do_not_specialize=["tokens"])
def _merge_kernel(
    out,
    lse,
    far_out,
    far_lse,
    rows,
    out_token,
    out_head,
    far_token,
    far_head,
    tokens,
    heads,
    head_size,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """One row of the pack, all heads."""
    row = tl.load(rows + tl.program_id(0))
    head, column = tl.arange(0, HEADS), tl.arange(0, WIDTH)
    place = head * tokens.to(tl.int64) + row
    near = tl.load(lse + place, mask=head < heads, other=0.0)
    far = tl.load(far_lse + place, mask=head < heads, other=0.0)
    top = tl.maximum(near, far)
    both = top + tl.log(tl.exp(near - top) + tl.exp(far - top))
    inside = (head < heads)[:, None] & (column < head_size)[None, :]
    address = out + row * out_token + head[:, None] * out_head + column[None, :]
    a = tl.load(address, mask=inside, other=0.0).to(tl.float32)
    b_address = far_out + row * far_token + head[:, None] * far_head + column[None, :]
    b = tl.load(b_address, mask=inside, other=0.0).to(tl.float32)
    merged = a * tl.exp(near - both)[:, None] + b * tl.exp(far - both)[:, None]
    tl.store(address, merged.to(out.dtype.element_ty), mask=inside)
    tl.store(lse + place, both, mask=head < heads)
