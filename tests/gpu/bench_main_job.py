"""The main job on a GPU, nf4 beside bf16: runs `python -m slothrl` and prints a markdown table of what came of it.

    python tests/gpu/bench_main_job.py smollm2                                # the embedded model, single-digit addition
    python tests/gpu/bench_main_job.py arithmetic --model FOLDER              # 3-digit addition, 2-digit multiplication
    python tests/gpu/bench_main_job.py gsm8k --model FOLDER --gsm8k FOLDER    # a folder with train.jsonl and test.jsonl

--model: a checkpoint of about half a billion parameters. All runs of one call share the GPU side by side, so the
seconds say little and the scores everything. Results land in --out.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

PACKAGES = ("torch", "vllm", "bitsandbytes", "trl", "transformers", "peft")
COMMON = ["rollout=vllm", "rollout.gpu_memory_utilization=0.1", "logger.samples=3", "logger.samples_every=25",
          "logger.progress=false"]  # fmt: skip


def overrides(job: str, model: str | None, gsm8k: str | None) -> list[str]:
    """The command line of one job, without its quantisation."""
    if job == "smollm2":
        return ["trainer.max_steps=60", "rollout.enforce_eager=true", "rollout.kv_cache_gb=2"]
    shared = ["model=hub", f"model.name={model}", "trainer.learning_rate=1e-4", "trainer.lr_scheduler_type=linear"]
    if job == "arithmetic":
        return [*shared, "data=arithmetic", "data.task.digits=3", "data.task.min_digits=2", "data.task.operations=['+','*']",
                "data.train_size=2000", "data.eval_size=200", "trainer.max_steps=60", "trainer.max_completion_length=16",
                "rollout.enforce_eager=true", "rollout.kv_cache_gb=3"]  # fmt: skip
    if job == "gsm8k":
        return [*shared, "data=gsm8k", f"data.path={gsm8k}", "data.eval_size=200", "trainer.max_steps=50",
                "trainer.max_completion_length=200", "trainer.per_device_train_batch_size=64",
                "trainer.gradient_accumulation_steps=1", "rollout.kv_cache_gb=6"]  # fmt: skip
    raise SystemExit(__doc__)


def start(job: str, quantization: str, arguments: argparse.Namespace) -> tuple[str, str, Path, subprocess.Popen]:
    folder = arguments.out / f"{job}-{quantization}"
    line = [*COMMON, *overrides(job, arguments.model, arguments.gsm8k), f"model.quantization={quantization}"]
    with folder.with_suffix(".log").open("w") as log:
        command = [sys.executable, "-m", "slothrl", *line, f"output_dir={folder}", f"hydra.run.dir={folder}"]
        return job, quantization, folder, subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def row(job: str, quantization: str, folder: Path) -> str:
    summary = json.loads((folder / "summary.json").read_text())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    def values(key: str) -> list[float]:
        return [m[key] for m in metrics if m.get(key) is not None]

    def mean(numbers: list[float]) -> float:
        return sum(numbers) / len(numbers)

    rewards = values("reward")
    cells = [
        job, "nf4" if quantization == "nf4" else "bf16", summary["metric"], summary["steps"],
        f"{summary['before']:.3f}", f"{summary['after']:.3f}", f"{mean(rewards[:5]):.3f}", f"{mean(rewards[-5:]):.3f}",
        f"{mean(values('sampling/importance_sampling_ratio/mean')):.3f}",
        f"{max(values('sampling/probe_difference')):.3f}", f"{summary['train_seconds']:.0f}",
    ]  # fmt: skip
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="+", choices=["smollm2", "arithmetic", "gsm8k"])
    parser.add_argument("--model")
    parser.add_argument("--gsm8k")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    runs = [start(job, quantization, arguments) for job in arguments.jobs for quantization in ("nf4", "none")]
    codes = [process.wait() for *_, process in runs]
    import torch

    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in PACKAGES)
    print(f"{torch.cuda.get_device_name()}, {versions}, {datetime.date.today()}\n")
    print("| job | base | score | steps | held-out before | after | reward, first 5 | last 5 | ratio | probe, worst | train s |")
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for (job, quantization, folder, _), code in zip(runs, codes, strict=True):
        print(row(job, quantization, folder) if code == 0 else f"{job} {quantization}: exit code {code}, see {folder}.log")
    sys.exit(max(codes))


if __name__ == "__main__":
    main()
