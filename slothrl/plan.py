"""The plan: what a run is about to do, in one table, before it does it."""

from __future__ import annotations

from dataclasses import dataclass, field

from rich.console import Console
from rich.table import Table

Rows = list[tuple[str, str]]  # (what, how)


@dataclass
class Plan:
    """Rows of (what, how), in the order in which they are shown."""

    title: str
    rows: Rows = field(default_factory=list)

    def add(self, what: str, how: str) -> None:
        self.rows.append((what, how))

    def show(self, console: Console) -> None:
        table = Table(title=self.title, show_header=False, title_justify="left")
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for what, how in self.rows:
            table.add_row(what, how)
        console.print(table)


@dataclass(frozen=True)
class Batch:
    """The arithmetic of one optimizer step.

    Attributes:
        per_device: sequences in one forward and backward (TRL's per_device_train_batch_size).
        accumulation: forwards and backwards a step (gradient_accumulation_steps).
        num_generations: completions a prompt; 1 for SFT.
        steps_per_generation: micro-batches that one generation call feeds.
        max_tokens: longest sequence, prompt and completion.
    """

    per_device: int
    accumulation: int
    num_generations: int
    steps_per_generation: int
    max_tokens: int

    def describe(self) -> str:
        sequences = self.per_device * self.accumulation
        shape = f"{self.accumulation} micro-batch{'es' if self.accumulation > 1 else ''} of {self.per_device}"
        tokens = f"at most {sequences * self.max_tokens:,} tokens"
        if self.num_generations == 1:
            return f"{sequences} sequences a step = {shape}, {tokens}"
        prompts = self.per_device * self.steps_per_generation // self.num_generations
        made = prompts * self.num_generations
        text = f"{prompts} prompts x {self.num_generations} completions = {made} a generation"
        return f"{text}; {sequences} a step = {shape}, {tokens}"


def size(count: float) -> str:
    """Bytes in the unit that reads best: "270 MB", "3.6 GB"."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"
