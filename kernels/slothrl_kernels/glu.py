"""SwiGLU and GEGLU (Shazeer, arXiv:2002.05202): y = act(gate) * up, and both gradients from gate and up alone.

    silu(g) = g sigmoid(g)      gelu(g) = g Phi(g)      gelu_tanh(g) = g sigmoid(2 sqrt(2/pi) (g + 0.044715 g^3))

The last is 0.5 g (1 + tanh(...)) written without the cancellation (GELU: Hendrycks and Gimpel, arXiv:1606.08415). The
forward keeps gate and up; the backward computes act(gate) anew, in the same pass that writes dgate and dup.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from slothrl_kernels.rms_norm_math import rows_of
from slothrl_kernels.switch import HAS_TRITON, Impl, jit, takes_triton

if TYPE_CHECKING or HAS_TRITON:
    import triton
    import triton.language as tl

Activation = Literal["silu", "gelu", "gelu_tanh"]
ACTIVATIONS = ("silu", "gelu", "gelu_tanh")
BLOCK = 2048  # elements a program works on


def glu_reference(gate: Tensor, up: Tensor, activation: Activation = "silu") -> Tensor:
    """The plain-torch truth of `glu`, same arguments; differentiable; act(gate) is rounded, as in transformers."""
    _check(gate, up, activation)
    if activation == "silu":
        return F.silu(gate) * up
    return F.gelu(gate, approximate="tanh" if activation == "gelu_tanh" else "none") * up


def glu(gate: Tensor, up: Tensor, activation: Activation = "silu", impl: Impl = "auto") -> Tensor:
    """act(gate) * up, differentiable in both; float32 inside, rounded once.

    Args:
        gate, up: one shape (..., F), float32, bfloat16 or float16; any strides (two halves of one projection).
        activation: "silu" (SwiGLU), "gelu" or "gelu_tanh" (GEGLU).
        impl: "auto" runs Triton where it serves, else the reference.

    Returns:
        (..., F) of the inputs' dtype.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit, or an unknown activation.
        RuntimeError: impl="triton" and Triton is not installed.
    """
    _check(gate, up, activation)
    if not takes_triton(impl, gate) or gate.dtype == torch.float64 or gate.dim() == 0:
        return glu_reference(gate, up, activation)
    return _GLU.apply(gate, up, activation)  # pyright: ignore


def glu_forward(
    gate: Tensor, up: Tensor, activation: Activation = "silu", impl: Impl = "auto", out: Tensor | None = None
) -> Tensor:
    """`glu`'s value without autograd. Arguments and errors as there.

    Args:
        out: where it goes, of the inputs' shape and dtype, with rows of unit stride at one distance; may be gate or up.
    """
    _check(gate, up, activation)
    if not takes_triton(impl, gate) or gate.dtype == torch.float64 or gate.dim() == 0:
        y = glu_reference(gate.detach(), up.detach(), activation)
        return y if out is None else out.copy_(y)
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) if out is None else out
    _run(_forward_kernel, [gate, up, y.view(y.shape)], activation)
    return y


def glu_backward_reference(
    gate: Tensor, up: Tensor, to_y: Tensor, activation: Activation = "silu"
) -> tuple[Tensor, Tensor, Tensor]:
    """The plain-torch truth of `glu_backward`, with the same arguments; new tensors."""
    leaves = [gate.detach().requires_grad_(), up.detach().requires_grad_()]
    with torch.enable_grad():
        y = glu_reference(leaves[0], leaves[1], activation)
    to_gate, to_up = torch.autograd.grad(y, leaves, to_y)
    return y.detach(), to_gate, to_up


def glu_backward(
    gate: Tensor, up: Tensor, to_y: Tensor, activation: Activation = "silu", impl: Impl = "auto", in_place: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, dgate, dup) of `glu` in one pass over memory, for whoever keeps gate and up and needs y again. No autograd.

    Args:
        gate, up, to_y: one shape, dtype and device; to_y is the gradient of y.
        in_place: the kernel writes y over to_y, dgate over gate and dup over up; the reference makes new tensors.

    Raises: as `glu`.
    """
    _check(gate, up, activation)
    if not takes_triton(impl, gate) or gate.dtype == torch.float64 or gate.dim() == 0:
        return glu_backward_reference(gate, up, to_y, activation)
    outputs = [to_y, gate, up] if in_place else [torch.empty_like(gate) for _ in range(3)]
    _run(_backward_kernel, [gate, up, to_y, *outputs[1:], outputs[0]], activation, WRITE_Y=True)
    return outputs[0], outputs[1], outputs[2]


def _check(gate: Tensor, up: Tensor, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if not gate.is_floating_point() or (gate.shape, gate.dtype, gate.device) != (up.shape, up.dtype, up.device):
        found = f"{tuple(gate.shape)} {gate.dtype} and {tuple(up.shape)} {up.dtype}"
        raise ValueError(f"gate and up must be floats of one shape, dtype and device, not {found}")


def _together(tensors: list[Tensor]) -> list[Tensor]:
    """2-D views with unit stride; one long row of them all where nothing lies between the rows."""
    if all(tensor.is_contiguous() for tensor in tensors):
        return [tensor.view(1, -1) for tensor in tensors]
    return [rows_of(tensor) for tensor in tensors]


class _GLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: str) -> Tensor:
        y = glu_forward(gate, up, activation, "triton")  # pyright: ignore
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple:
        gate, up = ctx.saved_tensors
        to_gate, to_up = (torch.empty(gate.shape, dtype=gate.dtype, device=gate.device) for _ in range(2))
        _run(_backward_kernel, [gate, up, gradients[0], to_gate, to_up, to_up], ctx.activation, WRITE_Y=False)
        return to_gate, to_up, None


def _run(kernel: Any, tensors: list[Tensor], activation: str, **constants: bool) -> None:
    if tensors[0].numel() == 0:
        return
    flat = _together(tensors)
    rows, width = flat[0].shape
    blocks = triton.cdiv(width, BLOCK)
    with torch.cuda.device_of(flat[0]):
        kernel[(rows * blocks,)](
            *flat,
            *(tensor.stride(0) for tensor in flat),
            width,
            blocks,
            ACTIVATION=ACTIVATIONS.index(activation),
            BLOCK=BLOCK,
            num_warps=8,
            **constants,
        )


@jit
def _place(width, blocks, BLOCK: tl.constexpr):
    """This program's row (64 bits: rows * width may pass 2**31), its columns and which of them exist."""
    program = tl.program_id(0).to(tl.int64)
    column = program % blocks * BLOCK + tl.arange(0, BLOCK)
    return program // blocks, column, column < width


@jit
def _act(g, ACTIVATION: tl.constexpr):
    """act(g) and its derivative."""
    if ACTIVATION == 1:
        share = 0.5 * (1.0 + tl.erf(g * 0.7071067811865476))
        slope = share + g * 0.3989422804014327 * tl.exp(-0.5 * g * g)
    elif ACTIVATION == 2:
        share = tl.sigmoid(1.5957691216057308 * (g + 0.044715 * g * g * g))
        slope = share + g * share * (1.0 - share) * (1.5957691216057308 * (1.0 + 0.134145 * g * g))
    else:
        share = tl.sigmoid(g)
        slope = share + g * share * (1.0 - share)
    return g * share, slope


@jit
def _forward_kernel(
    gate,
    up,
    y,
    gate_stride,
    up_stride,
    y_stride,
    width,
    blocks,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, column, inside = _place(width, blocks, BLOCK)
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    a, _ = _act(g, ACTIVATION)
    tl.store(y + row * y_stride + column, (a * u).to(y.dtype.element_ty), mask=inside)


@jit
def _backward_kernel(
    gate,
    up,
    to_y,
    to_gate,
    to_up,
    y,
    gate_stride,
    up_stride,
    to_y_stride,
    to_gate_stride,
    to_up_stride,
    y_stride,
    width,
    blocks,
    ACTIVATION: tl.constexpr,
    BLOCK: tl.constexpr,
    WRITE_Y: tl.constexpr,
):
    row, column, inside = _place(width, blocks, BLOCK)
    g = tl.load(gate + row * gate_stride + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * up_stride + column, mask=inside, other=0.0).to(tl.float32)
    d = tl.load(to_y + row * to_y_stride + column, mask=inside, other=0.0).to(tl.float32)
    a, slope = _act(g, ACTIVATION)
    tl.store(to_gate + row * to_gate_stride + column, (d * u * slope).to(to_gate.dtype.element_ty), mask=inside)
    tl.store(to_up + row * to_up_stride + column, (d * a).to(to_up.dtype.element_ty), mask=inside)
    if WRITE_Y:
        tl.store(y + row * y_stride + column, (a * u).to(y.dtype.element_ty), mask=inside)
