"""What both trainers do to a LoRA adapter around TRL's own set-up."""

from __future__ import annotations

import torch
from peft import PeftModel


def adapter_values(model) -> dict[str, torch.Tensor]:
    """The trainable tensors of a PEFT model as they are now, by name; empty for anything else."""
    if not isinstance(model, PeftModel):
        return {}
    return {name: parameter.data for name, parameter in model.named_parameters() if parameter.requires_grad}


def restore_float32_adapter(model, before: dict[str, torch.Tensor]) -> None:
    """Keep LoRA weights in float32 over a quantised base, where TRL casts them to bf16.

    In bf16 an update under 1/256 of a weight is lost: with entries of A near 0.01 that is every Adam step at a learning
    rate of 1e-5. PEFT's own default is float32, and the forward still computes in bf16 under autocast.

    Args:
        model: the model after TRL's `__init__`.
        before: `adapter_values` from before it, whose tensors come back exactly.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32 and "lora_" in name:
            kept = before.get(name)
            parameter.data = kept if kept is not None and kept.dtype == torch.float32 else parameter.data.float()
