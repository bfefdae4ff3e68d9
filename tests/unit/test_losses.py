"""The policy losses against numbers computed with TRL 1.16 and against TRL's own code, gradients included."""

from dataclasses import replace

import pytest
import torch
from loss_cases import loss_and_gradient, oracle_inputs, random_inputs
from trl_oracle import trl_generation_batch, trl_loss

from slothrl.importance import SAMPLING_MODES, sampling_importance_ratio
from slothrl.losses import VARIANTS, LossConfig, LossInputs, policy_loss

TRLS = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo", "sapo")  # TRL's own names

# Loss values of TRL 1.16's `_compute_loss` on the batch above, advantages [1, -0.5].
ORACLE = {
    "grpo": (LossConfig(max_completion_length=8), -0.197744),
    "bnpo": (LossConfig(max_completion_length=8, loss_type="bnpo"), -0.295164),
    "dapo": (LossConfig(max_completion_length=8, loss_type="dapo"), -0.295164),
    "dapo-high": (LossConfig(max_completion_length=8, loss_type="dapo", clip_high=0.28), -0.306592),
    "dr_grpo": (LossConfig(max_completion_length=8, loss_type="dr_grpo"), -0.129134),
    "gspo": (LossConfig(max_completion_length=8, level="sequence"), -0.208733),
    "cispo": (LossConfig(max_completion_length=8, loss_type="cispo", clip_high=5.0), 0.271125),
    "sapo": (LossConfig(max_completion_length=8, loss_type="sapo"), -0.513924),
    "kl-plain": (LossConfig(max_completion_length=8, beta=0.04, kl_times_ratio=False), -0.194719),
    "kl-ratio": (LossConfig(max_completion_length=8, beta=0.04), -0.195172),
}


@pytest.mark.parametrize("case", ORACLE)
def test_oracle_value(case):
    config, expected = ORACLE[case]
    loss = policy_loss(oracle_inputs(), config).loss.item()
    assert loss == pytest.approx(expected, abs=1e-6)
    theirs, _ = trl_loss(oracle_inputs(), config)
    assert loss == pytest.approx(theirs.item(), abs=1e-6)


@pytest.mark.parametrize("loss_type", TRLS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize(
    "knobs",
    [
        {},
        {"clip_low": 0.1, "clip_high": 0.28},
        {"delta": 1.5, "clip_high": 0.3},
        {"delta": 1.05},
        {"beta": 0.04},
        {"beta": 0.1, "kl_times_ratio": False},
    ],
    ids=str,
)
@pytest.mark.parametrize("ratio_width", [None, 1, 7])
def test_equals_trl_with_gradient(loss_type, level, knobs, ratio_width):
    config = LossConfig(max_completion_length=11, loss_type=loss_type, level=level, **knobs)
    for seed in range(2):
        inputs = random_inputs(seed, advantages_per_token=seed == 1, ratio_width=ratio_width)
        loss, gradient = loss_and_gradient(policy_loss(inputs, config).loss, inputs)
        theirs, their_gradient = loss_and_gradient(trl_loss(inputs, config)[0], inputs)
        assert loss == pytest.approx(theirs, abs=1e-6, rel=1e-6)
        torch.testing.assert_close(gradient, their_gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo"])
@pytest.mark.parametrize("normalizer", [29.0, torch.tensor(29)])
def test_normalizer_is_the_generation_batch(loss_type, normalizer):
    config = LossConfig(max_completion_length=8, loss_type=loss_type)
    inputs = random_inputs(0)
    loss = policy_loss(inputs, config, normalizer).loss.item()
    assert loss == pytest.approx(trl_loss(inputs, config, num_items=29)[0].item(), abs=1e-6)
    whole = sum(policy_loss(rows(inputs, half), config, normalizer).loss.item() for half in (slice(0, 2), slice(2, 5)))
    assert whole == pytest.approx(loss, abs=1e-6)


def rows(inputs: LossInputs, part: slice) -> LossInputs:
    return LossInputs(
        inputs.logprobs[part], inputs.old_logprobs[part], inputs.advantages[part], inputs.mask[part], None, None
    )


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "sapo"])
def test_normalizer_is_ignored_by_the_others(loss_type):
    config = LossConfig(max_completion_length=8, loss_type=loss_type)
    assert policy_loss(random_inputs(0), config, 29.0).loss == policy_loss(random_inputs(0), config).loss


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("delta", [None, 1.5])
def test_metrics_give_trls_clip_ratios_and_kl(level, delta):
    config = LossConfig(max_completion_length=8, level=level, delta=delta, beta=0.04)
    inputs = random_inputs(3)
    metrics = policy_loss(inputs, config).metrics
    logged = trl_loss(inputs, config)[1]
    weight = inputs.mask if level == "token" else torch.ones(5, 1)

    def mean(x: torch.Tensor) -> float:
        return ((x * weight).sum() / weight.sum()).item()

    assert mean(metrics["low_clipped"]) == pytest.approx(logged["clip_ratio/low_mean"][0], abs=1e-6)
    assert mean(metrics["high_clipped"]) == pytest.approx(logged["clip_ratio/high_mean"][0], abs=1e-6)
    kl = (metrics["kl"] * inputs.mask).sum() / inputs.mask.sum()
    assert kl.item() == pytest.approx(logged["kl"][0], abs=1e-6)
    assert metrics["coef"].shape == ((5, 7) if level == "token" else (5, 1))
    assert not any(x.requires_grad for x in metrics.values())


def test_cispo_metric_and_sapo_has_no_hard_bound():
    cispo = LossConfig(max_completion_length=8, loss_type="cispo", clip_high=1.2)
    inputs = random_inputs(3)
    clipped = policy_loss(inputs, cispo).metrics["high_clipped"]
    mean = ((clipped * inputs.mask).sum() / inputs.mask.sum()).item()
    assert 0 < mean == pytest.approx(trl_loss(inputs, cispo)[1]["cispo_clip_ratio"][0], abs=1e-6)
    metrics = policy_loss(inputs, LossConfig(max_completion_length=8, loss_type="sapo")).metrics
    assert metrics["kl"] is None
    assert not metrics["low_clipped"].any() and not metrics["high_clipped"].any()


@pytest.mark.parametrize("loss_type", VARIANTS)
@pytest.mark.parametrize("level", ["token", "sequence", "sequence_token"])
@pytest.mark.parametrize("garbage", [float("nan"), float("inf"), -1e30])
def test_padding_may_hold_anything(loss_type, level, garbage):
    config = LossConfig(max_completion_length=8, loss_type=loss_type, level=level, beta=0.04)
    clean = random_inputs(0)
    padding = clean.mask == 0
    dirty = replace(
        clean,
        logprobs=clean.logprobs.detach().masked_fill(padding, garbage).requires_grad_(),
        old_logprobs=clean.old_logprobs.masked_fill(padding, garbage),
        ref_logprobs=clean.ref_logprobs.masked_fill(padding, garbage),
    )
    loss, gradient = loss_and_gradient(policy_loss(clean, config).loss, clean)
    dirty_loss, dirty_gradient = loss_and_gradient(policy_loss(dirty, config).loss, dirty)
    assert dirty_loss == loss
    torch.testing.assert_close(dirty_gradient, gradient, atol=0, rtol=0)


def test_bool_mask_and_float64():
    inputs = random_inputs(0)
    config = LossConfig(max_completion_length=8)
    double = replace(inputs, logprobs=inputs.logprobs.double(), mask=inputs.mask.bool())
    output = policy_loss(double, config)
    assert output.loss.dtype == torch.float64
    assert output.loss.item() == pytest.approx(policy_loss(inputs, config).loss.item(), abs=1e-6)


@pytest.mark.parametrize("wrong", [{"loss_type": "ppo"}, {"level": "word"}, {"kl": "k4"}, {"max_completion_length": 0}])
def test_config_refuses(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LossConfig(**{"max_completion_length": 8, **wrong})


def test_kl_needs_reference():
    inputs = replace(random_inputs(0), ref_logprobs=None)
    with pytest.raises(ValueError, match="ref_logprobs"):
        policy_loss(inputs, LossConfig(max_completion_length=8, beta=0.1))


@pytest.mark.parametrize("mode", SAMPLING_MODES)
@pytest.mark.parametrize("clip_min, clip_max", [(None, 1.3), (0.8, 1.3), (0.8, None)])
def test_sampling_ratio_equals_trl(mode, clip_min, clip_max):
    generator = torch.Generator().manual_seed(1)
    lengths = [6, 3, 1, 5]
    mask = torch.arange(6) < torch.tensor(lengths)[:, None]
    old = -2 + torch.randn(4, 6, generator=generator)
    sampling = old + 0.3 * torch.randn(4, 6, generator=generator)
    sampling[0, 2] = float("nan")
    bounds = {"mode": mode, "clip_max": clip_max, "clip_min": clip_min}
    ones = torch.ones(4, 1)
    theirs, _ = trl_generation_batch(ones, ones[0], 4, old=old, sampling=sampling, lengths=lengths, **bounds)
    ratio = sampling_importance_ratio(old, sampling, mask, **bounds)
    assert ratio.shape == ((4, 6) if mode.startswith("token") else (4, 1))
    torch.testing.assert_close(ratio, theirs["importance_sampling_ratio"], atol=1e-6, rtol=1e-6)


def test_sampling_ratio_of_unscored_tokens_is_one():
    old = torch.tensor([[-1.0, -2.0]])
    sampling = torch.full((1, 2), float("nan"))
    for mode in SAMPLING_MODES:
        assert (sampling_importance_ratio(old, sampling, torch.ones(1, 2), mode) == 1).all()


def test_sampling_ratio_refuses_unknown_mode():
    with pytest.raises(ValueError, match="token_truncate"):
        sampling_importance_ratio(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), "token")
