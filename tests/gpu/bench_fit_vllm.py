"""The prediction of whole runs with vLLM over one base: `python tests/gpu/bench_fit_vllm.py`, 2 minutes on an H100.

Two GRPO steps of slothrl's command line on random checkpoints of real shapes, nf4, without CUDA graphs, 2 GiB of KV
cache; what its memory.json says the driver had in use, by phase, beside `fit`'s prediction of the same overrides. Needs
the device for itself. `--cpu` tries the code on a tiny model with transformers' generate, without figures to compare.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from slothrl.compose import compose_config
from slothrl.fit_config import question
from slothrl.fit_memory import predict
from tests.gpu.bench_tools import case as guarded
from tests.gpu.bench_tools import failures
from tests.gpu.device_use import why_not_alone
from tests.gpu.fit_models import TINY, config_of
from tests.helpers import tiny_tokenizer

MODELS = ("Qwen2.5-0.5B", "Qwen2.5-1.5B")
REWARD = (
    "def even(completion_ids, **_):\n    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]\n"
)
# Prompts of tens of tokens, completions of random models that run to their end: 32,768 tokens, in packs of 24,576.
RUN = """model=hub reward=custom data.train_size=64 data.eval_size=4 data.max_prompt_length=64 logger.samples=0
    logger.progress=false trainer.max_steps=2 trainer.save_strategy=no trainer.per_device_train_batch_size=16
    trainer.gradient_accumulation_steps=4 trainer.num_generations=8 trainer.max_completion_length=512"""
VLLM = """rollout=vllm rollout.enforce_eager=true rollout.kv_cache_gb=2 rollout.gpu_memory_utilization=0.2
    rollout.share_base=always model.quantization=nf4 model.dtype=bfloat16"""
CPU = "gpu=cpu rollout=transformers trainer.max_completion_length=8 trainer.per_device_train_batch_size=2"


def checkpoint(name: str, folder: Path, cpu: bool) -> Path:
    """A random checkpoint in bf16, made on the device."""
    tokenizer = tiny_tokenizer()
    config = config_of(name, **(TINY if cpu else {}))
    with torch.device("cpu" if cpu else "cuda"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measure(name: str, folder: Path, cpu: bool) -> list[str]:
    """Rows of the table, one a phase."""
    (folder / "even.py").write_text(REWARD, encoding="utf-8")
    made = subprocess.run([sys.executable, __file__, "--make", name, str(folder), *(["--cpu"] if cpu else [])])
    assert made.returncode == 0, "no checkpoint"
    overrides = [*RUN.split(), *(CPU if cpu else VLLM).split(), f"model.name={folder}"]
    overrides += [f"reward.functions=[{folder / 'even.py'}:even]"]
    command = [sys.executable, "-m", "slothrl", *overrides, f"output_dir={folder / 'run'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-1000:]}\n{done.stderr[-2000:]}"
    asked = question(compose_config(overrides, anywhere=True), "transformers" if cpu else "vllm")
    predicted = {phase.name: phase for phase in predict(asked.shape, asked.settings, asked.total)}
    rows = []
    for phase in json.loads((folder / "run" / "memory.json").read_text()):
        if (expected := predicted.get(phase["name"])) is None:
            continue
        found, cells = (
            phase["total"],
            [name, phase["name"], f"{expected.total / 1e6:,.0f}", f"{phase['total'] / 1e6:,.0f}"],
        )
        cells += ["" if cpu else f"{100 * (expected.total / found - 1):+.1f} %"]
        cells += [parts(expected.parts), parts(phase["parts"])]
        rows.append(f"| {' | '.join(cells)} |")
    return rows


def parts(held: dict[str, int]) -> str:
    return ", ".join(f"{name} {count / 1e6:,.0f}" for name, count in held.items() if count > 5e6)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--make", nargs=2, metavar=("MODEL", "FOLDER"), help=argparse.SUPPRESS)  # in its own process
    arguments = parser.parse_args()
    if arguments.make:
        checkpoint(arguments.make[0], Path(arguments.make[1]), arguments.cpu)
        return
    if not arguments.cpu and (why := why_not_alone()):
        parser.error(f"{why}: the driver's figures would be wrong")
    start = time.time()
    print("| model | phase | predicted, MB | in use, says the driver | off | predicted parts | measured parts |")
    print("|---" * 7 + "|", flush=True)
    for name in arguments.models.split(","):
        with guarded(name), tempfile.TemporaryDirectory() as folder:
            print("\n".join(measure(name, Path(folder), arguments.cpu)), flush=True)
    print(f"{time.time() - start:.0f} s; failed: {failures or 'none'}")


if __name__ == "__main__":
    main()
