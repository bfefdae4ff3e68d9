"""What is said about one step, from its figures."""

import pytest

from slothrl.step_findings import NAMES, step_findings

GOOD = {
    "completions/clipped_ratio": 0.9,
    "frac_reward_zero_std": 0.9,
    "reward": 0.5,
    "unscored": 0.0,
    "grad_norm": 0.1,
    "sampling/importance_sampling_ratio/mean": 0.98,
    "kl": 0.2,
    "entropy": 0.15,
    "first_entropy": 1.0,
}


def test_a_good_step_and_one_without_figures():
    assert step_findings(GOOD) == []
    assert step_findings({}) == []


@pytest.mark.parametrize(
    ("figures", "name", "text", "knob"),
    [
        ({"completions/clipped_ratio": 1.0}, "all_truncated", "cut off", "trainer.max_completion_length"),
        ({"frac_reward_zero_std": 1.0}, "equal_rewards", "same reward (mean 0.5)", "dynamic_sampling.max_resamples"),
        ({"unscored": 0.25}, "unscored", "25% of the completions", "reward.timeout"),
        ({"grad_norm": 0.0}, "no_gradient", "stood still", "trainer.mask_truncated_completions=false"),
        ({"sampling/importance_sampling_ratio/mean": 0.11}, "ratio_collapsed", "0.110", "token_truncate"),
        ({"kl": 1.5}, "kl_exploding", "1.50 nat", "trainer.beta higher"),
        ({"entropy": 0.05}, "entropy_collapsing", "from 1.000 to 0.050", "trainer.entropy_coef"),
    ],
)
def test_each_fault(figures, name, text, knob):
    (finding,) = step_findings({**GOOD, **figures})
    assert (finding.name, finding.name in NAMES) == (name, True)
    assert text in finding.text
    assert knob in finding.knob


def test_low_entropy_from_the_start_is_no_collapse():
    assert step_findings({**GOOD, "entropy": 0.05, "first_entropy": 0.1}) == []
