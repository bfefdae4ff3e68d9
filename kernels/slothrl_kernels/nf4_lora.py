"""Y = X W^T + b + (X A^T) B^T with W in nf4 and one LoRA: two launches for few tokens, torch's matmuls for many.

For generation with one adapter that is known when the engine starts. The small kernel that orders X for the GEMM makes
X A^T too (`nf4_inputs`); the GEMM adds its product with B to its float32 sums before they are rounded: no second pass
over Y, no gather of adapters.
Several projections fused into one weight (q, k and v) are slices: each has its own A, and its own rows of B.

No gradient: the trainer's layer is another one. CUDA graphs: as `nf4_matmul`. torch.compile sees one opaque operator,
`torch.ops.slothrl_kernels.nf4_lora_matmul`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from slothrl_kernels.nf4_dequantize import nf4_dequantize, nf4_dequantize_reference
from slothrl_kernels.nf4_launches import choose_config
from slothrl_kernels.nf4_matmul import aligned, launch, takes_gemm
from slothrl_kernels.nf4_weight import Nf4Weight
from slothrl_kernels.switch import Impl

MIN_RANK = 16  # what a tensor core multiplies at least


@dataclass(frozen=True)
class LoraDelta:
    """One LoRA over a weight (N, K) that is made of slices of rows.

    a: (slices * R, K), the slices' A one below the other. b: (N, R), scaling already inside. Both contiguous and of X's
        dtype; R is a power of two from 16 on, and a smaller rank is padded with zeros (`padded_rank`).
    ends: (slices,) int32 on the device, the row after each slice's last; sizes: rows of each slice, on the host.
    arrived: int32 zeros for the launches of this layer alone, one after the other, so that CUDA graphs need no buffer
        of their own; None: what `nf4_matmul` keeps for the stream.

    Raises:
        ValueError: shapes or dtypes that do not fit.
    """

    a: Tensor
    b: Tensor
    ends: Tensor
    sizes: tuple[int, ...]
    arrived: Tensor | None = None

    def __post_init__(self) -> None:
        rank, slices = self.b.shape[1], len(self.sizes)
        if rank != self.padded_rank(rank) or self.a.shape[0] != slices * rank or len(self.b) != sum(self.sizes):
            raise ValueError(f"A {tuple(self.a.shape)}, B {tuple(self.b.shape)} are no slices of {self.sizes} rows")
        if self.a.dtype != self.b.dtype or not (self.a.is_contiguous() and self.b.is_contiguous()):
            raise ValueError("A and B must be contiguous and of one dtype")
        if self.ends.dtype != torch.int32 or len(self.ends) != slices:
            raise ValueError(f"ends must be ({slices},) int32, not {tuple(self.ends.shape)} {self.ends.dtype}")

    @classmethod
    def zeros(cls, rank: int, inputs: int, sizes: tuple[int, ...], like: Tensor) -> LoraDelta:
        """An adapter that changes nothing, on the device and in the dtype of `like`."""
        padded = cls.padded_rank(rank)
        ends = torch.tensor(sizes, device=like.device).cumsum(0).to(torch.int32)
        arrived = torch.zeros(sum(sizes) // 8 + 64, dtype=torch.int32, device=like.device)
        a, b = like.new_zeros(len(sizes) * padded, inputs), like.new_zeros(sum(sizes), padded)
        return cls(a, b, ends, sizes, arrived)

    @staticmethod
    def padded_rank(rank: int) -> int:
        """The smallest R that holds `rank`."""
        return max(MIN_RANK, 1 << (rank - 1).bit_length())

    def slice(self, index: int) -> tuple[Tensor, Tensor]:
        """Views of one slice's A (R, K) and B (rows, R)."""
        rank, begin = self.b.shape[1], sum(self.sizes[:index])
        return self.a[index * rank : (index + 1) * rank], self.b[begin : begin + self.sizes[index]]


def add_lora(y: Tensor, x: Tensor, lora: LoraDelta) -> Tensor:
    """y (..., N) plus the slices' deltas of x (..., K), in place, by torch's matmuls; returns y."""
    rank, begin = lora.b.shape[1], 0
    xa = F.linear(x.reshape(-1, x.size(-1)), lora.a.to(x.dtype))  # (M, slices * R)
    flat = y.view(-1, y.size(-1))
    for i, size in enumerate(lora.sizes):
        b = lora.b[begin : begin + size].to(x.dtype)
        flat[:, begin : begin + size].addmm_(xa[:, i * rank : (i + 1) * rank], b.t())
        begin += size
    return y


def nf4_lora_matmul_reference(x: Tensor, weight: Nf4Weight, lora: LoraDelta, bias: Tensor | None = None) -> Tensor:
    """The plain-torch truth of `nf4_lora_matmul`; float64 too."""
    return add_lora(F.linear(x, nf4_dequantize_reference(weight, x.dtype), bias), x, lora)


def nf4_lora_matmul(
    x: Tensor, weight: Nf4Weight, lora: LoraDelta, bias: Tensor | None = None, impl: Impl = "auto"
) -> Tensor:
    """X W^T + bias + the LoRA, without a gradient.

    Args:
        x: (..., K) bfloat16 or float16; other floats run through torch.
        weight: W (N, K) with expanded absmax.
        impl: "auto" runs Triton where it serves, else the reference.

    Returns:
        (..., N) of X's dtype. X A^T is rounded to X's dtype between the two launches, as it is under autocast.

    Raises:
        ValueError: shapes that do not fit, or nested absmax.
    """
    if weight.nested is not None:
        raise ValueError("nf4_lora_matmul takes expanded absmax")
    arguments = (weight.packed, weight.absmax, weight.code, list(weight.shape), weight.blocksize)
    operator = torch.ops.slothrl_kernels.nf4_lora_matmul
    return operator(x, *arguments, lora.a, lora.b, lora.ends, list(lora.sizes), lora.arrived, bias, impl)


def _operator(x, packed, absmax, code, shape, blocksize, a, b, ends, sizes, arrived, bias, impl) -> Tensor:
    weight = Nf4Weight(packed, absmax, code, tuple(shape), blocksize)
    lora = LoraDelta(a, b, ends, tuple(sizes), arrived)
    if x.size(-1) != shape[1] or a.shape[1] != shape[1] or len(b) != shape[0]:
        raise ValueError(f"x {tuple(x.shape)}, W {tuple(shape)}, A {tuple(a.shape)} and B {tuple(b.shape)} do not fit")
    rows = x.numel() // max(1, x.size(-1))
    if a.dtype != x.dtype or not takes_gemm(x, rows, weight, impl):
        return add_lora(F.linear(x, nf4_dequantize(weight, x.dtype, impl=impl), bias), x, lora)
    tokens = aligned(x.reshape(rows, shape[1]))
    config = choose_config(rows, shape[0], shape[1], x.device)
    y = launch(tokens, weight, bias, config, lora)
    return y.view(*x.shape[:-1], shape[0])


def _fake(x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, shape: list[int], *_) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


# `arrived` is not declared as written to: it is zeros before and after, and a declaration would cost copies of it.
_library = torch.library.Library("slothrl_kernels", "FRAGMENT")
_library.define(
    "nf4_lora_matmul(Tensor x, Tensor packed, Tensor absmax, Tensor code, int[] shape, int blocksize, Tensor a, "
    "Tensor b, Tensor ends, int[] sizes, Tensor? arrived, Tensor? bias, str impl) -> Tensor"
)
_library.impl("nf4_lora_matmul", _operator, "CompositeExplicitAutograd")
torch.library.register_fake("slothrl_kernels::nf4_lora_matmul", _fake, lib=_library)
