"""The main job itself: a real pretrained model gets better at sums that it was never trained on."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/bench_main_job.py is the GPU's part"),
]
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")


def train(folder: Path, *overrides: str) -> dict:
    """Run the command line from another folder than the checkout; its summary."""
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "rewards")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "slothrl", f"output_dir={folder / 'run'}", "logger.progress=false", *overrides]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads((folder / "run" / "summary.json").read_text())


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]


def test_it_learns(tmp_path):
    """The README's command with 20 of its 32 steps."""
    summary = train(tmp_path, "rollout=transformers", "trainer.max_steps=20")
    assert summary["metric"] == "exact_match"
    assert summary["steps"] == 20
    assert summary["after"] - summary["before"] >= 0.3
    rewards = [m["reward"] for m in metrics(tmp_path) if "reward" in m]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.3
    assert (tmp_path / "run" / "reward_curve.png").stat().st_size > 5000
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.vllm
@needs_vllm
def test_it_learns_through_vllm(tmp_path):
    """Fewer steps than the README's run: the seconds go into vLLM's CPU path, not into learning."""
    summary = train(tmp_path, "rollout=vllm", "trainer.max_steps=16")
    assert summary["engine"] == "vllm"
    assert summary["after"] - summary["before"] >= 0.3
    logged = [m for m in metrics(tmp_path) if "reward" in m]
    assert len(logged) == 16
    assert sum(m["reward"] for m in logged[-4:]) / 4 > sum(m["reward"] for m in logged[:4]) / 4 + 0.15
    # Both sides compute in float32, so the policies agree at every step, not just at the start.
    assert all(m["sampling/sampling_logp_difference/mean"] < 1e-3 for m in logged)
    probed = [m["sampling/probe_difference"] for m in logged if "sampling/probe_difference" in m]
    assert probed and max(probed) < 1e-3
    assert all(abs(m["sampling/importance_sampling_ratio/mean"] - 1) < 1e-3 for m in logged)
