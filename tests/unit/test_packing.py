"""The plan of micro-batches: every token once, prompts once a group, nothing over the budget."""

import random

import pytest
import torch
from transformers import LlamaConfig

from slothrl.packing import Block, Row, plan_micro_batches, sharing_pays, useful_tokens
from slothrl.token_budget import bytes_per_token, token_budget, tokens_that_fit


def groups(prompt: int, *completions: list[int]) -> list[Row]:
    numbered = [(group, length) for group, lengths in enumerate(completions) for length in lengths]
    return [Row(index, group, prompt, length) for index, (group, length) in enumerate(numbered)]


def lognormal_batch(seed: int, prompt: int) -> list[Row]:
    """8 prompts x 8 completions, mean 400 tokens, at most 2,048."""
    draw = random.Random(seed)
    lengths = [[min(2048, max(1, round(draw.lognormvariate(5.67, 0.8)))) for _ in range(8)] for _ in range(8)]
    return groups(prompt, *lengths)


def tokens(plan) -> int:
    return sum(batch.tokens for batch in plan)


def test_a_group_shares_its_prompt():
    rows = groups(10, [5, 3, 1])
    (batch,) = plan_micro_batches(rows, 100)
    assert batch.blocks == (Block(tuple(rows)),)
    assert batch.tokens == 10 + 4 + 2 + 0 == useful_tokens(rows)


def test_never_and_always():
    rows = groups(10, [5, 3, 1])
    (batch,) = plan_micro_batches(rows, 100, "never")
    assert batch.tokens == 14 + 12 + 10
    assert not any(block.shared for block in batch.blocks)
    short = groups(1, [500, 500])
    assert tokens(plan_micro_batches(short, 2000)) == 1000  # one token saved of 1,000 is not worth it
    assert tokens(plan_micro_batches(short, 2000, "always")) == 999


def test_sharing_pays_from_one_token_in_32():
    assert sharing_pays([Row(0, 0, 2, 31), Row(1, 0, 2, 31)])  # 2 of 64
    assert not sharing_pays([Row(0, 0, 2, 32), Row(1, 0, 2, 31)])  # 2 of 65
    assert not sharing_pays([Row(0, 0, 100, 1)])


def test_a_group_over_the_budget_is_split_with_its_prompt():
    rows = groups(10, [21, 21, 21, 11])
    plan = plan_micro_batches(rows, 60)
    assert [batch.tokens for batch in plan] == [60, 30]
    assert sorted(row.index for batch in plan for row in batch.rows) == [0, 1, 2, 3]


def test_a_row_over_the_budget_goes_alone():
    plan = plan_micro_batches(groups(10, [100], [5]), 50)
    assert [batch.tokens for batch in plan] == [109, 14]
    assert tokens(plan_micro_batches(groups(60, [9, 9]), 50)) == 136


@pytest.mark.parametrize("shared", ["auto", "always", "never"])
@pytest.mark.parametrize("budget", [1, 700, 4096, 16384])
def test_every_row_once_and_within_the_budget(budget, shared):
    for seed in range(5):
        rows = lognormal_batch(seed, prompt=64)
        plan = plan_micro_batches(rows, budget, shared)
        assert sorted(row.index for batch in plan for row in batch.rows) == list(range(64))
        assert all(batch.tokens <= budget or len(batch.rows) == 1 for batch in plan)
        assert [batch.tokens for batch in plan] == sorted((batch.tokens for batch in plan), reverse=True)
        assert plan == plan_micro_batches(rows, budget, shared)


@pytest.mark.parametrize("prompt", [8, 20, 64, 504])
def test_a_realistic_mix_computes_hardly_more_than_it_must(prompt):
    for seed in range(20):
        rows = lognormal_batch(seed, prompt)
        plan = plan_micro_batches(rows, 16384)
        assert useful_tokens(rows) <= tokens(plan) <= 1.05 * useful_tokens(rows)
        assert len(plan) <= -(-tokens(plan) // 16384) + 1


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"budget": 0}, "budget of 0"),
        ({"shared_prefix": "yes"}, "auto, always, never"),
        ({"rows": [Row(3, 0, 0, 1)]}, "row 3: a prompt of 0"),
        ({"rows": [Row(0, 0, 4, 1), Row(1, 0, 5, 1)]}, "row 1 has another prompt"),
    ],
)
def test_refuses(wrong, message):
    with pytest.raises(ValueError, match=message):
        plan_micro_batches(**{"rows": groups(4, [2, 2]), "budget": 10, **wrong})


# --- the budget -----------------------------------------------------------------------------------------------------


def llama_8b():
    return LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        vocab_size=128256,
    )


def test_bytes_per_token_by_hand():
    # A layer: 4 * 4096 + 2 * (4096 + 2048) + 4096 + 4 * 14336 = 90,112 values, half as many again; the head 12,288.
    assert bytes_per_token(llama_8b(), 2, True) == (32 * 4096 + 135_168 + 12_288) * 2
    assert bytes_per_token(llama_8b(), 2, False) == (32 * 135_168 + 12_288) * 2


def test_the_budget_follows_free_memory():
    assert tokens_that_fit(60 << 30, llama_8b(), True) == 24_576
    assert tokens_that_fit(10 << 30, llama_8b(), True) == 13_312  # 0.8 * 10 GiB less 1.05 GB, by 557 KB
    assert tokens_that_fit(1 << 30, llama_8b(), True) == 1024
    assert token_budget(torch.nn.Linear(1, 1), True) == 4096  # on a CPU
