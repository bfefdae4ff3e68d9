"""GRPO and its relatives: TRL's GRPOTrainer with slothrl's engine, log-probs and losses."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import set_seed
from peft import PeftModel
from trl import GRPOConfig
from trl import GRPOTrainer as TRLGRPOTrainer

from slothrl.engine import Engine, Sampling
from slothrl.logprobs import completion_logprobs
from slothrl.losses import VARIANTS, LossConfig, LossInputs, LossOutput, policy_loss, sampling_importance_ratio
from slothrl.memory_phases import PhaseMemory
from slothrl.probe import PolicyProbe
from slothrl.trainers.adapters import adapter_values, restore_float32_adapter
from slothrl.trainers.checkpoints import ExactCheckpoints
from slothrl.trainers.guards import Guards

MULTIMODAL = ("pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles")
MULTIMODAL += ("image_sizes", "token_type_ids", "mm_token_type_ids", "image_position_ids")


class GRPOTrainer(Guards, ExactCheckpoints, TRLGRPOTrainer):
    """Takes TRL's arguments and two of its own.

    Losses that slothrl has (`slothrl.losses.VARIANTS`) are computed by it; for the others, for images and for
    mixture-of-experts auxiliary losses TRL's own code runs, unchanged. With an engine that reports the log-probs it
    sampled with, the importance correction happens inside the training forward, without TRL's extra pass for old
    log-probs where the policy is still the one that sampled.

    Args:
        engine: what generates; default transformers' generate, or, where `args.use_vllm` asks for colocated vLLM, vLLM
            in this process with the LoRA pushed in memory (TRL's own vLLM path never sees the LoRA of a 4-bit base).
        probe: compared with the engine after each LoRA push; aborts the run on a mismatch.
    """

    args: GRPOConfig  # what TRL's base class calls them more broadly
    model: Any
    max_completion_length: int

    def __init__(self, model, reward_funcs=None, args: GRPOConfig | None = None, *positional, **named):
        engine: Engine | None = named.pop("engine", None)
        probe: PolicyProbe | None = named.pop("probe", None)
        wants_vllm = args is not None and args.use_vllm and args.vllm_mode == "colocate"
        if args is not None and args.use_vllm and (wants_vllm or engine is not None):
            args = copy.copy(args)
            args.use_vllm = False  # or TRL would start a second engine
        starting: Any = None
        if args and wants_vllm and engine is None and isinstance(model, str) and named.get("peft_config") is not None:
            from slothrl.trainers.colocate import open_shared

            model, starting = open_shared(model, args, named["peft_config"], named.pop("quantization_config", None))
        before = adapter_values(model)
        super().__init__(model, reward_funcs, args, *positional, **named)
        restore_float32_adapter(self.model, before)
        if engine is None and wants_vllm:
            from slothrl.trainers.colocate import beside

            engine = (starting or beside(self.model, self.args)).follow(self.model, self._tokenizer)
        self.engine: Engine | None = None
        self.probe: PolicyProbe | None = None
        self.memory: PhaseMemory | None = None
        self._corrects_sampling = False
        if engine is not None:
            self.attach(engine, probe)

    def attach(self, engine: Engine, probe: PolicyProbe | None = None) -> None:
        """Generate with `engine` from here on, checked by `probe` after each LoRA push."""
        self.engine, self.probe, self._pushed_step = engine, probe, -1
        self.memory = PhaseMemory(self.model, lambda: self.optimizer, engine.holdings)
        # TRL's switch, by which it keeps the log-probs that the engine sampled with.
        self.use_vllm = engine.name == "vllm"
        self._corrects_sampling = self.use_vllm and self.args.vllm_importance_sampling_correction
        if self._core_loss:
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
        self.engine.push_lora()
        self._pushed_step = self.state.global_step
        if self.probe is not None and (difference := self.probe.check_push()) is not None:
            self._metrics["train"]["sampling/probe_difference"].append(difference)

    def _generate(self, prompts: list):
        if self.engine is None or self.memory is None:
            return super()._generate(prompts)
        self.memory.begin("rollout")
        generated = super()._generate(prompts)
        self.memory.begin("update" if self.model.training else "scoring")
        # Turns with tools and custom rollouts are over: the trainer may have the cache's memory.
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
        return rollout.completion_ids, rollout.sampling_logprobs

    # --- log-probs ----------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, *rest, **options):
        plain = not rest and not any(options.get(name) is not None for name in MULTIMODAL)
        if not plain or options.get("compute_aux_loss") or self._prompt_learning or self.args.cast_lm_head_to_fp32:
            return super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, *rest, **options
            )
        with_entropy = options.get("compute_entropy", False)
        rows = options.get("batch_size") or input_ids.size(0)
        parts = []
        for start in range(0, input_ids.size(0), rows):
            with self.accelerator.autocast():
                parts.append(
                    completion_logprobs(
                        self.accelerator.unwrap_model(model),
                        input_ids[start : start + rows],
                        attention_mask[start : start + rows],
                        logits_to_keep,
                        temperature=self.temperature,
                        with_entropy=with_entropy,
                        entropy_grad=with_entropy and self._entropy_bonus_enabled,
                    )
                )
        logprobs = torch.cat([part[0] for part in parts])  # (B, T)
        return logprobs, torch.cat([part[1] for part in parts]) if with_entropy else None, None

    @property
    def _prompt_learning(self) -> bool:
        return isinstance(self.model, PeftModel) and self.model.active_peft_config.is_prompt_learning

    # --- loss ---------------------------------------------------------------------------------------------------

    @property
    def _core_loss(self) -> bool:
        """Whether `slothrl.losses` covers what these arguments ask for."""
        exotic = self._entropy_bonus_enabled or self.aux_loss_enabled or self.off_policy_mask_threshold is not None
        single = self.accelerator.num_processes == 1
        return single and self.loss_type in VARIANTS and not exotic and self.top_entropy_quantile >= 1.0

    def _loss_config(self) -> LossConfig:
        return LossConfig(
            max_completion_length=self.max_completion_length,
            loss_type=self.loss_type,
            level=self.importance_sampling_level,
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
            delta=self.args.delta,
            beta=self.beta,
            kl_times_ratio=self.args.use_bias_correction_kl,
            sapo_temperature_pos=self.args.sapo_temperature_pos,
            sapo_temperature_neg=self.args.sapo_temperature_neg,
        )

    def _compute_loss(self, model, inputs: dict[str, Any]) -> torch.Tensor:
        if not self._core_loss or any(inputs.get(name) is not None for name in MULTIMODAL):
            return super()._compute_loss(model, inputs)
        completion_mask = inputs["completion_mask"]  # (B, T)
        mask = completion_mask * inputs["tool_mask"] if "tool_mask" in inputs else completion_mask
        logprobs, entropies, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], completion_mask], dim=1),
            completion_mask.size(1),
            compute_entropy=True,
        )
        # On-policy, the policy that sampled is the one whose log-probs were just computed.
        old_logprobs = inputs.get("old_per_token_logps")
        on_policy = old_logprobs is None
        old_logprobs = logprobs.detach() if on_policy else old_logprobs
        ratio = inputs.get("importance_sampling_ratio")
        if ratio is None and self._corrects_sampling and "sampling_per_token_logps" in inputs:
            ratio = self._correct_sampling(old_logprobs, inputs["sampling_per_token_logps"], mask, on_policy)
        output = policy_loss(
            LossInputs(logprobs, old_logprobs, inputs["advantages"], mask, inputs.get("ref_per_token_logps"), ratio),
            self._loss_config(),
            normalizer=self._token_normalizer(inputs),
        )
        assert entropies is not None
        self._record(output, entropies, mask)
        return output.loss / self._accumulation

    @property
    def _accumulation(self) -> float:
        return self.current_gradient_accumulation_steps if self.model.training else 1.0

    def _token_normalizer(self, inputs: dict[str, Any]) -> torch.Tensor:
        """Tokens of the generation batch, scaled so that after `_accumulation` they count one optimizer step's."""
        tokens = inputs["num_items_in_batch"].clamp(min=1.0)
        return tokens / self.args.steps_per_generation if self.model.training else tokens

    def _correct_sampling(self, old_logprobs, sampling_logprobs, mask, on_policy: bool) -> torch.Tensor:
        """The ratio (B, T) or (B, 1) between the trained policy and the one that sampled, counted in the metrics."""
        ratio = sampling_importance_ratio(
            old_logprobs,
            sampling_logprobs,
            mask,
            self.vllm_importance_sampling_mode,
            clip_max=self.vllm_importance_sampling_clip_max,
            clip_min=self.vllm_importance_sampling_clip_min,
        )
        metrics = self._metrics["train" if self.model.training else "eval"]
        counted = mask.bool()
        gap = (old_logprobs - sampling_logprobs)[counted].abs()
        gap = gap[~gap.isnan()]  # where the engine gave no log-prob
        if self.probe is not None and on_policy and gap.numel():
            self.probe.require(gap.mean().item(), "the sampled tokens")
        flat = ratio[counted] if ratio.shape == mask.shape else ratio.flatten()
        for name, values in (("sampling_logp_difference", gap), ("importance_sampling_ratio", flat)):
            if values.numel():
                metrics[f"sampling/{name}/mean"].append(values.mean().item())
                metrics[f"sampling/{name}/max"].append(values.max().item())
        if flat.numel():
            metrics["sampling/importance_sampling_ratio/min"].append(flat.min().item())
        return ratio

    def _record(self, output: LossOutput, entropies: torch.Tensor, mask: torch.Tensor) -> None:
        """TRL's metrics under TRL's names."""
        metrics = self._metrics["train" if self.model.training else "eval"]

        def mean(values: torch.Tensor) -> float:
            if values.shape[-1] == 1:  # one value a sequence
                return values.mean().item()
            return ((values * mask).sum() / mask.sum().clamp(min=1)).item()

        metrics["entropy"].append(mean(entropies))
        kl, low, high = output.metrics["kl"], output.metrics["low_clipped"], output.metrics["high_clipped"]
        if kl is not None:
            metrics["kl"].append(mean(kl))
        assert low is not None and high is not None
        metrics["clip_ratio/low_mean"].append(mean(low.float()))
        metrics["clip_ratio/high_mean"].append(mean(high.float()))
        metrics["clip_ratio/region_mean"].append(mean((low | high).float()))
