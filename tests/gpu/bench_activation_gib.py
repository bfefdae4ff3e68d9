"""What whole layers within a budget buy: `python tests/gpu/bench_activation_gib.py`, about 2 min on an H100.

The SFT step of `python -m slothrl bench step` (8B, 2 x 2,048 tokens) with `model.activations=both` and `activation_gib`
from none to 1.6, eagerly and with the other layers by CUDA graphs, over one model. Milliseconds: median of 7, with the
optimizer, whose learning rate is 0. Whole: layers that keep everything. Peak: of what is allocated, model included, and
by how much more than without; reserved: of what torch took from the driver, recordings included. An arm whose loss or
gradient norm is not the first one's fails the command.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from slothrl.activations import keep_activations
from slothrl.graphs import ARRIVALS, graph_layers, graphs_of

sys.path.insert(0, str(Path(__file__).parents[2] / "kernels" / "benchmarks"))
import train_step  # noqa: E402

WARM_UP, STEPS = ARRIVALS + 3, 7
COLUMNS = ("graphs", "activation_gib", "whole", "ms", "peak GiB", "more MiB", "reserved", "loss", "gradient norm")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", default="8b", choices=["8b", "0.6b", "tiny"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=2048, help="tokens a sequence")
    parser.add_argument("--activations", default="both", help="model.activations")
    parser.add_argument("--gib", default="0.4,0.8,1.2,1.6", help="budgets, after none")
    parser.add_argument("--graphs", default="off,on", help="model.graphs")
    parser.add_argument("--embeddings", default="device", choices=["device", "host"], help="model.embeddings")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    return parser.parse_args()


class Bench:
    """One model, stepped in several ways."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.given, self.cuda = given, given.device == "cuda"
        made = argparse.Namespace(**vars(given), arm="slothrl", activation_gib=None)
        self.model, self.loss_of, _ = train_step.prepare_ours(made)
        drawn = torch.randint(
            0, self.model.config.vocab_size, (given.batch, given.length), generator=torch.Generator().manual_seed(1)
        )
        self.ids = drawn.to(given.device)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = train_step.optimizer_of(trained, self.cuda, "slothrl")
        for group in self.optimizer.param_groups:  # all arms begin where the first one did
            group["lr"] = group["weight_decay"] = 0.0

    def step(self, seen: Any = None) -> float:
        loss = train_step.step(self.loss_of, self.optimizer, self.ids, self.given.device, seen)
        train_step.wait(self.cuda)
        return loss.item()

    def arm(self) -> tuple[float, int, float, float]:
        """(milliseconds, bytes allocated at the most, loss, gradient norm) of the model as it is now."""
        norms: list[float] = []
        for _ in range(WARM_UP):
            self.step()
        loss = self.step(lambda: norms.append(train_step.grad_norm(self.model)))
        if self.cuda:
            torch.cuda.empty_cache()  # what another arm needed
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(STEPS):
            start = time.perf_counter()
            self.step()
            times.append(time.perf_counter() - start)
        return 1000 * median(times), torch.cuda.max_memory_allocated() if self.cuda else 0, loss, norms[0]


def table(bench: Bench) -> list[str]:
    """Prints a row an arm; those that train something else than the first."""
    given, wrong, first = bench.given, [], None
    for wish in given.graphs.split(","):
        graph_layers(bench.model, wish)
        without = None
        for gib in (None, *map(float, given.gib.split(","))):
            keep_activations(bench.model, given.activations, gib)
            ms, peak, loss, norm = bench.arm()
            kept = vars(bench.model).get("_slothrl_activations")
            without, first = peak if without is None else without, first or (loss, norm)
            cells = [wish, "" if gib is None else f"{gib:g}", f"{0 if kept is None else kept.whole}", f"{ms:.1f}"]
            held = torch.cuda.max_memory_reserved() if bench.cuda else 0
            cells += [f"{peak / 2**30:.2f}", f"{(peak - without) / 2**20:.0f}", f"{held / 2**30:.2f}"]
            cells += [f"{loss:.4f}", f"{norm:.4f}"]
            print("| " + " | ".join(cells) + " |", flush=True)
            same = abs(loss - first[0]) <= train_step.LOSS_TOLERANCE * abs(first[0])
            if not same or not abs(norm - first[1]) <= train_step.NORM_TOLERANCE * first[1]:
                wrong.append(" ".join(cells[:2]))
        if (graphs := graphs_of(bench.model)) is not None:
            print(f"\ngraphs: {graphs}\n", flush=True)
    return wrong


def main() -> int:
    given = arguments()
    bench = Bench(given)
    name = torch.cuda.get_device_name() if bench.cuda else "CPU"
    print(f"{name}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}; {given.shape}, ", end="")
    print(f"{given.batch} x {given.length} tokens, model.activations={given.activations}, ", end="")
    print(f"model.embeddings={given.embeddings}\n")
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
    wrong = table(bench)
    print(f"\nwrong: {', '.join(wrong)}" if wrong else "\nequal loss and an equal gradient norm in every arm")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
