"""`python -m slothrl bench [name] …`: the benchmarks of the repository, each in processes of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
BENCHES = {
    "layers": (
        "kernels/benchmarks/lora_layers.py",
        "LoRA layers beside the bare GEMMs, PEFT and Unsloth",
    ),
    "step": ("kernels/benchmarks/train_step.py", "a whole SFT step: tokens a second and memory of every arm"),
    "kernels": ("tests/gpu/bench_kernels.py", "every kernel beside plain torch, bitsandbytes and Liger"),
    "logprobs": ("tests/gpu/bench_selective_log_softmax.py", "log-probs from hidden states"),
}
USAGE = "python -m slothrl bench [NAME [options]]; without a name: layers, then step; NAME --help lists its options"


def main(argv: list[str]) -> int:
    """Run one benchmark, or the two of the training step; prints Markdown. Exit codes: its own; 2: a mistake."""
    name = argv[0] if argv else None
    if name in ("-h", "--help"):
        print(USAGE, *(f"  {name:10} {line}" for name, (_, line) in BENCHES.items()), sep="\n")
        return 0
    if name is not None and name not in BENCHES:
        print(f"error: bench {name}: the benchmarks are {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    codes = [run(each, argv[1:]) for each in ([name] if name else ["layers", "step"])]
    return max(codes)


def run(name: str, options: list[str]) -> int:
    """One benchmark in a process of its own: peers that are compared with change things when they are imported."""
    path = ROOT / BENCHES[name][0]
    if not path.exists():
        print(f"error: bench {name} needs a checkout of the repository: {path} is not there", file=sys.stderr)
        return 2
    packages = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "rewards"), *filter(None, sys.path)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(packages)}  # where this process found things
    return subprocess.run([sys.executable, str(path), *options], env=environment).returncode
