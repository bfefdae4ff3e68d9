"""Code against its tests: right and wrong programs of all three kinds of tests, and programs that cheat."""

import json
import shutil
import time

import pytest
from slothrl_rewards.code import code_tests, extract_code, judge
from slothrl_rewards.sandbox import Limits, Outcome, SandboxUnavailable
from slothrl_rewards.sandbox.asserts import Unseparable, parse_asserts

needs_bwrap = pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")

DOUBLE = [{"args": [3], "expected": 6}, {"args": ["ab"], "expected": "abab"}]
SUMS = [{"input": "1 2\n", "output": "3\n"}, {"input": "5 5", "output": "10"}]


def fenced(code: str) -> str:
    return f"Some thoughts.\n```python\n{code}\n```\nDone."


def score(code, tests, entry_point=None, **options):
    (found,) = code_tests(["?"], [fenced(code)], tests=[tests], entry_point=entry_point, **options)
    return found


@pytest.mark.parametrize(
    ("text", "code"),
    [
        ("a = 1", "a = 1"),
        ("```python\na\n```\nthen\n```python\nb\n```", "b\n"),
        ("```python\na\n```\n```json\n{}\n```\n```\noutput\n```", "a\n"),
        ("```\na\n```", "a\n"),
        ("```py\ncut off", "cut off"),
        ("```Python3\na\n```", "a\n"),
        ("```python\r\na\r\n```\r\nDone.", "a\r\n"),
        ("```python\ns = '```'\nb\n```", "s = '```'\nb\n"),
        ("", ""),
    ],
)
def test_extract_code(text, code):
    assert extract_code(text) == code


@needs_bwrap
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("def f(x): return x * 2", 1.0),
        ("def f(x): return x * 2 if x == 3 else 0", 0.5),
        ("def f(x): return 7", 0.0),
        ("def g(x): return x * 2", 0.0),
        ("def f(x) return", 0.0),
        ("print('noise' * 300000)\ndef f(x):\n    print('more' * 300000)\n    return x * 2", 1.0),
        ("import sys\ndef f(x):\n    if x == 3: sys.exit(0)\n    return x * 2", 0.5),
        ("import os\ndef f(x):\n    if x == 'ab': os._exit(0)\n    return x * 2", 0.5),
        ("def f(x): return x * 2\nif __name__ == '__main__': 1 / 0", 1.0),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int\ndef f(x): return A(x).x * 2", 1.0),
    ],
)
def test_functions(code, expected):
    assert score(code, DOUBLE, "f") == expected
    assert score(code, DOUBLE, "f", partial=False) == float(expected == 1.0)


@needs_bwrap
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print(sum(map(int, input().split())))", 1.0),
        ("import sys\na, b = map(int, sys.stdin.read().split())\nsys.stdout.write(f'{a + b}')\nexit(0)", 1.0),
        ("import os\nprint(sum(map(int, os.read(0, os.fstat(0).st_size).split())))", 1.0),
        ("print(sum(map(int, open(0).read().split())))\nquit()", 1.0),
        ("import sys, threading\ndef main(): print(sum(map(int, input().split())))\n"
         "threading.stack_size(1 << 26)\nthreading.Thread(target=main).start()", 1.0),
        ("import sys, io, os, atexit\nout = sys.stdout = io.StringIO()\n"
         "atexit.register(lambda: os.write(1, out.getvalue().encode()))\nprint(sum(map(int, input().split())))", 1.0),
        ("a, b = map(int, input().split())\nprint(3)", 0.5),
        ("print(sum(map(int, input().split())))\nraise ValueError", 0.0),
        ("print(sum(map(int, input().split())))\nimport sys\nsys.stdout.close()", 1.0),
        ("import os\nprint(sum(map(int, input().split())), flush=True)\nos._exit(0)", 0.5),
        ("import os\nprint(sum(map(int, input().split())), flush=True)\nos._exit(1)", 0.0),
        ("import os\nos.closerange(0, 99)\nprint(3)", 0.0),
        ("", 0.0),
    ],
)  # fmt: skip
def test_stdin_and_stdout(code, expected):
    assert score(code, SUMS) == expected


@needs_bwrap
def test_long_inputs_and_outputs():
    text = "é" * 1_000_000
    assert score("print(input())", [{"input": text, "output": text}]) == 1.0


@needs_bwrap
@pytest.mark.parametrize(
    ("code", "test", "expected"),
    [
        ("def f(a, b): return (a, b)", "assert f(1, 2) == (1, 2)", 1.0),
        ("def f(a, b): return [a, b]", "assert f(1, 2) == (1, 2)", 0.0),
        ("def f(a, b): return [b, a]", ["assert set(f(1, 2)) == set([1, 2])", "assert f(1, 2) == [1, 2], 'no'"], 0.5),
        ("def f(x): return x / 3", "import math\nassert math.isclose(f(1), 0.3333333333, rel_tol=1e-6)", 1.0),
        ("def f(x): return x / 3", "assert abs(f(1) - 0.333) < 10**-6", 0.0),
        ("def f(x): return x > 2", ["assert f(3)", "assert not f(1)", "assert f(3) is True"], 1.0),
        ("class P:\n    def __init__(self, a): self.a = a\ndef f(ps): return sum(p.a for p in ps)",
         "assert f([P(1), P(2)]) == 3", 1.0),
        ("class Solution:\n    def twice(self, x): return x * 2", "assert Solution().twice(4) == 8", 1.0),
        ("def f(x): return {1: {2, 3}, 'k': None}", "assert f(0) == {1: {3, 2}, 'k': None}", 1.0),
        ("def f(x): return 10 ** 50, b'x', 1j", "assert f(0) == (10 ** 50, b'x', 1j)", 1.0),
        # What MBPP has: only the truth of a match object counts, containers of other types, computed expectations.
        ("import re\ndef f(x): return re.search('b', x)", ["assert f('abc')", "assert not f('a')"], 1.0),
        ("import re\ndef f(x): return re.search('b', x)", ["assert f('abc') and f('b')", "assert f('b') == True"], 0.5),
        ("bool = 0\ndef f(x): return None", ["assert f(1)", "assert not f(1)"], 0.5),
        ("from collections import Counter as f", "assert f('aab') == {'a': 2, 'b': 1}", 1.0),
        ("from collections import namedtuple\nf = namedtuple('P', 'x y')", "assert f(1, y=[2]) == (1, [2])", 1.0),
        ("def f(x): return 'ab' * x, (-2 + 3j), 7 // 2", "assert f(2) == ('ab' * 2, (-2 + 3j), 7 // 2)", 1.0),
        ("def f(x): return type(x).__name__", ["assert f((1, 2)) == 'tuple'", "assert f({1}) == 'set'"], 1.0),
    ],
)  # fmt: skip
def test_asserts(code, test, expected):
    assert score(code, test) == expected


@needs_bwrap
def test_humaneval_form():
    test = (
        "\n\nMETADATA = {'author': 'x'}\n\n\ndef check(candidate):\n    '''doc'''\n    assert candidate([1, 2]) == 3\n"
        "    assert candidate([]) == 0, 'empty'\n    assert True, 'easy to check'\n\ncheck(total)\n"
    )
    assert score("def total(xs): return sum(xs)", test, "total") == 1.0
    assert score("def total(xs): return 3", test, "total") == 0.5


@pytest.mark.parametrize(
    "test",
    [
        "for i in range(3): assert f(i) == i",
        "def check(candidate):\n    x = candidate(1)\n    assert x == 1",
        "assert [f(i) for i in range(3)] == [0, 1, 2]",
        "assert f(g(1) == 1)",
        "assert (lambda: f(1))() == 1",
        "assert f(1) == expected",
        "assert f(1) == ",
        "assert f(1) == 'a' * 10 ** 9",
        "assert f(1) == len(3)",
        "import os\nos.system('true')",
    ],
)
def test_what_cannot_be_separated_is_refused(test):
    with pytest.raises(Unseparable, match="a test"):
        code_tests(["?"], ["x"], tests=[test], unsafe=False)
    assert code_tests(["?"], ["x"], tests=[test], unseparable="skip") == [None]


def test_nothing_of_the_expected_values_goes_in():
    (check,) = parse_asserts("assert candidate([3]) == 4711", "f")
    assert check.calls == ("f([3])",)
    assert (check.holds([4711]), check.holds([4712])) == (True, False)
    with pytest.raises(Unseparable, match="calls same where f is expected"):
        parse_asserts("assert same(f(1), 4711)", "f")


CHEATS = {
    "lying eq": (
        "class Liar(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\n"
        "def f(x): return Liar()"
    ),
    "lying list": (
        "class Liar(list):\n    def __eq__(self, other): return True\n    def __iter__(self): return iter([self])\n"
        "    __len__ = lambda self: 2\ndef f(x): return Liar()"
    ),
    "lying class": "class Any:\n    def __eq__(self, other): return True\n    __class__ = int\ndef f(x): return Any()",
    "overwritten builtins": (
        "import builtins\nbuiltins.type = lambda x: int\nbuiltins.print = None\ndef f(x): return object()"
    ),
    "overwritten driver": (
        "import sys\ng = sys._getframe(1).f_globals\ng['encode'] = lambda *a: 'true'\ndef f(x): return 1"
    ),
    "printed frames": (
        "import sys, os\ng = sys._getframe(1).f_globals\nfor text in ('true', '{\"passed\": true}', 'ok'):\n"
        "    os.write(g['OUT'], g['FRAME'] + text.encode())\nos._exit(0)"
    ),
    "exit 0": "import os\nos._exit(0)",
    "sys.exit 0": "import sys\nsys.exit(0)",
    "looks for the answer": (
        "import sys, gc\ng = sys._getframe(1).f_globals\n"
        "found = [x for x in gc.get_objects() if '4711' in repr(x)[:9999]]\n"
        "def f(x): return 4711 if '4711' in repr(g) + str(sys.argv) + str(found[1:]) + open('program.py').read() else 0"
    ),
    "nan": "def f(x): return float('nan')",
    "inf": "def f(x): return float('inf')",
    "huge integer": "def f(x): return 1 << 10 ** 7",
    "deep list": "def f(x):\n    r = []\n    for _ in range(100000): r = [r]\n    return r",
    "endless list": "def f(x):\n    r = []\n    r.append(r)\n    return r",
    "colliding set": "def f(x): return {n * (2 ** 61 - 1) for n in range(3000)}",
    "raw deep json": (
        "import sys, os\ng = sys._getframe(1).f_globals\nos.write(g['OUT'], g['FRAME'] + b'[' * 500000)\n"
        "os._exit(0)"
    ),
    "raw digits": (
        "import sys, os\ng = sys._getframe(1).f_globals\nos.write(g['OUT'], g['FRAME'] + b'9' * 500000)\n"
        "os._exit(0)"
    ),
    "raw hex": (
        "import sys, os\ng = sys._getframe(1).f_globals\n"
        "os.write(g['OUT'], g['FRAME'] + b'{\"int\": \"' + b'f' * 900000 + b'\"}')\nos._exit(0)"
    ),
    "raw constants": (
        "import sys, os\ng = sys._getframe(1).f_globals\nos.write(g['OUT'], g['FRAME'] + b'NaN')\nos._exit(0)"
    ),
    "not text": (
        "import sys, os\ng = sys._getframe(1).f_globals\nos.write(g['OUT'], g['FRAME'] + b'\\xff\\x00')\n"
        "os._exit(0)"
    ),
    "surrogate": "def f(x): return '\\ud800'",
    "generator": "def f(x): return (n for n in range(3))",
    "recursion": "def f(x): return f(x)",
    "module": (
        "import sys\nclass M:\n    def __getattr__(self, name): return lambda *a: True\n"
        "sys.modules['json'] = M()\ndef f(x): return M()"
    ),
}  # fmt: skip


@needs_bwrap
@pytest.mark.parametrize("name", CHEATS)
def test_cheats_score_nothing(name):
    tests = [{"args": [1], "expected": 4711}, {"args": [2], "expected": [4711, {"a": 1.5}]}]
    assert score(CHEATS[name], tests, "f", seconds=3) == 0.0
    assert score(CHEATS[name], ["assert f(1) == 4711", "assert f(2) == [4711]"], seconds=3) == 0.0


@needs_bwrap
def test_statuses_and_logs(monkeypatch):
    codes = ["def f(x): return x * 2", "def f(x): return 0", "while True: pass", "1 / 0", "def f(x): return x * 2"]
    logged, extra = {}, {}
    tests = [*([DOUBLE] * 4), None]
    found = code_tests(
        ["?"] * 5, [[{"role": "assistant", "content": fenced(code)}] for code in codes], tests=tests, entry_point="f",
        seconds=3, log_metric=logged.__setitem__, log_extra=extra.__setitem__,
    )  # fmt: skip
    assert found == [1.0, 0.0, 0.0, 0.0, None]
    assert extra["code_status"] == ["ok", "wrong", "timeout", "crash", None]
    assert logged == {f"code/{name}": 0.25 for name in ("ok", "wrong", "timeout", "crash")} | {"code/infra": 0.0}
    monkeypatch.setattr("slothrl_rewards.code.run_python", lambda *a, **k: Outcome("infra", detail="no bwrap today"))
    with pytest.raises(SandboxUnavailable, match="each of 2 sandboxes failed: no bwrap today"):
        code_tests(["?"] * 2, codes[:2], tests=[DOUBLE] * 2, entry_point="f")
    fates = iter([Outcome("infra", detail="no bwrap today"), Outcome("crash", detail="exit code 1")])
    monkeypatch.setattr("slothrl_rewards.code.run_python", lambda *a, **k: next(fates))
    with pytest.warns(RuntimeWarning, match="1 of 2 sandboxes failed, their samples are masked: no bwrap today"):
        assert code_tests(["?"] * 2, codes[:2], tests=[DOUBLE] * 2, entry_point="f", workers=1) == [None, 0.0]


@needs_bwrap
def test_right_output_does_not_excuse_a_hang():
    verdict = judge("print(3, flush=True)\nwhile True: pass", SUMS, limits=Limits(seconds=0.5))
    assert (verdict.status, verdict.passed) == ("timeout", (False, False))


@needs_bwrap
def test_the_least_memory_runs_python():
    assert score("def f(x): return x * 2", DOUBLE, "f", memory_mb=64) == 1.0


@needs_bwrap
def test_colliding_integers_do_not_hold_the_judge_up():
    code = "def f(): return [n * (2 ** 61 - 1) for n in range(25000)]"
    begun = time.monotonic()
    assert score(code, ["assert set(f()) == {1}", "assert len(dict(f())) == 1"]) == 0.0
    assert time.monotonic() - begun < 3


@needs_bwrap
def test_forms_of_tests():
    code = "def f(x, y=0): return x * 2 + y"
    tests = [json.dumps(DOUBLE[:1]), "assert f(1) == 2", [{"args": [1], "kwargs": {"y": 5}, "expected": 7}], [], "[]"]
    found = code_tests(["?"] * 5, [code] * 5, tests=tests, entry_point=["f", None, "f", "f", "f"])
    assert found == [1.0, 1.0, 1.0, None, None]
    for wrong, message in (([{"in": 1}], "tests are"), (DOUBLE, "need an entry_point"), ([3], "tests are")):
        with pytest.raises(ValueError, match=message):
            code_tests(["?"], [code], tests=[wrong])
    with pytest.raises(ValueError, match="plain built-in values"):
        code_tests(["?"], [code], tests=[[{"args": [object()], "expected": 1}]], entry_point="f")
    with pytest.raises(ValueError, match="zip"):
        code_tests(["?"] * 2, [code] * 2, tests=[DOUBLE], entry_point="f")
    with pytest.raises(ValueError, match="unseparable"):
        code_tests([], [], tests=[], unseparable="maybe")
    assert code_tests([], [], tests=[]) == []
