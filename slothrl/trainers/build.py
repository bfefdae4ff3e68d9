"""From a prepared run to a trainer: TRL's config, a base model, a LoRA adapter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback
from trl import GRPOConfig, SFTConfig
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from slothrl.checks import set_fields
from slothrl.errors import UserError
from slothrl.models import peft_config
from slothrl.prepare import Prepared
from slothrl.reward_isolation import together
from slothrl.trainer_fields import trainer_fields
from slothrl.trainers.grpo import GRPOTrainer
from slothrl.trainers.sft import SFTTrainer

CONFIGS: dict[str, Callable[..., Any]] = {"grpo": GRPOConfig, "sft": SFTConfig}


def trainer_config(prepared: Prepared, output_dir: Path) -> GRPOConfig | SFTConfig:
    """TRL's config: what presets and user set under `trainer`, and what follows from device and dtype.

    Raises:
        UserError: TRL refuses the combination, in its own words.
    """
    config = prepared.config
    on_gpu = config.gpu.device == "cuda"
    arguments: dict[str, Any] = {
        "output_dir": str(output_dir),
        "seed": config.seed,
        "report_to": list(config.logger.report_to) or "none",
        "use_cpu": not on_gpu,
        "dataloader_pin_memory": on_gpu,
        "bf16": on_gpu and prepared.model.dtype == torch.bfloat16,
        "fp16": on_gpu and prepared.model.dtype == torch.float16,
        "disable_tqdm": True,  # we have a bar of our own
    }
    if not prepared.sft and config.reward.weights is not None:
        arguments["reward_weights"] = list(config.reward.weights)
    known = trainer_fields(config.algo.trainer)
    arguments.update({key: value for key, value in set_fields(config.trainer).items() if key in known})
    try:
        made = CONFIGS[config.algo.trainer](**arguments)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    if isinstance(made, SFTConfig) and made.assistant_only_loss and made.chat_template_path is None:
        _check_assistant_mask(prepared)
    return made


def _check_assistant_mask(prepared: Prepared) -> None:
    """Whether the chat template marks what the assistant says, or TRL knows one like it that does.

    Raises:
        UserError: neither, or rows without messages; TRL says so only once the model is loaded.
    """
    columns, row = prepared.train.column_names, prepared.train[0]
    pair = " (prompt and completion: the loss counts completions only without it)" if "completion" in columns else ""
    if not isinstance(row.get("messages", row.get("prompt")), list):
        raise UserError(f"trainer.assistant_only_loss=true needs messages, and the data has text: leave it out{pair}")
    template = prepared.tokenizer.chat_template
    try:
        if not (template and has_generation_markers(template)):
            get_training_chat_template(prepared.tokenizer)
    except ValueError as error:
        raise UserError(
            "trainer.assistant_only_loss=true: the model's chat template does not mark what the assistant says"
            " ({% generation %}), and TRL has no template in its place: name one that does by"
            f" trainer.chat_template_path=…, or leave it out{pair}"
        ) from error


def build_trainer(prepared: Prepared, arguments: GRPOConfig | SFTConfig, model: Any) -> GRPOTrainer | SFTTrainer:
    """Put the adapter and the trainer around a base model (`slothrl.rollout.open_base`)."""
    common: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "train_dataset": prepared.train,
        "processing_class": prepared.tokenizer,
        "peft_config": peft_config(prepared.config.model.lora, prepared.model.revision),
    }
    try:
        if prepared.sft:
            trainer = SFTTrainer(**common, eval_dataset=prepared.eval_loss)
        else:
            trainer = GRPOTrainer(reward_funcs=together(prepared.rewards), **common, **_of_the_step(prepared))
    except ValueError as error:
        raise UserError(f"trainer: {' '.join(str(error).split())}") from error
    trainer.remove_callback(PrinterCallback)  # a bar and metrics.jsonl take its place
    return trainer


def _of_the_step(prepared: Prepared) -> dict[str, Any]:
    config = prepared.config
    return {
        "packing": config.packing,
        "algorithm": prepared.algorithm,
        "dynamic_sampling": config.dynamic_sampling,
        "diagnosis": config.diagnosis,
    }
