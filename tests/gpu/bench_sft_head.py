"""SFT's head, ours beside TRL's and beside the bare multiplications: `python tests/gpu/bench_sft_head.py`, about 30 s.

Log-probs, entropies and hits of 4,096 tokens, forward and backward, bf16: milliseconds of the device (median) and MiB
above what is there before. The gradients are held to TRL's first: a row that differs is a failed one.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import torch
from bench_tools import START, case, failures, milliseconds
from torch import Tensor
from trl.kernels.chunked_logprob import ChunkedLogProbFunction

from slothrl.logprobs import HeadSpec, selective_logprobs

TOKENS = 4096
SHAPES = {"Llama-3-8B": (4096, 128256), "Qwen3-0.6B": (1024, 151936), "Gemma 2, softcap 30": (2304, 256000)}
OUTPUTS = ("log_probs", "entropy", "is_top1")


def heads(weight: Tensor, labels: Tensor, softcap: float | None) -> dict[str, Callable[[Tensor], Tensor]]:
    def ours(hidden: Tensor) -> Tensor:
        hits = torch.empty_like(labels, dtype=torch.bool)
        return selective_logprobs(hidden, labels, HeadSpec(weight, softcap=softcap), top1_out=hits)[0]

    def trl(hidden: Tensor) -> Tensor:
        found = ChunkedLogProbFunction.apply(hidden, weight, None, labels, 1.0, 32768, softcap, 1.0, OUTPUTS)
        return found[0]  # pyright: ignore

    return {"ours": ours, "TRL": trl}


def measured(head: Callable[[Tensor], Tensor], hidden: Tensor) -> tuple[Tensor, float, float]:
    """The gradient, milliseconds and MiB of one forward and backward."""

    def step() -> Tensor:
        return torch.autograd.grad(head(hidden).sum() / TOKENS, hidden)[0]

    gradient = step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return gradient, milliseconds(step, repeats=5), (torch.cuda.max_memory_allocated() - before) / 2**20


def row(name: str, width: int, vocabulary: int) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    hidden = torch.randn(TOKENS, width, generator=generator, device="cuda").bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, width, generator=generator, device="cuda") * width**-0.5).bfloat16()
    labels = torch.randint(vocabulary, (TOKENS,), generator=generator, device="cuda")
    made = heads(weight, labels, 30.0 if "softcap" in name else None)
    found = {who: measured(head, hidden) for who, head in made.items()}
    apart = (found["ours"][0].float() - found["TRL"][0].float()).norm() / found["TRL"][0].float().norm()
    assert found["ours"][0].float().norm() > 0 and apart < 0.02, f"gradients {apart:.3f} apart"
    chunk = torch.randn(1024, vocabulary, device="cuda").bfloat16()

    def bare() -> None:
        for start in range(0, TOKENS, 1024):
            torch.matmul(hidden[start : start + 1024].detach(), weight.T, out=chunk)
            torch.matmul(chunk, weight)

    floor = milliseconds(bare, repeats=5)
    cells = [cell for who in found for cell in (f"{found[who][1]:.1f}", f"{found[who][2]:.0f}")]
    print(f"| {name} | {width} | {vocabulary} | {floor:.1f} | " + " | ".join(cells) + f" | {apart:.4f} |", flush=True)


def main() -> int:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}, {TOKENS} tokens\n")
    print(
        "| head | h | V | bare GEMMs, 4hV, ms | ours ms | MiB | TRL ms | MiB | gradients apart |\n" + "|---" * 9 + "|"
    )
    for name, sizes in SHAPES.items():
        with case(name):
            row(name, *sizes)
        torch.cuda.empty_cache()
    print(f"\n{time.time() - START:.0f} s, {len(failures)} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
