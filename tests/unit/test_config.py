"""From overrides to a checked config: what composes, what is refused, and in which words."""

import dataclasses
import subprocess
import sys
import time
from pathlib import Path

import pytest

from slothrl import checks, compose
from slothrl.checks import gpu_memory_gb, set_fields
from slothrl.compose import compose_config, conf_dir, with_defaults
from slothrl.trainer_fields import trainer_fields
from tests.unit.refusals import refused

ON_CUDA = gpu_memory_gb() is not None


# --- what composes --------------------------------------------------------------------------------------------------


def test_defaults():
    config = compose_config(["gpu=cpu"])
    assert (config.algo.name, config.algo.trainer) == ("grpo", "grpo")
    assert (config.model.name, config.model.quantization, config.model.lora.r) == ("smollm2", "auto", 8)
    assert (config.data.source, config.data.eval_size, config.data.task.digits) == ("arithmetic", 30, 1)
    assert (config.reward.functions, config.reward.score) == (["arithmetic"], "exact_match")
    assert (config.rollout.engine, config.gpu.device, config.logger.report_to) == ("auto", "cpu", [])
    assert (config.seed, config.output_dir, config.resume) == (0, None, None)
    trainer = set_fields(config.trainer)
    assert trainer["loss_type"] == "grpo"
    assert trainer["learning_rate"] == 4e-4  # the small model's, over the algorithm's
    assert trainer["max_completion_length"] == 8  # the data's
    assert trainer["per_device_train_batch_size"] == 32  # the device's
    assert "top_p" not in trainer  # nobody set it: TRL's default holds


def test_trainer_fields_that_are_set_and_no_others():
    trainer = set_fields(compose_config(["gpu=cpu", "trainer.top_p=0.9", "trainer.min_p=null"]).trainer)
    assert trainer["top_p"] == 0.9
    assert trainer["min_p"] is None
    assert "top_k" not in trainer


NEEDS = {
    "model=hub": ["model.name=owner/name"],
    "data=file": ["data.path={rows}"],
    "data=hub": ["data.name=owner/name"],
    "reward=custom": ["reward.functions=[exact_match]"],
    "reward=none": ["algo=sft"],
}


def choices() -> list[str]:
    folders = sorted(folder for folder in conf_dir().iterdir() if folder.is_dir())
    return [f"{folder.name}={file.stem}" for folder in folders for file in sorted(folder.glob("*.yaml"))]


def test_all_groups_are_there():
    assert {choice.split("=")[0] for choice in choices()} == {
        "algo", "model", "data", "reward", "rollout", "gpu", "logger", "packing"
    }  # fmt: skip


@pytest.mark.parametrize("choice", choices())
def test_every_choice_composes(choice, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "gpu_memory_gb", lambda: 85.0)
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "1 + 1", "answer": "2"}\n', encoding="utf-8")
    overrides = [choice, *(need.format(rows=rows) for need in NEEDS.get(choice, []))]
    config = compose_config(overrides, anywhere=choice.startswith("logger="))  # whose packages need not be here
    group, name = choice.split("=")
    if group in ("algo", "gpu"):
        assert config[group].name == name
    if group == "packing":
        assert config.packing.mode == name
    if group == "rollout":
        assert config.rollout.engine == name
    if group == "data":
        assert config.data.source == name


@pytest.mark.parametrize(
    ("algo", "expected"),
    [
        ("grpo", {"loss_type": "grpo", "epsilon": 0.2, "scale_rewards": "group", "beta": 0.0}),
        ("dapo", {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}),
        ("dr_grpo", {"loss_type": "dr_grpo", "scale_rewards": "none"}),
        ("gspo", {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4}),
        ("cispo", {"loss_type": "cispo", "epsilon_high": 5.0}),
        ("sapo", {"loss_type": "sapo"}),
        ("rloo", {"loss_type": "grpo", "epsilon": 0.2}),
        ("reinforce_pp", {"loss_type": "dapo", "beta": 0.0}),
    ],
)
def test_algorithms_set_their_fields(algo, expected):
    trainer = set_fields(compose_config([f"algo={algo}", "gpu=cpu"]).trainer)
    assert {key: trainer[key] for key in expected} == expected


def test_sft_drops_nothing_that_grpo_needs():
    config = compose_config(["algo=sft", "gpu=cpu"])
    assert config.algo.trainer == "sft"
    assert set_fields(config.trainer)["packing"] is False


def test_reward_follows_data_and_can_be_chosen():
    assert compose_config(["data=countdown"]).reward.functions == ["countdown"]
    assert compose_config(["data=gsm8k"]).reward.score == "gsm8k"
    config = compose_config(["data=gsm8k", "reward=number"])
    assert (config.data.source, config.reward.functions) == ("gsm8k", ["number_match"])


def test_open_keys_need_no_plus():
    config = compose_config(
        ["data.task.min_digits=1", "data.task.digits=2", "reward.params.arithmetic={}", "reward.params.exact_match={}"]
    )
    assert (config.data.task.digits, config.data.task.min_digits) == (2, 1)
    assert set(config.reward.params) == {"arithmetic", "exact_match"}
    config = compose_config(["data=reasoning_gym", "data.task.max_terms=3", "reward.params.exact_match.strip=true"])
    assert dict(config.data.task) == {"max_terms": 3}
    assert config.reward.params.exact_match.strip is True


# --- gpu ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("gigabytes", "preset"),
    [(None, "cpu"), (6.2, "8gb"), (8.5, "8gb"), (12.6, "12gb"), (16.9, "16gb"), (25.3, "24gb"), (85.0, "80gb")],
)
def test_gpu_is_detected(gigabytes, preset, monkeypatch):
    monkeypatch.setattr(checks, "gpu_memory_gb", lambda: gigabytes)
    assert compose_config([]).gpu.name == preset
    assert compose_config(["gpu=auto"]).gpu.name == preset
    assert with_defaults(["seed=1"]) == ["seed=1", f"gpu={preset}"]


def test_a_named_gpu_wins_over_detection(monkeypatch):
    monkeypatch.setattr(checks, "gpu_memory_gb", lambda: 85.0)
    config = compose_config(["gpu=12gb"])
    assert (config.gpu.memory_gb, config.trainer.gradient_accumulation_steps) == (12, 8)


@pytest.mark.skipif(ON_CUDA, reason="there is a CUDA device")
def test_gpu_without_one():
    assert refused("gpu=24gb") == ["gpu=24gb: no CUDA device here (the driver shows none); use gpu=cpu"]


# --- trainer fields -------------------------------------------------------------------------------------------------


def test_fields_of_the_other_algorithm():
    assert refused("trainer.packing=true") == [
        "trainer.packing belongs to SFTConfig, and this run is algo.trainer=grpo"
    ]
    assert refused("algo=sft", "trainer.beta=0.1") == [
        "trainer.beta belongs to GRPOConfig, and this run is algo.trainer=sft"
    ]


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("use_vllm=true", "set rollout=vllm or rollout=transformers instead"),
        ("output_dir=x", "set output_dir=… instead"),
        ("seed=3", "set seed=… instead"),
        ("reward_weights=[1]", "set reward.weights=… instead"),
        ("report_to=none", "set logger=… instead"),
        ("resume_from_checkpoint=x", "set resume=… instead"),
    ],
)
def test_fields_that_have_a_knob_of_our_own(override, hint):
    assert refused(f"trainer.{override}") == [f"trainer.{override.split('=')[0]}: {hint}"]


@pytest.mark.parametrize("kind", ["grpo", "sft"])
def test_fields_are_those_of_the_dataclass(kind):
    trl = pytest.importorskip("trl")
    real = {field.name: field for field in dataclasses.fields({"grpo": trl.GRPOConfig, "sft": trl.SFTConfig}[kind])}
    found = trainer_fields(kind)
    assert set(found) == set(real)
    for name, field in real.items():  # a default that the parser read must be the real one
        if found[name].default is not None:
            assert found[name].default == field.default, name


def test_numbers_as_yaml_writes_them():
    fields = trainer_fields("grpo")
    assert fields["learning_rate"].problem("1e-5") is None  # YAML 1.1 reads 1e-5 as a string
    assert fields["learning_rate"].problem("fast") == "needs float, not 'fast'"
    assert fields["max_steps"].problem(None) == "needs int, not null"


# --- overlay --------------------------------------------------------------------------------------------------------


def test_overlay_replaces_and_adds(tmp_path):
    (tmp_path / "algo").mkdir()
    packaged = (conf_dir() / "algo" / "grpo.yaml").read_text(encoding="utf-8")
    assert "num_generations: 8" in packaged
    (tmp_path / "algo" / "grpo.yaml").write_text(packaged.replace("num_generations: 8", "num_generations: 4"))
    mine = "# @package _global_\ndefaults:\n  - dapo\nalgo:\n  name: mine\ntrainer:\n  beta: 0.5\n"
    (tmp_path / "algo" / "mine.yaml").write_text(mine, encoding="utf-8")
    assert compose_config(["gpu=cpu"], tmp_path).trainer.num_generations == 4
    config = compose_config(["gpu=cpu", "algo=mine"], tmp_path)
    assert (config.algo.name, config.trainer.beta, config.trainer.epsilon_high) == ("mine", 0.5, 0.28)
    assert config.trainer.num_generations == 4  # through dapo, which starts from grpo
    (line,) = refused("algo=minee", overlay=tmp_path)
    there = "cispo, dapo, dr_grpo, grpo, gspo, mine, reinforce_pp, rloo, sapo, sft"
    assert line == f"algo=minee: algo is one of {there}; did you mean mine?"
    assert compose_config(["gpu=cpu"]).trainer.num_generations == 8  # the next call has none


def test_overlay_cannot_smuggle_in_a_typo(tmp_path):
    (tmp_path / "logger").mkdir()
    (tmp_path / "logger" / "mine.yaml").write_text("report_too: [wandb]\n", encoding="utf-8")
    (line,) = refused("logger=mine", overlay=tmp_path)
    assert line == "logger=mine: Key 'report_too' not in 'LoggerConfig'"


# --- cost -----------------------------------------------------------------------------------------------------------


def test_checks_import_nothing_heavy():
    code = (
        "import sys; from slothrl.compose import compose_config; compose_config(['data=countdown', 'gpu=cpu'])\n"
        "print([m for m in ('torch', 'trl', 'transformers', 'datasets', 'vllm') if m in sys.modules])"
    )
    path = [str(Path(compose.__file__).parents[1] / part) for part in ("", "kernels", "rewards")]
    code = f"import sys; sys.path[:0] = {path!r}\n{code}"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_checks_take_well_under_a_second():
    refused("algo=grop")  # Hydra's first call reads its plugins
    start = time.monotonic()
    refused("trainer.num_generations=7", "rollout.engine=vlm")
    assert time.monotonic() - start < 2.0  # measured 0.15 s
