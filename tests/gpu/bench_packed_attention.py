"""Time packed attention, forward and backward, by every backend beside torch's dense attention; markdown tables.

    python tests/gpu/bench_packed_attention.py            # flash, flash_attn where installed, triton, sdpa: about 50 s
    python tests/gpu/bench_packed_attention.py --flex     # FlexAttention too, which compiles for a minute more
    python tests/gpu/bench_packed_attention.py --sweep    # launches for attention_config.TUNED, about 2 minutes

TFLOP/s count what the layout needs: 4 d a head for each query and key that it sees, and 10 d in the backward.
"Dense" is torch's scaled_dot_product_attention on rows of their own, prompts repeated, by the fastest of its backends;
the same pairs are counted for it, so that its repetitions show as time. A case that fails prints its error.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial

import torch
from bench_tools import START, case, failures
from slothrl_kernels import PackedLayout, packed_attention
from slothrl_kernels.attention_choice import refusal
from slothrl_kernels.attention_package import installed_version
from slothrl_kernels.attention_rule import Rule
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench


def tree(families: int, prefix: int, children: int, length: int) -> tuple[list[int], list[int]]:
    lengths = [prefix, *[length] * children] * families
    parents = [-1 if i % (children + 1) == 0 else i - i % (children + 1) for i in range(len(lengths))]
    return lengths, parents


PACKS = {  # name: layout, and rows x tokens of the same work without sharing
    "2 x 2048": (([2048] * 2, None), (2, 2048)),
    "1 x 8192": (([8192], None), (1, 8192)),
    "1 x 32768": (([32768], None), (1, 32768)),
    "8 x (504 + 8 x 1024)": (tree(8, 504, 8, 1024), (64, 1528)),
    "2048 + 8 x 512": (tree(1, 2048, 8, 512), (8, 2560)),
}
HEADS = {"8B": (32, 8, 128), "0.5B": (14, 2, 64)}
DENSE = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
}


def values(*shape: int) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16).requires_grad_()


def pairs(layout: PackedLayout) -> int:
    """Queries and keys that see each other."""
    prefix = [layout.lengths[p] if p >= 0 else 0 for p in layout.parents]
    return sum(n * (n + 1) // 2 + n * p for n, p in zip(layout.lengths, prefix, strict=True))


def milliseconds(forward: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[float, float]:
    """Of the forward alone, and of forward and backward."""
    gradient = torch.randn_like(forward())

    def both() -> None:
        torch.autograd.grad(forward(), leaves, gradient)

    def alone() -> None:
        with torch.no_grad():
            forward()

    times = [do_bench(call, warmup=10, rep=60, return_mode="median") for call in (alone, both)]
    return float(times[0]), float(times[1])


def cell(times: tuple[float, float], flops: float) -> str:
    """Milliseconds of the forward, of both, and TFLOP/s of both."""
    return f"{times[0]:.2f} / {times[1]:.2f} ms, {14 * flops / times[1] / 1e9:.0f}"


def dense(rows: int, tokens: int, heads: int, keys: int, head_size: int) -> tuple[str, tuple[float, float]]:
    """The fastest dense backend's name and times."""
    q, k, v = (values(rows, tokens, n, head_size) for n in (heads, keys, keys))
    best: dict[str, tuple[float, float]] = {}
    for name, backend in DENSE.items():

        def forward(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return torch.nn.functional.scaled_dot_product_attention(
                    q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=heads != keys
                )

        with case(f"dense {name} {rows} x {tokens}"):
            best[name] = milliseconds(forward, [q, k, v])
    name = min(best, key=lambda found: best[found][1])
    return name, best[name]


def bench(impls: list[str]) -> None:
    for model, (heads, keys, head_size) in HEADS.items():
        print(f"\n### {model} heads: {heads} on {keys}, d={head_size}; forward / both, TFLOP/s of both\n")
        print("| pack | " + " | ".join(impls) + " | dense rows, prompts repeated |\n|" + "---|" * (len(impls) + 2))
        for name, (sizes, rows) in PACKS.items():
            layout = PackedLayout.build(*sizes, device="cuda")
            flops = pairs(layout) * heads * head_size
            q, k, v = (values(layout.tokens, n, head_size) for n in (heads, keys, keys))
            cells = []
            for impl in impls:
                cells.append("-" if refusal(impl, q, layout, Rule(1.0)) else "failed")
                with case(f"{impl} {name}"):
                    if cells[-1] == "failed":
                        forward = partial(packed_attention, q, k, v, layout, impl=impl)
                        cells[-1] = cell(milliseconds(forward, [q, k, v]), flops)
            del q, k, v
            with case(f"dense {name}"):
                backend, times = dense(*rows, heads, keys, head_size)
                cells.append(f"{cell(times, flops)} ({backend})")
            print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
            torch.cuda.empty_cache()


LAUNCHES = {  # queries, keys, warps, stages
    "forward": [(128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 3), (128, 128, 8, 3), (128, 64, 4, 3)],
    "query": [(128, 64, 8, 2), (128, 64, 8, 3), (64, 64, 4, 3), (64, 32, 4, 3), (128, 128, 8, 2), (128, 32, 8, 3)],
    "key": [(64, 128, 8, 2), (32, 128, 8, 3), (64, 128, 8, 3), (64, 64, 4, 2), (32, 64, 4, 3), (128, 128, 8, 2)],
}


def sweep() -> None:
    """Each kernel alone with each launch; one whose result differs from the default launch's cannot win."""
    from slothrl_kernels import attention_triton as ours
    from slothrl_kernels.attention_config import AttentionLaunch, attention_config

    layout = PackedLayout.build(*tree(2, 512, 4, 1024), device="cuda")
    for heads, keys, head_size in HEADS.values():
        rule = Rule(head_size**-0.5)
        config = attention_config(torch.device("cuda", 0), head_size, torch.bfloat16)
        q, k, v = (values(layout.tokens, n, head_size).detach() for n in (heads, keys, keys))
        gradient = torch.randn_like(q)
        out, lse = ours._forward(q, k, v, layout, rule, config.forward)
        delta = ours._delta(out, gradient)
        calls = {
            "forward": lambda launch, q=q, k=k, v=v, rule=rule: ours._forward(q, k, v, layout, rule, launch)[:1],
            "query": lambda launch, a=(q, k, v, gradient, lse, delta), rule=rule: (
                ours._query_gradient(*a, layout, rule, launch),
            ),
            "key": lambda launch, a=(q, k, v, gradient, lse, delta), rule=rule: ours._key_gradients(
                *a, layout, rule, launch
            ),
        }
        winners = []
        for name, call in calls.items():
            best = (float("inf"), "")
            wanted = call(getattr(config, name))
            for sizes in LAUNCHES[name]:
                with case(f"{name} d={head_size} {sizes}"):
                    launch = AttentionLaunch(*sizes)
                    for got, right in zip(call(launch), wanted, strict=True):
                        torch.testing.assert_close(got, right, rtol=0, atol=2e-2 * right.abs().max().item())
                    taken = float(do_bench(partial(call, launch), warmup=5, rep=30, return_mode="median"))
                    print(f"{name} d={head_size} {sizes}: {taken:.3f} ms", flush=True)
                    best = min(best, (taken, str(sizes)))
            winners.append(best[1])
        print(f'    ("{torch.cuda.get_device_name()}", {head_size}): _config({", ".join(winners)}),', flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--flex", action="store_true", help="FlexAttention too")
    parser.add_argument("--sweep", action="store_true", help="time launches of our kernels instead")
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    if options.sweep:
        sweep()
    else:
        package = ["flash_attn"] if installed_version() != "none" else []
        bench(["flash", *package, "triton", "sdpa", *(["flex"] if options.flex else [])])
    print(f"\n{time.time() - START:.0f} s, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
