"""A loaded reward: how it is called, what it may return, and the trial before the model loads."""

import asyncio
import functools
import inspect
import sys
from fractions import Fraction

import pytest

from slothrl.config import RewardConfig
from slothrl.errors import ConfigError, UserError
from slothrl.rewards import AsyncReward, Reward, load_rewards, self_test

GOOD = """
async def slow(prompts, completions, **kwargs):
    return [0.5 for _ in completions]

def short(prompts, completions, limit=3):
    return [float(len(text) <= limit) for text in completions]
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my.py").write_text(GOOD)
    return tmp_path


def call(function, *completions, **columns):
    return Reward(function, name="my_fn")(prompts=["?"] * len(completions), completions=list(completions), **columns)


class Odd:
    def __float__(self):
        raise RuntimeError


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        ([1.0], "returned 1 scores for 2 completions"),
        ([1, 2, 3], "returned 3 scores for 2 completions"),
        (None, "returned a NoneType (None) where a list of scores is expected"),
        (1.0, "returned a float (1.0) where a list of scores is expected"),
        ("ab", "returned a str ('ab') where a list of scores is expected"),
        ({1: 2, 3: 4}, "returned a dict ({1: 2, 3: 4}) where a list of scores is expected"),
        ([1, "good"], "returned a str ('good') where a number or None is expected (completion 2)"),
        (["1", 1], "returned a str ('1') where a number or None is expected (completion 1)"),
        ([1, [1]], "returned a list ([1]) where a number or None is expected (completion 2)"),
        ([1, 1j], "returned a complex (1j) where a number or None is expected (completion 2)"),
        ([float("inf"), 1], "returned inf where a finite number is expected (completion 1)"),
        ([1, -1e39], "returned -1e+39 where a finite number is expected (completion 2)"),
        ([1, 10**6000], "returned inf where a finite number is expected (completion 2)"),
    ],
)
def test_wrong_results(returned, expected):
    with pytest.raises(UserError) as caught:
        call(lambda prompts, completions, **kwargs: returned, "a", "b")
    assert str(caught.value) == f"reward my_fn {expected}"
    with pytest.raises(UserError, match=r"\(completion 1\)"):
        call(lambda **kwargs: [Odd()], "a")


def test_right_results():
    np, torch = pytest.importorskip("numpy"), pytest.importorskip("torch")
    for returned, expected in [
        ([True, None, 2, float("nan"), Fraction(1, 2)], [1.0, None, 2.0, None, 0.5]),
        ((np.float32(0.5), np.bool_(True), np.int64(3), torch.tensor(2.0), torch.tensor([4])), [0.5, 1, 3, 2, 4]),
        (np.array([1, 2, 3, 4, np.nan]), [1.0, 2.0, 3.0, 4.0, None]),
        (torch.arange(5.0, requires_grad=True), [0.0, 1.0, 2.0, 3.0, 4.0]),
    ]:
        scores = call(lambda returned=returned, **kwargs: returned, *"abcde")
        assert scores == expected
        assert all(score is None or type(score) is float for score in scores)


def test_raising_functions(folder):
    (folder / "my.py").write_text(
        "import json\ndef f(prompts, completions, **kwargs):\n    return [1 / 0]\n"
        "def g(prompts, completions, **kwargs):\n    return json.loads('')\n"
        "def h(prompts, completions, answer, **kwargs):\n    return [1]\n"
        "async def k(prompts, completions, **kwargs):\n    raise KeyError('x')\n"
        "def positional(prompts, completions, /, **kwargs):\n    return [1]\n"
    )
    names = [f"my.py:{name}" for name in ("f", "g", "h", "k", "positional")]
    f, g, h, k, p = load_rewards(RewardConfig(functions=names), folder)
    with pytest.raises(UserError) as caught:
        f(["?"], ["a"])
    assert str(caught.value) == "reward f raised ZeroDivisionError: division by zero (my.py, line 3)"
    assert isinstance(caught.value.__cause__, ZeroDivisionError)
    with pytest.raises(UserError, match=r"reward g raised JSONDecodeError: .* \(my.py, line 5\)"):
        g(["?"], ["a"])
    with pytest.raises(UserError, match=r"^reward h needs answer: neither a dataset column nor in reward.params.h;"):
        h(["?"], ["a"], target=[1])
    with pytest.raises(UserError, match=r"reward k raised KeyError: 'x' \(my.py, line 9\)"):
        asyncio.run(k(["?"], ["a"]))
    with pytest.raises(UserError, match=r"reward positional raised TypeError: .* \(my.py, line 10\)"):
        p(["?"], ["a"])


def test_async(folder):
    class Judge:
        async def __call__(self, prompts, completions, **kwargs):
            return ["no"]

    (slow,) = load_rewards(RewardConfig(functions=["my.py:slow"], weights=[3.0]), folder)
    assert isinstance(slow, AsyncReward) and (slow.name, slow.weight) == ("slow", 3.0)
    assert asyncio.run(slow(prompts=["?"] * 2, completions=["a", "b"])) == [0.5, 0.5]
    assert isinstance(Reward(functools.partial(slow.function, x=1), name="x"), AsyncReward)
    with pytest.raises(UserError, match="reward Judge returned a str"):
        asyncio.run(Reward(Judge())(["?"], ["a"]))
    assert inspect.iscoroutinefunction(slow.__call__)
    assert inspect.iscoroutinefunction(slow) or sys.version_info < (3, 12)


def test_trl_takes_them(folder):
    utils = pytest.importorskip("trl.trainer.utils")
    short, slow = load_rewards(RewardConfig(functions=["my.py:short", "my.py:slow"]), folder)
    assert [utils.get_callable_name(reward) for reward in (short, slow)] == ["short", "slow"]
    assert [utils.is_async_callable(reward) for reward in (short, slow)] == [False, True]


def test_self_test():
    seen = []

    def watch(prompts, completions, **kwargs):
        kwargs["log_metric"]("x", 1.0)
        kwargs["log_extra"]("x", ["a"])
        columns = (kwargs["completion_ids"], kwargs["answer"], kwargs["trainer_state"].global_step)
        seen.append((prompts, completions, *columns))
        return [None] * len(completions)

    async def wrong_length(prompts, completions, **kwargs):
        return [1.0]

    def fails_on_empty(completions, **kwargs):
        return [float(text[0] == "4") for text in completions]

    rows = [{"prompt": f"{n} + 1", "answer": n + 1} for n in range(5)]
    self_test([Reward(watch)], rows)
    prompts, completions, ids, answers, step = seen[0]
    assert len(prompts) == len(completions) == len(ids) == 8
    assert (prompts[:2], completions[:4], answers[:2], step) == (["0 + 1"] * 2, ["1", "", "2", ""], [1, 1], 0)
    assert all(isinstance(token, int) for row in ids for token in row) and all(ids)
    self_test([Reward(watch)], [{"prompt": [{"role": "user", "content": "?"}], "answer": "a"}])
    assert seen[1][1] == [[{"role": "assistant", "content": text}] for text in ("a", "")]
    with pytest.raises(ConfigError) as caught:
        self_test([Reward(watch), Reward(wrong_length), Reward(fails_on_empty)], rows)
    assert caught.value.problems[0] == "reward wrong_length returned 1 scores for 8 completions"
    assert caught.value.problems[1].startswith("reward fails_on_empty raised IndexError: string index out of range (")
    assert len(caught.value.problems) == 2
    self_test([Reward(wrong_length)], [])
    self_test(load_rewards(RewardConfig(functions=["arithmetic", "exact_match", "length_penalty"])), rows)
    with pytest.raises(ConfigError, match=r"regex_format raised ValueError: .*\+reward.params.regex_format.pattern="):
        self_test(load_rewards(RewardConfig(functions=["regex_format"])), rows)
    with pytest.raises(ConfigError, match="reward countdown needs numbers, target"):
        self_test(load_rewards(RewardConfig(functions=["countdown"])), rows)


def test_self_test_inside_a_running_loop(folder):
    async def notebook():
        self_test(load_rewards(RewardConfig(functions=["my.py:slow"]), folder), [{"prompt": "?"}])

    asyncio.run(notebook())
