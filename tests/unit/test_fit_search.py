"""What fits: searches to the edge, the settings offered instead, the gpu presets, and the benchmark's own steps."""

from dataclasses import replace

import pytest
from test_fit import llama, shape  # noqa: F401

from slothrl.compose import compose_config
from slothrl.fit_config import settings_of
from slothrl.fit_constants import card_bytes
from slothrl.fit_memory import Settings, fits, needed_cache, predict, starts
from slothrl.fit_search import largest, largest_batch, largest_budget, longest_context, smaller
from tests.gpu.fit_models import PRESETS, TINY, config_of
from tests.gpu.fit_steps import Case, run_case


def test_largest():
    for limit in (0, 1, 7, 100):
        for answer in range(limit + 1):
            assert largest(lambda n, answer=answer: n <= answer, limit) == answer


def test_searches_end_at_the_edge(llama):  # noqa: F811
    settings, total = Settings(rows=1, prompt=512, completion=1024, cache=0), card_bytes(24)
    length = longest_context(llama, settings, total)
    assert 8192 < length < 60_000
    assert fits(llama, replace(settings, completion=length - 512), total)
    assert not fits(llama, replace(settings, completion=length - 511), total)
    padded = replace(settings, packed=False)
    rows = largest_batch(llama, padded, total)
    assert fits(llama, replace(padded, rows=rows), total)
    assert not fits(llama, replace(padded, rows=rows + 1), total)
    assert rows < largest_batch(llama, settings, total) < 2 * rows  # prompts once
    assert 8192 < largest_budget(llama, settings, total) < length + 8192
    lengths = [longest_context(llama, settings, card_bytes(gb)) for gb in (8, 12, 16, 24, 48, 80)]
    assert lengths == sorted(lengths) and lengths[0] == 0  # 6 GB of weights beside vLLM's own needs: not in 8 GB
    assert longest_context(llama, replace(settings, shared=False), total) < length


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (
            {"rows": 64, "utilization": 0.5, "packed": False},
            ["per_device_train_batch_size=16", "gradient_accumulation_steps=4"],
        ),
        ({"rows": 4, "checkpointing": False, "utilization": 0.5, "packed": False}, ["gradient_checkpointing=true"]),
        ({"tokens": 60_000, "utilization": 0.5}, ["packing.tokens_per_micro_batch="]),
        ({"rows": 4, "utilization": 0.1}, ["gpu_memory_utilization=0.35"]),
        ({"rows": 1, "completion": 100_000, "utilization": 0.6}, ["max_completion_length="]),
    ],
)
def test_smaller_settings_fit(changes, named, llama):  # noqa: F811
    settings, total = replace(Settings(prompt=512, completion=1024), **changes), card_bytes(24)
    assert not fits(llama, settings, total)
    change = smaller(llama, settings, total)
    assert change is not None
    assert fits(llama, change.settings, total)
    assert all(any(name in override for override in change.overrides) for name in named), change.overrides


def test_nothing_is_small_enough(llama):  # noqa: F811
    settings = Settings(rows=1, prompt=512, completion=512)
    assert not starts(llama, replace(settings, utilization=0.1), card_bytes(8))
    assert smaller(llama, settings, card_bytes(4)) is None
    assert needed_cache(llama, settings) == 1024 * 131_072


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_leave_a_tenth(preset, llama):  # noqa: F811
    """Of the model that the preset names, with 512 + 1,024 tokens."""
    config = compose_config(
        [f"gpu={preset}", "data.max_prompt_length=512", "trainer.max_completion_length=1024"], anywhere=True
    )
    settings = settings_of(config, "nf4", 2, None, None, None)
    assert settings.sequences == 64
    counted = llama if PRESETS[preset] == "Llama-3-8B" else shape(config_of(PRESETS[preset]))
    total = card_bytes(config.gpu.memory_gb)
    assert starts(counted, settings, total)
    assert max(phase.total for phase in predict(counted, settings, total)) < 0.9 * total


# --- the benchmark's own steps ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", ["grpo", "sft"])
def test_steps_of_the_benchmark_train(trainer):
    """tests/gpu/bench_fit.py's real steps, on a tiny model without a GPU: gradients, and no bytes."""
    config = config_of("Qwen2.5-0.5B", **TINY)
    measured = run_case(Case(trainer, "tiny", 2, 8 if trainer == "grpo" else 0, 16), config, "cpu", steps=1)
    assert 0.1 < measured.grad_norm < 10
    assert measured.allocated == 0
