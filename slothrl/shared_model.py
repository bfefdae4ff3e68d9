"""One base model in memory for vLLM and the trainer: vLLM owns the bytes, a transformers model is laid over them.

vLLM must be the owner: it needs q, k and v (gate and up) adjacent, and what is adjacent can be cut into views, while
separate weights could only be copied together. bitsandbytes' packed bytes are the same on both sides.
"""

from __future__ import annotations

import bisect
import contextlib
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, GenerationConfig, PreTrainedModel

from slothrl.checkpoint_scales import restore_scales
from slothrl.errors import NotShareableError
from slothrl.vllm_compat import keep_plain, making_models
from slothrl.vllm_layout import Held, WeightLayout, base_tensors


class SharedModel:
    """A transformers model whose base weights are vLLM's.

    Args:
        vllm_model: what vLLM runs, in this process.
        model: a causal LM of transformers for the same checkpoint, from `empty_model` or loaded; its parameters are
            replaced by views of vLLM's. Do not merge adapters into it, copy it, or change its dtype afterwards: each
            writes to, or leaves, the shared memory.
        revision: of the checkpoint, on the hub.
    Raises:
        NotShareableError: vLLM keeps some parameter in a form transformers cannot read.

    Attributes:
        model: the model given, now without base weights of its own.
        base_bytes: what the base takes, once for both.
    """

    def __init__(self, vllm_model: nn.Module, model: PreTrainedModel, revision: str | None = None):
        self.vllm_model, self.model = vllm_model, model
        layout = WeightLayout(vllm_model)
        if any(type(module).__name__ == "Conv1D" for module in model.modules()):
            raise NotShareableError(f"{type(model).__name__} keeps its linears transposed (Conv1D)")
        # All are found before the first is replaced, so that a refusal leaves the model as it was.
        found = {name: layout.find(name, shape) for name, shape in _wanted(model).items()}
        _lay_over(model, found)
        restore_scales(model, str(model.name_or_path), revision)
        keep_plain(model)
        self.base_bytes = sum(tensor.nbytes for tensor in base_tensors(vllm_model))
        self.verify()

    def own_parameters(self, model: nn.Module | None = None) -> list[str]:
        """Base parameters (adapters aside) that do not lie inside vLLM's memory: none, while the base is shared.

        Args:
            model: the model as it is wrapped by now (a PeftModel, say); default `self.model`.
        """
        spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in base_tensors(self.vllm_model))
        starts = [start for start, _ in spans]

        def inside(tensor: Tensor) -> bool:
            at = bisect.bisect_right(starts, tensor.data_ptr()) - 1
            return at >= 0 and tensor.data_ptr() + tensor.nbytes <= spans[at][1]

        own = []
        for name, parameter in (model or self.model).named_parameters():
            if parameter.requires_grad or "lora_" in name:
                continue
            tensors = [parameter.data, *_scales(parameter)]
            if parameter.is_meta or not all(inside(tensor) for tensor in tensors):
                own.append(name)
        return own

    def verify(self, model: nn.Module | None = None) -> None:
        """Raise `RuntimeError` if something gave the trainer base weights of its own since."""
        if own := self.own_parameters(model):
            raise RuntimeError(f"{len(own)} base parameters are no longer shared with vLLM: {', '.join(own[:3])}")

    def checksum(self) -> int:
        """A 64-bit checksum of every byte of the base: the same as long as nobody wrote to it."""
        total = 0
        for index, tensor in enumerate(base_tensors(self.vllm_model)):
            total = (total * 1_000_003 + index + _checksum(tensor)) % 2**64
        return total


def empty_model(path: str, dtype: torch.dtype, revision: str | None = None, **options: Any) -> PreTrainedModel:
    """A causal LM on the meta device: its modules and buffers are real, its parameters take no memory.

    Args:
        path: folder or hub name of the checkpoint; its config and generation config are read, no weights.
        options: for `AutoModelForCausalLM.from_config`, such as `attn_implementation`.
    """
    config = AutoConfig.from_pretrained(path, revision=revision)
    # Of a checkpoint that is quantised itself: `_describe` sets it from what vLLM holds.
    vars(config).pop("quantization_config", None)
    with making_models(), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, **options)
    model.config._name_or_path = model.name_or_path = path
    with contextlib.suppress(OSError):  # a checkpoint without one: the defaults made from the config stay
        model.generation_config = GenerationConfig.from_pretrained(path, revision=revision or "main")
    keep_plain(model)
    return model.eval()


# --- laying one model over the other --------------------------------------------------------------------------------


def _wanted(model: PreTrainedModel) -> dict[str, torch.Size]:
    """Every parameter to be shared and its logical shape; a tied head's once, as the embedding."""
    tied = _tied_head(model)
    wanted = {}
    for prefix, module in model.named_modules():
        if module is tied:
            continue
        for name, parameter in module.named_parameters(recurse=False):
            packed = isinstance(module, nn.Linear) and name == "weight"
            # A loaded 4-bit model's parameter has the shape of its bytes.
            shape = torch.Size([module.out_features, module.in_features]) if packed else parameter.shape  # pyright: ignore
            wanted[f"{prefix}.{name}"] = shape
    return wanted


def _tied_head(model: PreTrainedModel) -> nn.Module | None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    # Not by identity of the weights alone: on the meta device transformers may not have tied them yet.
    tied = head is not None and (
        head.weight is embedding.weight or getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    )
    return head if tied else None


def _lay_over(model: PreTrainedModel, found: dict[str, Held]) -> None:
    tied = _tied_head(model)
    for name, held in found.items():
        path, _, parameter = name.rpartition(".")
        if held.quant_state is not None:
            model.set_submodule(path, _linear_4bit(model.get_submodule(path), held, model.dtype))
        else:
            setattr(model.get_submodule(path), parameter, nn.Parameter(held.data, requires_grad=False))
    if tied is not None:
        tied.weight = model.get_input_embeddings().weight
    _describe(model, found)


def _describe(model: PreTrainedModel, found: dict[str, Held]) -> None:
    """Say of the model what `from_pretrained` would have said: PEFT, accelerate and the trainers look at it."""
    device = next(iter(found.values())).data.device
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))  # made on the CPU: rotary frequencies, embedding scales
    if device.type == "cuda":
        model.hf_device_map = {"": device.index or 0}  # pyright: ignore
    packed = next((held.quant_state for held in found.values() if held.quant_state is not None), None)
    if packed is not None:
        model.is_loaded_in_4bit = True  # pyright: ignore - PEFT's bitsandbytes dispatch asks for it
        model.config.quantization_config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=packed.quant_type, bnb_4bit_compute_dtype=model.dtype
        )


def _linear_4bit(linear: Any, held: Held, dtype: torch.dtype) -> nn.Module:
    """bitsandbytes' layer over vLLM's bytes."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn import Linear4bit, Params4bit

    theirs: Any = held.quant_state
    # A state of our own over the same tensors: bitsandbytes changes the object when a model moves.
    state = QuantState(
        absmax=theirs.absmax,
        shape=theirs.shape,
        code=theirs.code,
        blocksize=theirs.blocksize,
        quant_type=theirs.quant_type,
        dtype=dtype,
    )
    layer: Any = Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=False,
        compute_dtype=dtype,
        compress_statistics=False,
        quant_type=theirs.quant_type,
        device="meta",
    )
    make: Any = Params4bit  # whose signature its own stubs do not know
    layer.weight = make(
        held.data,
        requires_grad=False,
        quant_state=state,
        blocksize=state.blocksize,
        compress_statistics=False,
        quant_type=state.quant_type,
        bnb_quantized=True,
        module=layer,
    )
    layer.quant_state = state
    layer.bias = linear.bias  # replaced by vLLM's in its turn
    layer.support_avx512bf16_for_cpu = False  # or its forward on a CPU would repack the bytes in place
    return layer


def _scales(parameter: nn.Parameter) -> list[Tensor]:
    state = getattr(parameter, "quant_state", None)
    return [] if state is None else [state.absmax]


def _checksum(tensor: Tensor) -> int:
    data = tensor.contiguous().view(-1).view(torch.uint8)
    words = data[: data.numel() // 8 * 8].view(torch.int64)
    # Position matters: each word is multiplied by an odd number of its own (wrapping, as int64 does).
    total = 0
    for start in range(0, words.numel(), 1 << 22):
        part = words[start : start + (1 << 22)]
        weights = torch.arange(start, start + part.numel(), device=data.device) * 2 + 1
        total += int((part * weights).sum())
    return (total + int(data[words.numel() * 8 :].sum())) % 2**64
