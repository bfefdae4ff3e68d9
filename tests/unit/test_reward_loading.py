"""Names become checked callables, and every mistake becomes one clear line."""

import importlib
import os
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from slothrl.config import RewardConfig
from slothrl.errors import ConfigError
from slothrl.reward_sources import BUILTIN, GROUP
from slothrl.rewards import load_rewards, load_score, static_reward_problems

ROOT = Path(__file__).parents[2]

GOOD = """
async def slow(prompts, completions, **kwargs):
    return [0.5 for _ in completions]

def short(prompts, completions, limit=3):
    return [float(len(text) <= limit) for text in completions]

def _helper(): pass
VALUE = 3
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "my.py").write_text(GOOD)
    return tmp_path


def problems_of(folder, *functions, **fields):
    with pytest.raises(ConfigError) as caught:
        load_rewards(RewardConfig(functions=list(functions), **fields), folder)
    assert all("\n" not in problem for problem in caught.value.problems)
    return caught.value.problems


def problem_of(folder, function, **fields):
    (problem,) = problems_of(folder, function, **fields)
    return problem


def static(folder, *functions, **fields):
    return static_reward_problems(RewardConfig(functions=list(functions), **fields), folder)


def test_imports_no_torch():
    code = "import sys, slothrl.rewards; print(sorted({'torch', 'trl', 'transformers'} & set(sys.modules)))"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "[]"


def test_builtins_are_the_entry_points_of_pyproject():
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"][GROUP]
    assert points == {name: f"slothrl_rewards.{module}:{name}" for name, module in BUILTIN.items()}
    rewards = load_rewards(RewardConfig(functions=list(BUILTIN)))
    assert [reward.name for reward in rewards] == list(BUILTIN)
    assert rewards[0].source == "entry point exact_match"


def test_presets_load():
    from omegaconf import OmegaConf

    for path in (ROOT / "conf" / "reward").glob("*.yaml"):
        config = OmegaConf.merge(OmegaConf.structured(RewardConfig), OmegaConf.load(path))
        for reward_config in (config, OmegaConf.to_object(config)):
            rewards = load_rewards(reward_config)
            assert static_reward_problems(reward_config) == []
            assert (load_score(reward_config, rewards) is None) == (path.stem in ("none", "custom"))


def test_file_module_and_weights(folder, monkeypatch):
    (folder / "reward_package").mkdir()
    (folder / "reward_package" / "inner.py").write_text(GOOD.replace("short", "brief"))
    monkeypatch.syspath_prepend(folder)
    functions = ["./my.py:short", "reward_package.inner:brief", f"{folder}/my.py:slow"]
    config = RewardConfig(functions=functions, weights=[1, 0.5, 2], params={"short": {"limit": 1}})
    short, brief, slow = load_rewards(config, folder)
    assert (short.name, short.__name__, short.weight, brief.weight) == ("short", "short", 1, 0.5)
    assert short(["?", "?"], ["ab", "a"], answer=[1, 2], trainer_state=None) == [0.0, 1.0]
    assert brief(prompts=["?"], completions=["ab"]) == [1.0]
    assert short.source.startswith("./my.py:short sha256 ") and len(short.source.split()[-1]) == 12
    assert "sha256" in brief.source
    assert short.function.__module__ == slow.function.__module__ and short.function.__module__ in sys.modules
    assert static_reward_problems(config, folder) == []
    assert not (folder / "__pycache__").exists()


def test_an_edited_file_is_loaded_anew(folder):
    (before,) = load_rewards(RewardConfig(functions=["my.py:short"]), folder)
    (folder / "my.py").write_text(GOOD.replace("limit=3", "limit=9"))  # same size, within the same second
    (after,) = load_rewards(RewardConfig(functions=["my.py:short"]), folder)
    assert before(["?"], ["12345"]) == [0.0] and after(["?"], ["12345"]) == [1.0]
    assert before.source != after.source


def third_party(folder, monkeypatch, distribution, lines):
    info = folder / f"{distribution}-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("[slothrl.rewards]\n" + "\n".join(lines))
    monkeypatch.syspath_prepend(folder)
    importlib.invalidate_caches()


def test_entry_point_of_another_distribution(folder, monkeypatch):
    (folder / "third_party_rewards.py").write_text(GOOD)
    lines = ["brevity = third_party_rewards:short", "gone = third_party_rewards:gone", "lost = third_party_lost:f"]
    third_party(folder, monkeypatch, "acme", lines)
    config = RewardConfig(functions=["brevity"], params={"brevity": {"limit": 1}})
    (reward,) = load_rewards(config, folder)
    assert (reward.name, reward.source) == ("brevity", "entry point brevity (acme 1.2)")
    assert reward(["?"], ["ab"]) == [0.0]
    assert static_reward_problems(config, folder) == []
    assert "has no 'gone'" in problem_of(folder, "gone")
    assert "there is no module 'third_party_lost'" in problem_of(folder, "lost")
    third_party(folder, monkeypatch, "zeta", ["brevity = zeta:f"])
    expected = "'brevity' is offered more than once; name one: third_party_rewards:short, zeta:f"
    assert expected in problem_of(folder, "brevity")
    assert expected in static(folder, "brevity")[0]


def test_unknown_name(folder):
    for problem in (problem_of(folder, "gsm8"), *static(folder, "gsm8")):
        assert problem.startswith("unknown reward function 'gsm8'; did you mean gsm8k?; there are arithmetic, ")
        assert "./file.py:function" in problem


@pytest.mark.parametrize("text", ["", "a/b", "my.py:", "my.py:a.b", "1x.y:f", "my.txt/x:f", "pkg.mod:f()", ":f"])
def test_malformed(folder, text):
    for problem in (problem_of(folder, text), *static(folder, text)):
        assert problem == (f"reward function {text!r} is neither an entry point's name nor "
                           "pkg.mod:function or ./file.py:function")  # fmt: skip


def test_file_without_function_name(folder):
    for problem in (problem_of(folder, "./my.py"), *static(folder, "./my.py")):
        assert problem.endswith("(the function's name is missing: ./my.py:my_function)")


def test_missing_things(folder):
    install = "install it, put its folder on PYTHONPATH, or name the file: ./file.py:function"
    cases = {
        "./no.py:f": f"reward function './no.py:f': there is no file {folder}/no.py",
        "./no/no.py:f": f"reward function './no/no.py:f': there is no file {folder}/no/no.py (nor its folder)",
        "no_such_package.mod:f": "reward function 'no_such_package.mod:f': there is no module "
        f"'no_such_package'; {install}",
        "./my.py:shrot": "reward function './my.py:shrot': my.py has no 'shrot'; did you mean short?",
    }
    for text, expected in cases.items():
        assert problem_of(folder, text) == expected
        assert static(folder, text) == [expected]
    assert problem_of(folder, "./my.py:zzz").endswith("my.py has no 'zzz' (it has short, slow)")
    assert problem_of(folder, "slothrl.errors:zzz").partition(" (it")[0].endswith(": slothrl.errors has no 'zzz'")
    assert "there is no module 'slothrl.nothing'" in problem_of(folder, "slothrl.nothing:f")


def test_not_a_function(folder):
    (folder / "my.py").write_text(GOOD + "class Judge:\n    def __call__(self, prompts, completions): return [1]\n"
                                  "judge = Judge()\n")  # fmt: skip
    assert problem_of(folder, "./my.py:VALUE") == "reward VALUE is an int (3), not a function"
    assert problem_of(folder, "./my.py:Judge").startswith("reward Judge is a type (")
    (judge,) = load_rewards(RewardConfig(functions=["./my.py:judge"]), folder)
    assert judge(["?"], ["a"], answer=[1]) == [1.0]


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("x = 1\nx / 0", "raised ZeroDivisionError: division by zero at import (bad.py, line 2)"),
        ("import no_such", "raised ModuleNotFoundError: No module named 'no_such' at import (bad.py, line 1)"),
        ("import json\n\njson.loads('')", "at import (bad.py, line 3)"),
        ("raise SystemExit(2)", "raised SystemExit: 2 at import (bad.py, line 1)"),
        ("def f(:\n  pass", "raised SyntaxError: invalid syntax at import (bad.py, line 1)"),
        ("raise ValueError('two\\nlines')", "raised ValueError: two lines at import (bad.py, line 1)"),
    ],
)
def test_raising_at_import(folder, monkeypatch, code, expected):
    (folder / "bad.py").write_text(code + "\ndef f(prompts, completions, **kw): return [1]\n")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "bad", raising=False)
    for text in ("./bad.py:f", "bad:f"):
        problem = problem_of(folder, text)
        assert problem.startswith(f"reward function {text!r} raised ")
        assert expected.rpartition("(")[0] in problem
    assert expected in problem_of(folder, "./bad.py:f")
    assert not any(name.startswith("slothrl_reward_file_bad") for name in sys.modules)


def test_static_check_reads_but_does_not_run(folder):
    (folder / "bad.py").write_text(
        "raise SystemExit\nimport a.b\nfrom c import d as e\nx: int = 1\ny, z = 1, 2\n"
        "if x:\n  def g(): inner = 1\nelse:\n  async def h(): pass\n"
    )
    for name in ("a", "e", "x", "y", "z", "g", "h"):
        assert static(folder, f"./bad.py:{name}") == []
    for name in ("b", "d", "inner", "c"):
        assert f"bad.py has no {name!r}" in static(folder, f"./bad.py:{name}")[0]
    (folder / "star.py").write_text("from os import *\n")
    assert static(folder, "./star.py:anything") == []
    (folder / "broken.py").write_text("x = 1\ndef f(:\n")
    expected = "reward function './broken.py:f' raised SyntaxError: invalid syntax at import (broken.py, line 2)"
    assert static(folder, "./broken.py:f") == [expected]
    (folder / "latin.py").write_bytes(b"# \xe9\n")
    assert "latin.py: UnicodeDecodeError" in static(folder, "./latin.py:f")[0]
    began = time.perf_counter()
    static(folder, "./my.py:short", "gsm8k")
    assert time.perf_counter() - began < 0.1


def test_weights_params_and_duplicates(folder):
    cases = [
        ({"weights": [1.0]}, "reward.weights has 1 numbers for 2 reward.functions"),
        ({"weights": []}, "reward.weights has 0 numbers for 2 reward.functions"),
        ({"params": {"shrot": {"limit": 1}}}, "reward.params.shrot: 'shrot' is not selected; did you mean short? "
         "(selected: short, gsm8k)"),
        ({"params": {"short": 3}}, "reward.params.short is an int (3): write reward.params.short.<keyword>=<value>"),
    ]  # fmt: skip
    for fields, expected in cases:
        assert problems_of(folder, "./my.py:short", "gsm8k", **fields) == [expected]
        assert static(folder, "./my.py:short", "gsm8k", **fields) == [expected]
    twice = "reward.functions has more than one 'gsm8k'; logs and reward.params need different names"
    assert problems_of(folder, "gsm8k", "gsm8k") == static(folder, "gsm8k", "gsm8k") == [twice]
    wrong = problem_of(folder, "./my.py:short", params={"short": {"limits": 1}})
    assert wrong == "reward.params.short.limits: no such parameter; did you mean limit?"
    load_rewards(RewardConfig(functions=["./my.py:slow"], params={"slow": {"anything": 1}}), folder)


def test_all_problems_come_together(folder):
    found = problems_of(folder, "gsm8", "./no.py:f", "./my.py:shrot", weights=[1], params={"x": {}})
    assert len(found) == 5
    assert static(folder, "gsm8", "./no.py:f", "./my.py:shrot", weights=[1], params={"x": {}}) == found


def test_score(folder):
    config = RewardConfig(functions=["./my.py:short", "gsm8k"])
    rewards = load_rewards(config, folder)
    assert load_score(config, rewards) is rewards[0]
    assert load_score(RewardConfig(functions=config.functions, score="gsm8k"), rewards) is rewards[1]
    other = load_score(RewardConfig(functions=config.functions, score="exact_match"), rewards)
    assert other is not None and other(["?"], ["a"], answer=["a"]) == [1.0]
    with pytest.raises(ConfigError, match="unknown reward function 'exact'; did you mean exact_match"):
        load_score(RewardConfig(functions=config.functions, score="exact"), rewards)
    assert "'exact'" in static(folder, "gsm8k", score="exact")[0]
    assert static(folder, "./my.py:short", score="short") == []
    assert load_score(RewardConfig(), []) is None
