"""Memory over the steps of finished runs: `python tests/gpu/memory_slope.py RUN …`, run folders."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch


def main() -> None:
    """Least-squares slope of memory over the steps, the first tenth left out (caches fill there)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+")
    for run in parser.parse_args().runs:
        lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if "reward" in line and "memory/resident" in line]
        lines = lines[len(lines) // 10 :]
        steps = torch.tensor([line["step"] for line in lines], dtype=torch.float64)
        rows = []
        for key in ("memory/device", "memory/torch_reserved", "memory/resident"):
            values = torch.tensor([line.get(key, 0) for line in lines], dtype=torch.float64)
            centred = steps - steps.mean()
            per_step = float((centred * values).sum() / (centred**2).sum())
            left = values - values.mean() - per_step * centred
            error = float((left.pow(2).sum() / (len(lines) - 2) / (centred**2).sum()).sqrt())
            change = f"{values[0] / 1e6:,.1f} -> {values[-1] / 1e6:,.1f} MB"
            rows.append((key, f"{per_step / 1e3:.2f} ± {error / 1e3:.2f} KB a step, {change}"))
        print(f"{run}: {len(lines)} steps")
        print("\n".join(f"| {name} | {value} |" for name, value in rows))


if __name__ == "__main__":
    main()
