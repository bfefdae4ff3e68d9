"""The rules of the diagnosis and the intervals behind them, on metrics made by hand."""

import math
from pathlib import Path

import pytest

from slothrl.diagnosis import diagnose
from slothrl.intervals import bootstrap, change_interval, mean_interval, pass_at_k, wilson
from slothrl.run_record import RunRecord

STEPS = 40


def record(held_out=(), summary=None, fault=None, skipped=0, steps=STEPS, **curves) -> RunRecord:
    """A run whose metrics are `curves`: a number, or a function of the step's share of the run; "__" is "/"."""
    healthy = {"reward": lambda x: 0.2 + 0.6 * x, "grad_norm": 1.0, "entropy": 1.0, "frac_reward_zero_std": 0.1}
    lines = []
    for step in range(1, steps + 1):
        values = {name.replace("__", "/"): curve for name, curve in {**healthy, **curves}.items()}
        known = {name: curve(step / steps) if callable(curve) else curve for name, curve in values.items()}
        lines.append({"step": step, "loss": 0.1, **known})
    done = {"steps": steps, "resume": None} if summary is None else summary
    return RunRecord(Path("run"), {}, [], done, fault or {}, lines, list(held_out), [], [], skipped)


def warnings(run: RunRecord) -> list[str]:
    return [f"{finding.text} {finding.knob}" for finding in diagnose(run) if finding.level == "warning"]


def test_a_healthy_run_has_no_warning():
    assert warnings(record()) == []
    assert [finding.level for finding in diagnose(record())] == ["good"]


@pytest.mark.parametrize(
    ("curves", "text", "knob"),
    [
        ({"reward": lambda x: 0.3 + 0.01 * math.sin(40 * x)}, "The reward is flat", "trainer.learning_rate"),
        ({"reward": lambda x: 0.9 - 0.6 * x}, "The reward fell", "trainer.beta"),
        ({"completions__clipped_ratio": 1.0}, "All completions are truncated", "trainer.max_completion_length"),
        ({"completions__clipped_ratio": 0.6}, "60% of the completions are truncated", "trainer.max_completion_length"),
        ({"frac_reward_zero_std": 0.8}, "In 80% of the groups", "trainer.num_generations"),
        (
            {"grad_norm": lambda x: 0.0 if x < 0.7 else 1.0},
            "No gradient in 27 of 40 steps",
            "completions of one prompt",
        ),
        ({"sampling__importance_sampling_ratio__mean": 0.7}, "ratio 0.700", "rollout.dtype"),
        ({"sampling__sampling_logp_difference__mean": 0.4}, "0.400 nat apart", "rollout.dtype"),
        ({"kl": lambda x: 0.01 if x < 0.8 else 30.0}, "KL to the reference explodes: up to 30.00", "trainer.beta"),
        ({"entropy": lambda x: 2.0 * math.exp(-8 * x)}, "Entropy collapsed", "trainer.temperature"),
        ({"rewards__f__status__ok": 6.0, "rewards__f__status__timeout": 2.0}, "25.0%", "reward.timeout"),
    ],
)
def test_each_failure_is_named_alone_with_its_knob(curves, text, knob):
    (found,) = warnings(record(**curves))
    assert text in found
    assert knob in found


@pytest.mark.parametrize(
    "curves",
    [
        {"completions__clipped_ratio": lambda x: 1.0 if x < 0.5 else 0.1},  # it learned to stop
        {"kl": lambda x: 0.3 * x},
        {"sampling__importance_sampling_ratio__mean": 1.02, "sampling__sampling_logp_difference__mean": 0.03},
        {"rewards__f__status__ok": 7.0, "rewards__f__status__nan": 1.0},  # the function does not apply: no failure
        {"frac_reward_zero_std": 0.9, "dynamic_sampling__share_without_signal": 0.1},  # they were drawn again
        # A solved task: no signal and no entropy are what is left to see.
        {
            "reward": lambda x: min(1.0, 2 * x),
            "frac_reward_zero_std": lambda x: 0.3 + 0.7 * x,
            "entropy": lambda x: math.exp(-8 * x),
        },
    ],
)
def test_what_is_no_failure(curves):
    assert warnings(record(**curves)) == []


def test_a_short_run_has_no_trend():
    found = diagnose(record(steps=3, reward=0.5))
    assert [(finding.level, finding.text) for finding in found] == [("note", "Only 3 steps: no trend is read.")]


def held_out(before: list[float], after: list[float]) -> list[dict]:
    rows = ((0, before), (9, after))
    return [{"step": s, "metric": "m", "score": sum(x) / len(x), "scores": x} for s, x in rows]


@pytest.mark.parametrize(
    ("before", "after", "level", "text"),
    [
        ([0.0] * 15 + [1.0] * 15, [0.0] * 12 + [1.0] * 18, "warning", "not shown to be an improvement"),
        ([0.0] * 30, [0.0] * 12 + [1.0] * 18, "good", "improved"),
        ([1.0] * 30, [0.0] * 12 + [1.0] * 18, "warning", "it got worse"),
        ([0.5] * 30, [0.5 + 0.001 * i for i in range(30)], "good", "mean score (m, greedy): 0.500 → 0.515"),
    ],
)
def test_held_out_change(before, after, level, text):
    (found,) = [finding for finding in diagnose(record(held_out(before, after))) if "Held-out" in finding.text]
    assert found.level == level
    assert text in found.text


def test_how_it_ended():
    fault = {"type": "OutOfMemoryFault", "message": "out of memory in the forward phase"}
    assert "out of memory in the forward phase" in warnings(record(fault=fault, summary={}))[0]
    assert "2 steps were skipped" in warnings(record(skipped=2))[0]
    stale = record(summary={"steps": 10, "resume": "go on"})  # of an earlier part: the metrics go on after it
    assert (stale.state, record(summary={"steps": STEPS, "resume": "x"}).state) == ("unfinished", "interrupted")


# --- intervals --------------------------------------------------------------------------------------------------------


def test_wilson():
    """Values of Newcombe (1998), Statistics in Medicine 17, 857-872, table I: 81 of 263, 15 of 148, 0 of 20."""
    for successes, count, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        found = wilson(successes, count)
        assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)
    assert wilson(20, 20).high == 1.0


def test_the_change_is_that_of_the_same_prompts():
    """The same two scores: prompts that all kept theirs tell more than prompts that changed places."""
    before = [0.0] * 20 + [1.0] * 20
    kept, swapped = [0.0] * 16 + [1.0] * 24, [1.0] * 20 + [0.0] * 16 + [1.0] * 4
    narrow, wide = change_interval(before, kept), change_interval(before, swapped)
    assert narrow.value == wide.value == pytest.approx(0.1)
    assert narrow.high - narrow.low < 0.6 * (wide.high - wide.low)
    assert change_interval([1.0], [1.0, 0.0]) is None  # other prompts


def test_the_bootstrap_agrees_with_the_normal_interval():
    values = [math.sin(i) for i in range(200)]
    found, mean = bootstrap(values), sum(values) / 200
    half = 1.96 * math.sqrt(sum((v - mean) ** 2 for v in values) / 200 / 200)
    assert (found.low, found.high) == pytest.approx((mean - half, mean + half), abs=0.02)
    assert bootstrap(values) == found  # the same every time
    assert mean_interval([0.5, 1.0]).method.startswith("bootstrap")
    assert mean_interval([]) is None


def test_pass_at_k():
    """Against counting: of 5 completions 2 are right, and 3 of the 10 pairs have none of them."""
    assert pass_at_k(2, 5, 1) == pytest.approx(0.4)
    assert pass_at_k(2, 5, 2) == pytest.approx(0.7)
    assert (pass_at_k(2, 5, 4), pass_at_k(0, 5, 5)) == (1.0, 0.0)
