"""Whose linear layers generate: the 16-bit view of ours, and vLLM's own. The nf4 GEMM's are in test_shared_model.py."""

import importlib.util

import pytest
import torch

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

    engine, shared, model = start(make_checkpoint("qwen2", tmp_path), "bitsandbytes", view=True)
    check(engine, shared, model, bound=0.2)
    layer = engine.vllm_model.model.layers[0].self_attn.qkv_proj
    assert layer.view.shape == (256, 128) and layer.view.dtype == torch.bfloat16
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
