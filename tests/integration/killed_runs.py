"""Runs that are killed and go on: `python -m tests.integration.killed_runs FOLDER KILLS SEED override… [-- override…]`.

Imports once and forks for every part of a run, which a SIGKILL then ends at a random moment, also in the middle of a
save. Prints a line of JSON for each list of overrides: kills, from which steps it went on, and every difference from
the uninterrupted run.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

TIMES = ("seconds", "_time", "runtime", "per_second")  # how the names of wall-clock metrics end
# What a checkpoint holds that knows no wall-clock time.
TIMELESS = ("adapter_model.safetensors", "optimizer.safetensors", "optimizer.json", "scheduler.json")
TIMELESS += ("random.safetensors", "random.json", "rollouts.safetensors", "rollouts.json")


def begin(arguments: list[str], printed: Path) -> int:
    """Fork a part of a run; its process id."""
    child = os.fork()
    if child:
        return child
    code = 99
    try:
        with printed.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            from slothrl.train import main

            code = main(arguments)
    finally:
        os._exit(code)


def end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def last_checkpoint(run: Path) -> Path:
    return max(run.glob("checkpoint-*"), key=lambda path: int(path.name.rsplit("-", 1)[1]))


def timeless(name: str) -> bool:
    """Whether a metric is the same in two runs that are the same."""
    return not name.endswith(TIMES) and not name.startswith(("memory/", "time/"))


def outcome(run: Path) -> dict:
    """All of a finished run that must be the same whenever it was killed."""
    files = json.loads((last_checkpoint(run) / "manifest.json").read_text(encoding="utf-8"))["files"]
    metrics = [{k: v for k, v in line.items() if timeless(k)} for line in lines(run / "metrics.jsonl")]
    return {
        **{name: files[name]["sha256"] for name in TIMELESS if name in files},
        "final adapter": (run / "adapter" / "adapter_model.safetensors").read_bytes().hex(),
        # The summary at the end of training is not there again where nothing was left to train.
        "metrics": [line for line in metrics if "train_loss" not in line],
        "samples": lines(run / "samples.jsonl") if (run / "samples.jsonl").exists() else [],
        "held_out": lines(run / "held_out.jsonl"),
    }


def differing(found: dict, wanted: dict) -> list[str]:
    return [name for name in {**found, **wanted} if found.get(name) != wanted.get(name)]


def killed_run(arguments: list[str], run: Path, kills: int, span: float, chance: random.Random) -> dict:
    """One run, killed up to `kills` times at moments within `span` seconds, then left alone until it is finished."""
    printed, done, went_on = run.with_suffix(".txt"), 0, []
    while True:
        child = begin([*arguments, f"output_dir={run}", "resume=auto"], printed)
        deadline = time.monotonic() + (chance.uniform(0.05, span) if done < kills else 600)
        while time.monotonic() < deadline:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                code = end(child)
                text = printed.read_text()
                went_on = [line for line in text.splitlines() if line.startswith("going on from ")]
                return {"code": code, "kills": done, "went_on": went_on, "skipped": text.count("skipped checkpoint-")}
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        end(child)
        done += 1


def load() -> None:
    """Import what takes seconds, before any fork."""
    import torch

    import slothrl.run
    import slothrl.trainers.build  # noqa: F401

    torch.set_num_threads(1)


def main(folder: Path, kills: int, seed: int, overrides: list[str]) -> dict:
    folder.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    assert end(begin([*overrides, f"output_dir={folder / 'whole'}"], folder / "whole.txt")) == 0
    span, wanted, chance = time.monotonic() - start, outcome(folder / "whole"), random.Random(seed)
    report = {"kills": 0, "runs": 0, "seconds": round(span, 1), "went_on": [], "differing": [], "codes": []}
    while report["kills"] < kills:
        run = folder / f"killed-{report['runs']}"
        part = killed_run(overrides, run, kills - report["kills"], span, chance)
        report["kills"] += part["kills"]
        report["runs"] += 1
        report["went_on"] += [line.split(":")[0].removeprefix("going on from checkpoint-") for line in part["went_on"]]
        report["codes"].append(part["code"])
        report["differing"] += differing(outcome(run), wanted) if part["code"] == 0 else ["it did not finish"]
    return report


if __name__ == "__main__":
    load()
    jobs: list[list[str]] = [[]]
    for word in sys.argv[4:]:
        if word == "--":
            jobs.append([])
        else:
            jobs[-1].append(word)
    for number, job in enumerate(jobs):
        print(json.dumps(main(Path(sys.argv[1], str(number)), int(sys.argv[2]), int(sys.argv[3]), job)), flush=True)
