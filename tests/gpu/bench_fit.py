"""The memory prediction against the device: `python tests/gpu/bench_fit.py`, under 2 minutes on an H100.

Real steps of slothrl's trainers on random nf4 models. Prints a Markdown table; its columns "reserved less allocated"
and "outside torch" are what `fragments` and `context` in `slothrl/fit_constants.py` stand for. The driver's need
the device for this process alone, which is looked at first. `--cpu` tries the code on tiny models, without bytes.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import torch
from accelerate import init_empty_weights
from transformers import AutoModelForCausalLM

from slothrl.fit_constants import constant
from slothrl.fit_memory import PhasePrediction, allocated, update
from slothrl.fit_shape import Shape, shape_of
from tests.gpu.bench_tools import case as guarded
from tests.gpu.bench_tools import failures
from tests.gpu.device_use import load_kernels, why_not_alone
from tests.gpu.fit_models import TINY, config_of
from tests.gpu.fit_steps import Case, Measured, lora, run_case

CASES = [
    Case("grpo", "Qwen2.5-0.5B", 8, 256, 256),
    Case("grpo", "Qwen2.5-0.5B", 4, 128, 384, checkpointing=False),
    Case("grpo", "Qwen3-0.6B", 8, 256, 768),
    Case("grpo", "Qwen3-0.6B", 8, 256, 768, packed=False),
    Case("grpo", "Qwen2.5-3B", 4, 512, 1024),
    Case("grpo", "Llama-3-8B", 2, 512, 512),
    Case("grpo", "Llama-3-8B", 4, 512, 1536),
    Case("grpo", "Llama-3-8B", 1, 1024, 7168),
    Case("grpo", "Llama-3-8B", 8, 256, 512, prompts=4, tokens=9000),
    Case("grpo", "Llama-3-8B", 8, 256, 512, prompts=4, tokens=9000, fused=True),
    Case("grpo", "Qwen2.5-0.5B", 4, 128, 384, checkpointing=False, fused=True),
    Case("sft", "Qwen2.5-0.5B", 8, 0, 1024),
    Case("sft", "Qwen2.5-1.5B", 4, 0, 1024, checkpointing=False),
    Case("sft", "Qwen2.5-3B", 2, 0, 4096),
    Case("sft", "Llama-3-8B", 4, 0, 1024),
    Case("sft", "Llama-3-8B", 1, 0, 8192),
    Case("sft", "Llama-3-8B", 4, 0, 1024, fused=True),
]


def shape(config) -> Shape:
    with init_empty_weights():
        return shape_of(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), lora())


def row(case: Case, measured: Measured, predicted: PhasePrediction, alone: bool) -> str:
    def cell(expected: float, found: int) -> str:
        return f"{expected / 1e6:,.0f} | {found / 1e6:,.0f} | {100 * (expected / found - 1):+.1f} %" if found else "| |"

    held = allocated(predicted.parts) + constant("workspace")
    outside = measured.driver - measured.reserved
    cells = [cell(held, measured.allocated), cell(predicted.total, measured.driver if alone else 0)]
    cells += [f"{(measured.reserved - measured.allocated) / 1e6:,.0f}", f"{outside / 1e6:,.0f}" if alone else ""]
    return f"| {case.describe()} | {' | '.join(cells)} | {measured.grad_norm:.3f} |"


def shrunk(case: Case) -> Case:
    """The same on a tiny model without a GPU."""
    return replace(case, rows=min(case.rows, 2), prompt=min(case.prompt, 8), completion=16, tokens=min(case.tokens, 40))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--only", default="", help="cases whose row contains this")
    parser.add_argument("--without", default="nothing", help="cases whose row does not contain this")
    parser.add_argument("--beside-others", action="store_true", help="run on a device in use, without driver columns")
    arguments = parser.parse_args()
    cpu, start = arguments.cpu, time.time()
    why = None if cpu else why_not_alone()
    if why and not arguments.beside_others:
        parser.error(f"{why}: the driver's figures would be wrong; --beside-others leaves them out")
    total = 0
    if not cpu:
        load_kernels()
        total = torch.cuda.get_device_properties(0).total_memory
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; MB{f'; {why}' if why else ''}\n")
    print("| trainer | model | micro-batch | kind | allocated: predicted | measured | off", end="")
    print(" | driver: predicted | measured | off | reserved less allocated | outside torch | gradient norm |")
    print("|---" * 13 + "|", flush=True)
    off = []
    chosen = (case for case in CASES if arguments.only in case.describe())
    for case in (case for case in chosen if arguments.without not in case.describe()):
        with guarded(case.describe()):
            case = shrunk(case) if cpu else case
            config = config_of(case.model, **(TINY if cpu else {}))
            predicted = update(shape(config), case.settings(), total)
            measured = run_case(case, config, "cpu" if cpu else "cuda")
            print(row(case, measured, predicted, alone=not why), flush=True)
            if not cpu:
                held = allocated(predicted.parts) + constant("workspace")
                off.append((held / measured.allocated - 1, 0.0 if why else predicted.total / measured.driver - 1))
    if off:
        within = [sum(abs(pair[column]) <= 0.1 for pair in off) for column in (0, 1)]
        driver = "" if why else f", the driver's of {within[1]}"
        print(f"\nwithin 10 %: allocated of {within[0]}{driver}, of {len(off)} cases")
    print(f"{time.time() - start:.0f} s; failed: {failures or 'none'}")


if __name__ == "__main__":
    main()
