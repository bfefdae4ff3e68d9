"""Trainers on a fused model compute what they compute on a plain one; a run asks for it by `model.fuse`."""

import json

import pytest
from equality import arguments, assert_same, train, trainer
from test_equality_sft import made
from trl import GRPOTrainer as TRLGRPOTrainer
from trl import SFTTrainer as TRLSFTTrainer

from slothrl.fuse import fuse, is_fused
from slothrl.fuse_report import FuseReport
from slothrl.train import main
from slothrl.trainers.grpo import GRPOTrainer
from slothrl.trainers.sft import SFTTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
SFT = {
    "padded text": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "packed and checkpointed": {
        "packing": True,
        "max_length": 64,
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
}


@pytest.mark.parametrize("kind", [TRLSFTTrainer, SFTTrainer], ids=["trl", "ours"])
@pytest.mark.parametrize("case", SFT)
def test_sft(case, kind, tmp_path):
    fused, plain = (made(kind, "text", tmp_path, **SFT[case]) for _ in range(2))
    report = fuse(fused.model)
    assert report.fused["gated MLP"] == 2 and report.fused["q_proj + k_proj + v_proj"] == 2
    (gradients, logs), (expected, expected_logs) = train(fused), train(plain)
    assert is_fused(fused.model) and len(gradients) == len(expected) == 2
    for found, wanted in zip(gradients, expected, strict=True):
        assert_same(found, wanted)
    assert [log["loss"] for log in logs] == pytest.approx([log["loss"] for log in expected_logs], abs=1e-5)


@pytest.mark.parametrize("kind", [TRLGRPOTrainer, GRPOTrainer], ids=["trl", "ours"])
def test_grpo_with_a_reference_policy(kind, tmp_path):
    """The reference is another adapter of the same model: sampled tokens, KL, losses and gradients are the same."""
    args = arguments(tmp_path, beta=0.2, max_steps=2)
    results = []
    for fused in (True, False):
        one = trainer(kind, args)
        if fused:
            assert fuse(one.model).fused["gated MLP"] == 2
        results.append(train(one))
    (gradients, logs), (expected, expected_logs) = results
    for found, wanted in zip(gradients, expected, strict=True):
        assert_same(found, wanted, 1e-4)
    for key in ("loss", "kl", "reward"):
        assert [log[key] for log in logs] == pytest.approx([log[key] for log in expected_logs], abs=1e-4)
    assert expected_logs[1]["kl"] > 1e-4  # at first the two are one


def test_a_run_asks_for_it(tmp_path, tiny_folders, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    losses = {}
    for wish in ("on", "auto"):
        command = f"algo=sft gpu=cpu model=hub model.name={tiny_folders['tiny']} model.fuse={wish} reward=none seed=3"
        command += f" output_dir={wish} data.train_size=16 data.eval_size=2 trainer.max_steps=2 logger.progress=false"
        assert main(command.split()) == 0
        rows = [json.loads(line) for line in (tmp_path / wish / "metrics.jsonl").read_text().splitlines()]
        losses[wish] = [row["loss"] for row in rows if "loss" in row]
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "5 RMSNorm, 2 RoPE, 2 gated MLP, 2 q_proj + k_proj + v_proj" in shown
    assert "Triton kernels do not run here" in shown
    assert len(losses["on"]) == 2 and losses["on"] == pytest.approx(losses["auto"], abs=1e-4)
    assert main(["model.fuse=sometimes"]) == 2


def test_the_report_in_words():
    report = FuseReport()
    report.fused["RMSNorm"] = 5
    report.kept[("q_proj", "lora_bias")] = 2
    report.notes.append("a note")
    report.difference = 1.25e-7
    rows = [("fused", "5 RMSNorm; results moved by 1.2e-07 of the largest"), ("not fused", "2 q_proj: lora_bias")]
    assert report.rows() == [*rows, ("", "a note")]
    assert FuseReport().rows() == [("fused", "nothing")]
