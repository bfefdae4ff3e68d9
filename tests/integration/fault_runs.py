"""Runs that a signal or a hung engine ends: `python -m tests.integration.fault_runs FOLDER override…`.

Imports once and forks for each; prints one line of JSON with exit codes and what was printed.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.integration.killed_runs import begin, end, load


def wait_for(path: Path, count: int) -> None:
    """Until a file has so many lines."""
    deadline = time.monotonic() + 120
    while not path.exists() or path.read_text().count("\n") < count:
        assert time.monotonic() < deadline, f"no {count} lines in {path}"
        time.sleep(0.02)


def signalled(folder: Path, overrides: list[str], number: int, times: int) -> dict:
    run = folder / f"run-{number}-{times}"
    slow = ["trainer.max_completion_length=200", "trainer.per_device_train_batch_size=32"] if times > 1 else []
    child = begin([*overrides, *slow, f"output_dir={run}", "trainer.save_steps=2"], run.with_suffix(".txt"))
    wait_for(run / "metrics.jsonl", 3)
    for _ in range(times):
        os.kill(child, number)
        time.sleep(0.05)  # two at once would count as one
    return {"code": end(child), "printed": run.with_suffix(".txt").read_text(), "run": str(run)}


def hung(folder: Path, overrides: list[str], name: str, hang: Callable[[int], object]) -> dict:
    """An engine whose third generation never comes back."""
    from slothrl.engine import TransformersEngine

    generate, calls = TransformersEngine.generate, []

    def hanging(self, *arguments):
        calls.append(1)
        if len(calls) == 4:  # the first one is for the held-out score
            hang(600)
        return generate(self, *arguments)

    TransformersEngine.generate = hanging
    run, start = folder / name, time.monotonic()
    arguments = [*overrides, f"output_dir={run}", "trainer.save_steps=1", "rollout.timeout=2"]
    code = end(begin(arguments, run.with_suffix(".txt")))
    TransformersEngine.generate = generate
    seconds = time.monotonic() - start
    stacks = (run / "hang.txt").read_text()
    printed = run.with_suffix(".txt").read_text()
    return {"code": code, "printed": printed, "seconds": seconds, "stacks": stacks, "run": str(run)}


def hung_score(folder: Path, overrides: list[str]) -> dict:
    """An engine that never comes back from the held-out prompts."""
    from slothrl.engine import TransformersEngine

    generate = TransformersEngine.generate
    TransformersEngine.generate = lambda *_: time.sleep(600)
    run = folder / "hung-score"
    code = end(begin([*overrides, f"output_dir={run}", "rollout.timeout=1"], run.with_suffix(".txt")))
    TransformersEngine.generate = generate
    stacks = (run / "hang.txt").read_text()
    return {"code": code, "printed": run.with_suffix(".txt").read_text(), "stacks": stacks, "run": str(run)}


def hungry(folder: Path, overrides: list[str]) -> dict:
    """No memory in the third step's forward; the program that takes over is a healthy one."""
    import torch

    from slothrl.trainers.grpo import GRPOTrainer

    compute, calls = GRPOTrainer._compute_loss, []

    def hungry_loss(self, *arguments):
        calls.append(1)
        return torch.empty(1 << 44) if len(calls) == 3 else compute(self, *arguments)

    GRPOTrainer._compute_loss = hungry_loss
    run = folder / "hungry"
    short = ["trainer.max_steps=4", "trainer.save_steps=1", "retry_smaller=true"]
    code = end(begin([*overrides, *short, f"output_dir={run}"], run.with_suffix(".txt")))
    GRPOTrainer._compute_loss = compute
    return {"code": code, "printed": run.with_suffix(".txt").read_text(), "run": str(run)}


def again(found: dict) -> int:
    """Go on with a run; the exit code."""
    run = Path(found["run"])
    return end(begin([f"resume={run}", "trainer.max_steps=4", "rollout.timeout=100"], run.with_suffix(".txt")))


def main(folder: Path, overrides: list[str]) -> dict:
    load()
    found = {
        "term": signalled(folder, overrides, signal.SIGTERM, 1),
        "twice": signalled(folder, overrides, signal.SIGTERM, 2),
        "hung": hung(folder, overrides, "hung", time.sleep),
        # One call into C that keeps the interpreter to itself: no Python thread runs.
        "hung score": hung_score(folder, overrides),
        "hungry": hungry(folder, overrides),
        "stuck": hung(folder, overrides, "stuck", ctypes.PyDLL(None).sleep),
    }
    found["hung"]["again"] = again(found["hung"])
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), sys.argv[2:])))
