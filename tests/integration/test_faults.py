"""What ends a run and what it leaves behind: signals, a hung engine, memory, NaN; each fault injected for real."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from slothrl.checkpoint import DiskFullError, newest, step_of
from slothrl.compose import compose_config
from slothrl.engine import TransformersEngine
from slothrl.faults import EngineFault, OutOfMemoryFault, explained, out_of_memory, remedies
from slothrl.interrupts import Interrupts
from slothrl.prepare import prepare
from slothrl.rollout import open_base
from slothrl.trainers.build import build_trainer, trainer_config
from slothrl.training import train

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
REWARD = "def letters(completions, **_):\n    return [len(set(str(text))) / 10 for text in completions]\n"
SMALL = [
    "gpu=cpu",
    "model=hub",
    "rollout=transformers",
    "data.max_prompt_length=100",
    "data.train_size=40",
    "data.eval_size=4",
    "trainer.warmup_steps=0",
    "trainer.per_device_train_batch_size=8",
    "trainer.num_generations=4",
    "trainer.learning_rate=0.01",
    "logger.progress=false",
    "logger.samples=0",
    "reward=custom",
]


@pytest.fixture
def overrides(tmp_path, tiny_folders) -> list[str]:
    (tmp_path / "mine.py").write_text(REWARD, encoding="utf-8")
    return [*SMALL, f"model.name={tiny_folders['tiny']}", f"reward.functions=[{tmp_path}/mine.py:letters]"]


class Run:
    """A run in parts, so that a fault can be put into its trainer."""

    def __init__(self, folder: Path, overrides: list[str]):
        self.folder = folder
        self.prepared = prepare(compose_config([*overrides, "reward.isolate=false"]), folder)
        arguments = trainer_config(self.prepared, folder)
        self.trainer = build_trainer(self.prepared, arguments, open_base(self.prepared, arguments).model)
        self.trainer.attach(TransformersEngine(self.trainer.model, self.prepared.tokenizer))

    def train(self) -> None:
        with Interrupts() as interrupts:
            train(self.trainer, self.prepared, self.folder, None, Console(), interrupts, "THE COMMAND")

    def on_gradient(self, hook) -> None:
        """Call `hook(step, gradient)` in the backward of one LoRA matrix, step from 1."""
        parameter = next(p for name, p in self.trainer.model.named_parameters() if "lora_B" in name)
        parameter.register_hook(lambda gradient: hook(self.trainer.state.global_step + 1, gradient))


@pytest.fixture
def started(tmp_path, overrides):
    return lambda *more: Run(tmp_path / "run", [*overrides, "trainer.max_steps=4", "trainer.save_steps=1", *more])


# --- signals and hangs ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ended(tmp_path_factory, tiny_folders) -> dict:
    folder = tmp_path_factory.mktemp("ended")
    (folder / "mine.py").write_text(REWARD, encoding="utf-8")
    model, reward = f"model.name={tiny_folders['tiny']}", f"reward.functions=[{folder}/mine.py:letters]"
    command = [sys.executable, "-m", "tests.integration.fault_runs", str(folder), *SMALL, model, reward]
    path = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "rewards"))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "2000"}
    done = subprocess.run([*command, "trainer.max_steps=400"], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_sigterm_saves_and_says_how_to_go_on(ended):
    """SIGINT, and going on with the command: test_runs.py."""
    found = ended["term"]
    assert found["code"] == 143
    assert "Traceback" not in found["printed"]
    run = Path(found["run"])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["signal"] == "SIGTERM"
    assert shlex.split(summary["resume"]) == ["python", "-m", "slothrl", f"resume={run}"]
    assert summary["resume"] in found["printed"]
    search = newest(run)
    assert search.found is not None
    assert step_of(search.found) == summary["steps"] < 400


def test_a_second_signal_stops_at_once(ended):
    found = ended["twice"]
    assert found["code"] == 143
    assert "stopped" in found["printed"]
    assert f"go on with: python -m slothrl resume={found['run']}" in found["printed"]
    assert newest(Path(found["run"])).found is not None  # the last one of the run's own


@pytest.mark.parametrize("name", ["hung", "stuck"])
def test_a_hung_engine(ended, name):
    found = ended[name]
    assert found["code"] == 1
    assert found["seconds"] < 60
    assert "in hanging" in found["stacks"]  # where it hung, by name
    if name == "hung":  # a stuck interpreter can print nothing but the stacks
        assert "error: a rollout took more than 2 s and is given up" in found["printed"]
        assert f"error: go on with: python -m slothrl resume={found['run']}" in found["printed"]
        assert found["again"] == 0
        assert json.loads((Path(found["run"]) / "summary.json").read_text())["steps"] == 4


def test_an_engine_that_hangs_on_the_held_out_prompts(ended):
    found = ended["hung score"]
    assert found["code"] == 1
    assert "hung_score" in found["stacks"]
    assert "error: a rollout for the held-out score took more than 1 s and is given up" in found["printed"]
    assert "error: nothing is trained yet: start it again" in found["printed"]


def test_an_engine_that_dies(started):
    run = started()
    run.trainer.phases.current = "rollout"
    fault = explained(RuntimeError("EngineCore died\nmore"), run.trainer, "vllm", "go on with: X")
    assert isinstance(fault, EngineFault)
    assert str(fault) == "the engine (vllm) failed: RuntimeError: EngineCore died\ngo on with: X"
    run.trainer.phases.current = "rewards"
    assert explained(RuntimeError("a bug"), run.trainer, "vllm", "") is None  # a traceback says more


# --- memory -----------------------------------------------------------------------------------------------------------

HUGE = 1 << 44  # 64 TiB of float32, which no allocator gives


@pytest.mark.parametrize("phase", ["rollout", "backward", "optimizer"])
def test_out_of_memory_names_the_phase(started, phase):
    run = started()
    if phase == "backward":
        run.on_gradient(lambda step, gradient: torch.empty(HUGE) if step == 3 else None)
    elif phase == "rollout":
        generate = run.trainer.engine.generate

        def hungry(*arguments):
            if run.trainer.state.global_step == 2:
                torch.empty(HUGE)
            return generate(*arguments)

        run.trainer.engine.generate = hungry
    else:
        run.trainer.create_optimizer()
        run.trainer.optimizer.register_step_pre_hook(
            lambda *_: torch.empty(HUGE) if run.trainer.state.global_step == 2 else None
        )
    with pytest.raises(OutOfMemoryFault) as caught:
        run.train()
    lines = str(caught.value).splitlines()
    assert lines[0].startswith(f"out of memory in the {phase} phase of step 3: ")
    assert "held at that moment:" in lines
    held = "\n".join(lines)
    for kind in ("LoRA", "optimizer state"):
        assert f"  {kind}: " in held
    index = lines.index("either would help:")
    first, second, predicted = lines[index + 1 : -1]
    assert "=" in first and "=" in second
    assert re.match(
        r"predicted to fit: trainer\.gradient_checkpointing=true .*\(\d+ MB instead of \d+ MB\)$", predicted
    )
    assert lines[-1] == "go on with: THE COMMAND"
    search = newest(run.folder)
    assert search.found is not None
    assert step_of(search.found) == 2


def test_remedies_follow_from_the_settings(started):
    run = started("trainer.per_device_train_batch_size=8", "trainer.gradient_accumulation_steps=2")
    args = run.trainer.args
    first, second = remedies("backward", args, "transformers")[:2]
    assert first.startswith("trainer.gradient_checkpointing=true (now False)")
    assert second.startswith("trainer.per_device_train_batch_size=4 trainer.gradient_accumulation_steps=4 resume_chan")
    args.gradient_checkpointing = True
    assert remedies("backward", args, "vllm")[0] == second
    assert "gpu_memory_utilization" in remedies("rollout", args, "vllm")[0]
    assert "adamw_8bit" in remedies("optimizer", args, "vllm")[0]


def test_a_full_disk_under_the_logs(started):
    """Linux's own: a device that is always full."""
    run = started()
    with pytest.raises(OSError) as caught, open("/dev/full", "w", buffering=1) as file:
        file.write("a line\n")
    fault = explained(caught.value, run.trainer, "transformers", "go on with: X")
    assert isinstance(fault, DiskFullError)
    assert str(fault).startswith("disk full while writing ")


def test_once_more_in_smaller_micro_batches(ended):
    """The program that takes over goes on from the last checkpoint, and every step is there once."""
    found, run = ended["hungry"], Path(ended["hungry"]["run"])
    assert found["code"] == 0, found["printed"]
    assert "error: out of memory in the forward phase of step 3: " in found["printed"]
    (smaller,) = re.findall(r"retry_smaller: once more with packing.tokens_per_micro_batch=(\d+)\n", found["printed"])
    assert "going on from checkpoint-2" in found["printed"]
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["steps"], summary["resume"]) == (4, None)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in logged if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4]
    packs = [line["packing/micro_batches"] for line in steps]
    assert packs[:2] == [1, 1] and min(packs[2:]) > 1
    assert max(line["packing/tokens"] / line["packing/micro_batches"] for line in steps[2:]) <= int(smaller)


def test_what_counts_as_out_of_memory():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(HUGE)
    assert out_of_memory(caught.value)
    assert out_of_memory(MemoryError())
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."))
    assert not out_of_memory(RuntimeError("shapes differ"))
    assert not out_of_memory(ValueError("out of memory"))
