"""What a projection adds to the stream of a decoder layer: as it is, or normed first (Gemma 2 and 3).

    total = residual + made        total = residual + norm(made)        made = onto's projection of some rows

The second is two roundings, as in transformers; the backward needs what was made, which nothing else does.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from slothrl_kernels.layer_parts import Norm
from slothrl_kernels.lora_onto import LoraOnto
from slothrl_kernels.rms_norm_math import rms_norm_backward, rms_norm_forward
from slothrl_kernels.switch import Impl


class Added(NamedTuple):
    """total (M, h); made (M, h), what the projection gave, where a norm follows it, else None."""

    total: Tensor
    made: Tensor | None


def add_onto(
    onto: LoraOnto, both: Tensor, residual: Tensor, norm: Norm | None, impl: Impl, out: Tensor | None = None
) -> Added:
    """The projection of both (M, K + R), as `LoraOnto.forward` takes it, onto residual (M, N); total in `out`."""
    if norm is None:
        return Added(onto.forward(both, residual, out), None)
    made = onto.forward(both, None)
    options = (norm.weight, norm.eps, norm.shift, norm.cast_first)
    return Added(rms_norm_forward(made, None, *options, impl, out)[0].add_(residual), made)


def gradient_of_made(to_total: Tensor, made: Tensor, norm: Norm, out: Tensor, impl: Impl) -> None:
    """d made (M, N) into `out`, rows of unit stride, from d total (M, N), which is read only and lies elsewhere."""
    r = rms_norm_forward(made, None, norm.weight, norm.eps, norm.shift, norm.cast_first, impl, out)[2]
    rms_norm_backward(to_total, None, made, r, norm.weight, norm.shift, norm.cast_first, impl=impl, out=out)
