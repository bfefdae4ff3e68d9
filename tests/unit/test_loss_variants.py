"""Losses beside TRL's GRPO, cuts of a batch, KL estimators, masks and custom terms: by hand and against TRL's RLOO."""

import math
from dataclasses import replace

import pytest
import torch
from loss_cases import loss_and_gradient, oracle_inputs, random_inputs
from trl_oracle import trl_loss, trl_rloo_loss

from slothrl.importance import off_policy_mask, top_entropy_mask
from slothrl.losses import VARIANTS, LossConfig, LossInputs, policy_loss, row_weights

# --- variants beside TRL's GRPO -------------------------------------------------------------------------------------


def test_gspo_is_trls_sequence_level():
    for seed in range(3):
        inputs = random_inputs(seed)
        ours = LossConfig(max_completion_length=8, loss_type="gspo", clip_low=0.1, clip_high=0.2)
        loss, gradient = loss_and_gradient(policy_loss(inputs, ours).loss, inputs)
        theirs, _ = trl_loss(inputs, replace(ours, loss_type="grpo", level="sequence"))
        expected, expected_gradient = loss_and_gradient(theirs, inputs)
        assert loss == pytest.approx(expected, abs=1e-6)
        torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-5)


def test_gspo_token_with_one_advantage_a_sequence_is_gspo():
    """As section 4.3 of the paper says; by hand for the batch of the oracle, too."""
    config = LossConfig(max_completion_length=8, loss_type="gspo_token")
    assert policy_loss(oracle_inputs(), config).loss.item() == pytest.approx(-0.208733, abs=1e-6)
    inputs = random_inputs(1)
    loss, gradient = loss_and_gradient(policy_loss(inputs, config).loss, inputs)
    other, expected = loss_and_gradient(policy_loss(inputs, replace(config, loss_type="gspo")).loss, inputs)
    assert loss == pytest.approx(other, abs=1e-6)
    torch.testing.assert_close(gradient, expected, atol=1e-6, rtol=1e-5)
    # One sequence, log-ratios 0.1 and 0.05, advantages 1 and -2: s = exp(0.075), d loss / d logp_t = -s A_t / 2.
    new = torch.tensor([[-1.0, -1.0]], requires_grad=True)
    own = LossInputs(new, torch.tensor([[-1.1, -1.05]]), torch.tensor([[1.0, -2.0]]), torch.ones(1, 2))
    (gradient,) = torch.autograd.grad(policy_loss(own, config).loss, new)
    torch.testing.assert_close(gradient, torch.tensor([[-0.5, 1.0]]) * math.exp(0.075))


def test_rloo_equals_trl_and_hand():
    inputs = random_inputs(2)
    inputs = replace(inputs, mask=(torch.arange(7) < torch.tensor([7, 4, 1, 6, 2])[:, None]).int())
    config = LossConfig(max_completion_length=8, loss_type="rloo", clip_low=0.3, clip_high=0.4)
    loss, gradient = loss_and_gradient(policy_loss(inputs, config).loss, inputs)
    expected, expected_gradient = loss_and_gradient(trl_rloo_loss(inputs, config), inputs)
    assert loss == pytest.approx(expected, abs=1e-6)
    torch.testing.assert_close(gradient, expected_gradient, atol=1e-6, rtol=1e-5)
    # Log-ratios summed: -0.69314718 + 0.40546511 - 0.2 clipped at 0.8 does nothing for a positive advantage: ratio
    # exp(-0.48768207); 0.1 - 0.3 + 0 = -0.2, ratio exp(-0.2) = 0.818731. Mean of -0.614048 and 0.5 * 0.818731.
    plain = LossConfig(max_completion_length=8, loss_type="rloo")
    assert policy_loss(oracle_inputs(), plain).loss.item() == pytest.approx((-0.614048 + 0.409365) / 2, abs=1e-5)


@pytest.mark.parametrize("loss_type", VARIANTS)
@pytest.mark.parametrize("beta", [0.0, 0.04])
def test_any_cut_gives_the_same_sum(loss_type, beta):
    config = LossConfig(max_completion_length=8, loss_type=loss_type, beta=beta)
    inputs = random_inputs(4, ratio_width=7)
    loss, gradient = loss_and_gradient(policy_loss(inputs, config, 29.0).loss, inputs)
    weights = row_weights(inputs.mask, config, 29.0)
    total = torch.zeros(())
    for part in ([3], [0, 4], [1, 2]):
        cut = {name: value[part] for name, value in vars(inputs).items() if value is not None}
        total = total + policy_loss(LossInputs(**cut), config, weights=weights[part]).loss
    cut_loss, cut_gradient = loss_and_gradient(total, inputs)
    assert cut_loss == pytest.approx(loss, abs=1e-6)
    torch.testing.assert_close(cut_gradient, gradient, atol=1e-7, rtol=1e-6)


@pytest.mark.parametrize("loss_type", VARIANTS)
def test_without_advantage_there_is_neither_loss_nor_gradient(loss_type):
    """What lets rows be dropped; sapo's gate and cispo's weight are multiplied by the advantage too."""
    inputs = replace(random_inputs(0, ratio_width=7), advantages=torch.zeros(5))
    config = LossConfig(max_completion_length=8, loss_type=loss_type, delta=1.5)
    loss, gradient = loss_and_gradient(policy_loss(inputs, config).loss, inputs)
    assert loss == 0.0 and not gradient.any()


@pytest.mark.parametrize(
    ("kl", "expected"), [("k1", [-1.0, 14.0, 29.0]), ("k2", [0.5, 98.0, 420.5]), ("k3", [0.718282, 13.000001, 28.0])]
)
def test_kl_estimators(kl, expected):
    """log-prob -1 against a reference of 0, -15 and -30."""
    logprobs, ref = torch.full((1, 3), -1.0), torch.tensor([[0.0, -15.0, -30.0]])
    inputs = LossInputs(logprobs, logprobs, torch.zeros(1), torch.ones(1, 3), ref_logprobs=ref)
    output = policy_loss(inputs, LossConfig(max_completion_length=3, beta=1.0, kl=kl))
    torch.testing.assert_close(output.metrics["kl"], torch.tensor([expected]), atol=1e-5, rtol=0)


def test_policy_mask_spares_the_kl_term():
    config = LossConfig(max_completion_length=8, beta=0.1, kl_times_ratio=False)
    inputs = replace(random_inputs(0), policy_mask=torch.zeros(5, 7))
    none = replace(inputs, advantages=torch.zeros(5), policy_mask=None)
    assert policy_loss(inputs, config).loss.item() == pytest.approx(policy_loss(none, config).loss.item(), abs=1e-7)


def test_a_custom_term_under_the_variants_mean():
    def reinforce(inputs, config):
        return -inputs.advantages * inputs.logprobs

    config = LossConfig(max_completion_length=8, loss_type="bnpo", custom=reinforce)
    output = policy_loss(oracle_inputs(), config)
    by_hand = -(-1.69314718 - 1.0 - 0.59453489 - 1.2) + 0.5 * (-0.4 - 2.3 - 1.5)
    assert output.loss.item() == pytest.approx(by_hand / 7, abs=1e-6)
    wrong = replace(config, custom=lambda inputs, config: inputs.logprobs.sum())
    with pytest.raises(ValueError, match="the custom loss returned"):
        policy_loss(oracle_inputs(), wrong)


# --- importance -----------------------------------------------------------------------------------------------------


def test_top_entropy_mask_by_hand():
    entropies = torch.tensor([[0.1, 0.9, 0.5], [0.7, 9.0, 9.0]])
    mask = torch.tensor([[1, 1, 1], [1, 0, 0]])
    # Of 0.1, 0.5, 0.7, 0.9 the upper half starts at the median, 0.6.
    assert top_entropy_mask(entropies, mask, 0.5).tolist() == [[False, True, False], [True, False, False]]
    assert not top_entropy_mask(entropies, torch.zeros(2, 3), 0.5).any()


def test_off_policy_mask_by_hand():
    logprobs, sampled = torch.zeros(3, 2), torch.tensor([[0.2, 0.4], [0.2, 0.4], [0.2, float("nan")]])
    kept = off_policy_mask(torch.tensor([1.0, -1.0, -1.0]), logprobs, sampled, torch.ones(3, 2), 0.2)
    assert kept.tolist() == [[True], [False], [True]]
