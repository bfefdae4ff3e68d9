"""The base model and the engine of a run: one copy of the weights for both where that is possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from rich.console import Console

from slothrl.engine import Engine, TransformersEngine
from slothrl.errors import NotShareableError, UserError
from slothrl.models import load_model, parameter_bytes, peft_config
from slothrl.plan import size
from slothrl.prepare import Prepared
from slothrl.probe import PolicyProbe

VIEW_SEQUENCES = 96


@dataclass(frozen=True)
class Base:
    """What a run starts from.

    Attributes:
        model: the base for the trainer, without an adapter yet.
        engine: vLLM, started; None where transformers generates.
        shared: the tie between the two; None where each has weights of its own.
        note: for the plan: who holds the base, and why twice where it is twice.
    """

    model: Any
    engine: Any = None
    shared: Any = None
    note: str = ""


def open_base(prepared: Prepared, arguments: Any) -> Base:
    """Start vLLM where it is planned, and lay the trainer's model over its weights, or load one.

    Args:
        arguments: TRL's config, whose batch and lengths size the engine.
    Raises:
        UserError: vLLM or transformers cannot load the model, or it cannot be shared and
            `rollout.share_base=always` asks for that.
    """
    plan, device, wish = prepared.model, prepared.config.gpu.device, prepared.config.rollout.share_base
    if prepared.engine.name != "vllm":
        model = load_model(plan, device)
        return Base(model, note=f"{size(parameter_bytes(model)[0])}, once")
    from slothrl.shared_model import SharedModel, empty_model

    options = {"attn_implementation": plan.attn_implementation} if plan.attn_implementation else {}
    empty = empty_model(plan.path, plan.dtype, plan.revision, **options)
    engine = _start_vllm(prepared, arguments)
    try:
        _check_formats(prepared, wish)
        shared = SharedModel(engine.vllm_model, empty, plan.revision)
        return Base(shared.model, engine, shared, f"{size(shared.base_bytes)}, once: vLLM's and the trainer's are one")
    except NotShareableError as error:
        if wish == "always":
            raise UserError(f"rollout.share_base=always: {error}") from error
        model = load_model(plan, device)
        return Base(model, engine, note=f"twice, {size(parameter_bytes(model)[0])} more for the trainer's: {error}")


def _check_formats(prepared: Prepared, wish: str) -> None:
    """Raise `NotShareableError` where the two sides are not meant to hold the same bytes."""
    if wish == "never":
        raise NotShareableError("rollout.share_base=never")
    if prepared.model.quantization == "int8":
        raise NotShareableError("vLLM has no LLM.int8 to load into; it holds what it samples from unquantised")
    if engine_dtype(prepared) != (kept := str(prepared.model.dtype).removeprefix("torch.")):
        raise NotShareableError(f"vLLM computes in {engine_dtype(prepared)}, the trainer in {kept} (model.dtype)")


def attach_engine(prepared: Prepared, trainer, base: Base, console: Console) -> Engine:
    """Give the trainer its engine; for vLLM prove that it follows the LoRA and that the base is still one."""
    if base.engine is None:
        engine: Engine = TransformersEngine(trainer.model, prepared.tokenizer)
        if not prepared.sft:
            trainer.attach(engine)
        return engine
    engine = base.engine.follow(trainer.model, prepared.tokenizer)
    if base.shared is not None:
        base.shared.verify(trainer.model)
    if not prepared.config.rollout.probe:
        trainer.attach(engine)
        return engine
    probe = PolicyProbe(engine, trainer.model, prepared.probe_rows(), bound=_probe_bound(prepared))
    difference = probe.check()
    if prepared.config.rollout.probe_bound is None:
        probe.allow_for(difference)
    moved, apart = probe.perturbation_test()
    console.print(
        f"policy probe: vLLM and the trainer differ by {difference:.4f} nat; a test LoRA moved vLLM by {moved:.2f} nat"
        f" and left them {apart:.4f} apart"
        + (f"; too little to tell alone: {', '.join(probe.undecided)}" if probe.undecided else "")
    )
    trainer.attach(engine, probe)
    return engine


def _start_vllm(prepared: Prepared, arguments: Any):
    """vLLM for the adapter that the trainer will make, whose shape PEFT itself tells from a model without weights."""
    from slothrl.lora_slot import check_adapter, lora_shape
    from slothrl.shared_model import empty_model
    from slothrl.vllm_engine import VLLMEngine, VLLMOptions

    config, rollout = prepared.config, prepared.config.rollout
    adapter = peft_config(config.model.lora)
    check_adapter(adapter)
    outline = empty_model(prepared.model.path, prepared.model.dtype, prepared.model.revision)
    outline = get_peft_model(outline, adapter, low_cpu_mem_usage=True)
    options = VLLMOptions(
        path=prepared.model.path,
        revision=prepared.model.revision,
        max_model_len=rollout.max_model_len or config.data.max_prompt_length + arguments.max_completion_length,
        max_num_seqs=arguments.generation_batch_size,
        quantization="bitsandbytes" if prepared.model.quantization == "nf4" else None,
        dtype=engine_dtype(prepared),
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        kv_cache_gb=rollout.kv_cache_gb,
        enforce_eager=rollout.enforce_eager,
        linear=rollout.linear,
        view=wants_view(rollout.view, _linear_weights(outline), arguments.generation_batch_size, free_memory()),
        kv_cache_dtype=rollout.kv_cache_dtype,
        prefix_caching=rollout.prefix_caching,
        sleep=rollout.sleep,
        seed=config.seed,
    )
    return VLLMEngine(options, lora_shape(outline))


def wants_view(wish: str, weights: int, sequences: int, free: int) -> bool:
    """Whether to generate from a 16-bit view of an nf4 base, for `rollout.view`.

    Args:
        weights: of all linear layers; the view takes 2 bytes each.
        sequences: completions generated side by side.
        free: bytes of device memory; 0 without a GPU.
    Returns:
        For "auto": where 16-bit weights are read enough faster than packed ones to be worth their memory, from 96
        sequences on (an H200 takes 6.4 instead of 8.6 ms a step of the 8B shape at 96, 5.8 instead of 6.5 at 64), if a
        quarter of the memory holds it.
    """
    if wish != "auto":
        return wish == "bf16"
    return sequences >= VIEW_SEQUENCES and 2 * weights <= free / 4


def _linear_weights(model: Any) -> int:
    """Weights of the linear layers inside the decoder, adapters aside."""
    modules = model.get_base_model().named_modules()
    layers = [
        m for name, m in modules if isinstance(m, torch.nn.Linear) and "lora_" not in name and "lm_head" not in name
    ]
    return sum(layer.weight.numel() for layer in layers)


def free_memory() -> int:
    """Bytes of free device memory; 0 without a GPU."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else 0


def engine_dtype(prepared: Prepared) -> str:
    """What vLLM computes in: the trainer's dtype, where nothing else was asked for."""
    chosen, model = prepared.config.rollout.dtype, prepared.model
    if chosen != "auto":
        return chosen
    # vLLM packs 4-bit weights for 16-bit computation only.
    packed = model.quantization in ("nf4", "checkpoint")
    return "bfloat16" if packed and str(model.dtype) == "torch.float32" else str(model.dtype).removeprefix("torch.")


def _probe_bound(prepared: Prepared) -> float:
    """The bound on the untrained policies: float32 implementations agree to 1e-5 nat, bf16 ones to 0.02 to 0.09."""
    exact = engine_dtype(prepared) == "float32" and str(prepared.model.dtype) == "torch.float32"
    bound = prepared.config.rollout.probe_bound
    return bound if bound is not None else 0.001 if exact else 0.25
