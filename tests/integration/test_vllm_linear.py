"""Whose linear layers generate: the 16-bit view of ours, and vLLM's own. The nf4 GEMM's are in test_shared_model.py."""

import importlib.util
from typing import Any

import pytest
import torch

from slothrl.shared_model import empty_model
from slothrl.tune_command import layer_shapes
from slothrl.vllm_described import described
from slothrl.vllm_linear import NF4
from tests.families import ROWS, make_checkpoint
from tests.integration.shared import check, start

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu holds the GPU's part"),
]


def test_view_of_an_nf4_base(tmp_path):
    """Generating from 16-bit weights with the LoRA folded in: close to the policy, and new after every push."""
    from bitsandbytes.functional import dequantize_4bit

    folder = make_checkpoint("qwen2", tmp_path)
    engine, shared, model = start(folder, "bitsandbytes", view=True)
    check(engine, shared, model, bound=0.2)
    layer = engine.vllm_model.model.layers[0].self_attn.qkv_proj
    assert layer.view.shape == (256, 128) and layer.view.dtype == torch.bfloat16
    # What `slothrl tune` times is what vLLM runs: q, k and v as one, gate and up as one.
    run = {tuple(module.nf4_shape) for module in engine.vllm_model.modules() if hasattr(module, "nf4_shape")}
    assert (
        set(layer_shapes(empty_model(str(folder), torch.bfloat16)))
        == run
        == {(256, 128), (128, 128), (512, 128), (128, 256)}
    )
    projection = model.get_base_model().model.layers[0].self_attn.k_proj
    with torch.no_grad():
        projection.lora_B["default"].weight.normal_(0, 0.1)
    engine.push_lora()
    engine.logprobs(ROWS)
    state = projection.base_layer.weight.quant_state
    weight = dequantize_4bit(projection.base_layer.weight.data, state)
    folded = weight.float() + projection.get_delta_weight("default").float()
    assert (layer.view[128:192].float() - folded).abs().max() <= 2**-7 * folded.abs().max()
    assert engine.holdings()["16-bit view"] == 2 * 2 * (256 * 128 + 128 * 128 + 512 * 128 + 128 * 256)
    engine.close()


@pytest.mark.parametrize("quantization", ["bitsandbytes", None])
def test_vllms_own_layers(quantization, tmp_path, plain_linears):
    """The same over vLLM's linear layers and its machinery for many adapters."""
    engine, shared, model = start(make_checkpoint("qwen2", tmp_path), quantization, linear="vllm")
    check(engine, shared, model, bound=0.1)
    rows = engine.slot.llm.apply_model(lambda module: module)[0].lora_manager.lora_index_to_id
    rows[engine.slot.index], kept = None, rows[engine.slot.index]
    with pytest.raises(RuntimeError, match="moved the adapter out of its place, or dropped it"):
        engine.push_lora()
    rows[engine.slot.index] = kept
    engine.close()


def test_experts_stay_bitsandbytes_own_and_the_plan_says_so():
    """vLLM's own class of experts, not loaded: its loader for them is broken in 0.31, whatever the method."""
    from vllm.model_executor.layers.fused_moe import RoutedExperts

    from slothrl.vllm_linear import _nf4_config

    config = _nf4_config()(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    model = torch.nn.Module()
    for name in ("first", "second"):
        experts: Any = RoutedExperts.__new__(RoutedExperts)
        torch.nn.Module.__init__(experts)
        experts.moe_config = None
        experts.quant_method = config.get_quant_method(experts, f"model.layers.0.mlp.{name}")
        model.add_module(name, experts)
    assert type(model.first.quant_method).__name__ == "BitsAndBytesMoEMethod"
    said = described(model, NF4, view=False)
    assert "(slothrl_nf4); 2 layers of experts by bitsandbytes' own way" in said
    assert "experts" not in described(torch.nn.Linear(2, 2), NF4, view=False)
    assert described(torch.nn.Linear(2, 2), None, view=False, cache="fp8").endswith("; FP8 KV cache (approximate)")
