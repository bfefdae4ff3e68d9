"""What a person sees and keeps while a run goes on: progress, metrics, samples, a clean stop."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from tqdm.auto import tqdm
from transformers import TrainerCallback

from slothrl.interrupts import Interrupts
from slothrl.memory_phases import memory_in_use
from slothrl.phases import Phases
from slothrl.report import append_jsonl, last_text, read_jsonl, show_samples

SHOWN = {"reward": "reward", "loss": "loss", "kl": "kl", "completions/mean_length": "length"}


class Progress(TrainerCallback):
    """One bar over the optimizer steps with the latest figures behind it."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", dynamic_ncols=True)

    def on_step_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs):
        shown = {SHOWN[k]: f"{v:.3g}" for k, v in (logs or {}).items() if k in SHOWN and isinstance(v, (int, float))}
        if self.bar is not None and shown:
            self.bar.set_postfix(shown)

    def on_train_end(self, args, state, control, **kwargs):
        if self.bar is not None:
            self.bar.close()


class MetricsFile(TrainerCallback):
    """Every log of the trainer as a line of metrics.jsonl, with its step, the seconds of training so far and memory.

    Args:
        phases: of the trainer; the seconds in each since the last log are `time/<phase>`.
    """

    def __init__(self, path: Path, phases: Phases):
        self.path, self.phases = path, phases
        before = read_jsonl(path)  # of the parts of the run that are over
        self.start = time.monotonic() - (before[-1]["seconds"] if before else 0.0)

    def on_train_begin(self, args, state, control, **kwargs):
        self.phases.take_seconds()  # loading and the first score are no step's

    def on_log(self, args, state, control, logs: dict[str, Any] | None = None, **kwargs):
        elapsed = round(time.monotonic() - self.start, 3)
        times = {f"time/{name}": round(seconds, 4) for name, seconds in self.phases.take_seconds().items()}
        record = {"step": state.global_step, "seconds": elapsed, **(logs or {}), **times, **memory_in_use()}
        append_jsonl(self.path, record)


class Samples(TrainerCallback):
    """Now and then a table of the latest completions with their rewards; all shown ones go to samples.jsonl.

    Args:
        trainer: a GRPO trainer, whose log of prompts and completions this reads.
        every: steps between tables; the first is after step 1.
        count: rows a table.
    """

    def __init__(self, trainer, console: Console, path: Path, every: int, count: int):
        self.trainer, self.console, self.path, self.every, self.count = trainer, console, path, every, count

    def on_step_end(self, args, state, control, **kwargs):
        if self.count and (state.global_step == 1 or state.global_step % self.every == 0):
            rows = self.rows()
            show_samples(self.console, state.global_step, rows)
            for row in rows:
                append_jsonl(self.path, {"step": state.global_step, **row})

    def rows(self) -> list[dict[str, Any]]:
        logs = self.trainer._logs
        total = len(logs["prompt"])
        # Spread over the batch: neighbours are completions of one prompt.
        picked = [i * total // self.count for i in range(min(self.count, total))]
        return [
            {
                "prompt": last_text(logs["prompt"][i]),
                "completion": last_text(logs["completion"][i]),
                "rewards": {name: _number(values[i]) for name, values in logs["rewards"].items()},
                "advantage": logs["advantages"][i],
            }
            for i in picked
        ]


def _number(value: float) -> float | None:
    return None if math.isnan(value) else value


class Interrupt(TrainerCallback):
    """Ends training after the step in which a signal came, with a checkpoint.

    Args:
        interrupts: what handles the signals.
    """

    def __init__(self, interrupts: Interrupts):
        self.interrupts = interrupts

    def on_train_begin(self, args, state, control, **kwargs):
        self.interrupts.training = True

    def on_step_end(self, args, state, control, **kwargs):
        if self.interrupts.number:
            control.should_save = True
            control.should_training_stop = True
        return control

    def on_train_end(self, args, state, control, **kwargs):
        self.interrupts.training = False
