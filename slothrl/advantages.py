"""Group-relative advantages as pure tensor functions: from rewards to what the policy loss multiplies by.

B: completions, ordered so that a group (the `num_generations` completions of one prompt) is contiguous. K: reward
functions. A NaN reward means that the function does not apply to the completion.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SCALES = ("group", "batch", "none")
AGGREGATIONS = ("sum_then_normalize", "normalize_then_sum")
# Added to the standard deviation, as in TRL: a group with a tiny spread is not blown up to unit variance.
STD_FLOOR = 1e-4


@dataclass(frozen=True)
class Advantages:
    """What `group_advantages` returns; each (B,), floats in the rewards' dtype.

    Args:
        advantages: 0 where the completion is unscorable (every function gave NaN) or alone in its group with a score.
        rewards: the weighted sum over functions, before any normalization; NaN where unscorable.
        std: the standard deviation divided by: of the group, or of the batch (scale="batch", normalize_then_sum).
        zero_std: bool; std is 0, so the completion teaches nothing.
    """

    advantages: Tensor
    rewards: Tensor
    std: Tensor
    zero_std: Tensor


def group_advantages(
    rewards_per_function: Tensor,
    weights: Tensor,
    num_generations: int,
    scale: str = "group",
    aggregation: str = "sum_then_normalize",
) -> Advantages:
    """Advantages of GRPO (DeepSeekMath, arXiv:2402.03300, section 4.1.2) and its relatives, equal to TRL 1.16's.

    Args:
        rewards_per_function: (B, K) float; NaN: not applicable.
        weights: (K,) float, weight of each function.
        num_generations: completions in a group.
        scale: divide by the standard deviation of the group, of the batch, or not (Dr. GRPO, arXiv:2503.20783).
            normalize_then_sum has a scaling of its own and ignores it.
        aggregation: sum the functions, then normalize; or normalize each function in its group, sum, then normalize
            over the batch (GDPO, arXiv:2601.05242), so that a function with a wide range does not drown the others.

    Returns:
        Advantages. Standard deviations are Bessel-corrected, and 1e-4 is added before dividing.

    Raises:
        ValueError: an unknown scale or aggregation, or shapes that do not fit.
    """
    _check(rewards_per_function, weights, num_generations, scale, aggregation)
    weights = weights.to(rewards_per_function)
    unscorable = rewards_per_function.isnan().all(dim=1)  # (B,)
    rewards = _weighted_sum(rewards_per_function, weights, unscorable)
    if aggregation == "sum_then_normalize":
        advantages, std = _sum_then_normalize(rewards, num_generations, scale)
    else:
        normalized = _normalize_each(rewards_per_function, num_generations)
        advantages, std = _normalize_over_batch(_weighted_sum(normalized, weights, unscorable))
    return Advantages(
        # An unscorable completion has a NaN reward, and no signal.
        advantages=torch.nan_to_num(advantages, nan=0.0),
        rewards=rewards,
        std=std,
        zero_std=torch.isclose(std, torch.zeros_like(std)),
    )


def _check(rewards_per_function: Tensor, weights: Tensor, num_generations: int, scale: str, aggregation: str) -> None:
    if scale not in SCALES:
        raise ValueError(f"scale {scale!r} is not one of {', '.join(SCALES)}")
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation {aggregation!r} is not one of {', '.join(AGGREGATIONS)}")
    completions, functions = rewards_per_function.shape
    if weights.shape != (functions,):
        raise ValueError(f"{functions} reward functions need {functions} weights, not {tuple(weights.shape)}")
    if num_generations < 1 or completions % num_generations:
        raise ValueError(f"{completions} completions do not split into groups of {num_generations}")


def _weighted_sum(values: Tensor, weights: Tensor, unscorable: Tensor) -> Tensor:
    """(B, K) -> (B,), NaN terms left out; NaN where unscorable, which nansum alone would make a reward of 0."""
    return (values * weights).nansum(dim=1).masked_fill(unscorable, float("nan"))


def _sum_then_normalize(rewards: Tensor, num_generations: int, scale: str) -> tuple[Tensor, Tensor]:
    """(B,) rewards -> (B,) advantages, (B,) standard deviations."""
    groups = rewards.view(-1, num_generations)  # (B / G, G)
    centered = (groups - groups.nanmean(dim=1, keepdim=True)).flatten()
    # Without scaling the group's deviation is still reported: it says which groups teach nothing.
    spread = _nan_std(rewards, 0) if scale == "batch" else _nan_std(groups, 1)
    std = spread.expand_as(groups).flatten()
    return (centered if scale == "none" else centered / (std + STD_FLOOR)), std


def _normalize_each(rewards_per_function: Tensor, num_generations: int) -> Tensor:
    """(B, K) -> (B, K): each function to zero mean and unit variance within its group."""
    groups = rewards_per_function.view(-1, num_generations, rewards_per_function.size(1))  # (B / G, G, K)
    normalized = (groups - groups.nanmean(dim=1, keepdim=True)) / (_nan_std(groups, 1) + STD_FLOOR)
    return normalized.view_as(rewards_per_function)


def _normalize_over_batch(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) -> (B,) advantages, (B,) standard deviations."""
    std = _nan_std(rewards, 0).expand_as(rewards)
    return (rewards - rewards.nanmean()) / (std + STD_FLOOR), std


def _nan_std(values: Tensor, dim: int) -> Tensor:
    """Bessel-corrected deviation over `dim` (kept), NaN left out: NaN if one value is left, 0 if there is but one."""
    if values.size(dim) == 1:
        return torch.zeros_like(values)
    present = ~values.isnan()
    count = present.sum(dim=dim, keepdim=True)
    mean = values.nanmean(dim=dim, keepdim=True)
    squares = (values - mean).square().masked_fill(~present, 0.0).sum(dim=dim, keepdim=True)
    # A count of 1 gives 0 / 0 = NaN, and so an advantage of 0: one score is no comparison. So does a count of 0.
    return (squares / (count - 1).clamp(min=0)).sqrt()


def rloo_advantages(rewards_per_function: Tensor, weights: Tensor, num_generations: int) -> Tensor:
    """Leave-one-out (RLOO, arXiv:2402.14740, section 3.2): a reward minus the mean of its siblings', as in TRL 1.16.

    Args:
        rewards_per_function, weights, num_generations: as in `group_advantages`.

    Returns:
        (B,) float; 0 where unscorable, or alone in its group with a score.
    """
    groups = _groups_of(rewards_per_function, weights, num_generations)
    others = (~groups.isnan()).sum(dim=1, keepdim=True) - 1
    baseline = (groups.nansum(dim=1, keepdim=True) - groups) / others.clamp(min=1)
    return (groups - baseline).masked_fill(others < 1, 0.0).nan_to_num(nan=0.0).flatten()


def reinforce_pp_advantages(rewards_per_function: Tensor, weights: Tensor, num_generations: int) -> Tensor:
    """REINFORCE++-baseline (arXiv:2501.03262, section 3.3): minus the group's mean, then over the batch's deviation.

    The batch's mean, which the paper also takes away, is 0 after the first step.

    Args:
        rewards_per_function, weights, num_generations: as in `group_advantages`.

    Returns:
        (B,) float; 0 where unscorable.
    """
    groups = _groups_of(rewards_per_function, weights, num_generations)
    centered = (groups - groups.nanmean(dim=1, keepdim=True)).flatten()
    return (centered / (_nan_std(centered, 0) + STD_FLOOR)).nan_to_num(nan=0.0)


def _groups_of(rewards_per_function: Tensor, weights: Tensor, num_generations: int) -> Tensor:
    """(B, K) -> (B / G, G) weighted sums, NaN where unscorable."""
    _check(rewards_per_function, weights, num_generations, "none", AGGREGATIONS[0])
    unscorable = rewards_per_function.isnan().all(dim=1)
    return _weighted_sum(rewards_per_function, weights.to(rewards_per_function), unscorable).view(-1, num_generations)


# (rewards per function (B, K), weights (K,), num_generations) -> (B,); beside TRL's own, which is `group_advantages`.
ADVANTAGES = {"rloo": rloo_advantages, "reinforce_pp": reinforce_pp_advantages}
