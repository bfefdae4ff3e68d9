"""Loading a base in each format, on bitsandbytes' CPU backend where there is no GPU, and training a LoRA over it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from trl import GRPOConfig
from trl import GRPOTrainer as TRLGRPOTrainer

from slothrl import GRPOTrainer
from slothrl.config import ModelConfig
from slothrl.errors import UserError
from slothrl.models import load_model, load_tokenizer, parameter_bytes, plan_model
from tests.helpers import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(path)
    tiny_model(len(tokenizer), hidden=128).save_pretrained(path)
    return str(path)


def load(folder: str, quantization: str, dtype: str = "auto"):
    plan = plan_model(ModelConfig(name=folder, quantization=quantization, dtype=dtype), "cpu")
    return plan, load_model(plan, "cpu")


def test_auto_on_a_cpu_is_float32(folder):
    plan, model = load(folder, "auto")
    assert (plan.quantization, plan.dtype) == ("none", torch.float32)
    assert model.dtype == torch.float32


def test_auto_on_a_gpu_is_nf4_in_bfloat16(folder):
    plan = plan_model(ModelConfig(name=folder), "cuda")
    assert (plan.quantization, plan.dtype) == ("nf4", torch.bfloat16)


def test_bfloat16_by_option(folder):
    assert load(folder, "none", "bfloat16")[1].dtype == torch.bfloat16


def test_capped_attention_scores_are_capped(tmp_path):
    """transformers' default attention leaves Gemma 2's cap out, and trains another function than the model's."""
    from tests.families import make_checkpoint

    path = str(make_checkpoint("gemma2", tmp_path, attn_logit_softcapping=0.5))
    plan = plan_model(ModelConfig(name=path), "cpu")
    ids = torch.arange(2, 60)[None]
    ours = load_model(plan, "cpu")(ids).logits
    eager = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")(ids).logits
    default = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)(ids).logits
    assert torch.equal(ours, eager)
    assert (default - eager).abs().max() > 1e-2
    named = plan_model(ModelConfig(name=path, attn_implementation="sdpa"), "cpu")
    assert named.attn_implementation == "sdpa"


def test_nf4_is_double_quantised_and_close(folder):
    _, exact = load(folder, "none")
    _, packed = load(folder, "nf4", "float32")
    weight = packed.model.layers[0].mlp.up_proj.weight
    assert type(weight).__name__ == "Params4bit"
    assert weight.quant_state.quant_type == "nf4"
    assert weight.quant_state.nested  # absmax is quantised too
    full = exact.model.layers[0].mlp.up_proj.weight
    assert weight.nbytes * 8 == full.nbytes  # 4 bits against 32
    assert not isinstance(packed.lm_head, type(packed.model.layers[0].mlp.up_proj))  # the head stays as it was
    ids = torch.arange(4, 40)[None]
    with torch.no_grad():
        difference = (packed(ids).logits - exact(ids).logits).abs().mean() / exact(ids).logits.std()
    assert 0 < difference < 0.5


def test_nf4_gradients_survive_a_forward_in_eval_mode(folder):
    """bitsandbytes' CPU layer repacks itself in such a forward, for a kernel without a backward: switched off."""
    ids = torch.arange(4, 40)[None]

    def gradients(warmed: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        base = load(folder, "nf4", "bfloat16")[1]
        model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
        if warmed:
            with torch.no_grad():
                model.eval()(ids)
        model.train()(input_ids=ids, labels=ids).loss.backward()
        return [p.grad for p in model.parameters() if p.requires_grad]

    for cold, warm in zip(gradients(False), gradients(True), strict=True):
        assert cold.abs().sum() > 0
        assert torch.equal(cold, warm)


def test_parameters_are_counted_unpacked(folder):
    exact, packed = parameter_bytes(load(folder, "none")[1]), parameter_bytes(load(folder, "nf4")[1])
    assert packed[1] + packed[2] == exact[1] + exact[2]
    assert packed[0] < exact[0]


def test_int8_by_option(folder):
    _, model = load(folder, "int8")
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.int8


def trainer_over_nf4(folder: str, tmp_path, kind):
    plan, model = load(folder, "nf4", "float32")
    tokenizer = load_tokenizer(plan)
    arguments = GRPOConfig(
        output_dir=str(tmp_path),
        use_cpu=True,
        bf16=False,
        report_to="none",
        per_device_train_batch_size=4,
        num_generations=4,
        max_completion_length=4,
        max_steps=1,
        learning_rate=1e-3,
        save_strategy="no",
        seed=0,
    )
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": "ab"}, {"prompt": "cd"}])
    return kind(
        model=model,
        reward_funcs=lambda completions, **_: [float(len(set(c))) + i for i, c in enumerate(completions)],
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
    )


def test_lora_stays_float32_over_a_quantised_base(folder, tmp_path):
    def dtypes(kind):
        trainer = trainer_over_nf4(folder, tmp_path, kind)
        return {p.dtype for p in trainer.model.parameters() if p.requires_grad}

    assert dtypes(TRLGRPOTrainer) == {torch.bfloat16}  # why ours has to undo it
    assert dtypes(GRPOTrainer) == {torch.float32}


def test_a_loaded_adapter_comes_back_exactly(folder, tmp_path):
    plan, model = load(folder, "nf4", "float32")
    peft = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    before = {n: p.detach().clone() for n, p in peft.named_parameters() if p.requires_grad}
    arguments = GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", num_generations=2)
    from datasets import Dataset

    rows = Dataset.from_list([{"prompt": "ab"}] * 4)
    trainer = GRPOTrainer(peft, [lambda completions, **_: [0.0] * len(completions)], arguments, rows,
                          processing_class=load_tokenizer(plan))  # fmt: skip
    after = {n: p for n, p in trainer.model.named_parameters() if n in before}
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_training_moves_the_lora_and_not_the_base(folder, tmp_path):
    trainer = trainer_over_nf4(folder, tmp_path, GRPOTrainer)
    base = {n: p.detach().clone() for n, p in trainer.model.named_parameters() if not p.requires_grad}
    trainer.train()
    moved = [n for n, p in trainer.model.named_parameters() if p.requires_grad and "lora_B" in n and p.abs().max() > 0]
    assert len(moved) == 14
    assert all(torch.equal(p, base[n]) for n, p in trainer.model.named_parameters() if n in base)


def test_what_is_no_model_is_one_line(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "no-such-architecture"}')
    with pytest.raises(UserError, match="model.name=") as caught:
        plan_model(ModelConfig(name=str(tmp_path)), "cpu")
    assert "\n" not in str(caught.value)
