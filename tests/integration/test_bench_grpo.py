"""The benchmark of GRPO updates runs, at a size for a CPU: its arms and TRL's own trainer train the same."""

import pytest

from tests.gpu import bench_grpo_step
from tests.gpu.bench_grpo_peers import measure as measure_peer
from tests.gpu.grpo_shapes import SHAPES, Shape, forced, prompts_of

SHAPE = Shape(2, 4, 24, 12, 4, 1)


def test_every_arm_trains_the_same():
    found = {arm: bench_grpo_step.measure(arm, SHAPE, tiny=True) for arm in ("padded", bench_grpo_step.FUSED)}
    found["TRL"] = measure_peer("trl", SHAPE, tiny=True, rows=4)
    losses, norms = ([result[key] for result in found.values()] for key in ("loss", "grad_norm"))
    assert losses == pytest.approx([losses[0]] * 3, abs=2e-3)  # bf16
    assert norms == pytest.approx([norms[0]] * 3, rel=0.05) and norms[0] > 0.01
    tokens = {arm: result["tokens"] for arm, result in found.items()}
    # Two prompts, eight completions less their last token; one has its group's mean reward, and is not computed.
    assert tokens == {"padded": 8 * 36, bench_grpo_step.FUSED: 2 * 24 + 7 * 11, "TRL": 8 * 36}


def test_a_failed_arm_is_told_by_its_exception(capsys):
    found = bench_grpo_step.in_process("main", "Unsloth", ["--rows", "none"])
    assert found["error"].startswith("bench_grpo_peers.py: error: argument --rows: invalid int value")
    assert "FAILED: bench_grpo_peers.py" in bench_grpo_step.row("main", "Unsloth", found)
    assert "usage" in capsys.readouterr().err


def test_an_arm_with_another_gradient_is_named():
    norms = {"packed": 1.0, "padded": 1.05, "TRL": 0.0, "Unsloth": 7.0}
    assert bench_grpo_step.unlike("main", norms) == ["TRL at main (its gradient is another)"]
    assert bench_grpo_step.unlike("main", {}) == []


@pytest.mark.parametrize("name", SHAPES)
def test_arms_are_forced_to_the_same(name):
    shape = SHAPES[name]
    tokens, logprobs = forced(shape, 1, 1000)
    assert forced(shape, 1, 1000)[0] == tokens != forced(shape, 2, 1000)[0]
    assert [len(row) for row in tokens] == [len(row) for row in logprobs]
    whole = sum(len(row) == shape.completion for row in tokens)
    assert whole == (1 if shape.short_warm_up else shape.prompts * shape.completions)
    assert len(set(prompts_of(shape))) == 8 * shape.prompts
    assert {len(prompt) for prompt in prompts_of(shape)} == {shape.prompt}
