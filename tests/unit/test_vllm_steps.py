"""A step's tokens and log-probs, put to their requests."""

from types import SimpleNamespace

import numpy as np

from slothrl.vllm_requests import take_step


def output(name, token_ids, logprobs):
    """As vLLM's core gives it: a row a token, the sampled token's log-prob first."""
    rows = np.array(logprobs, dtype=np.float32).reshape(len(token_ids), -1 if token_ids else 1)
    return SimpleNamespace(request_id=name, new_token_ids=token_ids, new_logprobs=SimpleNamespace(logprobs=rows))


def test_a_step_goes_to_its_requests():
    rows = {name: ([], []) for name in "abc"}
    assert take_step([output("b", [5], [-0.5]), output("a", [7, 8], [-1.0, -2.0])], rows)  # more than one: speculation
    assert take_step([output("a", [9], [-0.25]), output("c", [], [])], rows)  # c: ended by an error
    assert rows == {"a": ([7, 8, 9], [-1.0, -2.0, -0.25]), "b": ([5], [-0.5]), "c": ([], [])}


def test_a_step_of_nothing():
    rows = {"a": ([], [])}
    assert not take_step([], rows) and not take_step([output("a", [], [])], rows)
    assert rows == {"a": ([], [])}


def test_alternatives_are_left_out():
    rows = {"a": ([], [])}
    take_step([output("a", [3, 4], [[-0.5, -0.25, -3.0], [-0.75, -1.0, -2.0]])], rows)
    assert rows == {"a": ([3, 4], [-0.5, -0.75])}
