"""Milliseconds a decoding step of vLLM from one nf4 base with a LoRA: our linear layers, vLLM's bitsandbytes, and bf16.

    python tests/gpu/bench_decode.py --shape 8b                  # arms side by side, timed one after the other
    python tests/gpu/bench_decode.py --shape 3b --arms slothrl,bitsandbytes
    python tests/gpu/bench_decode.py --shape 8b --rollout        # also 64 completions of 1,024 tokens after 504
    python tests/gpu/bench_decode.py --shape 8b --profile        # also where a step's time goes, and where none does
    python tests/gpu/bench_decode.py --shape 8b,3b,0.5b --arms slothrl,bitsandbytes --prompt 64 --steps 48 \\
        --batched 4096 --sequences 1,2,4,8,16,24,32,48,64,96,128,192,256    # is ours slower anywhere? on one card
    python tests/gpu/bench_decode.py --shape 0.5b --arms slothrl,bitsandbytes --prompt 64 --rounds 3 --profile \\
        --sequences 64,96,128,192,256 --profiled 64,96,128,192,256    # where the host takes longer than the GPU

Random weights of the shape, LoRA r=16 on all linear layers, CUDA graphs, prompts of 512 tokens (--prompt) and 256 more:
the time of a step is that of generating 257 tokens less that of generating one, over 256 (--steps). All arms of all
shapes start side by side, so the card must hold them; one that is done gives its part back. Behind an arm's name, also
together: "-no-lora", "-view" (slothrl only: from a 16-bit view of the base, LoRA folded in), "-fp8" (an FP8 KV cache),
"-pdl" (torch.compile's kernels start early, `slothrl.vllm_compilation`), "-generate" (by `vllm.LLM.generate`, not by
`slothrl.vllm_requests.complete`), "-short" (the scheduler by `slothrl.vllm_scheduler`). --profile adds the GPU's busy
ms a step to the table, and to the arm's log its kernels and the functions that the host spends a step in.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.gpu.decode_arm import RANK, cache_of, measure
from tests.gpu.decode_table import table


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=lambda text: text.split(","), default=["8b"])
    parser.add_argument("--arms", type=lambda text: text.split(","), default=["slothrl", "bitsandbytes", "bf16"])
    parser.add_argument("--sequences", type=numbers, default=[1, 16, 64, 128])
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--steps", type=int, default=256)
    parser.add_argument("--kv", type=float, help="GiB of KV cache an arm; default: what its sequences need")
    parser.add_argument("--batched", type=int, help="tokens a step at most; vLLM's default takes more memory")
    parser.add_argument("--rounds", type=int, default=1, help="the arms in turn so often; a step's fewest ms")
    parser.add_argument("--rollout", action="store_true")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--profiled", type=numbers, help="numbers of sequences to profile; default: 1, 64, 128")
    parser.add_argument("--arm", nargs=2, help="for the child processes: a shape and an arm of it")
    parser.add_argument("--folder", type=Path)
    return parser.parse_args(arguments)


def main() -> None:
    options = parse(sys.argv[1:])
    all_arms = {f"{shape}-{arm}": (shape, arm) for shape in options.shape for arm in options.arms}
    if options.arm:
        measure(options, *options.arm, [*all_arms])
        return
    from tests.gpu.random_nf4 import write_config

    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        for shape in options.shape:
            write_config(shape, folder / shape)
        run(options, folder, all_arms)
        for shape in options.shape:
            print_shape(options, folder, shape)


def run(options: argparse.Namespace, folder: Path, all_arms: dict[str, tuple[str, str]]) -> None:
    """All arms in processes of their own, until the last has ended."""
    running = {}
    for name, (shape, arm) in all_arms.items():
        print(f"{name}: {cache_of(options, shape, arm)[0] / 2**30:.1f} GiB of KV cache", flush=True)
        command = [sys.executable, *sys.argv, "--arm", shape, arm, "--folder", str(folder)]
        with Path(f"decode-{name}.log").open("w") as log:
            running[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    while running:
        for name, process in list(running.items()):
            if process.poll() is not None:
                (folder / f"{name}.dead").touch()
                print(f"{name} ended with code {running.pop(name).returncode}", flush=True)
        time.sleep(0.5)


def print_shape(options: argparse.Namespace, folder: Path, shape: str) -> None:
    files = {arm: folder / f"{shape}-{arm}.json" for arm in options.arms}
    results = {arm: json.loads(file.read_text()) if file.exists() else None for arm, file in files.items()}
    context = f"context {options.prompt} to {options.prompt + options.steps}"
    print(table(f"{shape}, LoRA r={RANK}, {context}", options.sequences, results), flush=True)


if __name__ == "__main__":
    main()
