"""Which sampled tokens count, and how much: corrections for the policy that sampled, and masks on the policy term.

B: sequences, T: completion positions. Nothing here has a gradient.
"""

from __future__ import annotations

from torch import Tensor

SAMPLING_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


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


def top_entropy_mask(entropies: Tensor, mask: Tensor, quantile: float) -> Tensor:
    """The tokens that the policy was least sure of: only they carry the policy gradient (arXiv:2506.01939, section 5).

    Args:
        entropies: (B, T) float, nats.
        mask: (B, T); 1 on the tokens that count.
        quantile: share of the counted tokens to keep (`top_entropy_quantile`).

    Returns:
        (B, T) bool: entropy at or above the (1 - quantile) quantile of the counted tokens.
    """
    counted = mask.bool()
    if not counted.any():
        return counted
    threshold = entropies[counted].float().quantile(1 - quantile)
    return (entropies >= threshold) & counted


def off_policy_mask(
    advantages: Tensor, logprobs: Tensor, sampling_logprobs: Tensor, mask: Tensor, threshold: float
) -> Tensor:
    """Leaves out bad completions that the policy has moved far away from (DeepSeek-V3.2, arXiv:2512.02556).

    Args:
        advantages: (B,) float.
        logprobs: (B, T) float, of the policy as it is.
        sampling_logprobs: (B, T) float, of the one that sampled; NaN counts as no distance.
        mask: (B, T); 1 on the tokens that count.
        threshold: nats a token (`off_policy_mask_threshold`).

    Returns:
        (B, 1) bool: the advantage is not negative, or the mean of sampling_logprobs - logprobs is not above threshold.
    """
    distance = (sampling_logprobs - logprobs).detach().nan_to_num(nan=0.0).masked_fill(mask == 0, 0.0)
    mean = distance.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1.0)
    return (advantages.view(-1, 1) >= 0) | (mean <= threshold)
