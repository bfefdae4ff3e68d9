"""Bytes counted from real modules against numbers made by hand, and the activation formula against autograd."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import LlamaConfig, LlamaForCausalLM

from slothrl.memory import Holding, activation_bytes, measure, saved_activations, table

V, H, M, LAYERS, KV = 160, 64, 128, 2, 32  # vocabulary, hidden, MLP, layers, width of the keys
LAYER = 2 * H * H + 2 * KV * H + 3 * M * H  # weights of one layer's seven projections


def llama(tied: bool = False, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=H,
        intermediate_size=M,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        dtype=dtype,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).to(dtype)


def lora(model: nn.Module, rank: int = 4) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=rank, target_modules="all-linear", task_type="CAUSAL_LM")).train()


def frozen(model: nn.Module) -> nn.Module:
    return model.requires_grad_(False)


def by_name(holdings: list[Holding]) -> dict[str, int]:
    return {holding.name: holding.bytes for holding in holdings if holding.part}


def test_base_weights_by_kind():
    found = by_name(measure(frozen(llama(dtype=torch.bfloat16))))
    assert found.pop("buffers") <= 2 * 4 * 8  # the rotary tables, a handful of numbers
    assert found == {
        "embeddings": 2 * V * H,
        "weights": 2 * LAYERS * LAYER,
        "norms, biases": 2 * (2 * LAYERS + 1) * H,
        "head": 2 * V * H,
    }


def test_tied_weights_count_once():
    found = by_name(measure(frozen(llama(tied=True))))
    assert found["embeddings = head (tied)"] == 4 * V * H
    assert "head" not in found and "embeddings" not in found


def test_one_tensor_under_two_names_counts_once():
    layer = nn.Linear(8, 8, bias=False)
    assert by_name(measure(nn.ModuleList([layer, layer]))) == {"trainable weights": 4 * 64}


def test_windows_into_one_storage_count_by_their_own_size():
    """As safetensors may load them: every weight a view of one mapped file."""
    storage = torch.zeros(1000)
    one, two = nn.Module(), nn.Module()
    one.weight = nn.Parameter(storage[:100].view(10, 10), requires_grad=False)
    two.weight = nn.Parameter(storage[100:300].view(20, 10), requires_grad=False)
    assert by_name(measure(nn.ModuleList([one, two]))) == {"weights": 4 * 300}


def test_lora_gradients_and_adam():
    model = lora(llama(dtype=torch.bfloat16))
    rank = 4
    values = LAYERS * rank * (2 * (H + H) + 2 * (H + KV) + 3 * (H + M))
    found = by_name(measure(model))
    assert found["LoRA"] == 4 * values
    assert "gradients" not in found and "trainable weights" not in found

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.arange(6)[None], labels=torch.arange(6)[None]).loss.backward()
    assert "optimizer state" not in by_name(measure(model, optimizer))
    optimizer.step()
    found = by_name(measure(model, optimizer))
    steps = 4 * sum(p.requires_grad for p in model.parameters())
    assert found["gradients"] == 4 * values
    assert found["optimizer state"] == 2 * 4 * values + steps


@pytest.mark.parametrize("double", [False, True])
def test_nf4(double):
    """Half a byte a weight; one absmax a block of 64, itself 8-bit in blocks of 256 with double quantisation."""
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear4bit(256, 512, bias=False, quant_type="nf4", compress_statistics=double)
    layer.weight = bnb.nn.Params4bit(
        torch.randn(512, 256), requires_grad=False, quant_type="nf4", compress_statistics=double
    )
    layer = layer.to("cuda" if torch.cuda.is_available() else "cpu")
    blocks = 512 * 256 // 64
    code = 16 * 4
    state = code + (blocks + 4 * blocks // 256 + 4 * 256 + 4 if double else 4 * blocks)
    holdings = measure(layer)
    assert by_name(holdings) == {"4-bit weights": 512 * 256 // 2, "quantisation state": state}
    assert "0.13M values in 1 tensors" in holdings[0].detail


def test_device_figures_on_cuda_only():
    model = nn.Linear(4, 4)
    assert all(holding.part for holding in measure(model))
    if torch.cuda.is_available():
        outside = {h.name: h.bytes for h in measure(model.cuda()) if not h.part}
        assert list(outside) == ["torch allocated", "torch reserved", "driver used"]
        assert 0 < outside["torch allocated"] <= outside["torch reserved"] <= outside["driver used"]


def test_table_sums_the_parts():
    text = table([Holding("a", 1_500_000), Holding("bb", 500_000, "two"), Holding("device", 9_000_000, part=False)])
    assert text.splitlines() == [
        "a               1.50 MB",
        "bb              0.50 MB  two",
        "-----------------------",
        "sum             2.00 MB",
        "device          9.00 MB",
    ]


# --- activations ----------------------------------------------------------------------------------------------------


def test_saved_activations_by_hand():
    layer = nn.Linear(8, 16)
    x = torch.randn(5, 8, requires_grad=True)
    with saved_activations(layer) as saved:
        y = layer(x).exp()
        view = (y[:2] * y[:2]).sum()  # a view keeps all of y, which exp keeps already
    assert saved.bytes == 4 * (5 * 8 + 5 * 16)
    view.backward()
    assert layer.weight.grad is not None


def test_saved_activations_sees_only_inputs_of_checkpoints():
    layer = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU())
    x = torch.randn(5, 8, requires_grad=True)
    with saved_activations(layer) as saved:
        y = checkpoint(layer, x, use_reentrant=False)
    assert saved.bytes == 4 * 5 * 8
    y.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activation_formula(dtype, checkpointing):
    rank, tokens = 4, 3 * 200
    model = lora(llama(dtype=dtype), rank)
    if checkpointing:
        model.get_base_model().gradient_checkpointing_enable()
        model.get_base_model().enable_input_require_grads()
    with saved_activations(model) as saved, torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        hidden = model.get_base_model().model(torch.randint(V, (3, 200)), use_cache=False)
    estimate = activation_bytes(model.config, tokens, checkpointing, rank)
    if checkpointing:  # the recomputed layer is not seen
        estimate -= activation_bytes(model.config, tokens, False, rank) // LAYERS
    assert saved.bytes == pytest.approx(estimate, rel=0.03)
    del hidden


def test_a_quantised_base_shares_the_inputs_of_its_adapters():
    config = llama(dtype=torch.bfloat16).config
    plain = activation_bytes(config, 10, False)
    config.quantization_config = {"load_in_4bit": True}
    assert plain - activation_bytes(config, 10, False) == 10 * LAYERS * 2 * (3 * H + H)
