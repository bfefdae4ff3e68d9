"""`fuse` on tiny models of real families and one made up here: values, gradients, adapters' states, and back."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from slothrl.fuse import fuse, is_fused, unfuse
from slothrl.vllm_compat import keep_plain, making_models
from tests.families import FAMILIES, make_checkpoint

IDS = torch.tensor([[(11 * i * i + 7 * i + 3) % 1000 + 3 for i in range(13)], [5 * i + 4 for i in range(13)]])
GROUPS = {"RMSNorm", "RoPE", "gated MLP", "q_proj + k_proj + v_proj", "gate_proj + up_proj", "o_proj", "down_proj"}
JOINED = {"qwen3", "gemma3"}  # norms on q and k
PHI3 = {"RMSNorm", "RoPE", "gated MLP", "qkv_proj", "gate_up_proj", "o_proj", "down_proj"}
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """family -> checkpoint, made once."""
    made = {}

    def folder(family):
        if family not in made:
            made[family] = make_checkpoint(family, tmp_path_factory.mktemp(family), torch.float32)
        return made[family]

    return folder


def adapted(path, dtype=torch.float32, quantization=None, **lora):
    """The checkpoint with a LoRA whose B is not zero, the same at every call; in training mode."""
    torch.manual_seed(0)
    with making_models():
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=quantization)
    keep_plain(model)
    options = {"r": 4, "lora_alpha": 12, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **lora}
    return random_b(get_peft_model(model, LoraConfig(**options))).train()


def random_b(model):
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def step(model, autocast=None, seed=0):
    """(logits, gradients by name) of one forward and backward."""
    model.zero_grad()
    torch.manual_seed(seed)
    with torch.autocast("cpu", autocast or torch.bfloat16, enabled=autocast is not None):
        output = model(input_ids=IDS, labels=IDS, use_cache=False)
    output.loss.backward()
    return output.logits.detach().float(), gradients_of(model)


def gradients_of(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(ours, theirs, bound=1e-5):
    """Logits, and every gradient, to `bound` of the largest of its kind."""
    assert ours[1].keys() == theirs[1].keys() and len(ours[1]) >= 12
    largest = max(g.abs().max() for g in theirs[1].values())
    assert (ours[0] - theirs[0]).abs().max() <= bound * theirs[0].abs().max()
    for name, gradient in theirs[1].items():
        assert gradient.abs().max() > 0, name
        assert (ours[1][name] - gradient).abs().max() <= bound * largest, name


@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_float32(family, folders):
    model = adapted(folders(family))
    plain, keys = step(model), list(model.state_dict())
    report = fuse(model)
    assert list(model.state_dict()) == keys and not report.kept and not report.notes
    rope = "QK-norm + RoPE" if family in JOINED else "RoPE"
    parts = PHI3 if family == "phi3" else GROUPS - {"RoPE"} | {rope}
    assert set(report.fused) == parts | {"whole layer"}
    assert report.fused["gated MLP"] == report.fused[rope] == report.fused["whole layer"] == 2
    assert report.difference is not None and report.difference < 1e-6
    assert_same(step(model), plain)
    unfuse(model)
    after = step(model)
    assert torch.equal(after[0], plain[0]) and all(torch.equal(after[1][n], g) for n, g in plain[1].items())
    assert not is_fused(model) and not any("forward" in vars(m) for m in model.modules())


BASES = {"bf16": None, "nf4": BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.bfloat16)}
BASES["int8"] = BitsAndBytesConfig(load_in_8bit=True)  # on a CPU bitsandbytes unpacks the weight, and rounds no inputs


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma3", "phi3"])
@pytest.mark.parametrize("base", BASES)
def test_sixteen_bits_by_error_budget(family, base, folders):
    """Against float32 of the same weights, fused is no further off than unfused is, within a half."""
    model = adapted(folders(family), torch.bfloat16, BASES[base])
    plain = step(model, torch.bfloat16)
    report = fuse(model)
    assert report.fused["gated MLP"] == 2 and not report.kept
    fused = step(model, torch.bfloat16)
    truth = step(exact(model))

    def errors(result):
        largest = max(g.abs().max() for g in truth[1].values())
        gradients = [((result[1][n].float() - g).abs().max() / largest).item() for n, g in truth[1].items()]
        return [((result[0] - truth[0]).abs().mean() / truth[0].abs().mean()).item(), sum(gradients) / len(gradients)]

    for ours, theirs in zip(errors(fused), errors(plain), strict=True):
        assert ours <= 1.5 * theirs, (ours, theirs)
    assert errors(fused)[0] < 0.1


def exact(model):
    """The same model in float32, unfused: packed weights unpacked."""
    from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

    base = model.get_base_model()
    with making_models():
        plain = AutoModelForCausalLM.from_config(base.config, dtype=torch.float32)
    keep_plain(plain)
    plain = get_peft_model(plain, model.peft_config["default"]).train()
    values = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        held = values[name]
        if held.dtype == torch.int8:
            layer = model.get_submodule(name.rpartition(".")[0])
            parameter.data = int8_vectorwise_dequant(held.data, layer.state.SCB)
            continue
        state = getattr(held, "quant_state", None)
        parameter.data = held.data.float() if state is None else dequantize_4bit(held.data, state).float()
    return plain


def test_checkpointed_layers(folders):
    """The same gradients, and no projection more than needed: down is never run again in the backward.

    Module by module: somebody watches one in each layer.
    """
    import sys

    model = adapted(folders("llama"))
    plain = step(model)
    fuse(model)
    for layer in model.get_base_model().model.layers:
        layer.mlp.register_forward_hook(lambda *_: None)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    module, calls = sys.modules["slothrl_kernels.lora_mlp"], []
    project = module.project
    module.project = lambda x, group, **options: calls.append(len(group)) or project(x, group, **options)
    try:
        assert_same(step(model), plain)
    finally:
        module.project = project
    assert calls == [2, 1] * 2 + [2] * 2
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": True})
    assert_same(step(model), plain)


def test_a_norm_on_the_mlp_s_result_needs_it_again(folders):
    model = adapted(folders("gemma2"))
    plain = step(model)
    fuse(model)
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    model.enable_input_require_grads()
    assert_same(step(model), plain)


def test_adapters_switched_merged_and_added(folders):
    """What the adapters are is asked at every call, also of a reference policy in between."""
    model = adapted(folders("llama"))
    fuse(model)
    twin = adapted(folders("llama"))

    def both():
        with torch.no_grad():
            ours, theirs = (m(input_ids=IDS).logits for m in (model, twin))
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-5)
        return ours

    first = both()
    with model.disable_adapter(), twin.disable_adapter():
        assert (both() - first).abs().max() > 0.1
    for m in (model, twin):
        m.merge_adapter()
    both()
    for m in (model, twin):
        m.unmerge_adapter()
        torch.manual_seed(2)
        m.add_adapter("other", LoraConfig(r=2, lora_alpha=2, target_modules="all-linear", use_rslora=True))
        random_b(m).set_adapter("other")
    assert (both() - first).abs().max() > 0.1
    for m in (model, twin):
        m.base_model.set_adapter(["default", "other"])  # two at once: PEFT's own forward
    both()


def test_dropout_draws_peft_s_numbers(folders):
    model = adapted(folders("qwen2"), lora_dropout=0.3)
    plain = step(model, seed=5)
    report = fuse(model)
    assert report.fused["gated MLP"] == 2
    assert_same(step(model, seed=5), plain)
    assert (step(model, seed=6)[0] - plain[0]).abs().max() > 1e-3


def test_some_projections_only(folders):
    """k_proj has no adapter, and is computed with its neighbours; an MLP without any stays."""
    model = adapted(folders("llama"), target_modules=["q_proj", "v_proj"], use_rslora=True)
    plain = step(model, seed=0)
    report = fuse(model)
    assert report.fused["q_proj + k_proj + v_proj"] == 2 and "o_proj" not in report.fused
    assert report.kept == {("LlamaMLP", "no LoRA in it"): 2}
    ours = step(model)
    assert (ours[0] - plain[0]).abs().max() <= 1e-5 * plain[0].abs().max()
    for name, gradient in plain[1].items():
        torch.testing.assert_close(ours[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_dora_stays_with_its_reason(folders):
    model = adapted(folders("llama"), use_dora=True)
    plain = step(model)
    report = fuse(model)
    assert set(report.fused) == {"RMSNorm", "RoPE"}
    assert report.kept[("q_proj", "a LoRA variant (DoRA and the like)")] == 2
    assert_same(step(model), plain, 1e-4)


def test_without_adapters_all_weights_train(folders):
    """A plain transformers model: norms and rotation fuse, and every parameter has its gradient."""
    torch.manual_seed(0)
    with making_models():
        model = AutoModelForCausalLM.from_pretrained(folders("gemma3"), dtype=torch.float32).train()
    keep_plain(model)
    plain = step(model)
    report = fuse(model)
    assert set(report.fused) == {"RMSNorm", "QK-norm + RoPE"} and report.difference < 1e-6
    assert report.kept == {("Gemma3MLP", "no LoRA in it"): 2}
    ours = step(model)
    assert len(ours[1]) == sum(1 for _ in model.parameters())
    assert_same(ours, plain)
    unfuse(model)
    assert torch.equal(step(model)[0], plain[0])


def test_one_instance_and_no_other(folders):
    model, other = adapted(folders("llama")), adapted(folders("llama"))
    classes = {type(m): dict(vars(type(m))) for m in other.modules()}
    names = {type(m): dict(type(m).forward.__globals__) for m in other.modules() if hasattr(type(m), "forward")}
    before = step(other)
    fuse(model)
    with pytest.raises(ValueError, match="fused already"):
        fuse(model)
    assert all(dict(vars(kind)) == held for kind, held in classes.items())
    assert all(kind.forward.__globals__ == held for kind, held in names.items())
    assert not any("forward" in vars(m) for m in other.modules())
    assert torch.equal(step(other)[0], before[0])
    twin = copy.deepcopy(model)
    random_b(model)
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5
    assert_same(step(twin), before)  # a copy runs on its own modules


def test_random_state_and_modes_stay(folders):
    model = adapted(folders("llama"))
    model.get_submodule("base_model.model.model.layers.0").eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    fuse(model)
    assert [m.training for m in model.modules()] == modes and torch.equal(torch.get_rng_state(), state)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
