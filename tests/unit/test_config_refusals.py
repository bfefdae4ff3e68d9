"""What is wrong with a config is told before anything loads: all of it, with the nearest name and fitting numbers."""

import importlib.util
import json

import pytest

from slothrl.compose import check_jobs, compose_config
from slothrl.errors import ConfigError
from slothrl.trainer_checks import logger_problems
from tests.unit.refusals import refused

# --- names ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algos=grpo", "algos=grpo: there is no algos; did you mean algo?"),
        (
            "algo=grop",
            "algo=grop: algo is one of cispo, dapo, dr_grpo, grpo, gspo, reinforce_pp, rloo, sapo, sft;"
            " did you mean grpo?",
        ),
        ("gpu=cpuu", "gpu=cpuu: gpu is one of 12gb, 16gb, 24gb, 80gb, 8gb, cpu; did you mean cpu?"),
        ("learning_rate=1", "learning_rate=1: there is no learning_rate; did you mean trainer.learning_rate?"),
        ("data.learning_rate=1", "there is no data.learning_rate; did you mean trainer.learning_rate"),
        ("trainer.lerning_rate=1", "there is no trainer.lerning_rate; did you mean trainer.learning_rate"),
        ("model.lora.rank=4", "there is no model.lora.rank; did you mean model.lora.r"),
        ("+trainer.bata=1", "trainer.bata: there is no such field in GRPOConfig; did you mean trainer.beta"),
        ("modle=hub", "modle=hub: there is no modle; did you mean model or packing.mode?"),
        ("+trainr.max_steps=3", "trainr: there is no such key; did you mean trainer"),
        ("+model.lora.rank=4", "model.lora.rank: there is no such key"),
        ("data.task._target_=os.mkdir", "data.task._target_ is no knob of arithmetic"),
        ("+model._target_=os.mkdir", "model._target_: there is no such key"),
        ("+hydra.callbacks.a._target_=os.mkdir", "no key may be called _target_: nothing is built from a config"),
        ("data.task.digts=2", "data.task.digts is no knob of arithmetic (did you mean 'digits'?)"),
        ("reward.functions=[exact_mach]", "unknown reward function 'exact_mach'; did you mean exact_match"),
        ("reward.params.arithmetik.x=1", "'arithmetik' is not selected; did you mean arithmetic"),
    ],
)
def test_typos_get_the_nearest_name(override, message):
    found = refused(override)
    assert len(found) == 1
    assert message in found[0]


@pytest.mark.parametrize("override", ["garbage", "a b=c", "=5", "algo=gr(po"])
def test_what_is_no_override(override):
    (line,) = refused(override)
    assert line.startswith(f"{override}: not an override; write group=choice or key=value")


def test_a_command_misspelt():
    (line,) = refused("trian")
    assert line.endswith("quoted for your shell; did you mean the command train?")


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=x", "seed=x: Value 'x' of type 'str' could not be converted to Integer"),
        ("model.lora.r=abc", "model.lora.r=abc: Value 'abc' of type 'str' could not be converted to Integer"),
        ("logger.progress=maybe", "logger.progress=maybe: Value 'maybe' is not a valid bool (type str)"),
        ("trainer.beta=abc", "trainer.beta=abc: needs float, not 'abc'"),
        ("trainer.max_steps=1.5", "trainer.max_steps=1.5: needs int, not 1.5"),
        ("trainer.max_steps=true", "trainer.max_steps=True: needs int, not True"),
        ("trainer.num_generations=null", "trainer.num_generations=null: needs a number"),
        ("trainer=foo", "trainer=foo: trainer has fields to set, trainer.<field>=…"),
        ("trainer.learning_rate=-1", "trainer.learning_rate=-1: must be 0 or more"),
        ("trainer.temperature=0", "trainer.temperature=0: must be over 0"),
        ("trainer.top_p=1.5", "trainer.top_p=1.5: must be over 0 and at most 1"),
        ("trainer.epsilon=-0.1", "trainer.epsilon=-0.1: must be 0 or more"),
        ("trainer.num_train_epochs=nan", "trainer.num_train_epochs=nan: must be over 0"),
        ("rollout.engine=vlm", "rollout.engine=vlm: must be one of auto, vllm, transformers"),
        ("model.activation_gib=-1", "model.activation_gib=-1.0: must be 0 or more"),
        ("model.activation_gib=nan", "model.activation_gib=nan: must be 0 or more"),
        ("model.quantization=int4", "model.quantization=int4: must be one of auto, nf4, int8, none"),
        ("trainer.scale_rewards=std", "trainer.scale_rewards=std: must be one of group, batch, none, True, False"),
        ("data.format=chatml", "data.format must be one of auto, chat, plain; not 'chatml'"),
        ("data.eval_size=-1", "data.eval_size must be at least 0, not -1"),
        ("model.lora.r=0", "model.lora.r=0: must be at least 1"),
        ("rollout.gpu_memory_utilization=1.5", "rollout.gpu_memory_utilization=1.5: must be in [0, 1)"),
        ("reward.weights=[1,2]", "reward.weights has 2 numbers for 1 reward.functions"),
        ("reward.functions=[]", "reward.functions is empty: name at least one"),
        ("model=hub", "model.name is needed: model.name=…"),
        ("model.name=./nope", "model.name=./nope: no such folder"),
        ("resume=./nope", "resume=./nope: no such folder"),
        ("data.template='{c}'", "data.template asks for {c}, no column of data.source=arithmetic"),
    ],
)
def test_wrong_values(override, message):
    found = refused(override)
    assert len(found) == 1, found
    assert message in found[0]


def test_loss_types_are_the_algorithms_own():
    (line,) = refused("trainer.loss_type=nll")
    assert line == "trainer.loss_type=nll: must be one of grpo, bnpo, dr_grpo, dapo, luspo, cispo, sapo, vespo"
    assert refused("algo=sft", "trainer.loss_type=dapo") == [
        "trainer.loss_type=dapo: must be one of nll, chunked_nll, dft"
    ]


def test_a_logger_that_is_not_installed(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else found(name, *rest)
    )
    assert refused("logger=wandb") == ["logger.report_to=wandb: wandb is not installed: pip install wandb"]
    assert logger_problems(["tensorboard"]) == []  # which the tests use


def test_a_file_where_a_folder_should_go(tmp_path):
    (tmp_path / "file").write_text("", encoding="utf-8")
    assert refused(f"output_dir={tmp_path}/file/run") == [f"output_dir={tmp_path}/file/run: {tmp_path}/file is a file"]


def test_a_model_folder_without_a_model(tmp_path):
    assert refused("model=hub", f"model.name={tmp_path}") == [f"model.name={tmp_path}: no config.json in this folder"]


def test_several_mistakes_come_together():
    found = refused("algo=grop", "seed=x", "trainer.lerning_rate=1", "gpu=cpu")
    assert [line.split(":")[0] for line in found] == ["algo=grop", "seed=x", "trainer.lerning_rate=1"]
    found = refused("trainer.num_generations=7", "rollout.engine=vlm", "model.lora.r=0", "trainer.beta=abc", "gpu=cpu")
    starts = ("rollout.engine=vlm", "trainer.beta=abc", "model.lora.r=0", "trainer.num_generations=7")
    assert [line.split(":")[0].split(" ")[0] for line in found] == [*starts]


def test_jobs_of_a_sweep_are_all_checked():
    with pytest.raises(ConfigError) as caught:
        check_jobs([["algo=grpo", "seed=x"], ["algo=nope"], ["algo=grpo"], ["algo=grpo", "seed=x"]])
    assert [line.split(":")[0] for line in caught.value.problems] == ["seed=x", "algo=nope"]


# --- numbers that do not fit ------------------------------------------------------------------------------

BATCH = "trainer.per_device_train_batch_size"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainer.num_generations=7"],
            f"trainer.num_generations=7 does not divide the generation batch of 32 ({BATCH}=32 x "
            "gradient_accumulation_steps=1); it would divide it as 2, 4, 8",
        ),
        (
            [f"{BATCH}=4", "trainer.steps_per_generation=3", "trainer.num_generations=5"],
            f"trainer.num_generations=5 does not divide the generation batch of 12 ({BATCH}=4 x "
            "steps_per_generation=3); it would divide it as 3, 4, 6",
        ),
        (
            [f"{BATCH}=4", "trainer.generation_batch_size=20", "trainer.num_generations=8"],
            "trainer.num_generations=8 does not divide the generation batch of 20 (trainer.generation_batch_size=20); "
            "it would divide it as 4, 5, 10",
        ),
        (
            [f"{BATCH}=1"],
            f"trainer.num_generations=8 does not divide the generation batch of 1 ({BATCH}=1 x "
            "gradient_accumulation_steps=1); it would divide it as nothing: raise the batch",
        ),
        (
            [f"{BATCH}=8", "trainer.generation_batch_size=20"],
            f"trainer.generation_batch_size=20 is no multiple of {BATCH}=8",
        ),
        (
            ["trainer.generation_batch_size=32", "trainer.steps_per_generation=1"],
            "trainer.generation_batch_size and trainer.steps_per_generation say the same thing: set one of them",
        ),
        (["trainer.num_generations=1"], "trainer.num_generations=1: must be at least 2"),
        ([f"{BATCH}=0"], f"{BATCH}=0: must be at least 1"),
        (["trainer.steps_per_generation=-1"], "trainer.steps_per_generation=-1: must be at least 1"),
    ],
)
def test_batch_arithmetic(overrides, message):
    assert refused("gpu=cpu", *overrides) == [message]


def test_context_of_the_embedded_model():
    assert compose_config(["data.max_prompt_length=8184"]).data.max_prompt_length == 8184  # + 8: exactly full
    assert refused("data.max_prompt_length=8185") == [
        "data.max_prompt_length=8185 + trainer.max_completion_length=8 = 8193 tokens, more than the 8192 of smollm2"
    ]


NESTED = {"text_config": {"max_position_embeddings": 64}}


@pytest.mark.parametrize("content", [NESTED["text_config"], NESTED], ids=["flat", "nested"])
def test_context_of_a_local_model(content, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(content), encoding="utf-8")
    (line,) = refused("model=hub", f"model.name={tmp_path}")
    assert line.startswith("data.max_prompt_length=64 + trainer.max_completion_length=8 = 72 tokens, more than the 64")
    assert compose_config(["model=hub", f"model.name={tmp_path}", "data.max_prompt_length=56"]) is not None


def test_engine_length():
    assert refused("rollout.max_model_len=71") == [
        "rollout.max_model_len=71 is under data.max_prompt_length + trainer.max_completion_length = 72"
    ]
    assert compose_config(["rollout.max_model_len=72"]).rollout.max_model_len == 72


def test_packing_of_sft_is_trls():
    assert refused("algo=sft", "packing=on") == [
        "packing=on packs the updates of GRPO; SFT's sequences are packed by trainer.packing=true"
    ]
