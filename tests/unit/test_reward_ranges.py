"""Numbers out of range in reward.*: refused by name, all together, before a model loads."""

import pytest

from slothrl.config import RewardConfig
from slothrl.errors import ConfigError
from slothrl.rewards import load_rewards, self_test
from tests.unit.refusals import refused

LIMITS = {
    "reward.timeout": ("must be over 0", ["0", "-1", "inf", "nan"]),
    "reward.memory_gb": ("must be over 0", ["0", "-0.5", "inf", "nan"]),
    "reward.workers": ("must be at least 1", ["0", "-3"]),
    "reward.max_failure_rate": ("must be in [0, 1]", ["-0.1", "1.01", "inf", "nan"]),
    "reward.weights": ("is no finite number", ["[nan]", "[inf]", "[-inf]"]),
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, (_, values) in LIMITS.items() for value in values])
def test_out_of_range(key, value):
    (line,) = refused(f"{key}={value}")
    assert line.startswith(f"{key}={value}")
    assert LIMITS[key][0] in line


@pytest.mark.parametrize(
    ("override", "kind"), [("reward.workers=1.5", "Integer"), ("reward.timeout=soon", "Float"),
                           ("reward.memory_gb=4g", "Float"), ("reward.weights=[much]", "Float")]
)  # fmt: skip
def test_no_number(override, kind):
    (line,) = refused(override)
    assert line.startswith(override.partition("=")[0]) and f"could not be converted to {kind}" in line


def test_all_together_and_the_bounds_themselves_are_fine():
    wrong = ["reward.timeout=0", "reward.memory_gb=-1", "reward.workers=0", "reward.max_failure_rate=2"]
    lines = refused(*wrong, "reward.weights=[nan]", "reward.on_failure=ignore")
    keys = {line.partition("=")[0] for line in lines}
    assert keys == {f"reward.{name}" for name in ("timeout", "memory_gb", "workers", "max_failure_rate", "weights")} | {
        "reward.on_failure"
    }
    from slothrl.compose import compose_config

    config = compose_config(["reward.max_failure_rate=0", "reward.weights=[-1.5]", "reward.timeout=0.1", "gpu=cpu"])
    assert (config.reward.max_failure_rate, config.reward.weights) == (0, [-1.5])
    assert compose_config(["reward.max_failure_rate=1", "reward.workers=1", "gpu=cpu"]).reward.workers == 1


# --- parameters of the built-in functions: the trial before the model loads finds them -------------------------------

ROWS = [{"prompt": "1 + 1", "answer": "2", "tests": '["assert f(1) == 2"]'}]
PARAMETERS = {
    "number_match": {"tolerance": [-1e-9, float("nan"), float("inf")]},
    "length_penalty": {"max_length": [-1, 10], "soft": [-1, 300]},
    "repetition_penalty": {"ngram": [0, -2, 1.5], "max_penalty": [0.1, -1.5, float("nan")]},
    "math_answer": {"timeout": [0, -1, 1.5]},
    "code_tests": {
        "seconds": [0, -1, float("nan"), float("inf")], "memory_mb": [0, -1, 63], "workers": [0, -1],
        "tolerance": [-1e-9, float("nan"), float("inf")],
    },
    "llm_judge": {
        "timeout": [0, float("nan"), float("inf")], "retries": [-1], "backoff": [-1, float("inf")],
        "concurrency": [0], "max_tokens": [0], "temperature": [-0.1], "lowest": [10, float("-inf")],
        "highest": [0, float("nan"), float("inf")],
    },
}  # fmt: skip
CASES = [(name, key, value) for name, keys in PARAMETERS.items() for key, values in keys.items() for value in values]


@pytest.mark.parametrize(("name", "key", "value"), CASES)
def test_parameters_out_of_range(name, key, value):
    params = {name: {**({"model": "m"} if name == "llm_judge" else {}), key: value}}
    rewards = load_rewards(RewardConfig(functions=[name], params=params))
    with pytest.raises(ConfigError, match=rf"reward {name} raised ValueError: .*{key}"):
        self_test(rewards, ROWS)


def test_parameters_of_several_functions_together():
    params = {"number_match": {"tolerance": -1}, "repetition_penalty": {"ngram": 0}, "length_penalty": {"soft": -1}}
    rewards = load_rewards(RewardConfig(functions=list(params), params=params))
    with pytest.raises(ConfigError) as caught:
        self_test(rewards, ROWS)
    assert [line.split(" ")[1] for line in caught.value.problems] == list(params)
