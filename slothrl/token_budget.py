"""How many tokens a micro-batch may have: from free memory and the model's shape."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from slothrl.activations import attention_bytes
from slothrl.graphs import pool_bytes

CPU_TOKENS = 4096  # a forward's fixed costs are gone there, and a small machine still has the memory
# A pass over an 8B base's weights is 1.5% of a micro-batch of this size already, and its activations take 14 GB: a
# completion of 20,480 tokens fits in, and the step still stays under 16 GB beyond the base.
MOST_TOKENS = 24_576
LEAST_TOKENS = 1024
USABLE = 0.8  # of what is free: an allocator's reserve, measured at 10 to 13% of what is allocated, and workspaces
TO_COME = 3  # times a trained parameter's bytes: its gradient and AdamW's two moments, not there before the first step
HEAD_ROWS = 1024  # tokens whose logits exist at once (`selective_logprobs`)


def bytes_per_token(config: Any, element_size: int, checkpointing: bool) -> int:
    """What one more token in a micro-batch keeps alive at the fullest moment of its backward, about.

    Counted for a decoder layer: its input; two normed inputs and two sums; q, k, v with their gradients and the
    attention's output; gate, up, their product and one gradient in the MLP. With checkpointing all layers keep their
    input and one has the rest; without it all have all. 8B in 16 bits: 0.26 + 0.27 MB with checkpointing.

    Measured (H100, 8B, packed, fused layers, checkpointing, a micro-batch of 17,376 tokens): 10.6 GB beyond the base,
    of which 0.6 are gradients, optimizer and 16-bit copies of the LoRA: 0.576 MB a token, where this says 0.557.

    Args:
        config: a transformers text config.
        element_size: bytes of an activation.
        checkpointing: whether layers are computed again in the backward.
    """
    hidden, layers = config.hidden_size, config.num_hidden_layers
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or hidden // heads
    queries, keys = heads * width, (getattr(config, "num_key_value_heads", None) or heads) * width
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    layer = 4 * hidden + 2 * (queries + 2 * keys) + queries + 4 * inner
    # Half as much again for LoRA's own products and for float32 copies inside norms and rotations.
    layer = layer * 3 // 2
    head = 3 * hidden  # gathered states, their slope, its gradient
    kept = layers * hidden + layer if checkpointing else layers * layer
    return (kept + head) * element_size


def token_budget(model: nn.Module, checkpointing: bool) -> int:
    """Tokens a micro-batch: a fixed number on a CPU; on a GPU what its free memory holds, a multiple of 1,024.

    Args:
        model: where it will be trained, with everything else that stays in memory already there.
        checkpointing: as in `bytes_per_token`.
    """
    device = next(model.parameters()).device
    if device.type != "cuda":
        return CPU_TOKENS
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device) - pool_bytes(model)
    config: Any = model.config
    free, config = free - bytes_to_come(model), config.get_text_config()
    tokens = tokens_that_fit(free, config, checkpointing)
    # Without the room for them, attention outputs would be kept in memory that the budget counts on.
    kept = attention_bytes(model, tokens) if checkpointing else 0
    return tokens_that_fit(free, config, checkpointing, kept)


def bytes_to_come(model: nn.Module) -> int:
    """What a first optimizer step will add and keep: 3 times the trained parameters that have no gradient yet."""
    return TO_COME * sum(p.nbytes for p in model.parameters() if p.requires_grad and p.grad is None)


def tokens_that_fit(free: int, config: Any, checkpointing: bool, kept: int = 0) -> int:
    """Tokens for `free` bytes, between `LEAST_TOKENS` and `MOST_TOKENS`; 16-bit activations.

    Args:
        kept: bytes a token that checkpointed layers keep beside their inputs (`slothrl.activations`).
    """
    logits = HEAD_ROWS * config.vocab_size * 8  # a chunk in 16 bits, and float32 beside it
    tokens = int((USABLE * free - logits) / (bytes_per_token(config, 2, checkpointing) + kept))
    return max(LEAST_TOKENS, min(MOST_TOKENS, tokens // 1024 * 1024))
