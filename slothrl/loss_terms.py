"""What the policy losses are made of: terms a token or a sequence, and what each sequence's tokens weigh in the mean.

B: sequences, T: completion positions. `slothrl.losses` puts them together and says where each comes from.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from slothrl.losses import LossConfig

Normalizer = Tensor | float | None


@dataclass(frozen=True)
class Surrogate:
    """A variant's policy term and where it was bounded: (B, T), or (B, 1) at sequence level."""

    loss: Tensor
    low_clipped: Tensor
    high_clipped: Tensor


def clipped(ratio: Tensor, advantages: Tensor, logprobs: Tensor, config: LossConfig) -> Surrogate:
    low, high = 1 - config.clip_low, 1 + config.clip_high
    # delta bounds what min() picks when the advantage is negative; the clipped branch keeps its own bounds.
    unclipped = ratio if config.delta is None else ratio.clamp(max=config.delta)
    loss = -torch.min(unclipped * advantages, ratio.clamp(low, high) * advantages)
    return Surrogate(loss, (unclipped < low) & (advantages < 0), (unclipped > high) & (advantages > 0))


def cispo(ratio: Tensor, advantages: Tensor, logprobs: Tensor, config: LossConfig) -> Surrogate:
    # Detached: every token keeps its gradient, only its weight is bounded. The bound is absolute, not 1 + clip_high.
    loss = -ratio.clamp(max=config.clip_high).detach() * advantages * logprobs
    high_clipped = (ratio > config.clip_high) & (advantages > 0)
    return Surrogate(loss, torch.zeros_like(high_clipped), high_clipped)


def sapo(ratio: Tensor, advantages: Tensor, logprobs: Tensor, config: LossConfig) -> Surrogate:
    temperature = torch.where(advantages > 0, config.sapo_temperature_pos, config.sapo_temperature_neg)
    # 4 / temperature makes the slope at ratio 1 that of the plain ratio.
    loss = -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantages
    never = torch.zeros_like(loss, dtype=torch.bool)
    return Surrogate(loss, never, never)


def of_sequences(mask: Tensor, config: LossConfig, normalizer: Normalizer) -> Tensor:
    return 1 / (mask.sum(-1, keepdim=True).clamp(min=1.0) * mask.size(0))


def of_tokens(mask: Tensor, config: LossConfig, normalizer: Normalizer) -> Tensor:
    return (1 / mask.sum().clamp(min=1.0)).expand(mask.size(0), 1)


def of_fixed_length(mask: Tensor, config: LossConfig, normalizer: Normalizer) -> Tensor:
    return mask.new_full((mask.size(0), 1), 1 / (mask.size(0) * config.max_completion_length))


def of_generation_tokens(mask: Tensor, config: LossConfig, normalizer: Normalizer) -> Tensor:
    if normalizer is None:
        return of_tokens(mask, config, None)
    return mask.new_ones(mask.size(0), 1) / normalizer


def policy_ratio(log_ratio: Tensor, mask: Tensor, level: str) -> Tensor:
    """(B, T) log-ratios, 0 where masked -> ratios: (B, T), or (B, 1) at the levels "sequence" and "product"."""
    if level == "token":
        return log_ratio.exp()
    total = log_ratio.sum(-1, keepdim=True)  # (B, 1)
    if level == "product":
        return total.exp()
    mean = total / mask.sum(-1, keepdim=True).clamp(min=1.0)
    if level == "sequence_token":
        mean = mean.detach() + log_ratio - log_ratio.detach()
    return mean.exp()


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor | None, estimator: str) -> Tensor:
    """(B, T) nats, 0 where both are."""
    if ref_logprobs is None:
        raise ValueError("beta is not 0, so the loss has a KL term and needs ref_logprobs")
    difference = ref_logprobs - logprobs
    if estimator == "k1":
        return -difference
    if estimator == "k2":
        return difference.square() / 2
    return difference.exp() - difference - 1
