"""Starting the engine that a run planned, on the trainer's model, and proving that it follows the LoRA."""

from __future__ import annotations

from rich.console import Console

from slothrl.engine import Engine, TransformersEngine
from slothrl.prepare import Prepared
from slothrl.probe import PolicyProbe


def attach_engine(prepared: Prepared, trainer, console: Console) -> Engine:
    """Start the planned engine on the trainer's model, and for vLLM prove that it follows the LoRA."""
    if prepared.engine.name == "transformers":
        engine: Engine = TransformersEngine(trainer.model, prepared.tokenizer)
        if not prepared.sft:
            trainer.attach(engine)
        return engine
    engine = _start_vllm(prepared, trainer)
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
    )
    trainer.attach(engine, probe)
    return engine


def _start_vllm(prepared: Prepared, trainer) -> Engine:
    from slothrl.vllm_engine import VLLMEngine, VLLMOptions

    config, rollout = prepared.config, prepared.config.rollout
    options = VLLMOptions(
        path=prepared.model.path,
        revision=prepared.model.revision,
        max_model_len=rollout.max_model_len or config.data.max_prompt_length + trainer.args.max_completion_length,
        max_num_seqs=trainer.args.generation_batch_size,
        quantization="bitsandbytes" if prepared.model.quantization == "nf4" else None,
        dtype=engine_dtype(prepared),
        gpu_memory_utilization=rollout.gpu_memory_utilization,
        kv_cache_gb=rollout.kv_cache_gb,
        enforce_eager=rollout.enforce_eager,
        seed=config.seed,
    )
    return VLLMEngine(trainer.model, prepared.tokenizer, options)


def engine_dtype(prepared: Prepared) -> str:
    chosen = prepared.config.rollout.dtype
    return str(prepared.model.dtype).removeprefix("torch.") if chosen == "auto" else chosen


def _probe_bound(prepared: Prepared) -> float:
    """The bound on the untrained policies: float32 implementations agree to 1e-5 nat, bf16 ones to 0.02 to 0.09."""
    exact = engine_dtype(prepared) == "float32" and str(prepared.model.dtype) == "torch.float32"
    bound = prepared.config.rollout.probe_bound
    return bound if bound is not None else 0.001 if exact else 0.25


def base_note(prepared: Prepared) -> str:
    """vLLM holds weights of its own so far, and not always in the trainer's format."""
    if prepared.engine.name != "vllm":
        return ""
    trained, kept = prepared.model.quantization, engine_dtype(prepared)
    own = trained if trained in ("nf4", "checkpoint") else kept
    note = f"; a second copy of the base in {own}"
    # LLM.int8 has no counterpart there: rollouts come from a slightly other policy, which the probe and the ratio see.
    return f"{note}, the trained one is int8" if trained == "int8" else note
