"""The frozen weight of a projection in whatever form it is held, and how it becomes a matrix to multiply with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from slothrl_kernels.nf4_dequantize import nf4_dequantize, nf4_dequantize_reference
from slothrl_kernels.nf4_weight import Nf4Weight
from slothrl_kernels.switch import Impl


@dataclass(frozen=True)
class Int8Weight:
    """W (N, K) = codes * absmax / 127, a row at a time (LLM.int8, arXiv:2208.07339, section 2.1), by reference.

    codes: (N, K) int8. absmax: (N,) float32, the rows' largest magnitudes.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """

    codes: Tensor
    absmax: Tensor

    def __post_init__(self) -> None:
        if self.codes.dtype != torch.int8 or self.codes.dim() != 2 or self.absmax.shape != self.codes.shape[:1]:
            raise ValueError(f"codes must be (N, K) int8 and absmax (N,), not {self.codes.dtype} {self.codes.shape}")

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.codes.shape)


BaseWeight = Tensor | Nf4Weight | Int8Weight


def dense(weight: BaseWeight, dtype: torch.dtype, out: Tensor | None = None, impl: Impl = "auto") -> Tensor:
    """W (N, K) in `dtype`, without a gradient.

    Args:
        weight: dense of any float dtype, nf4 or int8.
        dtype: bfloat16, float16, float32, or float64 (references).
        out: (N, K) of `dtype`, rows may lie apart: receives W. Without it a dense weight of `dtype` is returned itself.
        impl: which nf4 dequantisation, see `nf4_dequantize`.

    Raises:
        ValueError: an `out` or a dtype that does not fit.
    """
    if isinstance(weight, Nf4Weight):
        if dtype == torch.float64:
            return nf4_dequantize_reference(weight, dtype, out)
        return nf4_dequantize(weight, dtype, out, impl)
    if isinstance(weight, Int8Weight):
        # bitsandbytes' own order: rounded codes times rounded scales, in the dtype of the computation.
        scale = (weight.absmax * (1.0 / 127.0)).to(dtype)[:, None]
        return torch.mul(weight.codes.to(dtype), scale, out=out)
    matrix = weight.detach()
    return matrix.to(dtype) if out is None else out.copy_(matrix)
