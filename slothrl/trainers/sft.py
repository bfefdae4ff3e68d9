"""Supervised fine-tuning: TRL's SFTTrainer with float32 LoRA weights over a quantised base, and slothrl's head."""

from __future__ import annotations

from typing import Any

import torch
from trl import SFTConfig
from trl import SFTTrainer as TRLSFTTrainer

from slothrl.label_scores import LabelScores, label_scores, why_no_label_scores
from slothrl.logprobs import head_spec
from slothrl.token_bytes import logit_rows
from slothrl.trainers.adapters import adapter_values, restore_float32_adapter
from slothrl.trainers.checkpoints import ExactCheckpoints
from slothrl.trainers.guards import Guards
from slothrl.trainers.optimizing import FewLaunches

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class SFTTrainer(Guards, ExactCheckpoints, FewLaunches, TRLSFTTrainer):
    """Takes TRL's arguments. Packing, masks, what the loss makes of log-probs and metrics are TRL's, which are exact;
    the log-probs come from slothrl's frozen head (`slothrl.logprobs`), or from TRL's (`trl_head_reason`)."""

    def __init__(self, model, args: SFTConfig | None = None, *positional, **named):
        before = adapter_values(model)
        super().__init__(model, args, *positional, **named)
        restore_float32_adapter(self.model, before)

    @property
    def trl_head_reason(self) -> str | None:
        """Why TRL's own head runs and not slothrl's; None where ours does."""
        if self.accelerator.num_processes > 1 or self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return "more than one process, DeepSpeed or FSDP"
        if self.aux_loss_enabled:
            return "the auxiliary loss of a mixture of experts"
        if self.compute_loss_func is not None or self.label_smoother is not None:
            return "the loss asks for whole logits (label smoothing, compute_loss_func)"
        if self.args.torch_compile:
            return "torch_compile compiles the model's own forward"
        model: Any = self.model
        return why_no_label_scores(model, _AUTOCAST.get(str(self.accelerator.mixed_precision)))

    def describe_head(self) -> str:
        """Which head gives the loss its log-probs, for the plan table, and why it is not ours."""
        if self.trl_head_reason is not None:
            return f"TRL's: {self.trl_head_reason}"
        model: Any = self.model
        weight = head_spec(model).weight
        rows = logit_rows(weight.size(0), weight.element_size())
        return f"slothrl's: gradient written in the forward, {rows:,} tokens' logits at once"

    def compute_loss(self, model, inputs, *positional, **named):
        scored = model if self.trl_head_reason is not None else _Scored(self, model)
        return super().compute_loss(scored, inputs, *positional, **named)


class _Scored:
    """What TRL's loss calls in place of the model: asked for fused outputs it gives `LabelScores`, else the model's."""

    def __init__(self, trainer: SFTTrainer, model: Any) -> None:
        self.trainer, self.model = trainer, model

    def __call__(self, fused_lm_head: bool = False, **inputs: Any) -> LabelScores | Any:
        if not fused_lm_head:
            return self.model(**inputs)
        labels, accelerator = inputs.pop("labels"), self.trainer.accelerator
        with accelerator.autocast():
            return label_scores(accelerator.unwrap_model(self.model), labels, inputs)
