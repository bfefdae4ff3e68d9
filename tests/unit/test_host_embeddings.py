"""What of embeddings may be moved to the host's memory, and the way there and back, over a stand-in for pinned memory
that works as it does, through numpy's array interface; what a GPU does with it is in tests/gpu."""

import copy
import gc
import weakref

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

from slothrl import host_embeddings
from slothrl.host_embeddings import (
    LEAST,
    HostCopy,
    PinnedMemory,
    in_host,
    move_embeddings,
    pinned_bytes,
    return_embeddings,
    wanted,
)
from slothrl.memory import measure
from slothrl.models import parameter_bytes

V, H = 96, 32


class HereCopy(HostCopy):
    __array_interface__ = HostCopy.__cuda_array_interface__


class Here(PinnedMemory):
    """The same calls on a CPU: a tensor over memory that belongs to an object with an array interface."""

    device_type = "cpu"

    def __init__(self) -> None:
        self.finished = self.gone = 0

    def copy(self, weight):
        return HereCopy(weight.clone())

    def bytes_on(self, device, held):
        return torch.from_numpy(np.asarray(held))

    def let_go(self):
        self.gone += 1

    def finish(self, device):
        self.finished += 1


def llama(tied: bool = False, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=V, hidden_size=H, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=tied, dtype=dtype,
    )  # fmt: skip
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(dtype).requires_grad_(False)


def lora(model: nn.Module, **options) -> nn.Module:
    options = {"target_modules": ["q_proj", "down_proj"], **options}
    wrapped = get_peft_model(model, LoraConfig(r=4, init_lora_weights=False, task_type="CAUSAL_LM", **options))
    wrapped.enable_input_require_grads()
    return wrapped.train()


def table(model) -> nn.Embedding:
    return model.get_input_embeddings()


def step(model) -> list[torch.Tensor]:
    """The logits and every gradient."""
    model.zero_grad()
    ids = torch.arange(2 * 24).view(2, 24) * 7 % V
    out = model(input_ids=ids, labels=ids)
    out.loss.backward()
    return [out.logits.detach().clone(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def why(rows) -> str:
    ((what, how),) = rows
    assert what == "embeddings"
    return how.removeprefix("on the device: ")


# --- there and back --------------------------------------------------------------------------------------------------


def test_there_and_back_to_the_bit():
    torch.manual_seed(1)
    model, here = lora(llama()), Here()
    weight, values = table(model).weight, table(model).weight.data.clone()
    device, before = weakref.ref(weight.data.untyped_storage()), step(model)
    saved = copy.deepcopy(model.state_dict())
    assert (
        why(move_embeddings(model, "host", pinning=here)) == "0 MB in the host's memory (0 MB pinned), read from there"
    )
    assert table(model).weight is weight and in_host(weight) and not in_host(model.get_output_embeddings().weight)
    gc.collect()
    assert device() is None and here.gone == 1  # nobody keeps the device's memory
    assert len(before) == 5 and all(torch.equal(a, b) for a, b in zip(step(model), before, strict=True))
    assert all(torch.equal(now, saved[name]) for name, now in model.state_dict().items())
    assert "read from there" in why(move_embeddings(model, "host", pinning=here))  # a second time: as it is
    address = weight.data_ptr()
    assert return_embeddings(model, here) and here.finished == 1
    assert weight.data_ptr() != address and not in_host(weight) and torch.equal(weight, values)
    assert all(torch.equal(a, b) for a, b in zip(step(model), before, strict=True))
    assert not return_embeddings(model, here) and not return_embeddings(nn.Linear(2, 2), here)
    move_embeddings(model, "host", pinning=here)
    assert why(move_embeddings(model, "device", pinning=here)) == "on the device (model.embeddings=device)"
    assert not in_host(weight) and torch.equal(weight, values)


def test_an_embedding_that_scales():
    """Gemma's module multiplies what it reads; it is the same module."""
    config = Gemma3TextConfig(
        vocab_size=V, hidden_size=H, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, tie_word_embeddings=False, pad_token_id=0, dtype=torch.bfloat16,
    )  # fmt: skip
    model = Gemma3ForCausalLM(config).to(torch.bfloat16).requires_grad_(False).eval()
    ids = torch.arange(1, 17)[None]
    before = model(ids).logits
    assert "read from there" in why(move_embeddings(model, "host", pinning=Here()))
    assert type(table(model)) is not nn.Embedding and in_host(table(model).weight)
    assert torch.equal(model(ids).logits, before) and before.isfinite().all()


def test_the_memory_goes_with_the_model():
    model, other = llama(), llama(seed=1)
    values = table(other).weight.data.clone()
    move_embeddings(model, "host", pinning=Here())
    twin = copy.deepcopy(model)  # on the device, as a copy of any CUDA tensor is
    assert in_host(table(model).weight) and not in_host(table(twin).weight) and not in_host(table(other).weight)
    assert torch.equal(table(twin).weight, table(model).weight) and torch.equal(table(other).weight, values)
    (held,) = host_embeddings._held.values()
    gone = weakref.ref(held)
    view = table(model).weight.data[:3]
    del held, model
    gc.collect()
    assert gone() is not None and torch.equal(view, table(twin).weight[:3])  # as long as anybody reads it
    del view
    gc.collect()
    assert gone() is None and len(host_embeddings._held) == 0


def test_memory_is_counted_where_it_is():
    model = lora(llama())
    before, bytes_before = measure(model), parameter_bytes(model)
    move_embeddings(model, "host", pinning=Here())
    after, bytes_after = measure(model), parameter_bytes(model)
    assert bytes_after == (bytes_before[0] - 2 * V * H, *bytes_before[1:])
    assert [h for h in before if h.name != "embeddings"] == [h for h in after if h.part]
    (host,) = (h for h in after if not h.part)
    assert (host.name, host.bytes) == ("embeddings, in the host's memory", 2 * V * H)


def test_what_torch_is_told_of_the_memory():
    """Numba's CUDA Array Interface, version 3: all of it as bytes, contiguous, and writable (torch takes no other)."""
    memory = torch.arange(12.0).view(3, 4)
    described = HostCopy(memory).__cuda_array_interface__
    assert described == {
        "shape": (48,), "typestr": "|u1", "data": (memory.data_ptr(), False), "strides": None, "version": 3,
    }  # fmt: skip
    assert [pinned_bytes(n) for n in (1, 2**28, 2**28 + 1, 128256 * 4096 * 2)] == [1, 2**28, 2**29, 2**30]


# --- what stays ------------------------------------------------------------------------------------------------------


def trained(model):
    table(model).weight.requires_grad_(True)
    return model


def renormed(model):
    table(model).max_norm = 1.0
    return model


def part_of_more(model):
    table(model).weight.data = torch.zeros(2 * V, H, dtype=torch.bfloat16)[:V]
    return model


def sharing(model):
    model.lm_head.weight.data = table(model).weight.data
    return model


def transposed(model):
    table(model).weight.data = torch.zeros(H, V, dtype=torch.bfloat16).T
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: llama(tied=True), "tied to lm_head.weight"),
        (lambda: sharing(llama()), "tied to lm_head.weight"),
        (lambda: lora(llama(tied=True)), "tied to base_model.model.lm_head.weight"),
        (lambda: trained(llama()), "they are trained"),
        (lambda: lora(llama(), target_modules=["q_proj", "embed_tokens"]), "Embedding is not a plain embedding"),
        (lambda: lora(llama(), modules_to_save=["embed_tokens"]), "ModulesToSaveWrapper is not a plain embedding"),
        (lambda: lora(llama(), trainable_token_indices=[1]), "TrainableTokensWrapper is not a plain embedding"),
        (lambda: renormed(llama()), "their values are made, or changed, by each forward"),
        (lambda: llama(dtype=torch.float64), "no contiguous 16- or 32-bit numbers (torch.float64)"),
        (lambda: transposed(llama()), "no contiguous 16- or 32-bit numbers (torch.bfloat16)"),
        (lambda: part_of_more(llama()), "part of a larger piece of memory"),
        (lambda: nn.Linear(2, 2), "NoneType is not a plain embedding"),
    ],
)
def test_what_is_not_moved(make, reason):
    model = make()
    memory = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert reason in why(move_embeddings(model, "host", pinning=Here()))
    assert memory == {name: p.data_ptr() for name, p in model.named_parameters()}


def test_when_nothing_is_moved(monkeypatch):
    model, here = llama(), Here()
    address = table(model).weight.data_ptr()
    assert why(move_embeddings(model, "device")) == "on the device (model.embeddings=device)"
    assert why(move_embeddings(model, "host")) == "there is no GPU"
    assert why(move_embeddings(model, "host", shared=True, pinning=here)) == "vLLM reads the same ones"
    small = "0 MB are too few to move (model.embeddings=host to move them)"
    assert why(move_embeddings(model, "auto", pinning=here)) == small
    with pytest.raises(ValueError, match="'gpu' is not one of auto, device, host"):
        move_embeddings(model, "gpu")
    monkeypatch.setattr(host_embeddings, "free_of_host", lambda: 2 * 8192 - 1)  # 6,144 bytes, as 8,192
    assert "would be pinned" in why(move_embeddings(model, "host", pinning=here))
    assert table(model).weight.data_ptr() == address
    monkeypatch.setattr(host_embeddings, "free_of_host", lambda: 2 * 8192)
    monkeypatch.setattr(host_embeddings, "LEAST", 2 * V * H)
    assert "read from there" in why(move_embeddings(model, "auto", pinning=here))


def test_how_many_are_worth_it():
    assert (LEAST, wanted("auto", LEAST - 1), wanted("auto", LEAST)) == (2**28, False, True)
    assert wanted("host", 1) and not wanted("device", LEAST)


class Refused(Here):
    def copy(self, weight):
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported")


class Copies(Here):
    def bytes_on(self, device, held):
        return super().bytes_on(device, held).clone()


class Wrong(Here):
    def copy(self, weight):
        held = super().copy(weight)
        held.memory[V - 1, H - 1] += 1
        return held


@pytest.mark.parametrize(
    ("pinning", "reason"),
    [
        (Refused(), "could not be pinned, or not read (CUDA error: out of memory)"),
        (Copies(), "copies pinned memory instead of reading it"),
        (Wrong(), "reads other values from the host's memory than were written"),
    ],
)
def test_what_pinned_memory_may_refuse(pinning, reason):
    model = llama()
    address = table(model).weight.data_ptr()
    assert reason in why(move_embeddings(model, "host", pinning=pinning))
    assert table(model).weight.data_ptr() == address and not in_host(table(model).weight)
