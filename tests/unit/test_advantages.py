"""Group advantages: hand-computed values, and TRL's own code on random rewards with holes in them."""

import math

import pytest
import torch
from trl_oracle import trl_generation_batch

from slothrl.advantages import (
    ADVANTAGES,
    AGGREGATIONS,
    SCALES,
    group_advantages,
    reinforce_pp_advantages,
    rloo_advantages,
)
from slothrl.losses import VARIANTS
from slothrl.plugins import NAMES

NAN = float("nan")


def column(*rewards: float) -> torch.Tensor:
    return torch.tensor(rewards, dtype=torch.float32)[:, None]


def test_known_group():
    result = group_advantages(column(1, 0, 0, 1), torch.ones(1), 4)
    expected = torch.tensor([0.865875, -0.865875, -0.865875, 0.865875])
    torch.testing.assert_close(result.advantages, expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(result.std, torch.full((4,), math.sqrt(1 / 3)))
    assert result.rewards.tolist() == [1, 0, 0, 1]
    assert not result.zero_std.any()


def test_equal_rewards_teach_nothing():
    result = group_advantages(column(2, 2, 2, 0, 1, 2), torch.ones(1), 3)
    assert result.advantages[:3].tolist() == [0, 0, 0]
    assert result.zero_std.tolist() == [True] * 3 + [False] * 3


def test_no_scaling_centers_only():
    result = group_advantages(column(3, 1, 10, 20), torch.ones(1), 2, scale="none")
    assert result.advantages.tolist() == [1, -1, -5, 5]


def test_batch_scale_keeps_groups_comparable():
    result = group_advantages(column(3, 1, 10, 20), torch.ones(1), 2, scale="batch")
    std = torch.tensor([3.0, 1.0, 10.0, 20.0]).std()
    torch.testing.assert_close(result.advantages, torch.tensor([1.0, -1.0, -5.0, 5.0]) / (std + 1e-4))
    torch.testing.assert_close(result.std, std.expand(4))


def test_unscorable_completion_is_left_out():
    rewards = torch.tensor([[1.0, NAN], [NAN, NAN], [0.0, NAN], [2.0, 4.0]])
    result = group_advantages(rewards, torch.tensor([1.0, 0.5]), 4)
    assert result.rewards[[0, 2, 3]].tolist() == [1, 0, 4] and result.rewards[1].isnan()
    assert result.advantages[1] == 0
    std = torch.tensor([1.0, 0.0, 4.0]).std()
    torch.testing.assert_close(result.advantages[3], (4 - 5 / 3) / (std + 1e-4))


def test_lone_score_in_a_group_teaches_nothing():
    result = group_advantages(column(NAN, 1, NAN, 0, 1, 0), torch.ones(1), 3)
    assert result.advantages[:3].tolist() == [0, 0, 0]
    assert result.std[:3].isnan().all() and not result.zero_std[:3].any()


def test_normalize_then_sum_gives_each_function_its_say():
    # A wide and a narrow function, independent of each other; summed first, the wide one would decide alone.
    rewards = torch.tensor([[0.0, 100.0], [1.0, 100.0], [0.0, 0.0], [1.0, 0.0]])
    result = group_advantages(rewards, torch.ones(2), 4, aggregation="normalize_then_sum")
    root = math.sqrt(1.5)  # deviation of [0, 2, -2, 0] is sqrt(8 / 3); 2 / sqrt(8 / 3)
    torch.testing.assert_close(result.advantages, torch.tensor([0, root, -root, 0]), atol=5e-4, rtol=0)
    assert result.rewards.tolist() == [100, 101, 0, 1]


def random_rewards(seed: int, functions: int) -> torch.Tensor:
    """(12, K) rewards with holes: 4 groups of 3, one with no score at all and one with a single score."""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(12, functions, generator=generator)
    rewards[torch.rand(12, functions, generator=generator) < 0.25] = NAN
    rewards[3:6] = NAN
    rewards[6:8] = NAN
    rewards[9:12] = 1.5
    return rewards


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("functions", [1, 3])
@pytest.mark.parametrize("num_generations", [3, 1])
def test_equals_trl(scale, aggregation, functions, num_generations):
    weights = torch.tensor([1.0, 0.5, -0.2])[:functions]
    for seed in range(4):
        rewards = random_rewards(seed, functions)
        batch, logged = trl_generation_batch(rewards, weights, num_generations, scale, aggregation)
        ours = group_advantages(rewards, weights, num_generations, scale, aggregation)
        torch.testing.assert_close(ours.advantages, batch["advantages"], atol=1e-6, rtol=1e-6)
        assert ours.zero_std.float().mean().item() == pytest.approx(logged["frac_reward_zero_std"][0])
        assert ours.rewards.nanmean().item() == pytest.approx(logged["reward"][0], abs=1e-6)


def test_one_completion():
    result = group_advantages(column(3), torch.ones(1), 1, scale="batch")
    assert result.advantages.tolist() == [0] and result.zero_std.all()


def test_inputs_are_left_alone():
    rewards = torch.tensor([[1.0], [NAN], [0.0], [2.0]])
    before = rewards.clone()
    group_advantages(rewards, torch.ones(1), 2)
    torch.testing.assert_close(rewards, before, equal_nan=True)


def test_rloo_by_hand():
    """TRL's RLOOTrainer: (sum of the siblings' rewards) / (their number) is the baseline."""
    rewards = column(1, 0, 0, 1, 3, NAN, 1, 5, NAN, NAN, 2, NAN)
    expected = [2 / 3, -2 / 3, -2 / 3, 2 / 3, 0, 0, -3, 3, 0, 0, 0, 0]
    torch.testing.assert_close(rloo_advantages(rewards, torch.ones(1), 4), torch.tensor(expected))
    assert rloo_advantages(column(3), torch.ones(1), 1).tolist() == [0]


def test_reinforce_pp_by_hand():
    rewards = column(1, 0, 10, 20)
    centered = torch.tensor([0.5, -0.5, -5.0, 5.0])
    expected = centered / (math.sqrt((0.25 + 0.25 + 25 + 25) / 3) + 1e-4)
    torch.testing.assert_close(reinforce_pp_advantages(rewards, torch.ones(1), 2), expected)
    dull = reinforce_pp_advantages(column(2, 2, 0, 1, NAN, NAN), torch.ones(1), 2)
    assert dull[[0, 1, 4, 5]].tolist() == [0, 0, 0, 0]  # exactly, so that they can be dropped


def test_names_are_those_of_the_registries():
    assert set(NAMES["advantage"]) == set(ADVANTAGES)
    assert set(NAMES["loss"]) == set(VARIANTS)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"scale": "std"}, "scale"),
        ({"aggregation": "sum"}, "aggregation"),
        ({"num_generations": 3}, "groups of 3"),
        ({"weights": torch.ones(2)}, "weights"),
    ],
)
def test_refuses(wrong, message):
    arguments = {"rewards_per_function": column(1, 2, 3, 4), "weights": torch.ones(1), "num_generations": 2, **wrong}
    with pytest.raises(ValueError, match=message):
        group_advantages(**arguments)
