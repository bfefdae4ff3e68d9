"""Each gpu preset's update phase under a cap: `python tests/gpu/bench_presets.py`, about 2 minutes on an H100.

Emulates the smaller card: torch may reserve what a card of the preset's size would leave beside the context, vLLM's own
buffers, its LoRA and its CUDA graphs. Random nf4 models that the presets are for, micro-batches of 512 + 1,024 tokens.
Emulated: kernels are this card's, and a smaller card's context is not measured.
"""

from __future__ import annotations

import argparse
import time

import torch

from slothrl.compose import compose_config
from slothrl.fit_config import settings_of
from slothrl.fit_constants import card_bytes
from slothrl.fit_memory import GRAPHS, VLLM_ADAPTER, around, held, predict
from slothrl.memory_phases import BASE
from tests.gpu.bench_fit import shape
from tests.gpu.fit_models import PRESETS, TINY, config_of
from tests.gpu.fit_steps import Case, run_case

LENGTHS = ["data.max_prompt_length=512", "trainer.max_completion_length=1024"]


def measure(preset: str, cpu: bool) -> str:
    """One preset's row of the table."""
    config = compose_config([f"gpu={preset}", *LENGTHS], anywhere=True)
    settings = settings_of(config, "nf4", 2, None, None, None)
    model = config_of(PRESETS[preset], **(TINY if cpu else {}))
    counted, card = shape(model), card_bytes(config.gpu.memory_gb)
    parts = held(counted, settings)
    # The base here is doubly quantised, as transformers makes it; vLLM's scales take a little more.
    elsewhere = around(counted, settings) + parts[VLLM_ADAPTER] + parts.get(GRAPHS, 0)
    expanded = parts[BASE] - held(counted, Case("sft", "", 1, 0, 1).settings())[BASE]
    cap = card - elsewhere - expanded
    case = Case("grpo", PRESETS[preset], settings.rows, 512, 1024)
    if cpu:
        case = Case("grpo", PRESETS[preset], 2, 8, 16)
    else:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap / total))
    rollout, update = (phase.total for phase in predict(counted, settings, card))
    predicted = f"{rollout / 1e9:.2f} | {update / 1e9:.2f}"
    name = f"{preset} | {PRESETS[preset]} | {settings.rows} x (512 + 1,024) | {card / 1e9:.2f} | {cap / 1e9:.2f}"
    try:
        found = run_case(case, model, "cpu" if cpu else "cuda")
    except torch.OutOfMemoryError:
        return f"| {name} | {predicted} | out of memory | | no |"
    share = (found.reserved + card - cap) / card
    return f"| {name} | {predicted} | {found.allocated / 1e9:.2f} | {found.reserved / 1e9:.2f} | yes, {share:.0%} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cpu", action="store_true", help="try the code on tiny models")
    cpu, start = parser.parse_args().cpu, time.time()
    print("| preset | model | micro-batch | card, GB | torch may have | rollout, predicted | update, predicted", end="")
    print(" | allocated | reserved | fits, share of the card |")
    print("|---" * 10 + "|", flush=True)
    for preset in PRESETS:
        print(measure(preset, cpu), flush=True)
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
