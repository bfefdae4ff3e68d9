"""TRL's own code as the oracle: its unbound methods, called on a stand-in that has only what they read."""

from collections import defaultdict
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
from trl import GRPOTrainer, RLOOTrainer

from slothrl.losses import LossConfig, LossInputs


def _accelerator() -> SimpleNamespace:
    def same(x, **_):
        return x

    return SimpleNamespace(
        device=torch.device("cpu"), num_processes=1, process_index=0, reduce=same, gather=same, gather_for_metrics=same
    )


def trl_loss(inputs: LossInputs, config: LossConfig, num_items: float | None = None) -> tuple[torch.Tensor, dict]:
    """`GRPOTrainer._compute_loss` on the same tensors, and the metrics it logs."""
    metrics = {"train": defaultdict(list)}
    zeros = torch.zeros_like(inputs.logprobs)
    trainer = SimpleNamespace(
        args=SimpleNamespace(
            use_bias_correction_kl=config.kl_times_ratio,
            delta=config.delta,
            sapo_temperature_pos=config.sapo_temperature_pos,
            sapo_temperature_neg=config.sapo_temperature_neg,
            steps_per_generation=1,
        ),
        _get_per_token_logps_and_entropies=lambda *_, **__: (inputs.logprobs, zeros, None),
        loss_type=config.loss_type,
        importance_sampling_level=config.level,
        epsilon_low=config.clip_low,
        epsilon_high=config.clip_high,
        beta=config.beta,
        max_completion_length=config.max_completion_length,
        use_vllm=inputs.importance_ratio is not None,
        vllm_importance_sampling_correction=True,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        accelerator=_accelerator(),
        _metrics=metrics,
    )
    batch = {
        "prompt_ids": torch.zeros(len(zeros), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(zeros), 1, dtype=torch.long),
        "completion_ids": zeros.long(),
        "completion_mask": inputs.mask,
        "advantages": inputs.advantages,
        "old_per_token_logps": inputs.old_logprobs,
        "ref_per_token_logps": inputs.ref_logprobs,
        "importance_sampling_ratio": inputs.importance_ratio,
        "num_items_in_batch": torch.as_tensor(inputs.mask.sum() if num_items is None else num_items),
    }
    return GRPOTrainer._compute_loss(trainer, None, batch), metrics["train"]  # pyright: ignore[reportArgumentType]


def trl_rloo_loss(inputs: LossInputs, config: LossConfig) -> torch.Tensor:
    """`RLOOTrainer._compute_loss` on the same tensors."""
    zeros = torch.zeros_like(inputs.logprobs)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (inputs.logprobs, zeros, None),
        epsilon_low=config.clip_low,
        epsilon_high=config.clip_high,
        aux_loss_enabled=False,
        model=SimpleNamespace(training=True),
        accelerator=_accelerator(),
        _metrics={"train": defaultdict(list)},
    )
    batch = {
        "prompt_ids": torch.zeros(len(zeros), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(zeros), 1, dtype=torch.long),
        "completion_ids": zeros.long(),
        "completion_mask": inputs.mask,
        "advantages": inputs.advantages,
        "old_logps": (inputs.old_logprobs * inputs.mask).sum(1),
    }
    return RLOOTrainer._compute_loss(trainer, None, batch)  # pyright: ignore[reportArgumentType]


def trl_generation_batch(
    rewards: torch.Tensor,
    weights: torch.Tensor,
    num_generations: int,
    scale: str = "group",
    aggregation: str = "sum_then_normalize",
    old: torch.Tensor | None = None,
    sampling: torch.Tensor | None = None,
    lengths: list[int] | None = None,
    mode: str = "token_truncate",
    clip_max: float | None = 3.0,
    clip_min: float | None = None,
) -> tuple[dict, dict]:
    """`GRPOTrainer._generate_and_score_completions` after these rewards (B, K), and the metrics it logs.

    With `old` and `sampling` (B, T) and `lengths`, the batch has TRL's `importance_sampling_ratio` too.
    """
    lengths = lengths or [2] * len(rewards)
    metrics = {"train": defaultdict(list)}
    completions = [[1] * length for length in lengths]
    sampled = None if sampling is None else [row[:n].tolist() for row, n in zip(sampling, lengths, strict=True)]
    names = [f"f{k}" for k in range(rewards.size(1))]
    trainer = MagicMock()
    trainer._generate.return_value = ([[1]] * len(rewards), completions, None, completions, sampled, {}, None, None)
    trainer._get_per_token_logps_and_entropies.return_value = (old, None, None)
    trainer._calculate_rewards.return_value = rewards.clone()
    trainer.configure_mock(
        accelerator=_accelerator(),
        environment_factories=None,
        environments=None,
        tools=None,
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        num_generations=num_generations,
        num_iterations=1,
        beta=0.0,
        reward_weights=weights,
        reward_funcs=names,
        reward_func_names=names,
        scale_rewards=scale,
        multi_objective_aggregation=aggregation,
        use_vllm=sampling is not None,
        vllm_importance_sampling_correction=sampling is not None,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=clip_max,
        vllm_importance_sampling_clip_min=clip_min,
        _metrics=metrics,
        _logs=defaultdict(lambda: defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
    )
    trainer._logs.update(prompt=[], completion=[], advantages=[])
    trainer._tokenizer.pad_token_id = 0
    trainer.eos_token_ids = [2]
    trainer.args.steps_per_generation = trainer.args.gradient_accumulation_steps = 1
    trainer.args.gradient_checkpointing_kwargs = None
    batch = GRPOTrainer._generate_and_score_completions(trainer, [{"prompt": "p"}] * len(rewards))
    return batch, metrics["train"]
