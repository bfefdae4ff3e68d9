"""Y = X W^T + b with W in nf4: a weight-only GEMM on bitsandbytes' own bytes for few tokens, torch's matmul for many.

Up to `GEMM_ROWS` tokens the time is that of reading W, so reading 4 bits instead of 16 is what counts and W is decoded
in registers (`nf4_matmul_kernels`). Beyond, W is dequantised once into memory that torch's allocator hands from call to
call, and cuBLAS works on it.

CUDA graphs: nothing is read back, and every launch depends on shapes alone; see `arrivals` on splits of K.
torch.compile: `torch.ops.slothrl_kernels.nf4_matmul` is opaque to it, with a fake implementation and a backward.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from slothrl_kernels.arrivals import arrival_counters
from slothrl_kernels.early_launch import starts_early
from slothrl_kernels.nf4_config import GEMM_ROWS, Nf4Config, complete
from slothrl_kernels.nf4_dequantize import nf4_dequantize, nf4_dequantize_reference
from slothrl_kernels.nf4_inputs import nf4_inputs
from slothrl_kernels.nf4_launches import choose_config
from slothrl_kernels.nf4_shares import in_fragments
from slothrl_kernels.nf4_weight import NestedAbsmax, Nf4Weight
from slothrl_kernels.switch import HAS_TRITON, Impl, interpreted, processors, takes_triton

if TYPE_CHECKING or HAS_TRITON:
    import triton
    import triton.language as tl

    from slothrl_kernels.nf4_matmul_kernels import nf4_gemm_kernel


AHEAD = 2 << 20  # 8 and 16 MiB take 0.5 to 2 % longer at 64 and 128 rows on an H100


def nf4_matmul_reference(x: Tensor, weight: Nf4Weight, bias: Tensor | None = None) -> Tensor:
    """The plain-torch truth of `nf4_matmul`: W dequantised to X's dtype, then torch's linear; float64 too."""
    _check(x, weight, bias)
    return F.linear(x, nf4_dequantize_reference(weight, x.dtype), bias)


def nf4_matmul(
    x: Tensor,
    weight: Nf4Weight,
    bias: Tensor | None = None,
    impl: Impl = "auto",
    config: Nf4Config | None = None,
) -> Tensor:
    """X W^T + bias, differentiable with respect to X and bias; W is frozen.

    Args:
        x: (..., K) bfloat16 or float16 (float32 runs, dequantised to it); any strides.
        weight: W (N, K), any N. The GEMM needs K a multiple of 64 and a block size of 64 or more; other weights are
            dequantised, and so is W where X has more than 256 rows, and in the backward: dX = dY W.
        bias: (N,) of X's dtype.
        impl: "auto" runs Triton where it serves, else the reference.
        config: the launch; None chooses by shape.

    Returns:
        (..., N) of X's dtype. A GEMM's sums are float32, and its weights those of `nf4_dequantize`, but for one in
        fifty that is one step beside (`nf4_decode`).

    Raises:
        ValueError: shapes, dtypes or devices that do not fit.
        RuntimeError: impl="triton" and Triton is not installed.
    """
    _check(x, weight, bias)
    nested = weight.nested
    inner = (nested.code, nested.absmax, nested.offset) if nested else (None, None, None)
    arguments = (weight.packed, weight.absmax, weight.code, list(weight.shape), weight.blocksize, *inner)
    tail = (nested.blocksize if nested else 0, bias, impl, config.fields() if config else [])
    wants_graph = torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
    if torch.compiler.is_compiling() or wants_graph:
        return torch.ops.slothrl_kernels.nf4_matmul(x, *arguments, *tail)
    return _forward(x, weight, bias, impl, config)


def _check(x: Tensor, weight: Nf4Weight, bias: Tensor | None) -> None:
    if len(weight.shape) != 2 or x.dim() < 1 or x.size(-1) != weight.shape[1]:
        raise ValueError(f"x must be (..., K) for a weight (N, K), not {tuple(x.shape)} for {weight.shape}")
    if not x.is_floating_point() or x.device != weight.packed.device:
        raise ValueError(f"x must be floats on {weight.packed.device}, not {x.dtype} on {x.device}")
    if bias is not None and (bias.shape, bias.dtype, bias.device) != ((weight.shape[0],), x.dtype, x.device):
        raise ValueError(f"bias must be ({weight.shape[0]},) {x.dtype}, not {tuple(bias.shape)} {bias.dtype}")


def _forward(x: Tensor, weight: Nf4Weight, bias: Tensor | None, impl: Impl, config: Nf4Config | None) -> Tensor:
    outputs, inputs = weight.shape
    rows = x.numel() // inputs if inputs else 0
    if not takes_gemm(x, rows, weight, impl):
        return F.linear(x, nf4_dequantize(weight, x.dtype, impl=impl), bias)
    tokens = aligned(x.reshape(rows, inputs))
    if config:
        chosen = complete(config, rows, outputs, inputs, processors(x.device))
    else:
        chosen = choose_config(rows, outputs, inputs, x.device)
    return launch(tokens, weight, bias, chosen).view(*x.shape[:-1], outputs)


def takes_gemm(x: Tensor, rows: int, weight: Nf4Weight, impl: Impl) -> bool:
    """Whether so many tokens times this weight run as one GEMM on the packed bytes."""
    fits = x.dtype in (torch.bfloat16, torch.float16) and weight.shape[1] % 64 == 0 and weight.blocksize >= 64
    fits = fits and weight.shape[0] > 0 and weight.packed.data_ptr() % 16 == 0  # bytes are read as words
    return fits and 0 < rows <= GEMM_ROWS and takes_triton(impl, x)


def aligned(x: Tensor) -> Tensor:
    """x contiguous, at an address that vector loads take."""
    x = x.contiguous()
    return x.clone() if x.data_ptr() % 16 else x


def launch(
    x: Tensor,
    weight: Nf4Weight,
    bias: Tensor | None,
    config: Nf4Config,
    lora: Any = None,
    ahead: int = AHEAD,
    follows: bool = True,
) -> Tensor:
    """x (M, K) contiguous -> (M, N); lora: a `nf4_lora.LoraDelta`, added before the result is rounded.

    ahead: bytes of W that the GEMM asks for while X is put in order, from Hopper on; 0: it starts when that is done.
    follows: X is put in order by a launch that starts early too, where the GEMM does; for timing without.
    """
    own, early = lora.arrived if lora else None, ahead > 0 and starts_early(x.device)
    (rows, inputs), outputs, nested, code = x.shape, weight.shape[0], weight.nested, weight.code
    grid = (triton.cdiv(outputs, config.block_n), config.splits, triton.cdiv(rows, config.block_m))
    y = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    programs = _programs(config, grid, inputs, x.device)
    partials, arrived = _workspace(y, config, grid, programs, own)  # may be a launch: not between the next two
    ordered, xa = nf4_inputs(x, config.chunks, lora.a if lora else None, own, early, early and follows)
    with torch.cuda.device_of(x):  # Triton launches on the current device, not on the tensor's
        nf4_gemm_kernel[(programs, 1, 1) if programs else grid](
            ordered,
            weight.packed.flatten().view(torch.int16),
            weight.absmax,
            code,
            *((nested.code, nested.absmax, nested.offset) if nested else (code, code, code)),
            code if bias is None else bias,
            *((xa, lora.b, lora.ends) if lora else (code, code, code)),
            y,
            *(code if memory is None else memory for memory in (partials, arrived)),
            *(rows, outputs, inputs, inputs // 4, inputs // 64, config.splits),
            min(inputs // 2, max(64, ahead // (programs * config.block_n or outputs * config.splits) // 16 * 16)),
            processors(x.device) if config.apart else 1,
            **_options(x, weight, bias is not None, config),
            EARLY=early,
            RANK=lora.b.shape[1] if lora else 0,
            SLICES=len(lora.sizes) if lora else 1,
            **({"launch_pdl": True} if early else {}),
        )
    return y


def _programs(config: Nf4Config, grid: tuple[int, int, int], inputs: int, device: torch.device) -> int:
    """Programs that take equal shares of all tiles' steps, none without a step; 0: the grid runs as it is."""
    return min(processors(device) * config.slots, grid[0] * grid[2] * (inputs // 64 // config.chunks))


def _workspace(
    y: Tensor, config: Nf4Config, grid: tuple[int, int, int], programs: int, own: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Memory for partial sums of y (M, N) and the counters of their arrivals; None for tiles that nobody shares."""
    if not programs and config.splits == 1:
        return None, None
    size = 2 * programs * config.block_m * config.block_n or config.splits * y.numel()
    partials = torch.empty(size, dtype=torch.float32, device=y.device)
    return partials, arrival_counters(y.device, grid[0] * grid[2], own)


def _options(x: Tensor, weight: Nf4Weight, has_bias: bool, config: Nf4Config) -> dict[str, Any]:
    """What a kernel is compiled for."""
    options: dict[str, Any] = {
        "DTYPE": tl.bfloat16 if x.dtype == torch.bfloat16 else tl.float16,
        "CHUNKS_A_BLOCK": weight.blocksize // 64,
        "INNER_BLOCKSIZE": weight.nested.blocksize if weight.nested else 0,
        "HAS_BIAS": has_bias,
        "PTX": not interpreted() and torch.version.hip is None,
        "INTERPRETED": interpreted(),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "CHUNKS": config.chunks,
        "SPLIT": config.splits > 1,
        "PARTS": config.parts,
        "SHARES": config.slots > 0,
        "FRAGMENTS": config.slots > 0 and in_fragments(x.device),
        "num_warps": config.warps,
        "num_stages": config.stages,
    }
    return options | ({"maxnreg": config.registers} if config.registers else {})


def _as_weight(packed, absmax, code, shape, blocksize, inner_code, inner_absmax, offset, inner_blocksize) -> Nf4Weight:
    nested = None if inner_code is None else NestedAbsmax(inner_code, inner_absmax, offset, inner_blocksize)
    return Nf4Weight(packed, absmax, code, tuple(shape), blocksize, nested)


def _operator(x, packed, absmax, code, shape, blocksize, inner_code, inner_absmax, offset, *tail) -> Tensor:
    inner_blocksize, bias, impl, config = tail
    weight = _as_weight(packed, absmax, code, shape, blocksize, inner_code, inner_absmax, offset, inner_blocksize)
    return _forward(x, weight, bias, impl, Nf4Config(*config) if config else None)


def _fake(x: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, shape: list[int], *_) -> Tensor:
    return x.new_empty((*x.shape[:-1], shape[0]))


def _save(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.weight, ctx.impl = inputs[1:10], inputs[11]


def _backward(ctx: Any, gradient: Tensor) -> tuple:
    """dX = dY W and db = the sum of dY; the weight is the model's own memory and outlives the graph."""
    needs_x, needs_bias = ctx.needs_input_grad[0], ctx.needs_input_grad[10]
    to_x = torch.ops.slothrl_kernels.nf4_matmul_dx(gradient, *ctx.weight, ctx.impl) if needs_x else None
    to_bias = gradient.reshape(-1, gradient.size(-1)).sum(0) if needs_bias else None
    return (to_x, *[None] * 9, to_bias, None, None)


def _gradient(gradient: Tensor, *arguments: Any) -> Tensor:
    """dX = dY W; opaque to torch.compile as the forward is."""
    return gradient @ nf4_dequantize(_as_weight(*arguments[:-1]), gradient.dtype, impl=arguments[-1])


def _fake_gradient(gradient: Tensor, packed: Tensor, absmax: Tensor, code: Tensor, shape: list[int], *_) -> Tensor:
    return gradient.new_empty((*gradient.shape[:-1], shape[1]))


_WEIGHT = (
    "Tensor packed, Tensor absmax, Tensor code, int[] shape, int blocksize, "
    "Tensor? inner_code, Tensor? inner_absmax, Tensor? offset, int inner_blocksize"
)
_library = torch.library.Library("slothrl_kernels", "FRAGMENT")
_library.define(f"nf4_matmul(Tensor x, {_WEIGHT}, Tensor? bias, str impl, int[] config) -> Tensor")
_library.define(f"nf4_matmul_dx(Tensor gradient, {_WEIGHT}, str impl) -> Tensor")
_library.impl("nf4_matmul", _operator, "CompositeExplicitAutograd")
_library.impl("nf4_matmul_dx", _gradient, "CompositeExplicitAutograd")
torch.library.register_fake("slothrl_kernels::nf4_matmul", _fake, lib=_library)
torch.library.register_fake("slothrl_kernels::nf4_matmul_dx", _fake_gradient, lib=_library)
torch.library.register_autograd("slothrl_kernels::nf4_matmul", _backward, setup_context=_save, lib=_library)
