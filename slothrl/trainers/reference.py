"""The reference policy of a LoRA run, refreshed now and then: TRL's `sync_ref_model`, which TRL refuses with PEFT.

Under PEFT the reference is the model with another adapter, or none. Refreshing it is copying the policy's adapter into
one named "ref", which TRL then uses for the reference by itself. TRL mixes weights, (1 - alpha) ref + alpha policy; the
mix of two LoRAs of rank r has rank 2r and is no LoRA of rank r, so only alpha = 1, the exact copy, is offered.
"""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback

REFERENCE = "ref"  # TRL's name for it


def check_refresh(args: Any) -> None:
    """Raises ValueError where the arguments ask for a mix that a LoRA cannot hold, or for nothing."""
    if args.beta == 0.0:
        raise ValueError("sync_ref_model=true needs beta above 0: without a KL term there is no reference")
    if args.ref_model_mixup_alpha != 1.0:
        raise ValueError(
            f"ref_model_mixup_alpha={args.ref_model_mixup_alpha}: a mix of two LoRAs is no LoRA of the same rank;"
            " with sync_ref_model=true set ref_model_mixup_alpha=1.0, an exact copy every ref_model_sync_steps steps"
        )


def add_reference(model: PeftModel) -> None:
    """Give the model a frozen adapter "ref" that does nothing yet: the reference is still the base."""
    if REFERENCE in model.peft_config:
        return
    active = str(model.active_adapter)
    with torch.random.fork_rng(devices=[]):  # PEFT draws initial values, which are overwritten below
        model.add_adapter(REFERENCE, model.peft_config[active])
    model.set_adapter(active)
    for name, parameter in model.named_parameters():
        if f".{REFERENCE}." in name:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.float()
            if "lora_B" in name or "lora_embedding_B" in name:
                parameter.data.zero_()


def refresh_reference(model: PeftModel) -> None:
    """Copy the active adapter into "ref", in place."""
    found = dict(model.named_parameters())
    for name, parameter in found.items():
        if f".{REFERENCE}." in name:
            parameter.data.copy_(found[name.replace(f".{REFERENCE}.", f".{model.active_adapter}.")].data)


class RefreshReference(TrainerCallback):
    """Refreshes every `args.ref_model_sync_steps` optimizer steps, as TRL's callback does."""

    def __init__(self, model: PeftModel):
        self.model = model

    def on_step_end(self, args: Any, state, control, **kwargs):
        if state.global_step % args.ref_model_sync_steps == 0:
            refresh_reference(self.model)
