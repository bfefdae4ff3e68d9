"""The update phase of a GRPO step by TRL's own trainer, or by Unsloth's: one arm of one shape, its result as JSON.

    python tests/gpu/bench_grpo_peers.py --arm trl --shape main             # about 150 s on an H100
    python tests/gpu/bench_grpo_peers.py --arm unsloth --shape main         # about 150 s; unsloth must be importable
    python tests/gpu/bench_grpo_step.py --peers                             # both, in one table with ours

The same model's shape, completions, rewards and learning rate as our arms' (`grpo_shapes`), given through TRL's
`rollout_func`, which both trainers take. Timed, as ours, from the completions to the end of the optimizer step.

TRL 1.16: its `GRPOTrainer` over PEFT's model on the nf4 base, gradient checkpointing, told that vLLM samples, so that
it computes the old log-probs for its correction as it does with a colocated vLLM; `token_truncate`, since its default
masks nearly everything. Unsloth: `FastLanguageModel` from a bnb-4bit checkpoint of the same shape, its gradient
checkpointing ("unsloth"), `mask_truncated_completions=False` (or it trains on nothing here), 8-bit AdamW, its own
chunking, no correction and so no pass for old log-probs; 8 rows a micro-batch, or `--rows`.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.gpu.grpo_shapes import SHAPES, Shape, forced, prompts_of, reward, shrunk

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Clock:
    """Gives forced completions, and takes the time from there to the end of the optimizer step."""

    def __init__(self, shape: Shape, vocabulary: int, tokenizer: Any):
        self.shape, self.vocabulary, self.tokenizer = shape, vocabulary, tokenizer
        self.calls, self.seconds, self.peaks, self.norms = 0, [], [], []
        self.done = 0.0

    def rollout(self, prompts: list[str], *_: Any) -> dict[str, Any]:
        """TRL's `rollout_func`."""
        self.calls += 1
        completions, logprobs = forced(self.shape, self.calls, self.vocabulary)
        prompt_ids = self.tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
        self.start()
        return {"prompt_ids": prompt_ids, "completion_ids": completions, "logprobs": logprobs}

    def start(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.done = time.perf_counter()

    def callback(self) -> Any:
        import torch
        from transformers import TrainerCallback

        clock = self

        class Steps(TrainerCallback):
            def on_optimizer_step(self, args, state, control, **kwargs):
                cuda = torch.cuda.is_available()
                if cuda:
                    torch.cuda.synchronize()
                clock.seconds.append(time.perf_counter() - clock.done)
                clock.peaks.append(torch.cuda.max_memory_allocated() if cuda else 0)

            def on_log(self, args, state, control, logs=None, **kwargs):
                if logs and "grad_norm" in logs:
                    clock.norms.append(float(logs["grad_norm"]))

        return Steps()


def config_of(shape: Shape, rows: int, **options: Any) -> Any:
    import torch
    from trl import GRPOConfig

    return GRPOConfig(
        output_dir=tempfile.mkdtemp(), bf16=True, use_cpu=not torch.cuda.is_available(), report_to="none",
        save_strategy="no", max_steps=1 + shape.steps, learning_rate=1e-5, per_device_train_batch_size=rows,
        gradient_accumulation_steps=shape.prompts * shape.completions // rows, num_generations=shape.completions,
        max_completion_length=shape.completion, loss_type="grpo", beta=0.0, disable_tqdm=True, logging_steps=1,
        mask_truncated_completions=False, **options,
    )  # fmt: skip


def trl_trainer(shape: Shape, tiny: bool, rows: int) -> tuple[Any, Clock]:
    from trl import GRPOTrainer

    from tests.gpu.bench_grpo_step import model_of
    from tests.helpers import tiny_tokenizer

    model, tokenizer = model_of(tiny, fused=False), tiny_tokenizer()
    clock = Clock(shape, model.config.vocab_size, tokenizer)
    args = config_of(
        shape, rows, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False},
        vllm_importance_sampling_mode="token_truncate",
    )  # fmt: skip
    trainer: Any = GRPOTrainer(
        model, reward, args, dataset(shape), processing_class=tokenizer, rollout_func=clock.rollout
    )
    # As with its colocated vLLM, which there is none of here: it corrects for what has been sampled.
    trainer.use_vllm, trainer._last_loaded_step = True, -1
    trainer.vllm_generation = SimpleNamespace(sync_weights=lambda: None)
    return trainer, clock


def unsloth_trainer(shape: Shape, tiny: bool, rows: int) -> tuple[Any, Clock]:
    importlib.import_module("unsloth")  # before transformers and TRL, or it says so
    from trl import GRPOTrainer
    from unsloth import FastLanguageModel  # pyright: ignore

    from tests.helpers import tiny_tokenizer

    sys.path.insert(0, str(Path(__file__).parents[2] / "kernels" / "benchmarks"))
    from random_models import random_model, save_checkpoint  # pyright: ignore

    tokenizer, length = tiny_tokenizer(), shape.prompt + shape.completion
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(random_model("tiny" if tiny else "8b", "cuda", max(length, 8192)), Path(folder))
        tokenizer.save_pretrained(folder)
        model, _ = FastLanguageModel.from_pretrained(folder, max_seq_length=length, load_in_4bit=True, dtype=None)
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=32, lora_dropout=0, target_modules=LINEARS, use_gradient_checkpointing="unsloth",
        max_seq_length=length,
    )  # fmt: skip
    clock = Clock(shape, model.config.vocab_size, tokenizer)
    args = config_of(shape, rows, optim="adamw_8bit")
    kind, options = GRPOTrainer, {"rollout_func": clock.rollout}
    if "rollout_func" not in inspect.signature(GRPOTrainer.__init__).parameters:
        kind, options = _given(GRPOTrainer, clock), {}
    trainer = kind(
        model=model, reward_funcs=[reward], args=args, train_dataset=dataset(shape), processing_class=tokenizer,
        **options,
    )  # fmt: skip
    return trainer, clock


def _given(base: Any, clock: Clock) -> Any:
    """A trainer whose turn of generation is the clock's, where there is no `rollout_func`."""

    class Given(base):
        def _generate_single_turn(self, prompts, *_, **__):
            clock.calls += 1
            completions, logprobs = forced(clock.shape, clock.calls, clock.vocabulary)
            clock.start()
            return completions, logprobs

    return Given


def dataset(shape: Shape) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"prompt": prompts_of(shape)})


def measure(arm: str, shape: Shape, tiny: bool, rows: int) -> dict[str, Any]:
    trainer, clock = {"trl": trl_trainer, "unsloth": unsloth_trainer}[arm](shape, tiny, rows)
    import torch

    base = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    trainer.add_callback(clock.callback())
    trainer.train()
    steps = 1 + shape.steps
    assert clock.calls == steps == len(clock.seconds), f"{clock.calls} forced rollouts in {len(clock.seconds)} steps"
    assert len(clock.norms) == steps and all(norm > 0 for norm in clock.norms), f"no gradient: {clock.norms}"
    log = next(log for log in reversed(trainer.state.log_history) if "loss" in log)
    counted, timed = shape.prompts * shape.completions, sorted(clock.seconds[1:])
    return {
        "seconds": timed[len(timed) // 2],
        "peak": max(clock.peaks[1:]),
        "base": base,
        "lines": [],
        "loss": log["loss"],
        "grad_norm": log["grad_norm"],
        "tokens": counted * (shape.prompt + shape.completion),
        "micro_batches": counted // rows,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arm", choices=["trl", "unsloth"], required=True)
    parser.add_argument("--shape", choices=list(SHAPES), default="main")
    parser.add_argument("--rows", type=int, help="of a micro-batch; default 4 for TRL, 8 for Unsloth")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    shape = shrunk(SHAPES[arguments.shape]) if arguments.tiny else SHAPES[arguments.shape]
    rows = arguments.rows or {"trl": shape.rows, "unsloth": 8}[arguments.arm]
    print("RESULT " + json.dumps(measure(arguments.arm, shape, arguments.tiny, rows)), flush=True)


if __name__ == "__main__":
    main()
