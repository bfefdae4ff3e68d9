"""Programs that attack the sandbox: each is contained, leaves nothing behind and gets no point for it.

Each runs as a candidate of the code reward and may print what it likes; ESCAPED says that it got through. The expected
output is a secret that never enters the sandbox, so no attack may score.
"""

import os
import platform
import secrets
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from slothrl_rewards.code import judge
from slothrl_rewards.sandbox import Limits, SandboxUnavailable, run_python, self_test
from slothrl_rewards.sandbox import run as sandbox_run
from slothrl_rewards.sandbox.limits import MIB

from tests.integration.sandbox_attacks import ATTACKS, HEAD, LIMITS, SHORT

pytestmark = pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")


@pytest.fixture(scope="module")
def mark():
    """Makes every process of these sandboxes recognisable from outside, by its command line or environment."""
    jail, name = self_test(), f"mark-{secrets.token_hex(8)}"
    sandbox_run._ready[None] = replace(jail, binds=(*jail.binds, "--setenv", "MARK", name))
    yield name
    sandbox_run._ready[None] = jail


@pytest.fixture
def canary(tmp_path, monkeypatch):
    home = tmp_path / "home"
    home.mkdir()
    (home / "token").write_text("canary", encoding="utf-8")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", "secret-in-the-environment")
    return home / "token"


def marked(mark: str) -> list[str]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        for name in ("cmdline", "environ"):
            try:
                if mark.encode() in (process / name).read_bytes():
                    found.append(process.name)
            except OSError:
                pass
    return found


def resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def attack(program: str, limits: Limits, canary: Path):
    for name, value in (("@CANARY", canary), ("@HOME", canary.parent), ("@SECRET", "secret-in-the-environment")):
        program = program.replace(name, str(value))
    return judge(HEAD + program, [{"input": "", "output": secrets.token_hex(8)}], limits=limits)


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_contained(name, mark, canary):
    program, says, status, limits = ATTACKS[name]
    before, listing = resident(), sorted(canary.parent.rglob("*"))
    began = time.monotonic()
    verdict = attack(program, limits, canary)
    outcome = verdict.outcome
    assert outcome.sandboxed
    assert "ESCAPED" not in outcome.stdout + outcome.stderr
    assert says in outcome.stdout, outcome
    assert verdict.status == status, outcome
    assert verdict.passed == (False,)
    assert time.monotonic() - began < limits.seconds + 3
    assert len(outcome.stdout) <= limits.output_bytes + MIB
    assert marked(mark) == []
    assert canary.read_text(encoding="utf-8") == "canary"
    assert sorted(canary.parent.rglob("*")) == listing
    assert resident() - before < 32 * MIB
    os.kill(os.getppid(), 0)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="x32 is a second ABI of x86-64")
def test_x32_is_refused(mark, canary):
    outcome = attack("refused(kernel, 0x40000000 | 39, 0)", LIMITS, canary).outcome
    assert "refused PermissionError 1" in outcome.stdout


def test_the_parent_dies(mark, tmp_path):
    """No sandbox outlives a trainer that is killed."""
    rewards = Path(sandbox_run.__file__).parents[2]
    code = (
        "from dataclasses import replace\nfrom slothrl_rewards.sandbox import run, run_python, self_test, Limits\n"
        f"jail = self_test()\nrun._ready[None] = replace(jail, binds=(*jail.binds, '--setenv', 'MARK', {mark!r}))\n"
        "print('ready', flush=True)\nrun_python('while True: pass', limits=Limits(seconds=60, cpu_seconds=60))"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(rewards)}
    )
    assert process.stdout and process.stdout.readline() == b"ready\n"
    deadline = time.monotonic() + 20
    while len(marked(mark)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    while marked(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert marked(mark) == []


def test_many_at_once(mark):
    """Right and hanging programs side by side: no mix-up, nothing left."""
    programs = ["while True: pass" if index % 4 == 0 else f"print({index})" for index in range(16)]
    with ThreadPoolExecutor(4) as pool:
        outcomes = list(pool.map(lambda text: run_python(text, limits=replace(LIMITS, seconds=3)), programs))
    expected = ["" if index % 4 == 0 else f"{index}\n" for index in range(16)]
    assert [outcome.stdout for outcome in outcomes] == expected
    assert [outcome.status for outcome in outcomes] == ["timeout", "ok", "ok", "ok"] * 4
    assert marked(mark) == []


def test_the_interpreter_behind_this_one(mark):
    """Where there is no system Python; one in a home folder is shown without the home."""
    program = "import sys, ctypes, hashlib, decimal\nprint(sys.version_info[:2], sys.executable)"
    outcome = run_python(program, python=getattr(sys, "_base_executable", sys.executable))
    assert outcome.stdout.startswith(str(sys.version_info[:2])), outcome
    assert "/home" not in outcome.stdout and "/root" not in outcome.stdout


def test_many_files_are_stopped_early(mark):
    outcome = run_python("import os\nfor n in range(10 ** 9): os.mknod(str(n))", limits=replace(LIMITS, files=1000))
    assert (outcome.status, outcome.detail) == ("crash", "more than 1000 files")
    assert outcome.seconds < 3  # measured 0.2 s; the CPU limit alone would leave it 6 s and 1 GB of kernel memory
    keeps = "import os, time\nfor n in range(500): os.mknod(str(n))\ntime.sleep(0.4)\nprint(len(os.listdir()))"
    assert run_python(keeps, limits=replace(LIMITS, files=1000)).stdout == "500\n"


def test_threads_work(mark):
    program = "import threading\nt = threading.Thread(target=print, args=('from a thread',))\nt.start(); t.join()"
    assert run_python(program).stdout == "from a thread\n"


def test_infra_is_not_the_programs_fault(mark):
    """A sandbox that does not come up masks the sample."""
    jail = sandbox_run._ready[None]
    broken = replace(jail, binds=(*jail.binds, "--ro-bind", "/nowhere", "/nowhere"))
    outcome = sandbox_run.run_in(broken, "print(1)")
    assert (outcome.status, outcome.stdout) == ("infra", "")
    assert "/nowhere" in outcome.detail
    outcome = sandbox_run.run_in(replace(jail, start=("/nowhere/bwrap",)), "print(1)")
    assert outcome.status == "infra"
    outcome = sandbox_run.run_in(jail, "print(1)", limits=Limits(start_seconds=0.001))
    assert outcome.status == "infra"
    assert marked(mark) == []


def test_a_sandbox_that_leaks_is_refused(mark, monkeypatch):
    jail = sandbox_run._ready[None]
    leaky = replace(jail, binds=(*jail.binds, "--ro-bind", "/etc", "/etc"))
    monkeypatch.setattr(sandbox_run, "_ready", {})
    monkeypatch.setattr(sandbox_run, "jails", lambda python: [leaky])
    with pytest.raises(SandboxUnavailable, match=r"apt-get install bubblewrap.*not contained: read/etc/passwd worked"):
        run_python("print(1)")


def test_without_bubblewrap(monkeypatch):
    monkeypatch.setattr(sandbox_run, "_ready", {})
    monkeypatch.setattr(sandbox_run, "_none", {})
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SandboxUnavailable, match="apt-get install bubblewrap"):
        run_python("print(1)")
    with pytest.warns(RuntimeWarning, match="UNSAFE: untrusted code runs WITHOUT a sandbox"):
        outcome = run_python("print(input())", "1", unsafe=True)
    assert (outcome.status, outcome.stdout, outcome.sandboxed) == ("ok", "1\n", False)
    with pytest.warns(RuntimeWarning):
        assert run_python("while True: pass", limits=SHORT, unsafe=True).status == "timeout"
