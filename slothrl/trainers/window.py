"""The micro-batches of an optimizer step that are at hand together, as one batch that may be cut anywhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from slothrl.importance import top_entropy_mask
from slothrl.losses import LossConfig, row_weights
from slothrl.trainers.batches import Batch, join, loss_mask


@dataclass(frozen=True, eq=False)
class Part:
    """Some rows of a window and how to get their log-probs.

    Attributes:
        rows: (R,) int64.
        logprobs: gives log-probs and entropies, (R, T) each, with gradient where gradients are on.
    """

    rows: Tensor
    logprobs: Callable[[], tuple[Tensor, Tensor]]


@dataclass(eq=False)
class Window:
    """TRL's micro-batches one under the other: B rows, T completion positions.

    Attributes:
        batch: all rows.
        sizes: rows of each micro-batch; what TRL takes a mean over.
        mask: (B, T) bool, the tokens that count.
        weights: (B, 1), what each token of a row weighs in the optimizer step's loss.
        kept: (B,) bool, the rows that can give a gradient.
        policy_mask: (B, T) bool, the tokens that carry the policy term; None: all.
    """

    batch: Batch
    sizes: list[int]
    mask: Tensor
    weights: Tensor
    kept: Tensor
    policy_mask: Tensor | None = None

    @classmethod
    def of(
        cls,
        batches: Sequence[Batch],
        config: LossConfig,
        normalizer: Tensor,
        accumulation: float,
        drops: bool,
    ) -> Window:
        """Put micro-batches together.

        Args:
            config, normalizer: as in `policy_loss`.
            accumulation: micro-batches of the optimizer step.
            drops: leave out rows whose advantages are all 0.
        """
        weights = torch.cat([row_weights(loss_mask(batch), config, normalizer) for batch in batches])
        batch = join(batches)
        mask = loss_mask(batch).bool()
        kept = mask.any(-1)
        if drops:
            advantages = batch["advantages"].view(len(kept), -1)
            kept = kept & (advantages != 0).any(-1)
        return cls(batch, [len(b["completion_mask"]) for b in batches], mask, weights / accumulation, kept)

    @property
    def counted(self) -> Tensor:
        """(B, T) bool, the tokens whose log-probs are needed."""
        return self.mask & self.kept[:, None]

    @property
    def acting(self) -> Tensor:
        """(B, T) bool, the tokens that carry the policy term and the entropy bonus."""
        return self.mask if self.policy_mask is None else self.mask & self.policy_mask

    def slices(self) -> list[slice]:
        ends = list(accumulate(self.sizes))
        return [slice(end - size, end) for end, size in zip(ends, self.sizes, strict=True)]

    def keep_top_entropy(self, entropies: Tensor, quantile: float) -> None:
        """Let only the tokens of the highest entropies of each micro-batch carry the policy term.

        Args:
            entropies: (B, T), nats.
        """
        found = [top_entropy_mask(entropies[part], self.mask[part], quantile) for part in self.slices()]
        self.policy_mask = torch.cat(found)

    def bonus_weights(self, accumulation: float) -> Tensor:
        """(B, 1): the entropy bonus is a mean over the acting tokens of each micro-batch, then over those."""
        counts = torch.stack([self.acting[part].sum().clamp(min=1) for part in self.slices()])
        sizes = torch.tensor(self.sizes, device=counts.device)
        return (1.0 / counts / accumulation).repeat_interleave(sizes)[:, None]
