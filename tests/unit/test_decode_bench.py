"""The parts of the decoding benchmark that need no GPU: arguments, the size of caches, idle time, tables."""

import gc
import os

import pytest

from tests.gpu import decode_host
from tests.gpu.bench_decode import parse
from tests.gpu.decode_arm import cache_of, my_turn
from tests.gpu.decode_profile import STEPS, kernels_of, said, step_of, trace_of
from tests.gpu.decode_table import slower, table


def test_several_shapes_in_one_command():
    options = parse(["--shape", "8b,0.5b", "--arms", "slothrl,slothrl-fp8-pdl", "--sequences", "1,64"])
    assert options.shape == ["8b", "0.5b"] and options.arms == ["slothrl", "slothrl-fp8-pdl"]
    assert (options.sequences, options.prompt, options.steps, options.kv) == ([1, 64], 512, 256, None)
    child = parse(["--arms", "slothrl", "--arm", "8b", "slothrl", "--folder", "/tmp"])
    assert child.arm == ["8b", "slothrl"] and child.arms == ["slothrl"]


@pytest.mark.parametrize(
    ("arguments", "arm", "tokens"),
    [
        (["--sequences", "1,128"], "slothrl", 128 * 50 * 16),  # 769 tokens are 49 blocks of 16, and one to spare
        (["--sequences", "1,128"], "slothrl-fp8", 128 * 50 * 8),
        (["--sequences", "1,64", "--rollout"], "bf16", 64 * 97 * 16),
        (["--sequences", "1", "--prompt", "8", "--steps", "8"], "slothrl", 2048),  # vLLM wants one longest sequence
    ],
)
def test_a_cache_holds_what_is_measured(arguments, arm, tokens):
    """32 layers of 8 heads of 128, keys and values: 131,072 bytes a token in 16 bits."""
    found, longest = cache_of(parse(arguments), "8b", arm)
    spare = 64 * 16 // (2 if "fp8" in arm else 1)
    assert found == (tokens + spare) * 131072 and longest == 2048
    assert cache_of(parse([*arguments, "--kv", "2"]), "8b", arm)[0] == 2 << 30


def test_overlapping_kernels_count_once():
    events = [("b", 8.0, 12.0), ("a", 0.0, 10.0), ("inside", 1.0, 2.0), ("a", 15.0, 16.0), ("late", 100.0, 101.0)]
    trace = trace_of(events, wall=200.0)
    assert (trace.busy, trace.gaps, trace.pauses, trace.pause_count) == (14.0, 3.0, 84.0, 1)
    assert trace.kernels == {"a": (11.0, 2), "b": (4.0, 1), "inside": (1.0, 1), "late": (1.0, 1)}
    assert trace_of([]).busy == 0.0


def test_a_step_is_a_difference():
    """A prefill of 50 us in both; steps of two kernels, of 4 and 2 us, the second 1 us early, and 40 us apart."""

    def events(steps):
        yield "prefill", 0.0, 50.0
        for i in range(steps):
            yield "inputs", 90.0 + 45 * i, 94.0 + 45 * i
            yield "gemm", 93.0 + 45 * i, 95.0 + 45 * i

    short, long = trace_of(events(8), 500.0), trace_of(events(8 + STEPS), 500.0 + 46 * STEPS)
    step = step_of(short, long, wall=45.0 * STEPS)
    wanted = {"wall": 0.045, "idle": 0.040, "traced": 0.046, "busy": 0.005, "gaps": 0.0, "pauses": 0.040}
    assert step == pytest.approx(wanted | {"pause_count": 1.0})
    assert [name for name, _ in kernels_of(short, long)] == ["inputs", "gemm", "prefill"]
    assert dict(kernels_of(short, long))["inputs"] == pytest.approx((0.004, 1.0))
    assert "idle 0.04;" in said(step)


OURS = {"start": 60.0, "1": 5.0, "16": 6.0, "64": 9.0, "prefill": 39111.4}


def test_where_ours_is_slower():
    theirs = {"start": 50.0, "1": 7.0, "16": 5.5}
    results = {"slothrl": OURS, "slothrl-pdl": {**OURS, "16": 5.0}, "bitsandbytes": theirs, "bf16": None}
    assert slower([1, 16, 64], results) == [
        "slothrl is slower than bitsandbytes: at 16 (6.00 against 5.50 ms) sequences, of 2 numbers of sequences.",
        "slothrl-pdl is slower than bitsandbytes: nowhere, of 2 numbers of sequences.",
    ]
    assert slower([1], {"slothrl": OURS, "bitsandbytes": None}) == slower([1], {"slothrl": OURS}) == []


def test_a_table_of_what_there_is():
    step = {"wall": 12.98, "traced": 13.5, "busy": 11.9, "idle": 1.08, "gaps": 0.2, "pauses": 0.9, "pause_count": 1.0}
    results = {"slothrl": {**OURS, "profile": {"64": step}}, "bf16": None}
    lines = table("8b", [1, 16, 64], results).splitlines()
    assert "| slothrl | 5.00 | 6.00 | 9.00 | 39,111 | nan | 60 |" in lines
    assert "| slothrl, the GPU busy |  |  | 11.90 | | | |" in lines
    assert "| bf16 | failed: see its log |" in lines
    assert lines[-1].startswith("slothrl, 64 sequences: 12.98 ms a step (13.50 profiled), GPU busy 11.90, idle 1.08;")


def test_a_turn_is_on_given_cores():
    before, frozen = os.sched_getaffinity(0), gc.get_freeze_count()
    try:
        with pytest.raises(KeyError), my_turn():
            assert os.sched_getaffinity(0) == set(sorted(before)[-2:]) and gc.get_freeze_count() > frozen
            raise KeyError
        assert os.sched_getaffinity(0) == before
    finally:
        gc.unfreeze()


def test_the_hosts_functions_by_the_step(capsys):
    """Two sequences take two calls a token; what comes once a call of the benchmark is not in a step."""
    short = {"once": (0.5, 0.5), "step": (0.1, 0.2)}
    long = {"once": (0.5, 0.5), "step": (0.42, 0.84), "new": (0.032, 0.1)}
    steps = {name: values for name, *values in decode_host.step_of(short, long)}
    assert [*steps] == ["step", "new", "once"]
    assert steps["step"] == pytest.approx([10.0, 20.0]) and steps["new"] == pytest.approx([1.0, 3.125])
    assert steps["once"] == [0.0, 0.0]

    def seconds(count, tokens):
        return float(sum(sorted(range(count))[0] for _ in range(tokens)))

    found = {name.split("(")[-1] for name, _, _ in decode_host.host_profile(2, seconds)}
    assert {"seconds)", "<genexpr>)"} <= found
    assert capsys.readouterr().out.startswith("HOST 2 sequences: ms a step")
