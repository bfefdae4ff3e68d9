"""The largest micro-batch of an update: padded rows, or the fullest of the packs that the planner itself would make."""

from __future__ import annotations

from functools import lru_cache
from types import SimpleNamespace
from typing import TYPE_CHECKING

from slothrl.fit_activations import MicroBatch, attention_numbers, rest_numbers, whole_layers
from slothrl.fit_shape import Shape
from slothrl.kept_attention import (
    KEEPING,
    AttentionSizes,
    in_host,
    layers_on_a_cpu,
    layers_that_keep,
    reserved_bytes,
)
from slothrl.packing import Row, plan_micro_batches
from slothrl.token_budget import CPU_TOKENS
from slothrl.token_bytes import bytes_per_token, left_beside, left_of_light, tokens_that_fit

if TYPE_CHECKING:
    from slothrl.fit_memory import Settings

NO_LIMIT = 1 << 40  # tokens: everything in one micro-batch


def micro_batch(shape: Shape, settings: Settings, free: int) -> MicroBatch:
    """What the fullest forward and backward of an optimizer step goes over.

    Padded: `rows` sequences of full length under a mask. Packed: completions of full length through
    `slothrl.packing.plan_micro_batches`, prompts shared as there, by `budget` tokens: no padding and no mask, and the
    rows of TRL's micro-batches do not matter.

    Args:
        free: bytes that the trainer finds free when it chooses its budget.
    """
    if not settings.packs:
        # A single row of SFT has nothing to be padded to.
        masked = settings.generates or settings.rows > 1
        kept = settings.completion if settings.generates else settings.length
        return MicroBatch.padded(settings.rows, settings.length, kept, masked)
    limit = budget(shape, settings, free)
    return _fullest_pack(
        settings.completions, settings.group, settings.prompt, settings.completion, limit, settings.shared_prefix
    )


@lru_cache(maxsize=4096)  # searches over cards ask for the same ones
def _fullest_pack(
    completions: int, group: int, prompt: int, completion: int, limit: int, shared_prefix: str
) -> MicroBatch:
    rows = [Row(index, index // group, max(prompt, 1), max(completion, 1)) for index in range(completions)]
    fullest = plan_micro_batches(rows, limit, shared_prefix)[0]
    return MicroBatch(fullest.tokens, sum(row.completion for row in fullest.rows), mask_cells=0)


def budget(shape: Shape, settings: Settings, free: int) -> int:
    """Tokens a packed micro-batch may have: as asked for, or as `slothrl.token_budget` chooses with `free` bytes."""
    if settings.tokens:
        return settings.tokens
    if not settings.cuda:
        return CPU_TOKENS
    config = text_config(shape)
    tokens = tokens_that_fit(free, config, settings.checkpointing)
    if not settings.checkpointing:
        return tokens
    each = bytes_per_token(config, 2, checkpointing=True)
    given = (each, settings.within, left_beside(free, config, 0))
    kept = reserved_bytes(settings.activations, sizes(shape, settings), tokens, free, *given)
    return tokens_that_fit(free, config, True, kept)


def keeping_layers(shape: Shape, batch: MicroBatch, settings: Settings, free: int) -> tuple[int, int]:
    """Layers that keep all, and others that keep their attention, in the forward of `batch`, as `slothrl.activations`
    decides it.

    Args:
        free: as in `micro_batch`.
    """
    policy, within = settings.activations, settings.within
    if not settings.checkpointing or (policy not in KEEPING and within is None):
        return 0, 0
    config, found = text_config(shape), sizes(shape, settings)
    if not settings.cuda:
        return layers_on_a_cpu(policy, found, batch.tokens, within)
    left, light = left_beside(free, config, batch.tokens), left_of_light(config, batch.tokens)
    given = (policy, found, batch.tokens, settings.length, free, left, light)
    whole, attending = layers_that_keep(*given, within=within)
    return whole, min(2, shape.layers - whole) if in_host(policy, found) else attending  # on the device at a time


def sizes(shape: Shape, settings: Settings) -> AttentionSizes:
    """What decides how many they are."""
    weights, numbers = shape.packed // shape.layers, attention_numbers(shape, settings.fused)
    whole = whole_layers(shape, settings.fused)
    rest = rest_numbers(shape) if whole else 0
    return AttentionSizes(shape.layers, shape.query, shape.heads, weights, numbers, whole, rest, shape.hidden)


def text_config(shape: Shape) -> SimpleNamespace:
    """The fields of a transformers config that `slothrl.token_bytes` reads."""
    return SimpleNamespace(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.mlp,
        vocab_size=shape.vocabulary,
    )
