"""GRPO and its relatives: TRL's GRPOTrainer with slothrl's engine, log-probs and losses."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

from accelerate.utils import set_seed
from peft import PeftModel
from trl import GRPOConfig
from trl import GRPOTrainer as TRLGRPOTrainer

from slothrl.algorithm import Algorithm
from slothrl.config import DiagnosisConfig, DynamicSamplingConfig, PackingConfig
from slothrl.engine import Engine, Sampling
from slothrl.faults import EngineFault
from slothrl.memory_phases import PhaseMemory
from slothrl.phases import CACHE, PUSH
from slothrl.probe import PolicyProbe
from slothrl.trainers.adapters import adapter_values, restore_float32_adapter
from slothrl.trainers.checkpoints import ExactCheckpoints
from slothrl.trainers.guards import Guards
from slothrl.trainers.optimizing import FewLaunches
from slothrl.trainers.packed_step import PackedStep
from slothrl.trainers.reference import RefreshReference, add_reference, check_refresh
from slothrl.trainers.signal import Signal
from slothrl.trainers.watch import Watched


class GRPOTrainer(Guards, ExactCheckpoints, FewLaunches, Watched, Signal, PackedStep, TRLGRPOTrainer):
    """Takes TRL's arguments and six of its own.

    Losses that slothrl has (`slothrl.losses.VARIANTS`) are computed by it, over packed micro-batches where the model
    allows (`padded_reason` says where not, and why); for the others, for images and for mixture-of-experts auxiliary
    losses TRL's own code runs, unchanged. With an engine that reports the log-probs it sampled with, the importance
    correction happens inside the training forward, without TRL's extra pass for old log-probs where the policy is still
    the one that sampled. With a LoRA, `args.sync_ref_model` works too (`slothrl.trainers.reference`).

    Args:
        engine: what generates; default transformers' generate, or, where `args.use_vllm` asks for colocated vLLM, vLLM
            in this process with the LoRA pushed in memory (TRL's own vLLM path never sees the LoRA of a 4-bit base).
        probe: compared with the engine after each LoRA push; aborts the run on a mismatch.
        packing: how completions become micro-batches.
        algorithm: loss, advantage and KL estimator beyond TRL's arguments.
        dynamic_sampling: how often groups without signal are sampled again.
        diagnosis: when to repeat what is wrong with a step, and when to stop.

    Raises:
        ValueError: what TRL refuses; `packing` that must be and cannot; an `algorithm` that our own loss does not
            reach; a refresh of the reference that a LoRA cannot hold.
    """

    args: GRPOConfig  # what TRL's base class calls them more broadly
    model: Any
    max_completion_length: int

    def __init__(self, model, reward_funcs=None, args: GRPOConfig | None = None, *positional, **named):
        engine: Engine | None = named.pop("engine", None)
        probe: PolicyProbe | None = named.pop("probe", None)
        self.packing = named.pop("packing", None) or PackingConfig()
        self.algorithm = named.pop("algorithm", None) or Algorithm()
        self.dynamic_sampling = named.pop("dynamic_sampling", None) or DynamicSamplingConfig()
        self.diagnosis = named.pop("diagnosis", None) or DiagnosisConfig()
        wants_vllm = args is not None and args.use_vllm and args.vllm_mode == "colocate"
        lora = isinstance(model, PeftModel) or named.get("peft_config") is not None
        refreshes = args is not None and args.sync_ref_model and lora
        args = _for_trl(args, wants_vllm or engine is not None, refreshes)
        starting: Any = None
        if args and wants_vllm and engine is None and isinstance(model, str) and named.get("peft_config") is not None:
            from slothrl.trainers.colocate import open_shared

            model, starting = open_shared(model, args, named["peft_config"], named.pop("quantization_config", None))
        before = adapter_values(model)
        super().__init__(model, reward_funcs, args, *positional, **named)
        restore_float32_adapter(self.model, before)
        if refreshes:
            add_reference(self.model)
            self.add_callback(RefreshReference(self.model))
        self._check_choices()
        if engine is None and wants_vllm:
            from slothrl.trainers.colocate import beside

            engine = (starting or beside(self.model, self.args)).follow(self.model, self._tokenizer)
        self.engine: Engine | None = None
        self.probe: PolicyProbe | None = None
        self.memory: PhaseMemory | None = None
        self._corrects_sampling = False
        if engine is not None:
            self.attach(engine, probe)

    def _check_choices(self) -> None:
        """Raise ValueError where something was asked for that would silently not happen."""
        if self.packing.mode == "on" and self.padded_reason is not None:
            raise ValueError(f"packing=on: {self.padded_reason}; packing=auto would train over padded rows")
        if self.algorithm != Algorithm() and self.trl_loss_reason is not None:
            raise ValueError(f"algo.loss, algo.advantage and algo.kl need slothrl's own loss: {self.trl_loss_reason}")
        if self.dynamic_sampling.max_resamples and self.accelerator.num_processes > 1:
            raise ValueError("dynamic_sampling.max_resamples needs a single process")

    def attach(self, engine: Engine, probe: PolicyProbe | None = None) -> None:
        """Generate with `engine` from here on, checked by `probe` after each LoRA push."""
        self.engine, self.probe, self._pushed_step = engine, probe, -1
        self.memory = PhaseMemory(self.model, lambda: self.optimizer, engine.holdings)
        # TRL's switch, by which it keeps the log-probs that the engine sampled with.
        self.use_vllm = engine.name == "vllm"
        self._corrects_sampling = self.use_vllm and self.args.vllm_importance_sampling_correction
        if self.trl_loss_reason is None:
            self.vllm_importance_sampling_correction = False  # done in our own forward instead
        if self.use_vllm:
            # What a custom `rollout_func` may call on TRL's own generation backend.
            self.vllm_generation = SimpleNamespace(sync_weights=self.push_lora, llm=getattr(engine, "llm", None))
            # An engine in this process seeds the global generators when it starts.
            set_seed(self.args.seed, device_specific=True)

    # --- rollouts -----------------------------------------------------------------------------------------------

    def push_lora(self) -> None:
        """Give the engine the LoRA as it is now, and check on fixed tokens that it arrived, as often as 1% of the time
        allows; the tokens it then samples are checked at every step."""
        assert self.engine is not None
        with self.phases.during(PUSH):
            self.engine.push_lora()
            self._pushed_step = self.state.global_step
            if self.probe is not None and (difference := self.probe.check_push()) is not None:
                self._metrics["train"]["sampling/probe_difference"].append(difference)

    def _generate(self, prompts: list):
        if self.engine is None or self.memory is None:
            return super()._generate(prompts)
        self.memory.begin("rollout")
        with self.phases.during(CACHE):
            self.engine.wake()
        generated = super()._generate(prompts)
        self.memory.begin("update" if self.model.training else "scoring")
        # Turns with tools and custom rollouts are over: the trainer may have the cache's memory.
        with self.phases.during(CACHE):
            self.engine.sleep()
        return generated

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images=False):
        if images is not None and self.use_vllm:
            raise NotImplementedError("the vLLM engine takes text prompts only: use transformers' generate for images")
        if self.engine is None or images is not None:
            return super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images=has_tool_images
            )
        if self.state.global_step != self._pushed_step:
            self.push_lora()
        extra: Any = self.args.generation_kwargs  # a dict by now: TRL parses the string form
        sampling = Sampling(
            max_tokens=self.max_completion_length,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            extra=extra,
        )
        rollout = self.engine.generate(prompt_ids, sampling)
        if empty := [len(ids) for ids, tokens in zip(prompt_ids, rollout.completion_ids, strict=True) if not tokens]:
            # TRL reads the last token of each.
            said = (
                f"the engine gave no token for {len(empty)} of {len(prompt_ids)} prompts, of up to {max(empty)} tokens"
            )
            raise EngineFault(f"{said}: is there room for a completion in rollout.max_model_len?")
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["rollout/occupancy"].append(rollout.occupancy)
        if rollout.preemptions is not None:
            metrics["rollout/preemptions"].append(rollout.preemptions)
        return rollout.completion_ids, rollout.sampling_logprobs


def _for_trl(args: GRPOConfig | None, generates: bool, refreshes: bool) -> GRPOConfig | None:
    """The arguments without what slothrl does in TRL's place."""
    if args is None:
        return None
    args = copy.copy(args)
    if generates:
        args.use_vllm = False  # or TRL would start a second engine
    if refreshes:
        check_refresh(args)
        args.sync_ref_model = False  # which TRL refuses with PEFT
    return args
