"""The memory prediction against the device: `python tests/gpu/bench_fit.py`, under 2 minutes on an H100.

Real steps of slothrl's trainers on random nf4 models. Prints a Markdown table, and under it what the constants in
`slothrl/fit_constants.py` would have to be. `--cpu` tries the code on tiny models, without bytes.
"""

from __future__ import annotations

import argparse
import time

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from slothrl.fit_constants import constant
from slothrl.fit_memory import allocated, update
from slothrl.fit_shape import Shape, shape_of
from tests.gpu.bench_tools import case as guarded
from tests.gpu.bench_tools import failures
from tests.gpu.fit_models import TINY, config_of
from tests.gpu.fit_steps import Case, Measured, lora, run_case

CASES = [
    Case("grpo", "Qwen2.5-0.5B", 8, 256, 256),
    Case("grpo", "Qwen2.5-0.5B", 4, 128, 384, checkpointing=False),
    Case("grpo", "Qwen3-0.6B", 8, 256, 768),
    Case("grpo", "Qwen2.5-3B", 4, 512, 1024),
    Case("grpo", "Llama-3-8B", 2, 512, 512),
    Case("grpo", "Llama-3-8B", 4, 512, 1536),
    Case("grpo", "Llama-3-8B", 1, 1024, 7168),
    Case("sft", "Qwen2.5-0.5B", 8, 0, 1024),
    Case("sft", "Qwen2.5-1.5B", 4, 0, 1024, checkpointing=False),
    Case("sft", "Qwen2.5-3B", 2, 0, 4096),
    Case("sft", "Llama-3-8B", 4, 0, 1024),
    Case("sft", "Llama-3-8B", 1, 0, 8192),
]


def shape(config) -> Shape:
    with init_empty_weights():
        return shape_of(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), lora())


def context_bytes() -> int:
    """What the driver says is in use beside torch's reservation, with kernels and cuBLAS loaded."""
    a = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
    (a @ a).float().softmax(-1).sum().item()
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def row(case: Case, measured: Measured, predicted_allocated: float, predicted_total: float) -> str:
    def cell(predicted: float, found: int) -> str:
        return (
            f"{predicted / 1e6:,.0f} | {found / 1e6:,.0f} | {100 * (predicted / found - 1):+.1f} %" if found else "| |"
        )

    reserve = f"{100 * (measured.reserved / measured.allocated - 1):.1f} %" if measured.allocated else ""
    allocated_cells, total_cells = cell(predicted_allocated, measured.allocated), cell(predicted_total, measured.driver)
    return f"| {case.describe()} | {allocated_cells} | {total_cells} | {reserve} | {measured.grad_norm:.3f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true")
    cpu = parser.parse_args().cpu
    start, device = time.time(), "cpu" if cpu else "cuda"
    total = 0 if cpu else torch.cuda.get_device_properties(0).total_memory
    if not cpu:
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; MB\n")
        print(f"context at the start: {context_bytes() / 1e6:,.0f} MB (predicted {constant('context') / 1e6:,.0f})\n")
    print("| trainer | model | micro-batch | activations | allocated: predicted | measured | off", end="")
    print(" | driver: predicted | measured | off | reserved over allocated | gradient norm |")
    print("|---" * 12 + "|", flush=True)
    outside, reserves = [], []
    for case in CASES:
        with guarded(case.describe()):
            if cpu:
                case = Case(case.trainer, case.model, min(case.rows, 2), min(case.prompt, 8), 16, case.checkpointing)
            config = config_of(case.model, **(TINY if cpu else {}))
            predicted = update(shape(config), case.settings(), total)
            measured = run_case(case, config, device)
            held = allocated(predicted.parts) + constant("workspace")
            print(row(case, measured, held, predicted.total), flush=True)
            outside.append(measured.driver - measured.reserved)
            reserves.append(measured.reserved / measured.allocated - 1 if measured.allocated else 0.0)
    if outside:
        print(f"\ncontext after the steps: {min(outside) / 1e6:,.0f} to {max(outside) / 1e6:,.0f} MB; ", end="")
        print(f"fragmentation: mean {sum(reserves) / len(reserves):.3f}, most {max(reserves):.3f}")
    print(f"{time.time() - start:.0f} s; failed: {failures or 'none'}")


if __name__ == "__main__":
    main()
