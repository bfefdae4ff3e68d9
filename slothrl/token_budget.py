"""How many tokens a micro-batch may have: from free memory and the model's shape."""

from __future__ import annotations

from typing import Any

from torch import nn

from slothrl.activations import free_bytes, reserved_for_attention
from slothrl.graphs import pool_bytes
from slothrl.token_bytes import bytes_to_come, tokens_that_fit

CPU_TOKENS = 4096  # a forward's fixed costs are gone there, and a small machine still has the memory


def token_budget(model: nn.Module, checkpointing: bool) -> int:
    """Tokens a micro-batch: a fixed number on a CPU; on a GPU what its free memory holds, a multiple of 1,024.

    Args:
        model: where it will be trained, with everything else that stays in memory already there.
        checkpointing: as in `bytes_per_token`.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        return CPU_TOKENS
    free = free_bytes(device) - bytes_to_come(model.parameters()) - pool_bytes(model)
    config: Any = model.config
    config = config.get_text_config()
    tokens = tokens_that_fit(free, config, checkpointing)
    kept = reserved_for_attention(model, tokens, free) if checkpointing else 0
    return tokens_that_fit(free, config, checkpointing, kept)
