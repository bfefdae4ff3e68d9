"""Out of memory, and once more: the same run from its last checkpoint in micro-batches of half the size."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slothrl.checks import set_fields
from slothrl.faults import OutOfMemoryFault
from slothrl.phases import BACKWARD, FORWARD, LOGPROBS
from slothrl.trainer_fields import trainer_fields

OF_A_MICRO_BATCH = (FORWARD, BACKWARD, LOGPROBS)  # phases that take less memory with fewer rows at a time


def halved(config: Any, packed: int = 0) -> list[str]:
    """Overrides for the same steps in micro-batches of half the size; none where they cannot be halved.

    Args:
        packed: tokens of the fullest pack where updates are packed, and TRL's rows decide nothing; 0 where padded.
    """
    if packed > 1:
        return [f"packing.tokens_per_micro_batch={packed // 2}"]
    given, fields = set_fields(config.trainer), trainer_fields(config.algo.trainer)
    rows = given.get("per_device_train_batch_size", fields["per_device_train_batch_size"].default)
    if rows < 2 or rows % 2:
        return []
    overrides = [f"trainer.per_device_train_batch_size={rows // 2}"]
    # The others count micro-batches: where they are not set they follow from the accumulation.
    accumulation = given.get("gradient_accumulation_steps", fields["gradient_accumulation_steps"].default)
    overrides.append(f"trainer.gradient_accumulation_steps={2 * accumulation}")
    if steps := given.get("steps_per_generation"):
        overrides.append(f"trainer.steps_per_generation={2 * steps}")
    return overrides


def smaller_run(config: Any, fault: OutOfMemoryFault, folder: Path, command: Sequence[str]) -> list[str]:
    """The arguments of the run that tries again; none where `retry_smaller` is off or smaller would not help.

    Args:
        folder: the run's, in which the second attempt goes on, from the start where there is no checkpoint yet.
        command: the first attempt's overrides.
    """
    overrides = halved(config, fault.packed) if config.retry_smaller and fault.phase in OF_A_MICRO_BATCH else []
    if not overrides:
        return []
    replaced = {"output_dir", "resume", "resume_changed", "retry_smaller", *(o.partition("=")[0] for o in overrides)}
    kept = [word for word in command if word.partition("=")[0].lstrip("+~") not in replaced]
    again = [f"output_dir={folder}", "resume=auto", "resume_changed=true", "retry_smaller=false"]
    return [*kept, *overrides, *again]


def start_over(arguments: Sequence[str]) -> None:
    """Become that run. A new program in this process' place: only with the old one does all of its memory go."""
    packs = [word for word in arguments if word.startswith("packing.tokens_per_micro_batch=")]
    said = " ".join(packs or [word for word in arguments if "batch_size" in word or "accumulation" in word])
    print(f"retry_smaller: once more with {said}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", "slothrl", *arguments])
