"""Our GRPOTrainer computes what TRL's computes: losses, gradients of every LoRA matrix, and metrics."""

import pytest
import torch
from equality import (
    FixedCompletions,
    FixedEngine,
    arguments,
    assert_same,
    lora_gradients,
    pair,
    ragged_batch,
    rollout_func,
    token_logprobs,
    train,
    trainer,
    use_trl_vllm,
)
from trl import GRPOTrainer as TRLGRPOTrainer

from slothrl.losses import VARIANTS
from slothrl.trainers.grpo import GRPOTrainer

LOSSES = {
    "grpo": {"loss_type": "grpo"},
    "gspo": {
        "loss_type": "grpo",
        "importance_sampling_level": "sequence",
        "epsilon": 3e-4,
        "epsilon_high": 4e-4,
        "steps_per_generation": 4,
    },
    "dr_grpo": {"loss_type": "dr_grpo"},
    "dapo": {"loss_type": "dapo", "epsilon_high": 0.28, "steps_per_generation": 4},
    "bnpo": {"loss_type": "bnpo", "delta": 1.5},
    "cispo": {"loss_type": "cispo", "epsilon_high": 2.0},
    "sapo": {"loss_type": "sapo"},
}
pytestmark = pytest.mark.usefixtures("one_thread")
every_loss = pytest.mark.parametrize("name", LOSSES)


def both_losses(ours, trl, batch, trl_batch=None):
    """(loss, gradients) of both sides on one micro-batch."""
    found = []
    for one, inputs in ((ours, batch), (trl, trl_batch or batch)):
        one.model.zero_grad()
        loss = one.compute_loss(one.model, dict(inputs))
        loss.backward()
        found.append((loss.item(), lora_gradients(one.model)))
    return found


def assert_equal_losses(ours, trl, batch, trl_batch=None):
    (loss, gradients), (expected, expected_gradients) = both_losses(ours, trl, batch, trl_batch)
    assert loss == pytest.approx(expected, abs=1e-5)
    assert_same(gradients, expected_gradients)


def metrics(one, names):
    return {name: one._metrics["train"][name][-1] for name in names}


# --- one micro-batch ------------------------------------------------------------------------------------------------


@every_loss
def test_on_policy(name, tmp_path):
    ours, trl = pair(arguments(tmp_path, **LOSSES[name]))
    assert ours.trl_loss_reason is None
    assert_equal_losses(ours, trl, ragged_batch())
    assert ours._metrics["train"]["entropy"] == pytest.approx(trl._metrics["train"]["entropy"], abs=1e-5)


@every_loss
def test_off_policy(name, tmp_path):
    ours, trl = pair(arguments(tmp_path, **LOSSES[name]))
    batch = ragged_batch()
    noise = torch.randn(batch["completion_mask"].shape, generator=torch.Generator().manual_seed(3))
    scale = 0.01 if name == "gspo" else 0.3  # clips some and not all
    batch["old_per_token_logps"] = (token_logprobs(ours.model, batch) + scale * noise) * batch["completion_mask"]
    assert_equal_losses(ours, trl, batch)
    if name not in ("cispo", "sapo"):
        names = ["clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"]
        assert metrics(ours, names) == pytest.approx(metrics(trl, names), abs=1e-6)
        assert metrics(trl, names)["clip_ratio/region_mean"] > 0  # or this would compare nothing


@every_loss
@pytest.mark.parametrize("off_policy", [False, True], ids=["on", "off"])
def test_kl_to_a_reference(name, off_policy, tmp_path):
    ours, trl = pair(arguments(tmp_path, beta=0.04, **LOSSES[name]))
    batch = ragged_batch()
    with ours.model.disable_adapter():
        batch["ref_per_token_logps"] = token_logprobs(ours.model, batch)
    if off_policy:
        batch["old_per_token_logps"] = token_logprobs(ours.model, batch) + 0.2 * batch["completion_mask"]
    assert_equal_losses(ours, trl, batch)
    assert metrics(ours, ["kl"]) == pytest.approx(metrics(trl, ["kl"]), abs=1e-5)
    assert metrics(trl, ["kl"])["kl"] > 1e-3


@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
@pytest.mark.parametrize("name", ["grpo", "dapo", "dr_grpo", "gspo"])
def test_sampling_correction(name, mode, tmp_path):
    """Ours takes the ratio inside the training forward, TRL from an extra pass before it."""
    cap = {"vllm_importance_sampling_mode": mode, "vllm_importance_sampling_clip_max": 1.2}
    ours, trl = pair(arguments(tmp_path, **cap, **LOSSES[name]))
    ours.attach(FixedEngine("vllm"))
    use_trl_vllm(trl)
    batch = ragged_batch()
    old, mask = token_logprobs(ours.model, batch), batch["completion_mask"]
    sampled = (old + 0.3 * torch.randn(old.shape, generator=torch.Generator().manual_seed(5))) * mask
    difference = (old - sampled) * mask
    ratio = (difference.sum(-1, keepdim=True) if mode.startswith("sequence") else difference).exp()
    ratio = ratio.clamp(max=1.2) if mode.endswith("truncate") else ratio.masked_fill(ratio > 1.2, 0.0)
    assert 0 < (ratio != difference.exp()).float().mean() < 1 or mode.startswith("sequence")
    assert_equal_losses(
        ours,
        trl,
        {**batch, "sampling_per_token_logps": sampled},
        {**batch, "importance_sampling_ratio": ratio, "old_per_token_logps": old},
    )
    logged = ours._metrics["train"]["sampling/importance_sampling_ratio/mean"][-1]
    counted = ratio[mask.bool()] if ratio.shape == mask.shape else ratio
    assert logged == pytest.approx(counted.mean().item(), abs=1e-5)


def test_missing_sampling_logprobs_count_as_a_ratio_of_one(tmp_path):
    ours, trl = pair(arguments(tmp_path, vllm_importance_sampling_mode="token_truncate"))
    ours.attach(FixedEngine("vllm"))
    batch = ragged_batch()
    sampled = torch.full(batch["completion_mask"].shape, float("nan"))
    assert_equal_losses(ours, trl, {**batch, "sampling_per_token_logps": sampled}, batch)
    sampled[0, 0] = token_logprobs(ours.model, batch)[0, 0] - 0.5
    ours.compute_loss(ours.model, {**batch, "sampling_per_token_logps": sampled})
    # The one token that has a log-prob; counting the others as 0 would hide a sampler that went astray.
    assert metrics(ours, ["sampling/sampling_logp_difference/mean"]) == pytest.approx(
        {"sampling/sampling_logp_difference/mean": 0.5}, abs=1e-5
    )


def test_correction_can_be_turned_off(tmp_path):
    ours, trl = pair(arguments(tmp_path, vllm_importance_sampling_correction=False))
    ours.attach(FixedEngine("vllm"))
    batch = ragged_batch()
    sampled = token_logprobs(ours.model, batch) - 1.0
    assert_equal_losses(ours, trl, {**batch, "sampling_per_token_logps": sampled}, batch)


@every_loss
def test_tokens_of_tools_do_not_count(name, tmp_path):
    ours, trl = pair(arguments(tmp_path, **LOSSES[name]))
    batch = ragged_batch()
    batch["tool_mask"] = (torch.arange(batch["completion_mask"].size(1)) % 3 != 1).long().expand(4, -1)
    assert_equal_losses(ours, trl, batch)


@every_loss
def test_evaluation(name, tmp_path):
    ours, trl = pair(arguments(tmp_path, **LOSSES[name]))
    for one in (ours, trl):
        one.model.eval()
    assert_equal_losses(ours, trl, ragged_batch())
    assert ours._metrics["eval"]["entropy"] == pytest.approx(trl._metrics["eval"]["entropy"], abs=1e-5)


def test_sampling_temperature(tmp_path):
    ours, trl = pair(arguments(tmp_path, temperature=0.7))
    assert_equal_losses(ours, trl, ragged_batch())


# --- what goes to TRL's code ----------------------------------------------------------------------------------------

EXOTIC = {
    "entropy bonus": {"entropy_coef": 0.05},
    "entropy quantile": {"top_entropy_quantile": 0.5},
    "quantile and bonus": {"top_entropy_quantile": 0.5, "entropy_coef": 0.05},
    "off-policy mask": {"off_policy_mask_threshold": 0.01},
    "luspo": {"loss_type": "luspo", "importance_sampling_level": "sequence"},
    "vespo": {"loss_type": "vespo"},
    "float32 head": {"cast_lm_head_to_fp32": True},
}


@pytest.mark.parametrize("fields", EXOTIC.values(), ids=EXOTIC)
def test_exotic_options(fields, tmp_path, monkeypatch):
    called = []
    original = TRLGRPOTrainer._compute_loss
    ours, trl = pair(arguments(tmp_path, **fields))
    batch = ragged_batch()
    batch["old_per_token_logps"] = token_logprobs(ours.model, batch) + 0.2 * batch["completion_mask"]
    assert_equal_losses(ours, trl, batch)
    monkeypatch.setattr(TRLGRPOTrainer, "_compute_loss", lambda *a: called.append(1) or original(*a))
    ours.compute_loss(ours.model, dict(batch))
    assert bool(called) is ("loss_type" in fields)  # the two that are TRL's own
    assert (ours.padded_reason is None) is not ({"loss_type", "cast_lm_head_to_fp32"} & set(fields) != set())


def test_images_are_trls(tmp_path, monkeypatch):
    ours, _ = pair(arguments(tmp_path))
    monkeypatch.setattr(TRLGRPOTrainer, "_compute_loss", lambda self, model, inputs: "TRL's")
    assert ours.compute_loss(ours.model, {**ragged_batch(), "pixel_values": torch.zeros(1)}) == "TRL's"


def test_ours_runs_without_trls_loss(tmp_path, monkeypatch):
    def never(*_, **__):
        raise AssertionError("TRL's code ran")

    ours, _ = pair(arguments(tmp_path))
    monkeypatch.setattr(TRLGRPOTrainer, "_compute_loss", never)
    monkeypatch.setattr(TRLGRPOTrainer, "_get_per_token_logps_and_entropies", never)
    assert torch.isfinite(ours.compute_loss(ours.model, ragged_batch()))
    assert {loss.get("loss_type") for loss in LOSSES.values()} <= set(VARIANTS)


# --- whole steps ----------------------------------------------------------------------------------------------------

STEPS = {
    "one micro-batch": {},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 4},
    "reuse": {"per_device_train_batch_size": 4, "steps_per_generation": 4, "gradient_accumulation_steps": 2},
    "iterations": {"num_iterations": 2, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "beta": {"beta": 0.04, "gradient_accumulation_steps": 2},
}


LOGGED = ("loss", "reward", "reward_std", "entropy", "kl", "num_tokens", "completions/mean_length")
LOGGED += ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean")
COMBINATIONS = [("vllm", name) for name in ("grpo", "gspo", "dr_grpo", "dapo")]
COMBINATIONS += [("transformers", "grpo"), ("transformers", "dapo")]


@pytest.mark.parametrize(("engine", "name"), COMBINATIONS)
@pytest.mark.parametrize("step", STEPS)
def test_training(step, name, engine, tmp_path):
    loss = {key: value for key, value in LOSSES[name].items() if key != "steps_per_generation"}
    args = arguments(tmp_path, max_steps=3, vllm_importance_sampling_mode="token_truncate", **loss, **STEPS[step])
    ours = trainer(GRPOTrainer, args, engine=FixedEngine(engine))
    gradients, logs = train(ours)
    # Made only now: both start from the seed, which decides about the shuffling.
    theirs = trainer(TRLGRPOTrainer, args, rollout_func=rollout_func(FixedCompletions(engine == "vllm")))
    if engine == "vllm":
        use_trl_vllm(theirs)
    expected, expected_logs = train(theirs)
    assert len(gradients) == len(expected) == 3
    for found, wanted in zip(gradients, expected, strict=True):
        assert_same(found, wanted)
    for log, expected_log in zip(logs, expected_logs, strict=True):
        picked = {key: expected_log[key] for key in LOGGED if key in expected_log}
        if log.get("packing/dropped_completions"):  # what was not computed is in no mean over tokens
            picked = {key: value for key, value in picked.items() if key != "entropy" and "clip" not in key}
        assert {key: log.get(key) for key in picked} == pytest.approx(picked, abs=2e-5)
    generations = -(-3 * args.gradient_accumulation_steps // (args.steps_per_generation * args.num_iterations))
    assert ours.engine.source.calls == generations
    assert ours.engine.pushes == generations
