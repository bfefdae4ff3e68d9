"""Time every kernel beside plain torch, bitsandbytes and Liger (where importable) on this GPU; markdown tables.

    python tests/gpu/bench_kernels.py                # all, with the sweep of nf4 GEMM launches, about 90 s
    python tests/gpu/bench_kernels.py --only gemm    # dequantize, norm, rope, qk, glu or gemm
    python tests/gpu/bench_kernels.py --quick        # the default launches only

Medians of CUDA event times, cold L2 cache, without the host's time (`bench_tools.milliseconds`); GEMMs in a CUDA
graph over enough copies of W to be cold. A case that fails prints its error and the rest goes on; the exit code is then
1. The sweep prints lines for `nf4_launches.SHIPPED`.
"""

from __future__ import annotations

import argparse
import sys
import time
from functools import partial

import torch
from bench_nf4_matmul import bench_gemm, compile_candidates
from bench_tools import (
    START,
    backward_of,
    case,
    copy_bandwidth,
    failures,
    header,
    line,
    optional,
    random,
    random_weight,
)
from slothrl_kernels import (
    Nf4Weight,
    add_rms_norm,
    add_rms_norm_reference,
    glu,
    glu_reference,
    nf4_dequantize,
    qk_norm_rope,
    qk_norm_rope_reference,
    rms_norm,
    rms_norm_reference,
    rope,
    rope_reference,
)
from slothrl_kernels.nf4_dequantize import DequantizeLaunch

TOKENS = 8192


def bench_dequantize(copy: float) -> None:
    header("nf4 dequantisation to bf16", ["bitsandbytes"])
    theirs, quantize = (optional("bitsandbytes.functional", f"{n}quantize_4bit") for n in ("de", ""))
    for outputs, inputs in ((14336, 4096), (4096, 14336), (6144, 4096), (4096, 4096), (3072, 1024)):
        out = torch.empty(outputs, inputs, device="cuda", dtype=torch.bfloat16)
        plain = random_weight(outputs, inputs)
        size = outputs * inputs * 2 + plain.packed.numel() + plain.absmax.numel() * 4
        peer = None
        if theirs and quantize:
            _, state = quantize(out.zero_(), compress_statistics=False, quant_type="nf4")
            state.absmax = plain.absmax
            peer = partial(theirs, plain.packed, state, out=out)
        name = f"{outputs} x {inputs}"
        line(name, size, copy, partial(nf4_dequantize, plain, out=out), [peer])
        if quantize:
            packed, nested = quantize(random(outputs, inputs), compress_statistics=True, quant_type="nf4")
            weight = Nf4Weight.from_quant_state(packed, nested)
            call = partial(nf4_dequantize, weight, out=out)
            line(
                f"{name}, nested",
                size - weight.absmax.numel() * 3,
                copy,
                call,
                [partial(theirs, packed, nested, out=out)],
            )
        if outputs != 14336:
            continue
        for words, repeat, warps in ((128, 1, 4), (128, 4, 4), (128, 8, 4), (256, 1, 8), (256, 8, 8), (512, 4, 8)):
            call = partial(nf4_dequantize, plain, out=out, launch=DequantizeLaunch(words, repeat, warps))
            line(f"{name}, words {words} repeat {repeat} warps {warps}", size, copy, call, [])


def bench_norm(copy: float) -> None:
    header(f"RMSNorm, {TOKENS} tokens, bf16", ["eager", "liger"])
    liger = optional("liger_kernel.ops.rms_norm", "LigerRMSNormFunction")
    for rows, width in ((TOKENS, 4096), (TOKENS, 1024), (TOKENS * 16, 128)):
        size, name, gradient = rows * width * 2, f"{rows} x {width}", random(rows, width)
        for trained in (False, True):
            x, weight = random(rows, width, grad=True), random(width, grad=trained)
            arms = [partial(rms_norm, x, weight), partial(rms_norm_reference, x, weight)]
            arms.append(liger and partial(liger.apply, x, weight, 1e-6, 0.0, "llama", False))
            if not trained:
                line(f"{name} forward", 2 * size, copy, arms[0], arms[1:])
            backward = [backward_of(arm, [x, weight] if trained else [x], gradient) for arm in arms]
            what = "backward" + (", weight too" if trained else "")
            line(f"{name} {what}", 3 * size, copy, backward[0], backward[1:])  # pyright: ignore
        if width == 128:
            continue
        x, residual, weight = random(rows, width, grad=True), random(rows, width, grad=True), random(width)
        arms = [partial(f, x, residual, weight) for f in (add_rms_norm, add_rms_norm_reference)]
        line(f"{name} with residual, forward", 4 * size, copy, arms[0], [arms[1], None])
        backward = [backward_of(arm, [x, residual], [gradient, gradient]) for arm in arms]
        line(f"{name} with residual, backward", 4 * size, copy, backward[0], [backward[1], None])  # pyright: ignore


def bench_rope(copy: float) -> None:
    header(f"RoPE, {TOKENS} tokens, bf16", ["eager", "liger"])
    liger = optional("liger_kernel.ops.rope", "LigerRopeFunction")
    for q_heads, k_heads in ((32, 8), (16, 8)):
        q, k = (random(1, TOKENS, n, 128, grad=True).transpose(1, 2) for n in (q_heads, k_heads))
        angle = torch.rand(1, TOKENS, 128, device="cuda") * 6
        cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()
        size = 4 * (q.numel() + k.numel()) + 4 * cos.numel()
        arms = [partial(rope, q, k, cos, sin), partial(rope_reference, q, k, cos, sin)]
        arms.append(liger and partial(liger.apply, q, k, cos, sin))
        name = f"{q_heads} and {k_heads} heads of 128"
        line(f"{name} forward", size, copy, arms[0], arms[1:])
        flat = [q.detach(), k.detach()]
        line(f"{name} in place", size, copy, partial(rope, *flat, cos, sin, True), [None, None])
        backward = [backward_of(arm, [q, k], [torch.ones_like(q), torch.ones_like(k)]) for arm in arms]
        line(f"{name} backward", size, copy, backward[0], backward[1:])  # pyright: ignore


def bench_qk(copy: float) -> None:
    """Bytes: q and k read and written; in the backward their gradients too. "Three kernels": two norms, then RoPE."""
    header(f"QK-norm and RoPE, {TOKENS} tokens, bf16", ["eager", "three kernels"])
    for q_heads, k_heads, width in ((32, 8, 128), (16, 8, 128), (8, 4, 256)):
        q, k = (random(1, TOKENS, n, width, grad=True).transpose(1, 2) for n in (q_heads, k_heads))
        weights = [random(width), random(width)]
        angle = torch.rand(1, TOKENS, width, device="cuda") * 6
        cos, sin = angle.cos().bfloat16(), angle.sin().bfloat16()

        def apart(q=q, k=k, weights=weights, cos=cos, sin=sin):
            normed = (rms_norm(x.transpose(1, 2), w).transpose(1, 2) for x, w in zip((q, k), weights, strict=True))
            return rope(*normed, cos, sin)

        heads, tables = 2 * (q.numel() + k.numel()), 4 * cos.numel()
        arms = [partial(f, q, k, *weights, cos, sin) for f in (qk_norm_rope, qk_norm_rope_reference)] + [apart]
        name = f"{q_heads} and {k_heads} heads of {width}"
        line(f"{name} forward", 2 * heads + tables, copy, arms[0], arms[1:])
        backward = [backward_of(arm, [q, k], [torch.ones_like(q), torch.ones_like(k)]) for arm in arms]
        line(f"{name} backward", 3 * heads + tables, copy, backward[0], backward[1:])  # pyright: ignore
        trained = [weight.requires_grad_() for weight in weights]
        backward = [backward_of(arm, [q, k, *trained], [torch.ones_like(q), torch.ones_like(k)]) for arm in arms]
        line(f"{name} backward, weights too", 3 * heads + tables, copy, backward[0], backward[1:])  # pyright: ignore


def bench_glu(copy: float) -> None:
    header(f"gated activations, {TOKENS} tokens, bf16", ["eager", "liger"])
    peers = {"silu": optional("liger_kernel.ops.swiglu", "LigerSiLUMulFunction")}
    peers["gelu_tanh"] = optional("liger_kernel.ops.geglu", "LigerGELUMulFunction")
    for width, activation in ((14336, "silu"), (3072, "silu"), (14336, "gelu_tanh"), (14336, "gelu")):
        gate, up, gradient = random(TOKENS, width, grad=True), random(TOKENS, width, grad=True), random(TOKENS, width)
        peer, size = peers.get(activation), TOKENS * width * 2
        arms = [partial(glu, gate, up, activation), partial(glu_reference, gate, up, activation)]
        arms.append(peer and partial(peer.apply, gate, up))
        line(f"{activation} {width} forward", 3 * size, copy, arms[0], arms[1:])
        backward = [backward_of(arm, [gate, up], gradient) for arm in arms]
        line(f"{activation} {width} backward", 5 * size, copy, backward[0], backward[1:])  # pyright: ignore


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["dequantize", "norm", "rope", "qk", "glu", "gemm"])
    parser.add_argument("--quick", action="store_true", help="no sweep of GEMM launches")
    parser.add_argument("--seconds", type=float, default=85, help="after so long no more candidates are timed")
    arguments = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    sweep = not arguments.quick and arguments.only in (None, "gemm")
    if sweep:
        with case("compilation ahead"):
            compile_candidates()
    copy = copy_bandwidth()
    print(f"copy: {copy:.0f} GB/s")
    gemm = partial(bench_gemm, limit=arguments.seconds if sweep else 0)  # early, since its sweep watches the clock
    benches = {"dequantize": bench_dequantize, "gemm": gemm, "norm": bench_norm, "rope": bench_rope, "qk": bench_qk}
    benches["glu"] = bench_glu
    for name, bench in benches.items():
        if arguments.only in (None, name):
            with case(name):
                bench(copy)
    print(f"\n{time.time() - START:.0f} s, {len(failures)} failures" + "".join(f"\n  {name}" for name in failures))
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
