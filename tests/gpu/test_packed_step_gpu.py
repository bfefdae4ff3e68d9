"""The packed update in bf16 and over nf4: no further from float32 than the padded one, shared prompts and cuts too."""

import copy
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config
from trl import GRPOConfig

from slothrl.config import PackingConfig
from slothrl.engine import Engine, Rollout
from slothrl.trainers.grpo import GRPOTrainer
from tests.gpu.nf4_model import marked, quantise
from tests.helpers import tiny_tokenizer
from tests.integration.equality import KeepGradients

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = "cuda"
TOKENIZER = tiny_tokenizer()
SHAPE = {
    "vocab_size": 1000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048,
    "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None, "tie_word_embeddings": False,
}  # fmt: skip
CONFIGS = {"llama": LlamaConfig, "qwen3": Qwen3Config}
PACKINGS = {
    "packed": {"shared_prefix": "never"},
    "shared": {"shared_prefix": "always"},
    "cut": {"shared_prefix": "auto", "tokens_per_micro_batch": 700},
}


class Sampler(Engine):
    """Random completions of 1 to 200 tokens, and log-probs near those of a random model."""

    name = "vllm"

    def generate(self, prompt_ids, sampling):
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(1, 200, (len(prompt_ids),), generator=generator).tolist()
        rows = [torch.randint(4, 1000, (n,), generator=generator).tolist() for n in lengths]
        return Rollout(rows, [[-6.9 + 0.1 * (i % 3) for i in range(n)] for n in lengths])

    def push_lora(self):
        pass

    def logprobs(self, token_ids):
        raise NotImplementedError


def base(family: str, kind: str) -> Any:
    """The same weights at every call, as "bf16" or "nf4"; "float32" and "nf4 in float32" are the truth of each."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(CONFIGS[family](**SHAPE), dtype=torch.bfloat16).to(DEVICE)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:  # away from a uniform distribution over the tokens
                parameter.mul_(2)
    if kind.startswith("nf4"):
        quantise(model, lambda linear: linear.weight.data)
        marked(model)
    if kind == "float32":
        return model.float()
    return _plain(model) if kind == "nf4 in float32" else model


def _plain(model: Any) -> Any:
    """nf4 layers as float32 ones of the very weights they stand for."""
    for name, module in list(model.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):
            linear = torch.nn.Linear(module.in_features, module.out_features, bias=False, device=DEVICE)
            weight: Any = module.weight
            linear.weight.data = bnb.functional.dequantize_4bit(weight.data, weight.quant_state).float()
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, linear)
    model.is_loaded_in_4bit = False
    return model.float()


def lora(model: Any) -> Any:
    torch.manual_seed(1)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    return model


def reward(completions, completion_ids, **_):
    return [sum(ids) % 17 / 7 for ids in completion_ids]


def trainer(family: str, kind: str, folder, checkpointing: bool, **packing: Any) -> GRPOTrainer:
    exact = kind.endswith("float32")
    args = GRPOConfig(
        output_dir=str(folder), bf16=not exact, use_cpu=DEVICE == "cpu", report_to="none", save_strategy="no",
        max_steps=1, optim="sgd", learning_rate=0.0, per_device_train_batch_size=8, gradient_accumulation_steps=2,
        num_generations=4, max_completion_length=200, gradient_checkpointing=checkpointing, disable_tqdm=True,
        vllm_importance_sampling_mode="token_truncate", logging_steps=1, max_grad_norm=0.0, loss_type="grpo",
    )  # fmt: skip
    rows = Dataset.from_dict({"prompt": ["1 + 1 = ", "What is a sloth? " * 9, "x", "Tell me " * 20] * 2})
    tokenizer = copy.deepcopy(TOKENIZER)
    return GRPOTrainer(
        lora(base(family, kind)), reward, args, rows, processing_class=tokenizer, engine=Sampler(),
        packing=PackingConfig(**packing),
    )  # fmt: skip


def gradients_and_logprobs(one: GRPOTrainer) -> tuple[dict[str, torch.Tensor], torch.Tensor, float]:
    """Of one step: LoRA gradients, log-probs of its tokens (N,), the loss."""
    keep = _Keep()
    one.add_callback(keep)
    one.train()
    batch = one._buffered_inputs[0]
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    with torch.no_grad():
        logprobs, *_ = one._get_per_token_logps_and_entropies(one.model, ids, mask, batch["completion_ids"].size(1))
    loss = next(log["loss"] for log in one.state.log_history if "loss" in log)
    return keep.steps[0], logprobs[batch["completion_mask"].bool()].float(), loss


class _Keep(KeepGradients):
    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.steps.append({n: p.grad.float().clone() for n, p in model.named_parameters() if p.grad is not None})


def distance(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """|found - truth| / |truth| over all matrices together."""
    assert found.keys() == truth.keys() and len(found) == 2 * 7 * 4
    apart = sum((found[name] - values).double().square().sum() for name, values in truth.items())
    return (apart / sum(values.double().square().sum() for values in truth.values())).sqrt().item()


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize(("family", "kind"), [("llama", "bf16"), ("llama", "nf4"), ("qwen3", "nf4")])
def test_packed_is_no_further_from_float32_than_padded(family, kind, checkpointing, tmp_path):
    exact = "float32" if kind == "bf16" else "nf4 in float32"
    truth, true_logprobs, true_loss = gradients_and_logprobs(trainer(family, exact, tmp_path, False, mode="off"))
    one = trainer(family, kind, tmp_path, checkpointing, mode="off")
    padded, padded_logprobs, _ = gradients_and_logprobs(one)
    padded_error = distance(padded, truth)
    padded_apart = (padded_logprobs - true_logprobs).abs().mean().item()
    for name, packing in PACKINGS.items():
        one = trainer(family, kind, tmp_path, checkpointing, mode="on", **packing)
        found, logprobs, loss = gradients_and_logprobs(one)
        assert (logprobs - padded_logprobs).abs().mean().item() < 1e-2, name
        assert (logprobs - true_logprobs).abs().mean().item() < 1.2 * padded_apart + 1e-3, name
        assert distance(found, truth) < 1.2 * padded_error + 5e-3, name
        assert loss == pytest.approx(true_loss, abs=5e-3), name


def test_packed_is_padded_in_float32(tmp_path):
    padded, padded_logprobs, loss = gradients_and_logprobs(trainer("llama", "float32", tmp_path, False, mode="off"))
    for name, packing in PACKINGS.items():
        found, logprobs, packed_loss = gradients_and_logprobs(
            trainer("llama", "float32", tmp_path, True, mode="on", **packing)
        )
        assert (logprobs - padded_logprobs).abs().max().item() < 5e-3, name  # TF32 may be on
        assert distance(found, padded) < 5e-3, name
        assert packed_loss == pytest.approx(loss, abs=1e-3), name


def test_budget_from_free_memory(tmp_path):
    one = trainer("llama", "nf4", tmp_path, True)
    one.train()
    assert one.padded_reason is None
    assert one.chosen_token_budget == 24_576  # a small model on a large card
