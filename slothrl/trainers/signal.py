"""Where the learning signal comes from: advantages of one's own choice, and groups without signal sampled again.

Dynamic sampling here draws the same prompts again (DAPO draws others): the order of the data stays as it is, so a run
can be resumed in it and every prompt is seen as often as without. A group that stays without signal for
`max_resamples` rounds is left in; its advantages are 0. Logged rewards are those of the first draw, which alone is an
unbiased sample of the policy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from slothrl.advantages import group_advantages
from slothrl.algorithm import Algorithm, advantage_problem
from slothrl.config import DynamicSamplingConfig
from slothrl.errors import UserError
from slothrl.trainers.batches import Batch, loss_mask, replace_rows
from slothrl.trainers.policy_loss import MULTIMODAL
from slothrl.trainers.typed import TypedGRPOTrainer


class Signal(TypedGRPOTrainer):
    """A mixin before TRL's trainer.

    Attributes:
        algorithm: its advantage function, or None for TRL's.
        dynamic_sampling: how often a batch may be drawn again.
    """

    algorithm: Algorithm
    dynamic_sampling: DynamicSamplingConfig
    _rewards: Tensor  # (B, K), of the last call

    def _calculate_rewards(self, *positional, **named):
        self._rewards = super()._calculate_rewards(*positional, **named)
        return self._rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> Batch:
        batch, rewards = self._scored(inputs)
        resamples = self.dynamic_sampling.max_resamples if self.model.training else 0
        if resamples and not any(batch.get(name) is not None for name in MULTIMODAL):
            batch, rewards = self._with_signal(inputs, batch, rewards, resamples)
        return batch

    def _scored(self, inputs: list[dict[str, Any]]) -> tuple[Batch, Tensor]:
        batch = super()._generate_and_score_completions(inputs)
        if self.algorithm.advantage is not None:
            batch["advantages"] = self._advantages(self._rewards)
            logged = self._logs["advantages"]
            for _ in range(min(len(inputs), len(logged))):
                logged.pop()
            logged.extend(batch["advantages"].tolist())
        return batch, self._rewards

    def _advantages(self, rewards: Tensor) -> Tensor:
        """(B, K) rewards -> (B,) advantages, by the function chosen or as TRL does."""
        group = self.num_generations if self.model.training else self.num_generations_eval
        weights, chosen = self.reward_weights.to(rewards), self.algorithm.advantage
        if chosen is None:
            return group_advantages(
                rewards, weights, group, self.scale_rewards, self.multi_objective_aggregation
            ).advantages
        advantages = chosen(rewards, weights, group)
        if problem := advantage_problem(advantages, len(rewards)):
            raise UserError(f"algo.advantage {problem}")
        return advantages.to(rewards)

    # --- dynamic sampling ---------------------------------------------------------------------------------------

    def _with_signal(self, inputs: list[dict], batch: Batch, rewards: Tensor, rounds: int) -> tuple[Batch, Tensor]:
        """The batch with groups without signal replaced, as far as `rounds` draws brought better ones."""
        drawn, dull = 0, self._dull_rows(rewards)
        while rounds and len(dull):
            rounds -= 1
            drawn += len(dull) // self.num_generations
            fresh, fresh_rewards = self._scored_aside([inputs[i] for i in dull.tolist()])
            still = self._dull_rows(fresh_rewards)
            better = torch.ones(len(dull), dtype=torch.bool, device=dull.device).index_fill(0, still, False)
            taken = better.nonzero()[:, 0]
            batch = replace_rows(batch, dull[taken], fresh, taken, self._tokenizer.pad_token_id)
            rewards = rewards.index_copy(0, dull[taken], fresh_rewards[taken])
            dull = dull[~better]
        if drawn:
            # Some of them are over the whole batch (scale_rewards="batch"), which is another one now.
            batch["advantages"] = self._advantages(rewards)
            batch["num_items_in_batch"] = loss_mask(batch).sum()
        metrics = self._metrics["train"]
        metrics["dynamic_sampling/resampled_groups"].append(drawn)
        metrics["dynamic_sampling/groups_without_signal"].append(len(dull) // self.num_generations)
        metrics["dynamic_sampling/share_without_signal"].append(len(dull) / len(inputs))
        return batch, rewards

    def _scored_aside(self, inputs: list[dict[str, Any]]) -> tuple[Batch, Tensor]:
        """Completions and rewards without their metrics."""
        metrics = self._metrics["train"]
        before = {name: len(values) for name, values in metrics.items()}
        found = self._scored(inputs)
        for name, values in metrics.items():
            del values[before.get(name, 0) :]
        return found

    def _dull_rows(self, rewards: Tensor) -> Tensor:
        """Rows of the groups whose completions all have one reward, or none: (R,) int64."""
        group = group_advantages(rewards, self.reward_weights.to(rewards), self.num_generations, "none")
        dull = group.zero_std | group.std.isnan()
        return dull.nonzero()[:, 0]
