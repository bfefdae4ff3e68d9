"""The benchmarks run, at sizes for a CPU: their arms train the same, and a command prints their tables."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from slothrl.bench import main

FOLDER = Path(__file__).parents[2] / "kernels" / "benchmarks"


@pytest.fixture
def benchmarks(monkeypatch):
    """kernels/benchmarks importable, as it is for the scripts in it."""
    monkeypatch.syspath_prepend(str(FOLDER))
    yield
    for name in ("random_models", "train_step", "lora_layers", "gpu_timing"):
        sys.modules.pop(name, None)


def test_every_arm_of_a_step_trains_the_same(benchmarks):
    import train_step

    results = {}
    for arm in ("slothrl", "unfused", "peft"):
        options = Namespace(
            arm=arm, shape="tiny", batch=2, length=24, steps=1, device="cpu", profile=False, embeddings="host",
            activations="attention", activation_gib=0.01,
        )  # fmt: skip
        results[arm] = train_step.run_arm(options)
    losses, norms = ([r[key] for r in results.values()] for key in ("loss", "grad_norm"))
    assert results["slothrl"]["note"].startswith("embeddings on the device: there is no GPU; ")
    assert losses == pytest.approx([losses[0]] * 3, rel=train_step.LOSS_TOLERANCE) and 6 < losses[0] < 8
    assert norms == pytest.approx([norms[0]] * 3, rel=train_step.NORM_TOLERANCE) and norms[0] > 1e-4
    assert "2 gated MLP" in results["slothrl"]["note"] and "fit into 0.01 GiB" in results["slothrl"]["note"]


def test_layers_agree_with_peft_in_every_layout(benchmarks):
    import lora_layers

    missed = []
    for cells in (
        lora_layers.group_case("q, k, v", "tiny", 300, "cpu", missed),
        lora_layers.group_case("down", "tiny", 300, "cpu", missed),
        lora_layers.mlp_case("tiny", 300, "cpu", missed),
    ):
        assert len(cells) == len(lora_layers.HEADS) and not any("WRONG" in cell for cell in cells), cells
    assert missed == []
    ours = [torch.ones(3), torch.zeros(3)]
    assert not lora_layers.agrees(ours, ours)  # a gradient of zeros trains nothing


def test_what_a_cell_says(benchmarks):
    from gpu_timing import Timing

    base, slow = Timing(2.0, 5.0, 64), Timing(3.0, 9.0, 128.4)
    assert base.cell() == "2.000 (wall 5.000; 64 MiB)" and slow.cell(base) == "3.000 (1.50x; wall 9.000; 128 MiB)"
    uncaptured = Timing(None, 9.0, 1, "RuntimeError: no")
    assert uncaptured.cell(base) == "9.000 (not captured; 1 MiB)"  # the host's time is no multiple of the GPU's
    assert Timing(None, 9.0, 1).cell(Timing(None, 3.0, 1)) == "9.000 (3.00x; 1 MiB)"  # on a CPU


def test_a_random_model_and_its_checkpoint_are_one(benchmarks, tmp_path):
    """What a peer loads from a folder is what the other arms have in memory."""
    from random_models import random_model, save_checkpoint

    model = random_model("tiny", "cpu", 64)
    save_checkpoint(model, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    weight = loaded.model.layers[1].mlp.down_proj.weight
    assert torch.equal(weight.data, model.model.layers[1].mlp.down_proj.weight.data)
    ids = torch.arange(3, 19)[None]
    for one in (model, loaded):
        one.train()  # in eval mode bitsandbytes may lay the weights out anew
    assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_the_command(capfd):
    options = "--shape tiny --batch 1 --length 16 --steps 1 --device cpu --arms slothrl"
    assert main(["step", *options.split()]) == 0
    shown = capfd.readouterr().out
    assert "### SFT step, tiny shape, 1 x 16 tokens, nf4, LoRA r=16" in shown
    assert "| slothrl | " in shown and "equal loss and an equal gradient norm in every arm" in shown
    assert main(["nothing"]) == 2 and main(["--help"]) == 0
    assert "layers, step, kernels, logprobs" in capfd.readouterr().err
