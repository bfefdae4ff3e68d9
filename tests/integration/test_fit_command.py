"""`python -m slothrl fit` and `train --dry-run`: what they print, their exit codes, and that nothing is left."""

import shlex
from pathlib import Path

import pytest

from slothrl.__main__ import main
from slothrl.checks import gpu_memory_gb

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(gpu_memory_gb() is not None, reason="the cards asked about are not the one that is here"),
]
REWARD = "def letters(completions, **_):\n    return [len(set(str(text))) / 10 for text in completions]\n"

LARGE = ["gpu=8gb", "packing=off", "trainer.max_completion_length=3900", "trainer.per_device_train_batch_size=512"]


@pytest.fixture
def arguments(tmp_path, tiny_folders, monkeypatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    (tmp_path / "mine.py").write_text(REWARD, encoding="utf-8")
    options = ["model=hub", f"model.name={tiny_folders['tiny']}", "reward=custom", "reward.score=null"]
    options += ["reward.functions=[./mine.py:letters]", "data.train_size=40", "data.eval_size=4"]
    return [*options, "data.max_prompt_length=100"]


def remedy(error: str) -> list[str]:
    """The overrides that a verdict proposes."""
    (line,) = [line for line in error.splitlines() if "it would with: " in line]
    return shlex.split(line.split("it would with: ")[1])


def test_tune_needs_a_gpu(arguments, capsys):
    """The rest of `slothrl tune` times kernels; which layers it times is held to vLLM's in test_vllm_linear.py."""
    assert main(["tune", *arguments]) == 2
    assert "slothrl tune times launches on a GPU, and there is none here" in capsys.readouterr().err
    assert main(["tune", "--fast"]) == 2
    assert "--fast: no such option of `slothrl tune`" in capsys.readouterr().err


def test_fit(arguments, capsys):
    assert main(["fit", *arguments, "gpu=8gb"]) == 0
    shown = capsys.readouterr().out
    for piece in ("rollout", "update", "KV cache", "optimizer", "in use", "8,461", "GRPO, two copies", "80 GB"):
        assert piece in shown
    assert "grpo, nf4, LoRA r=16, 64 x (100 + 8) tokens in packs of at most 1,248" in shown  # 8 (100 + 8 x 7)
    assert main(["fit", *arguments, "algo=sft"]) == 0  # without a GPU here: gpu=24gb
    shown = capsys.readouterr().out
    assert "rollout" not in shown and "25,383" in shown


def test_fit_says_what_would(arguments, capsys):
    large = [*arguments, *LARGE]
    assert main(["fit", *large]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: it will not fit (predicted): the update phase takes ")
    names = [override.partition("=")[0] for override in remedy(error)]
    assert names == ["trainer.per_device_train_batch_size", "trainer.gradient_accumulation_steps"]
    assert main(["fit", *large, *remedy(error)]) == 0


def test_fit_says_which_packs_would(arguments, capsys):
    large = [*arguments, *LARGE, "packing=on", "packing.tokens_per_micro_batch=8000000"]
    assert main(["fit", *large]) == 2
    (override,) = remedy(capsys.readouterr().err)
    assert override.startswith("packing.tokens_per_micro_batch=")
    assert main(["fit", *large, override]) == 0


def test_fit_refuses(arguments, capsys):
    assert main(["fit", *arguments, "--fast"]) == 2
    assert "--fast: no such option of `slothrl fit`" in capsys.readouterr().err
    assert main(["fit", *arguments, "gpu=9gb"]) == 2
    assert "gpu is one of 12gb, 16gb, 24gb, 80gb, 8gb, cpu" in capsys.readouterr().err
    assert main(["fit", "--help"]) == 0


@pytest.mark.parametrize("gpu", ["cpu", "24gb"])
def test_dry_run(gpu, arguments, capsys):
    """Also for a GPU that is not here; rewards and data are tried, nothing is written."""
    assert main([*arguments, "--dry-run", f"gpu={gpu}"]) == 0
    shown = capsys.readouterr().out
    assert "slothrl: grpo (dry run)" in shown
    assert "./mine.py" in shown or "mine.py" in shown
    assert "prompts x 8 completions = " in shown
    assert "in the update phase (predicted)" in shown or "in the rollout phase (predicted)" in shown
    assert ("planned: that GPU is not here" in shown) == (gpu == "24gb")
    assert [path.name for path in Path().iterdir() if path.name != "__pycache__"] == ["mine.py"]


def test_dry_run_of_what_will_not_fit(arguments, capsys):
    large = [*arguments, *LARGE]
    assert main(["train", *large, "--dry-run"]) == 2
    shown = capsys.readouterr()
    assert "slothrl: grpo (dry run)" in shown.out
    assert "it will not fit (predicted)" in shown.err
    assert main(["train", *large, *remedy(shown.err), "--dry-run"]) == 0


def test_dry_run_finds_what_a_run_would(arguments, capsys):
    Path("mine.py").write_text("def letters(completions, **_): return [1.0]\n", encoding="utf-8")
    assert main([*arguments, "--dry-run", "gpu=cpu"]) == 2
    assert "reward letters returned 1 scores for " in capsys.readouterr().err


def test_dry_run_of_a_sweep(arguments, capsys):
    assert main([*arguments, "--dry-run", "--multirun", "gpu=cpu", "algo=grpo,sft"]) == 0
    shown = capsys.readouterr().out
    assert "slothrl: grpo (dry run)" in shown and "slothrl: sft (dry run)" in shown
