"""What would fit: the longest context, the largest batch, and settings that are smaller than those asked for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from slothrl.fit_batch import NO_LIMIT
from slothrl.fit_memory import Settings, fits, host_embeddings, largest_micro_batch
from slothrl.fit_shape import Shape

LONGEST, MOST_ROWS = 1 << 22, 1 << 12  # where the searches end


def largest(holds: Callable[[int], bool], limit: int) -> int:
    """The largest number up to `limit` for which `holds`; 0 where it does not for 1. `holds` must be monotone."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low


def longest_context(shape: Shape, settings: Settings, total: int) -> int:
    """The most tokens a sequence can have, prompt included, alone in its micro-batch; 0: none fits.

    The prompt keeps its length and the completion grows; below the prompt's own length both are cut.
    """
    settings = replace(settings, rows=1, completions=1, tokens=NO_LIMIT)

    def holds(length: int) -> bool:
        prompt = min(settings.prompt, length - 1)
        return fits(shape, replace(settings, prompt=prompt, completion=length - prompt), total)

    return largest(holds, LONGEST)


def largest_batch(shape: Shape, settings: Settings, total: int) -> int:
    """The most sequences a micro-batch can have at the length of `settings`; 0: not one."""
    settings = replace(settings, tokens=NO_LIMIT)
    return largest(lambda rows: fits(shape, replace(settings, rows=rows, completions=rows), total), MOST_ROWS)


def largest_budget(shape: Shape, settings: Settings, total: int) -> int:
    """The most tokens a packed micro-batch can have, in steps of 1,024; 0: not even those. The optimizer step is taken
    for as large as that needs."""

    def holds(parts: int) -> bool:
        tokens = 1024 * parts
        whole = replace(settings, tokens=tokens, completions=max(1, tokens // max(settings.completion - 1, 1)))
        return fits(shape, whole, total)

    return 1024 * largest(holds, LONGEST // 1024)


@dataclass(frozen=True)
class Change:
    """Settings that fit, and the overrides that make them."""

    settings: Settings
    overrides: tuple[str, ...]


def smaller(shape: Shape, settings: Settings, total: int, accumulation: int = 1) -> Change | None:
    """The nearest settings that fit, tried in the order in which they cost least; None where none does.

    First what changes nothing but time: vLLM's cache freed while the trainer works, embeddings in the host's memory,
    activations computed again, smaller micro-batches. Then vLLM's share of the device, which changes the speed of
    rollouts. Last the completions' length.

    Args:
        accumulation: gradient_accumulation_steps, which grows as the micro-batch shrinks.
    """
    found = Change(settings, ())
    if settings.uses_vllm and not settings.sleep:
        found = Change(replace(found.settings, sleep=True), (*found.overrides, "rollout.sleep=true"))
    elsewhere = replace(found.settings, embeddings="host")
    if host_embeddings(shape, elsewhere) > host_embeddings(shape, settings) and not fits(shape, found.settings, total):
        found = Change(elsewhere, (*found.overrides, "model.embeddings=host"))
    if not settings.checkpointing and not fits(shape, found.settings, total):
        overrides = (*found.overrides, "trainer.gradient_checkpointing=true")
        found = Change(replace(found.settings, checkpointing=True), overrides)
    smaller_ones = _packs(shape, found, total) if settings.packs else _micro_batches(found, accumulation)
    for change in (found, *smaller_ones):
        for shared in _shares(change):
            if fits(shape, shared.settings, total):
                return shared
    return _shorter(shape, (found, *smaller_ones)[-1], total)


def _packs(shape: Shape, change: Change, total: int) -> list[Change]:
    """The same step in packs of ever fewer tokens, down to one sequence."""
    tokens, found = largest_micro_batch(shape, change.settings, total).tokens, []
    while tokens > change.settings.length:
        tokens = max(tokens // 2 // 64 * 64, change.settings.length)
        override = f"packing.tokens_per_micro_batch={tokens}"
        found.append(Change(replace(change.settings, tokens=tokens), (*change.overrides, override)))
    return found


def _micro_batches(change: Change, accumulation: int) -> list[Change]:
    """The same step in ever smaller micro-batches."""
    rows, found = change.settings.rows, []
    while rows % 2 == 0:
        rows //= 2
        accumulation *= 2
        batch = (f"trainer.per_device_train_batch_size={rows}", f"trainer.gradient_accumulation_steps={accumulation}")
        found.append(Change(replace(change.settings, rows=rows), (*change.overrides, *batch)))
    return found


def _shares(change: Change) -> list[Change]:
    """vLLM's share as it is, lower in steps of 5 %, and higher."""
    settings, found = change.settings, [change]
    if not settings.uses_vllm or settings.cache is not None or not settings.cuda:
        return found
    steps = [round(0.05 * step, 2) for step in range(2, 19)]  # 0.1 to 0.9
    below = sorted((share for share in steps if share < settings.utilization), reverse=True)
    for share in (*below, *(share for share in steps if share > settings.utilization)):
        override = f"rollout.gpu_memory_utilization={share:g}"
        found.append(Change(replace(settings, utilization=share), (*change.overrides, override)))
    return found


def _shorter(shape: Shape, change: Change, total: int) -> Change | None:
    """Completions (SFT: sequences) cut to what fits, in steps of 64 tokens."""
    settings = change.settings
    best: Change | None = None
    for shared in _shares(change):
        found = _cut(shape, shared, total)
        if found and (best is None or found.settings.completion > best.settings.completion):
            best = found
    return best if best and best.settings.completion < settings.completion else None


def _cut(shape: Shape, change: Change, total: int) -> Change | None:
    settings = change.settings
    parts = largest(
        lambda part: fits(shape, replace(settings, completion=64 * part), total), max(settings.completion - 1, 0) // 64
    )
    if not parts:
        return None
    name = "max_completion_length" if settings.trainer == "grpo" else "max_length"
    return Change(replace(settings, completion=64 * parts), (*change.overrides, f"trainer.{name}={64 * parts}"))
