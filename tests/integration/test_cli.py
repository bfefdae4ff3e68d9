"""`python -m slothrl` told something wrong: exit code 2, a line that says what, no traceback, and soon."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from slothrl.checks import gpu_memory_gb
from slothrl.train import main

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]
REWARDS = """\
def short(completions, **_): return [1.0]
def text(completions, **_): return "good"
def texts(completions, **_): return ["good"] * len(completions)
"""
LATE = """\
calls = 0
def late(completions, **_):
    global calls
    calls += 1
    if calls > 4:  # the self-test, the score before, two steps
        raise RuntimeError("out of ideas")
    return [float(len(str(text))) for text in completions]
"""


def slothrl(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, away from the repository."""
    path = os.pathsep.join(str(ROOT / part) for part in ("", "kernels", "rewards"))
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", "slothrl", *arguments]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


@pytest.fixture
def work(tmp_path, monkeypatch) -> Path:
    """An empty working directory with a few wrong files in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rewards.py").write_text(REWARDS, encoding="utf-8")
    (tmp_path / "late.py").write_text(LATE, encoding="utf-8")
    (tmp_path / "broken.py").write_text("raise RuntimeError('boom')\ndef f(completions): ...\n", encoding="utf-8")
    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1", "answer": "2"}\n', encoding="utf-8")
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    return tmp_path


def tiny(folder: str, *more: str) -> list[str]:
    """A run of two steps on a tiny model."""
    return [
        "gpu=cpu",
        "model=hub",
        f"model.name={folder}",
        "rollout=transformers",
        "data.max_prompt_length=100",
        "data.train_size=40",
        "data.eval_size=4",
        "trainer.per_device_train_batch_size=8",
        "trainer.num_generations=4",
        "trainer.max_steps=2",
        "logger.progress=false",
        *more,
    ]


def refused(capsys, arguments: list[str]) -> list[str]:
    """The error lines of a run that must end with code 2."""
    capsys.readouterr()
    assert main(arguments) == 2
    printed = capsys.readouterr()
    assert "Traceback" not in printed.out + printed.err
    return [line for line in printed.err.splitlines() if line.startswith("error: ")]


# --- mistakes that show without loading anything --------------------------------------------------------------------

STATIC = {
    "model path": (["model.name=./nope"], "error: model.name=./nope: no such folder"),
    "column": (
        ["data=file", "data.path=rows.jsonl"],
        "error: data.source=file has no prompt column 'prompt'; set data.prompt_column; its columns: question, answer",
    ),
    "empty file": (
        ["data=file", "data.path=empty.jsonl"],
        "error: empty.jsonl is empty: set data.path to a file with rows",
    ),
    "no file": (["data=file", "data.path=gone.jsonl"], "error: there is no gone.jsonl: set data.path to what exists"),
    "reward file": (["reward.functions=[./gone.py:f]"], "error: reward function './gone.py:f': there is no file"),
    "reward name": (["reward.functions=[./rewards.py:texst]"], "has no 'texst'; did you mean text, texts?"),
    "batch": (
        ["trainer.num_generations=3"],
        "error: trainer.num_generations=3 does not divide the generation batch of 8",
    ),
    "context": (
        ["data.max_prompt_length=4090"],
        "error: data.max_prompt_length=4090 + trainer.max_completion_length=8 = 4098 tokens, more than the 4096 of",
    ),
    "output": (["output_dir=rows.jsonl/run"], "error: output_dir=rows.jsonl/run: rows.jsonl is a file"),
    "hydra's output": (["hydra.run.dir=rows.jsonl/run"], "error: hydra.run.dir=rows.jsonl/run: "),
    "overlay": (["--config-dir", "gone"], "error: --config-dir gone: no such folder"),
    "resume": (["resume=gone"], "error: resume=gone: no such folder"),
    "group": (
        ["algo=gpro"],
        "error: algo=gpro: algo is one of cispo, dapo, dr_grpo, grpo, gspo, reinforce_pp, rloo, sapo, sft;"
        " did you mean gspo or grpo?",
    ),
}


@pytest.mark.parametrize(("overrides", "message"), STATIC.values(), ids=STATIC)
def test_config_mistakes(overrides, message, work, tiny_folders, capsys):
    reward = ["reward=custom", "reward.score=null"] if "reward" in overrides[0] else []
    lines = refused(capsys, tiny(tiny_folders["tiny"], *reward, *overrides))
    assert len(lines) == 1
    assert message in lines[0]
    assert not (work / "outputs").exists()  # nothing was begun


def test_config_mistakes_load_nothing_heavy():
    """They take as long as Hydra's import: torch alone would be ten times that."""
    code = """
import sys
from slothrl.__main__ import main
sys.argv = ["slothrl", "algo=gpro", "trainer.num_generations=7"]
try:
    code = main()
except SystemExit as exit:
    code = exit.code
print(code, sorted({"torch", "transformers", "trl", "peft", "datasets", "vllm"} & set(sys.modules)))
"""
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "rewards")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "2 []"


@pytest.mark.skipif(gpu_memory_gb() is not None, reason="there is a CUDA device")
def test_no_gpu(work, tiny_folders, capsys):
    (line,) = refused(capsys, tiny(tiny_folders["tiny"], "gpu=24gb"))
    assert line == "error: gpu=24gb: no CUDA device here (the driver shows none); use gpu=cpu"


def test_all_mistakes_of_a_sweep(work, tiny_folders, capsys):
    arguments = ["--multirun", *tiny(tiny_folders["tiny"], "algo=grpo,gprp", "trainer.num_generations=4,3")]
    lines = refused(capsys, arguments)
    assert [line.split(" ")[1].rstrip(":") for line in lines] == ["algo=gprp", "trainer.num_generations=3"]
    assert not (work / "multirun").exists()


# --- mistakes that show before the model loads ----------------------------------------------------------------------

LOADED = {
    "import": (
        ["reward.functions=[./broken.py:f]"],
        "error: reward function './broken.py:f' raised RuntimeError: boom at import (broken.py, line 1)",
    ),
    "length": (["reward.functions=[./rewards.py:short]"], "reward short returned 1 scores for 8 completions"),
    "text": (["reward.functions=[./rewards.py:text]"], "reward text returned a str ('good') where a list of scores"),
    "texts": (["reward.functions=[./rewards.py:texts]"], "returned a str ('good') where a number or None is expected"),
    "long prompts": (
        ["data.max_prompt_length=10"],
        "error: none of the 40 prompts fits into data.max_prompt_length=10 tokens (longest: ",
    ),
    "too long": (
        ["data.max_prompt_length=40", "data.overlong=error"],
        "error: 40 of 40 prompts are longer than data.max_prompt_length=40 tokens (longest: ",
    ),
    "LoRA's target": (
        ["model.lora.target_modules=[q_proj,k_prj]"],
        "error: model.lora.target_modules: the model has no 'k_prj'; did you mean k_proj?; its linear layers are ",
    ),
    "TRL's own": (
        ["trainer.lr_scheduler_type=zigzag"],
        "error: trainer: zigzag is not a valid SchedulerType, please select one of ['linear', 'cosine'",
    ),
}


@pytest.mark.parametrize(("overrides", "message"), LOADED.values(), ids=LOADED)
def test_mistakes_before_the_model(overrides, message, work, tiny_folders, capsys, monkeypatch):
    def never(*_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("slothrl.rollout.load_model", never)
    reward = ["reward=custom", "reward.score=null"] if "reward" in overrides[0] else []
    (line,) = refused(capsys, tiny(tiny_folders["tiny"], *reward, *overrides))
    assert message in line


def test_no_chat_template(work, tiny_folders, capsys):
    (line,) = refused(capsys, tiny(tiny_folders["no_chat"], "data.format=chat"))
    assert line == f"error: the tokenizer of {tiny_folders['no_chat']} has no chat template: set data.format=plain"


@pytest.mark.parametrize("isolate", [True, False])
def test_a_reward_that_fails_in_the_middle(isolate, work, tiny_folders, capsys):
    arguments = ["reward=custom", "reward.functions=[./late.py:late]", "trainer.max_steps=9", "output_dir=run"]
    (line,) = refused(capsys, tiny(tiny_folders["tiny"], *arguments, f"reward.isolate={isolate}"))
    expected = "error: reward late raised RuntimeError: out of ideas (late.py, line 6)"
    if isolate:  # each of step 3's completions was tried alone
        expected += "; 8 of the last 28 completions failed (reward.max_failure_rate=0.2); repeat it: python -m "
        expected += f"slothrl.reward_worker --reproduce {work}/run/reward_failure.json"
    assert line == expected
    assert len((work / "run" / "metrics.jsonl").read_text().splitlines()) == 2  # what was there stays


# --- in a process of its own ----------------------------------------------------------------------------------------


def test_help(tmp_path):
    found = slothrl("--help", cwd=tmp_path)
    assert (found.returncode, found.stderr) == (0, "")
    algorithms = "cispo, dapo, dr_grpo, grpo, gspo, reinforce_pp, rloo, sapo, sft"
    for line in (f"algo     {algorithms}", "packing  auto, off, on", "gpu      12gb, 16gb, 24gb, 80gb, 8gb, cpu"):
        assert line in found.stdout
    assert "--config-dir FOLDER" in found.stdout
    assert list(tmp_path.iterdir()) == []


def test_cfg_job(tmp_path):
    found = slothrl("algo=dapo", "gpu=cpu", "--cfg", "job", cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert "loss_type: dapo" in found.stdout
    assert "name: smollm2" in found.stdout
    assert list(tmp_path.iterdir()) == []


def test_hub_name_without_a_network(work, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    (line,) = refused(capsys, ["gpu=cpu", "model=hub", "model.name=owner/nothere"])
    assert line.startswith("error: model.name=owner/nothere: ")
