"""Models of every family over a pack: hidden states and LoRA gradients are those of separate rows."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from slothrl_kernels import PackedLayout
from transformers import AutoConfig, AutoModelForCausalLM

from slothrl.packed_model import NAME, packed_forward, packed_mode, supports_packing
from slothrl.vllm_compat import making_models
from tests.families import COMMON, FAMILIES

TREE = PackedLayout.build([9, 5, 1, 8, 12, 3, 4], [-1, 0, 0, 0, -1, -1, 5])
ROWS = [(0, 1), (0, 2), (0, 3), (4,), (5, 6)]  # the segments of each row, had nobody packed
WINDOW = {"sliding_window": 6}  # short enough to bite, across the end of a prefix too
CASES = {**FAMILIES, "mistral": {"model_type": "mistral", **WINDOW}}
CASES |= {name: {**FAMILIES[name], **WINDOW} for name in ("gemma2", "gemma3")}


def make_model(lora: bool = True, **options):
    options = {**COMMON, "hidden_size": 64, "intermediate_size": 96, "head_dim": 16, "vocab_size": 97, **options}
    with making_models(), torch.random.fork_rng():
        torch.manual_seed(0)
        config = AutoConfig.for_model(options.pop("model_type"), **options)
        # Eager: transformers' sdpa leaves out Gemma 2's softcap.
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").float()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
        if lora:
            config = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, lora_dropout=0.0)
            model = get_peft_model(model, config)
    return model


def spans(layout, segments):
    """The places in the pack of one row's tokens."""
    return torch.cat([torch.arange(layout.starts[s], layout.starts[s + 1]) for s in segments])


def ids_and_weights(width):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 97, (TREE.tokens,), generator=generator)
    return ids, torch.randn(TREE.tokens, width, generator=generator)


def by_rows(model, ids, weights):
    """Hidden states (T, h) of the pack's tokens from separate forwards, and LoRA gradients of sum(hidden * weights)."""
    hidden, seen = torch.zeros_like(weights), set()
    for row in ROWS:
        places = spans(TREE, row)
        states = model.get_base_model().model(input_ids=ids[places][None], use_cache=False).last_hidden_state[0]
        fresh = torch.tensor([int(p) not in seen for p in places])  # a shared prompt counts once
        seen.update(places.tolist())
        (states * weights[places])[fresh].sum().backward()
        hidden[places] = states.detach()
    return hidden, gradients(model)


def by_pack(model, ids, weights, layout=TREE, places=None):
    places = torch.arange(TREE.tokens) if places is None else places
    with packed_mode(model):
        states = packed_forward(model, ids[places], layout)
        (states * weights).sum().backward()
    return states.detach(), gradients(model)


def gradients(model):
    taken = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    assert len(taken) >= 16 and all(gradient.abs().max() > 0 for gradient in taken.values())
    return taken


def assert_same(ours, theirs):
    torch.testing.assert_close(ours[0], theirs[0], rtol=0, atol=1e-5 * float(theirs[0].abs().max()))
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        bound = 1e-5 * max(1.0, float(gradient.abs().max()))
        torch.testing.assert_close(ours[1][name], gradient, rtol=0, atol=bound, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("family", CASES)
def test_a_pack_is_its_rows(family):
    model = make_model(**CASES[family])
    before = model.get_base_model().config._attn_implementation
    ids, weights = ids_and_weights(64)
    rows = by_rows(model, ids, weights)
    assert_same(by_pack(model, ids, weights), rows)
    # The same rows without sharing: prompts repeated, their repetitions without weight.
    places = torch.cat([spans(TREE, row) for row in ROWS])
    first = torch.tensor([int(p) not in places[:i].tolist() for i, p in enumerate(places)])
    apart = PackedLayout.build([len(spans(TREE, row)) for row in ROWS])
    states, taken = by_pack(model, ids, weights[places] * first[:, None], apart, places)
    assert_same((states[first][places[first].argsort()], taken), rows)
    assert model.get_base_model().config._attn_implementation == before


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_checkpointed_layers_get_the_layout_again(family, reentrant):
    model = make_model(**CASES[family])
    ids, weights = ids_and_weights(64)
    rows = by_rows(model, ids, weights)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.train()
    assert_same(by_pack(model, ids, weights), rows)


def test_forward_and_backward_belong_inside_the_mode():
    model = make_model(**CASES["llama"])
    ids, _ = ids_and_weights(64)
    with pytest.raises(RuntimeError, match="inside packed_mode"):
        packed_forward(model, ids, TREE)
    with packed_mode(model):
        loss = packed_forward(model, ids, TREE).sum()
        with pytest.raises(RuntimeError, match="given no layout"):
            model(input_ids=ids[None])
        with pytest.raises(ValueError, match=r"must be \(42,\)"):
            packed_forward(model, ids[:-1], TREE)
    with pytest.raises(RuntimeError, match="inside packed_mode"):
        loss.backward()


def test_under_autocast():
    """float32 weights, bfloat16 matmuls: RoPE turns q and k in float32, and attention wants one dtype."""
    model = make_model(**CASES["llama"])
    ids, _ = ids_and_weights(64)
    with torch.no_grad(), packed_mode(model):
        truth = packed_forward(model, ids, TREE)
        with torch.autocast("cpu", torch.bfloat16):
            assert 0 < (packed_forward(model, ids, TREE).float() - truth).norm() / truth.norm() < 5e-2


def test_another_model_does_not_notice():
    model, other = make_model(**CASES["llama"]), make_model(**CASES["llama"])
    ids, _ = ids_and_weights(64)
    with torch.no_grad():
        before = other(input_ids=ids[None]).logits
        with packed_mode(model):
            assert model.get_base_model().config._attn_implementation == NAME
            assert torch.equal(other(input_ids=ids[None]).logits, before)
        assert torch.equal(model(input_ids=ids[None]).logits, before)


@pytest.mark.parametrize("family", CASES)
def test_every_family_can_be_packed(family):
    assert supports_packing(make_model(lora=False, **CASES[family]).train()) is None


REFUSED = {
    "bloom": ({"hidden_size": 64}, "0 of 2 layers"),
    "mamba": ({}, "0 of 2 layers"),
    "qwen3_next": ({"layer_types": ["linear_attention", "full_attention"]}, "1 of 2 layers"),
    "gpt2": ({"attn_pdrop": 0.1}, "says attn_pdrop=0.1"),
    "gpt_oss": ({"num_local_experts": 2, "num_experts_per_tok": 1, "layer_types": None}, "adds s_aux"),
}


@pytest.mark.parametrize(
    "architecture, dtype", [*((name, torch.float32) for name in REFUSED), ("bloom", torch.bfloat16)]
)
def test_what_cannot_be_packed_is_refused_with_the_reason(architecture, dtype):
    options, reason = REFUSED[architecture]
    model = make_model(lora=False, model_type=architecture, **options).to(dtype).train()
    assert reason in (supports_packing(model) or "")
    assert all(module.training for module in model.modules())
