"""GRPO of two kinds, three seeds each, side by side on one GPU: reward curves and memory.

python tests/gpu/bench_shared_grpo.py --model DIR --out DIR     # one shared base against two copies; DIR: a checkpoint
                                                                # of about half a billion parameters
python tests/gpu/bench_shared_grpo.py --model DIR --out DIR --compare linear    # our linear layers against vLLM's
python tests/gpu/bench_shared_grpo.py --out DIR --long          # instead: one run of 500 steps, for its memory
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

SEEDS = (0, 1, 2)
COLUMNS = "seed | before | after | reward, first 5 | last 5 | mean | log-prob gap | torch reserved, MB | s"
KINDS = {
    "base": {"one base": "rollout.share_base=always", "two copies": "rollout.share_base=never"},
    "linear": {"our layers": "rollout.linear=slothrl", "vLLM's layers": "rollout.linear=vllm"},
}
COMMON = "rollout=vllm rollout.enforce_eager=true logger.samples=0 logger.progress=false"
NF4 = "model.quantization=nf4 model.dtype=bfloat16"
CURVES = """model=hub trainer.learning_rate=1e-4 trainer.lr_scheduler_type=linear trainer.warmup_steps=2
    data=arithmetic data.task.digits=3 data.task.min_digits=2 data.task.operations=['+','*'] data.train_size=2000
    data.eval_size=100 trainer.max_completion_length=16 rollout.gpu_memory_utilization=0.1 rollout.kv_cache_gb=2"""
REWARD = """
def even(completions, completion_ids, **columns):
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]
"""
LONG = """data.task.digits=2 data.max_prompt_length=128 data.eval_size=4 trainer.per_device_train_batch_size=16
    trainer.num_generations=4 trainer.max_completion_length=6 rollout.kv_cache_gb=4
    rollout.gpu_memory_utilization=0.1"""


def start(folder: Path, line: str) -> subprocess.Popen:
    with folder.with_suffix(".log").open("w") as log:
        command = [sys.executable, "-m", "slothrl", *line.split(), f"output_dir={folder}"]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def metrics(folder: Path) -> list[dict]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "reward" in line]


def curves(arguments: argparse.Namespace) -> None:
    runs = []
    for kind, override in KINDS[arguments.compare].items():
        for seed in SEEDS:
            line = f"{COMMON} {NF4} {CURVES} model.name={arguments.model} trainer.max_steps={arguments.steps or 40}"
            folder = arguments.out / f"{override.rpartition('=')[2]}-{seed}"
            runs.append((kind, seed, folder, start(folder, f"{line} {override} seed={seed}")))
    for _, _, folder, process in runs:
        print(folder.name, "ended with", process.wait(), flush=True)
    print(f"| {arguments.compare} | {COLUMNS} |\n{'|---' * 10}|")
    means: dict[str, list[float]] = {}
    for kind, seed, folder, _ in runs:
        summary = json.loads((folder / "summary.json").read_text())
        logged = metrics(folder)
        rewards = [m["reward"] for m in logged]
        gap = statistics.mean(m["sampling/sampling_logp_difference/mean"] for m in logged)
        reserved = max(m["memory/torch_reserved"] for m in logged) / 1e6
        means.setdefault(kind, []).append(statistics.mean(rewards))
        cells = [kind, str(seed), f"{summary['before']:.3f}", f"{summary['after']:.3f}"]
        cells += [f"{statistics.mean(part):.3f}" for part in (rewards[:5], rewards[-5:], rewards)]
        cells += [f"{gap:.4f}", f"{reserved:,.0f}", f"{summary['train_seconds']:.0f}"]
        print(f"| {' | '.join(cells)} |")
    for kind, values in means.items():
        print(
            f"{kind}: mean reward of a run {statistics.mean(values):.4f}, sd over seeds {statistics.stdev(values):.4f}"
        )
    draw(arguments.out / f"shared_{arguments.compare}_curves.png", [(kind, folder) for kind, _, folder, _ in runs])


def draw(picture: Path, runs: list[tuple[str, Path]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 3.5), layout="constrained")
    kinds = list(dict.fromkeys(kind for kind, _ in runs))
    for kind, folder in runs:
        rewards = [m["reward"] for m in metrics(folder)]
        smooth = [statistics.mean(rewards[max(0, i - 4) : i + 1]) for i in range(len(rewards))]
        axes.plot(smooth, color=f"C{kinds.index(kind)}", label=kind if folder.name.endswith("-0") else None)
    axes.set_xlabel("step")
    axes.set_ylabel("reward, mean of 5 steps")
    axes.legend()
    figure.savefig(picture, dpi=110)


def long(arguments: argparse.Namespace) -> None:
    folder = arguments.out / "long"
    model = f"model=hub model.name={arguments.model}" if arguments.model else ""
    model += f" reward=custom reward.functions=[{arguments.out / 'even.py'}:even]"
    code = start(folder, f"{COMMON} {NF4} {LONG} {model} trainer.max_steps={arguments.steps or 500}").wait()
    print("ended with", code, flush=True)
    print("\n".join(folder.with_suffix(".log").read_text().splitlines()[-40:]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="default 40, and 500 for --long")
    parser.add_argument("--compare", choices=list(KINDS), default="base")
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    reward = arguments.out / "even.py"  # that a random model earns too, so that there is a gradient
    reward.write_text(REWARD)
    if arguments.tiny:
        from tests.families import make_checkpoint

        arguments.model = make_checkpoint("llama", arguments.out / "tiny")
    long(arguments) if arguments.long else curves(arguments)


if __name__ == "__main__":
    main()
