"""Supervised fine-tuning: TRL's SFTTrainer with float32 LoRA weights over a quantised base."""

from __future__ import annotations

from trl import SFTConfig
from trl import SFTTrainer as TRLSFTTrainer

from slothrl.trainers.adapters import adapter_values, restore_float32_adapter
from slothrl.trainers.checkpoints import ExactCheckpoints
from slothrl.trainers.guards import Guards
from slothrl.trainers.optimizing import FewLaunches


class SFTTrainer(Guards, ExactCheckpoints, FewLaunches, TRLSFTTrainer):
    """Takes TRL's arguments. Packing, assistant-only loss and the logits-free loss are TRL's, which are exact."""

    def __init__(self, model, args: SFTConfig | None = None, *positional, **named):
        before = adapter_values(model)
        super().__init__(model, args, *positional, **named)
        restore_float32_adapter(self.model, before)
