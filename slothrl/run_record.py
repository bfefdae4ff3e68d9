"""Everything a run folder holds, read for a report; what is missing, torn or of an older version is left out."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slothrl.errors import UserError
from slothrl.resume import RUN, run_folder

FAULT, PROVENANCE = "fault.json", "provenance.json"
Series = list[tuple[int, float]]  # (step, value)


@dataclass(frozen=True)
class RunRecord:
    """A run folder's contents.

    Attributes:
        about: provenance.json: config, hashes, versions.
        arguments: the command line of the first part.
        summary: summary.json; empty where the run did not get that far.
        fault: what ended the run, `type` and `message`; empty where nothing did.
        metrics: lines of metrics.jsonl.
        held_out: lines of held_out.jsonl.
        samples: lines of samples.jsonl.
        memory: the phases of memory.json.
        skipped_steps: steps whose loss or gradient was not finite.
    """

    folder: Path
    about: dict[str, Any]
    arguments: list[str]
    summary: dict[str, Any]
    fault: dict[str, Any]
    metrics: list[dict[str, Any]]
    held_out: list[dict[str, Any]]
    samples: list[dict[str, Any]]
    memory: list[dict[str, Any]]
    skipped_steps: int

    @property
    def title(self) -> str:
        return self.folder.name

    @property
    def steps(self) -> list[dict[str, Any]]:
        """The log lines of optimizer steps; the others are evaluations and the trainer's last word."""
        return [line for line in self.metrics if "loss" in line and "step" in line]

    @property
    def state(self) -> str:
        """How the run ended: "done", "interrupted", "failed", or "unfinished" where nothing says."""
        if self.fault:
            return "interrupted" if self.fault.get("type") in ("Stopped", "KeyboardInterrupt") else "failed"
        last = self.steps[-1]["step"] if self.steps else 0
        if not self.summary or last > self.summary.get("steps", 0):  # the summary is an earlier part's
            return "unfinished"
        return "interrupted" if self.summary.get("resume") else "done"

    def series(self, key: str) -> Series:
        """(step, value) of a metric, steps where it was not logged left out."""
        return [(int(line["step"]), float(line[key])) for line in self.steps if is_number(line.get(key))]

    def keys(self, prefix: str, suffix: str = "") -> list[str]:
        """Metrics with this beginning and end, in the order in which they first came."""
        names = dict.fromkeys(name for line in self.steps for name in line)
        return [name for name in names if name.startswith(prefix) and name.endswith(suffix)]


def read_run(place: Path) -> RunRecord:
    """Read a run folder, or that of a checkpoint or adapter in it.

    Raises:
        UserError: there is no run.
    """
    place = place.expanduser()
    folder = place.absolute().parent if place.name == "adapter" else run_folder(place).absolute()
    known = ("metrics.jsonl", "held_out.jsonl", "summary.json", PROVENANCE)
    if not any((folder / name).is_file() for name in known):
        raise UserError(f"{place}: no run there (none of {', '.join(known)})")
    return RunRecord(
        folder=folder,
        about=_about(folder),
        arguments=read_or(folder / RUN, {}).get("arguments", []),
        summary=read_or(folder / "summary.json", {}),
        fault=read_or(folder / FAULT, {}),
        metrics=_latest(_lines(folder / "metrics.jsonl")),
        held_out=_latest(_lines(folder / "held_out.jsonl")),
        samples=_latest(_lines(folder / "samples.jsonl")),
        memory=read_or(folder / "memory.json", []),
        skipped_steps=len(list(folder.glob("nonfinite/step-*"))),
    )


def before_and_after(held_out: Sequence[dict[str, Any]], key: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The first and the last held-out record that has `key`; empty where there is none."""
    found = [record for record in held_out if key in record]
    return (found[0] if found else {}, found[-1] if len(found) > 1 else {})


def read_or(path: Path, otherwise: Any) -> Any:
    """A JSON file of the same type as `otherwise`; `otherwise` where there is none, or half of one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return otherwise
    return found if isinstance(found, type(otherwise)) else otherwise


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A tree of dictionaries as "a.b.c" names and values."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree} if prefix else {}
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found.update(flat(value, f"{prefix}.{name}" if prefix else str(name)))
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log: a kill may have torn the last one."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.split("\n"):  # not splitlines: a completion may hold U+2028, which JSON leaves as it is
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def _latest(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines since the step last went back: an earlier run in the same folder may have left some before them."""
    steps = [line.get("step") or 0 for line in lines]
    starts = [i for i in range(1, len(steps)) if steps[i] < steps[i - 1]]
    return lines[starts[-1] if starts else 0 :]


def _about(folder: Path) -> dict[str, Any]:
    """provenance.json; for a run from before there was one, the config that Hydra wrote."""
    about = read_or(folder / PROVENANCE, {})
    config, overrides = folder / ".hydra" / "config.yaml", folder / ".hydra" / "overrides.yaml"
    if about or not config.is_file():
        return about
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    from slothrl.provenance import plain_config

    try:
        found: dict[str, Any] = {"config": plain_config(OmegaConf.load(config))}
        if overrides.is_file():
            found["overrides"] = OmegaConf.to_container(OmegaConf.load(overrides))
        return found
    except (OmegaConfBaseException, YAMLError, OSError):
        return {}
