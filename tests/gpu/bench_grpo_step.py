"""The update phase of a GRPO step alone, at 8B: seconds and peak memory, ours beside the peers', as Markdown.

    python tests/gpu/bench_grpo_step.py                       # our arms at every shape, a process each; about 7 minutes
    python tests/gpu/bench_grpo_step.py --shapes main --arms "packed;padded"
    python tests/gpu/bench_grpo_step.py --shapes main,long-prompt --arms "packed, fused layers" --peers   # about 12
    python tests/gpu/bench_grpo_step.py --tiny                # the same in seconds, to see that it runs

Llama-3-8B's shape, random nf4 weights made on the GPU, LoRA r=16 on all 7 linears in float32, gradient checkpointing,
AdamW. No vLLM: completions are random tokens of a forced length (`grpo_shapes`), with log-probs as if sampled. Timed
from the completions to the end of the optimizer step: rewards, which take milliseconds, old log-probs where they are
needed, forwards, backwards, optimizer. One step to warm up is not timed. The command fails where an arm fails, of which
it tells the last lines, has no gradient, or has another one than the first; the peers are in `bench_grpo_peers.py`.

| shape | prompts | completions each | prompt tokens | completion tokens |
|---|---|---|---|---|
| main | 8 | 8 | 504 | 1,024 |
| long-prompt | 1 | 8 | 2,048 | 512 |
| long-completion | 1 | 8 | 504 | 20,480 (for its memory) |

MEMORY lines: bytes a token of the largest micro-batch, what its graph keeps, and the most in its forward and backward.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, TrainerCallback
from trl import GRPOConfig

from slothrl.activations import keep_activations
from slothrl.config import PackingConfig
from slothrl.engine import Engine, Rollout
from slothrl.fuse import fuse
from slothrl.trainers.grpo import GRPOTrainer
from tests.gpu.grpo_shapes import SHAPES, Shape, forced, prompts_of, reward, shrunk
from tests.gpu.nf4_model import random_nf4
from tests.gpu.random_checkpoint import LLAMA_3_8B
from tests.helpers import tiny_tokenizer

COLUMNS = "shape, arm, update in s, tokens, micro-batches, peak in GB, beyond the base in GB, loss, gradient norm"
TINY = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
TINY |= {"num_key_value_heads": 2, "vocab_size": 1024}
ARMS: dict[str, dict[str, Any]] = {
    "packed": {"mode": "on", "shared_prefix": "always"},
    "packed, prompts not shared": {"mode": "on", "shared_prefix": "never"},
    "padded": {"mode": "off"},
    "packed, fused layers": {"mode": "on", "shared_prefix": "always"},
}
FUSED = "packed, fused layers"
KEPT = "packed, fused layers, attention kept"  # where memory is plenty: nothing of attention is computed twice
ONCE = "packed, fused layers, everything kept"  # nothing computed twice, in micro-batches small enough for 30 GB
ARMS[KEPT] = ARMS[FUSED]
ARMS[ONCE] = {**ARMS[FUSED], "tokens_per_micro_batch": 6656}  # six completions of the main shape and their prompt
ACTIVATIONS = {KEPT: "attention", ONCE: "all"}
PEERS = {"TRL": "trl", "Unsloth": "unsloth"}


class Forced(Engine):
    """What `grpo_shapes.forced` gives; knows when it gave it."""

    name = "vllm"

    def __init__(self, shape: Shape, vocabulary: int):
        self.shape, self.vocabulary, self.calls, self.done = shape, vocabulary, 0, 0.0

    def generate(self, prompt_ids, sampling):
        self.calls += 1
        rollout = Rollout(*forced(self.shape, self.calls, self.vocabulary))
        _synchronize()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.done = time.perf_counter()
        return rollout

    def push_lora(self):
        pass

    def logprobs(self, token_ids):
        raise NotImplementedError


class Watched(GRPOTrainer):
    """Follows the memory of its micro-batches, and one step's kernels where asked for."""

    profiled_step, profile = -1, None
    largest = 0  # tokens of the largest micro-batch so far; what it took, in bytes
    pack_memory: dict[str, int]

    def _calculate_rewards(self, *positional, **named):
        found = super()._calculate_rewards(*positional, **named)
        if self.state.global_step == self.profiled_step:
            from benchmarks.profiled import Profile

            self.profile = Profile()
            self.profile.start()
        return found

    def _pack_logprobs(self, model, pack, entropy_grad):
        tokens = len(pack.input_ids)
        if not torch.cuda.is_available() or tokens <= self.largest or self.state.global_step == 0:
            return super()._pack_logprobs(model, pack, entropy_grad)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        found = super()._pack_logprobs(model, pack, entropy_grad)
        self.largest = tokens
        kept, most = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
        self.pack_memory = {"before": before, "kept": kept, "forward": most}
        return found

    def memory_lines(self, peak: int) -> list[str]:
        """Of the largest micro-batch after the warm-up, which comes first in its step."""
        if not self.largest:
            return []
        found = self.pack_memory
        parts = {**{name: found[name] for name in ("kept", "forward")}, "step": peak - found["before"]}
        each = ", ".join(f"{name} {value / self.largest / 1e3:.0f} KB" for name, value in parts.items())
        return [f"MEMORY {self.largest:,} tokens, beyond the {found['before'] / 1e9:.2f} GB before it, a token: {each}"]


class Steps(TrainerCallback):
    """Seconds from the completions to the end of each optimizer step, and its peak memory."""

    def __init__(self, trainer: Watched):
        self.trainer, self.seconds, self.peaks, self.norms = trainer, [], [], []
        self.profile: list[str] = []

    def on_optimizer_step(self, args, state, control, **kwargs):
        _synchronize()
        if self.trainer.profile is not None:
            self.profile, self.trainer.profile = self.trainer.profile.stop(), None
            return
        self.seconds.append(time.perf_counter() - self.trainer.engine.done)
        self.peaks.append(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if logs and "grad_norm" in logs:
            self.norms.append(logs["grad_norm"])


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def model_of(tiny: bool, fused: bool, activations: str = "auto") -> Any:
    """The PEFT model, the same at every call, on the GPU where there is one."""
    fields = {**LLAMA_3_8B, **(TINY if tiny else {}), "max_position_embeddings": 32768}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = random_nf4(LlamaConfig(**fields, tie_word_embeddings=False), device)
    torch.manual_seed(0)  # the same adapter in every arm
    model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    if fused:
        fuse(model)
        keep_activations(model, activations)
    return model


def arguments_of(shape: Shape, steps: int) -> GRPOConfig:
    rows = shape.prompts * shape.completions
    return GRPOConfig(
        output_dir=tempfile.mkdtemp(), bf16=True, use_cpu=not torch.cuda.is_available(), report_to="none",
        save_strategy="no", max_steps=steps, learning_rate=1e-5, per_device_train_batch_size=shape.rows,
        gradient_accumulation_steps=rows // shape.rows, num_generations=shape.completions, loss_type="grpo",
        max_completion_length=shape.completion, gradient_checkpointing=True, disable_tqdm=True,
        gradient_checkpointing_kwargs={"use_reentrant": False}, vllm_importance_sampling_mode="token_truncate",
        logging_steps=1,
    )  # fmt: skip


def measure(arm: str, shape: Shape, tiny: bool, profile: bool = False) -> dict[str, Any]:
    """One arm of one shape in this process."""
    model = model_of(tiny, arm in (FUSED, KEPT, ONCE), ACTIVATIONS.get(arm, "auto"))
    base = torch.cuda.memory_allocated() if torch.cuda.is_available() else 0
    steps = 1 + shape.steps
    trainer = Watched(
        model, reward, arguments_of(shape, steps + profile),
        Dataset.from_dict({"prompt": prompts_of(shape)}), processing_class=tiny_tokenizer(),
        engine=Forced(shape, model.config.vocab_size), packing=PackingConfig(**ARMS[arm]),
    )  # fmt: skip
    trainer.profiled_step = steps if profile else -1
    watch = Steps(trainer)
    trainer.add_callback(watch)
    trainer.train()
    assert len(watch.norms) == steps + profile and all(norm > 0 for norm in watch.norms), f"gradients {watch.norms}"
    log = next(log for log in reversed(trainer.state.log_history) if "loss" in log)
    timed, rows = sorted(watch.seconds[1:]), shape.prompts * shape.completions
    return {
        "seconds": timed[len(timed) // 2],
        "peak": max(watch.peaks[1:]),
        "base": base,
        "lines": trainer.memory_lines(watch.peaks[1]) + [f"PROFILE {line}" for line in watch.profile],
        "loss": log["loss"],
        "grad_norm": log["grad_norm"],
        "tokens": log.get("packing/tokens", rows * (shape.prompt + shape.completion)),
        "micro_batches": log.get("packing/micro_batches", rows // shape.rows),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--arms", default=";".join(ARMS), help="separated by ;")
    parser.add_argument("--peers", nargs="?", const="TRL;Unsloth", help="also the peers, or some: TRL;Unsloth")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--profile", action="store_true", help="also one step of each, kernel by kernel")
    parser.add_argument("--one", action="store_true", help="one arm of one shape in this process, as JSON")
    arguments = parser.parse_args()
    shapes, arms = arguments.shapes.split(","), [arm for arm in arguments.arms.split(";") if arm]
    if arguments.one:
        shape = shrunk(SHAPES[shapes[0]]) if arguments.tiny else SHAPES[shapes[0]]
        print("RESULT " + json.dumps(measure(arms[0], shape, arguments.tiny, arguments.profile)))
        return 0
    print(f"| {' | '.join(COLUMNS.split(', '))} |\n{'|---' * 9}|")
    failed = []
    for name in shapes:
        found = {}
        for arm in [*arms, *(arguments.peers.split(";") if arguments.peers else [])]:
            flags = [f"--{flag}" for flag in ("tiny", "profile") if getattr(arguments, flag) and arm not in PEERS]
            found[arm] = in_process(name, arm, [*flags, *(["--tiny"] if arguments.tiny and arm in PEERS else [])])
            print(row(name, arm, found[arm]), flush=True)
        failed += [f"{arm} at {name}" for arm, result in found.items() if "error" in result]
        failed += unlike(name, {arm: r["grad_norm"] for arm, r in found.items() if "error" not in r})
        compare(name, {arm: result["seconds"] for arm, result in found.items() if "seconds" in result})
    print(f"failed: {', '.join(failed)}" if failed else "the same gradient in every arm, and not zero")
    return 1 if failed else 0


def in_process(name: str, arm: str, flags: list[str]) -> dict[str, Any]:
    """The arm's result, or {"error": what it wrote last}."""
    command = [sys.executable, __file__, "--one", "--shapes", name, "--arms", arm, *flags]
    if arm in PEERS:
        script = str(Path(__file__).with_name("bench_grpo_peers.py"))
        command = [sys.executable, script, "--shape", name, "--arm", PEERS[arm], *flags]
    done = subprocess.run(command, capture_output=True, text=True)
    for line in done.stdout.splitlines():
        if line.startswith("RESULT "):
            return json.loads(line.removeprefix("RESULT "))
    written = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
    print("\n".join(written[-25:]), file=sys.stderr, flush=True)
    # The line that names the exception; what libraries say when they are torn down comes after it.
    telling = [line for line in written if "Error" in line and not line.startswith((" ", "\t"))]
    return {"error": (telling or written)[-1][:240]}


def row(name: str, arm: str, found: dict[str, Any]) -> str:
    if "error" in found:
        return f"| {name} | {arm} | FAILED: {found['error']} |"
    cells = [name, arm, f"{found['seconds']:.2f}", f"{found['tokens']:,.0f}", f"{found['micro_batches']:g}"]
    cells += [f"{found['peak'] / 1e9:.1f}", f"{(found['peak'] - found['base']) / 1e9:.1f}"]
    cells += [f"{found['loss']:.5f}", f"{found['grad_norm']:.5f}"]
    return "\n".join([f"| {' | '.join(cells)} |", *found["lines"]])


def unlike(name: str, norms: dict[str, float]) -> list[str]:
    """Arms whose gradient is not the first one's: all but Unsloth have the same adapter and tokens."""
    norms = {arm: norm for arm, norm in norms.items() if arm != "Unsloth"}
    first = next(iter(norms.values()), 0.0)
    return [
        f"{arm} at {name} (its gradient is another)" for arm, norm in norms.items() if abs(norm - first) > 0.1 * first
    ]


def compare(name: str, seconds: dict[str, float]) -> None:
    """How many times as long as our fused arm each peer takes."""
    if FUSED in seconds:
        times = [f"{arm} {value / seconds[FUSED]:.2f}" for arm, value in seconds.items() if arm in PEERS]
        print(f"{name}: times our seconds: {', '.join(times)}" if times else "", end="\n" if times else "", flush=True)


if __name__ == "__main__":
    sys.exit(main())
