"""Going on with a run: bit for bit after kills, past damaged checkpoints, at an epoch's end, not with another run."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from slothrl import checkpoint
from slothrl.run_lock import only_writer
from slothrl.train import main
from tests.integration.killed_runs import differing, last_checkpoint, lines, outcome

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
REWARD = "def letters(completions, **_):\n    return [len(set(str(text))) / 10 for text in completions]\n"

COMMON = [
    "gpu=cpu",
    "model=hub",
    "data.max_prompt_length=100",
    "data.eval_size=4",
    "trainer.warmup_steps=0",
    "trainer.lr_scheduler_type=cosine",
    "trainer.learning_rate=0.003",
    "model.lora.lora_dropout=0.1",  # random numbers in the training forward
    "logger.progress=false",
]
# Everything that outlives a step: generations of 4 micro-batches, each trained on twice, in 4 optimizer steps; three
# generations an epoch; metrics of two steps a line.
GRPO = [
    *COMMON,
    "rollout=transformers",
    "data.train_size=12",
    "trainer.max_steps=26",
    "trainer.per_device_train_batch_size=4",
    "trainer.gradient_accumulation_steps=2",
    "trainer.num_generations=4",
    "trainer.steps_per_generation=4",
    "trainer.num_iterations=2",
    "trainer.logging_steps=2",
    "trainer.save_steps=3",
    "logger.samples_every=5",
    "reward=custom",
]
SFT = [
    *COMMON,
    "algo=sft",
    "data.train_size=20",
    "trainer.max_steps=14",
    "trainer.per_device_train_batch_size=2",
    "trainer.gradient_accumulation_steps=3",  # 10 micro-batches: the last step of an epoch is a short one
    "trainer.logging_steps=2",
    "trainer.save_steps=3",
]


@pytest.fixture(scope="module")
def reward(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("reward") / "mine.py"
    path.write_text(REWARD, encoding="utf-8")
    return f"reward.functions=[{path}:letters]"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_folders, reward) -> Path:
    """A GRPO run that nothing disturbed, with all its checkpoints."""
    run = tmp_path_factory.mktemp("whole") / "run"
    arguments = [*GRPO, reward, f"model.name={tiny_folders['tiny']}", "trainer.save_total_limit=20"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the runs that go on: products over a pack are summed by as many parts
    assert main([*arguments, f"output_dir={run}"]) == 0
    torch.set_num_threads(threads)
    return run


@pytest.fixture
def copy(whole, tmp_path) -> Path:
    """The same run before its last steps: the next thing to happen is a resume."""
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    for name in ("checkpoint-26", "checkpoint-24", "checkpoint-21", "adapter"):
        shutil.rmtree(run / name)
    (run / "summary.json").unlink()
    return run


# --- exactness --------------------------------------------------------------------------------------------------------


def test_sigkill_at_random_moments(tmp_path, tiny_folders, reward):
    """Adapter, optimizer, random states, waiting rollouts, metrics, samples and scores of the uninterrupted run."""
    model = f"model.name={tiny_folders['tiny']}"
    jobs = [*GRPO, reward, model, "--", *SFT, model]
    command = [sys.executable, "-m", "tests.integration.killed_runs", str(tmp_path), "3", "1", *jobs]
    path = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "rewards"))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for report in map(json.loads, done.stdout.splitlines()[-2:]):
        assert report["kills"] == 3
        assert report["differing"] == [], report
        assert set(report["codes"]) == {0}


def test_sft_from_the_end_of_an_epoch(tmp_path, tiny_folders):
    """Its sampler is another one: made anew, it has drawn nothing yet, and the next order is the same."""
    arguments = [*SFT, f"model.name={tiny_folders['tiny']}", "trainer.save_total_limit=20"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert main([*arguments, f"output_dir={tmp_path / 'whole'}"]) == 0
    shutil.copytree(tmp_path / "whole", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoint-14")
    shutil.rmtree(tmp_path / "run" / "adapter")
    (tmp_path / "run" / "summary.json").unlink()
    assert last_checkpoint(tmp_path / "run").name == "checkpoint-12"  # 4 steps an epoch
    assert main([*arguments, f"output_dir={tmp_path / 'run'}", "resume=auto"]) == 0
    torch.set_num_threads(threads)
    assert differing(outcome(tmp_path / "run"), outcome(tmp_path / "whole")) == []


@pytest.mark.parametrize("step", [3, 12, 15])  # amid a generation; at an epoch's end; amid the second epoch
def test_from_each_kind_of_place(step, whole, copy, capsys):
    assert main([f"resume={copy / f'checkpoint-{step}'}"]) == 0  # nothing but the checkpoint: the run knows the rest
    assert differing(outcome(copy), outcome(whole)) == []
    printed = capsys.readouterr().out
    assert f"going on from checkpoint-{step}: every file verified" in printed
    assert "renamed to abandoned-checkpoint-18" in printed
    steps = [line["step"] for line in lines(copy / "metrics.jsonl") if "loss" in line]
    assert steps == list(range(2, 27, 2))


def test_an_epoch_boundary_trains_the_rest(tmp_path, tiny_folders):
    """Epochs instead of steps, stopped exactly at the end of the first one, and gone on with."""
    arguments = [*SFT, f"model.name={tiny_folders['tiny']}", "trainer.max_steps=-1", "trainer.num_train_epochs=2"]
    arguments += ["trainer.save_strategy=epoch"]
    assert main([*arguments, f"output_dir={tmp_path / 'whole'}", "trainer.save_total_limit=5"]) == 0
    run = tmp_path / "run"
    shutil.copytree(tmp_path / "whole", run)
    shutil.rmtree(run / "checkpoint-8")
    assert main([f"resume={run}"]) == 0
    assert json.loads((run / "summary.json").read_text())["steps"] == 8
    assert differing(outcome(run), outcome(tmp_path / "whole")) == []


def test_what_a_checkpoint_holds(whole):
    """Adapter and state, no base, no pickle; rollouts only where some are still to be trained on."""
    mid, end = whole / "checkpoint-3", whole / "checkpoint-24"
    assert {path.suffix for path in checkpoint.files_of(whole / "checkpoint-3")} == {".safetensors", ".json"}
    assert (mid / "rollouts.safetensors").exists()
    assert not (end / "rollouts.safetensors").exists()
    adapter = (mid / "adapter_model.safetensors").stat().st_size
    total = sum(path.stat().st_size for path in checkpoint.files_of(mid))
    assert total < 3 * adapter + 120_000  # two moments, and some JSON
    everything = [path.name for path in whole.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert everything == []


# --- damage -----------------------------------------------------------------------------------------------------------


def test_one_flipped_byte(whole, copy, capsys):
    path = copy / "checkpoint-18" / "optimizer.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert main([f"resume={copy}"]) == 0
    printed = capsys.readouterr().out
    assert "skipped checkpoint-18: optimizer.safetensors is not what was saved" in printed
    assert "going on from checkpoint-15" in printed
    assert differing(outcome(copy), outcome(whole)) == []


def test_a_planted_pickle(copy, capsys):
    (copy / "checkpoint-18" / "optimizer.pt").write_bytes(b"\x80\x04cos\nsystem\n")
    assert main([f"resume={copy / 'checkpoint-18'}"]) == 2
    assert "holds optimizer.pt, and only safetensors and JSON are trusted" in capsys.readouterr().err


def test_none_that_can_be_used(copy, capsys):
    for path in copy.glob("checkpoint-*"):
        (path / "manifest.json").unlink()
    assert main([f"resume={copy}"]) == 2
    assert "no checkpoint there can be used" in capsys.readouterr().err


def test_no_room_for_a_checkpoint(tmp_path, tiny_folders, reward, capfd):
    """The process may write files of 60 KB: metrics fit, an adapter does not."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, limits[1]))
    try:
        code = main([*GRPO, reward, f"model.name={tiny_folders['tiny']}", f"output_dir={tmp_path / 'run'}"])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert code == 1
    said = capfd.readouterr().err
    assert "error: disk full: checkpoint-3 needs" in said
    assert "Traceback" not in said
    assert not [path.name for path in (tmp_path / "run").iterdir() if "checkpoint" in path.name]


# --- another run ------------------------------------------------------------------------------------------------------


def test_changed_runs_are_refused(copy, tmp_path, tiny_folders, reward, capsys):
    other = tmp_path / "other.py"
    other.write_text(REWARD.replace("/ 10", "/ 11"), encoding="utf-8")
    cases = {
        "data.train_size=10": "dataset.rows: 12 -> 10",
        "model.lora.r=8": "lora.r: 16 -> 8",
        f"model.name={tiny_folders['no_chat']}": "model.tokenizer: ",
        f"reward.functions=[{other}:letters]": "rewards.letters: x 1, {}, file ",
        "seed=1": "batches.seed: 0 -> 1",
    }
    for change, said in cases.items():
        assert main([f"resume={copy}", change]) == 2
        error = capsys.readouterr().err
        assert "made of something else (then -> now)" in error
        assert said in error, error
        assert "resume_changed=true" in error
    assert (copy / "checkpoint-18").exists()


def test_unless_told_to(copy, capsys):
    assert main([f"resume={copy}", "data.train_size=16", "resume_changed=true", "trainer.learning_rate=0.001"]) == 0
    printed = capsys.readouterr().out
    assert "resume_changed: dataset.rows: 12 -> 16" in printed
    assert "changed since checkpoint-18: trainer.learning_rate: 0.003 -> 0.001" in printed
    assert json.loads((copy / "summary.json").read_text())["steps"] == 26


def test_a_lora_of_another_shape_cannot_go_on(copy, capsys):
    assert main([f"resume={copy}", "model.lora.r=8", "resume_changed=true"]) == 2
    assert "does not fit the model's LoRA" in capsys.readouterr().err


# --- the command line -------------------------------------------------------------------------------------------------


def test_auto(tmp_path, tiny_folders, reward, monkeypatch, capsys):
    """The same command again and again, as a scheduler gives it: it starts, and when all is done it trains nothing."""
    monkeypatch.chdir(tmp_path)
    arguments = [*SFT, f"model.name={tiny_folders['tiny']}", "trainer.max_steps=3", "resume=auto"]
    assert main([*arguments, "output_dir=run"]) == 0
    assert "no checkpoint in run; starting afresh" in capsys.readouterr().out
    before = outcome(tmp_path / "run")
    assert main([*arguments, "output_dir=run"]) == 0
    assert "all 3 steps are done" in " ".join(capsys.readouterr().out.split())
    assert differing(outcome(tmp_path / "run"), before) == []
    # Without a folder it is the newest run in outputs/ that is not finished.
    latest = tmp_path / "outputs" / "2026-01-01" / "00-00-00-slothrl"
    shutil.copytree(tmp_path / "run", latest)
    (latest / "summary.json").unlink()
    assert main(["resume=auto"]) == 0
    assert (latest / "summary.json").exists()
    assert main([*arguments, "--multirun"]) == 2
    assert "resume=auto goes on with one run" in capsys.readouterr().err


def test_one_writer(copy, capsys):
    with only_writer(copy):
        assert main([f"resume={copy}"]) == 2
    assert f"another run writes here (process {os.getpid()} on " in capsys.readouterr().err
