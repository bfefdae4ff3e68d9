"""The optional source reasoning-gym, for real."""

import re

import pytest

pytest.importorskip("reasoning_gym")

from slothrl.config import DataConfig
from slothrl.data import load_data
from slothrl.errors import UserError


def config(name: str, **task) -> DataConfig:
    return DataConfig(source="reasoning_gym", name=name, train_size=20, eval_size=5, seed=3, task=task)


def test_rows_are_deterministic_and_held_out_ones_apart():
    first, second = load_data(config("chain_sum")), load_data(config("chain_sum"))
    assert first.train["prompt"][:] == second.train["prompt"][:]
    assert first.eval is not None
    assert len(first.eval) == 5
    assert not set(first.train["prompt"]) & set(first.eval["prompt"])
    assert all(answer.lstrip("-").isdigit() for answer in first.train["answer"])


def test_the_tasks_own_knobs_reach_it():
    rows = load_data(config("chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1)).train
    for prompt, answer in zip(rows["prompt"], rows["answer"], strict=True):
        left, sign, right = re.findall(r"(-?\d+) ([+-]) (-?\d+)", prompt)[-1]
        assert int(answer) == (int(left) + int(right) if sign == "+" else int(left) - int(right))


def test_an_unknown_task_or_knob_is_one_line():
    with pytest.raises(UserError, match="chain_sum"):
        load_data(config("chain_sun"))
    with pytest.raises(UserError, match="data.task"):
        load_data(config("chain_sum", no_such_knob=1))
