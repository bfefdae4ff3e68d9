"""From a run's config to what its memory is predicted from: the model's shape and the settings."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from slothrl.checks import detect_gpu, gpu_memory_gb, set_fields
from slothrl.config import Config
from slothrl.errors import ConfigError
from slothrl.fit_constants import GIB, card_bytes
from slothrl.fit_memory import Settings
from slothrl.fit_shape import Shape, shape_of
from slothrl.trainer_fields import trainer_fields

DEFAULT_OPTIMIZER = "adamw_torch_fused"  # transformers' own default, which is no literal in its source


@dataclass(frozen=True)
class Question:
    """What is asked: does this shape with these settings fit into so many bytes?

    Attributes:
        title: the model's.
        accumulation: micro-batches a step.
    """

    title: str
    shape: Shape
    settings: Settings
    total: int
    accumulation: int


def question(config: Any, engine: str | None = None, prompt: int | None = None) -> Question:
    """Read a composed config. Loads the model's config.json and no weights.

    Args:
        engine: what was chosen; None: vLLM on a GPU where the config does not name transformers.
        prompt: the longest prompt (of SFT the longest example), in tokens, where it is known; None:
            `data.max_prompt_length` (`trainer.max_length`).

    Raises:
        UserError: there is no such model, or none that can be predicted; `ConfigError`: it lacks a LoRA's target.
    """
    from slothrl.lora_targets import target_problems
    from slothrl.models import peft_config, plan_model
    from slothrl.shared_model import empty_model

    plan = plan_model(config.model, config.gpu.device)
    model = empty_model(plan.path, plan.dtype, plan.revision)
    if wrong := target_problems(model, config.model.lora.target_modules):
        raise ConfigError(wrong)
    shape = shape_of(model, peft_config(config.model.lora))
    quantization = "nf4" if plan.quantization == "checkpoint" else plan.quantization
    settings = settings_of(config, quantization, plan.dtype.itemsize, engine, prompt, plan.context)
    return Question(plan.title, shape, settings, device_bytes(config), value(config, "gradient_accumulation_steps"))


def settings_of(
    config: Config, quantization: str, width: int, engine: str | None, prompt: int | None, context: int | None
) -> Settings:
    """The settings of a config whose "auto"s of dtype and quantisation are settled."""
    rollout, grpo, cuda = config.rollout, config.algo.trainer == "grpo", config.gpu.device == "cuda"
    rows = value(config, "per_device_train_batch_size")
    steps = value(config, "gradient_accumulation_steps")
    if grpo:
        completion, prompt = value(config, "max_completion_length"), prompt or config.data.max_prompt_length
        sequences = value(config, "generation_batch_size") or rows * (value(config, "steps_per_generation") or steps)
    else:
        completion = value(config, "max_length") or context or 1024
        if prompt is not None and not value(config, "packing"):  # which fills sequences up
            completion = min(completion, prompt)
        prompt, sequences = 0, 0
    if engine is None:
        engine = ("vllm" if cuda else "transformers") if rollout.engine == "auto" else rollout.engine
    return Settings(
        trainer=config.algo.trainer,
        engine=engine,
        quantization=quantization,
        width=width,
        rows=rows,
        packed=grpo and config.packing.mode != "off",
        completions=rows * steps,
        group=value(config, "num_generations") if grpo else 1,
        tokens=config.packing.tokens_per_micro_batch,
        shared_prefix=config.packing.shared_prefix,
        prompt=prompt,
        completion=completion,
        sequences=sequences,
        checkpointing=bool(value(config, "gradient_checkpointing")),
        fused=config.model.fuse == "on" or (cuda and config.model.fuse == "auto"),
        layer_graphs=cuda and config.model.graphs == "on",
        activations=config.model.activations,
        within=None if config.model.activation_gib is None else int(config.model.activation_gib * GIB),
        optimizer=str(value(config, "optim") or DEFAULT_OPTIMIZER),
        shared=rollout.share_base != "never" and quantization != "int8" and _one_dtype(config),
        sleep=rollout.sleep,
        embeddings=config.model.embeddings,
        utilization=rollout.gpu_memory_utilization,
        cache=None if rollout.kv_cache_gb is None else int(rollout.kv_cache_gb * GIB),
        graphs=not rollout.enforce_eager,
        cuda=cuda,
    )


def _one_dtype(config: Config) -> bool:
    """Whether vLLM computes in the trainer's dtype: two dtypes are two bases."""
    own = config.model.dtype if config.model.dtype != "auto" else "bfloat16"
    return config.gpu.device != "cuda" or config.rollout.dtype in ("auto", own)


def value(config: Config, name: str) -> Any:
    """A trainer field: as set, or TRL's default."""
    found = set_fields(config.trainer)
    return found[name] if name in found else trainer_fields(config.algo.trainer)[name].default


def device_bytes(config: Config) -> int:
    """The bytes a run may have: of the card here where the preset is the one it would get, else of a card of the
    preset's name; without a GPU of this machine."""
    if config.gpu.device != "cuda":
        return _machine_bytes()
    here = gpu_memory_gb()
    if here is not None and config.gpu.name == detect_gpu():
        return int(here * 1e9)
    return card_bytes(config.gpu.memory_gb or 24)


def _machine_bytes() -> int:
    with open("/proc/meminfo") as file:
        return int(file.readline().split()[1]) * 1024
