"""TRL's entropy bonus for our own loss: its coefficient, fixed or adaptive, over the micro-batches of a step."""

from __future__ import annotations

import torch
from torch import Tensor

from slothrl.trainers.typed import TypedGRPOTrainer


class EntropyBonus(TypedGRPOTrainer):
    """A mixin: the state is TRL's own, and is saved and restored as such."""

    entropy_coef: float

    @property
    def _entropy_weight(self) -> float:
        """The coefficient that this optimizer step applies."""
        if not self._entropy_bonus_enabled:
            return 0.0
        enough = self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target
        return 0.0 if enough else self.entropy_coef

    def _follow_entropy(self, entropies: Tensor, mask: Tensor, last: bool) -> None:
        """Count one micro-batch of a training step; after the step's last one adapt the coefficient for the next.

        Args:
            entropies: (B, T) nats, without gradient.
            mask: (B, T), 1 on the tokens that the bonus acts on.
        """
        if self.use_adaptive_entropy:
            stats = torch.stack([(entropies * mask).sum(), mask.sum().to(entropies.dtype)])
            known = self._entropy_window_stats
            self._entropy_window_stats = stats if known is None else known + stats
            if last:
                self._adapt()
        if last:
            self._metrics["train"]["entropy_coef"].append(self.entropy_coef)

    def _adapt(self) -> None:
        assert self._entropy_window_stats is not None
        total, tokens = self._entropy_window_stats.tolist()
        entropy, args = total / max(tokens, 1.0), self.args
        if entropy <= args.entropy_target:
            self.entropy_coef = min(self.entropy_coef + args.entropy_coef_delta, args.entropy_coef_max)
        else:
            self.entropy_coef = max(self.entropy_coef - args.entropy_coef_delta, args.entropy_coef_min)
        self._last_world_entropy = entropy
        self._entropy_window_stats = None
