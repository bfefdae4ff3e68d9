"""Everything a run needs short of weights, made in the order in which it can fail."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset

from slothrl.algorithm import Algorithm, open_algorithm
from slothrl.checks import set_fields
from slothrl.config import Config, DataConfig
from slothrl.data import PromptReport, build_prompts, build_sft, load_data
from slothrl.engine import EngineChoice, choose_engine
from slothrl.errors import ConfigError
from slothrl.evaluate import prompt_token_ids
from slothrl.lora_targets import ALL, target_problems
from slothrl.models import ModelPlan, load_tokenizer, plan_model
from slothrl.reward_isolation import open_rewards, open_score
from slothrl.rewards import Reward, self_test


@dataclass(frozen=True)
class Prepared:
    """A run's parts before its model is loaded.

    Attributes:
        train: what the trainer takes: `prompt` and columns for GRPO; messages, text or prompt and completion for SFT.
        prompts: how GRPO's prompts were made and counted; None for SFT.
        eval_loss: held-out rows for SFT's loss.
        eval_rows: held-out rows with a `prompt`, to be completed greedily and scored by `score`.
        score: the function of the held-out score; None where there is none.
        algorithm: loss and advantage beyond TRL's arguments, tried out.
    """

    config: Config
    rewards: list[Reward]
    score: Reward | None
    data_title: str
    train: Dataset
    prompts: PromptReport | None
    eval_loss: Dataset | None
    eval_rows: list[dict[str, Any]]
    model: ModelPlan
    tokenizer: Any
    engine: EngineChoice
    algorithm: Algorithm

    @property
    def chat_template_kwargs(self) -> dict[str, Any]:
        return set_fields(self.config.trainer).get("chat_template_kwargs") or {}

    @property
    def sft(self) -> bool:
        return self.config.algo.trainer == "sft"

    def probe_rows(self) -> list[list[int]]:
        """Fixed token rows for the policy probe: the ends of the first four prompts, 64 tokens of each at most."""
        prompts = [row["prompt"] for row in rows_of(self.train.select(range(min(4, len(self.train)))))]
        rows = prompt_token_ids(self.tokenizer, prompts, self.chat_template_kwargs)
        return [ids[-64:] for ids in rows if len(ids) > 1]


def prepare(config: Config, output_dir: Path | None = None, engine: EngineChoice | None = None) -> Prepared:
    """Load rewards, data and tokenizer, and settle the model and the engine.

    Args:
        output_dir: where a reward function's failure is written down; None: nowhere.
        engine: settled already; None: what can run here.

    Raises:
        UserError: with the knob that mends it; `ConfigError` with several.
    """
    sft = config.algo.trainer == "sft"
    rewards = open_rewards(config.reward, output_dir) if config.reward.functions else []
    if not sft and not rewards:
        raise ConfigError(["reward.functions is empty: name at least one, as in reward.functions=[./my_reward.py:fn]"])
    algorithm = open_algorithm(config.algo)
    splits = load_data(config.data)
    model = plan_model(config.model, config.gpu.device)
    tokenizer = load_tokenizer(model)
    template = set_fields(config.trainer).get("chat_template_kwargs") or {}
    if sft:
        prompts, train = None, build_sft(splits.train, config.data)
    else:
        prompts = build_prompts(splits.train, config.data, tokenizer, template)
        train = prompts.dataset
    eval_rows = _scored_rows(splits.eval, config.data, tokenizer, template)
    score = open_score(config.reward, rewards, output_dir) if eval_rows else None
    if not sft:
        self_test(rewards, rows_of(train.select(range(min(4, len(train))))))
    if engine is None:
        engine = choose_engine("transformers" if sft else config.rollout.engine, config.gpu.device)
    return Prepared(
        config=config,
        rewards=rewards,
        score=score,
        data_title=splits.description,
        train=train,
        prompts=prompts,
        eval_loss=build_sft(splits.eval, config.data) if sft and splits.eval is not None else None,
        eval_rows=eval_rows if score is not None else [],
        model=model,
        tokenizer=tokenizer,
        engine=engine,
        algorithm=algorithm,
    )


def check_targets(model: ModelPlan, targets: Any) -> None:
    """Hold the layers that a LoRA is to go into against the model, before its weights are loaded.

    Not for adapters that exist: PEFT passed over what was not there when they were made.

    Raises:
        ConfigError: a name, or a pattern, of which the model has nothing.
    """
    from slothrl.shared_model import empty_model

    if targets != ALL and (found := target_problems(empty_model(model.path, model.dtype, model.revision), targets)):
        raise ConfigError(found)


def _scored_rows(rows: Dataset | None, config: DataConfig, tokenizer, template: dict[str, Any]) -> list[dict[str, Any]]:
    """Held-out rows as prompts; none where the data has no prompt to complete (SFT on texts or conversations)."""
    if rows is None or not (config.template or config.prompt_column in rows.column_names):
        return []
    return rows_of(build_prompts(rows, config, tokenizer, template).dataset)


def rows_of(dataset: Dataset) -> list[dict[str, Any]]:
    return [dict(row) for row in dataset]  # pyright: ignore - `datasets` types its rows loosely
