"""`python -m slothrl fit`: memory by phase of a run on a card that need not be here, and what would fit on others."""

from __future__ import annotations

from dataclasses import replace

from rich.console import Console
from rich.table import Table

from slothrl.errors import ConfigError, UserError
from slothrl.fit_config import Question, question
from slothrl.fit_constants import card_bytes
from slothrl.fit_memory import (
    PhasePrediction,
    Settings,
    host_embeddings,
    largest_micro_batch,
    needed_cache,
    predict,
    starts,
)
from slothrl.fit_search import largest_batch, longest_context, smaller
from slothrl.plan import size

USAGE = """\
python -m slothrl fit [--config-dir FOLDER] [group=choice] [key=value] …

Predicts what a run would take, with the arguments of `train`; reads the model's config.json and loads no weights.
Without a GPU here and without gpu=… it takes gpu=24gb. Exit code 2 where the run will not fit, and settings that would.
Example: python -m slothrl fit model=hub model.name=Qwen/Qwen2.5-7B-Instruct gpu=16gb data.max_prompt_length=1024
"""
CARDS = (8, 12, 16, 24, 48, 80)
DEFAULT = "gpu=24gb"


def main(argv: list[str]) -> int:
    """Predict and print; returns the exit code."""
    from slothrl.train import fail

    if {"--help", "-h"} & set(argv):
        print(USAGE)
        return 0
    try:
        return _run(argv)
    except UserError as error:
        return fail(error)


def _run(argv: list[str]) -> int:
    from slothrl.checks import detect_gpu
    from slothrl.compose import compose_config
    from slothrl.train import _take_overlay

    overlay, overrides = _take_overlay(argv)
    if flags := [word for word in overrides if word.startswith("-")]:
        raise ConfigError([f"{flag}: no such option of `slothrl fit`; see --help" for flag in flags])
    if not any(word.startswith("gpu=") for word in overrides) and detect_gpu() == "cpu":
        overrides.append(DEFAULT)
    asked = question(compose_config(overrides, overlay, anywhere=True))
    console = Console()
    console.print(described(asked), markup=False, highlight=False, soft_wrap=True)
    console.print(phases_table(asked))
    length = f"{asked.settings.length:,} tokens"
    console.print(f"longest sequence, alone in its micro-batch / most sequences of {length} in one", soft_wrap=True)
    console.print(cards_table(asked))
    problem = verdict(asked)
    if problem:
        raise UserError(problem)
    return 0


def verdict(asked: Question) -> str | None:
    """Why the run will not fit, with the overrides that would make it; None where it fits."""
    shape, settings, total = asked.shape, asked.settings, asked.total
    reasons = [
        f"the {phase.name} phase takes {size(phase.total)} of {size(total)}"
        for phase in predict(shape, settings, total)
        if phase.total > total
    ]
    if not starts(shape, settings, total):
        needed = size(needed_cache(shape, settings))
        reasons.append(f"rollout.gpu_memory_utilization={settings.utilization:g} leaves vLLM no cache of {needed}")
    if not reasons:
        return None
    change = smaller(shape, settings, total, asked.accumulation)
    told = f"it would with: {' '.join(change.overrides)}" if change else "nothing smaller does: take a smaller model"
    return f"it will not fit (predicted): {', '.join(reasons)}; {told}"


def phases_table(asked: Question) -> Table:
    """Holders by phase."""
    phases = predict(asked.shape, asked.settings, asked.total)
    table = Table()
    table.add_column("MB, predicted")
    for phase in phases:
        table.add_column(phase.name, justify="right")
    for name in dict.fromkeys(name for phase in phases for name in phase.parts):
        table.add_row(name, *(f"{phase.parts.get(name, 0) / 1e6:,.0f}" for phase in phases))
    table.add_section()
    table.add_row("in use", *(f"{phase.total / 1e6:,.0f}" for phase in phases))
    table.add_row("of", *(f"{asked.total / 1e6:,.0f}" for _ in phases))
    return table


def described(asked: Question) -> str:
    """The run in a line."""
    settings = asked.settings
    kind = f"{settings.trainer}, {'not quantised' if settings.quantization == 'none' else settings.quantization}"
    length = f"{settings.prompt:,} + {settings.completion:,}" if settings.generates else f"{settings.completion:,}"
    checkpointing = "" if settings.checkpointing else ", no gradient checkpointing"
    if settings.packs:
        tokens = largest_micro_batch(asked.shape, settings, asked.total).tokens
        batch = f"{settings.completions} x ({length}) tokens in packs of at most {tokens:,}"
    else:
        batch = f"micro-batch {settings.rows} x ({length}) tokens"
    fused = ", fused layers" if settings.fused else ""
    moved = ", embeddings in the host's memory" if host_embeddings(asked.shape, settings) else ""
    return (
        f"{asked.title}, {asked.shape.parameters / 1e9:.2f}B, {kind}, LoRA r={asked.shape.rank},"
        f" {batch}{checkpointing}{fused}{moved}"
    )


def variants(settings: Settings) -> dict[str, Settings]:
    """The same micro-batch under GRPO over one base and over two copies, and under SFT; vLLM's cache at its smallest,
    which is one sequence."""
    grpo = replace(settings, trainer="grpo", engine="vllm", cache=0) if settings.cuda else settings
    if not settings.generates:
        prompt = settings.completion // 2
        grpo = replace(grpo, prompt=prompt, completion=settings.completion - prompt, sequences=64)
    sft = replace(settings, trainer="sft", prompt=0, completion=settings.length)
    return {
        "GRPO, one base": replace(grpo, shared=True),
        "GRPO, two copies": replace(grpo, shared=False),
        "SFT": sft,
    }


def cards_table(asked: Question) -> Table:
    """What fits on cards of other sizes: the longest sequence in a micro-batch of one, and the largest micro-batch."""
    found = variants(asked.settings)
    table = Table()
    table.add_column("card")
    for name in found:
        table.add_column(name, justify="right")
    for gigabytes in CARDS:
        total = card_bytes(gigabytes)
        cells = []
        for settings in found.values():
            longest = longest_context(asked.shape, settings, total)
            cells.append(f"{longest:,} / {largest_batch(asked.shape, settings, total):,}" if longest else "-")
        table.add_row(f"{gigabytes} GB", *cells)
    return table


def peak(phases: list[PhasePrediction]) -> PhasePrediction:
    """The phase that takes most."""
    return max(phases, key=lambda phase: phase.total)
