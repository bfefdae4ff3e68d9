"""The packed update: an optimizer step's completions in micro-batches by tokens, each forward and backward at once.

TRL cuts a generation batch into micro-batches of rows and asks for the loss of one after the other. Here the first of
an optimizer step is answered with the work of all of them: their rows are joined, packed by tokens, and each pack's
gradient is added before the next one's forward. The others then have nothing left to do and give a loss of 0. What a
token weighs is fixed by TRL's micro-batches before packing (`Window.weights`), so the cut changes no sum.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor

from slothrl.config import PackingConfig
from slothrl.logprobs import completion_logprobs
from slothrl.packed_batch import Pack, build_pack, pack_logprobs, rows_to_pack
from slothrl.packed_model import packed_mode, supports_packing
from slothrl.packing import MicroBatch, plan_micro_batches, useful_tokens
from slothrl.phases import BACKWARD, Phases
from slothrl.token_budget import token_budget
from slothrl.trainers.batches import Batch, whole_ids
from slothrl.trainers.policy_loss import MULTIMODAL, PolicyLoss
from slothrl.trainers.window import Part, Window


class PackedStep(PolicyLoss):
    """A mixin before TRL's trainer.

    Attributes:
        packing: how to pack, and whether.
        chosen_token_budget: tokens a micro-batch, from the first one on; in the checkpoints, so that a resumed run cuts
            as the first part did.
    """

    packing: PackingConfig
    phases: Phases
    chosen_token_budget = 0
    fullest_pack: MicroBatch | None = None  # of the latest plan: what memory held, or did not hold
    _streaming = False  # inside training_step: the backward is ours
    _micro_step = 0  # of the optimizer step
    _done_ahead = 0  # micro-steps whose work an earlier one has done

    @cached_property
    def padded_reason(self) -> str | None:
        """Why updates run over padded rows and not over packs; None where they are packed."""
        if self.packing.mode == "off":
            return "packing=off"
        if (reason := self.trl_loss_reason) is not None:
            return reason
        if self._prompt_learning:
            return "PEFT prompt learning"
        if self.args.cast_lm_head_to_fp32:
            return "cast_lm_head_to_fp32 is TRL's own"
        return supports_packing(self.accelerator.unwrap_model(self.model))

    @property
    def _prompt_learning(self) -> bool:
        return isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning

    def describe_update(self) -> str:
        """How updates run, for the plan table: packed or padded, and why."""
        if self.padded_reason is not None:
            return f"padded rows: {self.padded_reason}"
        tokens = self.micro_batch_tokens
        size = f"at most {tokens:,} tokens" if tokens else "as many tokens as memory holds"
        prompts = {"auto": "where it pays", "always": "always", "never": "never"}[self.packing.shared_prefix]
        return f"packed, {size} a micro-batch; one prompt for its completions: {prompts}"

    @property
    def micro_batch_tokens(self) -> int:
        """The budget of a packed micro-batch; 0 where updates are padded, or none has been packed yet."""
        return 0 if self.padded_reason is not None else self.packing.tokens_per_micro_batch or self.chosen_token_budget

    def _budget(self) -> int:
        if self.packing.tokens_per_micro_batch:
            return self.packing.tokens_per_micro_batch
        if not self.chosen_token_budget:
            self.chosen_token_budget = token_budget(self.model, bool(self.args.gradient_checkpointing))
        return self.chosen_token_budget

    # --- the step -----------------------------------------------------------------------------------------------

    def training_step(self, *positional, **named):
        self._streaming = True
        try:
            loss = super().training_step(*positional, **named)
        finally:
            self._streaming = False
        self._micro_step = 0 if self.accelerator.sync_gradients else self._micro_step + 1
        return loss

    def _compute_loss(self, model, inputs: dict[str, Any]) -> Tensor:
        images = any(inputs.get(name) is not None for name in MULTIMODAL)
        if images or self.trl_loss_reason is not None:
            return super()._compute_loss(model, inputs)
        if self._done_ahead:
            self._done_ahead -= 1
            return torch.zeros((), device=self.accelerator.device, requires_grad=True)
        streams = self._streaming and self.model.training
        # A loss whose backward is the caller's has to be padded: packs are left before it would come.
        if self.padded_reason is not None or not (streams or not torch.is_grad_enabled()):
            window = self._open_window([inputs])
            last = self.accelerator.sync_gradients
            losses = list(self._part_losses(window, self._padded_parts(model, window), last))
            return torch.stack(losses).sum() if losses else self._nothing()
        with packed_mode(self.accelerator.unwrap_model(model)):
            return self._stream(model, self._batches_at_hand(inputs) if streams else [inputs], streams)

    def _batches_at_hand(self, inputs: Batch) -> list[Batch]:
        """The micro-batches of this optimizer step from this one on, as far as their completions are there."""
        buffered, slices = self._buffered_inputs, self.args.steps_per_generation or 1
        if buffered is None or buffered[self._step % slices] is not inputs:
            return [inputs]
        generation = slices * self.num_iterations
        left = min(self.current_gradient_accumulation_steps - self._micro_step, generation - self._step % generation)
        return [buffered[(self._step + i) % slices] for i in range(left)]

    def _stream(self, model, batches: list[Batch], backward: bool) -> Tensor:
        """The loss of the micro-batches; with `backward` their gradients are in place, and only its value is left."""
        window = self._open_window(batches)
        if self.top_entropy_quantile < 1.0:  # the threshold needs all entropies before the first gradient
            with torch.no_grad():
                window.keep_top_entropy(self._all_entropies(model, window), self.top_entropy_quantile)
        last = self._micro_step + len(batches) >= self.current_gradient_accumulation_steps if backward else True
        total = torch.zeros((), device=window.mask.device)
        packs = self._plan(window)
        for loss in self._part_losses(window, self._packed_parts(model, window, packs), last):
            if backward:
                with self.phases.during(BACKWARD):
                    self.accelerator.backward(loss)
            total += loss.detach()
            del loss  # or its graph would be there until the next one is made
        self._done_ahead = len(batches) - 1 if backward else 0
        if backward and not packs:
            self._nothing()
        return total.requires_grad_(backward)

    def _nothing(self) -> Tensor:
        """A loss of 0, with gradients of 0 as they would have come out: moments decay and momentum goes on."""
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return torch.zeros((), device=self.accelerator.device, requires_grad=True)

    # --- parts --------------------------------------------------------------------------------------------------

    def _plan(self, window: Window) -> list[MicroBatch]:
        """The window's micro-batches, counted in the metrics."""
        counted = window.counted
        rows = rows_to_pack(window.batch["prompt_ids"], window.batch["prompt_mask"], counted)
        plan = plan_micro_batches(rows, self._budget(), self.packing.shared_prefix)
        self.fullest_pack = plan[0] if plan else None
        metrics, tokens = self._metrics[self._mode], sum(batch.tokens for batch in plan)
        metrics["packing/tokens"].append(tokens)
        metrics["packing/micro_batches"].append(len(plan))
        metrics["packing/dropped_completions"].append(len(window.kept) - len(rows))
        if tokens:
            metrics["packing/tokens_per_useful_token"].append(tokens / useful_tokens(rows))
        return plan

    def _packed_parts(self, model, window: Window, plan: list[MicroBatch]) -> Iterator[Part]:
        ids, counted = whole_ids(window.batch), window.counted
        for micro_batch in plan:
            pack = build_pack(micro_batch, ids, counted)
            yield Part(pack.rows, lambda pack=pack: self._pack_logprobs(model, pack, self._entropy_bonus_enabled))

    def _padded_parts(self, model, window: Window) -> Iterator[Part]:
        batch, rows = window.batch, window.kept.nonzero()[:, 0]
        if len(rows) == 0:
            return
        ids, mask = whole_ids(batch)[rows], torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)[rows]

        def logprobs() -> tuple[Tensor, Tensor]:
            keep = batch["completion_ids"].size(1)
            found = self._get_per_token_logps_and_entropies(model, ids, mask, keep, compute_entropy=True)
            return found[0], cast(Tensor, found[1])

        yield Part(rows, logprobs)

    def _pack_logprobs(self, model, pack: Pack, entropy_grad: bool) -> tuple[Tensor, Tensor]:
        with self.accelerator.autocast():
            logprobs, entropies = pack_logprobs(
                self.accelerator.unwrap_model(model), pack, self.temperature, entropy_grad=entropy_grad
            )
        assert entropies is not None
        return logprobs, entropies

    def _all_entropies(self, model, window: Window) -> Tensor:
        """(B, T), by a pass without gradient."""
        batch = window.batch
        prompts = batch["prompt_ids"], batch["prompt_mask"]
        return self._packed_pass(model, *prompts, whole_ids(batch), window.counted)[1]

    def _packed_pass(self, model, prompt_ids, prompt_mask, ids, counted) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies (B, T) of the counted tokens of a padded batch; without gradient."""
        plan = plan_micro_batches(
            rows_to_pack(prompt_ids, prompt_mask, counted), self._budget(), self.packing.shared_prefix
        )
        logprobs, entropies = torch.zeros(2, *counted.shape, device=ids.device).unbind()
        with packed_mode(self.accelerator.unwrap_model(model)):
            for micro_batch in plan:
                pack = build_pack(micro_batch, ids, counted)
                logprobs[pack.rows], entropies[pack.rows] = self._pack_logprobs(model, pack, entropy_grad=False)
        return logprobs, entropies

    # --- log-probs for TRL --------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *rest, **options):
        """(B, T) log-probs, (B, T) entropies or None, None: packed without gradients, over padded rows with them."""
        plain = not rest and not any(options.get(name) is not None for name in MULTIMODAL)
        if not plain or options.get("compute_aux_loss") or self._prompt_learning or self.args.cast_lm_head_to_fp32:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *rest, **options
            )
        with_entropy = options.get("compute_entropy", False)
        if not torch.is_grad_enabled() and self.padded_reason is None and not self._is_other(model):
            width = input_ids.size(1) - logits_to_keep
            prompt_ids, prompt_mask = input_ids[:, :width], attention_mask[:, :width]
            found = self._packed_pass(model, prompt_ids, prompt_mask, input_ids, attention_mask[:, width:] == 1)
            return found[0], found[1] if with_entropy else None, None
        return *self._padded_logprobs(model, input_ids, attention_mask, logits_to_keep, options, with_entropy), None

    def _is_other(self, model) -> bool:
        """A reference model of its own, which nobody has tried packs on."""
        return self.accelerator.unwrap_model(model) is not self.accelerator.unwrap_model(self.model)

    def _padded_logprobs(self, model, input_ids, attention_mask, logits_to_keep, options, with_entropy):
        rows = options.get("batch_size") or input_ids.size(0)
        parts = []
        for start in range(0, input_ids.size(0), rows):
            with self.accelerator.autocast():
                parts.append(
                    completion_logprobs(
                        self.accelerator.unwrap_model(model),
                        input_ids[start : start + rows],
                        attention_mask[start : start + rows],
                        logits_to_keep,
                        temperature=self.temperature,
                        with_entropy=with_entropy,
                        entropy_grad=with_entropy and self._entropy_bonus_enabled,
                    )
                )
        logprobs = torch.cat([part[0] for part in parts])  # (B, T)
        return logprobs, torch.cat([part[1] for part in parts]) if with_entropy else None
