"""Time the selective log-softmax kernel beside its reference, and log-probs from hidden states, on this GPU.

python tests/gpu/bench_selective_log_softmax.py
"""

from __future__ import annotations

from functools import partial

import torch
from slothrl_kernels.selective_log_softmax import selective_log_softmax, selective_log_softmax_reference
from triton.testing import do_bench

from slothrl.logprobs import HeadSpec, selective_logprobs

ROWS = 1024


def kernel_table() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; {ROWS} rows, bf16, ms a call (median)\n")
    print("| V | kernel | kernel with probs | reference | reference with probs |\n|---|---|---|---|---|")
    for vocabulary in (49152, 151936, 151937):
        logits = torch.randn(ROWS, vocabulary, device="cuda", dtype=torch.bfloat16)
        labels = torch.randint(vocabulary, (ROWS,), device="cuda")
        cells = []
        for function in (selective_log_softmax, selective_log_softmax_reference):
            for probs in (None, torch.empty_like(logits)):
                call = partial(function, logits, labels, 1.0, probs)
                cells.append(do_bench(call, return_mode="median"))
        print(f"| {vocabulary} | " + " | ".join(f"{cell:.3f}" for cell in cells) + " |")


def head_table(tokens: int = 8192, *, width: int, vocabulary: int) -> None:
    weight = torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16) * width**-0.5
    hidden = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(vocabulary, (tokens,), device="cuda")

    def step(impl: str, chunk: int | None) -> None:
        logprobs, _ = selective_logprobs(hidden, labels, HeadSpec(weight), chunk_size=chunk, impl=impl)  # pyright: ignore
        logprobs.sum().backward()

    def gemms() -> None:
        """4hV FLOPs a token, with all logits at once."""
        logits = hidden.detach() @ weight.T
        torch.mm(logits, weight)

    bare = do_bench(gemms, return_mode="median")
    torch.cuda.empty_cache()
    print(f"\nlog-probs from hidden states, forward and backward: {tokens} tokens, h={width}, V={vocabulary}, bf16")
    print(f"bare GEMMs: {bare:.1f} ms, {4 * tokens * width * vocabulary / bare / 1e9:.0f} TFLOP/s\n")
    print("| impl | chunk | ms | times bare | peak extra MiB |\n|---|---|---|---|---|")
    for impl in ("triton", "torch"):
        for chunk in (None, 512, 1024, 2048):
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step(impl, chunk)
            extra = (torch.cuda.max_memory_allocated() - before) / 2**20
            time = do_bench(partial(step, impl, chunk), return_mode="median")
            print(f"| {impl} | {chunk or 'chosen'} | {time:.1f} | {time / bare:.2f} | {extra:.0f} |", flush=True)


if __name__ == "__main__":
    kernel_table()
    for width, vocabulary in ((4096, 128256), (4096, 151936), (2048, 151936)):
        head_table(width=width, vocabulary=vocabulary)
