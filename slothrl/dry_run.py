"""`python -m slothrl train --dry-run`: everything that comes before the weights, the plan, and whether it will fit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from slothrl.checks import gpu_memory_gb
from slothrl.compose import compose_config
from slothrl.config import Config
from slothrl.engine import EngineChoice, describe_engine
from slothrl.errors import UserError
from slothrl.fit import peak, phases_table, verdict
from slothrl.fit_config import Question, question, value
from slothrl.fit_memory import host_embeddings, predict
from slothrl.fit_terms import adapter_bytes, base_bytes
from slothrl.plan import Batch, Plan, size
from slothrl.prepare import Prepared, prepare
from slothrl.prompts import longest_example
from slothrl.reward_workers import closing_workers


def dry_run(jobs: Sequence[Sequence[str]], overlay: Path | None = None, console: Console | None = None) -> int:
    """Show every job's plan and prediction; the exit code: 2 where one of them will not fit.

    Rewards, data and tokenizer are opened and tried as a run would; nothing is written, and no weights are loaded.

    Args:
        jobs: the overrides of each.

    Raises:
        UserError: what a run would end with before it loads its model.
    """
    console, problems = console or Console(), []
    for overrides in jobs:
        asked = _show(compose_config(overrides, overlay, anywhere=True), console)
        problems += [problem] if (problem := verdict(asked)) else []
    if problems:
        raise UserError("\n".join(problems))
    return 0


@closing_workers()
def _show(config: Any, console: Console) -> Question:
    prepared = prepare(config, engine=_engine(config))
    longest = prepared.prompts.longest if prepared.prompts else longest_example(prepared.train, prepared.tokenizer)
    asked = question(config, prepared.engine.name, longest)
    planned(prepared, asked).show(console)
    console.print(phases_table(asked))
    return asked


def _engine(config: Config) -> EngineChoice | None:
    """For a GPU that is not here; None where this machine can tell."""
    if config.algo.trainer == "sft" or config.gpu.device != "cuda" or gpu_memory_gb() is not None:
        return None
    name = "vllm" if config.rollout.engine == "auto" else config.rollout.engine
    return EngineChoice(name, "planned: that GPU is not here")


def planned(prepared: Prepared, asked: Question) -> Plan:
    """The plan table of a run whose model is not loaded."""
    config, shape, settings = prepared.config, asked.shape, asked.settings
    plan = Plan(f"slothrl: {config.algo.name} (dry run)")
    base = base_bytes(shape, settings.quantization, settings.width, double=not settings.uses_vllm)
    if moved := host_embeddings(shape, settings):
        base -= 0 if settings.uses_vllm else moved  # vLLM's, of two, has its own
    plan.add("model", f"{asked.title}, {shape.parameters / 1e6:,.1f}M parameters, {size(base)} in memory")
    quantization = "not quantised" if settings.quantization == "none" else settings.quantization
    plan.add("weights", f"{quantization}, {str(prepared.model.dtype).removeprefix('torch.')}, on {config.gpu.device}")
    trained = f"{shape.adapter / 1e6:.2f}M trainable, {size(adapter_bytes(shape))} in float32"
    plan.add("LoRA", f"r={shape.rank}, alpha={config.model.lora.lora_alpha}, {trained}")
    if moved:
        plan.add("embeddings", f"{size(moved)} in the host's memory, as far as that has room")
    plan.add("data", prepared.data_title)
    plan.add("step", _batch(config, asked).describe())
    if not prepared.sft:
        plan.add("engine", describe_engine(prepared.engine, config.rollout))
        for reward in prepared.rewards:
            plan.add("reward", f"{reward.name} x {reward.weight:g} ({reward.source})")
    fullest = peak(predict(shape, settings, asked.total))
    share = f"{size(fullest.total)} of {size(asked.total)}, in the {fullest.name} phase"
    plan.add("memory", f"{share} (predicted)")
    return plan


def _batch(config: Config, asked: Question) -> Batch:
    rows, accumulation = asked.settings.rows, asked.accumulation
    if not asked.settings.generates:
        return Batch(rows, accumulation, 1, 1, asked.settings.length)
    made = asked.settings.sequences // rows
    return Batch(rows, accumulation, value(config, "num_generations"), made, asked.settings.length)
