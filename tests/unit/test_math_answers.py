"""Mathematical answers: what counts as equal, where the answer is found, and that no bomb goes off."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
from slothrl_rewards import math_answers
from slothrl_rewards.math_answers import final_answer, math_answer, setup
from slothrl_rewards.math_limits import MAX_DIGITS, digits, refusal

pytest.importorskip("math_verify")
from math_verify.utils import timeout as alarm  # noqa: E402

setup()


def one(completion, answer, **options):
    options = {"timeout": 20, **options}  # other tests may keep the machine busy
    (score,) = math_answer(prompts=["?"], completions=[completion], answer=[answer], other=[1], **options)
    return score


@pytest.mark.parametrize(
    ("answer", "completion"),
    [
        ("1/2", "0.5"),
        (r"\frac{1}{2}", r"so it is \boxed{\dfrac12}"),
        ("2^{10}", "1024"),
        ("5", "x = 5"),
        (r"\{1,2\}", "2, 1"),
        ("(1,2)", "The solution is $(1, 2)$."),
        (r"3\sqrt{2}", r"\boxed{\sqrt{18}}"),
        ("x^2+2x+1", "(x+1)^2"),
        ("1234", "The answer is 1,234."),
        ("3/4", "We get\n**3/4**."),
        (r"50\%", "0.5"),
        ("x^2", "x²"),
        ("-3", "−3"),
        ("[1,3)", r"$x \in [1,3)$"),
        ("120", "5!"),
        ("2^{2n^2+3n+1}", "2^{(2n+1)(n+1)}"),
        (r"\text{Tuesday}", "Tuesday"),
        (r"We add.\n#### 1,200", "1200"),
        (r"so \boxed{7}", "<think>8</think><answer>7</answer>"),
        (7, [{"role": "assistant", "content": "I see 3 apples and 4, which makes 7 apples."}]),
    ],
)
def test_equal(answer, completion):
    assert one(completion, answer) == 1.0


@pytest.mark.parametrize(
    ("answer", "completion"),
    [("1", "2"), ("1/2", "0.51"), ("7", ""), ("7", r"\boxed{}"), ("x", r"\frac{{{"), ("(1,2)", "(2,1)"), ("7", "####")],
)
def test_not_equal(answer, completion):
    assert one(completion, answer) == 0.0


def test_no_answer_no_score():
    assert one("7", None) is None
    assert one("x", "nobody knows the answer to this question") is None
    assert one("x", "9^{9^{9}}") is None  # a bomb as the right answer
    with pytest.raises(ValueError):
        math_answer(prompts=[], completions=["1", "2"], answer=["1"])
    with pytest.raises(ValueError, match="whole seconds"):
        one("1", "1", timeout=0)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (r"\boxed{1} and then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("#### 12\nmore", "12"),
        ("<answer> $x+1$ </answer>", "x+1"),
        ("The answer is: **42**.", "42"),
        (r"Thus \(a=3\) and $b$ is $4$", "4"),
        ("It takes 3 hours and 20 minutes", "20"),
        ("1/3", "1/3"),
        ("nothing at all", None),
    ],
)
def test_where_the_answer_is(text, found):
    assert final_answer(text) == found


# What becomes of a bomb; "size" and the like: it is never parsed.
BOMBS = {
    r"\frac{9^{999999}}{7^{999999}}": "size",  # 13.7 s in math-verify 0.9.0, in spite of its limit of 5 s
    "2^{9999999999}": "size",  # 527 MB
    "{" * 3000 + "1" + "}" * 3000: "length",
    "{" * 100 + "1" + "}" * 100: "nesting",
    r"\{" + ",".join(map(str, range(5000))) + r"\}": "length",
    "1," * 100 + "1": "items",
    "9^{9^{9}}": "size",
    "9^9^9^9": "size",
    "9**9**9**9": "size",
    "(9^{9999})^{9999}": "size",
    r"\left|9^{3000}\right|^{3000}": "size",
    r"\lfloor 9^{3000} \rfloor^{3000}": "size",
    "9^{3000})^{3000}": "nesting",
    r"9^\displaystyle 999999999": "size",
    r"9^\left(9^9\right)": "size",
    "9⁹⁹⁹⁹⁹⁹⁹⁹": "size",
    "٩^{99}": "digits",
    "99999999!": "size",
    "(9^{9})!": "size",
    "((9!)!)!": "size",
    r"\binom{999999999}{499999999}": "size",
    r"\exp(\exp(\exp(99)))": "size",
    r"e^{e^{e^{99}}}": "size",
    r"\sum_{n=1}^{999999999} n^n": "size",
    r"\begin{pmatrix}1&2\\3&4\end{pmatrix}^{99999}": "size",
    r"\sum_{n=1}^{3999}\frac{1}{n^n}": None,  # these are stopped by the alarm
    "(x+y+z+w)^{200}": None,
    r"\int_0^1 \frac{e^{x^2}\sin(x^3)}{\sqrt{1+x^7}} dx": None,
    r"\(" * 25_000: None,  # and these are for the search
    r"\[" * 25_000: None,
    "answer is " * 5_000: None,
}
DEADLINE = 1  # seconds that the reward gives itself, for parsing and once more for comparing
RUN = """
import json, sys, time
from slothrl_rewards.math_answers import math_answer, setup
setup()
took = []
for bomb, reason in json.load(sys.stdin).items():
    for answer, completion in (("x^2+1", bomb), (bomb, "\\\\boxed{x^2+1}"))[: 2 if reason else 1]:
        start = time.monotonic()
        score = math_answer(prompts=["?"], completions=[completion], answer=[answer], timeout=1)[0]
        took.append([bomb[:40], score, time.monotonic() - start])
# Not ru_maxrss, which starts from the parent's.
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps([took, int(peak.split()[1]) // 1024]))
"""


@pytest.mark.parametrize(("bomb", "reason"), BOMBS.items(), ids=lambda value: str(value)[:20])
def test_bombs_are_refused(bomb, reason):
    if reason is not None:
        found = final_answer(rf"\boxed{{{bomb}}}") if "{" * 99 not in bomb and ")^" not in bomb else bomb
        assert refusal((found or bomb).replace("**", "^")) == reason


def test_bombs_are_over_in_time():
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    found = subprocess.run(
        [sys.executable, "-c", RUN], input=json.dumps(BOMBS), env=env, capture_output=True, text=True, timeout=60
    )
    assert found.returncode == 0, found.stderr[-2000:]
    took, megabytes = json.loads(found.stdout)
    assert not [entry for entry in took if entry[2] > 2 * DEADLINE + 1]
    assert not [entry for entry in took if entry[1] == 1.0]
    assert megabytes < 600


def test_sizes_bound_what_evaluation_gives():
    for latex, value in {"9^{99}": 9**99, "2^{2^{10}}": 2**1024, "(3^{5})^{7}": 3**35, "12!": 479001600}.items():
        assert digits(latex) >= len(str(value)) - 1
    for harmless in (
        r"2^{2023}",
        r"e^{x^2}",
        r"\frac{x^{10}+1}{x-1}",
        "2^{2^{5}}",
        r"\sqrt[3]{2}",
        "1,2,3,4",
        r"\binom{20}{10}",
        "10!",
    ):
        assert refusal(harmless) is None and digits(harmless) < MAX_DIGITS


def test_counts_are_logged(monkeypatch):
    """A comparison that never ends, whatever the machine's speed, ended by math-verify's own alarm."""

    def endless(gold, found, limit):
        return alarm(limit)(lambda: time.sleep(30))()

    monkeypatch.setattr(math_answers, "_equal", endless)
    metrics = {}
    math_answer(
        prompts=["?"] * 3,
        completions=["9^{9^{9}}", "x+y", "x"],
        answer=["x"] * 3,
        timeout=1,
        log_metric=metrics.__setitem__,
    )
    assert metrics == {"math_answer/refused": 1.0, "math_answer/timeouts": 1.0}


def test_beside_the_main_thread():
    scores = []
    thread = threading.Thread(target=lambda: scores.append(one(r"\sqrt{18}", r"3\sqrt{2}")))
    thread.start()
    thread.join()
    assert scores == [1.0]  # an alarm would have been an error


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(ImportError, match=r"pip install 'slothrl\[math\]'"):
        one("1", "1")


def test_a_right_answer_that_took_too_long_once_is_tried_again(monkeypatch):
    """On a busy machine the clock may strike early; the problem must not be lost for the rest of the run."""
    real, calls = math_answers._parsed, []

    def late(answer, limit):
        calls.append(answer)
        if len(calls) == 1:
            raise math_answers._math_verify().errors.TimeoutException
        return real(answer, limit)

    monkeypatch.setattr(math_answers, "_parsed", late)
    gold, metrics = r"\frac{1}{2} + x^{17}", {}
    given = {"prompts": ["?"] * 3, "completions": ["x^{17} + 0.5", f"${gold}$", "x"], "answer": [gold] * 3}
    assert math_answer(**given, log_metric=metrics.__setitem__) == [None, 1.0, None]  # the same text needs no algebra
    assert len(calls) == 1 and metrics["math_answer/timeouts"] == 1
    assert math_answer(**given) == [1.0, 1.0, 0.0]
