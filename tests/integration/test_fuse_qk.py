"""QK-norm and RoPE joined by `fuse`: copies, norms called elsewhere, watchers, and what must be left alone."""

import copy

import pytest
import torch
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3Config, Qwen3ForCausalLM, apply_rotary_pos_emb

from slothrl.fuse import fuse, unfuse

IDS = torch.tensor([[5, 9, 2, 7, 3, 8]])
JOINED = "QK-norm + RoPE"


class ScaledBetween(Qwen3Attention):
    """Does something to q between its norm and its rotation."""

    def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q = 2.0 * self.q_norm(self.q_proj(hidden_states).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(hidden_states).view(shape)).transpose(1, 2)
        v = self.v_proj(hidden_states).view(shape).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *position_embeddings)
        out, _ = modeling_qwen3.eager_attention_forward(self, q, k, v, attention_mask, self.scaling)
        return self.o_proj(out.reshape(*hidden_states.shape[:-1], -1)), None


def make_model():
    torch.manual_seed(0)
    options = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64, "head_dim": 8}
    model = Qwen3ForCausalLM(Qwen3Config(**options, num_attention_heads=4, num_key_value_heads=2))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data += torch.rand_like(parameter)
    return model.train()


def step(model):
    """Logits, and the gradients of the norms' weights and of one projection."""
    model.zero_grad()
    logits = model(input_ids=IDS, use_cache=False).logits
    (logits * torch.linspace(-1, 1, logits.numel()).view_as(logits)).sum().backward()
    named = dict(model.named_parameters())
    wanted = [n for n in named if "_norm" in n or "layers.0.self_attn.q_proj" in n]
    return [logits.detach(), *(named[n].grad.clone() for n in wanted)]


def test_values_gradients_and_back():
    model = make_model()
    plain = step(model)
    report = fuse(model)
    assert report.fused == {JOINED: 2, "RMSNorm": 5} and report.difference < 1e-6
    torch.testing.assert_close(step(model), plain)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    torch.testing.assert_close(step(model), plain)
    model.gradient_checkpointing_disable()
    unfuse(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert all(map(torch.equal, step(model), plain))


def test_a_norm_called_elsewhere_is_a_norm():
    model = make_model()
    norm, x = model.model.layers[0].self_attn.q_norm, torch.randn(1, 3, 4, 8)
    expected = norm(x)
    fuse(model)
    torch.testing.assert_close(norm(x), expected)


def test_a_watched_norm_is_a_norm():
    model, seen = make_model(), []
    plain = step(model)
    norm = model.model.layers[0].self_attn.q_norm
    fuse(model)
    norm.register_forward_hook(lambda module, args, output: seen.append((args[0], output)))
    torch.testing.assert_close(step(model), plain)
    torch.testing.assert_close(seen[0][1], type(norm).forward(norm, seen[0][0]))


def test_a_deep_copy_runs_on_its_own_weights():
    model = make_model()
    fuse(model)
    before, other = step(model), copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].self_attn.q_norm.weight.add_(1.0)
    changed = step(other)
    assert not torch.allclose(changed[0], before[0], atol=1e-3)
    torch.testing.assert_close(step(model), before)
    unfuse(other)
    torch.testing.assert_close(step(other), changed)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_lies_between_norm_and_rotation_is_not_joined():
    model = make_model()
    for layer in model.model.layers:
        layer.self_attn.__class__ = ScaledBetween
    plain = step(model)
    report = fuse(model)
    assert report.fused == {"RoPE": 2, "RMSNorm": 9}
    torch.testing.assert_close(step(model), plain)
