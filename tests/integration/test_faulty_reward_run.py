"""A run whose reward function hangs, crashes, leaks, returns rubbish and prints a gigabyte, each in 5 % of calls."""

import resource
from collections import Counter
from pathlib import Path

import pytest

from slothrl.tasks import generate
from slothrl.train import main
from tests.integration.test_runs import lines, tiny

pytestmark = pytest.mark.usefixtures("one_thread")
# One prompt of 80 brings each fault; 4 prompts x 2 completions make a call, so that is one call of 20.
FAULTY = """
import os, time

FATES = {fates}

def healthy(completions, **_):
    return [len(set(str(completion))) / 10 for completion in completions]

def faulty(completions, a, b, **_):
    fates = {{FATES.get(pair) for pair in zip(a, b)}}
    if "hang" in fates:
        time.sleep(600)
    if "crash" in fates:
        os._exit(1)
    if "leak" in fates:
        held = [bytearray(1 << 20) for _ in range(2048)]
    if "print" in fates:
        for _ in range(1000):
            os.write(1, b"x" * 1_000_000)
    if "rubbish" in fates:
        return "rubbish"
    return healthy(completions)
"""
STATUS = {"hang": "timeout", "crash": "crash", "leak": "out_of_memory", "rubbish": "wrong_type", "print": "ok"}
STEPS, BATCH = 20, 8


def run(function: str, folder: str) -> list[dict]:
    """Train with one of the two functions, on the same samples: nothing is learned at a learning rate of 0."""
    options = ["reward=custom", f"reward.functions=[./mine.py:{function}]", f"output_dir={function}"]
    options += ["reward.timeout=4", "reward.memory_gb=0.5", "trainer.num_generations=2", f"trainer.max_steps={STEPS}"]
    options += ["trainer.learning_rate=0", "data.train_size=80", f"logger.samples={BATCH}", "logger.samples_every=1"]
    assert main(tiny(folder, *options)) == 0
    samples = lines(Path(function) / "samples.jsonl")
    assert len(samples) == STEPS * BATCH
    return samples


def test_the_run_goes_on(tmp_path, tiny_folders, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    rows = generate("arithmetic", 80, 4, 0)[0][10:15]  # the trial before the run sees only the first
    prompts = {row["prompt"]: fate for row, fate in zip(rows, STATUS, strict=True)}
    pairs = {(row["a"], row["b"]): prompts[row["prompt"]] for row in rows}
    Path("mine.py").write_text(FAULTY.format(fates=pairs), encoding="utf-8")
    expected = run("healthy", tiny_folders["tiny"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = run("faulty", tiny_folders["tiny"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # KiB

    fates = [prompts.get(sample["prompt"]) for sample in found]
    assert Counter(fates) == {None: 150, **dict.fromkeys(STATUS, 2)}
    assert [sample["completion"] for sample in found] == [sample["completion"] for sample in expected]
    for fate, before, after in zip(fates, expected, found, strict=True):
        scored = STATUS.get(str(fate), "ok") == "ok"
        assert after["rewards"]["faulty"] == (before["rewards"]["healthy"] if scored else None)
        assert scored or after["advantage"] == 0
    logged = [line for line in lines(Path("faulty") / "metrics.jsonl") if "loss" in line]
    statuses = [{k.rsplit("/", 1)[1]: int(v) for k, v in line.items() if "/status/" in k} for line in logged]
    assert [sum(counts.values()) for counts in statuses] == [BATCH] * STEPS
    total = sum(map(Counter, statuses), Counter())
    assert total == {"ok": 152, "timeout": 2, "crash": 2, "out_of_memory": 2, "wrong_type": 2}
    printed = capfd.readouterr()
    assert printed.err.count("shown once") == 4
    assert "x" * 1000 not in printed.out + printed.err
