"""What the launch before each nf4 GEMM takes: early or plain in a step's linear layers, and other launches of it.

    python tests/gpu/bench_nf4_inputs.py                      # the 8B shape; about 2 minutes
    python tests/gpu/bench_nf4_inputs.py --rows 1,64 --steps-only

First table: ms for the linear layers of 32 layers of Llama-3-8B, LoRA r=16, as one CUDA graph: inputs, GEMM, something
elementwise, as in a decoding step. Two layers' weights in turn, 218 MB, are more than L2 holds. Second table: us a
launch of the inputs alone, behind something elementwise whose time is taken off, each with an A not in L2.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
from bench_tools import case, failures, milliseconds, random, random_weight
from slothrl_kernels import LoraDelta
from slothrl_kernels.early_launch import starts_early
from slothrl_kernels.nf4_inputs import CANDIDATES, DEFAULT, nf4_inputs
from slothrl_kernels.nf4_launches import choose_config
from slothrl_kernels.nf4_matmul import AHEAD, launch

LAYERS, COPIES, RANK = 32, 2, 16
SLICES = {"qkv": (4096, 1024, 1024), "o": (4096,), "gate_up": (14336, 14336), "down": (4096,)}
INPUTS = {"qkv": 4096, "o": 4096, "gate_up": 4096, "down": 14336}
ARMS = {"all plain": (0, False), "GEMM early": (AHEAD, False), "both early": (AHEAD, True)}


def captured(call) -> torch.cuda.CUDAGraph:
    call()  # compiled before
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


def lora_of(name: str) -> LoraDelta:
    lora = LoraDelta.zeros(RANK, INPUTS[name], SLICES[name], random(1))
    lora.a.normal_(0, 0.02)
    lora.b.normal_(0, 0.02)
    return lora


def time_steps(rows: list[int]) -> None:
    weights = {n: [random_weight(sum(SLICES[n]), INPUTS[n]) for _ in range(COPIES)] for n in SLICES}
    loras = {n: [lora_of(n) for _ in range(COPIES)] for n in SLICES}
    print("\n### linear layers of a decoding step, ms\n\n| rows | " + " | ".join(ARMS) + " |")
    print("|---" * (1 + len(ARMS)) + "|", flush=True)
    for count in rows:
        cells = []
        for ahead, follows in ARMS.values():
            x = random(count, INPUTS["qkv"])

            def step(x=x, count=count, ahead=ahead, follows=follows):
                for layer in range(LAYERS):
                    for name in SLICES:
                        # Elementwise, and what the next layer takes: contiguous, of its width, bounded.
                        x = torch.tanh(x[:, : INPUTS[name]])
                        weight, lora = weights[name][layer % COPIES], loras[name][layer % COPIES]
                        config = choose_config(count, *weight.shape, x.device)
                        x = launch(x.contiguous(), weight, None, config, lora, ahead, follows)
                return x

            cells.append(f"{milliseconds(captured(step).replay, 10):.3f}")
        print(f"| {count} | {' | '.join(cells)} |", flush=True)


def time_inputs(rows: list[int]) -> None:
    follows = starts_early(random(1).device)
    arms = {"as before": (DEFAULT, False)}
    arms |= {f"{c.share}, {c.block_n}, {c.warps}, {c.stages}": (c, follows) for c in CANDIDATES}
    print("\n### the inputs alone, us: launched plainly; early by share of K, rows of A, warps, stages\n")
    print(f"| layer | rows | {' | '.join(arms)} |\n" + "|---" * (2 + len(arms)) + "|", flush=True)
    arrived = random(4096).to(torch.int32).zero_()  # without, a graph would clear counters before each launch
    for name, inputs in INPUTS.items():
        rank = RANK * len(SLICES[name])
        adapters = random(max(2, (128 << 20) // (rank * inputs * 2)), rank, inputs).unbind()
        for count in rows:
            chunks = choose_config(count, sum(SLICES[name]), inputs, arrived.device).chunks
            x, y = random(count, inputs), random(count, inputs)

            def calls(arm=None, x=x, y=y, chunks=chunks, adapters=adapters):
                for a in adapters:
                    torch.tanh(y, out=x)
                    if arm:
                        nf4_inputs(x, chunks, a, arrived, False, arm[1], arm[0])

            empty, cells = milliseconds(captured(calls).replay, 5), []
            for arm in arms.values():
                with case(f"{name} {count} {arm}"):
                    taken = milliseconds(captured(partial(calls, arm)).replay, 5) - empty
                    cells.append(f"{taken / len(adapters) * 1e3:.2f}")
            print(f"| {name} | {count} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=lambda text: [int(n) for n in text.split(",")], default=[1, 16, 64, 128])
    parser.add_argument("--steps-only", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    time_steps(options.rows)
    if not options.steps_only:
        time_inputs([n for n in options.rows if n in (1, 64)])
    if failures:
        raise SystemExit(f"failed: {failures}")


if __name__ == "__main__":
    main()
