"""Policy losses as pure tensor functions: one entry of `VARIANTS` a variant, no trainer inside.

B: sequences, T: completion positions. Log-probabilities and KL are in nats. Every loss is a mean over something, and
what that something is makes half of the difference between the variants; the other half is how the ratio is bounded.

| loss_type | surrogate                                                 | mean over                            |
|-----------|-----------------------------------------------------------|--------------------------------------|
| grpo      | clipped ratio; DeepSeekMath (arXiv:2402.03300), eq. 3     | tokens of a sequence, then sequences |
| bnpo      | the same                                                  | tokens of this batch                 |
| dr_grpo   | the same; Dr. GRPO (arXiv:2503.20783)                     | B * max_completion_length            |
| dapo      | the same, clip_high > clip_low; DAPO (arXiv:2503.14476)   | tokens of the generation batch       |
| cispo     | capped, detached ratio; MiniMax-M1 (arXiv:2506.13585)     | tokens of the generation batch       |
| sapo      | sigmoid gate on the ratio; SAPO (arXiv:2511.20347)        | tokens of a sequence, then sequences |

GSPO (arXiv:2507.18071, eq. 5 and 7) is `loss_type="grpo", level="sequence"`. The numbers equal TRL 1.16's
`_compute_loss` before its division by gradient-accumulation steps, which is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Normalizer = Tensor | float | None
SAMPLING_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


@dataclass(frozen=True)
class LossInputs:
    """What one policy loss reads.

    Args:
        logprobs: (B, T) float, of the policy being trained, with gradient.
        old_logprobs: (B, T) float, of the policy at the start of the update; `logprobs.detach()` when on-policy.
        advantages: (B,) or (B, T) float.
        mask: (B, T) bool, int or float; 1 on the completion tokens that count. What the other tensors hold elsewhere,
            NaN included, changes nothing.
        ref_logprobs: (B, T) float, of the reference policy; needed when `beta` is not 0.
        importance_ratio: (B, T) or (B, 1) float, the sampler's correction (`sampling_importance_ratio`), multiplied
            into the policy term but not into the KL term.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    ref_logprobs: Tensor | None = None
    importance_ratio: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The knobs of a policy loss; the names in TRL's GRPOConfig are given where they differ.

    Args:
        max_completion_length: tokens; the constant divisor of dr_grpo.
        loss_type: a key of `VARIANTS`.
        level: the ratio's level (`importance_sampling_level`): of each token, or the geometric mean of a sequence's.
        clip_low: `epsilon`; the ratio is held above 1 - clip_low.
        clip_high: `epsilon_high`; the ratio is held under 1 + clip_high, but for cispo under clip_high itself.
        delta: upper bound of the unclipped branch only (two-sided clipping, INTELLECT-2, arXiv:2505.07291); None: none.
        beta: weight of the KL term.
        kl_times_ratio: `use_bias_correction_kl`; multiply KL by the ratio (DeepSeek-V3.2, arXiv:2512.02556).
        sapo_temperature_pos: the gate's slope where the advantage is positive.
        sapo_temperature_neg: the same where it is not.

    Raises:
        ValueError: an unknown loss_type or level, or a max_completion_length below 1.
    """

    max_completion_length: int
    loss_type: str = "grpo"
    level: str = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    delta: float | None = None
    beta: float = 0.0
    kl_times_ratio: bool = True
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05

    def __post_init__(self) -> None:
        if self.loss_type not in VARIANTS:
            raise ValueError(f"loss_type {self.loss_type!r} is not one of {', '.join(VARIANTS)}")
        if self.level not in ("token", "sequence"):
            raise ValueError(f"level {self.level!r} is not one of token, sequence")
        if self.max_completion_length < 1:
            raise ValueError(f"max_completion_length must be at least 1 token, not {self.max_completion_length}")


@dataclass(frozen=True)
class LossOutput:
    """What `policy_loss` returns.

    Args:
        loss: scalar with gradient.
        per_token_loss: (B, T) with gradient, KL included, before masking and aggregation.
        metrics: detached tensors; mask before averaging. kl: (B, T) nats, as it entered the loss, or None without KL.
            coef: the ratio, (B, T), or (B, 1) at sequence level. low_clipped, high_clipped: bool of coef's shape
            (broadcast with the advantages'), where a bound was in force; all False for sapo, which has no hard one.
    """

    loss: Tensor
    per_token_loss: Tensor
    metrics: dict[str, Tensor | None]


@dataclass(frozen=True)
class Surrogate:
    """A variant's policy term and where it was bounded: (B, T), or (B, 1) at sequence level."""

    loss: Tensor
    low_clipped: Tensor
    high_clipped: Tensor


def _clipped(ratio: Tensor, advantages: Tensor, logprobs: Tensor, config: LossConfig) -> Surrogate:
    low, high = 1 - config.clip_low, 1 + config.clip_high
    # delta bounds what min() picks when the advantage is negative; the clipped branch keeps its own bounds.
    unclipped = ratio if config.delta is None else ratio.clamp(max=config.delta)
    loss = -torch.min(unclipped * advantages, ratio.clamp(low, high) * advantages)
    return Surrogate(loss, (unclipped < low) & (advantages < 0), (unclipped > high) & (advantages > 0))


def _cispo(ratio: Tensor, advantages: Tensor, logprobs: Tensor, config: LossConfig) -> Surrogate:
    # Detached: every token keeps its gradient, only its weight is bounded. The bound is absolute, not 1 + clip_high.
    loss = -ratio.clamp(max=config.clip_high).detach() * advantages * logprobs
    high_clipped = (ratio > config.clip_high) & (advantages > 0)
    return Surrogate(loss, torch.zeros_like(high_clipped), high_clipped)


def _sapo(ratio: Tensor, advantages: Tensor, logprobs: Tensor, config: LossConfig) -> Surrogate:
    temperature = torch.where(advantages > 0, config.sapo_temperature_pos, config.sapo_temperature_neg)
    # 4 / temperature makes the slope at ratio 1 that of the plain ratio.
    loss = -torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantages
    never = torch.zeros_like(loss, dtype=torch.bool)
    return Surrogate(loss, never, never)


def _mean_over_sequences(loss: Tensor, mask: Tensor, config: LossConfig, normalizer: Normalizer) -> Tensor:
    return ((loss * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()


def _mean_over_tokens(loss: Tensor, mask: Tensor, config: LossConfig, normalizer: Normalizer) -> Tensor:
    return (loss * mask).sum() / mask.sum().clamp(min=1.0)


def _over_fixed_length(loss: Tensor, mask: Tensor, config: LossConfig, normalizer: Normalizer) -> Tensor:
    return (loss * mask).sum() / (loss.size(0) * config.max_completion_length)


def _over_generation_tokens(loss: Tensor, mask: Tensor, config: LossConfig, normalizer: Normalizer) -> Tensor:
    if normalizer is None:
        normalizer = mask.sum().clamp(min=1.0)
    return (loss * mask).sum() / normalizer


@dataclass(frozen=True)
class Variant:
    """One policy loss: how the ratio becomes a loss a token, and what the mean is taken over."""

    surrogate: Callable[[Tensor, Tensor, Tensor, LossConfig], Surrogate]
    aggregate: Callable[[Tensor, Tensor, LossConfig, Normalizer], Tensor]


VARIANTS: dict[str, Variant] = {
    "grpo": Variant(_clipped, _mean_over_sequences),
    "bnpo": Variant(_clipped, _mean_over_tokens),
    "dr_grpo": Variant(_clipped, _over_fixed_length),
    "dapo": Variant(_clipped, _over_generation_tokens),
    "cispo": Variant(_cispo, _over_generation_tokens),
    "sapo": Variant(_sapo, _mean_over_sequences),
}


def policy_loss(inputs: LossInputs, config: LossConfig, normalizer: Normalizer = None) -> LossOutput:
    """The loss of one batch under `config.loss_type`.

    Args:
        inputs: shapes and dtypes as in `LossInputs`.
        config: the variant and its knobs.
        normalizer: tokens; what dapo and cispo divide by: completion tokens of the whole generation batch, scaled by
            the caller to the share that one optimizer step sees. None: this batch's tokens. Others ignore it.

    Returns:
        LossOutput, in the dtype of `inputs.logprobs`.

    Raises:
        ValueError: `beta` is not 0 and there are no `ref_logprobs`.
    """
    ignored = inputs.mask == 0  # (B, T)
    mask = inputs.mask.to(inputs.logprobs.dtype)
    # Padding may hold anything; cleared here, since inf * 0 further down would be NaN.
    logprobs = inputs.logprobs.masked_fill(ignored, 0.0)
    ratio = _ratio(logprobs - inputs.old_logprobs.masked_fill(ignored, 0.0), mask, config.level)
    advantages = inputs.advantages.unsqueeze(1) if inputs.advantages.dim() == 1 else inputs.advantages

    variant = VARIANTS[config.loss_type]
    surrogate = variant.surrogate(ratio, advantages, logprobs, config)
    per_token_loss = surrogate.loss.expand_as(logprobs)
    if inputs.importance_ratio is not None:
        per_token_loss = per_token_loss * inputs.importance_ratio
    kl = None
    if config.beta != 0.0:
        kl = _kl(logprobs, inputs.ref_logprobs, ignored) * (ratio if config.kl_times_ratio else 1.0)
        per_token_loss = per_token_loss + config.beta * kl

    metrics: dict[str, Tensor | None] = {
        "kl": None if kl is None else kl.detach(),
        "coef": ratio.detach(),
        "low_clipped": surrogate.low_clipped,
        "high_clipped": surrogate.high_clipped,
    }
    return LossOutput(variant.aggregate(per_token_loss, mask, config, normalizer), per_token_loss, metrics)


def _ratio(log_ratio: Tensor, mask: Tensor, level: str) -> Tensor:
    """(B, T) log-ratios, 0 where masked -> ratios: (B, T), or at sequence level (B, 1), their geometric mean."""
    if level == "sequence":
        log_ratio = (log_ratio.sum(-1) / mask.sum(-1).clamp(min=1.0)).unsqueeze(-1)
    return log_ratio.exp()


def _kl(logprobs: Tensor, ref_logprobs: Tensor | None, ignored: Tensor) -> Tensor:
    """(B, T) nats: the k3 estimate of KL(policy || reference) (Schulman, "Approximating KL Divergence")."""
    if ref_logprobs is None:
        raise ValueError("beta is not 0, so the loss has a KL term and needs ref_logprobs")
    difference = ref_logprobs.masked_fill(ignored, 0.0) - logprobs
    return difference.exp() - difference - 1


def sampling_importance_ratio(
    old_logprobs: Tensor,
    sampling_logprobs: Tensor,
    mask: Tensor,
    mode: str = "token_truncate",
    clip_max: float | None = 3.0,
    clip_min: float | None = None,
) -> Tensor:
    """Ratio of the training engine's probabilities to the sampler's, bounded (truncated importance sampling).

    After Yao et al., "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training" (truncate), and Liu et
    al., "When Speed Kills Stability" (mask). A sequence's ratio is a product over tokens: long completions leave the
    bounds easily, and in sequence_mask that takes the whole sequence out of the loss.

    Args:
        old_logprobs: (B, T) float, by the training engine.
        sampling_logprobs: (B, T) float, by the engine that sampled; NaN where it gave none, counted as a ratio of 1.
        mask: (B, T); 1 on the tokens that count.
        mode: truncate clamps to [clip_min, clip_max], mask sets 0 outside of it; a token's ratio or a sequence's.
        clip_max, clip_min: bounds of the ratio; None: no such bound.

    Returns:
        token modes (B, T), 1 before bounding where masked; sequence modes (B, 1). Without gradient.

    Raises:
        ValueError: an unknown mode.
    """
    if mode not in SAMPLING_MODES:
        raise ValueError(f"importance-sampling mode {mode!r} is not one of {', '.join(SAMPLING_MODES)}")
    log_ratio = (old_logprobs - sampling_logprobs).detach()
    log_ratio = log_ratio.masked_fill((mask == 0) | log_ratio.isnan(), 0.0)
    if mode.startswith("sequence"):
        log_ratio = log_ratio.sum(-1, keepdim=True)
    ratio = log_ratio.exp()
    low = float("-inf") if clip_min is None else clip_min
    high = float("inf") if clip_max is None else clip_max
    if mode.endswith("truncate"):
        return ratio.clamp(low, high)
    return ratio.masked_fill((ratio < low) | (ratio > high), 0.0)
