"""What the memory prediction takes from measurement and not from arithmetic: every number with its origin.

All in bytes, but for shares. Where the origin says "assumed", nobody has measured it yet: set it from
`tests/gpu/bench_fit.py`, whose table has a column for each.
"""

from __future__ import annotations

GIB = 2**30

# name: (value, origin)
TABLE: dict[str, tuple[float, str]] = {
    # A CUDA context with the kernels of torch, cuBLAS, Triton and bitsandbytes, outside torch's allocator.
    "context": (
        0.80e9,
        "measured: tests/gpu/bench_fit.py, H100, torch 2.11, 2026-11-22: 789 to 813 MB in nine updates; smaller cards"
        " have fewer SMs and take less",
    ),
    # cuBLAS' workspace, which torch allocates: 32 MiB on Hopper, 8 MiB before.
    "workspace": (32 * 2**20, "torch, aten/src/ATen/cuda/CublasHandlePool.cpp, Hopper's"),
    # What torch reserves and has no tensor in: a share of what one layer holds in its backward, and a least.
    "fragments": (
        0.40,
        "fitted with `fragments_least` to reserved less allocated of twelve such updates (216 to 1,699 MB), each"
        " within 210 MB; torch's default allocator (expandable segments clash with vLLM's cumem pool)",
    ),
    "fragments_least": (0.20e9, "see `fragments`"),
    # vLLM beside weights, LoRA buffers, cache and graphs: its own buffers and workspaces, asleep.
    "vllm": (
        0.05e9,
        "fitted with `vllm_matrices` to tests/gpu/results/shared_base.md: SmolLM2-135M 1,150 MB and Llama-3-8B's shape"
        " 7,452 MB in use asleep, less what is counted otherwise",
    ),
    # How many of the model's largest matrix, unpacked, that grows by.
    "vllm_matrices": (2, "see `vllm`"),
    # CUDA graphs of vLLM's decode, by layer: none with rollout.enforce_eager.
    "graphs_per_layer": (8e6, "assumed: 0.25 GB for 32 layers"),
    # Tokens of vLLM's largest prefill, for which it sets memory aside when it sizes its cache.
    "vllm_tokens": (8192, "vLLM 0.26's max_num_batched_tokens for `vllm.LLM`"),
    # Of a card's name in GiB, what the driver reports as its total.
    "card": (0.985, "H100 80 GB: 79.2 GiB (0.990); RTX 3090 24 GB: 23.6 GiB (0.983)"),
}


def constant(name: str) -> float:
    """A value of the table."""
    return TABLE[name][0]


def card_bytes(gigabytes: float) -> int:
    """Usable bytes of a card that is sold as `gigabytes`: 24 -> 25.4e9."""
    return int(gigabytes * GIB * constant("card"))
