"""Reward functions in workers: whatever one does to some completions, the others keep their rewards."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slothrl.config import RewardConfig
from slothrl.errors import UserError
from slothrl.reward_isolation import IsolatedReward, open_rewards
from slothrl.reward_workers import STATUSES, closing_workers

ROOT = Path(__file__).resolve().parents[2]
FAULTS = r"""
import ctypes, os, sys, time
held = []

def fault(text):
    if text == "sleep":
        time.sleep(600)
    if text == "busy":
        return 9**9**8  # one C call that never gives the interpreter back
    if text == "exit":
        os._exit(0)
    if text == "signal":
        os.kill(os.getpid(), 40)  # a real-time one, which has no name
    if text == "segv":
        ctypes.string_at(0)
    if text == "leak":
        while True:
            held.append(bytearray(100_000_000))
    if text == "raise":
        raise ValueError("no such unit")
    if text == "quit":
        sys.exit(0)
    return {"text": "good", "inf": float("inf"), "nan": float("nan"), "none": None}.get(text, len(text) / 7)

def faults(completions, **_):
    return [fault(text) for text in completions]

def short(completions, **_):  # of wrong length where one of them is "short"
    return [len(text) / 7 for text in completions if text != "short"]

def rubbish(completions, **_):
    return "rubbish" if "rubbish" in completions else [len(text) / 7 for text in completions]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path):
    """A folder with a reward file; the test's workers end with it."""
    (tmp_path / "faults.py").write_text(FAULTS, encoding="utf-8")
    with closing_workers():
        yield tmp_path


def opened(folder: Path, text: str, **options) -> IsolatedReward:
    config = RewardConfig(functions=[text], **{"timeout": 1.5, "memory_gb": 0.25, **options})
    (reward,) = open_rewards(config, folder / "run", folder)
    assert isinstance(reward, IsolatedReward)
    return reward


def call(reward, completions: list, **columns) -> list:
    return reward(prompts=["?"] * len(completions), completions=completions, **columns)


# --- faults ---------------------------------------------------------------------------------------------------------

KINDS = {
    "sleep": ("timeout", r"reward faults took more than 1.5 s \(reward.timeout\), at faults.py, line 7"),
    "busy": ("timeout", r"reward faults took more than 1.5 s \(reward.timeout\), at faults.py, line 9"),
    "exit": ("crash", "reward faults: its process ended with exit code 0"),
    "signal": ("crash", "reward faults: its process ended by signal 40"),
    "segv": ("crash", "reward faults: its process ended by signal SIGSEGV, at faults.py, line 15"),
    "leak": ("out_of_memory", r"reward faults raised MemoryError \(faults.py, line 18\)"),
    "raise": ("exception", r"reward faults raised ValueError: no such unit \(faults.py, line 20\)"),
    "quit": ("exception", r"reward faults raised SystemExit: 0 \(faults.py, line 22\)"),
    "text": ("wrong_type", r"reward faults returned a str \('good'\) where a number or None is expected"),
    "inf": ("wrong_type", "reward faults returned inf where a finite number is expected"),
    "short": ("wrong_length", "reward short returned 0 scores for 1 completions"),
    "rubbish": ("wrong_type", r"reward rubbish returned a str \('rubbish'\) where a list of scores is expected"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_one_completion_of_twenty(kind, folder, capfd):
    """The guilty completion is masked, the others have the very rewards that they would have had."""
    status, message = KINDS[kind]
    function = kind if kind in ("short", "rubbish") else "faults"
    # Of those that do not wait for the deadline none may meet it, however busy the machine is.
    reward, logged = opened(folder, f"faults.py:{function}", timeout=1.5 if status == "timeout" else 20.0), []
    completions = ["a" * n for n in range(19)]
    completions.insert(7, kind)
    scores = call(reward, completions, log_metric=lambda *pair: logged.append(pair), log_extra=None)
    assert scores == [None if text == kind else len(text) / 7 for text in completions]
    assert reward.ledger.counts == {"ok": 19, status: 1}
    assert logged == [(f"rewards/{function}/status/ok", 19), (f"rewards/{function}/status/{status}", 1)]
    shown = capfd.readouterr().err
    assert shown.count("shown once") == 1
    assert f"--reproduce {folder}/run/reward_failure.json" in shown
    with pytest.raises(UserError, match=message):
        reward.strict(prompts=["?"], completions=[kind])
    assert call(reward, ["aa"]) == [2 / 7]  # again, in a new process where the old one is gone


def test_all_kinds_in_one_batch(folder, capfd):
    reward = opened(folder, "faults.py:faults", max_failure_rate=0.5, workers=2, timeout=4.0)
    bad = ["sleep", "exit", "segv", "leak", "raise", "text", "nan", "none"]
    completions = [bad[n // 10] if n % 10 == 3 else "a" * n for n in range(80)]
    expected = [None if n % 10 == 3 else n / 7 for n in range(80)]
    assert call(reward, completions) == expected
    counts = reward.ledger.counts
    assert sum(counts.values()) == 80
    assert set(counts) <= set(STATUSES)
    assert counts == {
        "ok": 73, "timeout": 1, "crash": 2, "out_of_memory": 1, "exception": 1, "wrong_type": 1, "nan": 1
    }  # fmt: skip
    assert capfd.readouterr().err.count("shown once") == 6


def test_endless_logs_do_not_fill_the_trainers_memory(folder, capfd):
    (folder / "logs.py").write_text(
        "def logs(completions, log_extra, **_):\n    if 'log' in completions:\n"
        "        log_extra('x', ['y' * 300_000_000])\n    return [1.0] * len(completions)\n"
    )
    reward = opened(folder, "logs.py:logs", timeout=60.0, memory_gb=4.0)
    ignored = {"log_metric": lambda *_: None, "log_extra": lambda *_: None}
    assert call(reward, ["a", "log"], **ignored) == [1.0, None]
    assert reward.ledger.counts == {"ok": 1, "out_of_memory": 1}
    assert "reward logs logged more than 256 MiB in one call" in capfd.readouterr().err


@pytest.mark.parametrize("kind", ["sleep", "busy"])
def test_the_deadline_holds(kind, folder):
    reward = opened(folder, "faults.py:faults", timeout=0.5)
    begun = time.monotonic()
    assert call(reward, [kind]) == [None]
    assert 0.5 <= time.monotonic() - begun < 1.5


def test_a_slow_batch_of_fast_completions(folder, capfd):
    (folder / "slow.py").write_text(
        "import time\ndef slow(completions, **_):\n    time.sleep(0.2 * len(completions))\n"
        "    return [1.0] * len(completions)\n"
    )
    assert call(opened(folder, "slow.py:slow"), ["a"] * 8) == [1.0] * 8
    assert "in smaller calls the same completions went well" in capfd.readouterr().err


COUNTING = """\
import os, sys
sys.path.append(os.path.dirname(__file__))
from helper import STEP
calls = 0

def counting(completions, **_):
    global calls
    if "exit" in completions:
        os._exit(3)
    calls += STEP
    return [calls] * len(completions)
"""


@pytest.mark.parametrize("edited", ["count.py", "helper.py"])
def test_an_edited_file_is_not_picked_up_in_mid_run(edited, folder, capfd):
    """Half a run with one reward and half with another would be a curve of neither."""
    (folder / "count.py").write_text(COUNTING, encoding="utf-8")
    (folder / "helper.py").write_text("STEP = 1\n", encoding="utf-8")
    reward = opened(folder, "count.py:counting", workers=2, timeout=20.0)
    assert {str(folder / "count.py"), str(folder / "helper.py")} <= set(reward.pool.workers[0].files)
    assert not any("/json/" in file or "-packages/" in file for file in reward.pool.workers[0].files)
    assert call(reward, ["exit", "a"]) == [None, 1]
    assert call(reward, ["a", "a"]) == [1, 2]  # the first worker's new process saw the same files
    before = (folder / edited).read_text()
    (folder / edited).write_text(before.replace("STEP = 1", "STEP = 100").replace("+= STEP", "+= 100 * STEP"))
    assert call(reward, ["a", "exit"]) == [2, None]  # a process that runs has what it began with
    with pytest.raises(UserError, match=rf"reward counting: .*/{edited} was edited in mid-run \(sha256 \w{{12}} at"):
        call(reward, ["a", "a"])
    (folder / edited).write_text(before)
    assert call(reward, ["a", "a"])[1] == 1


# --- what becomes of failures ---------------------------------------------------------------------------------------


def test_zero_and_abort(folder, capfd):
    assert call(opened(folder, "faults.py:faults", on_failure="zero"), ["raise", "a", "nan"]) == [0.0, 1 / 7, None]
    reward = opened(folder, "faults.py:faults", on_failure="abort")
    with pytest.raises(UserError, match=r"ValueError: no such unit .*; reward.on_failure=abort; repeat it: python -m"):
        call(reward, ["a", "raise"])


def test_too_many_failures_end_the_run(folder, capfd):
    reward = opened(folder, "faults.py:faults")
    for _ in range(3):  # 3 of 20
        call(reward, ["raise", *"abcd"])
    with pytest.raises(UserError) as caught:
        call(reward, ["raise"] * 20)
    message = str(caught.value)
    assert "8 of the last 35 completions failed (reward.max_failure_rate=0.2)" in message
    assert capfd.readouterr().err.count("ValueError: no such unit\n") == 1


def test_repeating_a_failed_call(folder, capfd):
    kinds = {"raise": "ValueError: no such unit", "sleep": "Timeout", "segv": "Segmentation fault"}
    for kind, printed in kinds.items():
        reward = opened(folder, "faults.py:faults")
        assert call(reward, ["a", kind, "b"]) == [1 / 7, None, 1 / 7]
        command = capfd.readouterr().err.split("repeat it: python ")[1].splitlines()[0].split()
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        found = subprocess.run([sys.executable, *command], cwd=folder, env=env, capture_output=True, text=True)
        assert found.returncode not in (0, 2)
        assert printed in found.stdout + found.stderr
