"""Embeddings in the host's memory on a GPU: each fact that this rests on by itself, whole models to the bit, what
memory it gives back, and how long the gather takes. About 30 s."""

import copy
import gc
import json
import time
import weakref
from statistics import median

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import embedding

from slothrl.fuse import fuse
from slothrl.graphs import ARRIVALS, graph_layers, graphs_of
from slothrl.host_embeddings import HostCopy, PinnedMemory, in_host, move_embeddings, return_embeddings
from slothrl.memory import measure
from tests.gpu.test_fuse_gpu import SHAPES, adapted, random_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SHAPE = "8b, 2 layers, 32K tokens"
SHAPES[SHAPE] = {**SHAPES["8b"], "num_hidden_layers": 2, "vocab_size": 32768}
NBYTES = 32768 * 4096 * 2  # 256 MiB: "auto" moves them, and torch pins no more
TOLD = "268 MB in the host's memory (268 MB pinned), read from there"


# --- what it rests on ------------------------------------------------------------------------------------------------


@pytest.fixture
def mapped():
    """(a copy of some weight, the tensor over it on the GPU, the weight)."""
    weight = torch.randn(1000, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(0)).bfloat16()
    pinning = PinnedMemory()
    held = pinning.copy(weight)
    before = torch.cuda.memory_allocated()
    view = pinning.bytes_on(weight.device, held).view(weight.dtype).view(weight.shape)
    assert torch.cuda.memory_allocated() == before, "torch.as_tensor copied the memory to the GPU"
    return held, view, weight


def test_torch_takes_pinned_memory_for_a_cuda_tensor(mapped):
    held, view, weight = mapped
    assert held.memory.is_pinned(), "torch.empty(pin_memory=True) is not pinned"
    assert view.device == weight.device, view.device
    assert view.data_ptr() == held.memory.data_ptr(), "torch.as_tensor copied the memory"
    parameter = nn.Parameter(weight.clone(), requires_grad=False)
    parameter.data = view
    assert parameter.data_ptr() == held.memory.data_ptr() and parameter.is_cuda


def test_kernels_read_it(mapped):
    held, view, weight = mapped
    assert torch.equal(view, weight), "a kernel reads other values"
    assert torch.equal(view + 1, weight + 1)
    held.memory[3] = 7
    torch.cuda.synchronize()
    assert view[3].eq(7).all(), "what the host writes is not seen: the memory was copied"
    view[4] = 5
    torch.cuda.synchronize()
    assert held.memory[4].eq(5).all(), "what the GPU writes does not arrive"


def test_embedding_reads_it_with_any_number_of_tokens(mapped):
    _, view, weight = mapped
    for tokens in (1, 7, 4096, 70000):
        ids = torch.randint(0, 1000, (tokens,), device="cuda")
        assert torch.equal(embedding(ids, view), embedding(ids, weight)), tokens


def test_copies_out_of_it(mapped):
    """Each goes by another way of the driver: to the host, within the device, one value."""
    _, view, weight = mapped
    assert torch.equal(view.cpu(), weight.cpu()), "copied to the host as a tensor of the device"
    assert torch.equal(view.clone(), weight), "copied within the device"
    assert torch.equal(view.float(), weight.float()), "cast"
    assert torch.equal(view[:, ::2].contiguous(), weight[:, ::2].contiguous()), "copied by a kernel"
    assert view[5, 6].item() == weight[5, 6].item(), "one value"
    assert view.to("cuda").data_ptr() == view.data_ptr(), "`to` the device where it already is"


def test_a_cuda_graph_reads_it(mapped):
    _, view, weight = mapped
    ids = torch.arange(64, device="cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        embedding(ids, view)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = embedding(ids, view)
    ids += 100
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(rows, weight[100:164])


def test_the_tensor_keeps_the_memory():
    held = HostCopy(torch.full((64, 64), 3.0, pin_memory=True))
    gone, view = weakref.ref(held), PinnedMemory().bytes_on(torch.device("cuda", 0), held).view(torch.float32)
    del held
    gc.collect()
    assert gone() is not None and view.eq(3).all()
    del view
    gc.collect()
    assert gone() is None, "the memory stays when the tensor is gone"


# --- whole models ----------------------------------------------------------------------------------------------------


def ids_of(rows, length):
    return torch.randint(0, 32768, (rows, length), device="cuda", generator=torch.Generator("cuda").manual_seed(2))


def step(model, ids) -> dict[str, torch.Tensor]:
    """Logits, loss and gradients by name; attention in plain torch, which adds up in one order."""
    model.zero_grad()
    with sdpa_kernel(SDPBackend.MATH):
        with torch.autocast("cuda", torch.bfloat16):
            out = model(input_ids=ids, labels=ids, use_cache=False)
        out.loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": out.logits.detach().clone(), "loss": out.loss.detach().clone(), **found}


def one_token(model) -> torch.Tensor:
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        return model(input_ids=ids_of(1, 1), use_cache=False).logits


@pytest.mark.parametrize("kind", ["modules", "fused", "fused, graphs"])
def test_a_model_to_the_bit(kind):
    """With checkpointing: what the device's own steps give twice the host's give too, and the device's after them."""
    model, ids = adapted(SHAPE), ids_of(2, 512)
    weight = model.get_input_embeddings().weight
    if kind != "modules":
        fuse(model)
    if kind.endswith("graphs"):
        graph_layers(model, "on")
    for _ in range(ARRIVALS + 3 if kind.endswith("graphs") else 1):
        step(model, ids)
    first, second, single = step(model, ids), step(model, ids), one_token(model)
    repeated = [name for name in first if torch.equal(first[name], second[name])]
    assert {"logits", "loss"} <= set(repeated) and len(repeated) >= 10, "the device does not repeat itself"
    assert len(first) == 2 + 2 * 2 * 7 and all(first[name].abs().max() > 0 for name in first)

    before = torch.cuda.memory_allocated()
    assert move_embeddings(model, "auto") == [("embeddings", TOLD)]
    assert before - torch.cuda.memory_allocated() == NBYTES == weight.nbytes and in_host(weight)
    for _ in range(2):
        moved = step(model, ids)
        assert [name for name in repeated if not torch.equal(moved[name], first[name])] == []
    assert torch.equal(one_token(model), single)
    graphs = graphs_of(model)
    assert kind != "fused, graphs" or (graphs is not None and not graphs.stopped and len(graphs.recorded) >= 1)

    del moved
    before = torch.cuda.memory_allocated()
    assert return_embeddings(model) and not in_host(weight) and not return_embeddings(model)
    assert torch.cuda.memory_allocated() - before == NBYTES
    back = step(model, ids)
    assert [name for name in repeated if not torch.equal(back[name], first[name])] == []


def test_moved_before_all_else():
    """The order of a run: moved, fused, recorded; the same model whose embeddings stayed gives the same logits."""
    logits, ids = [], ids_of(2, 512)
    for where in ("device", "host"):
        model = adapted(SHAPE)
        move_embeddings(model, where)
        fuse(model)
        graph_layers(model, "on")
        for _ in range(ARRIVALS + 3):
            found = step(model, ids)
        assert in_host(model.get_input_embeddings().weight) == (where == "host")
        logits.append(found["logits"])
        del model, found
        gc.collect()
    assert ((logits[1] - logits[0]).norm() / logits[0].norm()).item() < 1e-3


def test_what_is_saved_and_counted(tmp_path):
    model = random_model(SHAPE, "cuda", 64)
    name, weight = "model.embed_tokens.weight", model.get_input_embeddings().weight
    values, parts = weight.data.cpu(), {h.name: h.bytes for h in measure(model) if h.part}
    move_embeddings(model, "host")
    kept = {h.name: h.bytes for h in measure(model) if h.part}
    assert parts.pop("embeddings") == NBYTES and kept == parts
    state = model.state_dict()[name]
    assert state.data_ptr() == weight.data_ptr() and torch.equal(state.cpu(), values)
    save_file({name: state}, tmp_path / "saved.safetensors")
    assert torch.equal(load_file(tmp_path / "saved.safetensors")[name], values)
    model.load_state_dict({name: state + 1}, strict=False)
    assert in_host(weight) and torch.equal(weight.cpu(), values + 1)
    twin = copy.deepcopy(weight)
    assert twin.is_cuda and not in_host(twin) and torch.equal(twin, weight)


def test_two_models():
    one, other = (random_model("tiny", "cuda", 64) for _ in range(2))
    ids = ids_of(2, 32) % 1024
    before = other(ids).logits
    move_embeddings(one, "host")
    assert in_host(one.get_input_embeddings().weight) and not in_host(other.get_input_embeddings().weight)
    assert torch.equal(one(ids).logits, before) and torch.equal(other(ids).logits, before)
    move_embeddings(other, "host")
    one.get_input_embeddings().weight.data.mul_(0)
    assert torch.equal(other(ids).logits, before) and not torch.equal(one(ids).logits, before)
    del one
    gc.collect()
    assert torch.equal(other(ids).logits, before)


# --- time ------------------------------------------------------------------------------------------------------------


class Embedding(nn.Module):
    """A table and nothing else, as `move_embeddings` asks for it."""

    def __init__(self, vocabulary, width):
        super().__init__()
        values = torch.randn(vocabulary, width, device="cuda", dtype=torch.bfloat16)
        self.table = nn.Embedding.from_pretrained(values, freeze=True)

    def get_input_embeddings(self):
        return self.table


def milliseconds(module, tokens, turns=15) -> float:
    """Median of a gather; other tokens each time, so that no cache has them."""
    taken = []
    for ids in torch.randint(0, module.num_embeddings, (turns, tokens), device="cuda"):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        module(ids)
        end.record()
        end.synchronize()
        taken.append(start.elapsed_time(end))
    return median(taken[3:])


def test_time_of_the_gather(capsys):
    model = Embedding(128256, 4096)
    ids = torch.randint(0, 128256, (4096,), device="cuda")
    rows, nbytes = model.table(ids), 4096 * 4096 * 2
    device = [milliseconds(model.table, tokens) for tokens in (1, 4096)]
    start = time.perf_counter()
    move_embeddings(model, "host")
    moving = time.perf_counter() - start
    assert torch.equal(model.table(ids), rows)
    host = [milliseconds(model.table, tokens) for tokens in (1, 4096)]
    with capsys.disabled():
        print(
            f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}: moving 128,256 x 4,096 took {moving:.2f} s"
        )
        for tokens, there, here in zip((1, 4096), host, device, strict=True):
            print(f"  {tokens:,} tokens: {there:.3f} ms from the host, {here:.3f} from the device")
        print(f"  {nbytes / host[1] / 1e6:.1f} GB/s from the host")
    assert host[1] < 10, "slower than 3.4 GB/s: this is not PCIe"


def test_a_run(tmp_path, monkeypatch, capsys):
    """`model.embeddings` from the command line to the plan, over two steps that are the same."""
    pytest.importorskip("trl")
    from slothrl.train import main
    from tests.families import make_checkpoint

    monkeypatch.chdir(tmp_path)
    folder, losses = make_checkpoint("llama", tmp_path / "model"), {}
    for where in ("device", "host"):
        arguments = ["algo=sft", "model=hub", f"model.name={folder}", "model.fuse=off", f"model.embeddings={where}"]
        arguments += ["reward=none", "data.train_size=40", "data.eval_size=4", "data.max_prompt_length=128"]
        arguments += ["trainer.max_steps=2", "trainer.per_device_train_batch_size=8", "logger.progress=false"]
        assert main([*arguments, f"output_dir={where}"]) == 0
        said = " ".join(capsys.readouterr().out.replace("│", "").split())
        assert ("read from there" if where == "host" else "on the device (model.embeddings=device)") in said
        logged = [json.loads(line) for line in (tmp_path / where / "metrics.jsonl").read_text().splitlines()]
        losses[where] = [line["loss"] for line in logged if "loss" in line]
        assert (tmp_path / where / "adapter" / "adapter_model.safetensors").is_file()
    assert len(losses["host"]) == 2 and losses["host"] == pytest.approx(losses["device"], rel=1e-2)
