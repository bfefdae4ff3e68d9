"""The main job on a GPU, nf4 beside bf16: runs `python -m slothrl` and prints a markdown table of what came of it.

    python tests/gpu/bench_main_job.py smollm2                  # the embedded model, single-digit addition
    python tests/gpu/bench_main_job.py arithmetic --model DIR   # 2 and 3 digits, addition and multiplication
    python tests/gpu/bench_main_job.py gsm8k --model DIR --gsm8k DIR  # a folder with train.jsonl and test.jsonl

--model: a checkpoint of about half a billion parameters. All runs of one call share the GPU side by side, so the
seconds say little and the scores everything. Results land in --out, with a figure of the reward curves.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "vllm", "bitsandbytes", "trl", "transformers", "peft")
COLUMNS = "job, base, score, steps, before, after, reward of the first 5 steps, of the last 5, ratio, probe, train s"
COMMON = """rollout=vllm rollout.gpu_memory_utilization=0.1 logger.samples=3 logger.samples_every=25
    logger.progress=false"""
HALF_BILLION = "model=hub trainer.learning_rate=1e-4 trainer.lr_scheduler_type=linear trainer.warmup_steps=2"
JOBS = {
    "smollm2": """model.lora.r=16 model.lora.lora_alpha=32 trainer.learning_rate=6e-4 trainer.warmup_steps=2
        trainer.lr_scheduler_type=constant_with_warmup trainer.max_steps=60
        rollout.enforce_eager=true rollout.kv_cache_gb=2""",
    "arithmetic": f"""{HALF_BILLION} data=arithmetic data.task.digits=3 data.task.min_digits=2
        data.task.operations=['+','*'] data.train_size=2000 data.eval_size=200 trainer.max_steps=60
        trainer.max_completion_length=16 rollout.enforce_eager=true rollout.kv_cache_gb=3""",
    "gsm8k": f"""{HALF_BILLION} data=gsm8k data.eval_size=200 trainer.max_steps=50 trainer.max_completion_length=200
        trainer.per_device_train_batch_size=64 trainer.gradient_accumulation_steps=1 rollout.kv_cache_gb=6""",
}
BASES = {"nf4": "nf4", "none": "bf16"}


def start(job: str, quantization: str, arguments: argparse.Namespace) -> subprocess.Popen:
    """One run in a process of its own, its output in a log beside its folder."""
    folder = arguments.out / f"{job}-{quantization}"
    line = [*COMMON.split(), *JOBS[job].split(), f"model.quantization={quantization}", f"output_dir={folder}"]
    if job != "smollm2":
        line.append(f"model.name={arguments.model}")
    if job == "gsm8k":
        line.append(f"data.path={arguments.gsm8k}")
    with folder.with_suffix(".log").open("w") as log:
        command = [sys.executable, "-m", "slothrl", *line]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def metrics_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def row(job: str, quantization: str, out: Path) -> str:
    """One line of the table, from what the run left behind."""
    folder = out / f"{job}-{quantization}"
    if not (folder / "summary.json").exists():
        return f"{job} {quantization}: failed, see {folder}.log"
    summary, metrics = json.loads((folder / "summary.json").read_text()), metrics_of(folder)

    def values(key: str) -> list[float]:
        return [m[key] for m in metrics if m.get(key) is not None]

    def mean(numbers: list[float]) -> str:
        return f"{sum(numbers) / len(numbers):.3f}"

    rewards = values("reward")
    cells = [job, BASES[quantization], summary["metric"], summary["steps"]]
    cells += [f"{summary['before']:.3f}", f"{summary['after']:.3f}", mean(rewards[:5]), mean(rewards[-5:])]
    cells += [mean(values("sampling/importance_sampling_ratio/mean"))]
    cells += [f"{max(values('sampling/probe_difference')):.3f}", f"{summary['train_seconds']:.0f}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def draw(jobs: list[str], out: Path) -> None:
    """Reward over steps, a panel a job, nf4 beside bf16."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(jobs), 3.2), layout="constrained")
    for axes, job in zip(figure.subplots(1, len(jobs), squeeze=False)[0], jobs, strict=True):
        for quantization, base in BASES.items():
            rewards = [m["reward"] for m in metrics_of(out / f"{job}-{quantization}") if m.get("reward") is not None]
            smooth = [sum(rewards[max(0, i - 4) : i + 1]) / min(i + 1, 5) for i in range(len(rewards))]
            (line,) = axes.plot(range(1, len(rewards) + 1), smooth, label=base)
            axes.plot(range(1, len(rewards) + 1), rewards, color=line.get_color(), alpha=0.25)
        axes.set(title=job, xlabel="step", ylabel="reward (mean of 5 steps)")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(out / "reward_curves.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="+", choices=list(JOBS))
    parser.add_argument("--model")
    parser.add_argument("--gsm8k")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"))
    parser.add_argument("--report", action="store_true", help="run nothing, report on what --out holds")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    pairs = [(job, quantization) for job in arguments.jobs for quantization in BASES]
    if not arguments.report:
        import torch

        for process in [start(*pair, arguments) for pair in pairs]:
            process.wait()
        versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES)
        print(f"{torch.cuda.get_device_name()}, {versions}, {datetime.date.today()}\n")
    print("| " + " | ".join(COLUMNS.split(", ")) + " |")
    print("|" + "---|" * len(COLUMNS.split(", ")))
    print("\n".join(row(*pair, arguments.out) for pair in pairs))
    draw(arguments.jobs, arguments.out)


if __name__ == "__main__":
    main()
