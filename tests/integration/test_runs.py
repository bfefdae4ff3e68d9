"""Whole runs on a tiny model: what they leave behind, sweeps, Ctrl-C and going on."""

import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from slothrl.train import main
from tests.helpers import models_alive

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
REWARD = "def letters(completions, **_):\n    return [len(set(str(text))) / 10 for text in completions]\n"


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(REWARD, encoding="utf-8")
    return tmp_path


def tiny(folder: str, *more: str) -> list[str]:
    return [
        "gpu=cpu",
        "model=hub",
        f"model.name={folder}",
        "rollout=transformers",
        "data.max_prompt_length=100",
        "data.train_size=40",
        "data.eval_size=4",
        "trainer.max_steps=2",
        "trainer.warmup_steps=0",
        "trainer.per_device_train_batch_size=8",
        "logger.progress=false",
        *more,
    ]


GRPO = ["trainer.num_generations=4", "reward=custom", "reward.functions=[./mine.py:letters]"]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def assert_run(run: Path, metric: str, steps: int, curve: str) -> dict:
    """What every finished run has; its summary."""
    summary = read(run / "summary.json")
    assert (summary["steps"], summary["metric"], summary["resume"]) == (steps, metric, None)
    assert summary["engine"] == "transformers"
    assert summary["output_dir"] == str(run)
    assert 0 < summary["train_seconds"] <= summary["seconds"]
    logged = [line for line in lines(run / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in logged] == list(range(1, steps + 1))
    assert all(math.isfinite(line["loss"]) and line["grad_norm"] > 0 for line in logged)
    assert (run / curve).read_bytes().startswith(b"\x89PNG")
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    assert read(run / "adapter" / "adapter_config.json")["r"] == 16
    trained = [name for name, tensor in weights.items() if "lora_B" in name and tensor.abs().max() > 0]
    assert len(trained) == 2 * 7  # B starts at zero
    return summary


def test_grpo(work, tiny_folders, capsys):
    before = models_alive()
    assert main(tiny(tiny_folders["tiny"], *GRPO, "output_dir=run")) == 0
    assert models_alive() <= before  # a sweep or a notebook goes on with all of the memory
    run = work / "run"
    summary = assert_run(run, "letters", 2, "reward_curve.png")
    scores = lines(run / "held_out.jsonl")
    assert [(line["step"], line["metric"], line["count"]) for line in scores] == [(0, "letters", 4), (2, "letters", 4)]
    assert [line["score"] for line in scores] == [summary["before"], summary["after"]]
    for line in scores:  # the score is the reward of the completions that stand beside it
        chat = [str([{"role": "assistant", "content": text}]) for text in line["completions"]]
        assert line["score"] == pytest.approx(sum(len(set(text)) / 10 for text in chat) / 4)
    for line in lines(run / "metrics.jsonl")[:2]:
        assert line["reward"] == pytest.approx(line["rewards/letters/mean"])
        assert 1 < line["reward"] < 5
        assert line["completions/max_length"] <= 8
    samples = lines(run / "samples.jsonl")
    assert len(samples) == 4
    assert re.fullmatch(r"\d \+ \d", samples[0]["prompt"])
    shown = capsys.readouterr().out
    for piece in ("slothrl: grpo", "2 prompts x 4 completions = 8 a generation", "held-out letters before", "done"):
        assert piece in shown
    assert "update" in shown and "packed, as many tokens as memory holds" in shown
    assert lines(run / "metrics.jsonl")[0]["packing/tokens"] > 0


def test_a_loss_of_ones_own_over_padded_rows(work, tiny_folders, capsys):
    mine = "def reinforce(inputs, config):\n    return -inputs.advantages * inputs.logprobs\n"
    (work / "loss.py").write_text(mine, encoding="utf-8")
    own = ["algo.loss=./loss.py:reinforce", "algo.advantage=rloo", "packing=off", "output_dir=run"]
    assert main([*tiny(tiny_folders["tiny"], *GRPO), *own, "trainer.max_steps=1"]) == 0
    assert "padded rows: packing=off" in capsys.readouterr().out
    (log, *_) = lines(work / "run" / "metrics.jsonl")
    assert log["grad_norm"] > 0 and "clip_ratio/region_mean" not in log and "packing/tokens" not in log


def test_sft(work, tiny_folders, capsys):
    arguments = ["algo=sft", "output_dir=run", "trainer.learning_rate=0.01", "trainer.max_steps=4"]
    arguments += ["model.activations=both", "model.embeddings=host"]  # no checkpointed layers, and no GPU: said
    before = models_alive()
    assert main(tiny(tiny_folders["tiny"], *arguments)) == 0
    assert models_alive() <= before
    assert_run(work / "run", "exact_match", 4, "loss_curve.png")
    losses = [line["eval_loss"] for line in lines(work / "run" / "held_out.jsonl") if "eval_loss" in line]
    assert len(losses) == 2
    assert losses[1] < losses[0] - 0.1  # it learns
    shown = capsys.readouterr().out
    said = " ".join(shown.replace("│", "").split())
    assert "{'eval_loss'" not in shown and "slothrl's: gradient written in the forward" in said
    assert "model.activations=both is for trainer.gradient_checkpointing=true" in said
    assert "embeddings on the device: there is no GPU" in said


def test_sft_without_a_reward_measures_the_loss(work, tiny_folders, capsys):
    arguments = ["algo=sft", "reward=none", "output_dir=run", "trainer.gradient_checkpointing=true"]
    arguments += ["model.fuse=on", "model.activations=layer", "model.activation_gib=0.5"]
    assert main(tiny(tiny_folders["tiny"], *arguments)) == 0
    said = " ".join(capsys.readouterr().out.replace("│", "").split())
    assert "layer inputs; everything of as many of the last layers as fit into 0.5 GiB" in said
    summary = assert_run(work / "run", "eval_loss", 2, "loss_curve.png")
    losses = [line["eval_loss"] for line in lines(work / "run" / "held_out.jsonl")]
    assert losses == [summary["before"], summary["after"]]


def test_a_tokenizer_without_pad_token(work, tiny_folders, capsys):
    """The end token pads instead: padding is masked, so the run is the one with a pad token."""
    for name in ("tiny", "no_pad"):
        assert main(tiny(tiny_folders[name], *GRPO, f"output_dir={name}")) == 0
    with_pad, without = (lines(work / name / "metrics.jsonl") for name in ("tiny", "no_pad"))
    for key in ("loss", "reward", "grad_norm", "completions/mean_length"):
        assert [m[key] for m in without[:2]] == pytest.approx([m[key] for m in with_pad[:2]], abs=1e-5)


def test_plain_text_without_chat_template(work, tiny_folders, capsys):
    assert main(tiny(tiny_folders["no_chat"], *GRPO, "output_dir=run")) == 0
    assert "plain prompts" in capsys.readouterr().out
    assert_run(work / "run", "letters", 2, "reward_curve.png")


def test_the_same_seed_gives_the_same_run(work, tiny_folders):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert main(tiny(tiny_folders["tiny"], *GRPO, f"seed={seed}", f"output_dir={name}")) == 0
    rewards = {name: [line["reward"] for line in lines(work / name / "metrics.jsonl")[:2]] for name in "abc"}
    assert rewards["a"] == rewards["b"] != rewards["c"]


def test_sweep(work, tiny_folders):
    assert main(["--multirun", *tiny(tiny_folders["tiny"], *GRPO, "algo=grpo,dr_grpo")]) == 0
    runs = sorted(path.parent for path in work.glob("multirun/*/*/*/summary.json"))
    assert [run.name for run in runs] == ["0", "1"]
    for run in runs:
        assert_run(run, "letters", 2, "reward_curve.png")
    used = [(run / ".hydra" / "overrides.yaml").read_text(encoding="utf-8") for run in runs]
    assert "algo=grpo" in used[0]
    assert "algo=dr_grpo" in used[1]


# --- Ctrl-C ---------------------------------------------------------------------------------------------------------


def start(arguments: list[str], cwd: Path) -> subprocess.Popen:
    path = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "rewards"))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "2000"}
    with (cwd / "printed.txt").open("w") as file:
        return subprocess.Popen([sys.executable, *arguments], cwd=cwd, env=env, stdout=file, stderr=subprocess.STDOUT)


def wait_for_step(process: subprocess.Popen, metrics: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= step):
        assert process.poll() is None, "it ended by itself"
        assert time.monotonic() < deadline, "no step within two minutes"
        time.sleep(0.1)


@pytest.fixture
def overlay(work) -> Path:
    """The user's own folder of groups, which the command to go on must name again."""
    folder = work / "my conf"
    (folder / "logger").mkdir(parents=True)
    (folder / "logger" / "quiet.yaml").write_text("progress: false\nsamples: 0\n", encoding="utf-8")
    return folder


def test_interrupt_and_go_on(work, overlay, tiny_folders):
    more = ["output_dir=run", "logger=quiet", "trainer.max_steps=2000"]
    arguments = [*tiny(tiny_folders["tiny"], *GRPO, *more), "--config-dir", str(overlay)]
    process = start(["-m", "slothrl", *arguments], work)
    try:
        wait_for_step(process, work / "run" / "metrics.jsonl", 3)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
    printed = (work / "printed.txt").read_text()
    assert "Traceback" not in printed
    assert "stopping after this step" in printed
    summary = read(work / "run" / "summary.json")
    stopped = summary["steps"]
    assert 3 <= stopped < 2000
    assert (work / "run" / f"checkpoint-{stopped}" / "trainer_state.json").exists()
    assert (summary["after"], summary["before"]) == (None, lines(work / "run" / "held_out.jsonl")[0]["score"])
    command = shlex.split(summary["resume"])
    assert command[:3] == ["python", "-m", "slothrl"]
    assert command[-1] == f"resume={work}/run"
    assert summary["resume"] in printed
    assert f"interrupted, {stopped} steps" in (work / "run" / "report.md").read_text(encoding="utf-8")

    # That command, with nothing changed but an earlier end.
    process = start([*command[1:], f"trainer.max_steps={stopped + 3}"], work)
    assert process.wait(120) == 0, (work / "printed.txt").read_text()
    steps = [line["step"] for line in lines(work / "run" / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(1, stopped + 4))  # each once
    final = read(work / "run" / "summary.json")
    assert (final["steps"], final["before"], final["resume"]) == (stopped + 3, summary["before"], None)
    assert final["after"] is not None


def test_trackers_get_the_metrics(work, tiny_folders):
    """TRL's report_to, with the one tracker that needs no server."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert main(tiny(tiny_folders["tiny"], *GRPO, "output_dir=run", "logger=tensorboard")) == 0
    (events,) = (work / "run").rglob("events.out.tfevents*")
    found = EventAccumulator(str(events))
    found.Reload()
    logged = [line["reward"] for line in lines(work / "run" / "metrics.jsonl") if "reward" in line]
    assert [scalar.value for scalar in found.Scalars("train/reward")] == pytest.approx(logged)
