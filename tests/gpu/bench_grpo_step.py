"""The update phase of a GRPO step alone, at 8B: seconds and peak memory, packed beside padded, as Markdown.

    python tests/gpu/bench_grpo_step.py                       # every shape and arm, a process each; about 6 minutes
    python tests/gpu/bench_grpo_step.py --shapes main --arms packed,padded
    python tests/gpu/bench_grpo_step.py --tiny                # the same in seconds, to see that it runs

Llama-3-8B's shape, random nf4 weights made on the GPU, LoRA r=16 on all 7 linears in float32, gradient checkpointing,
AdamW. No vLLM: completions are random tokens of a forced length, with log-probs as if sampled. Timed from rewards to
the end of the optimizer step: old log-probs where they are needed, forwards, backwards, optimizer.

| shape | prompts | completions each | prompt tokens | completion tokens |
|---|---|---|---|---|
| main | 8 | 8 | 504 | 1,024 |
| long-prompt | 1 | 8 | 2,048 | 512 |
| long-completion | 1 | 8 | 504 | 20,480 (one step, for its memory) |
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, TrainerCallback
from trl import GRPOConfig

from slothrl.config import PackingConfig
from slothrl.engine import Engine, Rollout
from slothrl.trainers.grpo import GRPOTrainer
from tests.gpu.nf4_model import random_nf4
from tests.gpu.random_checkpoint import LLAMA_3_8B
from tests.helpers import tiny_tokenizer

COLUMNS = "shape, arm, update in s, tokens, micro-batches, peak in GB, beyond the base in GB, loss, gradient norm"
TINY = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 1024}


@dataclasses.dataclass(frozen=True)
class Shape:
    prompts: int
    completions: int
    prompt: int
    completion: int
    rows: int  # of a padded micro-batch
    warm_up: int
    steps: int


SHAPES = {
    "main": Shape(8, 8, 504, 1024, 4, 1, 2),
    "long-prompt": Shape(1, 8, 2048, 512, 4, 1, 3),
    "long-completion": Shape(1, 8, 504, 20480, 1, 0, 1),
}
ARMS: dict[str, dict[str, Any]] = {
    "packed": {"mode": "on", "shared_prefix": "always"},
    "packed, prompts not shared": {"mode": "on", "shared_prefix": "never"},
    "padded": {"mode": "off"},
}
FUSED = "packed, fused layers"
if importlib.util.find_spec("slothrl.fuse") is not None:
    ARMS[FUSED] = ARMS["packed"]


class Forced(Engine):
    """Random tokens of one length."""

    name = "vllm"

    def __init__(self, length: int, vocabulary: int):
        self.length, self.vocabulary, self.calls = length, vocabulary, 0

    def generate(self, prompt_ids, sampling):
        self.calls += 1
        generator = torch.Generator().manual_seed(self.calls)
        tokens = torch.randint(4, self.vocabulary, (len(prompt_ids), self.length), generator=generator)
        logprob = -float(torch.tensor(float(self.vocabulary)).log())
        return Rollout(tokens.tolist(), [[logprob] * self.length for _ in prompt_ids])

    def push_lora(self):
        pass

    def logprobs(self, token_ids):
        raise NotImplementedError


class Timed(GRPOTrainer):
    """Knows when the rewards of a step were there."""

    started, profiled_step, profile = 0.0, -1, None

    def _calculate_rewards(self, *positional, **named):
        found = super()._calculate_rewards(*positional, **named)
        _synchronize()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if self.state.global_step == self.profiled_step:
            from benchmarks.profiled import Profile

            self.profile = Profile()
            self.profile.start()
        self.started = time.perf_counter()
        return found


class Steps(TrainerCallback):
    """Seconds from the rewards to the end of each optimizer step, and its peak memory."""

    def __init__(self, trainer: Timed):
        self.trainer, self.seconds, self.peaks, self.norms = trainer, [], [], []
        self.profile: list[str] = []

    def on_optimizer_step(self, args, state, control, **kwargs):
        _synchronize()
        if self.trainer.profile is not None:
            self.profile, self.trainer.profile = self.trainer.profile.stop(), None
            return
        self.seconds.append(time.perf_counter() - self.trainer.started)
        self.peaks.append(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "grad_norm" in logs:
            self.norms.append(logs["grad_norm"])


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reward(completions, completion_ids, **_):
    return [float(sum(ids[:16]) % 97) for ids in completion_ids]


def measure(arm: str, shape: Shape, tiny: bool, profile: bool = False) -> dict[str, Any]:
    """One arm of one shape in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    fields = {**LLAMA_3_8B, **(TINY if tiny else {}), "max_position_embeddings": 32768}
    model = random_nf4(LlamaConfig(**fields, tie_word_embeddings=False), device)
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    if arm == FUSED:
        from slothrl.fuse import fuse  # pyright: ignore

        fuse(model)
    base = torch.cuda.memory_allocated() if device == "cuda" else 0
    rows = shape.prompts * shape.completions
    args = GRPOConfig(
        output_dir=tempfile.mkdtemp(), bf16=True, use_cpu=device == "cpu", report_to="none", save_strategy="no",
        max_steps=shape.warm_up + shape.steps + profile, learning_rate=1e-5, per_device_train_batch_size=shape.rows,
        gradient_accumulation_steps=rows // shape.rows, num_generations=shape.completions, loss_type="grpo",
        max_completion_length=shape.completion, gradient_checkpointing=True, disable_tqdm=True, logging_steps=1,
        gradient_checkpointing_kwargs={"use_reentrant": False}, vllm_importance_sampling_mode="token_truncate",
    )  # fmt: skip
    prompts = Dataset.from_dict({"prompt": [chr(97 + i) * shape.prompt for i in range(shape.prompts)] * 8})
    engine = Forced(shape.completion, fields["vocab_size"])
    trainer = Timed(
        model, reward, args, prompts, processing_class=tiny_tokenizer(), engine=engine,
        packing=PackingConfig(**ARMS[arm]),
    )  # fmt: skip
    trainer.profiled_step = shape.warm_up + shape.steps if profile else -1
    steps = Steps(trainer)
    trainer.add_callback(steps)
    trainer.train()
    assert all(norm > 0 for norm in steps.norms), f"an arm without gradient: {steps.norms}"
    log = next(log for log in reversed(trainer.state.log_history) if "loss" in log)
    timed = sorted(steps.seconds[shape.warm_up :])
    return {
        "seconds": timed[len(timed) // 2],
        "peak": max(steps.peaks),
        "base": base,
        "profile": steps.profile,
        "loss": log["loss"],
        "grad_norm": log["grad_norm"],
        "tokens": log.get("packing/tokens", rows * (shape.prompt + shape.completion)),
        "micro_batches": log.get("packing/micro_batches", rows // shape.rows),
    }


def shrunk(shape: Shape) -> Shape:
    return dataclasses.replace(shape, prompt=shape.prompt // 16, completion=shape.completion // 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--arms", default=";".join(ARMS), help="separated by ;")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--profile", action="store_true", help="also one step of each, kernel by kernel")
    parser.add_argument("--one", action="store_true", help="one arm of one shape in this process, as JSON")
    arguments = parser.parse_args()
    shapes = arguments.shapes.split(",")
    arms = arguments.arms.split(";")
    if arguments.one:
        shape = SHAPES[shapes[0]]
        shape = shrunk(shape) if arguments.tiny else shape
        print(json.dumps(measure(arms[0], shape, arguments.tiny, arguments.profile)))
        return
    print(
        "| shape | arm | update, s | tokens | micro-batches | peak, GB | beyond the base, GB | loss | gradient norm |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name in shapes:
        for arm in arms:
            print(row(name, arm, [f"--{flag}" for flag in ("tiny", "profile") if getattr(arguments, flag)]), flush=True)


def row(name: str, arm: str, flags: list[str]) -> str:
    command = [sys.executable, __file__, "--one", "--shapes", name, "--arms", arm, *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return f"| {name} | {arm} | failed: {done.stderr.strip().splitlines()[-1][:160]} | | | | | | |"
    found = json.loads(done.stdout.strip().splitlines()[-1])
    cells = [name, arm, f"{found['seconds']:.2f}", f"{found['tokens']:,.0f}", f"{found['micro_batches']:g}"]
    cells += [f"{found['peak'] / 1e9:.1f}", f"{(found['peak'] - found['base']) / 1e9:.1f}"]
    cells += [f"{found['loss']:.5f}", f"{found['grad_norm']:.5f}"]
    return "\n".join([f"| {' | '.join(cells)} |", *(f"PROFILE {line}" for line in found["profile"])])


if __name__ == "__main__":
    main()
