"""Real training steps for memory measurements: slothrl's trainers on random models, completions made of thin air."""

from __future__ import annotations

import gc
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PrinterCallback
from trl import GRPOConfig, SFTConfig

from slothrl.config import PackingConfig
from slothrl.engine import Engine, Rollout, Sampling, TokenIds
from slothrl.fit_memory import Settings
from slothrl.fuse import fuse
from slothrl.trainers.grpo import GRPOTrainer
from slothrl.trainers.sft import SFTTrainer
from tests.gpu.fit_models import random_nf4
from tests.helpers import tiny_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz"


def lora() -> LoraConfig:
    """A new one each time: PEFT writes the first model's layers into it."""
    return LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")


@dataclass(frozen=True)
class Case:
    """One measurement: `rows` sequences a micro-batch; SFT's have no prompt and `completion` tokens.

    Attributes:
        rows: of TRL's micro-batch, and for GRPO the completions of a prompt (at least 2).
        prompts: of GRPO's optimizer step, whose completions are packed together.
        tokens: a pack's budget; 0: as the trainer chooses.
        packed, fused: GRPO's updates are packed; the layers are fused.
    """

    trainer: str
    model: str
    rows: int
    prompt: int
    completion: int
    checkpointing: bool = True
    prompts: int = 1
    tokens: int = 0
    packed: bool = True
    fused: bool = False

    @property
    def group(self) -> int:
        return max(self.rows, 2) if self.trainer == "grpo" else 1

    def settings(self) -> Settings:
        """What the prediction is asked: no vLLM, which bench_fit_vllm.py has."""
        return Settings(
            trainer=self.trainer,
            engine="transformers",
            rows=self.rows,
            packed=self.packed,
            completions=self.prompts * self.group,
            group=self.group,
            tokens=self.tokens,
            prompt=self.prompt,
            completion=self.completion,
            sequences=self.prompts * self.group,
            checkpointing=self.checkpointing,
            fused=self.fused,
        )

    def describe(self) -> str:
        length = f"({self.prompt:,} + {self.completion:,})" if self.prompt else f"{self.completion:,}"
        kept = ["checkpointing" if self.checkpointing else "no checkpointing"]
        kept += ["padded"] if self.trainer == "grpo" and not self.packed else []
        kept += [f"packs of {self.tokens:,}"] if self.tokens else []
        kept += ["fused"] if self.fused else []
        size = f"{self.prompts} x {self.rows}" if self.prompts > 1 else f"{self.rows}"
        return f"{self.trainer} | {self.model} | {size} x {length} | {', '.join(kept)}"


@dataclass(frozen=True)
class Measured:
    """Bytes: the most torch allocated and reserved, and what the driver says is in use after the steps."""

    allocated: int
    reserved: int
    driver: int
    grad_norm: float
    budget: int = 0  # of a packed micro-batch, in tokens


class Scripted(Engine):
    """Completions of random letters, of the full length but for one in each call, so that there is padding."""

    name = "transformers"

    def generate(self, prompt_ids: Sequence[TokenIds], sampling: Sampling) -> Rollout:
        lengths = [sampling.max_tokens] * len(prompt_ids)
        lengths[0] = max(1, sampling.max_tokens - 3)
        made = [[random.randrange(40, 90) for _ in range(length - 1)] + [1] for length in lengths]
        return Rollout(made)

    def push_lora(self) -> None:
        """Nothing follows the LoRA here."""

    def logprobs(self, token_ids: Sequence[TokenIds]) -> list[torch.Tensor]:
        raise NotImplementedError


def run_case(case: Case, config: Any, device: str = "cuda", steps: int = 2) -> Measured:
    """Train `steps` optimizer steps on a random model of `config` and give the peaks.

    Args:
        device: "cpu" tries the code; the bytes are 0 then.
    """
    cuda = device == "cuda"
    model = random_nf4(config, device)
    if cuda:
        gc.collect()
        torch.cuda.empty_cache()
    with tempfile.TemporaryDirectory() as folder:
        trainer = (_grpo if case.trainer == "grpo" else _sft)(case, model, folder, cuda, steps)
        if case.fused:
            report = fuse(trainer.model)
            assert report.fused, report.rows()
        trainer.remove_callback(PrinterCallback)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        trainer.train()
    norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    assert len(norms) == steps and all(0 < norm < float("inf") for norm in norms), norms
    budget = getattr(trainer, "micro_batch_tokens", 0)
    found = _peaks(norms[-1], budget) if cuda else Measured(0, 0, 0, norms[-1], budget)
    del trainer, model
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return found


def _peaks(grad_norm: float, budget: int) -> Measured:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
    return Measured(allocated, reserved, total - free, grad_norm, budget)


def _common(case: Case, folder: str, cuda: bool, steps: int) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": case.rows,
        "gradient_checkpointing": case.checkpointing,
        "max_steps": steps,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": cuda,
        "use_cpu": not cuda,
        "disable_tqdm": True,
        "learning_rate": 1e-4,
        "optim": Settings().optimizer,
    }


def _grpo(case: Case, model: Any, folder: str, cuda: bool, steps: int) -> GRPOTrainer:
    args = GRPOConfig(
        **_common(case, folder, cuda, steps),
        num_generations=case.group,
        gradient_accumulation_steps=case.prompts * case.group // case.rows,
        max_completion_length=case.completion,
        beta=0.0,
    )
    tokenizer = tiny_tokenizer(chat_template=False)  # one token a letter
    texts = ((LETTERS * case.prompt)[number : number + case.prompt] for number in range(8))
    rows = Dataset.from_list([{"prompt": text} for text in texts])
    trainer = GRPOTrainer(
        model=model,
        reward_funcs=lambda completions, **_: [float(index) for index in range(len(completions))],
        args=args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=lora(),
        packing=PackingConfig(mode="on" if case.packed else "off", tokens_per_micro_batch=case.tokens),
    )
    trainer.attach(Scripted())
    return trainer


def _sft(case: Case, model: Any, folder: str, cuda: bool, steps: int) -> SFTTrainer:
    args = SFTConfig(**_common(case, folder, cuda, steps), max_length=case.completion, packing=False)
    # Every other row is a little shorter, so that a micro-batch of several has padding and a mask.
    lengths = [case.completion - (index % 2 if case.rows > 1 else 0) for index in range(case.rows * steps)]
    rows = Dataset.from_list([{"input_ids": [random.randrange(40, 90) for _ in range(n)]} for n in lengths])
    return SFTTrainer(
        model=model,
        args=args,
        train_dataset=rows,
        processing_class=tiny_tokenizer(chat_template=False),
        peft_config=lora(),
    )
