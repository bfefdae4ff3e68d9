"""vLLM's linear layers over our kernels, registered through vLLM's public registry of quantisation methods.

Two methods, both with the one LoRA of a run inside the layer instead of vLLM's machinery for many adapters:

- `slothrl_nf4`: bitsandbytes' nf4 bytes as vLLM's loader leaves them, read by one GEMM a layer (`nf4_lora_matmul`),
  fused projections (q, k, v; gate, up) in one launch. Mixture-of-experts layers stay bitsandbytes' own, and the plan
  says so (`vllm_described`).
- `slothrl_plain`: unquantised weights, multiplied as vLLM does, plus the LoRA.

A layer's LoRA is made with its weights, because vLLM compiles and captures right after loading; which adapter it will
be travels in `additional_config`, vLLM's place for what its own config does not know. A LoRA of zeros changes nothing.

Seen working with vLLM 0.26, where bitsandbytes' classes are vLLM's, and 0.31, where a plugin has them; loaders are
chosen by a method's class name in both. Contract tests: tests/integration/test_shared_model.py, test_vllm_linear.py.
"""

from __future__ import annotations

from functools import cache
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from slothrl_kernels import LoraDelta, Nf4Weight, nf4_dequantize
from torch import Tensor, nn

NF4, PLAIN = "slothrl_nf4", "slothrl_plain"
BLOCKSIZE = 64


@cache
def register() -> None:
    """Make both methods known to vLLM in this process, once."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    register_quantization_config(NF4)(_nf4_config())
    register_quantization_config(PLAIN)(_plain_config())


def layer_loras(model: nn.Module) -> dict[str, list[tuple[Tensor, Tensor, slice]]]:
    """Where each projection's LoRA lies in vLLM's model, by the projection's name.

    Returns:
        For each projection one entry, or several where vLLM has one on disk in pieces: views of A (R, K) and of B
        (rows, R), and which of the projection's rows these are.
    """
    packed: dict[str, list[str]] = getattr(model, "packed_modules_mapping", None) or {}
    found: dict[str, list[tuple[Tensor, Tensor, slice]]] = {}
    for name, module in model.named_modules():
        lora: LoraDelta | None = getattr(module, "slothrl_lora", None)
        if lora is None:
            continue
        parent, _, leaf = name.rpartition(".")
        parts = packed.get(leaf, [leaf])
        pieces = [lora.slice(i) for i in range(len(lora.sizes))]
        if len(parts) == len(pieces):
            for part, (a, b) in zip(parts, pieces, strict=True):
                found[f"{parent}.{part}"] = [(a, b, slice(0, len(b)))]
        elif len(parts) == 1:  # Phi-3's q, k, v are one projection for transformers, and have one A
            bounds = [0, *lora.ends.tolist()]
            rows = [slice(*bound) for bound in zip(bounds, bounds[1:], strict=False)]
            found[f"{parent}.{parts[0]}"] = [(a, b, row) for (a, b), row in zip(pieces, rows, strict=True)]
    return found


# --- the 16-bit view ------------------------------------------------------------------------------------------------


def make_views(model: nn.Module) -> None:
    """Give every nf4 layer memory for its 16-bit view, in one allocation; what is in it is for `fill_views`."""
    layers: list[Any] = [module for module in model.modules() if hasattr(module, "nf4_shape")]
    sizes = [prod(layer.nf4_shape) for layer in layers]
    flat = torch.zeros(sum(sizes), dtype=layers[0].params_dtype, device=layers[0].nf4_packed.device)
    for layer, part in zip(layers, flat.split(sizes), strict=True):
        layer.register_buffer("view", part.view(layer.nf4_shape), persistent=False)


@torch.inference_mode()
def fill_views(model: nn.Module) -> None:
    """Write each layer's weight with its LoRA folded in, W + B A rounded once to 16 bits, into its view."""
    for layer in model.modules():
        if getattr(layer, "view", None) is None or not hasattr(layer, "nf4_shape"):
            continue
        layer: Any
        weight = Nf4Weight(layer.nf4_packed, layer.nf4_absmax, layer.nf4_code, tuple(layer.nf4_shape))
        nf4_dequantize(weight, layer.view.dtype, layer.view)
        lora: LoraDelta | None = layer.slothrl_lora
        for i, rows in enumerate(layer.view.split(lora.sizes) if lora is not None else ()):
            a, b = lora.slice(i)  # pyright: ignore
            rows.addmm_(b, a)


def view_bytes(model: nn.Module) -> int:
    """What the views of all layers take."""
    views = (getattr(module, "view", None) for module in model.modules() if hasattr(module, "nf4_shape"))
    return sum(view.nbytes for view in views if view is not None)


# --- the layers -----------------------------------------------------------------------------------------------------


def _attach(layer: Any, prefix: str, packed: dict[str, list[str]], inputs: int, sizes: list[int], dtype: Any) -> None:
    """Give a layer its LoRA, where the adapter may have one for it."""
    from vllm.config import get_current_vllm_config

    wanted = _wanted(get_current_vllm_config())
    leaf = prefix.rpartition(".")[2]
    # Names that a fused layer does not tell: its LoRA stays zero if none of its parts has one.
    names = packed.get(leaf, [leaf] if len(sizes) == 1 else [*wanted["targets"]])
    layer.slothrl_lora = None
    if set(names) & set(wanted["targets"]):
        like = torch.empty(0, dtype=dtype)  # on the device that vLLM makes weights on
        lora = LoraDelta.zeros(wanted["rank"], inputs, tuple(sizes), like)
        layer.slothrl_lora = lora
        # Buffers, so that torch.compile takes them for the model's state and not for constants.
        for name in ("a", "b", "ends", "arrived"):
            layer.register_buffer(f"lora_{name}", getattr(lora, name), persistent=False)


def _wanted(vllm_config: Any) -> dict[str, Any]:
    """What the engine asked for: the adapter's rank and targets, and whether there are views."""
    return vllm_config.additional_config["slothrl"]


def _keep_loader(cls: type) -> type:
    """Loading is chosen by the class's name in vLLM: ours loads as its base does."""
    from vllm.model_executor.layers import linear

    if cls.__mro__[1].__name__ in linear.WEIGHT_LOADER_V2_SUPPORTED:
        linear.register_weight_loader_v2_supported_method(cls)
    return cls


@cache
def _plain_method() -> type:
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod

    class PlainLoraLinearMethod(UnquantizedLinearMethod):
        """vLLM's own product, plus the LoRA."""

        def __init__(self, prefix: str, packed: dict[str, list[str]]):
            super().__init__()
            self.prefix, self.packed = prefix, packed

        def create_weights(self, layer, input_size_per_partition, output_partition_sizes, *rest, **options):
            inputs, sizes = input_size_per_partition, list(output_partition_sizes)
            super().create_weights(layer, inputs, output_partition_sizes, *rest, **options)
            _attach(layer, self.prefix, self.packed, inputs, sizes, [*rest[2:], options.get("params_dtype")][0])

        def apply(self, layer: Any, x, bias=None):
            y = super().apply(layer, x, bias)
            if layer.slothrl_lora is None:
                return y
            rank, sizes = layer.lora_b.shape[1], layer.slothrl_lora.sizes
            xa = F.linear(x, layer.lora_a).split(rank, dim=-1)
            deltas = [F.linear(part, b) for part, b in zip(xa, layer.lora_b.split(sizes), strict=True)]
            return y + (torch.cat(deltas, dim=-1) if len(deltas) > 1 else deltas[0])

    return _keep_loader(PlainLoraLinearMethod)


@cache
def _nf4_method() -> type:
    from vllm.config import get_current_vllm_config

    config = _bitsandbytes_config()

    class Nf4LoraLinearMethod(_linear_method(config)):
        """One GEMM on the packed bytes of all shards."""

        def __init__(self, quant_config, prefix: str):
            super().__init__(quant_config)
            self.prefix = prefix

        def create_weights(self, layer, input_size_per_partition, output_partition_sizes, *rest, **options):
            inputs, sizes = input_size_per_partition, list(output_partition_sizes)
            super().create_weights(layer, inputs, output_partition_sizes, *rest, **options)
            layer.nf4_shape = [sum(sizes), inputs]
            packed = self.quant_config.packed_modules_mapping
            _attach(layer, self.prefix, packed, inputs, sizes, [*rest[2:], options.get("params_dtype")][0])

        def process_weights_after_loading(self, layer):
            weight = layer.weight
            states = [weight.bnb_quant_state[i] for i in range(len(weight.bnb_quant_state))]
            for state in states:
                if state.quant_type != "nf4" or state.blocksize != BLOCKSIZE or state.nested:
                    raise ValueError(
                        f"{self.prefix} is {state.quant_type} in blocks of {state.blocksize}: not nf4 in 64"
                    )
            # The shards' scales in one tensor, of which their states keep views: both sides read the same memory.
            absmax = torch.cat([state.absmax.flatten() for state in states])
            for state, part in zip(states, absmax.split([s.absmax.numel() for s in states]), strict=True):
                state.absmax = part.view_as(state.absmax)
            layer.register_buffer("nf4_absmax", absmax, persistent=False)
            layer.register_buffer("nf4_code", states[0].code, persistent=False)
            # Plain: vLLM's parameter class answers for another dtype than its bytes have.
            layer.register_buffer("nf4_packed", weight.data, persistent=False)
            Nf4Weight(layer.nf4_packed, absmax, layer.nf4_code, tuple(layer.nf4_shape))  # checks that they fit
            layer.register_buffer("view", None, persistent=False)
            vllm_config = get_current_vllm_config()
            # A view that sleeps is made in memory that can be taken away, by the worker (`vllm_compat.KVOnlyWorker`).
            if _wanted(vllm_config).get("view") and not vllm_config.model_config.enable_sleep_mode:
                make_views(layer)

        def apply(self, layer, x, bias=None):
            if layer.view is not None:
                return F.linear(x, layer.view, bias)
            weight = (layer.nf4_packed, layer.nf4_absmax, layer.nf4_code, layer.nf4_shape, BLOCKSIZE)
            if layer.slothrl_lora is None:
                operator = torch.ops.slothrl_kernels.nf4_matmul
                return operator(x, *weight, None, None, None, 0, bias, "auto", [])
            sizes = list(layer.slothrl_lora.sizes)
            lora = (layer.lora_a, layer.lora_b, layer.lora_ends, sizes, layer.lora_arrived)
            return torch.ops.slothrl_kernels.nf4_lora_matmul(x, *weight, *lora, bias, "auto")

    return _keep_loader(Nf4LoraLinearMethod)


def _bitsandbytes_config() -> type:
    """vLLM's config for bitsandbytes; from 0.27 on a plugin has it."""
    try:
        from vllm.model_executor.layers.quantization.bitsandbytes import BitsAndBytesConfig
    except ImportError:
        from vllm_bnb_plugin.quantization import BitsAndBytesConfig  # pyright: ignore
    return BitsAndBytesConfig


def _linear_method(config: type) -> Any:
    import importlib

    module = importlib.import_module(config.__module__)
    if not hasattr(module, "BitsAndBytesLinearMethod"):
        module = importlib.import_module(config.__module__.rpartition(".")[0])
    return module.BitsAndBytesLinearMethod


@cache
def _nf4_config() -> type:
    base: Any = _bitsandbytes_config()

    class Nf4LoraConfig(base):
        @classmethod
        def get_name(cls):
            return NF4

        @classmethod
        def override_quantization_method(cls, hf_quant_cfg, user_quant, hf_config=None):
            theirs = hf_quant_cfg.get("quant_method") == "bitsandbytes" and not hf_quant_cfg.get("load_in_8bit")
            return NF4 if user_quant == NF4 and theirs else None

        def get_quant_method(self, layer, prefix):
            method = super().get_quant_method(layer, prefix)
            if isinstance(method, _linear_method(base)):
                return _nf4_method()(self, prefix)
            if isinstance(method, _plain_method().__mro__[1]):  # a layer that the checkpoint left unquantised
                return _plain_method()(prefix, self.packed_modules_mapping)
            return method

    return Nf4LoraConfig


@cache
def _plain_config() -> type:
    from vllm.model_executor.layers.linear import LinearBase
    from vllm.model_executor.layers.quantization import QuantizationConfig

    class PlainLoraConfig(QuantizationConfig):
        def get_name(self):
            return PLAIN

        def get_supported_act_dtypes(self):
            return [torch.float32, torch.float16, torch.bfloat16]

        @classmethod
        def get_min_capability(cls):
            return 70

        @staticmethod
        def get_config_filenames():
            return []

        @classmethod
        def from_config(cls, config):
            return cls()

        def get_quant_method(self, layer, prefix):
            return _plain_method()(prefix, self.packed_modules_mapping) if isinstance(layer, LinearBase) else None

    return PlainLoraConfig
