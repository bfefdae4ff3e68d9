"""What to say when training breaks: which phase ran out of memory, what was held there, and what would help."""

from __future__ import annotations

import re
from typing import Any

import torch

from slothrl.checkpoint import NO_ROOM, DiskFullError
from slothrl.errors import FaultError, UserError
from slothrl.memory import measure
from slothrl.phases import BACKWARD, ENGINE, FORWARD, LOGPROBS, OPTIMIZER
from slothrl.plan import size

_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|cannot allocate memory|failed to allocate", re.IGNORECASE)


class OutOfMemoryFault(FaultError):  # noqa: N818 - the house word for what ends a run
    """The device or the machine had no memory left.

    Attributes:
        phase: in which it happened (`slothrl.phases`).
        packed: tokens of the micro-batch where updates are packed and it could be smaller; 0 elsewhere.
    """

    def __init__(self, message: str, phase: str, packed: int = 0):
        super().__init__(message)
        self.phase, self.packed = phase, packed


class EngineFault(FaultError):  # noqa: N818
    """What generates completions failed in the middle of the run."""


def explained(error: BaseException, trainer: Any, engine: str, advice: str) -> FaultError | None:
    """The fault behind an exception from `trainer.train()`, in words; None where it is none of those known here.

    Args:
        trainer: one of slothrl's, with `phases`, `model`, `optimizer` and `args`.
        engine: "vllm" or "transformers".
        advice: how to go on: the last sentence.
    """
    if isinstance(error, FaultError):
        error.args = (f"{error}\n{advice}",)
        return error
    if isinstance(error, UserError) or not isinstance(error, Exception):
        return None
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return DiskFullError(f"disk full while writing {error.filename or 'the logs'}: free some space\n{advice}")
    phase = trainer.phases.current
    if out_of_memory(error):
        return OutOfMemoryFault(f"{_memory_report(error, trainer, engine, phase)}\n{advice}", phase)
    if phase in ENGINE and engine != "transformers":
        return EngineFault(f"the engine ({engine}) failed: {type(error).__name__}: {_first_line(error)}\n{advice}")
    return None


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on a GPU or in the process."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and _NO_MEMORY.search(str(error)) is not None


def divisible_tokens(trainer: Any) -> int:
    """Tokens of the fullest pack of the latest update; 0 where updates are padded, or it is one completion."""
    pack = getattr(trainer, "fullest_pack", None)
    return pack.tokens if pack is not None and len(pack.rows) > 1 else 0


def _memory_report(error: BaseException, trainer: Any, engine: str, phase: str) -> str:
    optimizer = trainer.optimizer
    held = measure(trainer.model, getattr(optimizer, "optimizer", optimizer))
    lines = [f"out of memory in the {phase} phase of step {trainer.state.global_step + 1}: {_first_line(error)}"]
    lines += ["held at that moment:"]
    lines += [f"  {holding.name}: {size(holding.bytes)} ({holding.detail})" for holding in held]
    lines += ["either would help:"]
    lines += [f"  {setting}" for setting in remedies(phase, trainer.args, engine, divisible_tokens(trainer))[:2]]
    return "\n".join(lines)


def remedies(phase: str, args: Any, engine: str, packed: int = 0) -> list[str]:
    """Settings that lower the memory of `phase`, the most helpful first, with values that follow from `args`.

    Args:
        args: TRL's config of the run.
        packed: tokens of a micro-batch where updates are packed; 0 where they are padded.
    """
    micro_batch = _fewer_tokens(packed) if packed else _smaller_micro_batch(args)
    shorter = _shorter(args)
    if phase in ENGINE and engine == "vllm":
        first = ["rollout.gpu_memory_utilization=… lower: vLLM's share leaves too little for the rest", shorter]
    elif phase in ENGINE:
        first = [shorter, _smaller_generation(args), micro_batch]
    elif phase == OPTIMIZER:
        first = [_setting(args, "optim", "adamw_8bit", "a quarter of the optimizer state"), micro_batch]
    elif phase in (FORWARD, BACKWARD, LOGPROBS):
        kept = _setting(args, "gradient_checkpointing", True, "activations are computed again in the backward")
        first = [kept, micro_batch, shorter]
    else:
        first = [micro_batch, shorter]
    if engine == "vllm":
        first.append("rollout.gpu_memory_utilization=… lower")
    first.append("model.lora.r=… lower (a new run: the LoRA's shape changes)")
    return [remedy for remedy in first if remedy]


def _setting(args: Any, name: str, value: Any, why: str) -> str:
    now = getattr(args, name, None)
    current = getattr(now, "value", now)  # an enum's
    return "" if current == value else f"trainer.{name}={str(value).lower()} (now {current}): {why}"


def _fewer_tokens(tokens: int) -> str:
    fewer = max(1, tokens // 2)
    return f"packing.tokens_per_micro_batch={fewer} (now {tokens}): the same step in smaller micro-batches"


def _smaller_micro_batch(args: Any) -> str:
    rows, accumulated = args.per_device_train_batch_size, args.gradient_accumulation_steps
    if rows < 2:
        return ""
    return (
        f"trainer.per_device_train_batch_size={rows // 2} trainer.gradient_accumulation_steps={accumulated * 2}"
        f" resume_changed=true (now {rows} x {accumulated}): the same step in smaller micro-batches"
    )


def _shorter(args: Any) -> str:
    name = "max_completion_length" if hasattr(args, "max_completion_length") else "max_length"
    length = getattr(args, name, None)
    return f"trainer.{name}={length // 2} (now {length}): shorter sequences" if length and length > 1 else ""


def _smaller_generation(args: Any) -> str:
    steps = getattr(args, "steps_per_generation", 1) or 1
    if steps < 2:
        return ""
    return f"trainer.steps_per_generation={steps // 2} (now {steps}) resume_changed=true: fewer completions at once"


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
