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
| gspo      | clipped ratio of a sequence; GSPO (arXiv:2507.18071), 5   | sequences                            |
| gspo_token| the same, gradient and advantage of a token; GSPO, eq. 13 | tokens of a sequence, then sequences |
| rloo      | clipped product of a sequence's ratios; (arXiv:2402.14740)| sequences                            |

The numbers equal TRL 1.16's `_compute_loss` before its division by gradient-accumulation steps, which is the caller's
business. Whatever the mean is over, the loss is a sum of a term a token times a weight a sequence (`row_weights`):
taken from the whole batch, the weights make the sum the same however the batch is cut into micro-batches.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from slothrl.loss_terms import (
    Normalizer,
    Surrogate,
    cispo,
    clipped,
    kl_estimate,
    of_fixed_length,
    of_generation_tokens,
    of_sequences,
    of_tokens,
    policy_ratio,
    sapo,
)

LEVELS = ("token", "sequence", "sequence_token", "product")
KL_ESTIMATORS = ("k1", "k2", "k3")


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
        policy_mask: (B, T) or (B, 1), 1 where the policy term counts (`top_entropy_mask`, `off_policy_mask`); it leaves
            the KL term and the mean's divisor alone. None: wherever `mask` is 1.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    mask: Tensor
    ref_logprobs: Tensor | None = None
    importance_ratio: Tensor | None = None
    policy_mask: Tensor | None = None


# (cleared inputs, config) -> (B, T) or (B, 1), a policy term with gradient.
CustomLoss = Callable[["LossInputs", "LossConfig"], Tensor]


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """The knobs of a policy loss; the names in TRL's GRPOConfig are given where they differ.

    Args:
        max_completion_length: tokens; the constant divisor of dr_grpo.
        loss_type: a key of `VARIANTS`.
        level: the ratio's level (`importance_sampling_level`), where the variant has none of its own: of each token;
            the geometric mean of a sequence's; that mean's value with each token's gradient; the product.
        clip_low: `epsilon`; the ratio is held above 1 - clip_low.
        clip_high: `epsilon_high`; the ratio is held under 1 + clip_high, but for cispo under clip_high itself.
        delta: upper bound of the unclipped branch only (two-sided clipping, INTELLECT-2, arXiv:2505.07291); None: none.
        beta: weight of the KL term.
        kl: the estimator of KL(policy || reference) at a token (Schulman, "Approximating KL Divergence"), with
            d = ref_logprob - logprob: k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1. TRL has k3 only.
        kl_times_ratio: `use_bias_correction_kl`; multiply KL by the ratio (DeepSeek-V3.2, arXiv:2512.02556).
        sapo_temperature_pos: the gate's slope where the advantage is positive.
        sapo_temperature_neg: the same where it is not.
        custom: a policy term in place of the variant's; the mean stays `loss_type`'s. It may look at whole sequences
            and not across them, since the batch may come in parts.

    Raises:
        ValueError: an unknown loss_type, level or KL estimator, or a max_completion_length below 1.
    """

    max_completion_length: int
    loss_type: str = "grpo"
    level: str = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    delta: float | None = None
    beta: float = 0.0
    kl: str = "k3"
    kl_times_ratio: bool = True
    sapo_temperature_pos: float = 1.0
    sapo_temperature_neg: float = 1.05
    custom: CustomLoss | None = None

    def __post_init__(self) -> None:
        if self.loss_type not in VARIANTS:
            raise ValueError(f"loss_type {self.loss_type!r} is not one of {', '.join(VARIANTS)}")
        if self.level not in LEVELS:
            raise ValueError(f"level {self.level!r} is not one of {', '.join(LEVELS)}")
        if self.kl not in KL_ESTIMATORS:
            raise ValueError(f"kl {self.kl!r} is not one of {', '.join(KL_ESTIMATORS)}")
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
class Variant:
    """One policy loss: how the ratio becomes a loss a token, what the mean is over, and the ratio's level.

    Where an advantage is 0, the policy term and its gradient are 0 in all of them.
    """

    surrogate: Callable[[Tensor, Tensor, Tensor, LossConfig], Surrogate]
    weights: Callable[[Tensor, LossConfig, Normalizer], Tensor]
    level: str | None = None  # None: the config's


VARIANTS: dict[str, Variant] = {
    "grpo": Variant(clipped, of_sequences),
    "bnpo": Variant(clipped, of_tokens),
    "dr_grpo": Variant(clipped, of_fixed_length),
    "dapo": Variant(clipped, of_generation_tokens),
    "cispo": Variant(cispo, of_generation_tokens),
    "sapo": Variant(sapo, of_sequences),
    "gspo": Variant(clipped, of_sequences, "sequence"),
    "gspo_token": Variant(clipped, of_sequences, "sequence_token"),
    "rloo": Variant(clipped, of_sequences, "product"),
}


def row_weights(mask: Tensor, config: LossConfig, normalizer: Normalizer = None) -> Tensor:
    """What each token of a sequence weighs in the loss: (B, 1), for the whole batch that the mean is over.

    Args:
        mask: (B, T) as in `LossInputs`.
        normalizer: as in `policy_loss`.
    """
    weights = mask if mask.is_floating_point() else mask.float()
    return VARIANTS[config.loss_type].weights(weights, config, normalizer)


def policy_loss(
    inputs: LossInputs, config: LossConfig, normalizer: Normalizer = None, weights: Tensor | None = None
) -> LossOutput:
    """The loss of one batch, or of a part of one, under `config.loss_type`.

    Args:
        inputs: shapes and dtypes as in `LossInputs`.
        config: the variant and its knobs.
        normalizer: tokens; what dapo and cispo divide by: completion tokens of the whole generation batch, scaled by
            the caller to the share that one optimizer step sees. None: this batch's tokens. Others ignore it.
        weights: (B, 1), these sequences' rows of the whole batch's `row_weights`; None: these are the whole batch.

    Returns:
        LossOutput, in the dtype of `inputs.logprobs`.

    Raises:
        ValueError: `beta` is not 0 and there are no `ref_logprobs`.
    """
    inputs = _cleared(inputs)
    logprobs, mask = inputs.logprobs, inputs.mask
    ratio = policy_ratio(logprobs - inputs.old_logprobs, mask, VARIANTS[config.loss_type].level or config.level)
    surrogate = _surrogate(ratio, inputs, config)
    per_token_loss = surrogate.loss.expand_as(logprobs)
    for factor in (inputs.policy_mask, inputs.importance_ratio):
        if factor is not None:
            per_token_loss = per_token_loss * factor
    kl = None
    if config.beta != 0.0:
        kl = kl_estimate(logprobs, inputs.ref_logprobs, config.kl) * (ratio if config.kl_times_ratio else 1.0)
        per_token_loss = per_token_loss + config.beta * kl

    metrics: dict[str, Tensor | None] = {
        "kl": None if kl is None else kl.detach(),
        "coef": ratio.detach(),
        "low_clipped": surrogate.low_clipped,
        "high_clipped": surrogate.high_clipped,
    }
    weights = row_weights(mask, config, normalizer) if weights is None else weights
    return LossOutput((per_token_loss * mask * weights).sum(), per_token_loss, metrics)


def _cleared(inputs: LossInputs) -> LossInputs:
    """The same with a float mask, advantages (B, 1) or (B, T), and zeros in the padding, where inf * 0 would be NaN."""
    ignored, advantages = inputs.mask == 0, inputs.advantages
    return replace(
        inputs,
        logprobs=inputs.logprobs.masked_fill(ignored, 0.0),
        old_logprobs=inputs.old_logprobs.masked_fill(ignored, 0.0),
        ref_logprobs=None if inputs.ref_logprobs is None else inputs.ref_logprobs.masked_fill(ignored, 0.0),
        mask=inputs.mask.to(inputs.logprobs.dtype),
        advantages=advantages.unsqueeze(1) if advantages.dim() == 1 else advantages,
    )


def _surrogate(ratio: Tensor, inputs: LossInputs, config: LossConfig) -> Surrogate:
    if config.custom is None:
        return VARIANTS[config.loss_type].surrogate(ratio, inputs.advantages, inputs.logprobs, config)
    loss = config.custom(inputs, config)
    if loss.shape not in (inputs.logprobs.shape, inputs.logprobs[:, :1].shape):
        want = tuple(inputs.logprobs.shape)
        raise ValueError(f"the custom loss returned {tuple(loss.shape)}, not {want} or one value a sequence")
    never = torch.zeros_like(loss, dtype=torch.bool)
    return Surrogate(loss, never, never)
