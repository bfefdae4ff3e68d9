"""How many bytes a micro-batch takes by its tokens, about, and how many tokens fit into so many bytes: arithmetic."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

TO_COME = 3  # times a trained parameter's bytes: its gradient and AdamW's two moments, not there before the first step
# A pass over an 8B base's weights is 1.5% of a micro-batch of this size already, and its activations take 14 GB: a
# completion of 20,480 tokens fits in, and the step still stays under 16 GB beyond the base.
MOST_TOKENS = 24_576
LEAST_TOKENS = 1024
# What is only convenient ends where a micro-batch takes as much as one of so many tokens: 11 GB of an 8B model.
LIGHT_TOKENS = 20_480
USABLE = 0.8  # of what is free: an allocator's reserve, measured at 10 to 13% of what is allocated, and workspaces
LOGITS = 224 << 20  # bytes of logits that exist at once: with 8,192 tokens' slopes of an 8B model 260 to 295 MiB


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


def tokens_that_fit(free: int, config: Any, checkpointing: bool, kept: int = 0) -> int:
    """Tokens for `free` bytes, between `LEAST_TOKENS` and `MOST_TOKENS`; 16-bit activations.

    Args:
        kept: bytes a token that checkpointed layers keep beside their inputs (`slothrl.activations`).
    """
    tokens = int((USABLE * free - _logits(config)) / (bytes_per_token(config, 2, checkpointing) + kept))
    return max(LEAST_TOKENS, min(MOST_TOKENS, tokens // 1024 * 1024))


def left_beside(free: int, config: Any, tokens: int) -> int:
    """Bytes that a checkpointed micro-batch of `tokens` leaves of those that `tokens_that_fit` would count on."""
    return max(0, int(USABLE * free) - _logits(config) - tokens * bytes_per_token(config, 2, checkpointing=True))


def left_of_light(config: Any, tokens: int) -> int:
    """Bytes by which a checkpointed micro-batch of `tokens` is smaller than one of `LIGHT_TOKENS`."""
    return max(0, LIGHT_TOKENS - tokens) * bytes_per_token(config, 2, checkpointing=True)


def bytes_to_come(parameters: Iterable[Any]) -> int:
    """What a first optimizer step will add and keep: 3 times the trained parameters that have no gradient yet."""
    return TO_COME * sum(p.nbytes for p in parameters if p.requires_grad and p.grad is None)


def logit_rows(vocabulary: int, width: int = 2) -> int:
    """Tokens whose logits exist at once, of `width` bytes an entry: as many as `LOGITS` hold, in steps of 256.

    At least 512: fewer would read the head from memory longer than multiply by it. At most 1,024: more gain nothing.
    """
    return max(512, min(1024, LOGITS // (vocabulary * width) // 256 * 256))


def _logits(config: Any) -> int:
    # A chunk in 16 bits, and float32 beside it.
    return logit_rows(config.vocab_size) * config.vocab_size * 8
