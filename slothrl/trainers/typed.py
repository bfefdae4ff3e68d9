"""TRL's GRPOTrainer with the types that its attributes have inside a training, for the mixins before it."""

from __future__ import annotations

from typing import Any

from trl import GRPOConfig, GRPOTrainer


class TypedGRPOTrainer(GRPOTrainer):
    """Nothing is changed; TRL and transformers declare these more broadly."""

    args: GRPOConfig
    model: Any
    num_generations: int
    num_generations_eval: int
    max_completion_length: int
    reward_weights: Any
    _tokenizer: Any
