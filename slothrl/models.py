"""Loading a base model for training: quantised where that helps, in the dtype that trains, with an honest size."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from slothrl.config import LoraConfig, ModelConfig
from slothrl.embedded import EMBEDDED, embedded_folder
from slothrl.errors import UserError
from slothrl.host_embeddings import in_host
from slothrl.vllm_compat import keep_plain, making_models

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class ModelPlan:
    """What will be loaded, settled before any weights are.

    Attributes:
        path: a folder or hub name, for transformers and vLLM alike.
        quantization: "nf4", "int8", "none", or "checkpoint" where the checkpoint itself is quantised.
        dtype: of the unquantised weights and of the computation.
        context: the longest sequence the model was made for, in tokens; None where its config does not say.
    """

    path: str
    title: str
    revision: str | None
    quantization: str
    dtype: torch.dtype
    context: int | None
    attn_implementation: str | None


def plan_model(config: ModelConfig, device: str) -> ModelPlan:
    """Resolve names and "auto"s. Reads the model's config.json; loads no weights.

    Raises:
        UserError: there is no such model here or on the hub, or it is not a causal language model.
    """
    embedded = config.name in EMBEDDED
    path = str(embedded_folder(config.name)) if embedded else config.name
    try:
        found = AutoConfig.from_pretrained(path, revision=config.revision)
    except (OSError, ValueError) as error:
        raise UserError(f"model.name={config.name}: {_first_line(error)}") from error
    prequantized = getattr(found, "quantization_config", None) is not None
    quantization = config.quantization if config.quantization != "auto" else ("nf4" if device == "cuda" else "none")
    dtype = config.dtype if config.dtype != "auto" else ("bfloat16" if device == "cuda" else "float32")
    return ModelPlan(
        path=path,
        title=EMBEDDED[config.name].title if embedded else config.name,
        revision=config.revision,
        quantization="checkpoint" if prequantized else quantization,
        dtype=DTYPES[dtype],
        context=getattr(found.get_text_config(), "max_position_embeddings", None),
        attn_implementation=config.attn_implementation or _exact_attention(found.get_text_config()),
    )


def _exact_attention(config: Any) -> str | None:
    """The attention that computes what the model's config says; None: any does.

    transformers' default, torch's attention, leaves out the cap on attention scores (Gemma 2, arXiv:2408.00118, section
    2) without a word.
    """
    return "eager" if getattr(config, "attn_logit_softcapping", None) is not None else None


def load_tokenizer(plan: ModelPlan):
    """The tokenizer, padding on the left (decoders generate from the right end) and with a pad token.

    A tokenizer without a pad token gets its end token for one: padding is masked everywhere, so which token it is
    changes nothing.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(plan.path, revision=plan.revision, padding_side="left")
    except (OSError, ValueError) as error:
        raise UserError(f"no tokenizer in {plan.path}: {_first_line(error)}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise UserError(f"the tokenizer of {plan.title} has neither a pad token nor an end token: add them to it")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(plan: ModelPlan, device: str):
    """The base model, frozen by the adapter later; on the GPU it is quantised while it loads."""
    arguments: dict[str, Any] = {
        # Explicit, because TRL's default would be float32.
        "dtype": plan.dtype,
        "revision": plan.revision,
        "device_map": {"": 0 if device == "cuda" else "cpu"},
    }
    if plan.attn_implementation:
        arguments["attn_implementation"] = plan.attn_implementation
    if plan.quantization in ("nf4", "int8"):
        arguments["quantization_config"] = quantization_config(plan.quantization, plan.dtype)
    try:
        with making_models():
            model = AutoModelForCausalLM.from_pretrained(plan.path, **arguments)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"could not load {plan.title}: {_first_line(error)}") from error
    keep_plain(model)
    for module in model.modules():
        # Or the first forward in eval mode repacks the weights for a CPU kernel that has no backward.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore
    return model


def quantization_config(quantization: str, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """nf4 with double quantisation (QLoRA, Dettmers et al., 2023) or LLM.int8 (Dettmers et al., 2022)."""
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def peft_config(config: LoraConfig, revision: str | None = None) -> PeftLoraConfig:
    """PEFT's config of an adapter; `revision` of the base is saved with it, for whoever loads or merges it."""
    targets = config.target_modules
    return PeftLoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        use_rslora=config.use_rslora,
        task_type="CAUSAL_LM",
        revision=revision,
    )


def parameter_bytes(model) -> tuple[int, int, int]:
    """(bytes of all parameters, number of trainable parameters, number of base parameters unpacked from 4-bit).

    Embeddings in the host's memory count as parameters, and not in the bytes.
    """
    total = trainable = count = 0
    for parameter in model.parameters():
        total += 0 if in_host(parameter) else parameter.nbytes
        if parameter.requires_grad:
            trainable += parameter.numel()
        else:
            packed = type(parameter).__name__ == "Params4bit"  # two weights a byte
            count += parameter.numel() * (2 * parameter.element_size() if packed else 1)
    return total, trainable, count


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
