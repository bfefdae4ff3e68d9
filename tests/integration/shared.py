"""One base under vLLM and a PEFT model, as the tests of the contract start it."""

import torch
from peft import LoraConfig, get_peft_model

from slothrl.lora_slot import lora_shape
from slothrl.probe import PolicyProbe
from slothrl.shared_model import SharedModel, empty_model
from tests.families import ROWS
from tests.helpers import tiny_tokenizer


def start(folder, quantization, dtype="bfloat16", linear="slothrl", view=False, **lora):
    """(engine, shared base, PEFT model) over one checkpoint."""
    from slothrl.vllm_engine import VLLMEngine, VLLMOptions

    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", **lora)
    outline = get_peft_model(empty_model(str(folder), torch.float32), config, low_cpu_mem_usage=True)
    more = {"enforce_eager": True, "kv_cache_gb": 0.1, "linear": linear, "view": view}
    options = VLLMOptions(str(folder), 128, 8, quantization, dtype=dtype, **more)
    empty = empty_model(str(folder), getattr(torch, dtype))
    engine = VLLMEngine(options, lora_shape(outline))
    assert (engine.linear is None) == (linear == "vllm")
    shared = SharedModel(engine.vllm_model, empty)
    model = get_peft_model(shared.model, config)
    return engine.follow(model, tiny_tokenizer()), shared, model


def check(engine, shared, model, bound):
    """Nothing of the base is the trainer's own, both compute the same, and vLLM follows the LoRA."""
    assert shared.own_parameters(model) == []
    probe = PolicyProbe(engine, model, ROWS, bound=bound)
    probe.check()
    probe.perturbation_test()
