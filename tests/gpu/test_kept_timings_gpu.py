"""A layer timed on a GPU by one run, and taken over by the next; the doctor counts it."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from slothrl import doctor, fuse_timing
from slothrl.fuse import fuse, is_fused

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def model():
    config = LlamaConfig(
        hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512,
    )  # fmt: skip
    base = LlamaForCausalLM(config).to("cuda", torch.bfloat16)
    return get_peft_model(base, LoraConfig(r=8, target_modules="all-linear"))


def test_a_run_decides_as_the_one_before(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert "0 of attention, 0 of layers, " in doctor.timings().detail
    first, second = model(), model()
    found = fuse(first, only_if_faster=True)
    assert "ms fused" in found.notes[-1] and "kept" not in found.notes[-1]
    assert (tmp_path / "slothrl" / "fused_layers.json").is_file()
    assert ", 1 of layers" in doctor.timings().detail
    monkeypatch.setattr(fuse_timing, "_timed", None)  # nothing is timed again
    again = fuse(second, only_if_faster=True)
    kept = f"{found.notes[-1]} (kept from an earlier run in {tmp_path / 'slothrl' / 'fused_layers.json'})"
    assert again.notes[-1] == kept
    assert is_fused(second) == is_fused(first) and again.fused == found.fused
