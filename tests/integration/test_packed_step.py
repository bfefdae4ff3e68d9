"""The packed update is TRL's update: every loss, every cut, shared prompts, dropped rows, in fp32 to 1e-5."""

import weakref

import pytest
import torch
from equality import (
    FixedCompletions,
    FixedEngine,
    arguments,
    assert_same,
    characters,
    ragged_batch,
    rollout_func,
    token_logprobs,
    train,
    trainer,
    use_trl_vllm,
)
from transformers import Qwen3Config, Qwen3ForCausalLM
from trl import GRPOTrainer as TRLGRPOTrainer

from slothrl.config import PackingConfig
from slothrl.trainers.grpo import GRPOTrainer
from tests.traced import LiveBytes

pytestmark = pytest.mark.usefixtures("one_thread")
FOUR = {"per_device_train_batch_size": 4}
SPLIT = {**FOUR, "gradient_accumulation_steps": 2}


def dull_then_not(completions, **_):
    """The first group of each batch all the same, the second one not."""
    return [0.5] * 4 + characters(completions[4:]) if len(completions) > 4 else [0.5] * len(completions)


def ours(folder, fields, packing, reward=characters, engine="vllm", **named):
    named |= {"engine": FixedEngine(engine), "packing": PackingConfig(**packing)}
    one = trainer(GRPOTrainer, arguments(folder, **fields), reward, **named)
    assert (one.padded_reason is None) is (packing.get("mode") != "off")
    return *train(one), one


def trls(folder, fields, reward=characters, engine="vllm"):
    one = trainer(
        TRLGRPOTrainer,
        arguments(folder, **fields),
        reward,
        rollout_func=rollout_func(FixedCompletions(engine == "vllm")),
    )
    if engine == "vllm":
        use_trl_vllm(one)
    return *train(one), one


def assert_equal_runs(found, wanted, metrics=("loss",)):
    assert len(found[0]) == len(wanted[0]) > 0
    for mine, theirs in zip(found[0], wanted[0], strict=True):
        assert_same(mine, theirs)
    for log, expected in zip(found[1], wanted[1], strict=True):
        picked = {name: expected[name] for name in metrics if name in expected}
        assert {name: log.get(name) for name in picked} == pytest.approx(picked, abs=2e-5)


# --- the cut --------------------------------------------------------------------------------------------------------

CUTS = {
    "one pack": {},
    "a row each": {"tokens_per_micro_batch": 1},
    "some rows": {"tokens_per_micro_batch": 40},
    "shared": {"shared_prefix": "always"},
    "shared, split": {"shared_prefix": "always", "tokens_per_micro_batch": 40},
}
CUT_LOSSES = {
    "grpo": {"beta": 0.04, "vllm_importance_sampling_mode": "token_truncate"},
    "gspo": {"importance_sampling_level": "sequence", "vllm_importance_sampling_mode": "sequence_truncate"},
    "bnpo": {"loss_type": "bnpo", "top_entropy_quantile": 0.5, "entropy_coef": 0.05},
}


@pytest.mark.parametrize("name", CUT_LOSSES)
def test_any_cut_is_the_padded_batch(name, tmp_path):
    fields = {"max_steps": 2, **SPLIT, **CUT_LOSSES[name]}
    padded = ours(tmp_path, fields, {"mode": "off"})
    tokens = {}
    for cut, packing in CUTS.items():
        packed = ours(tmp_path, fields, {"mode": "on", **packing})
        assert_equal_runs(packed, padded, ("loss", "entropy", "kl", "policy_loss"))
        tokens[cut] = packed[1][0]["packing/tokens"]
        micro_batches = packed[1][0]["packing/micro_batches"]
        assert (micro_batches > 1) is ("tokens_per_micro_batch" in packing)
    assert tokens["shared"] < tokens["a row each"]


def tiny_qwen3(vocab_size, hidden):
    """Norms on queries and keys, a head of its own size, tied embeddings."""
    shape = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_hidden_layers": 2}
    shape |= {"vocab_size": vocab_size, "hidden_size": hidden, "intermediate_size": 2 * hidden}
    return Qwen3ForCausalLM(Qwen3Config(**shape, pad_token_id=0, eos_token_id=1, dtype="float32"))


@pytest.mark.parametrize("reentrant", [False, True])
def test_layers_computed_again_in_the_backward(reentrant, tmp_path):
    """Gradient checkpointing, on another architecture: the backward runs the layers over the pack once more."""
    fields = {"max_steps": 1, "loss_type": "dapo", **SPLIT}
    padded = ours(tmp_path, fields, {"mode": "off"}, base=tiny_qwen3)
    fields |= {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    packing = {"mode": "on", "shared_prefix": "always", "tokens_per_micro_batch": 60}
    assert_equal_runs(ours(tmp_path, fields, packing, base=tiny_qwen3), padded, ("loss", "entropy"))


# --- against TRL ----------------------------------------------------------------------------------------------------

AGAINST_TRL = {
    "cispo": {"loss_type": "cispo", "epsilon_high": 2.0, "num_iterations": 2, **SPLIT},
    "sapo": {"loss_type": "sapo", "num_iterations": 2, **SPLIT},
    "bnpo, delta": {"loss_type": "bnpo", "delta": 1.5, "num_iterations": 2, **SPLIT},
    "entropy bonus": {"entropy_coef": 0.05, **SPLIT},
    "adaptive entropy": {"use_adaptive_entropy": True, "entropy_target": 9.0, **SPLIT},
    "entropy quantile": {"top_entropy_quantile": 0.5, **SPLIT},
    "off-policy mask": {"off_policy_mask_threshold": 0.01, **SPLIT},
    "two generations a step": {**FOUR, "gradient_accumulation_steps": 4, "steps_per_generation": 2},
    "iterations in a step": {**FOUR, "gradient_accumulation_steps": 4, "steps_per_generation": 2, "num_iterations": 2},
    "a short last step": {**FOUR, "gradient_accumulation_steps": 3, "steps_per_generation": 1},
    "cut-off completions masked": {"mask_truncated_completions": True, **SPLIT},
    "tempered": {"temperature": 0.7, **SPLIT},
}


@pytest.mark.parametrize("name", AGAINST_TRL)
def test_equals_trl(name, tmp_path):
    fields = {"max_steps": 3, "vllm_importance_sampling_mode": "token_truncate", **AGAINST_TRL[name]}
    packing = {"mode": "on", "tokens_per_micro_batch": 60, "shared_prefix": "always"}
    found = ours(tmp_path, fields, packing)
    assert_equal_runs(found, trls(tmp_path, fields), ("loss", "policy_loss", "entropy_coef"))


def test_evaluation_equals_trl(tmp_path):
    fields = {"per_device_eval_batch_size": 8}
    logs = []
    for kind in (GRPOTrainer, TRLGRPOTrainer):
        source = FixedCompletions(with_logprobs=False)
        named = (
            {"engine": FixedEngine("transformers")} if kind is GRPOTrainer else {"rollout_func": rollout_func(source)}
        )
        one = trainer(kind, arguments(tmp_path, **fields), **named)
        logs.append(one.evaluate(one.train_dataset))
    names = ("eval_loss", "eval_entropy", "eval_reward")
    assert {name: logs[0][name] for name in names} == pytest.approx({name: logs[1][name] for name in names}, abs=1e-5)
    assert logs[0]["eval_packing/tokens"] > 0


# --- dropped rows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["dapo", "cispo", "sapo"])  # each variant: tests/unit/test_losses.py
def test_rows_without_advantage_are_dropped_exactly(loss, tmp_path):
    fields = {"max_steps": 2, "loss_type": loss, "vllm_importance_sampling_mode": "token_truncate", **SPLIT}
    found, wanted = ours(tmp_path, fields, {"mode": "on"}, dull_then_not), trls(tmp_path, fields, dull_then_not)
    assert_equal_runs(found, wanted)
    assert all(log["packing/dropped_completions"] == 4 for log in found[1])
    kept = ours(tmp_path, {**fields, "entropy_coef": 1e-12}, {"mode": "on"}, dull_then_not)
    assert_equal_runs(kept, wanted)
    assert all(log["packing/dropped_completions"] == 0 for log in kept[1])


def test_a_step_without_signal_moves_on_as_trls_does(tmp_path):
    """Adam's moments decay, and momentum goes on: a gradient of zero is not none."""
    weights = []
    for run in (lambda *a: ours(a[0], a[1], {"mode": "on"}, *a[2:]), trls):
        calls = []

        def second_is_dull(completions, calls=calls, **_):
            calls.append(1)
            return [1.0] * len(completions) if len(calls) == 2 else characters(completions)

        one = run(tmp_path, {"max_steps": 3, "optim": "adamw_torch", "learning_rate": 0.01, **SPLIT}, second_is_dull)[
            -1
        ]
        weights.append({name: p.detach() for name, p in one.model.named_parameters() if p.requires_grad})
    for name, values in weights[0].items():
        # A step is 0.01 long; where a gradient is hardly more than rounding, Adam makes a step of that too.
        torch.testing.assert_close(values, weights[1][name], atol=5e-4, rtol=0)


@pytest.mark.parametrize(("engine", "computed"), [("vllm", 1), ("transformers", 0)])
def test_without_any_advantage_the_sampler_is_still_checked(engine, computed, tmp_path):
    _, (log,), _ = ours(tmp_path, {"max_steps": 1}, {"mode": "on"}, lambda completions, **_: [1.0] * 8, engine)
    assert log["packing/dropped_completions"] == 8 - computed
    assert ("sampling/sampling_logp_difference/mean" in log) is bool(computed)
    assert log["grad_norm"] == 0.0


# --- what must not happen -------------------------------------------------------------------------------------------


def test_a_sibling_changes_nothing_else(tmp_path):
    one = trainer(GRPOTrainer, arguments(tmp_path), packing=PackingConfig(mode="on", shared_prefix="always"))
    batch = ragged_batch()
    for name in ("prompt_ids", "prompt_mask"):
        batch[name][:] = batch[name][3].clone()  # one group
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    counted = batch["completion_mask"].bool()

    def logprobs():
        with torch.no_grad():
            return one._packed_pass(one.model, batch["prompt_ids"], batch["prompt_mask"], ids, counted)[0]

    before = logprobs()
    torch.testing.assert_close(before, token_logprobs(one.model, batch), atol=1e-5, rtol=0)
    ids[2, 6:11] = ids[2, 6:11].flip(0)
    after = logprobs()
    assert torch.equal(after[[0, 1, 3]], before[[0, 1, 3]])
    assert not torch.equal(after[2], before[2])


class Kept:
    """What autograd keeps of a tensor, so that it can be seen going."""

    def __init__(self, tensor):
        self.tensor = tensor


def test_one_graph_at_a_time(tmp_path):
    alive: weakref.WeakSet[Kept] = weakref.WeakSet()
    seen = []

    class Watching(GRPOTrainer):
        def _pack_logprobs(self, *arguments, **named):
            seen.append(len(alive))
            with torch.autograd.graph.saved_tensors_hooks(lambda t: keep(t), lambda kept: kept.tensor):
                return super()._pack_logprobs(*arguments, **named)

    def keep(tensor):
        kept = Kept(tensor)
        alive.add(kept)
        return kept

    packing = PackingConfig(mode="on", tokens_per_micro_batch=1)
    one = trainer(Watching, arguments(tmp_path, max_steps=1), engine=FixedEngine("vllm"), packing=packing)
    train(one)
    assert len(seen) >= 7 and set(seen) == {0}


def test_nothing_of_a_pack_is_left_when_the_next_one_begins(tmp_path):
    starts, live = [], LiveBytes()

    class Watching(GRPOTrainer):
        def _pack_logprobs(self, *arguments, **named):
            starts.append(live.live)
            return super()._pack_logprobs(*arguments, **named)

    packing = PackingConfig(mode="on", tokens_per_micro_batch=24)
    fields = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    args = arguments(tmp_path, max_steps=1, **fields)
    one = trainer(Watching, args, engine=FixedEngine("vllm"), packing=packing)
    with live:
        gradients, _ = train(one)
    kept = sum(gradient.nbytes for gradient in gradients[0].values())
    states = 14 * 32 * 4  # the hidden states of the smallest pack
    assert len(starts) == 3 and all(abs(start - starts[0] - kept) < states for start in starts[1:])


def test_padded_where_it_must_be_and_refused_where_it_may_not(tmp_path):
    args = arguments(tmp_path, loss_type="vespo")
    one = trainer(GRPOTrainer, args)
    assert one.padded_reason == "loss_type=vespo is TRL's own"
    assert one.describe_update() == "padded rows: loss_type=vespo is TRL's own"
    with pytest.raises(ValueError, match="packing=on: loss_type=vespo"):
        trainer(GRPOTrainer, args, packing=PackingConfig(mode="on"))
    plain = trainer(GRPOTrainer, arguments(tmp_path))
    assert plain.describe_update().startswith("packed, as many tokens as memory holds a micro-batch")
