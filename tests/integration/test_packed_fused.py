"""Everything at once is still the plain update: packs with shared prompts over nf4, fused layers, layers run again."""

import pytest
import torch
from equality import FixedEngine, arguments, assert_same, train, trainer

from slothrl.activations import keep_activations
from slothrl.config import PackingConfig
from slothrl.fuse import fuse
from slothrl.trainers.grpo import GRPOTrainer
from tests.gpu.nf4_model import marked, quantise
from tests.helpers import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")


def quantised(vocab_size, hidden):
    """`tiny_model` in nf4, computed in float32."""
    model = tiny_model(vocab_size, hidden=2 * hidden)  # whose rows are whole blocks of 64
    quantise(model, lambda linear: linear.weight.data)
    for module in model.modules():
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32  # pyright: ignore
    return marked(model)


LOSSES = {
    "grpo": {"loss_type": "grpo", "beta": 0.04, "vllm_importance_sampling_mode": "token_truncate"},
    "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"},
}


@pytest.mark.parametrize("name", LOSSES)
def test_packed_fused_and_checkpointed_is_padded_and_plain(name, tmp_path):
    fields = {"max_steps": 2, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, **LOSSES[name]}
    found = []
    for fused in (False, True):
        packing = PackingConfig("on", "always", 40) if fused else PackingConfig("off")
        options = {"gradient_checkpointing": fused, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
        args = arguments(tmp_path, **fields, **options)
        one = trainer(GRPOTrainer, args, engine=FixedEngine("vllm"), packing=packing, base=quantised)
        if fused:
            report = dict(fuse(one.model).rows())
            assert "2 gated MLP" in report["fused"] and "2 q_proj + k_proj + v_proj" in report["fused"]
            keep_activations(one.model, "attention")
        found.append(train(one))
    (plain, plain_logs), (packed, packed_logs) = found
    assert packed_logs[0]["packing/micro_batches"] > 1
    for wanted, mine in zip(plain, packed, strict=True):
        assert_same(mine, wanted)
    for wanted, mine in zip(plain_logs, packed_logs, strict=True):
        assert mine["loss"] == pytest.approx(wanted["loss"], abs=2e-5)
        assert mine["entropy"] == pytest.approx(wanted["entropy"], abs=2e-5)
