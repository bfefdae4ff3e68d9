"""Whole runs over one shared base: the command line, TRL's arguments in Python, and where it cannot be shared."""

import importlib.util
import json

import pytest
import torch
from peft import LoraConfig
from rich.console import Console
from transformers import BitsAndBytesConfig

from slothrl.shared_model import empty_model
from tests.families import make_checkpoint
from tests.helpers import models_alive

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu holds the GPU's part"),
]
REWARD = """
def even(completions, completion_ids, **columns):
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]
"""
SMALL = [
    "gpu=cpu",
    "model=hub",
    "rollout=vllm",
    "rollout.enforce_eager=true",
    "rollout.kv_cache_gb=0.1",
    "data.max_prompt_length=100",
    "data.eval_size=4",
    "trainer.per_device_train_batch_size=8",
    "trainer.num_generations=4",
    "trainer.learning_rate=1e-3",
    "trainer.max_steps=3",
    "logger.progress=false",
    "logger.samples=0",
    "reward=custom",
]


@pytest.fixture
def go(tmp_path):
    """Runs the tiny model with more overrides; (what the console said, the metrics of each step, the run's folder)."""
    from slothrl.compose import compose_config
    from slothrl.run import run

    folder = make_checkpoint("llama", tmp_path / "model")
    (tmp_path / "mine.py").write_text(REWARD)
    own = [f"model.name={folder}", f"reward.functions=[{tmp_path}/mine.py:even]"]

    def call(*overrides: str):
        output = tmp_path / "run"
        output.mkdir()
        console, before = Console(record=True, width=200), models_alive()
        run(compose_config([*SMALL, *own, *overrides]), output, console=console)
        assert models_alive() <= before  # the engine too
        logged = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        return console.export_text(), [line for line in logged if "reward" in line], output

    return call


def test_nf4_run_shares_its_base(go):
    nf4 = ("model.quantization=nf4", "model.dtype=bfloat16")
    said, logged, output = go(*nf4, "rollout.share_base=always", "model.fuse=on")
    assert "2 gated MLP, 2 q_proj + k_proj + v_proj" in said  # fused layers over vLLM's bytes
    assert "once: vLLM's and the trainer's are one" in said
    assert "one GEMM on the nf4 bytes with the LoRA inside the layer (slothrl_nf4)" in said
    assert "policy probe: vLLM and the trainer differ by" in said
    assert len(logged) == 3
    assert all(line["grad_norm"] > 0 for line in logged)
    assert all(0 < line["rollout/occupancy"] <= 1 and line["rollout/preemptions"] == 0 for line in logged)
    assert all(line["sampling/sampling_logp_difference/mean"] < 0.1 for line in logged)
    phases = json.loads((output / "memory.json").read_text())
    assert [phase["name"] for phase in phases] == ["rollout", "update"]
    for phase in phases:
        parts = phase["parts"]
        assert sum(parts.values()) == phase["total"]
        assert parts["KV cache"] >= 0.09 * 2**30
        # A: r x in and B: out x r of seven projections in two layers, float32 here and bf16 in vLLM.
        values = 2 * 16 * (4 * (128 + 128) - 2 * 64 + 3 * (128 + 256))
        assert parts["LoRA"] == values * 4
        assert parts["LoRA in vLLM"] == values * 2
        assert parts["base"] > 0


def test_a_base_that_cannot_be_shared_is_there_twice_and_says_why(go):
    nf4 = ("model.quantization=nf4", "model.dtype=bfloat16")
    said, logged, _ = go(*nf4, "rollout.share_base=never", "rollout.linear=vllm")
    assert "twice, 1 MB more for the trainer's: rollout.share_base=never" in said
    assert "vLLM's own linear layers" in said
    assert len(logged) == 3


def test_a_run_on_a_view(go):
    """What samples is a rounding away from what is trained, at every step anew, and its memory is accounted for."""
    nf4 = ("model.quantization=nf4", "model.dtype=bfloat16")
    said, logged, output = go(*nf4, "rollout.view=bf16")
    assert "from a 16-bit view of the base with the LoRA folded in" in said
    assert all(0 < line["sampling/sampling_logp_difference/mean"] < 0.1 for line in logged)
    held = json.loads((output / "memory.json").read_text())[0]["parts"]["16-bit view"]
    assert held == 2 * 2 * (256 * 128 + 128 * 128 + 512 * 128 + 128 * 256)


def test_always_means_always(go):
    from slothrl.errors import UserError

    with pytest.raises(
        UserError, match=r"rollout.share_base=always: vLLM keeps model.layers.0.self_attn.q_proj.weight"
    ):
        go("model.quantization=none", "rollout.share_base=always")  # vLLM's CPU build repacks plain weights


def test_transformers_backend_beside_a_model_of_its_own(go, tmp_path, smollm3_as_it_was):
    """vLLM rewrites transformers' SmolLM3 in this process: the trainer's own copy must load and run all the same."""
    folder = make_checkpoint("smollm3", tmp_path / "smollm3")
    said, logged, _ = go(
        f"model.name={folder}", "model.quantization=nf4", "model.dtype=bfloat16", "rollout.share_base=never"
    )
    assert "twice" in said
    assert all(line["sampling/sampling_logp_difference/mean"] < 0.1 for line in logged)
    # The next run of a sweep, in the same process, when this one's engine is gone.
    again = empty_model(str(folder), torch.bfloat16)
    assert all(parameter.is_meta for parameter in again.parameters())
    with pytest.raises(AssertionError, match="Current vLLM config is not set"):  # else this test proves nothing
        type(again.model)(again.config)


def test_trl_arguments_share_it_too(tmp_path):
    """`GRPOTrainer("checkpoint", use_vllm=True, …)` as TRL takes it: the engine's base is the trainer's."""
    from datasets import Dataset
    from trl import GRPOConfig

    from slothrl import GRPOTrainer

    folder = make_checkpoint("llama", tmp_path / "model")
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
    )
    trainer = GRPOTrainer(
        str(folder),
        lambda completion_ids, **_: [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids],
        args=GRPOConfig(
            output_dir=str(tmp_path / "run"),
            use_cpu=True,
            bf16=False,
            use_vllm=True,
            vllm_mode="colocate",
            vllm_max_model_length=128,
            vllm_importance_sampling_mode="token_truncate",
            model_init_kwargs={"quantization_config": quantization, "dtype": "bfloat16"},
            per_device_train_batch_size=4,
            num_generations=4,
            max_completion_length=4,
            max_steps=2,
            logging_steps=1,
            learning_rate=1e-3,
            report_to="none",
        ),
        train_dataset=Dataset.from_list([{"prompt": "one two"}, {"prompt": "three"}]),
        peft_config=LoraConfig(r=8, target_modules="all-linear"),
    )
    theirs = {p.data_ptr() for p in trainer.engine.vllm_model.parameters()}
    base = trainer.model.get_base_model()
    assert base.model.layers[0].mlp.down_proj.base_layer.weight.data_ptr() in theirs
    assert base.model.embed_tokens.weight.data_ptr() in theirs
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}
    trainer.train()
    assert any(not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters() if n in before)
    gaps = [line["sampling/sampling_logp_difference/mean"] for line in trainer.state.log_history if "reward" in line]
    assert len(gaps) == 2 and max(gaps) < 0.1
    trainer.engine.close()
