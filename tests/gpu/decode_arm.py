"""One arm of bench_decode.py, in a process of its own: vLLM over random weights, and the time of its steps."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import gc
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.gpu.decode_profile import LONG
from tests.gpu.random_nf4 import SHAPES

RANK, BLOCK = 16, 16  # of the LoRA; tokens in a block of vLLM's KV cache
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
ROLLOUT = (64, 504, 1024)  # completions, tokens of prompt and completion
PREFILL = 64  # prompts
MODEL_LENGTH = 2048  # at least: attention's launches depend on it
TURN_CORES = 2  # what runs Python during a turn: on most machines the two threads of one core


def cache_of(options: argparse.Namespace, shape: str, arm: str) -> tuple[int, int]:
    """Bytes of KV cache that an arm needs, and the longest sequence, in tokens."""
    loads = [(max(options.sequences), options.prompt + options.steps + 1), (PREFILL, options.prompt + 1)]
    loads += [(max(options.sequences), options.prompt + LONG)] if options.profile else []
    loads += [(ROLLOUT[0], ROLLOUT[1] + ROLLOUT[2])] if options.rollout else []
    longest = max(MODEL_LENGTH, *(length for _, length in loads))
    tokens = max(longest, *(count * (-(-length // BLOCK) + 1) * BLOCK for count, length in loads)) + 64 * BLOCK
    fields = SHAPES[shape]
    width = fields["hidden_size"] // fields["num_attention_heads"] * fields["num_key_value_heads"]
    token = 2 * fields["num_hidden_layers"] * width * (1 if "-fp8" in arm else 2)
    return int(options.kv * 2**30) if options.kv else tokens * token, longest


def start(options: argparse.Namespace, shape: str, arm: str, folder: Path):
    from slothrl import vllm_compat, vllm_linear
    from slothrl.vllm_compilation import compilation
    from slothrl.vllm_scheduler import SHORT
    from tests.gpu.random_nf4 import register_random_loader

    vllm = vllm_compat.import_vllm()
    base, without, view = arm.partition("-")[0], "-no-lora" in arm, "-view" in arm
    cache, longest = cache_of(options, shape, arm)
    arguments: dict[str, Any] = {
        "model": str(folder),
        # For bitsandbytes' method vLLM takes the loader of that name.
        "load_format": register_random_loader(*(["bitsandbytes"] if base == "bitsandbytes" else [])),
        "dtype": "bfloat16",
        "max_model_len": longest,
        "max_num_seqs": max(options.sequences),
        "kv_cache_memory_bytes": cache,
        "gpu_memory_utilization": 0.02,  # must be free at the start; the cache's size is given
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "kv_cache_dtype": "fp8" if "-fp8" in arm else "auto",
        "compilation_config": compilation(options.sequences, "-pdl" in arm),
    }
    arguments |= {"max_num_batched_tokens": options.batched} if options.batched else {}
    arguments |= {"scheduler_cls": SHORT} if "-short" in arm else {}
    if base == "slothrl":
        vllm_linear.register()
        wanted = {"rank": RANK, "targets": [] if without else list(TARGETS), "view": view}
        arguments |= {"quantization": vllm_linear.NF4, "additional_config": {"slothrl": wanted}}
    else:
        arguments |= {"quantization": "bitsandbytes"} if base == "bitsandbytes" else {}
        lora = {"enable_lora": True, "max_loras": 1, "max_lora_rank": RANK, "lora_target_modules": list(TARGETS)}
        arguments |= {} if without else lora
    llm = vllm.LLM(**arguments)
    if not without:
        fill_lora(llm, base == "slothrl")
    if view:
        vllm_linear.fill_views(vllm_compat.model_of(llm))
    return llm


def fill_lora(llm, own: bool) -> None:
    import torch

    from slothrl import vllm_compat, vllm_linear

    model = vllm_compat.model_of(llm)
    config = llm.llm_engine.vllm_config.model_config.hf_config
    if own:
        found = [pair[:2] for pieces in vllm_linear.layer_loras(model).values() for pair in pieces]
    else:
        tensors = {}
        kv = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
        wide = {"k_proj": kv, "v_proj": kv, "gate_proj": config.intermediate_size, "up_proj": config.intermediate_size}
        for layer in range(config.num_hidden_layers):
            for target in TARGETS:
                place = "self_attn" if target[0] in "qkvo" else "mlp"
                name = f"base_model.model.model.layers.{layer}.{place}.{target}.lora_"
                inputs = config.intermediate_size if target == "down_proj" else config.hidden_size
                outputs = wide.get(target, config.hidden_size)
                tensors[f"{name}A.weight"] = torch.zeros(RANK, inputs, device="cuda")
                tensors[f"{name}B.weight"] = torch.zeros(outputs, RANK, device="cuda")
        vllm_compat.register_adapter(llm, tensors, RANK, RANK, TARGETS)
        index = vllm_compat.adapter_in_place(llm)
        found = [b for n, b in vllm_compat.lora_buffers(llm, index).items() if n.endswith(TARGETS)]
    assert len(found) == len(TARGETS) * config.num_hidden_layers, len(found)
    for a, b in found:
        a.normal_(0, 0.02)
        b.normal_(0, 0.02)


class Timer:
    """Seconds that vLLM takes for completions of a forced length."""

    def __init__(self, llm, arm: str, prompt: int):
        from vllm.lora.request import LoRARequest

        plain = arm.startswith("slothrl") or "-no-lora" in arm
        self.llm, self.prompt, self.generate = llm, prompt, "-generate" in arm
        self.request = None if plain else LoRARequest("bench", 1, "/in-memory")
        self.vocabulary = llm.llm_engine.vllm_config.model_config.hf_config.vocab_size

    def __call__(self, count: int, tokens: int, prompt: int | None = None, same: int = 1) -> float:
        """For `count` completions, `same` of each prompt."""
        from vllm import SamplingParams

        from slothrl.vllm_requests import complete, serve

        length = self.prompt if prompt is None else prompt
        prompts = [[random.randrange(2, self.vocabulary) for _ in range(length)] for _ in range(count // same)]
        prompts = [{"prompt_token_ids": p} for p in prompts for _ in range(same)]
        wanted = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=0)
        started = time.perf_counter()
        found = (serve if self.generate else complete)(self.llm, prompts, wanted, self.request)
        taken = time.perf_counter() - started
        made = [output.outputs[0].token_ids for output in found] if self.generate else found.token_ids
        assert all(len(ids) == tokens for ids in made)
        return taken


def measure(options: argparse.Namespace, shape: str, arm: str, all_arms: list[str]) -> None:
    """Start, wait for the others to have started, and take one's turn on the device; then the card is given back."""
    from slothrl import vllm_compat

    begin, out, name = time.time(), options.folder, f"{shape}-{arm}"
    llm = start(options, shape, arm, out / shape)
    found: dict[str, Any] = {"start": time.time() - begin}
    (out / f"{name}.ready").touch()
    while not all((out / f"{n}.ready").exists() or (out / f"{n}.dead").exists() for n in all_arms):
        time.sleep(0.5)
    seconds = Timer(llm, arm, options.prompt)
    for turn in range(options.rounds):
        with my_turn():
            take_steps(options, seconds, found, out / f"{name}.json")
            if turn == options.rounds - 1:
                take_rest(options, seconds, found, out / f"{name}.json")
        time.sleep(1)  # for the next to take the turn
    vllm_compat.shut_down(llm)


@contextlib.contextmanager
def my_turn() -> Iterator[None]:
    """Alone on the device, among the arms of this command and of others, and on the same cores as each of them.

    A small model's step took up to 40 % longer in one process than in the next. Only this thread is moved; where that
    is not permitted, it stays where it is. The garbage collector looks at nothing that is there at the start.
    """
    with (Path(tempfile.gettempdir()) / "bench_decode.turn").open("w") as turn:
        fcntl.flock(turn, fcntl.LOCK_EX)
        before = os.sched_getaffinity(0)
        with contextlib.suppress(OSError):
            os.sched_setaffinity(0, sorted(before)[-TURN_CORES:])
        gc.collect()
        gc.freeze()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.sched_setaffinity(0, before)


def take_steps(options: argparse.Namespace, seconds: Timer, found: dict[str, Any], file: Path) -> None:
    """Milliseconds a step, the fewest of this round and those before: what else the host does only adds to them."""
    steps = options.steps
    for count in options.sequences:
        seconds(count, 8)
        one = statistics.median(seconds(count, 1) for _ in range(3))
        taken = (min(seconds(count, steps + 1) for _ in range(2)) - one) / steps * 1e3
        found[f"{count}"] = min(taken, found.get(f"{count}", taken))
        save(file, found)


def take_rest(options: argparse.Namespace, seconds: Timer, found: dict[str, Any], file: Path) -> None:
    found["prefill"] = PREFILL * options.prompt / min(seconds(PREFILL, 1) for _ in range(2))
    if options.rollout:
        completions, prompt, tokens = ROLLOUT
        found["rollout"] = seconds(completions, tokens, prompt, same=8)
    save(file, found)
    if options.profile:
        from tests.gpu.decode_host import host_profile
        from tests.gpu.decode_profile import profile

        found["profile"] = {}
        for count in options.profiled or [count for count in options.sequences if count in (1, 64, 128)]:
            found["profile"][f"{count}"] = profile(count, seconds)
            save(file, found)
            host_profile(count, seconds)


def save(file: Path, found: dict[str, Any]) -> None:
    """After each figure, so that a run that is cut short leaves what it has."""
    file.write_text(json.dumps(found))
    print("RESULT", file.stem, json.dumps(found), flush=True)
