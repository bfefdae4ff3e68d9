"""QK-norm and RoPE joined in a Qwen3 of the 0.6B's heads: as near to float32 as plain bf16, over rows and a pack."""

import copy

import pytest
import torch
from slothrl_kernels import PackedLayout
from transformers import Qwen3Config, Qwen3ForCausalLM

from slothrl.fuse import fuse
from slothrl.packed_model import packed_forward, packed_mode

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LAYOUT = PackedLayout.build([100, 200, 150, 62], [-1, 0, 0, -1], device="cuda" if torch.cuda.is_available() else "cpu")


def make_model():
    torch.manual_seed(0)
    options = {"hidden_size": 1024, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 1024}
    heads = {"head_dim": 128, "num_attention_heads": 16, "num_key_value_heads": 8}
    model = Qwen3ForCausalLM(Qwen3Config(**options, **heads)).to("cuda", torch.bfloat16)
    for name, parameter in model.named_parameters():
        if "_norm" in name:
            parameter.data += 0.3 * torch.rand_like(parameter)
    return model.train()


def step(model, packed):
    """Hidden states, and the gradients of the layers' parameters, in float64."""
    model.zero_grad()
    ids = torch.arange(LAYOUT.tokens, device="cuda") * 7 % 1000 + 3
    if packed:
        with packed_mode(model):
            hidden = packed_forward(model, ids, LAYOUT, impl="triton")
            (hidden * torch.linspace(-1, 1, hidden.size(1), device="cuda")).sum().backward()
    else:
        hidden = model.model(input_ids=ids.view(2, -1), use_cache=False).last_hidden_state
        (hidden * torch.linspace(-1, 1, hidden.size(2), device="cuda")).sum().backward()
    found = {name: p.grad.double() for name, p in model.named_parameters() if "layers" in name}
    return {"hidden": hidden.detach().double(), **found}


def distances(found, exact):
    return {name: ((found[name] - x).norm() / x.norm()).item() for name, x in exact.items()}


def names_of(node, seen):
    if node is not None and node not in seen:
        seen.add(node)
        for parent, _ in node.next_functions:
            names_of(parent, seen)
    return {type(n).__name__ for n in seen}


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "pack"])
def test_as_near_to_float32_as_plain_bf16(packed):
    model = make_model()
    exact = step(copy.deepcopy(model).float(), packed)
    plain = distances(step(model, packed), exact)
    report = fuse(model)
    assert report.fused["QK-norm + RoPE"] == 2 and report.fused["RMSNorm"] == 5 and not report.fused["RoPE"]
    ours = distances(step(model, packed), exact)
    for name, distance in ours.items():
        assert distance <= 2 * plain[name] + 2e-3, (name, distance, plain[name])


def test_one_kernel_runs():
    model = make_model()
    fuse(model)
    logits = model(input_ids=torch.arange(8, device="cuda")[None], use_cache=False).logits
    names = names_of(logits.grad_fn, set())
    assert "_QKNormRopeBackward" in names and "_RopeBackward" not in names
