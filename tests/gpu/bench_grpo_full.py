"""Whole GRPO steps at 8B as a user runs them, vLLM colocated over the shared base: seconds by part, and device memory.

    python tests/gpu/bench_grpo_full.py                    # one warm-up and three steps; about 150 s on an H100
    python tests/gpu/bench_grpo_full.py --keep FOLDER      # the run's folder stays there: metrics, memory, report
    python tests/gpu/bench_grpo_full.py --tiny             # a small model on the CPU, to see that it runs
    python tests/gpu/bench_grpo_full.py trainer.beta=0.04  # further overrides of the run

`slothrl.run.run` on a composed config: prompts from a file, a reward function in a worker process, the policy probe,
fused layers, packed updates, metrics and samples. Llama-3-8B's shape with random nf4 weights that vLLM's loader makes
on the GPU (`random_nf4`), LoRA r=16, 8 prompts x 8 completions, prompt 504, completion 1,024 tokens, forced.

What is what, of the phases in metrics.jsonl: rollout is the engine's generation with tokenising and decoding; update is
forward, backward and optimizer, old log-probs inside; the rest is everything else, and the host's share of tokenising
and decoding, which is timed alone at the end, is counted there. The table ends with the demands, and the command fails
where one is missed: update 6.5 s, rest 0.5 s, 30 GB of device memory in all, a gradient that is not zero.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from slothrl import vllm_compat
from slothrl.compose import compose_config
from slothrl.memory_phases import phase_table
from slothrl.run import run
from tests.gpu.random_nf4 import SHAPES, register_random_loader, write_config
from tests.helpers import tiny_tokenizer

PROMPTS, COMPLETIONS, WARM_UP, STEPS = 8, 8, 1, 3
UPDATE = ("forward", "backward", "optimizer")
DEMANDS = {"update, s": 6.5, "rest, s": 0.5, "device, GB": 30.0}
COLUMNS = ("step", "step, s", "rollout, s", "update, s", "rest, s", "device, GB", "gradient norm", "importance ratio")
REWARD = '''
def even(completions, completion_ids, **columns):
    """Share of even token ids: a random model earns it too, and hardly two completions the same."""
    return [sum(i % 2 == 0 for i in ids) / len(ids) for ids in completion_ids]
'''


def write_parts(folder: Path, prompt: int, shape: str) -> None:
    """Model, prompts and reward in `folder`."""
    (folder / "model").mkdir()
    write_config(shape, folder / "model")
    tiny_tokenizer(size=SHAPES[shape]["vocab_size"]).save_pretrained(folder / "model")
    # One token a character; every prompt is another from its first token on.
    rows = [{"prompt": (chr(65 + i % 26) + chr(97 + i // 26)) * (prompt // 2)} for i in range(PROMPTS * 8)]
    (folder / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    (folder / "reward.py").write_text(REWARD)


def overrides_of(folder: Path, prompt: int, completion: int, tiny: bool) -> list[str]:
    common = [
        "model=hub", f"model.name={folder / 'model'}", "data=file", f"data.path={folder / 'prompts.jsonl'}",
        "data.format=plain", "data.answer_column=null", f"data.max_prompt_length={prompt}", "data.eval_size=0",
        "reward=custom", f"reward.functions=[{folder / 'reward.py'}:even]", "rollout=vllm",
        f"trainer.max_steps={WARM_UP + STEPS}", f"trainer.num_generations={COMPLETIONS}", "trainer.save_strategy=no",
        f"trainer.per_device_train_batch_size={PROMPTS * COMPLETIONS}", "trainer.gradient_accumulation_steps=1",
        f"trainer.max_completion_length={completion}", "logger.progress=false",
        "trainer.generation_kwargs={ignore_eos: true, stop_token_ids: []}", "model.quantization=nf4",
        "model.dtype=bfloat16", "model.fuse=on", "packing=on", "model.lora.r=16", "model.lora.lora_alpha=32",
        "rollout.share_base=always",
    ]  # fmt: skip
    if tiny:
        return [*common, "gpu=cpu"]
    return [*common, "gpu=80gb", "rollout.kv_cache_gb=12.5", "rollout.gpu_memory_utilization=0.1"]


def text_seconds(prompt: int, completion: int, vocabulary: int) -> float:
    """Host seconds a step that making token ids of the prompts, and text of the completions, takes inside a rollout."""
    tokenizer, rows = tiny_tokenizer(size=vocabulary), PROMPTS * COMPLETIONS
    ids = torch.randint(4, len(tokenizer), (rows, completion)).tolist()
    start = time.perf_counter()
    tokenizer(["ab" * (prompt // 2)] * rows)
    tokenizer.batch_decode(ids, skip_special_tokens=True)
    return time.perf_counter() - start


def split(line: dict[str, Any], text: float) -> dict[str, float]:
    """One line of metrics.jsonl as the figures of the table."""
    times = {name.removeprefix("time/"): value for name, value in line.items() if name.startswith("time/")}
    total, rollout = sum(times.values()), times["rollout"] - text
    update = sum(times[name] for name in UPDATE)
    return {
        "step": line["step"],
        "step, s": total,
        "rollout, s": rollout,
        "update, s": update,
        "rest, s": total - rollout - update,
        "device, GB": line.get("memory/device", 0) / 1e9,
        "gradient norm": line["grad_norm"],
        "importance ratio": line["sampling/importance_sampling_ratio/mean"],
    }


def report(lines: list[dict[str, Any]], text: float, memory: list[dict[str, Any]]) -> list[str]:
    """Print the tables; the demands that are missed."""
    found = [split(line, text) for line in lines]
    print(f"\n| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|")
    for row in found:
        note = " (warm-up)" if row["step"] <= WARM_UP else ""
        print(f"| {row['step']:g}{note} | " + " | ".join(f"{row[name]:.4g}" for name in COLUMNS[1:]) + " |")
    timed = [row for row in found if row["step"] > WARM_UP]
    middle = {name: statistics.median(row[name] for row in timed) for name in COLUMNS[1:]}
    print("| median | " + " | ".join(f"{middle[name]:.4g}" for name in COLUMNS[1:]) + " |\n")
    last = lines[-1]
    shown = {name: value for name, value in last.items() if name.startswith(("time/", "packing/", "sampling/"))}
    print(f"last step: {json.dumps(shown)}; text {text:.3f} s, counted under rest\n{phase_table(memory)}\n")
    # Between two logs a phase can hold more than at the end of a step.
    middle["device, GB"] = max([row["device, GB"] for row in found] + [phase["total"] / 1e9 for phase in memory])
    missed = [f"{name} is {middle[name]:.3g}, not {most:g}" for name, most in DEMANDS.items() if middle[name] > most]
    if not all(row["gradient norm"] > 0 for row in found):
        missed.append("a step without gradient")
    if not 0.5 < middle["importance ratio"] < 1.5:
        missed.append(f"an importance ratio of {middle['importance ratio']:.3g}: vLLM samples from another policy")
    return missed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--lengths", help="tokens of a prompt and a completion: 504,1024, with --tiny 24,16")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    prompt, completion = map(int, (arguments.lengths or ("24,16" if arguments.tiny else "504,1024")).split(","))
    start, shape = time.time(), "tiny" if arguments.tiny else "8b"
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_parts(folder, prompt, shape)
        vllm_compat.import_vllm()
        register_random_loader("bitsandbytes")  # the load format that an nf4 base has, without its checkpoint
        overrides = [*overrides_of(folder, prompt, completion, arguments.tiny), *arguments.overrides]
        output = arguments.keep or folder / "run"
        output.mkdir(parents=True, exist_ok=True)
        run(compose_config(overrides), output, overrides)
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        lines = [line for line in lines if "reward" in line]
        memory = json.loads((output / "memory.json").read_text())
    missed = report(lines, text_seconds(prompt, completion, SHAPES[shape]["vocab_size"]), memory)
    print(f"{time.time() - start:.0f} s in all; " + ("; ".join(missed) or "every demand is met"))
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
