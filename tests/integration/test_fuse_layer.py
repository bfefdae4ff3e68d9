"""Whole decoder layers as one step: which calls take it, which do not, and that none of it shows in a gradient."""

import copy
import sys

import pytest
import torch
from peft import LoraConfig
from test_fuse import IDS, NF4, adapted, assert_same, folders, gradients_of, random_b, step  # noqa: F401
from test_packed_model import CASES, by_pack, by_rows, ids_and_weights, make_model
from test_packed_model import assert_same as assert_same_pack
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BitsAndBytesConfig

import slothrl.fuse_layer
from slothrl.activations import keep_activations, release
from slothrl.fuse import fuse, unfuse
from slothrl.fuse_layer import Direct, fused_layer
from tests.families import FAMILIES


@pytest.fixture
def taken(monkeypatch):
    """What each layer that ran as one step kept, in the order of the calls."""
    seen, whole = [], slothrl.fuse_layer.decoder_layer
    monkeypatch.setattr(
        slothrl.fuse_layer, "decoder_layer", lambda x, parts, **o: seen.append(parts.keep) or whole(x, parts, **o)
    )
    return seen


def checkpointed(model, reentrant=False):
    model.get_base_model().gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model


def took(taken):
    found = list(taken)
    taken.clear()
    return found


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "smollm3", "phi3", "gemma2", "gemma3"])
@pytest.mark.parametrize("quantized", [False, True], ids=["dense", "nf4"])
def test_under_gradient_checkpointing(family, quantized, folders, taken):  # noqa: F811
    """From torch's checkpoint, which the first call finds around it, and without it."""
    base = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.float32) if quantized else None
    model = adapted(folders(family), quantization=base)
    plain = step(model)
    fuse(model)
    took(taken)
    assert_same(step(model), plain)
    assert took(taken) == ["all"] * 2
    layer = checkpointed(model).get_base_model().model.layers[0]
    theirs = layer._gradient_checkpointing_func
    for _ in range(2):
        assert_same(step(model), plain)
        assert took(taken) == ["input"] * 2 and isinstance(layer._gradient_checkpointing_func, Direct)
    unfuse(model)
    assert layer._gradient_checkpointing_func is theirs
    after = step(model)
    assert torch.equal(after[0], plain[0]) and took(taken) == []


def test_layers_without_rotation(folders, taken):  # noqa: F811
    model = make_model(**{**FAMILIES["smollm3"], "no_rope_layers": [1, 0]})
    ids = IDS % 97
    expected = model(input_ids=ids, use_cache=False).logits.detach()
    assert fuse(model).fused["whole layer"] == 2
    took(taken)
    torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, expected, atol=1e-4, rtol=1e-5)
    assert took(taken) == ["all"] * 2
    assert [fused_layer(layer).attention.rotates for layer in model.get_base_model().model.layers] == [True, False]


def test_the_beginning_of_each_head_is_rotated(taken):
    """Partial rotary, as in Phi-4-mini."""
    rotary = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
    model = random_b(make_model(**FAMILIES["phi3"], rope_parameters=rotary)).train()
    widths, ids = [], IDS % 97

    def run():
        model.zero_grad()
        output = model(input_ids=ids, labels=ids, use_cache=False)
        output.loss.backward()
        return output.logits.detach(), gradients_of(model)

    model.get_base_model().model.rotary_emb.register_forward_hook(lambda *a: widths.append(a[-1][0].size(-1)))
    plain = run()
    assert fuse(model).fused["whole layer"] == 2
    took(taken)
    assert_same(run(), plain)
    assert took(taken) == ["all"] * 2 and set(widths) == {8}


def test_padded_rows_and_accumulated_gradients(folders, taken):  # noqa: F811
    model = adapted(folders("qwen3"))
    mask = torch.ones_like(IDS)
    mask[1, 9:] = 0

    def accumulated():
        model.zero_grad()
        for rows in (slice(0, 1), slice(1, 2)):
            given = {"input_ids": IDS[rows], "attention_mask": mask[rows], "labels": IDS[rows]}
            output = model(**given, use_cache=False)
            output.loss.backward()
        return output.logits.detach(), gradients_of(model)

    plain = accumulated()
    fuse(model)
    took(taken)
    assert_same(accumulated(), plain)
    checkpointed(model)
    assert_same(accumulated(), plain)
    assert took(taken) == ["all"] * 4 + ["input"] * 4


@pytest.mark.parametrize("policy", ["attention", "offload", "both"])
def test_policies(policy, folders, taken):  # noqa: F811
    model = checkpointed(adapted(folders("qwen3")))
    plain = step(model)
    fuse(model)
    keep_activations(model, policy)
    if host := vars(model)["_slothrl_activations"].host:
        host.smallest = 1  # or tensors as small as these would stay
    took(taken)
    for _ in range(2):
        assert_same(step(model), plain)
    assert took(taken) == ["input" if policy == "offload" else "attention"] * 4
    release(model)
    assert_same(step(model), plain)
    assert took(taken) == ["input"] * 2


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_a_pack_with_shared_prompts(family, reentrant, taken):
    """gemma2: a window in every other layer, softcaps, four norms."""
    model = make_model(**CASES[family]).train()
    ids, weights = ids_and_weights(64)
    rows = by_rows(model, ids, weights)
    assert fuse(model).fused["whole layer"] == 2
    if reentrant is not None:
        checkpointed(model, reentrant)
    took(taken)
    assert_same_pack(by_pack(model, ids, weights), rows)
    assert took(taken) == {None: ["all"] * 2, False: ["input"] * 2, True: []}[reentrant]


def test_a_reference_policy_between_forward_and_backward(folders, taken):  # noqa: F811
    """Other adapters, and none, run through the layers before the first one's gradients are taken."""
    model = checkpointed(adapted(folders("llama")))
    model.add_adapter("other", LoraConfig(r=2, lora_alpha=2, target_modules="all-linear"))
    random_b(model).set_adapter("default")
    plain = step(model)
    fuse(model)
    took(taken)
    model.zero_grad()
    output = model(input_ids=IDS, labels=IDS, use_cache=False)
    with torch.no_grad():
        with model.disable_adapter():
            without = model(input_ids=IDS, use_cache=False).logits
        model.base_model.set_adapter("other")
        other = model(input_ids=IDS, use_cache=False).logits
        model.base_model.set_adapter("default")
    output.loss.backward()
    assert_same((output.logits.detach(), gradients_of(model)), plain)
    assert took(taken) == ["input"] * 6
    assert (without - plain[0]).abs().max() > 0.1 < (other - without).abs().max()


def test_what_one_step_does_not_do(folders, taken):  # noqa: F811
    """Module by module, by call: a cache, watched modules, two adapters, a trained norm, reentrant checkpoints."""
    model = adapted(folders("llama"))
    plain = step(model)
    fuse(model)
    layers = model.get_base_model().model.layers
    took(taken)
    model(input_ids=IDS, use_cache=True)
    assert took(taken) == []
    handle = layers[0].mlp.down_proj.register_forward_hook(lambda *_: None)
    assert_same(step(model), plain)
    assert took(taken) == ["all"]  # the other layer
    handle.remove()
    layers[1].input_layernorm.weight.requires_grad_()
    ours = step(model)
    assert took(taken) == ["all"] and ours[1].pop("base_model.model.model.layers.1.input_layernorm.weight").any()
    assert_same(ours, plain)
    layers[1].input_layernorm.weight.requires_grad_(False)
    hidden = model(input_ids=IDS, use_cache=False, output_hidden_states=True).hidden_states
    assert len(hidden) == 3
    took(taken)
    assert_same(step(checkpointed(model, reentrant=True)), plain)
    assert took(taken) == []


def test_after_peft_took_its_layers_away(folders, taken):  # noqa: F811
    model, twin = adapted(folders("llama")), adapted(folders("llama"))
    fuse(model)
    took(taken)
    with torch.no_grad():
        ours, theirs = (m.unload()(input_ids=IDS, use_cache=False).logits for m in (model, twin))
    torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-5)
    assert took(taken) == []


def test_dropout_is_said(folders):  # noqa: F811
    report = fuse(adapted(folders("llama"), lora_dropout=0.1))
    assert "whole layer" not in report.fused and "LoRA dropout" in report.notes[0]


def test_a_copy_runs_on_its_own_layers(folders, taken):  # noqa: F811
    model = checkpointed(adapted(folders("llama")))
    plain = step(model)
    fuse(model)
    step(model)
    twin = copy.deepcopy(model)
    random_b(model)
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5
    took(taken)
    assert_same(step(twin), plain)
    assert took(taken) == ["input"] * 2
    assert fused_layer(twin.get_base_model().model.layers[0]).module is twin.get_base_model().model.layers[0]


class Launches(TorchDispatchMode):
    """Counts what a GPU would be told to do: one for a kernel of ours, whatever its reference does, and one for each of
    torch's operations but those that ask for memory or look at it in another way."""

    VIEWS = "view _unsafe_view t transpose permute slice split split_with_sizes expand unsqueeze detach alias select"
    VIEWS = {f"aten.{name}" for name in (*VIEWS.split(), "empty", "empty_like", "new_empty", "promote_types")}
    KERNELS = {
        "lora_flat": ["cast_into"],
        "lora_group": ["unpack_group", "lora_pass"],
        "lora_onto": ["unpack_group"],
        "layer_attention": ["qk_norm_rope_forward", "qk_norm_rope_backward", "rope_turn"],
        "layer_mlp": ["unpack_group", "glu_forward", "glu_backward"],
        "decoder_layer": ["rms_norm_forward", "rms_norm_backward", "glu_forward"],
        "layer_residual": ["rms_norm_forward", "rms_norm_backward"],
    }

    def __init__(self, monkeypatch):
        super().__init__()
        self.count, self.inside = 0, 0
        for module, names in self.KERNELS.items():
            for name in names:
                place = f"slothrl_kernels.{module}"
                monkeypatch.setattr(sys.modules[place], name, self.kernel(getattr(sys.modules[place], name)))

    def kernel(self, function):
        launches = 2 if function.__name__ == "lora_pass" else 1

        def call(*args, **kwargs):
            self.count, self.inside = self.count + launches, self.inside + 1
            try:
                return function(*args, **kwargs)
            finally:
                self.inside -= 1

        return call

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        if not self.inside:
            self.count += str(operation).rpartition(".")[0] not in self.VIEWS
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("family, most", [("llama", (20, 50)), ("gemma2", (24, 60))])
def test_how_much_a_layer_launches(family, most, folders, monkeypatch):  # noqa: F811
    """A checkpointed layer over nf4 with float32 adapters, and tokens enough for it to hold the unpacked weights.

    Module by module an H100's profile had about 250 launches a layer, of which 14 were the optimizer's.
    """
    base = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.bfloat16)
    model = checkpointed(adapted(folders(family), torch.bfloat16, base, r=8))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.float() if "lora_" in name else parameter.data
    assert fuse(model).fused["whole layer"] == 2
    decoder = model.get_base_model().model
    x = torch.randn(2, 300, 128).bfloat16().requires_grad_()
    tables = decoder.rotary_emb(x, torch.arange(300)[None])
    seen = Launches(monkeypatch)
    for _ in range(2):  # the first call takes the place of torch's checkpoint
        model.zero_grad()
        with seen, torch.autocast("cpu", torch.bfloat16):
            seen.count = 0
            y = decoder.layers[0](x, attention_mask=None, position_embeddings=tables, use_cache=False)
            forward = seen.count
        loss = y.sum()
        with seen:
            seen.count = 0
            loss.backward()
    assert forward <= most[0] and seen.count <= most[1]
