"""What a KV cache too small for all completions costs, and whether holding requests back would help.

    python tests/bench_admission.py [--prompts 8] [--group 8] [--tokens 504] [--share 0.25] [--draws 6]

vLLM's own scheduler on the CPU, with its prefix caching, in steps that no model computes: completions end after lengths
drawn beforehand (lognormal, means that differ by prompt, at most 2,048 tokens), and the cache holds `share` of what
they need. Seconds are the steps' by H100 figures (tests/gpu/results/decode.md): decoding so many sequences, and
39,100 tokens a second of prefill. Arms: vLLM's own way; its `watermark`; fewer sequences; requests held back until the
cache is expected to hold them to their ends, by last time's lengths; longest first, by last time's mean of a prompt and
(the bound of what knowing could give) by the lengths themselves.
"""

from __future__ import annotations

import argparse
import copy
import math
import random
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from slothrl import vllm_compat
from tests.families import make_checkpoint

BLOCK, LIMIT = 32, 2048
STEP_MS = ((0, 5.0), (1, 5.01), (16, 5.65), (64, 8.76), (128, 12.98), (256, 21.4))  # by sequences
PREFILL = 39.1  # tokens a ms


def milliseconds(sequences: int, prefill: int) -> float:
    """A step's time on an H100: straight lines between the measured ones."""
    for (low, at_low), (high, at_high) in pairwise(STEP_MS):
        if sequences <= high:
            return at_low + (at_high - at_low) * (sequences - low) / (high - low) + prefill / PREFILL
    raise ValueError(f"{sequences} sequences were not measured")


@dataclass(frozen=True)
class Work:
    """Completions to be generated: their prompts, one for `group` of them, their lengths, and those of last time."""

    prompts: list[list[int]]
    group: int
    lengths: list[int]
    last: list[int]

    @classmethod
    def draw(cls, seed: int, prompts: int, group: int, tokens: int) -> Work:
        rng = random.Random(seed)
        rows = [[rng.randrange(10, 900) for _ in range(tokens)] for _ in range(prompts)]
        means = [math.log(400) - 0.3 + rng.gauss(0, 0.4) for _ in range(prompts)]

        def lengths() -> list[int]:
            draws = (math.exp(rng.gauss(means[i // group], 0.7)) for i in range(prompts * group))
            return [min(LIMIT, max(1, round(length))) for length in draws]

        return cls(rows, group, lengths(), lengths())

    @property
    def blocks(self) -> float:
        """Of KV cache, for all completions at their ends, a prompt once."""
        return (sum(map(len, self.prompts)) + sum(self.lengths)) / BLOCK

    def longest_first(self, lengths: list[int], by_prompt: bool) -> list[int]:
        """Completions in the order of these lengths, or of a prompt's mean of them."""
        if not by_prompt:
            return sorted(range(len(lengths)), key=lambda i: -lengths[i])
        means = [statistics.mean(lengths[i : i + self.group]) for i in range(0, len(lengths), self.group)]
        order = sorted(range(len(means)), key=lambda prompt: -means[prompt])
        return [prompt * self.group + i for prompt in order for i in range(self.group)]


def expected_peak(ages: list[int], last: list[int], deviations: float) -> float:
    """Tokens that completions of these ages will hold at most, expected from last time's lengths: those that are still
    generating t steps on hold age + t. `deviations`: so many standard deviations are added."""
    lasting = (torch.tensor(last)[:, None] > torch.arange(LIMIT + 1)).float().mean(0)  # P(length > k)
    age = torch.tensor(ages)[:, None]
    later = age + torch.arange(0, LIMIT, 16)
    alive = lasting[later.clamp(max=LIMIT)] / lasting[age].clamp(min=1 / len(last))
    alive[:, 0] = 1
    held = later + 1.0
    return float(((alive * held).sum(0) + deviations * (alive * (1 - alive) * held**2).sum(0).sqrt()).max())


@dataclass
class Replay:
    """vLLM's scheduler over some work, with lengths in a model's place."""

    llm: Any
    work: Work
    blocks: int
    watermark: float = 0.0
    sequences: int = 256
    deviations: float | None = None  # None: all requests at once
    steps: list[tuple[int, int]] = field(default_factory=list)  # sequences and prefilled tokens
    requests: dict[int, Any] = field(default_factory=dict)

    def run(self, order: list[int]) -> dict[str, float]:
        scheduler, waiting, opened = self._scheduler(), list(order), True
        while waiting or scheduler.requests:
            while waiting and opened and self._fits(scheduler, waiting[0]):
                self._add(scheduler, waiting.pop(0))
            known = len(scheduler.requests)
            self._step(scheduler)
            opened = len(scheduler.requests) < known
        return {
            "steps": len(self.steps),
            "prefilled tokens": sum(prefill for _, prefill in self.steps),
            "preemptions": sum(request.num_preemptions for request in self.requests.values()),
            "s": sum(milliseconds(*step) for step in self.steps) / 1e3,
        }

    def _scheduler(self) -> Any:
        from vllm.v1.core.sched.scheduler import Scheduler

        engine = self.llm.llm_engine
        old = engine.engine_core.engine_core.scheduler
        config, cache = copy.copy(engine.vllm_config), copy.copy(old.kv_cache_config)
        config.scheduler_config, config.cache_config = (
            copy.copy(config.scheduler_config),
            copy.copy(config.cache_config),
        )
        config.scheduler_config.watermark, config.scheduler_config.max_num_seqs = self.watermark, self.sequences
        config.cache_config.num_gpu_blocks = cache.num_blocks = self.blocks
        options = {"structured_output_manager": old.structured_output_manager, "hash_block_size": BLOCK}
        return Scheduler(vllm_config=config, kv_cache_config=cache, block_size=BLOCK, **options)

    def _fits(self, scheduler: Any, index: int) -> bool:
        running = [i for i, request in self.requests.items() if request.request_id in scheduler.requests]
        if self.deviations is None or not running:
            return True
        ages = [*(self.requests[i].num_output_tokens for i in running), 0]
        prompts = {i // self.work.group for i in [*running, index]}
        needed = sum(len(self.work.prompts[i]) for i in prompts) + len(ages) * BLOCK / 2  # half of each last block
        return needed + expected_peak(ages, self.work.last, self.deviations) <= (self.blocks - 1) * BLOCK

    def _add(self, scheduler: Any, index: int) -> None:
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        parameters = SamplingParams(max_tokens=self.work.lengths[index], ignore_eos=True, detokenize=False)
        prompt = {"type": "token", "prompt_token_ids": self.work.prompts[index // self.work.group]}
        tasks = {"supported_tasks": engine.get_supported_tasks()}
        made = engine.input_processor.process_inputs(str(index), prompt, parameters, **tasks)
        self.requests[index], _ = engine.engine_core.engine_core.preprocess_add_request(made)
        scheduler.add_request(self.requests[index])

    def _step(self, scheduler: Any) -> None:
        from vllm.v1.outputs import ModelRunnerOutput

        planned = scheduler.schedule()
        tokens: dict[str, int] = planned.num_scheduled_tokens
        self.steps.append((len(tokens), sum(count for count in tokens.values() if count > 1)))
        known = [scheduler.requests[name] for name in tokens]
        sampled = [[7] if request.num_computed_tokens >= request.num_tokens else [] for request in known]
        made = ModelRunnerOutput(
            req_ids=list(tokens),
            req_id_to_index={name: i for i, name in enumerate(tokens)},
            sampled_token_ids=sampled,
            logprobs=None,
            prompt_logprobs_dict={},
            pooler_output=[],
        )
        scheduler.update_from_output(planned, made)


def arms(work: Work, blocks: int) -> Iterator[tuple[str, dict[str, Any], list[int]]]:
    """Name, options of `Replay`, and the order of the completions."""
    given = list(range(len(work.lengths)))
    held = len(work.prompts[0]) / work.group + statistics.mean(work.last)
    yield "all at once (vLLM's way)", {}, given
    for watermark in (0.05, 0.15):
        yield f"watermark={watermark:g}", {"watermark": watermark}, given
    yield "max_num_seqs by the mean length", {"sequences": max(1, int(blocks * BLOCK / held))}, given
    yield "held back by expectation", {"deviations": 0.0}, given
    yield "held back, one deviation more", {"deviations": 1.0}, given
    yield "longest prompts first, by last time", {}, work.longest_first(work.last, by_prompt=True)
    yield "longest first, if lengths were known", {}, work.longest_first(work.lengths, by_prompt=False)


def main() -> None:
    parser = argparse.ArgumentParser()
    for name, default in (("prompts", 8), ("group", 8), ("tokens", 504), ("share", 0.25), ("draws", 6)):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    asked = parser.parse_args()
    vllm = vllm_compat.import_vllm()
    with tempfile.TemporaryDirectory() as folder:
        model = str(make_checkpoint("llama", Path(folder), max_position_embeddings=8192))
        more = {"enforce_eager": True, "disable_log_stats": True, "async_scheduling": False, "max_num_seqs": 256}
        memory = {"kv_cache_memory_bytes": 2**28, "block_size": BLOCK, "max_model_len": 8192}
        llm = vllm.LLM(model=model, enable_prefix_caching=True, **more, **memory)
    found: dict[str, list[dict[str, float]]] = {}
    for seed in range(asked.draws):
        work = Work.draw(seed, asked.prompts, asked.group, asked.tokens)
        blocks = int(asked.share * work.blocks)
        for name, options, order in arms(work, blocks):
            found.setdefault(name, []).append(Replay(llm, work, blocks, **options).run(order))
    keys = ("steps", "prefilled tokens", "preemptions", "s")
    case = f"{asked.prompts} x {asked.group}, prompts of {asked.tokens}, cache for {asked.share:g}"
    print(f"| {case} | {' | '.join(keys)} |")
    print("|---" * (1 + len(keys)) + "|")
    for name, runs in found.items():
        means = (statistics.mean(run[key] for run in runs) for key in keys)
        print(f"| {name} | {' | '.join(f'{mean:,.2f}' if mean < 100 else f'{mean:,.0f}' for mean in means)} |")


if __name__ == "__main__":
    main()
