"""What a run leaves behind: metrics.jsonl, a curve, samples, a summary."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def append_jsonl(path: Path, record: dict[str, Any]) -> None:
    """Add one line; NaN and infinity become null, which JSON has no word for."""
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in record.items()}
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(clean, ensure_ascii=False, default=str) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def write_json(path: Path, record: dict[str, Any]) -> None:
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def draw_curve(metrics: list[dict[str, Any]], path: Path, key: str) -> bool:
    """Draw `metrics[key]` over steps, with a running mean over 5. False where there is nothing to draw."""
    points = [(m["step"], m[key]) for m in metrics if m.get(key) is not None]
    if len(points) < 2:
        return False
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, values = zip(*points, strict=True)
    running = [sum(values[max(0, i - 4) : i + 1]) / len(values[max(0, i - 4) : i + 1]) for i in range(len(values))]
    figure = Figure(figsize=(7, 4), layout="constrained")  # not pyplot: no global figure, no display
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot(steps, values, color="tab:blue", alpha=0.35, label=key)
    axes.plot(steps, running, color="tab:blue", label="mean of 5 steps")
    axes.set_xlabel("step")
    axes.set_ylabel(key)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def show_samples(console: Console, step: int, rows: list[dict[str, Any]]) -> None:
    """A table of completions with their rewards; each row has prompt, completion, advantage and rewards by name."""
    if not rows:
        return
    names = list(rows[0]["rewards"])
    table = Table(title=f"samples at step {step}", title_justify="left")
    for heading in ("prompt", "completion", *names, "advantage"):
        table.add_column(heading, overflow="fold")
    for row in rows:
        scores = ["-" if value is None else f"{value:.2f}" for value in row["rewards"].values()]
        table.add_row(_clip(row["prompt"]), _clip(row["completion"]), *scores, f"{row['advantage']:+.2f}")
    console.print(table, markup=False)


def _clip(text: str, limit: int = 300) -> str:
    from rich.markup import escape

    text = text.strip()
    # Both ends: a reasoning completion ends with its answer.
    return escape(text if len(text) <= limit else f"{text[: limit // 2]} […] {text[-limit // 2 :]}")


def last_text(value: Any) -> str:
    """The text of a prompt or completion: a string itself, or the last message of a conversation."""
    return value if isinstance(value, str) else str(value[-1].get("content") or "") if value else ""
