"""Batches of odd lengths: no gradient that is not finite, and packed as padded; no token at all is told in words."""

import math

import pytest
import torch
from equality import FixedEngine, KeepGradients, arguments, assert_same, trainer

from slothrl.config import PackingConfig
from slothrl.engine import Rollout
from slothrl.faults import EngineFault
from slothrl.trainers.grpo import GRPOTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTHS = {
    "one token each": [1] * 8,
    "one long one": [1, 1, 1, 12, 1, 1, 1, 1],
    "an empty one": [3, 0, 2, 1, 1, 1, 1, 0],
}
LOSSES = {"dapo": {"loss_type": "dapo"}, "gspo": {"loss_type": "grpo", "importance_sampling_level": "sequence"}}


class Shaped(FixedEngine):
    def __init__(self, lengths):
        super().__init__("vllm")
        self.lengths = lengths

    def generate(self, prompt_ids, sampling):
        ids = [[5 + (place * 7 + i) % 60 for i in range(length)] for place, length in enumerate(self.lengths)]
        return Rollout(ids, [[-4.5] * len(row) for row in ids])


def first_step(folder, lengths, mode, **fields):
    def reward(completions, **_):
        return [place * 5 % 7 for place in range(len(completions))]

    args = arguments(folder, max_steps=1, vllm_importance_sampling_mode="token_truncate", **fields)
    one, keep = trainer(GRPOTrainer, args, reward, engine=Shaped(lengths), packing=PackingConfig(mode)), KeepGradients()
    one.add_callback(keep)
    one.train()
    return keep.steps[0], one.state.log_history[0]


@pytest.mark.parametrize(("name", "loss"), [("one token each", "gspo"), ("one long one", "dapo")])
def test_every_shape_has_a_finite_gradient(name, loss, tmp_path):
    packed, log = first_step(tmp_path, LENGTHS[name], "on", **LOSSES[loss])
    padded, expected = first_step(tmp_path, LENGTHS[name], "off", **LOSSES[loss])
    assert_same(packed, padded)
    assert all(torch.isfinite(gradient).all() for gradient in packed.values())
    assert all(math.isfinite(value) for value in log.values())
    assert log["loss"] == pytest.approx(expected["loss"], abs=1e-5)


def test_no_token_at_all_is_told(tmp_path):
    with pytest.raises(EngineFault, match=r"gave no token for 2 of 8 prompts, of up to \d+ tokens: is there room"):
        first_step(tmp_path, LENGTHS["an empty one"], "on")
