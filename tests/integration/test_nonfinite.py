"""Steps whose loss or gradient is not finite: skipped, dumped, and too many of them end the run."""

# ruff: noqa: F811 - fixtures of another file

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_faults import overrides, started  # noqa: F401

from slothrl.checkpoint import newest, step_of, verify
from slothrl.errors import FaultError
from slothrl.tensor_tree import load_tree
from slothrl.trainers.guards import NonFiniteFault

pytestmark = pytest.mark.usefixtures("one_thread")


def adapter(folder: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(folder / f"checkpoint-{step}" / "adapter_model.safetensors")


def moments(folder: Path, step: int) -> dict:
    return load_tree(folder / f"checkpoint-{step}", "optimizer")["state"]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_skips_the_step(started, value, capsys):
    run = started("trainer.save_total_limit=9")
    run.on_gradient(lambda step, gradient: gradient * value if step == 2 else None)
    run.train()
    assert f"step 2 skipped: its gradient is not finite; its batch is in {run.folder}" in capsys.readouterr().out
    first, second, third = (adapter(run.folder, step) for step in (1, 2, 3))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(second[name], third[name]) for name in first)
    assert all(torch.equal(moments(run.folder, 1)[i]["exp_avg"], moments(run.folder, 2)[i]["exp_avg"]) for i in (0, 1))
    dumped = load_tree(run.folder / "nonfinite" / "step-2", "batch")
    assert (dumped["step"], math.isfinite(dumped["losses"][0]), math.isfinite(dumped["grad_norm"])) == (2, True, False)
    (batch,) = dumped["micro_batches"]
    assert batch["completion_ids"].shape[0] == 8
    assert all(tensor.isfinite().all() for tensor in adapter(run.folder, 4).values())


def test_a_loss_that_is_not_finite(started, capsys):
    """NaN in one micro-batch of two: the other one's gradient is not applied alone."""
    run = started("trainer.gradient_accumulation_steps=2", "trainer.save_total_limit=9")
    compute, calls = run.trainer._compute_loss, []

    def poisoned(model, inputs):
        calls.append(1)
        return compute(model, inputs) * (math.nan if len(calls) == 3 else 1.0)

    run.trainer._compute_loss = poisoned
    run.train()
    assert "step 2 skipped: its loss is not finite" in capsys.readouterr().out
    first, second = adapter(run.folder, 1), adapter(run.folder, 2)
    assert all(torch.equal(first[name], second[name]) for name in first)
    dumped = load_tree(run.folder / "nonfinite" / "step-2", "batch")
    assert [math.isfinite(loss) for loss in dumped["losses"]] == [False, True]
    assert len(dumped["micro_batches"]) == 2


def test_too_many_in_a_row_end_the_run(started):
    run = started("max_nonfinite_steps=2", "trainer.max_steps=20")
    run.on_gradient(lambda step, gradient: gradient * math.nan if step in (2, 4, 5) else None)
    with pytest.raises(NonFiniteFault, match="step 5 skipped.*2 in a row") as caught:
        run.train()
    assert isinstance(caught.value, FaultError)
    assert str(caught.value).endswith("go on with: THE COMMAND")
    search = newest(run.folder)
    assert search.found is not None
    assert step_of(search.found) == 4
    verify(search.found)
