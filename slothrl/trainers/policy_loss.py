"""The policy loss of a trainer: from arguments and a window of micro-batches to losses, part by part, and metrics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from slothrl.algorithm import Algorithm
from slothrl.importance import off_policy_mask, sampling_importance_ratio
from slothrl.loss_terms import of_generation_tokens
from slothrl.losses import VARIANTS, LossConfig, LossInputs, LossOutput, policy_loss
from slothrl.probe import PolicyProbe
from slothrl.trainers.batches import Batch, select
from slothrl.trainers.entropy import EntropyBonus
from slothrl.trainers.window import Part, Window

MULTIMODAL = ("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles")
MULTIMODAL += ("image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids")


class PolicyLoss(EntropyBonus):
    """A mixin before TRL's trainer.

    Attributes:
        algorithm: loss, advantage and KL estimator beyond TRL's arguments.
        probe: told how far the engine's log-probs are from the trainer's.
    """

    algorithm: Algorithm
    probe: PolicyProbe | None
    _corrects_sampling: bool

    @property
    def trl_loss_reason(self) -> str | None:
        """Why TRL's own loss runs and not `slothrl.losses`; None where ours does."""
        if self.accelerator.num_processes > 1:
            return "more than one process"
        if self.aux_loss_enabled:
            return "the auxiliary loss of a mixture of experts"
        return None if self._loss_type in VARIANTS else f"loss_type={self.loss_type} is TRL's own"

    @property
    def _loss_type(self) -> str:
        return self.algorithm.loss_type or self.loss_type

    def _loss_config(self) -> LossConfig:
        return LossConfig(
            max_completion_length=self.max_completion_length,
            loss_type=self._loss_type,
            level=self.importance_sampling_level,
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
            delta=self.args.delta,
            beta=self.beta,
            kl=self.algorithm.kl,
            kl_times_ratio=bool(self.args.use_bias_correction_kl),
            sapo_temperature_pos=self.args.sapo_temperature_pos,
            sapo_temperature_neg=self.args.sapo_temperature_neg,
            custom=self.algorithm.custom_loss,
        )

    @property
    def _accumulation(self) -> float:
        return self.current_gradient_accumulation_steps if self.model.training else 1.0

    @property
    def _logged_times(self) -> float:
        """TRL logs a mean over a micro-batch before it is divided by their number, and a share of a sum as it is."""
        return 1.0 if VARIANTS[self._loss_type].weights is of_generation_tokens else self._accumulation

    @property
    def _mode(self) -> str:
        return "train" if self.model.training else "eval"

    @property
    def _drops_rows(self) -> bool:
        """Whether a row whose advantages are 0 adds nothing to loss and gradient, and so need not be computed."""
        plain = self.beta == 0.0 and not self._entropy_bonus_enabled and self.top_entropy_quantile >= 1.0
        return plain and self.algorithm.zero_without_advantage

    def _open_window(self, batches: list[Batch]) -> Window:
        tokens = batches[0]["num_items_in_batch"].clamp(min=1.0)
        # Tokens of the generation batch, scaled so that after `_accumulation` they count one optimizer step's.
        normalizer = tokens / self.args.steps_per_generation if self.model.training else tokens
        window = Window.of(batches, self._loss_config(), normalizer, self._accumulation, self._drops_rows)
        if self._corrects_sampling and not window.kept.any() and window.mask.any():
            # The tokens that the engine sampled are compared at every step; for that the shortest completion will do.
            lengths = window.mask.sum(-1)
            window.kept[lengths.masked_fill(lengths == 0, window.mask.size(1) + 1).argmin()] = True
        return window

    def _part_losses(self, window: Window, parts: Iterable[Part], last: bool) -> Iterator[Tensor]:
        """The loss of each part, a share of the optimizer step's; afterwards metrics are recorded.

        One graph at a time is alive if the caller is done with a loss before it takes the next.

        Args:
            last: the window ends the optimizer step.
        """
        kept: Any = {"dtype": torch.float32, "device": window.mask.device}
        logprobs, entropies = torch.zeros(2, *window.mask.shape, **kept).unbind()  # (B, T) each
        for part in parts:
            loss, logprobs[part.rows], entropies[part.rows] = self._part_loss(window, part)
            yield loss
            del loss
        with torch.no_grad():
            self._record_window(window, logprobs, entropies, last)

    def _part_loss(self, window: Window, part: Part) -> tuple[Tensor, Tensor, Tensor]:
        """(loss with gradient, log-probs (R, T), entropies (R, T))."""
        logprobs, entropies = part.logprobs()
        if self.top_entropy_quantile < 1.0 and window.policy_mask is None:  # a part that is its whole micro-batch
            whole = entropies.new_zeros(window.mask.shape).index_copy(0, part.rows, entropies.detach())
            window.keep_top_entropy(whole, self.top_entropy_quantile)
        inputs = self._loss_inputs(window, part.rows, logprobs)
        loss = policy_loss(inputs, self._loss_config(), weights=window.weights[part.rows]).loss
        if self._entropy_bonus_enabled:
            weights = (window.acting * window.bonus_weights(self._accumulation))[part.rows]
            loss = loss - self._entropy_weight * (entropies * weights).sum()
        return loss, logprobs.detach(), entropies.detach()

    def _loss_inputs(self, window: Window, rows: Tensor, logprobs: Tensor) -> LossInputs:
        """What `policy_loss` reads for some rows of a window, whose log-probs are (R, T)."""
        batch, mask = select(window.batch, rows), window.mask[rows]
        old = batch.get("old_per_token_logps")
        old = logprobs.detach() if old is None else old  # on-policy the policy that sampled is the one just computed
        sampled, ratio = batch.get("sampling_per_token_logps"), batch.get("importance_sampling_ratio")
        if ratio is None and self._corrects_sampling and sampled is not None:
            ratio = sampling_importance_ratio(
                old,
                sampled,
                mask,
                self.vllm_importance_sampling_mode,
                clip_max=self.vllm_importance_sampling_clip_max,
                clip_min=self.vllm_importance_sampling_clip_min,
            )
        policy_mask = None if window.policy_mask is None else window.policy_mask[rows]
        if (threshold := self.off_policy_mask_threshold) is not None:
            near = off_policy_mask(batch["advantages"], logprobs, old if sampled is None else sampled, mask, threshold)
            policy_mask = near if policy_mask is None else policy_mask & near
        return LossInputs(
            logprobs, old, batch["advantages"], mask, batch.get("ref_per_token_logps"), ratio, policy_mask
        )

    # --- metrics ------------------------------------------------------------------------------------------------

    def _record_window(self, window: Window, logprobs: Tensor, entropies: Tensor, last: bool) -> None:
        """TRL's metrics under TRL's names, of each micro-batch's rows that were computed."""
        for part in (slices := window.slices()):
            rows = torch.arange(part.start, part.stop, device=window.kept.device)[window.kept[part]]
            if len(rows):
                inputs = self._loss_inputs(window, rows, logprobs[rows])
                output = policy_loss(inputs, self._loss_config(), weights=window.weights[rows] * self._logged_times)
                self._record_sampling(window.batch, rows, inputs)
                self._record(output, entropies[rows], inputs.mask)
            if self._entropy_bonus_enabled and self.model.training:
                self._follow_entropy(entropies[part], window.acting[part], last and part is slices[-1])

    def _record_sampling(self, batch: Batch, rows: Tensor, inputs: LossInputs) -> None:
        """How far the policy that sampled is from the one that is trained."""
        if inputs.importance_ratio is None or "sampling_per_token_logps" not in batch:
            return
        metrics, counted = self._metrics[self._mode], inputs.mask.bool()
        gap = (inputs.old_logprobs - batch["sampling_per_token_logps"][rows])[counted].abs()
        gap = gap[~gap.isnan()]  # where the engine gave no log-prob
        if self.probe is not None and "old_per_token_logps" not in batch and gap.numel():
            self.probe.require(gap.mean().item(), "the sampled tokens")
        ratio = inputs.importance_ratio
        flat = ratio[counted] if ratio.shape == counted.shape else ratio.flatten()
        for name, values in (("sampling_logp_difference", gap), ("importance_sampling_ratio", flat)):
            if values.numel():
                metrics[f"sampling/{name}/mean"].append(values.mean().item())
                metrics[f"sampling/{name}/max"].append(values.max().item())
        if flat.numel():
            metrics["sampling/importance_sampling_ratio/min"].append(flat.min().item())

    def _record(self, output: LossOutput, entropies: Tensor, mask: Tensor) -> None:
        metrics = self._metrics[self._mode]

        def mean(values: Tensor) -> float:
            if values.shape[-1] == 1:  # one value a sequence
                return values.mean().item()
            return ((values * mask).sum() / mask.sum().clamp(min=1)).item()

        def of_rows(values: Tensor) -> Tensor:
            return values.float().mul(mask).sum(-1) / mask.sum(-1) if values.shape[-1] > 1 else values.float()[:, 0]

        metrics["entropy"].append(mean(entropies))
        if self._entropy_bonus_enabled:
            metrics["policy_loss"].append(output.loss.item())
        kl, low, high = output.metrics["kl"], output.metrics["low_clipped"], output.metrics["high_clipped"]
        assert low is not None and high is not None
        if kl is not None:
            metrics["kl"].append(mean(kl))
        if self._loss_type == "cispo":
            metrics["cispo_clip_ratio"].append(mean(high.float()))
        elif self._loss_type != "sapo" and self.algorithm.custom_loss is None:
            metrics["clip_ratio/low_mean"].append(mean(low.float()))
            metrics["clip_ratio/high_mean"].append(mean(high.float()))
            metrics["clip_ratio/region_mean"].append(mean((low | high).float()))
            metrics["clip_ratio/low_min"].append(of_rows(low).min().item())
            metrics["clip_ratio/high_max"].append(of_rows(high).max().item())
