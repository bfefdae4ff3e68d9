"""Recorded layers with open ends in models: the same training, and what is launched, copied and held."""

import pytest
import torch
from slothrl_kernels import layer_frame
from slothrl_kernels.layer_recorder import Rerun
from test_fuse import IDS, NF4, adapted, assert_same, folders, step  # noqa: F401
from test_fuse_layer import Launches, checkpointed
from test_graphs import Counting, Silent, graphed, took
from transformers import BitsAndBytesConfig

from slothrl import fit_graphs
from slothrl.activations import keep_activations
from slothrl.fit_activations import MicroBatch, Route, fused_mlp_bytes
from slothrl.fit_graphs import graphed_bytes
from slothrl.fit_shape import Shape
from slothrl.graphs import ARRIVALS, graph_layers, graphs_of
from tests.families import COMMON


class Copies(Launches):
    """Counts bytes too, of what is only put elsewhere: copies, pieces joined, what a sum begins with."""

    copied = 0
    COPIES = ("aten.copy_", "aten.clone", "aten.cat", "aten._to_copy")

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        made = super().__torch_dispatch__(operation, types, args, kwargs)
        if not self.inside and isinstance(made, torch.Tensor):
            name, before = str(operation).rpartition(".")[0], args and args[0]
            beta = (kwargs or {}).get("beta", 1)
            onto = name == "aten.addmm" and before.dim() == 2 and beta and before.data_ptr() != made.data_ptr()
            self.copied += made.nbytes if onto or name in self.COPIES else 0
        return made


def model_of(folder):
    base = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.bfloat16)
    model = checkpointed(adapted(folder, torch.bfloat16, base, r=8))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.float() if "lora_" in name else parameter.data
    return model


def counted(model, seen, times, whole=False):
    """(launches, bytes copied) of the first layer's forward and of its backward, over 2 x 304 tokens; or of all layers
    with what is around them, where they keep what `keep_activations` said."""
    decoder = model.get_base_model().model
    x = torch.randn(2, 304, 128, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    tables, found = decoder.rotary_emb(x, torch.arange(304)[None]), []
    for _ in range(times):
        model.zero_grad()
        x.grad = None
        with seen, torch.autocast("cpu", torch.bfloat16):
            seen.count = seen.copied = 0
            if whole:
                y = decoder(inputs_embeds=x, use_cache=False).last_hidden_state
            else:
                y = decoder.layers[0](x, attention_mask=None, position_embeddings=tables, use_cache=False)
            found = [(seen.count, seen.copied)]
        loss = y.sum()
        with seen:
            seen.count = seen.copied = 0
            loss.backward()
        found.append((seen.count, seen.copied))
    return found


@pytest.mark.parametrize("policy", ["layer", "both"])
def test_the_same_training(policy, folders, monkeypatch):  # noqa: F811
    monkeypatch.setattr(layer_frame, "OPEN", 1)
    base = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.float32)
    model = checkpointed(adapted(folders("qwen3"), quantization=base))
    plain, recorder = step(model), graphed(model, Counting())
    keep_activations(model, policy)
    for turn in range(ARRIVALS + 2):
        assert_same(step(model), plain)
        assert took(recorder) == (0 if turn < ARRIVALS else 2 * 5)
    assert recorder.records == 8 and [frame.open for frame in graphs_of(model)._frames.values()] == [True]


def test_how_much_is_launched_copied_and_held(folders, monkeypatch):  # noqa: F811
    """No byte more is copied than without recordings; and `fit` knows the frame."""
    monkeypatch.setattr(layer_frame, "OPEN", 1)
    monkeypatch.setattr(fit_graphs, "OPEN", 1)
    model, seen = model_of(folders("llama")), Copies(monkeypatch)
    recorder = graphed(model, Silent())
    recorder.seen = seen
    (forward, _), (backward, _) = counted(model, seen, ARRIVALS + 3)
    assert forward <= 14 and backward <= 21, (forward, backward)  # one each is attention's on a CPU
    options = {name: COMMON[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size")}
    heads = [COMMON[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")]
    shape = Shape(*options.values(), *heads, matrices=((256, 128),), embedding=0, head=0, rest=0, rank=8)
    batch = MicroBatch(608, 608, 0)
    predicted = graphed_bytes(shape, batch, Route()) - fused_mlp_bytes(shape, batch, 2, quantized=True)
    adapters = sum(p.numel() for p in model.get_base_model().model.layers[0].parameters() if p.requires_grad)
    assert graphs_of(model).nbytes == predicted + 2 * 2 * adapters  # their values, their gradients
    for policy in ("layer", "attention"):
        keep_activations(model, policy)
        graph_layers(model, "off")
        eager = counted(model, seen, 2, whole=True)
        graph_layers(model, "on", Rerun())
        ours = counted(model, seen, ARRIVALS + 3, whole=True)
        assert all(frame.open for frame in graphs_of(model)._frames.values()) and graphs_of(model).recorded
        assert [copied for _, copied in ours] == [copied for _, copied in eager]
