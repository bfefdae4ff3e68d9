"""What is wrong with one training step, in words with the knob that helps: read off the figures it left behind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from slothrl.diagnosis import ENTROPY_LEFT, ENTROPY_LOW, KL_HIGH

RATIO_COLLAPSED = 0.5  # mean importance ratio: so much of the signal is masked, or the policies are that far apart


@dataclass(frozen=True)
class StepFinding:
    """A fault of a step.

    Attributes:
        name: in the metrics, `diagnosis/<name>`.
        text: one sentence.
        knob: the settings that help.
    """

    name: str
    text: str
    knob: str


# Means over the step of TRL's metrics by their names; and "grad_norm", "unscored" (share of completions), and
# "first_entropy", the run's first. What a step does not have is not there.
Figures = Mapping[str, float]


def step_findings(figures: Figures) -> list[StepFinding]:
    """Everything that is wrong with a step."""
    return [finding for rule in RULES if (finding := rule(figures)) is not None]


def all_truncated(figures: Figures) -> StepFinding | None:
    if figures.get("completions/clipped_ratio", 0.0) < 1.0:
        return None
    text = "all completions were cut off at the length limit: none reached its end token"
    return StepFinding("all_truncated", text, "trainer.max_completion_length higher, or a length_penalty reward")


def equal_rewards(figures: Figures) -> StepFinding | None:
    if figures.get("frac_reward_zero_std", 0.0) < 1.0:
        return None
    reward = f" (mean {figures['reward']:.3g})" if "reward" in figures else ""
    text = f"in every group all completions got the same reward{reward}: nothing to learn from"
    knob = "easier or harder prompts, trainer.num_generations or trainer.temperature higher, a reward with partial"
    return StepFinding("equal_rewards", text, f"{knob} credit, dynamic_sampling.max_resamples=3")


def unscored(figures: Figures) -> StepFinding | None:
    if (share := figures.get("unscored", 0.0)) <= 0.0:
        return None
    text = f"no reward function gave a number for {share:.0%} of the completions; they teach nothing"
    return StepFinding("unscored", text, "the reward function's None (does it apply to this data?), reward.timeout")


def no_gradient(figures: Figures) -> StepFinding | None:
    if figures.get("grad_norm", 1.0) != 0.0:
        return None
    text = "the gradient was zero: the policy stood still"
    knob = "a reward that tells completions of one prompt apart, trainer.mask_truncated_completions=false"
    return StepFinding("no_gradient", text, knob)


def ratio_collapsed(figures: Figures) -> StepFinding | None:
    ratio = figures.get("sampling/importance_sampling_ratio/mean", 1.0)
    if ratio > RATIO_COLLAPSED:
        return None
    text = f"the mean importance ratio is {ratio:.3f}: most of the signal is scaled or masked away"
    knob = "trainer.vllm_importance_sampling_mode=token_truncate, rollout.dtype=float32"
    return StepFinding("ratio_collapsed", text, knob)


def kl_exploding(figures: Figures) -> StepFinding | None:
    if (kl := figures.get("kl", 0.0)) < KL_HIGH:
        return None
    text = f"KL to the reference is {kl:.2f} nat a token: the policy has left it"
    return StepFinding("kl_exploding", text, "trainer.learning_rate lower, trainer.beta higher")


def entropy_collapsing(figures: Figures) -> StepFinding | None:
    entropy, first = figures.get("entropy"), figures.get("first_entropy")
    if entropy is None or first is None or entropy > min(ENTROPY_LOW, ENTROPY_LEFT * first):
        return None
    text = f"entropy fell from {first:.3f} to {entropy:.3f} nat: completions of a prompt are nearly the same"
    knob = "trainer.temperature higher, trainer.epsilon_high higher (algo=dapo), trainer.entropy_coef=0.01"
    return StepFinding("entropy_collapsing", text, knob)


RULES: tuple[Callable[[Figures], StepFinding | None], ...] = (
    all_truncated,
    equal_rewards,
    unscored,
    no_gradient,
    ratio_collapsed,
    kl_exploding,
    entropy_collapsing,
)
NAMES = tuple(rule.__name__ for rule in RULES)
