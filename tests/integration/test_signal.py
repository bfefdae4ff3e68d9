"""Advantages of one's own, groups sampled again, the reference refreshed, and what is said about steps gone wrong."""

import math
import re

import pytest
import torch
from equality import MAX_COMPLETION, FixedEngine, arguments, characters, lora_model, train, trainer
from transformers import TrainerCallback

from slothrl.advantages import reinforce_pp_advantages
from slothrl.algorithm import Algorithm
from slothrl.config import DiagnosisConfig, DynamicSamplingConfig
from slothrl.engine import Rollout
from slothrl.trainers.batches import replace_rows
from slothrl.trainers.grpo import GRPOTrainer
from slothrl.trainers.reference import add_reference, refresh_reference
from slothrl.trainers.watch import StepFault

pytestmark = pytest.mark.usefixtures("one_thread")


def made(folder, reward=characters, engine="transformers", named=(), **fields) -> GRPOTrainer:
    return trainer(GRPOTrainer, arguments(folder, **fields), reward, engine=FixedEngine(engine), **dict(named))


# --- advantages -----------------------------------------------------------------------------------------------------


def test_advantages_of_ones_own_reach_batch_and_log(tmp_path):
    one = made(tmp_path, named={"algorithm": Algorithm(advantage=reinforce_pp_advantages)}, max_steps=1)
    train(one)
    expected = reinforce_pp_advantages(one._rewards, torch.ones(1), 4)
    trained = torch.cat([batch["advantages"] for batch in one._buffered_inputs])
    assert sorted(trained.tolist()) == sorted(expected.tolist())  # TRL shuffles the rows
    assert list(one._logs["advantages"]) == pytest.approx(expected.tolist())
    assert expected.abs().max() > 0.5


def test_an_algorithm_that_trls_loss_would_ignore_is_refused(tmp_path):
    with pytest.raises(ValueError, match="loss_type=vespo is TRL's own"):
        made(tmp_path, named={"algorithm": Algorithm(kl="k2")}, loss_type="vespo")


# --- dynamic sampling -----------------------------------------------------------------------------------------------


def dull_at(*calls_and_rows):
    """Rewards by call and row: equal where named, `characters` else."""
    calls = []

    def reward(completions, **_):
        calls.append(len(completions))
        scores = characters(completions)
        for call, rows in calls_and_rows:
            if call == len(calls):
                scores[rows] = [0.25] * len(scores[rows])
        return scores

    reward.calls = calls
    return reward


def test_groups_without_signal_are_sampled_again(tmp_path):
    # The first draw has a dull second group, its first replacement is dull too, the second one is not.
    reward = dull_at((1, slice(4, 8)), (2, slice(0, 4)))
    sampling = {"dynamic_sampling": DynamicSamplingConfig(max_resamples=3)}
    one = made(tmp_path, reward, "vllm", sampling, max_steps=1)
    _, (log,) = train(one)
    assert reward.calls == [8, 4, 4]
    assert one.engine.source.calls == 3
    assert (log["dynamic_sampling/resampled_groups"], log["dynamic_sampling/groups_without_signal"]) == (2, 0)
    assert log["frac_reward_zero_std"] == 0.5  # of the first draw
    (batch,) = one._buffered_inputs
    assert (batch["advantages"] != 0).all()
    assert batch["num_items_in_batch"] == batch["completion_mask"].sum()
    assert log["packing/dropped_completions"] == 0


def test_sampling_again_is_bounded(tmp_path):
    sampling = {"dynamic_sampling": DynamicSamplingConfig(max_resamples=2)}
    reward = dull_at(*((call, slice(0, 4)) for call in range(1, 9)))
    one = made(tmp_path, reward, named=sampling, max_steps=1)
    _, (log,) = train(one)
    assert reward.calls == [8, 4, 4]
    assert log["dynamic_sampling/groups_without_signal"] == 1
    assert log["packing/dropped_completions"] == 4


def test_replaced_rows_are_padded_on_their_side():
    batch = {
        "prompt_ids": torch.tensor([[5, 6], [0, 7]]),
        "completion_ids": torch.tensor([[1], [2]]),
        "tool_mask": torch.tensor([[1], [1]]),
        "advantages": torch.zeros(2),
        "num_items_in_batch": torch.tensor(2),
    }
    other = {
        "prompt_ids": torch.tensor([[1, 2, 3]]),
        "completion_ids": torch.tensor([[8, 9]]),
        "tool_mask": torch.tensor([[0, 1]]),
        "advantages": torch.ones(1),
    }
    found = replace_rows(batch, torch.tensor([1]), other, torch.tensor([0]), pad_token_id=4)
    assert found["prompt_ids"].tolist() == [[4, 5, 6], [1, 2, 3]]
    assert found["completion_ids"].tolist() == [[1, 4], [8, 9]]
    assert found["tool_mask"].tolist() == [[1, 1], [0, 1]]
    assert found["advantages"].tolist() == [0, 1]


# --- the reference --------------------------------------------------------------------------------------------------


def test_the_reference_becomes_the_policy(tmp_path):
    fields = {"beta": 0.1, "sync_ref_model": True, "ref_model_mixup_alpha": 1.0, "ref_model_sync_steps": 2}
    one = made(tmp_path, max_steps=3, **fields)
    parameters = dict(one.model.named_parameters())
    frozen = [name for name, parameter in parameters.items() if ".ref." in name and not parameter.requires_grad]
    assert len(frozen) == sum(parameter.requires_grad for parameter in parameters.values()) == 28
    _, logs = train(one)
    # TRL starts the reference of a given adapter as its copy; after one step they are apart, after two the same again.
    assert [log["kl"] > 1e-4 for log in logs] == [False, True, False]
    for name in frozen:  # of before the third step
        assert not torch.equal(parameters[name], parameters[name.replace(".ref.", ".default.")])


def test_a_new_reference_is_the_base():
    model = lora_model()
    before = torch.random.get_rng_state()
    add_reference(model)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.active_adapter == "default"
    ids = torch.tensor([[5, 6, 7, 8]])
    policy = model(ids).logits
    with model.disable_adapter():
        base = model(ids).logits
    model.set_adapter("ref")
    torch.testing.assert_close(model(ids).logits, base)
    refresh_reference_from(model, "default")
    torch.testing.assert_close(model(ids).logits, policy)


def refresh_reference_from(model, adapter):
    model.set_adapter(adapter)
    refresh_reference(model)
    model.set_adapter("ref")


def test_a_mixed_reference_is_refused(tmp_path):
    with pytest.raises(ValueError, match="ref_model_mixup_alpha=1.0, an exact copy"):
        made(tmp_path, beta=0.1, sync_ref_model=True)


# --- what is said ---------------------------------------------------------------------------------------------------


def test_a_bad_step_is_said_once_and_counted(tmp_path, capsys):
    def equal(completions, **_):
        return [1.0] * len(completions)

    one = made(tmp_path, equal, max_steps=4, named={"diagnosis": DiagnosisConfig(every=3)})
    _, logs = train(one)
    printed = [line for line in capsys.readouterr().out.splitlines() if "in every group" in line]
    assert [line.split(":")[1] for line in printed] == [" step 1", " step 4"]
    assert "dynamic_sampling.max_resamples=3" in printed[0]
    assert [log["diagnosis/equal_rewards"] for log in logs] == [1.0] * 4
    assert [log["diagnosis/no_gradient"] for log in logs] == [1.0] * 4
    assert one.watch_state["bad_in_a_row"] == 4


def test_a_run_that_only_goes_wrong_is_ended(tmp_path):
    calls = []

    def dull_from_the_third(completions, **_):
        calls.append(1)
        return [None] * len(completions) if len(calls) > 2 else characters(completions)

    one = made(tmp_path, dull_from_the_third, max_steps=9, named={"diagnosis": DiagnosisConfig(stop_after=2)})
    with pytest.raises(StepFault, match=r"2 steps in a row went wrong \(diagnosis.stop_after\); in step 4 no reward"):
        one.train()
    assert one.state.global_step == 4


def test_groups_that_were_drawn_again_are_no_fault(tmp_path, capsys):
    """All equal in the first draw of every step, and none in the second."""
    reward = dull_at(*((call, slice(0, 8)) for call in (1, 3, 5)))
    named = {"dynamic_sampling": DynamicSamplingConfig(max_resamples=2), "diagnosis": DiagnosisConfig(stop_after=1)}
    _, logs = train(made(tmp_path, reward, max_steps=3, named=named))
    assert [log["frac_reward_zero_std"] for log in logs] == [1.0] * 3
    assert [log["dynamic_sampling/share_without_signal"] for log in logs] == [0.0] * 3
    assert [log["diagnosis/equal_rewards"] for log in logs] == [0.0] * 3
    assert "warning: step" not in capsys.readouterr().out


def test_a_generation_that_feeds_two_steps_is_judged_in_both(tmp_path):
    """Cut off from end to end, but with a gradient: the second step generates nothing, and is as bad."""
    fields = {"max_steps": 8, "per_device_train_batch_size": 4, "steps_per_generation": 2}
    args, diagnosis = arguments(tmp_path, **fields), DiagnosisConfig(stop_after=3)
    one = trainer(GRPOTrainer, args, engine=Faulty("all_truncated"), diagnosis=diagnosis)
    with pytest.raises(StepFault, match=r"3 steps in a row went wrong .* in step 3 all completions were cut off"):
        one.train()
    assert [log["diagnosis/all_truncated"] for log in one.state.log_history if "loss" in log][:2] == [1.0, 1.0]


# --- each fault, put into a run -------------------------------------------------------------------------------------


class Faulty(FixedEngine):
    """Completions that never end, or that the engine claims to have been nearly certain of."""

    def __init__(self, fault):
        super().__init__("vllm" if fault == "ratio_collapsed" else "transformers")
        self.fault = fault

    def generate(self, prompt_ids, sampling):
        rollout = super().generate(prompt_ids, sampling)
        if self.fault == "all_truncated":
            endless = [[5 + (place + i) % 50 for i in range(MAX_COMPLETION)] for place in range(len(prompt_ids))]
            return Rollout(endless, None)
        if self.fault == "ratio_collapsed":
            return Rollout(rollout.completion_ids, [[-0.01] * len(ids) for ids in rollout.completion_ids])
        return rollout


class Sharpen(TrainerCallback):
    """Makes the policy sure of everything, at the start or after the first step."""

    def __init__(self, step: int, factor: float):
        self.step, self.factor = step, factor

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            model.get_base_model().lm_head.weight.data.mul_(self.factor)


FAULTS = {
    "all_truncated": ({"mask_truncated_completions": True}, "cut off at the length limit", "max_completion_length"),
    "ratio_collapsed": ({}, r"mean importance ratio is 0\.0", "vllm_importance_sampling_mode=token_truncate"),
    "kl_exploding": ({"beta": 0.001, "learning_rate": 1.0}, "nat a token: the policy has left it", "trainer.beta"),
    "entropy_collapsing": ({}, r"entropy fell from \d\.\d+ to 0\.0", "trainer.temperature higher"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_said_counted_and_ends_the_run(fault, tmp_path, capsys):
    fields, text, knob = FAULTS[fault]
    args = arguments(tmp_path, max_steps=6, **fields)
    one = trainer(GRPOTrainer, args, engine=Faulty(fault), diagnosis=DiagnosisConfig(stop_after=2))
    if fault == "kl_exploding":  # small changes of the adapter are large ones then
        one.add_callback(Sharpen(step=0, factor=50.0))
    if fault == "entropy_collapsing":
        one.add_callback(Sharpen(step=1, factor=1000.0))
    with pytest.raises(StepFault, match=r"2 steps in a row went wrong \(diagnosis.stop_after\)"):
        one.train()
    (said, *_) = [line for line in capsys.readouterr().out.splitlines() if re.search(text, line)]
    assert said.startswith("warning: step ") and knob in said
    logs = [log for log in one.state.log_history if "loss" in log]
    assert [log["diagnosis/" + fault] for log in logs][-1] == 1.0
    assert all(math.isfinite(value) for log in logs for value in log.values())
    if fault == "all_truncated":  # with its tokens masked there is no loss either, and that is said too
        assert {(log["loss"], log["grad_norm"], log["diagnosis/no_gradient"]) for log in logs} == {(0.0, 0.0, 1.0)}
