"""A worker's state, imports, prints and logs; several functions at once; and what is left when a run ends."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slothrl.config import RewardConfig
from slothrl.errors import ConfigError, UserError
from slothrl.reward_isolation import IsolatedReward, open_rewards, open_score, together
from slothrl.reward_workers import closing_workers
from slothrl.rewards import self_test
from slothrl.train import main
from tests.integration.test_reward_workers import FAULTS, ROOT, call, opened
from tests.integration.test_runs import lines, start, tiny, wait_for_step

pytestmark = pytest.mark.usefixtures("one_thread")
STATE = """
import asyncio, os, sys, time
calls = made = 0

def setup():
    global made
    made += 1

def counting(completions, **_):
    global calls
    if "exit" in completions:
        os._exit(3)
    calls += 1
    return [calls + made / 10] * len(completions)

def heavy(completions, **_):
    return [float(len({"torch", "trl", "transformers", "omegaconf", "numpy"} & set(sys.modules)))]

def prints(completions, **_):
    for _ in range(2000):
        os.write(1, b"x" * 50_000)
        os.write(2, b"y" * 50_000)
    print("the end")
    return [float(len(sys.stdin.read()))]

async def gentle(completions, answer, limit=2, trainer_state=None, log_metric=None, log_extra=None):
    await asyncio.sleep(0.01)
    log_metric("mine", 3)
    log_extra("length", [len(text) for text in completions])
    if "raise" in completions:
        raise ValueError
    return [float(len(text) > limit) + a + trainer_state.global_step for text, a in zip(completions, answer)]

def interval():
    begun = time.monotonic()
    time.sleep(0.5)
    return [begun, time.monotonic()]

def slow_a(completions, **_):
    return interval()

def slow_b(completions, **_):
    return interval()

def main_only(completions, **_):
    return [float(os.getpid())]

main_only.needs_main_process = True

def pid(completions, **_):
    return [float(os.getpid())]
"""


@pytest.fixture(autouse=True)
def folder(tmp_path):
    """A folder with reward files; the test's workers end with it."""
    (tmp_path / "faults.py").write_text(FAULTS, encoding="utf-8")
    (tmp_path / "state.py").write_text(STATE, encoding="utf-8")
    with closing_workers():
        yield tmp_path


def is_gone(pid: int, seconds: float = 2.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rsplit(")", 1)[1].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


# --- one worker -----------------------------------------------------------------------------------------------------


def test_state_and_setup_live_as_long_as_the_worker(folder):
    reward = opened(folder, "state.py:counting")
    assert call(reward, ["a", "b"]) == [1.1, 1.1]
    assert call(reward, ["a"]) == [2.1]
    assert call(reward, ["exit"]) == [None]
    assert call(reward, ["a"]) == [1.1]  # a new process: state starts again, setup() has run again


def test_it_imports_nothing_heavy(folder):
    assert call(opened(folder, "state.py:heavy"), ["a"]) == [0.0]
    begun = time.monotonic()
    reward = opened(folder, "arithmetic")
    assert time.monotonic() - begun < 3  # measured 0.1 s
    assert call(reward, ["2"], answer=["2"]) == [1.0]


def test_200_mb_of_prints(folder):
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    reward = opened(folder, "state.py:prints", timeout=30.0)
    before = resident()
    assert call(reward, ["a"]) == [0.0]  # and stdin is empty
    assert resident() - before < 20e6
    assert reward.pool.workers[0].printed.endswith("the end\n")


def test_async_with_columns_parameters_and_logs(folder, capfd):
    reward = opened(folder, "state.py:gentle", params={"gentle": {"limit": 3}})
    metrics, extras = [], []
    logs = {"log_metric": lambda *pair: metrics.append(pair), "log_extra": lambda *pair: extras.append(pair)}
    state = type("State", (), {})()
    state.global_step, state.log_history = 5, [{"loss": 1.0}] * 100
    scores = call(reward, ["abcd", "a"], answer=[10, 20], other=[object()] * 2, trainer_state=state, **logs)
    assert scores == [16.0, 25.0]
    assert ("mine", 3.0) in metrics
    assert extras == [("length", [4, 1])]
    assert call(reward, ["abcd", "raise", "a"], answer=[1, 1, 1], trainer_state=state, **logs) == [7.0, None, 6.0]
    assert extras[1:] == [("length", [4, None, 1])]
    with pytest.raises(UserError, match=r"reward gentle: answer: values that cannot be sent .* reward.isolate=false"):
        call(reward, ["a"], answer=[object()], trainer_state=state)
    with pytest.raises(UserError, match="reward gentle needs answer: neither a dataset column nor in"):
        call(reward, ["a"], trainer_state=state)


def test_several_functions_at_once(folder):
    config = RewardConfig(functions=["state.py:slow_a", "state.py:slow_b"], weights=[1.0, 0.5])
    rewards = together(open_rewards(config, None, folder))
    latest = 0.0
    for completions in (["a", "b"], ["a", "b"]):
        (begun_a, ended_a), (begun_b, ended_b) = (call(reward, completions) for reward in rewards)
        assert max(latest, begun_a, begun_b) < min(ended_a, ended_b)
        assert min(begun_a, begun_b) > latest  # each batch once
        latest = max(ended_a, ended_b)
    assert [(reward.__name__, reward.weight) for reward in rewards] == [("slow_a", 1.0), ("slow_b", 0.5)]


def test_where_functions_run(folder):
    config = RewardConfig(functions=["state.py:main_only", "state.py:pid"], score="state.py:slow_a")
    main_only, pid = rewards = open_rewards(config, None, folder)
    assert call(main_only, ["a"]) == [os.getpid()] != call(pid, ["a"])
    assert "in the trainer's process" in main_only.source
    (folder / "other.py").write_text("from state_copy import main_only\n")  # says nothing of it itself
    (folder / "state_copy.py").write_text(STATE)
    sys.path.append(str(folder))
    try:
        (other,) = open_rewards(RewardConfig(functions=["other.py:main_only"]), None, folder)
        assert call(other, ["a"]) == [os.getpid()]
    finally:
        sys.path.remove(str(folder))
    score = open_score(config, rewards, None, folder)
    assert isinstance(score, IsolatedReward) and score.name == "slow_a"
    config.score = "pid"
    assert open_score(config, rewards, None, folder) is pid
    config.isolate = False
    assert [call(reward, ["a"]) for reward in open_rewards(config, None, folder)] == [[os.getpid()]] * 2


def test_mistakes_before_the_model(folder):
    (folder / "bad.py").write_text("import os\nos._exit(3)\n")
    (folder / "hook.py").write_text("def setup():\n    raise OSError('no key')\ndef f(completions): ...\n")
    names = ["bad.py:f", "hook.py:f2", "hook.py:f", "state.py:pid", "nope"]
    with pytest.raises(ConfigError) as caught:
        open_rewards(RewardConfig(functions=names, params={"pid": {"x": 1}, "f3": {}}), None, folder)
    text = "\n".join(caught.value.problems)
    for expected in (
        "reward.functions has more than one 'f'",
        "reward.params.f3: 'f3' is not selected",
        "reward f: its process ended with exit code 3",
        "hook.py has no 'f2'",
        "setup() raised OSError: no key (hook.py, line 2)",
        "unknown reward function 'nope'",
    ):
        assert expected in text
    rows = [{"prompt": "?", "answer": "sleep"}]
    with pytest.raises(ConfigError, match="took more than 1.5 s"):
        self_test([opened(folder, "faults.py:faults")], rows)


# --- ends -----------------------------------------------------------------------------------------------------------


def test_keyboard_interrupt_leaves_no_process(folder):
    reward = opened(folder, "faults.py:faults", timeout=60.0)
    (pid,) = [worker.pid for worker in reward.pool.workers]

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            call(reward, ["busy"])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert is_gone(pid)
    assert call(reward, ["a"]) == [1 / 7]


def test_a_killed_parent_leaves_no_process(folder):
    code = (
        "import sys; from pathlib import Path; from slothrl.config import RewardConfig\n"
        "from slothrl.reward_isolation import open_rewards\n"
        "(r,) = open_rewards(RewardConfig(functions=['faults.py:faults']), None, Path('.'))\n"
        "print(r.pool.workers[0].pid, flush=True)\nr(prompts=['?'], completions=['busy'])\n"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", code], cwd=folder, env=env, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    pid = int(process.stdout.readline())
    time.sleep(0.3)
    process.kill()
    process.wait()
    process.stdout.close()
    assert is_gone(pid)


UNRELIABLE = """\
import os
def fate(completion):
    letters = len(set(completion[0]["content"]))
    return letters % 4 if letters > 2 else 2  # a toss that depends on the completion only, and lets the trial pass

def unreliable(completions, answer, **_):
    for completion in completions:
        if fate(completion) == 0:
            raise RuntimeError("a bad day")
        if fate(completion) == 1:
            os._exit(1)
    return [len(completion[0]["content"]) / 10 for completion in completions]
"""


def test_a_run_with_an_unreliable_reward(folder, tiny_folders, monkeypatch, capfd):
    """Through the trainer: failed completions have no reward and an advantage of exactly 0, all numbers are finite."""
    monkeypatch.chdir(folder)
    (folder / "mine.py").write_text(UNRELIABLE, encoding="utf-8")
    options = ["reward=custom", "reward.functions=[./mine.py:unreliable]", "reward.max_failure_rate=1"]
    options += ["trainer.num_generations=4", "trainer.max_steps=4", "logger.samples=8", "logger.samples_every=1"]
    assert main(tiny(tiny_folders["tiny"], *options, "output_dir=run")) == 0
    logged = [line for line in lines(folder / "run" / "metrics.jsonl") if "loss" in line]
    statuses = [{k.rsplit("/", 1)[1]: v for k, v in line.items() if "/status/" in k} for line in logged]
    assert [sum(counts.values()) for counts in statuses] == [8] * 4
    assert {"ok", "exception", "crash"} <= {status for counts in statuses for status in counts}
    assert all(isinstance(line["loss"], float) and line["grad_norm"] is not None for line in logged)
    samples = lines(folder / "run" / "samples.jsonl")
    masked = [row for row in samples if row["rewards"]["unreliable"] is None]
    assert 0 < len(masked) < len(samples) == 32
    assert all(row["advantage"] == 0 for row in masked)
    assert any(row["advantage"] for row in samples)
    assert all(isinstance(row["advantage"], float) for row in samples)  # NaN would be null
    assert (folder / "run" / "reward_failure.json").exists()
    assert "Traceback" not in capfd.readouterr().err


def test_ctrl_c_on_a_run(folder, tiny_folders):
    (folder / "mine.py").write_text(
        "import os\ndef slow(completions, **_):\n    open('pid', 'w').write(str(os.getpid()))\n"
        "    return [float(len(set(str(text)))) for text in completions]\n"
    )
    options = ["reward=custom", "reward.functions=[./mine.py:slow]", "trainer.num_generations=4"]
    arguments = tiny(tiny_folders["tiny"], *options, "trainer.max_steps=2000", "output_dir=run")
    process = start(["-m", "slothrl", *arguments], folder)
    try:
        wait_for_step(process, folder / "run" / "metrics.jsonl", 2)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
    finally:
        process.kill()
    assert is_gone(int((folder / "pid").read_text()))
    assert "Traceback" not in (folder / "printed.txt").read_text()
