"""Milliseconds a decoding step of vLLM from one nf4 base with a LoRA: our linear layers, vLLM's bitsandbytes, and bf16.

    python tests/gpu/bench_decode.py --shape 8b                  # arms side by side, timed one after the other
    python tests/gpu/bench_decode.py --shape 3b --arms slothrl,bitsandbytes
    python tests/gpu/bench_decode.py --shape 8b --rollout        # also 64 completions of 1,024 tokens after 504
    python tests/gpu/bench_decode.py --shape 8b --profile        # also where a step's time goes, kernel by kernel
    python tests/gpu/bench_decode.py --shape 0.5b --sequences 1,2,4,8,16,24,32,48,64,96,128,192,256 --steps 64

Random weights of the shape, LoRA r=16 on all linear layers, CUDA graphs, prompts of 512 tokens and 256 more: the time
of a step is that of generating 257 tokens less that of generating one, over 256 (--steps). Behind an arm's name:
"-no-lora", "-view" (slothrl only: from a 16-bit view of the base, LoRA folded in), "-fp8" (an FP8 KV cache).
"""

from __future__ import annotations

import argparse
import fcntl
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROMPT, RANK = 512, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def start(arm: str, folder: str, kv_gb: float, sequences: list[int]):
    from random_nf4 import register_random_loader

    from slothrl import vllm_compat, vllm_linear

    vllm = vllm_compat.import_vllm()
    base, _, variant = arm.partition("-")
    without = variant == "no-lora"
    arguments: dict[str, Any] = {
        "model": folder,
        "load_format": register_random_loader(),
        "dtype": "bfloat16",
        "max_model_len": 2048,
        "max_num_seqs": max(sequences),
        "kv_cache_memory_bytes": int(kv_gb * 2**30),
        "gpu_memory_utilization": 0.1,
        "logprobs_mode": "processed_logprobs",
        "disable_log_stats": True,
        "kv_cache_dtype": "fp8" if variant == "fp8" else "auto",
        "compilation_config": {"cudagraph_capture_sizes": sequences},
    }
    if base == "slothrl":
        vllm_linear.register()
        wanted = {"rank": RANK, "targets": [] if without else list(TARGETS), "view": variant == "view"}
        arguments |= {"quantization": vllm_linear.NF4, "additional_config": {"slothrl": wanted}}
    else:
        arguments |= {"quantization": "bitsandbytes"} if base == "bitsandbytes" else {}
        if not without:
            arguments |= {
                "enable_lora": True,
                "max_loras": 1,
                "max_lora_rank": RANK,
                "lora_target_modules": list(TARGETS),
            }
    if base == "bitsandbytes":  # for that method vLLM takes the loader of that name
        arguments["load_format"] = register_random_loader("bitsandbytes")
    llm = vllm.LLM(**arguments)
    if not without:
        fill_lora(llm, base == "slothrl")
    if variant == "view":
        vllm_linear.fill_views(vllm_compat.model_of(llm))
    return llm


def fill_lora(llm, own: bool) -> None:
    import torch

    from slothrl import vllm_compat, vllm_linear

    model = vllm_compat.model_of(llm)
    if own:
        found = [pair[:2] for pieces in vllm_linear.layer_loras(model).values() for pair in pieces]
    else:
        config = llm.llm_engine.vllm_config.model_config.hf_config
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
    assert len(found) == len(TARGETS) * llm.llm_engine.vllm_config.model_config.hf_config.num_hidden_layers, len(found)
    for a, b in found:
        a.normal_(0, 0.02)
        b.normal_(0, 0.02)


def measure(options: argparse.Namespace, arms: list[str]) -> None:
    begin, arm, out = time.time(), options.arm, options.folder
    llm = start(arm, str(out), options.kv, options.sequences)
    from vllm import SamplingParams
    from vllm.lora.request import LoRARequest

    request = None if arm.startswith("slothrl") or "no-lora" in arm else LoRARequest("bench", 1, "/in-memory")
    vocabulary = llm.llm_engine.vllm_config.model_config.hf_config.vocab_size

    def seconds(count: int, tokens: int, prompt: int = PROMPT, same: int = 1) -> float:
        prompts = [[random.randrange(2, vocabulary) for _ in range(prompt)] for _ in range(count // same)]
        prompts = [{"prompt_token_ids": p} for p in prompts for _ in range(same)]
        wanted = SamplingParams(max_tokens=tokens, ignore_eos=True, detokenize=False, logprobs=0)
        started = time.perf_counter()
        outputs = llm.generate(prompts, wanted, use_tqdm=False, lora_request=request)
        taken = time.perf_counter() - started
        assert all(len(output.outputs[0].token_ids) == tokens for output in outputs)
        return taken

    found: dict[str, Any] = {"start": time.time() - begin}
    (out / f"{arm}.ready").touch()
    while not all((out / f"{other}.ready").exists() or (out / f"{other}.dead").exists() for other in arms):
        time.sleep(0.5)
    with (Path(tempfile.gettempdir()) / "bench_decode.turn").open("w") as turn:  # also of another shape's arms
        fcntl.flock(turn, fcntl.LOCK_EX)
        for count in options.sequences:
            seconds(count, 8)
            one = statistics.median(seconds(count, 1) for _ in range(3))
            steps = options.steps
            found[f"{count}"] = (min(seconds(count, steps + 1) for _ in range(2)) - one) / steps * 1e3
            save(out, arm, found)
        found["prefill"] = 64 * PROMPT / min(seconds(64, 1) for _ in range(2))
        if options.rollout:
            found["rollout"] = seconds(64, 1024, 504, 8)
        save(out, arm, found)
        for count in (1, 64, 128) if options.profile else ():
            profile(count, lambda count=count: seconds(count, 33))


def profile(count: int, call) -> None:
    """Kernels by their share of the GPU's time, and how much of the wall clock the GPU was busy."""
    import torch

    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        wall = call() * 1e6
    kernels = sorted(record.key_averages(), key=lambda event: -event.self_device_time_total)
    busy = sum(event.self_device_time_total for event in kernels)
    print(f"PROFILE {count} sequences, 32 steps and a prefill: {wall / 1e3:.0f} ms, GPU busy {busy / 1e3:.0f} ms")
    for event in kernels[:26]:
        print(f"PROFILE   {event.self_device_time_total / 1e3:8.2f} ms {event.count:6d} x {event.key[:90]}", flush=True)


def save(out: Path, arm: str, found: dict[str, Any]) -> None:
    """After each figure, so that a run that is cut short leaves what it has."""
    (out / f"{arm}.json").write_text(json.dumps(found))
    print("RESULT", arm, json.dumps(found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8b")
    parser.add_argument("--arms", default="slothrl,bitsandbytes,bf16")
    parser.add_argument("--sequences", type=lambda text: [int(n) for n in text.split(",")], default=[1, 16, 64, 128])
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--kv", type=float, default=12.8, help="GiB of KV cache an arm")
    parser.add_argument("--rollout", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--arm")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    arms = options.arms.split(",")
    if options.arm:
        measure(options, arms)
        return
    from random_nf4 import write_config

    with tempfile.TemporaryDirectory() as made:
        folder = write_config(options.shape, Path(made))
        running = {}
        for arm in arms:
            command = [sys.executable, *sys.argv, "--arm", arm, "--folder", made]
            with Path(f"decode-{options.shape}-{arm}.log").open("w") as log:
                running[arm] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        while any(process.poll() is None for process in running.values()):
            for arm, process in running.items():
                if process.poll() is not None:
                    (folder / f"{arm}.dead").touch()
            time.sleep(0.5)
        print_table(options, folder, arms)


def print_table(options: argparse.Namespace, folder: Path, arms: list[str]) -> None:
    shape, sequences = options.shape, options.sequences
    print(f"\n### {shape}, LoRA r={RANK}, context {PROMPT} to {PROMPT + options.steps}: ms a step by sequences\n")
    print(f"| arm | {' | '.join(map(str, sequences))} | prefill, tokens/s | 64 x (504 + 1,024), s | start, s |")
    print("|---" * (len(sequences) + 4) + "|")
    for arm in arms:
        result = folder / f"{arm}.json"
        if not result.exists():
            print(f"| {arm} | failed: see decode-{shape}-{arm}.log |")
            continue
        found = json.loads(result.read_text())
        missing = float("nan")
        cells = [f"{found.get(str(count), missing):.2f}" for count in sequences]
        cells += [f"{found.get('prefill', missing):,.0f}", f"{found.get('rollout', missing):.1f}"]
        print(f"| {arm} | {' | '.join(cells)} | {found['start']:.0f} |")


if __name__ == "__main__":
    main()
