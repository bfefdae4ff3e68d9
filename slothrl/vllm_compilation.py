"""What vLLM compiles and records: batch sizes of CUDA graphs, and how torch.compile's kernels are launched."""

from __future__ import annotations

from typing import Any


def compilation(sizes: list[int], early_launch: bool = False) -> dict[str, Any]:
    """The argument `compilation_config` of `vllm.LLM`.

    Args:
        sizes: batch sizes to record as CUDA graphs.
        early_launch: inductor's kernels start before the last one has ended (torch's `triton.enable_pdl`, from Hopper
            on; elsewhere it changes nothing). Read in torch 2.11: such a kernel lets the next start only after it has
            waited itself, and behind an operator that inductor does not know, as our linear layers are, it waits before
            its first access. Our own launches wait for it (`slothrl_kernels.early_launch`). One case is not covered: a
            kernel that reads nothing, say one that fills with zeros, need not wait. Not measured yet, so off.
    """
    config: dict[str, Any] = {"cudagraph_capture_sizes": sizes}
    if early_launch:
        config["inductor_compile_config"] = {"triton.enable_pdl": True}
    return config


def graph_sizes(sequences: int) -> list[int]:
    """The batch sizes whose decoding steps are recorded as CUDA graphs: 1, 2, 4, multiples of 8 up to 64, then of 16.

    vLLM records up to twice its sequences, which a decoding step never has; each size takes seconds and memory.
    """
    sizes = [1, 2, 4, *range(8, 65, 8), *range(80, sequences + 16, 16)]
    return [*(size for size in sizes if size < sequences), sequences]
