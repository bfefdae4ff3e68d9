"""Whole layers by recordings in models: which calls take one, when they are made and given up, and the same gradients.

Recordings are re-run here and not CUDA graphs: frames, buckets and addresses are the same.
"""

import copy
import warnings
from dataclasses import replace

import pytest
import torch
from slothrl_kernels.layer_recorder import Rerun
from slothrl_kernels.recorded_layer import bucket
from test_fuse import IDS, NF4, adapted, assert_same, folders, gradients_of, random_b, step  # noqa: F401
from test_fuse_layer import Launches, checkpointed
from test_packed_model import assert_same as assert_same_pack
from test_packed_model import by_pack, by_rows, ids_and_weights, make_model
from transformers import BitsAndBytesConfig

from slothrl.activations import keep_activations
from slothrl.fit_activations import MicroBatch, Route, fused_mlp_bytes
from slothrl.fit_graphs import graphed_bytes, kept_frame_bytes
from slothrl.fit_shape import Shape
from slothrl.fuse import fuse, unfuse
from slothrl.graphs import ARRIVALS, graph_layers, graphs_of
from slothrl.pace import Pace
from tests.families import COMMON, FAMILIES


class Counting(Rerun):
    """Counts replays; refuses to record where it is told to."""

    refuse = ""

    def __init__(self):
        self.records = self.replays = 0

    def record(self, call):
        if self.refuse:
            raise RuntimeError(self.refuse)
        self.records += 1
        replay = super().record(call)

        def counted():
            self.replays += 1
            replay()

        return counted


def graphed(model, recorder=None):
    recorder = recorder or Counting()
    fuse(model)
    assert "2 layers" in graph_layers(model, "on", recorder)[0][1]
    return recorder


def took(recorder):
    replays, recorder.replays = recorder.replays, 0
    return replays


@pytest.mark.parametrize(
    ("family", "policy"), [("llama", "layer"), ("qwen2", "layer"), ("qwen3", "layer"), ("qwen3", "both")]
)
def test_the_same_training(family, policy, folders):  # noqa: F811
    """From the third step on by recordings, also after an optimizer's; 26 tokens in 32 rows."""
    base = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.float32) if family == "qwen3" else None
    model = checkpointed(adapted(folders(family), quantization=base))
    plain, twin = step(model), checkpointed(adapted(folders(family), quantization=base))
    recorder = graphed(model)
    keep_activations(model, policy)
    for turn in range(ARRIVALS + 2):
        assert_same(step(model), plain)
        assert took(recorder) == (0 if turn < ARRIVALS else 2 * (5 if policy == "layer" else 4))
    assert recorder.records == 8 and f"({bucket(IDS.numel())} tokens)" in str(graphs_of(model))
    for m in (model, twin):
        optimizer = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.05)
        optimizer.step() if m is model else (step(m), optimizer.step())
    assert_same(step(model), step(twin))
    assert took(recorder) == 2 * (5 if policy == "layer" else 4) and recorder.records == 8


def test_layers_that_keep_more_and_less(folders, monkeypatch):  # noqa: F811
    """The first keeps everything, the second its attention or its input: each has a recording of its kind."""
    model = checkpointed(adapted(folders("qwen3")))
    plain, recorder = step(model), graphed(model)
    keep_activations(model, "all")
    kept = vars(model)["_slothrl_activations"]
    for attending, turns in ((1, ARRIVALS + 2), (0, 1)):
        monkeypatch.setattr(kept, "_how_many", lambda *_, attending=attending: (1, attending))
        for _ in range(turns):
            took(recorder)
            assert_same(step(model), plain)
        assert took(recorder) == (8 if attending else 9)
    kinds = {kind[1]: len(layers) for kind, layers in graphs_of(model).recorded.items()}
    assert kinds == {True: 1, False: 1}


def test_padded_rows_accumulated_and_without_checkpoints(folders):  # noqa: F811
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
    recorder = graphed(model)
    for _ in range(3):
        assert_same(accumulated(), plain)
    assert took(recorder) == 4 * 2 * 4  # four forwards of what keeps all, two layers, two steps forward, two backward
    with torch.no_grad():
        logits = model(input_ids=IDS[1:], attention_mask=mask[1:], use_cache=False).logits
    torch.testing.assert_close(logits, plain[0], rtol=1e-5, atol=1e-5)
    assert took(recorder) == 4
    unfuse(model)
    assert graphs_of(model) is None
    assert_same(accumulated(), plain)


def test_packs_of_several_sizes():
    """Packs with shared prompts of one bucket, and one larger than the frame."""
    model = make_model(**FAMILIES["qwen3"]).train()
    ids, weights = ids_and_weights(64)
    rows = by_rows(model, ids, weights)
    recorder = graphed(checkpointed(model))
    for turn in range(ARRIVALS + 2):
        assert_same_pack(by_pack(model, ids, weights), rows)
        assert took(recorder) == (0 if turn < ARRIVALS else 10)
    longer = torch.arange(3, 80)[None]
    for turn in range(2 * ARRIVALS + 2):  # the frame grows, and what was recorded before is given up
        model(input_ids=longer, labels=longer, use_cache=False).loss.backward()
        assert took(recorder) == (0 if turn < ARRIVALS else 10)
    model.zero_grad()
    assert "1 recorded (80 tokens)" in str(graphs_of(model))
    assert_same_pack(by_pack(model, ids, weights), rows)


def test_longer_ones_without_checkpoints():
    """What is longer than all before needs the memory that layers held for themselves; the others record anew."""
    model = make_model(**FAMILIES["qwen3"]).train()
    recorder, short, longer = graphed(model), torch.arange(3, 23)[None], torch.arange(3, 80)[None]

    def trained(ids):
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return took(recorder), len(graphs_of(model).owned())

    first = [trained(short) for _ in range(ARRIVALS + 2)]
    assert first == [(0, 0)] * ARRIVALS + [(8, 2)] * 2
    assert graphs_of(model).idle == sum(own.nbytes for own in graphs_of(model).owned()) > 0
    assert [trained(longer), trained(short), trained(longer)] == [(0, 0), (8, 2), (0, 0)]
    assert [trained(longer), trained(short)] == [(8, 2), (8, 2)]
    plain, by_graphs = make_model(**FAMILIES["qwen3"]).train(), gradients_of(model)
    plain(input_ids=short, labels=short, use_cache=False).loss.backward()
    for name, gradient in gradients_of(plain).items():
        torch.testing.assert_close(by_graphs[name], gradient, rtol=1e-4, atol=1e-5)


def test_other_adapters_and_no_gradients(folders):  # noqa: F811
    """No gradient: by a recording, where there is one. No adapter, or another one: not by it."""
    from peft import LoraConfig

    model = checkpointed(adapted(folders("llama")))
    model.add_adapter("other", LoraConfig(r=4, lora_alpha=2, target_modules="all-linear"))
    random_b(model).set_adapter("default")
    plain = step(model)
    with torch.no_grad(), model.disable_adapter():
        without = model(input_ids=IDS, use_cache=False).logits
    recorder = graphed(model)
    for _ in range(ARRIVALS + 1):
        step(model)
    took(recorder)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS, use_cache=False).logits, plain[0], rtol=1e-5, atol=1e-5)
        assert took(recorder) == 4
        with model.disable_adapter():
            torch.testing.assert_close(model(input_ids=IDS, use_cache=False).logits, without, rtol=1e-5, atol=1e-5)
        model.base_model.set_adapter("other")
        model(input_ids=IDS, use_cache=False)
        assert took(recorder) == 0
    model.base_model.set_adapter("default")
    assert_same(step(model), plain)
    assert took(recorder) == 10 and recorder.records == 8


def test_what_cannot_be_recorded_and_copies(folders):  # noqa: F811
    model = checkpointed(adapted(folders("llama")))
    plain = step(model)
    recorder = graphed(model)
    recorder.refuse = "operation not permitted when stream is capturing"
    for _ in range(ARRIVALS):
        step(model)
    with pytest.warns(UserWarning, match="without CUDA graphs from here on: RuntimeError: operation not permitted"):
        assert_same(step(model), plain)
    assert_same(step(model), plain)
    assert took(recorder) == 0 and str(graphs_of(model)).startswith("off: RuntimeError")
    graph_layers(model, "on", Counting())
    for _ in range(ARRIVALS + 1):
        step(model)
    twin = copy.deepcopy(model)
    assert graphs_of(twin) is not graphs_of(model) and not graphs_of(twin).recorded
    for parameter in model.parameters():
        parameter.data = parameter.data * 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(ARRIVALS + 1):
            assert_same(step(twin), plain)
    assert len(graphs_of(twin).recorded) == 1


class Silent(Rerun):
    """A replay is one launch, whatever is in it."""

    def __init__(self):
        self.seen = None

    def record(self, call):
        def replay():
            now, self.seen.inside = self.seen.count, self.seen.inside + 1
            call()
            self.seen.count, self.seen.inside = now + 1, self.seen.inside - 1

        return replay


def test_how_much_is_launched_and_held(folders, monkeypatch):  # noqa: F811
    """A layer that launches 95 times without graphs (`test_how_much_a_layer_launches`); and `fit` knows its frame."""
    base = BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.bfloat16)
    model = checkpointed(adapted(folders("llama"), torch.bfloat16, base, r=8))
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.float() if "lora_" in name else parameter.data
    recorder = graphed(model, Silent())
    decoder, seen = model.get_base_model().model, Launches(monkeypatch)
    recorder.seen = seen
    x = torch.randn(2, 304, 128).bfloat16().requires_grad_()
    tables = decoder.rotary_emb(x, torch.arange(304)[None])
    for _ in range(ARRIVALS + 3):
        model.zero_grad()
        x.grad = None
        with seen, torch.autocast("cpu", torch.bfloat16):
            seen.count = 0
            y = decoder.layers[0](x, attention_mask=None, position_embeddings=tables, use_cache=False)
            forward = seen.count
        loss = y.sum()
        with seen:
            seen.count = 0
            loss.backward()
    assert forward <= 6 and seen.count <= 12, (forward, seen.count)
    options = {name: COMMON[name] for name in ("num_hidden_layers", "hidden_size", "intermediate_size")}
    heads = [COMMON[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim", "vocab_size")]
    shape = Shape(*options.values(), *heads, matrices=((256, 128),), embedding=0, head=0, rest=0)
    batch = MicroBatch(608, 608, 0)
    predicted = graphed_bytes(shape, batch, Route()) - fused_mlp_bytes(shape, batch, 2, quantized=True)
    adapters = sum(p.numel() for p in decoder.layers[0].parameters() if p.requires_grad)
    assert graphs_of(model).nbytes == predicted + 608 * 2 * 32 * 2 + 4 * adapters  # tables, gradients
    held, whole = graphs_of(model).nbytes, replace(shape, rank=8)
    model.get_base_model().gradient_checkpointing_disable()
    for _ in range(ARRIVALS + 1):
        with torch.autocast("cpu", torch.bfloat16):
            decoder.layers[0](x, attention_mask=None, position_embeddings=tables, use_cache=False).sum().backward()
    (own,) = graphs_of(model).owned()
    beside = 608 * (8 + 2 * (2 * 128 + 7 * 8))  # what a layer holds that it would not without graphs
    assert own.nbytes == beside + 608 * 2 * (128 + 2 * 256 + 128 + 2 * 64) + 2 * adapters
    predicted = kept_frame_bytes(whole, batch, Route()) - whole.layers * beside
    assert graphs_of(model).nbytes - held - own.nbytes == predicted + 608 * 2 * 32 * 2 + 2 * adapters


def test_wishes(folders):  # noqa: F811
    model = adapted(folders("llama"))
    assert graph_layers(model, "auto") == [("graphs", "none: there is no GPU")]
    assert graph_layers(model, "on", Rerun()) == [("graphs", "none: no layer runs as one step")]
    assert graph_layers(model, "off") == [("graphs", "none (model.graphs=off)")]
    fuse(model)
    assert "beside vLLM" in graph_layers(model, "auto", Rerun(), beside_vllm=True)[0][1] and graphs_of(model) is None
    assert "CUDA graphs of" in graph_layers(model, "on", Rerun(), beside_vllm=True)[0][1]
    assert graphs_of(model) is not None
    with pytest.raises(ValueError, match="auto, on, off"):
        graph_layers(model, "maybe")


def test_who_waits():
    pace = Pace()
    pace.samples = [(3.0, 3.1), (3.0, 9.0)]
    assert pace.waits_for_host() is None
    pace.samples.append((2.8, 2.9))
    assert pace.waits_for_host() is True and str(pace).startswith("3.00 ms of the host, 3.10 ms of the device")
    pace.samples = [(1.0, 3.0)] * 2 + [(1.0, 1.0)]
    assert pace.waits_for_host() is False
