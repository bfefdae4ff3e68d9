"""Each gpu preset's updates under a cap: `python tests/gpu/bench_presets.py [PRESET …]`, about 2 minutes on an H100.

The smaller card is emulated: a block is taken from this one, so that the driver reports as free what a card of the
preset's size has, and torch may have no more than that leaves beside the context, vLLM's own buffers, its LoRA and its
CUDA graphs (`torch.cuda.set_per_process_memory_fraction`). Random nf4 models that the presets are for, layers fused as
in a run, sequences of 512 + 1,024 tokens.

    packed     an optimizer step of 24 completions by slothrl's trainer, which chooses its tokens a pack itself
    padded     one micro-batch of the preset's per_device_train_batch_size, packing=off
    largest    by bisection: the most tokens of one pack, in steps of 2,048, up to the trainer's own limit

A preset may stand where both of the first fit. Emulated: kernels are this card's, a smaller card's context is not
measured, and vLLM's part is `fit`'s prediction. The table goes to tests/gpu/results/presets.md by `--out`.
"""

from __future__ import annotations

import argparse
import gc
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from slothrl.compose import compose_config
from slothrl.fit_config import settings_of
from slothrl.fit_constants import card_bytes
from slothrl.fit_memory import GRAPHS, VLLM_ADAPTER, Settings, around, held, predict
from slothrl.fit_search import largest_budget
from slothrl.fit_shape import Shape
from slothrl.memory_phases import BASE
from slothrl.token_bytes import MOST_TOKENS
from tests.gpu.bench_fit import shape
from tests.gpu.device_use import load_kernels, outside_torch, why_not_alone
from tests.gpu.fit_models import PRESETS, TINY, config_of, random_nf4
from tests.gpu.fit_steps import Case, Measured, run_case
from tests.gpu.largest_pack import PackedUpdate, largest_step

PROMPT, COMPLETION, GROUP = 512, 1024, 8
LENGTHS = [f"data.max_prompt_length={PROMPT}", f"trainer.max_completion_length={COMPLETION}"]
COLUMNS = "preset | model | card, GB | torch may have | packed: tokens a pack | reserved | of the card | padded: rows"
COLUMNS += " | reserved | of the card | largest pack | predicted | rollout, predicted | update, predicted"
STEP = 2048


@dataclass(frozen=True)
class Card:
    """An emulated card: its bytes, and those that torch may have beside what is not emulated."""

    total: int
    cap: int


def card_of(counted: Shape, settings: Settings, gigabytes: float) -> Card:
    parts, total = held(counted, settings), card_bytes(gigabytes)
    # The base here is doubly quantised, as transformers makes it; vLLM's scales take a little more.
    own = held(counted, Case("sft", "", 1, 0, 1).settings())
    elsewhere = around(counted, settings) + parts[VLLM_ADAPTER] + parts.get(GRAPHS, 0) + parts[BASE] - own[BASE]
    return Card(total, total - elsewhere)


def emulate(card: Card) -> torch.Tensor:
    """Take what the card has less than this one; the block, to be kept as long as the card is emulated."""
    torch.cuda.set_per_process_memory_fraction(1.0)
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    taken = max(0, total - outside_torch() - card.cap)
    block = torch.empty(taken, dtype=torch.uint8, device="cuda")
    torch.cuda.set_per_process_memory_fraction(min(1.0, (taken + card.cap) / total))
    return block


def tried(case: Case, config, device: str, card: Card, block: torch.Tensor | None) -> str:
    """Three cells: the micro-batch, what was reserved beside the block, the share of the card then in use."""
    found: Measured | None = None
    with suppress(torch.OutOfMemoryError):
        found = run_case(case, config, device, steps=1)
    gc.collect()  # outside of the block the exception is gone, and with it what its frames held
    size = f"{case.rows}" if not case.packed else f"{found.budget:,}" if found else "?"
    if block is None:
        return f"{size} | - | -"
    torch.cuda.empty_cache()
    if found is None:
        return f"{size} | out of memory | **no**"
    reserved = found.reserved - block.numel()
    return f"{size} | {reserved / 1e9:.2f} | {(reserved + card.total - card.cap) / card.total:.0%}"


def largest(config, device: str, prompt: int, completion: int, most: int, step: int) -> int:
    update = PackedUpdate(random_nf4(config, device))
    return largest_step(lambda tokens: update.fits(tokens, prompt, completion, GROUP), step, most)


def measure(preset: str, cpu: bool) -> str:
    """One preset's row of the table."""
    config = compose_config([f"gpu={preset}", *LENGTHS], anywhere=True)
    settings = settings_of(config, "nf4", 2, None, None, None)
    name, device = PRESETS[preset], "cpu" if cpu else "cuda"
    model = config_of(name, **(TINY if cpu else {}))
    counted = shape(config_of(name))
    card = card_of(counted, settings, config.gpu.memory_gb)
    block = None if cpu else emulate(card)
    prompt, completion = (8, 16) if cpu else (PROMPT, COMPLETION)
    packed = Case("grpo", name, GROUP, prompt, completion, prompts=3, fused=True)
    padded = Case("grpo", name, 2 if cpu else settings.rows, prompt, completion, packed=False, fused=True)
    cells = [preset, name, f"{card.total / 1e9:.2f}", f"{card.cap / 1e9:.2f}"]
    cells += [tried(case, model, device, card, block) for case in (packed, padded)]
    most, step = (64, 32) if cpu else (MOST_TOKENS, STEP)
    cells += [f"{largest(model, device, prompt, completion, most, step):,}"]
    cells += [f"{min(largest_budget(counted, settings, card.total), MOST_TOKENS):,}"]
    cells += [f"{phase.total / 1e9:.2f}" for phase in predict(counted, settings, card.total)]
    del block
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("presets", nargs="*", default=list(PRESETS), metavar="PRESET")
    parser.add_argument("--cpu", action="store_true", help="try the code on tiny models")
    parser.add_argument("--out", type=Path, help="write the table there too")
    arguments = parser.parse_args()
    start, said = time.time(), []
    if not arguments.cpu:
        if why := why_not_alone():
            parser.error(f"{why}: a card can be emulated only beside nobody")
        load_kernels()
        said.append(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    said += [f"| {COLUMNS} |", "|---" * (COLUMNS.count("|") + 1) + "|"]
    print("\n".join(said), flush=True)
    for preset in arguments.presets:
        said.append(measure(preset, arguments.cpu))
        print(said[-1], flush=True)
    if arguments.out:
        arguments.out.write_text("\n".join(said) + "\n", encoding="utf-8")
    print(f"{time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
