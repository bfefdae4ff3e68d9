"""What is wrong with a config, all of it, in well under a second: nothing here imports torch or loads a model."""

from __future__ import annotations

import ctypes
import difflib
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from slothrl.choices import CHOICES, LOSS_TYPES
from slothrl.config import Config
from slothrl.data import static_data_problems
from slothrl.embedded import EMBEDDED, context_of
from slothrl.plugins import static_plugin_problems
from slothrl.rewards import static_reward_problems
from slothrl.trainer_checks import logger_problems, number_problems
from slothrl.trainer_fields import trainer_fields

UNSET = "???"
MINIMA = {
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "num_generations": 2,
    "max_completion_length": 1,
}
COUNTS = ("reward.score_samples", "packing.tokens_per_micro_batch", "dynamic_sampling.max_resamples")
COUNTS += ("diagnosis.stop_after", "model.activation_gib")
GENERATION = ("generation_batch_size", "steps_per_generation")
OURS = {
    "use_vllm": "rollout=vllm or rollout=transformers",
    "output_dir": "output_dir=…",
    "seed": "seed=…",
    "reward_weights": "reward.weights=…",
    "report_to": "logger=…",
    "resume_from_checkpoint": "resume=…",
    "vllm_gpu_memory_utilization": "rollout.gpu_memory_utilization=…",
    "vllm_max_model_length": "rollout.max_model_len=…",
    "vllm_mode": "rollout=vllm, which is in this process,",
    "vllm_tensor_parallel_size": "nothing: one GPU is used; rollout.* has vLLM's knobs;",
    "vllm_structured_outputs_regex": "reward=… with regex_format",
}


def problems(config: Config | DictConfig, anywhere: bool = False) -> list[str]:
    """Everything wrong with a composed config that shows without loading data or a model, one line each.

    Args:
        anywhere: device and loggers need not be here.
    """
    found = _mandatory(config)
    if found:  # the rest would trip over them
        return found
    if not OmegaConf.is_dict(config.trainer):
        return [f"trainer={config.trainer}: trainer has fields to set, trainer.<field>=…"]
    trainer = set_fields(config.trainer)
    found += _choices(config, trainer)
    found += _trainer_problems(config.algo.trainer, trainer) + number_problems(trainer)
    found += _ranges(config)
    if config.algo.trainer == "grpo":
        found += batch_problems(trainer) + _length_problems(config, trainer)
    elif config.packing.mode == "on":
        found.append("packing=on packs the updates of GRPO; SFT's sequences are packed by trainer.packing=true")
    found += static_data_problems(config.data)
    if config.algo.trainer == "grpo" or config.reward.functions:
        found += static_reward_problems(config.reward)
    if config.algo.trainer == "grpo" and not config.reward.functions:
        found.append("reward.functions is empty: name at least one, as in 'reward.functions=[./my_reward.py:fn]'")
    found += static_plugin_problems(config.algo)
    here = [] if anywhere else _device_problems(config) + logger_problems(config.logger.report_to)
    found += _model_problems(config) + here + _path_problems(config)
    return list(dict.fromkeys(found))


def set_fields(trainer: Any) -> dict[str, Any]:
    """The trainer fields that somebody set; the others keep TRL's defaults."""
    plain = OmegaConf.to_container(trainer, resolve=True) if isinstance(trainer, DictConfig) else dict(trainer)
    return {str(key): value for key, value in dict(plain).items() if value != UNSET}  # pyright: ignore


def _mandatory(config: Any) -> list[str]:
    missing = sorted(k for k in OmegaConf.missing_keys(config) if not k.startswith("trainer."))
    return [f"{key} is needed: {key}=…" for key in missing]


def _choices(config: Any, trainer: dict[str, Any]) -> list[str]:
    found = []
    for key, valid in CHOICES.items():
        if key == "trainer.loss_type":
            valid = LOSS_TYPES.get(config.algo.trainer)
        value = trainer.get(key.split(".")[1]) if key.startswith("trainer.") else OmegaConf.select(config, key)
        if valid and value is not None and value not in valid:
            found.append(f"{key}={value}: must be one of {', '.join(str(v) for v in valid)}")
    return found


def _trainer_problems(kind: str, trainer: dict[str, Any]) -> list[str]:
    fields, found = trainer_fields(kind), []
    other = "sft" if kind == "grpo" else "grpo"
    others = trainer_fields(other)
    for name, value in trainer.items():
        if name in OURS:
            found.append(f"trainer.{name}: set {OURS[name]} instead")
        elif name not in fields and name not in others:  # added with "+", or by a file of the user's
            near = difflib.get_close_matches(name, [*fields], n=3)
            hint = f"; did you mean {' or '.join(f'trainer.{n}' for n in near)}?" if near else ""
            found.append(f"trainer.{name}: there is no such field in {kind.upper()}Config{hint}")
        elif name not in fields:
            if name != "max_completion_length":  # the data presets set it for every algorithm
                found.append(f"trainer.{name} belongs to {other.upper()}Config, and this run is algo.trainer={kind}")
        elif problem := fields[name].problem(value):
            found.append(f"trainer.{name}={value}: {problem}")
    return found


def _ranges(config: Any) -> list[str]:
    found = []
    for key in ("model.lora.r", "logger.samples_every", "reward.workers", "max_nonfinite_steps", "diagnosis.every"):
        if (value := OmegaConf.select(config, key)) < 1:
            found.append(f"{key}={value}: must be at least 1")
    for key in ("reward.timeout", "reward.memory_gb", "rollout.timeout"):
        if not 0 < (value := OmegaConf.select(config, key)) < float("inf"):
            found.append(f"{key}={value}: must be over 0")
    for value in config.reward.weights or []:
        if not abs(value) < float("inf"):  # NaN too
            found.append(f"reward.weights={list(config.reward.weights)}: {value} is no finite number")
    for key in COUNTS:
        if not 0 <= ((value := OmegaConf.select(config, key)) or 0) < float("inf"):
            found.append(f"{key}={value}: must be 0 or more")
    if not 0 <= (value := config.reward.max_failure_rate) <= 1:
        found.append(f"reward.max_failure_rate={value}: must be in [0, 1]")
    for key in ("rollout.gpu_memory_utilization", "model.lora.lora_dropout"):
        if not 0 <= (value := OmegaConf.select(config, key)) < 1:
            found.append(f"{key}={value}: must be in [0, 1)")
    return found


def batch_problems(trainer: dict[str, Any]) -> list[str]:
    """Contradictions in the arithmetic of one GRPO step, with the numbers that would fit."""
    fields = trainer_fields("grpo")

    def value(name: str) -> Any:
        return trainer.get(name, fields[name].default)

    found = []
    for name, low in MINIMA.items():
        if value(name) is None:  # TRL annotates some as optional, and then computes with them
            found.append(f"trainer.{name}=null: needs a number")
        elif not isinstance(value(name), int):
            return []  # said already, with the type that the field takes
        elif value(name) < low:
            found.append(f"trainer.{name}={value(name)}: must be at least {low}")
    return found or _group_problems({name: value(name) for name in (*MINIMA, *GENERATION)})


def _group_problems(value: dict[str, Any]) -> list[str]:
    """Whether whole groups fill the generation batch, and whole micro-batches do."""
    per_device, group = value["per_device_train_batch_size"], value["num_generations"]
    asked, steps = (value[name] for name in GENERATION)
    if not all(number is None or isinstance(number, int) for number in (asked, steps)):
        return []
    if low := [name for name in GENERATION if value[name] is not None and value[name] < 1]:
        return [f"trainer.{name}={value[name]}: must be at least 1" for name in low]
    if asked and steps:
        return ["trainer.generation_batch_size and trainer.steps_per_generation say the same thing: set one of them"]
    if asked and asked % per_device:
        unit = f"trainer.per_device_train_batch_size={per_device}"
        return [f"trainer.generation_batch_size={asked} is no multiple of {unit}"]
    factor = "steps_per_generation" if steps else "gradient_accumulation_steps"
    batch = asked or per_device * value[factor]
    if batch % group == 0:
        return []
    near = [n for n in range(2, batch + 1) if batch % n == 0]
    near = sorted(sorted(near, key=lambda n: abs(n - group))[:3])
    made = f"trainer.per_device_train_batch_size={per_device} x {factor}={value[factor]}"
    return [
        f"trainer.num_generations={group} does not divide the generation batch of {batch} "
        f"({f'trainer.generation_batch_size={asked}' if asked else made}); it would divide it as "
        f"{', '.join(map(str, near)) or 'nothing: raise the batch'}"
    ]


def _length_problems(config: Any, trainer: dict[str, Any]) -> list[str]:
    completion = trainer.get("max_completion_length", trainer_fields("grpo")["max_completion_length"].default)
    prompt, context = config.data.max_prompt_length, context_of(config.model.name)
    if not isinstance(completion, int):
        return []
    found = []
    if context is not None and prompt + completion > context:
        found.append(
            f"data.max_prompt_length={prompt} + trainer.max_completion_length={completion} = {prompt + completion}"
            f" tokens, more than the {context} of {config.model.name}"
        )
    limit = config.rollout.max_model_len
    if limit is not None and prompt + completion > limit:
        found.append(
            f"rollout.max_model_len={limit} is under data.max_prompt_length + trainer.max_completion_length"
            f" = {prompt + completion}"
        )
    return found


def _model_problems(config: Any) -> list[str]:
    name = config.model.name
    if name in EMBEDDED:
        return []
    path = Path(name).expanduser()
    # A hub name is "owner/name" or "name"; everything else is meant as a path.
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/")
    if path.is_dir():
        return [] if (path / "config.json").is_file() else [f"model.name={name}: no config.json in this folder"]
    return (
        [f"model.name={name}: no such folder; name one with a config.json, or owner/name of the hub"]
        if looks_like_path
        else []
    )


def _device_problems(config: Any) -> list[str]:
    if config.gpu.device != "cuda":
        return []
    if not gpu_memory_gb():
        return [f"gpu={config.gpu.name}: no CUDA device here (the driver shows none); use gpu=cpu"]
    return []


def gpu_memory_gb() -> float | None:
    """Memory of the first visible CUDA device in GB, asked of the driver itself; None where there is no device."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, total = ctypes.c_int(), ctypes.c_size_t()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
        return None
    device = ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(device), 0) or driver.cuDeviceTotalMem_v2(ctypes.byref(total), device):
        return None
    return total.value / 1e9


def detect_gpu() -> str:
    """The gpu preset for this machine: the largest whose card is not larger than this one."""
    memory = gpu_memory_gb()
    if memory is None:
        return "cpu"
    # Cards report a little under their name: a 24 GB one has 25.3e9 bytes, an 8 GB one 8.2e9 to 8.5e9.
    return next((f"{size}gb" for size in (80, 24, 16, 12) if memory >= size), "8gb")


def _path_problems(config: Any) -> list[str]:
    found = []
    if config.resume is not None and not Path(config.resume).expanduser().is_dir():
        found.append(f"resume={config.resume}: no such folder")
    if config.output_dir is not None and (reason := unwritable(Path(config.output_dir).expanduser())):
        found.append(f"output_dir={config.output_dir}: {reason}")
    elif config.output_dir is not None and config.resume is None:
        folder = Path(config.output_dir).expanduser()
        if (folder / "metrics.jsonl").exists():  # two runs in one curve
            found.append(f"output_dir={folder}: holds a run already; resume={folder} goes on with it")
    return found


def unwritable(folder: Path) -> str | None:
    """Why `folder` could not be made or written to, found at its nearest existing parent."""
    existing = folder
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        return f"{existing} is a file"
    return None if os.access(existing, os.W_OK | os.X_OK) else f"{existing} is not writable"
