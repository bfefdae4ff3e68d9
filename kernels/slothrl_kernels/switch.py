"""The one switch: whether a call runs its Triton kernel or its plain-torch reference."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None  # a machine without it still gets the references
Impl = Literal["auto", "triton", "torch"]


def takes_triton(impl: Impl, tensor: Tensor) -> bool:
    """Whether a call on `tensor` runs the Triton kernel.

    Args:
        impl: "triton" or "torch" as asked for; "auto" takes Triton on NVIDIA GPUs from compute capability 8.0, where
            bfloat16 is native, and the reference on everything else.
        tensor: the call's first tensor; only its device is looked at.

    Raises:
        RuntimeError: impl="triton" and Triton is not installed.
        ValueError: an unknown impl.
    """
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"impl {impl!r} is not one of auto, triton, torch")
    if impl == "triton" and not HAS_TRITON:
        raise RuntimeError("impl='triton' needs Triton; impl='torch' does not")
    return impl == "triton" or (impl == "auto" and HAS_TRITON and tensor.is_cuda and _serves(tensor.get_device()))


@cache
def _serves(device: int) -> bool:
    return torch.version.cuda is not None and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a CUDA device; 4 stands in for them in Triton's interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels: it knows no inline assembly and multiplies no bfloat16."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


def jit(function: Any = None, **options: Any) -> Any:
    """triton.jit where there is Triton, so that a module of kernels can be imported without it."""
    if not HAS_TRITON:
        return function or (lambda kernel: kernel)
    import triton

    return triton.jit(function, **options) if function else triton.jit(**options)
