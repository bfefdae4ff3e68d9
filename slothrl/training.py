"""The training part of a run: its callbacks, going on from a checkpoint, and what breaks told in words."""

from __future__ import annotations

import shutil
import sys
import time
from pathlib import Path

from rich.console import Console

from slothrl.faults import OutOfMemoryFault, divisible_tokens, explained, out_of_memory
from slothrl.fit_remedy import predicted_remedy
from slothrl.interrupts import Interrupts
from slothrl.memory_phases import phase_table
from slothrl.prepare import Prepared
from slothrl.report import write_json
from slothrl.resume import ResumePoint


def train(
    trainer,
    prepared: Prepared,
    output_dir: Path,
    point: ResumePoint | None,
    console: Console,
    interrupts: Interrupts,
    command: str,
) -> float:
    """Train to the end, or until a signal; then save the adapter. Returns the seconds.

    Args:
        point: where to go on; None: from the start.
        command: the shell command that goes on with this run, for messages.

    Raises:
        FaultError: memory, disk, numbers or the engine; the message says how to go on.
        UserError: a reward function's.
    """
    _attach(trainer, prepared, output_dir, console, interrupts, command)
    start = time.monotonic()
    try:
        if point is not None and 0 < trainer.args.max_steps <= point.step:
            _take_over(trainer, point, console)
        else:
            trainer.train(resume_from_checkpoint=str(point.path) if point else None)
        seconds = time.monotonic() - start
        _show_memory(trainer, output_dir, console)
        save_adapter(trainer, output_dir)
        return seconds
    except BaseException as error:
        interrupts.training = False
        fault = explained(error, trainer, prepared.engine.name, _advice(error, prepared, command))
        if isinstance(fault, OutOfMemoryFault):
            fault.packed = divisible_tokens(trainer)
        if fault is None:
            if _saved(output_dir) and isinstance(error, Exception):
                print(f"go on with: {command}", file=sys.stderr)
            raise
        if fault is error:
            raise
        raise fault from error


def _advice(error: BaseException, prepared: Prepared, command: str) -> str:
    """How to go on: the command; where memory ran out, the settings that are predicted to fit before it."""
    remedy = predicted_remedy(prepared.config, prepared.engine.name) if out_of_memory(error) else None
    return f"{remedy}\ngo on with: {command}" if remedy else f"go on with: {command}"


def _attach(
    trainer, prepared: Prepared, output_dir: Path, console: Console, interrupts: Interrupts, command: str
) -> None:
    from slothrl.trainers.callbacks import Interrupt, MetricsFile, Progress, Samples

    config, logger = prepared.config, prepared.config.logger
    trainer.max_nonfinite_steps = config.max_nonfinite_steps
    trainer.rollout_timeout = config.rollout.timeout
    trainer.advice = f"go on with: {command}"
    trainer.add_callback(MetricsFile(output_dir / "metrics.jsonl", trainer.phases))
    trainer.add_callback(Interrupt(interrupts))
    if logger.progress:
        trainer.add_callback(Progress())
    if not prepared.sft:
        path = output_dir / "samples.jsonl"
        trainer.add_callback(Samples(trainer, console, path, logger.samples_every, logger.samples))


def _take_over(trainer, point: ResumePoint, console: Console) -> None:
    """The checkpoint of a run that was stopped after its last step: transformers would train one more."""
    console.print(
        f"all {trainer.args.max_steps} steps are done (trainer.max_steps): nothing left to train", markup=False
    )
    trainer.take_over(point.path)


def save_adapter(trainer, output_dir: Path) -> None:
    """Save the model as `output_dir/adapter`, whole: a kill in the middle leaves the earlier one."""
    scratch, target = output_dir / ".adapter.tmp", output_dir / "adapter"
    shutil.rmtree(scratch, ignore_errors=True)
    trainer.save_model(str(scratch))
    shutil.rmtree(target, ignore_errors=True)
    scratch.rename(target)


def _show_memory(trainer, output_dir: Path, console: Console) -> None:
    """Who held what in each phase: to memory.json, and on a GPU to the console too."""
    memory = getattr(trainer, "memory", None)
    if memory is None:
        return
    memory.end()
    write_json(output_dir / "memory.json", memory.rows())
    if memory.cuda:
        console.print(f"memory by phase\n{phase_table(memory.rows())}", highlight=False)


def _saved(output_dir: Path) -> bool:
    return any(output_dir.glob("checkpoint-*"))
