"""What `use_vllm=True` of TRL's config means here: vLLM in this process, over the same base where that is possible."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from trl import GRPOConfig

from slothrl.errors import NotShareableError
from slothrl.lora_slot import check_adapter, lora_shape
from slothrl.vllm_engine import VLLMEngine, VLLMOptions

UNSUPPORTED = {"vllm_tensor_parallel_size": 1, "vllm_structured_outputs_regex": None}


def open_shared(
    path: str, args: GRPOConfig, adapter: LoraConfig, quantization_config: Any = None
) -> tuple[Any, VLLMEngine]:
    """Start vLLM on a checkpoint and lay the trainer's model over it.

    Args:
        path: folder or hub name, as TRL takes it for `model`.
        args: its `model_init_kwargs` say dtype, revision, attention and quantisation, as they do to TRL; the dtype is
            bfloat16 where none is named and the base is quantised or `bf16` is on, else TRL's float32.
        adapter: what the trainer will put around the model.
        quantization_config: TRL's own argument for the same.

    Returns:
        (the model, the engine, which must still `follow` the adapted model). A model that cannot be shared is loaded
        beside vLLM's, with a warning that says why.
    """
    from slothrl.shared_model import SharedModel, empty_model
    from slothrl.vllm_compat import keep_plain, making_models

    options: dict[str, Any] = {**(args.model_init_kwargs or {})}  # pyright: ignore
    config = quantization_config or options.pop("quantization_config", None)
    revision = options.pop("revision", None)
    dtype = _dtype(options.pop("dtype", None), args, config)
    attention = {k: v for k, v in options.items() if k == "attn_implementation"}
    check_adapter(adapter)
    empty = empty_model(path, dtype, revision, **attention)
    outline = get_peft_model(empty_model(path, dtype, revision), adapter, low_cpu_mem_usage=True)
    nf4 = getattr(config, "load_in_4bit", False) and config.bnb_4bit_quant_type == "nf4"
    engine = VLLMEngine(_options(path, args, dtype, "bitsandbytes" if nf4 else None, revision), lora_shape(outline))
    try:
        if config is not None and not nf4:
            raise NotShareableError("vLLM quantises to nf4 only")
        return SharedModel(engine.vllm_model, empty, revision).model, engine
    except NotShareableError as error:
        from transformers import AutoModelForCausalLM

        warnings.warn(f"the base is in memory twice: {error}", stacklevel=3)
        with making_models():
            model = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, revision=revision, quantization_config=config, **options
            )
        keep_plain(model)
        return model, engine


def beside(model: Any, args: GRPOConfig) -> VLLMEngine:
    """Start vLLM for an adapted model that is loaded already and keeps its own weights."""
    if not isinstance(model, PeftModel):
        raise ValueError("use_vllm=True needs a LoRA adapter (peft_config=...): the LoRA is what slothrl pushes")
    base: Any = model.get_base_model()
    quantization = "bitsandbytes" if getattr(base, "is_loaded_in_4bit", False) else None
    options = _options(base.config._name_or_path, args, base.dtype, quantization, None, base.config)
    return VLLMEngine(options, lora_shape(model))


def _options(
    path: str, args: GRPOConfig, dtype: torch.dtype, quantization: str | None, revision: str | None, config: Any = None
) -> VLLMOptions:
    for name, default in UNSUPPORTED.items():
        if getattr(args, name) != default:
            raise ValueError(f"{name} is not supported with slothrl's colocated vLLM")
    if config is None:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(path, revision=revision)
    return VLLMOptions(
        path=path,
        revision=revision,
        max_model_len=args.vllm_max_model_length or min(4096, config.get_text_config().max_position_embeddings),
        max_num_seqs=args.generation_batch_size or 1,
        quantization=quantization,
        dtype=str(dtype).removeprefix("torch."),
        gpu_memory_utilization=args.vllm_gpu_memory_utilization,
        seed=args.seed,
    )


def _dtype(named: Any, args: GRPOConfig, quantization_config: Any) -> torch.dtype:
    if isinstance(named, str) and named != "auto":
        return getattr(torch, named)
    if isinstance(named, torch.dtype):
        return named
    return torch.bfloat16 if quantization_config is not None or args.bf16 else torch.float32
