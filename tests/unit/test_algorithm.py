"""Losses and advantages by name: slothrl's own, and a user's file, tried out before a model loads."""

import pytest
import torch

from slothrl.advantages import rloo_advantages
from slothrl.algorithm import Algorithm, open_algorithm
from slothrl.config import AlgoConfig
from slothrl.errors import UserError
from slothrl.plugins import static_plugin_problems

MINE = """
import torch

def reinforce(inputs, config):
    return -inputs.advantages * inputs.logprobs
reinforce.zero_without_advantage = True

def per_sequence(inputs, config):
    return -(inputs.advantages * inputs.logprobs * inputs.mask).sum(-1, keepdim=True)

def flat(inputs, config):
    return inputs.logprobs.detach()

def wide(inputs, config):
    return inputs.logprobs.T

def broken(inputs, config):
    return inputs.nothing

def centered(rewards, weights, num_generations):
    return (rewards * weights).nansum(1) - 0.5

def holey(rewards, weights, num_generations):
    return (rewards * weights).sum(1)

NUMBER = 3
"""


@pytest.fixture
def mine(tmp_path):
    (tmp_path / "mine.py").write_text(MINE)
    return lambda name: f"{tmp_path}/mine.py:{name}"


def opened(**fields) -> Algorithm:
    return open_algorithm(AlgoConfig(name="grpo", trainer="grpo", **fields))


def test_our_own_by_name():
    assert opened() == Algorithm()
    found = opened(loss="gspo_token", advantage="rloo", kl="k2")
    assert (found.loss_type, found.custom_loss, found.advantage, found.kl) == (
        "gspo_token",
        None,
        rloo_advantages,
        "k2",
    )
    assert found.zero_without_advantage


def test_a_users_functions(mine):
    found = opened(loss=mine("reinforce"), advantage=mine("centered"))
    assert found.loss_type is None and found.custom_loss is not None and found.advantage is not None
    assert found.advantage(torch.tensor([[1.0], [0.0]]), torch.ones(1), 2).tolist() == [0.5, -0.5]
    assert found.zero_without_advantage  # it says so itself
    assert not opened(loss=mine("per_sequence")).zero_without_advantage


@pytest.mark.parametrize(
    ("field", "name", "message"),
    [
        ("loss", "flat", "returned a loss without gradient"),
        ("loss", "wide", r"returned shape \(3, 2\) for log-probs \(2, 3\)"),
        ("loss", "broken", "raised AttributeError.*mine.py, line 18"),
        ("loss", "NUMBER", r"is an int \(3\), not a function"),
        ("loss", "absent", "mine.py has no 'absent'"),
        ("advantage", "holey", "returned an advantage that is not finite"),
    ],
)
def test_what_a_users_function_does_wrong(mine, field, name, message):
    with pytest.raises(UserError, match=f"{field} .*{message}"):
        opened(**{field: mine(name)})


def test_wrong_names_show_without_loading_anything(mine, tmp_path):
    def problems(**fields):
        return static_plugin_problems(AlgoConfig(name="grpo", trainer="grpo", **fields))

    assert problems(loss=mine("flat"), advantage="reinforce_pp") == []
    assert problems(loss="gspo_tokens")[0].startswith(
        "algo.loss=gspo_tokens: unknown loss 'gspo_tokens'; did you mean gspo_token, gspo?; there are bnpo,"
    )
    (line,) = problems(advantage=f"{tmp_path}/none.py:f")
    assert line.endswith(f"advantage '{tmp_path}/none.py:f': there is no file {tmp_path}/none.py")
