"""The optimizer that both trainers step: transformers' choice, with bitsandbytes' 8-bit AdamW in few launches."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer


class FewLaunches(Trainer):
    """A mixin before one of TRL's trainers: `optim="adamw_8bit"` (or adamw_bnb_8bit) becomes `FlatAdamW8bit`.

    Same updates, state and checkpoints. An optimizer that the caller gave, and one whose parameters DeepSpeed or FSDP
    splits, stay as they are.
    """

    optimizer: Any

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        given, made = self.optimizer, super().create_optimizer(model)
        if given is None and not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            self.optimizer = made = _in_few_launches(made)
        return made


def _in_few_launches(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    if not type(optimizer).__module__.startswith("bitsandbytes."):  # which is imported where it is used only
        return optimizer
    from slothrl.flat_adamw import in_few_launches

    return in_few_launches(optimizer)
