"""`fuse(model, only_if_faster=True)`: a layer timed both ways, and what comes of it."""

import time

import pytest
import torch
from test_fuse import adapted, folders, step  # noqa: F401
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP

import slothrl.fuse_layer
from slothrl import fuse_timing
from slothrl.fuse import fuse, is_fused, unfuse
from slothrl.fuse_layer import fused_layer
from slothrl.fuse_timing import Timing, time_layer

SLOW = 0.03  # seconds: more than a tiny layer takes


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(fuse_timing, "TOKENS", 16)
    monkeypatch.setattr(fuse_timing, "REPEATS", 2)


def slowed(function):
    def call(*args, **kwargs):
        time.sleep(SLOW)
        return function(*args, **kwargs)

    return call


def test_what_loses_is_not_fused(folders, monkeypatch):  # noqa: F811
    model = adapted(folders("llama"))
    plain = step(model)
    monkeypatch.setattr(slothrl.fuse_layer, "decoder_layer", slowed(slothrl.fuse_layer.decoder_layer))
    report = fuse(model, only_if_faster=True)
    assert not is_fused(model) and not any("forward" in vars(m) for m in model.modules())
    assert not report.fused and report.difference is None
    assert report.kept[("whole layer", "slower fused, by measurement")] == 2
    assert "ms fused" in report.notes[-1] and "slower fused" in dict(report.rows())["not fused"]
    assert torch.equal(step(model)[0], plain[0])
    assert fuse(model).fused["whole layer"] == 2  # asked for, whatever it takes


def test_what_wins_stays(folders, monkeypatch):  # noqa: F811
    """And the measurement leaves nothing behind: gradients, hooks, random numbers, other replacements."""
    model = adapted(folders("qwen3"))
    fuse(model)
    expected, order = step(model), [type(vars(m)["forward"]) for m in model.modules() if "forward" in vars(m)]
    unfuse(model)
    model.zero_grad()
    monkeypatch.setattr(Qwen3MLP, "forward", slowed(Qwen3MLP.forward))
    state = torch.get_rng_state()
    report = fuse(model, only_if_faster=True)
    assert torch.equal(torch.get_rng_state(), state)
    assert report.fused["whole layer"] == 2 and not report.kept and "ms fused" in report.notes[-1]
    assert [type(vars(m)["forward"]) for m in model.modules() if "forward" in vars(m)] == order
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.equal(step(model)[0], expected[0])
    assert all(fused_layer(layer) for layer in model.get_base_model().model.layers)


def test_times_of_both(folders, monkeypatch):  # noqa: F811
    model = adapted(folders("llama"))
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    monkeypatch.setattr(LlamaMLP, "forward", slowed(LlamaMLP.forward))
    fuse(model)
    found = time_layer(model.get_base_model(), vars(model)["_slothrl_replacements"])
    assert found is not None and found.plain >= 1e3 * SLOW and 0 < found.fused < found.plain and not found.loses
    assert time_layer(model.get_base_model(), []) is None and time_layer(torch.nn.Linear(2, 2), []) is None
    assert Timing(1.06, 1.0).loses and not Timing(1.04, 1.0).loses


def test_what_cannot_be_timed_is_said(folders, monkeypatch):  # noqa: F811
    def fails(*args):
        raise torch.OutOfMemoryError("no memory\nfor this")

    monkeypatch.setattr("slothrl.fuse.time_layer", fails)
    report = fuse(adapted(folders("llama")), only_if_faster=True)
    assert report.fused["whole layer"] == 2 and report.notes == ["not timed: OutOfMemoryError: no memory"]
