"""Runs one after the other in one process, as a sweep and a notebook have them: each gives its memory back.

About 2 minutes: vLLM starts twice.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.families import make_checkpoint

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ROOT = Path(__file__).resolve().parents[2]
REWARD = "def letters(completions, **_):\n    return [len(set(str(text))) / 10 for text in completions]\n"
RUNS = """
import json, sys
import torch
from slothrl.train import main
from tests.helpers import models_alive

found = []
for seed in (0, 1):
    code = main([*sys.argv[1:], f"seed={seed}", f"output_dir=run-{seed}"])
    free, total = torch.cuda.mem_get_info()
    found.append({"code": code, "torch": torch.cuda.memory_allocated(), "device": total - free,
                  "alive": len(models_alive())})
print(json.dumps(found))
"""
ARGUMENTS = [
    "model=hub",
    "model.quantization=nf4",
    "model.dtype=bfloat16",
    "rollout=vllm",
    "rollout.share_base=always",
    "rollout.enforce_eager=true",
    "rollout.kv_cache_gb=1",
    "rollout.gpu_memory_utilization=0.1",
    "data.max_prompt_length=128",
    "data.train_size=8",
    "data.eval_size=4",
    "trainer.max_steps=2",
    "trainer.per_device_train_batch_size=8",
    "trainer.gradient_accumulation_steps=1",
    "trainer.num_generations=4",
    "trainer.max_completion_length=16",
    "reward=custom",
    "logger.progress=false",
    "logger.samples=0",
]


def test_each_run_gives_its_memory_back(tmp_path):
    pytest.importorskip("vllm")
    (tmp_path / "mine.py").write_text(REWARD, encoding="utf-8")
    own = [f"model.name={make_checkpoint('llama', tmp_path)}", f"reward.functions=[{tmp_path}/mine.py:letters]"]
    known = os.environ.get("PYTHONPATH")
    path = os.pathsep.join([*(str(ROOT / part) for part in ("", "kernels", "rewards")), *([known] if known else [])])
    command = [sys.executable, "-c", RUNS, *ARGUMENTS, *own]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = json.loads(done.stdout.splitlines()[-1])
    for run in (first, second):
        assert run["code"] == 0, done.stderr[-3000:]
        assert run["alive"] == 0
        assert run["torch"] < 100e6, run  # the KV cache alone is 1 GiB; cuBLAS keeps its workspace
    assert second["device"] - first["device"] < 200e6, (first, second)
