"""Ours and TRL's trainer side by side: the same tiny fp32 model, adapter, data and completions."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import TrainerCallback
from trl import GRPOConfig
from trl import GRPOTrainer as TRLGRPOTrainer

from slothrl.engine import Engine, Rollout
from slothrl.trainers.grpo import GRPOTrainer
from tests.helpers import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MAX_COMPLETION = 12


def lora_model(base: Callable = tiny_model) -> PeftModel:
    """The same model at every call, with an adapter that is not the identity.

    Args:
        base: makes a model of two layers from a vocabulary size and a width.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(base(len(TOKENIZER), hidden=32), config)
    assert isinstance(model, PeftModel)
    return model


def lora_gradients(model) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad and p.grad is not None}
    assert len(found) == 2 * 7 * 2, "every projection of both layers has A and B"
    return found


def assert_same(ours: dict[str, torch.Tensor], trl: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    """Equal to `tolerance`, absolutely and against the largest entry, and not all zero."""
    assert ours.keys() == trl.keys()
    assert max(gradient.abs().max().item() for gradient in trl.values()) > 1e-4
    for name, expected in trl.items():
        bound = tolerance * max(1.0, expected.abs().max().item())
        assert (ours[name] - expected).abs().max().item() <= bound, name


def characters(completions: list, **_: Any) -> list[float]:
    """A reward that differs between completions."""
    return [sum(map(ord, text)) % 17 / 7 for text in completions]


PROMPTS = ["1+1=", "what is 23 - 4?", "hello there", "x"] * 2


def arguments(folder, **fields: Any) -> GRPOConfig:
    """Plain SGD, because Adam would blow rounding up where a gradient is nearly zero."""
    common: dict[str, Any] = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "optim": "sgd",
        "learning_rate": 0.5,
        "max_completion_length": MAX_COMPLETION,
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "gradient_checkpointing": False,
    }
    return GRPOConfig(**(common | fields))


def trainer(kind: type, args: GRPOConfig, reward: Callable = characters, base: Callable = tiny_model, **named: Any):
    rows = Dataset.from_dict({"prompt": PROMPTS})
    return kind(lora_model(base), reward, copy.deepcopy(args), rows, processing_class=TOKENIZER, **named)


def pair(args: GRPOConfig) -> tuple[GRPOTrainer, TRLGRPOTrainer]:
    """Both trainers as they are inside training: two micro-batches to an optimizer step."""
    made = trainer(GRPOTrainer, args), trainer(TRLGRPOTrainer, args)
    for one in made:
        one.model.train()
        one.current_gradient_accumulation_steps = 2
    return made


def ragged_batch(seed: int = 0, rows: int = 4, prompt: int = 6) -> dict[str, torch.Tensor]:
    """Left-padded prompts and right-padded completions of different lengths, as TRL lays them out."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([[prompt, 9], [2, 1], [4, 5], [prompt - 1, 8]])[:rows]
    columns, width = torch.arange(prompt), int(lengths[:, 1].max())
    prompt_mask = (columns >= prompt - lengths[:, :1]).long()
    completion_mask = (torch.arange(width) < lengths[:, 1:]).long()
    tokens = torch.randint(4, len(TOKENIZER), (rows, prompt + width), generator=generator)
    return {
        "prompt_ids": tokens[:, :prompt] * prompt_mask,  # the pad token is 0
        "prompt_mask": prompt_mask,
        "completion_ids": tokens[:, prompt:] * completion_mask,
        "completion_mask": completion_mask,
        "advantages": torch.tensor([1.0, -0.7, 0.4, -1.3])[:rows],
        # Of a generation batch twice as large.
        "num_items_in_batch": completion_mask.sum() * 2 + 5,
    }


def token_logprobs(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """(B, T) from full logits: neither trainer's code."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].double()
    logprobs = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return logprobs[:, -batch["completion_ids"].size(1) :].float() * batch["completion_mask"]


class FixedCompletions:
    """The same completions for both sides: from the prompt, the call and the place in it, and from no model."""

    def __init__(self, with_logprobs: bool):
        self.with_logprobs, self.calls = with_logprobs, 0

    def __call__(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[float]] | None]:
        self.calls += 1
        generator = torch.Generator().manual_seed(self.calls)
        completions, logprobs = [], []
        for ids in prompt_ids:
            length = int(torch.randint(1, MAX_COMPLETION, (1,), generator=generator))
            drawn = torch.randint(4, len(TOKENIZER), (length,), generator=generator).tolist()
            completions.append(drawn + [TOKENIZER.eos_token_id] * (len(ids) % 2))
            noise = torch.randn(len(completions[-1]), generator=generator)
            logprobs.append((-4.6 + 1.5 * noise).tolist())  # around ln(100), some ratios beyond the cap
        return completions, logprobs if self.with_logprobs else None


class FixedEngine(Engine):
    """Our side's stand-in; called "vllm" it reports the log-probs it claims to have sampled with."""

    def __init__(self, name: str):
        self.name = name
        self.source = FixedCompletions(with_logprobs=name == "vllm")
        self.pushes = 0

    def generate(self, prompt_ids, sampling):
        return Rollout(*self.source([list(ids) for ids in prompt_ids]))

    def push_lora(self):
        self.pushes += 1

    def logprobs(self, token_ids):
        raise NotImplementedError


def rollout_func(source: FixedCompletions) -> Callable:
    """TRL's side: the same completions through its own hook."""

    def rollout(prompts, _):
        prompt_ids = TOKENIZER(prompts)["input_ids"]
        completions, logprobs = source(prompt_ids)
        return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": logprobs}

    return rollout


def use_trl_vllm(one: TRLGRPOTrainer) -> None:
    """Make TRL believe in a vLLM of its own, so that it computes its importance correction."""
    one.use_vllm, one._last_loaded_step = True, -1
    one.vllm_generation = SimpleNamespace(sync_weights=lambda: None)


class KeepGradients(TrainerCallback):
    """The gradients of each optimizer step, before it is taken."""

    def __init__(self):
        self.steps: list[dict[str, torch.Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append(lora_gradients(model))


def train(one) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, float]]]:
    """Run it; the gradients of each step and what was logged."""
    keep = KeepGradients()
    one.add_callback(keep)
    one.train()
    return keep.steps, [log for log in one.state.log_history if "loss" in log]
