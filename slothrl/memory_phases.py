"""Who holds how much memory in each phase of a run, as measured: the fullest moment of every phase."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from slothrl.memory import measure

BASE = "base"
# What `measure` tells apart, as the table's rows; every other kind is the base's.
ROWS = {"LoRA": "LoRA", "trainable weights": "LoRA", "gradients": "gradients", "optimizer state": "optimizer"}
TEMPORARY = "activations, temporaries"
REST = "CUDA context, allocator, rest"


@dataclass(frozen=True)
class Phase:
    """The fullest moment of a phase.

    Attributes:
        parts: bytes by holder; they add up to `total`.
        total: what the driver says the device has in use (the process' resident memory on a CPU).
        peak: the most torch had allocated within the phase.
    """

    name: str
    parts: dict[str, int]
    total: int
    peak: int


class PhaseMemory:
    """Watches a run go through its phases.

    Args:
        model: the trained model, whose base may be vLLM's.
        optimizer: gives the optimizer, or None as long as there is none.
        engine: gives what the engine holds by kind (`Engine.holdings`).
    """

    def __init__(self, model: nn.Module, optimizer: Callable[[], Any], engine: Callable[[], dict[str, int]]):
        self.model, self.optimizer, self.engine = model, optimizer, engine
        self.phases: dict[str, Phase] = {}
        self.current: str | None = None
        self.cuda = any(parameter.is_cuda for parameter in model.parameters())

    def begin(self, name: str) -> None:
        """End the phase that runs, and begin another. Costs microseconds, unless the ended one is a new maximum."""
        self.end()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.current = name

    def end(self) -> None:
        name, self.current = self.current, None
        if name is None:
            return
        total, known = self._total(), self.phases.get(name)
        # A hundredth more is noise of the allocator, and counting all tensors takes milliseconds.
        if known is None or total > 1.01 * known.total:
            self.phases[name] = self._count(name, total)

    def _total(self) -> int:
        if not self.cuda:
            return resident_bytes()
        free, total = torch.cuda.mem_get_info()
        return total - free

    def _count(self, name: str, total: int) -> Phase:
        parts = dict.fromkeys((BASE, *dict.fromkeys(ROWS.values())), 0)
        for holding in measure(self.model, self.optimizer()):
            if holding.part:
                parts[ROWS.get(holding.name, BASE)] += holding.bytes
        parts.update(self.engine())
        peak = torch.cuda.max_memory_allocated() if self.cuda else 0
        if self.cuda:
            parts[TEMPORARY] = peak - torch.cuda.memory_allocated()
        parts[REST] = total - sum(parts.values())
        return Phase(name, parts, total, peak)

    def rows(self) -> list[dict[str, Any]]:
        """The phases as plain data, in the order in which they first came."""
        return [asdict(phase) for phase in self.phases.values()]


def phase_table(rows: list[dict[str, Any]]) -> str:
    """Phases side by side, in MB, as aligned text; a holder that no phase has is left out."""
    if not rows:
        return "no phase was measured"
    names = list(dict.fromkeys(name for row in rows for name in row["parts"]))
    names = [name for name in names if any(row["parts"].get(name) for row in rows)]
    width = max(len(name) for name in (*names, "in use, says the driver"))
    columns = [max(12, len(row["name"]) + 2) for row in rows]

    def line(name: str, values: list[str]) -> str:
        cells = (f"{value:>{column}}" for value, column in zip(values, columns, strict=True))
        return f"{name:{width}}{''.join(cells)}"

    lines = [line("MB", [row["name"] for row in rows])]
    lines += [line(name, [f"{row['parts'].get(name, 0) / 1e6:,.0f}" for row in rows]) for name in names]
    lines.append("-" * (width + sum(columns)))
    return "\n".join([*lines, line("in use, says the driver", [f"{row['total'] / 1e6:,.0f}" for row in rows])])


def resident_bytes() -> int:
    """What this process has in physical memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def memory_in_use() -> dict[str, int]:
    """For the log of a step, in bytes: this process' resident memory, and on a GPU the device's and torch's share."""
    found = {"memory/resident": resident_bytes()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        free, total = torch.cuda.mem_get_info()
        found.update({"memory/device": total - free, "memory/torch_reserved": torch.cuda.memory_reserved()})
    return found
