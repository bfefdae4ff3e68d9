"""Whether the vLLM installed here shares a base with the trainer: tried for real on a model of two layers.

`python -m slothrl.sharing_check` prints one line, in a process of its own: an engine leaves things behind.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SECONDS = 300.0  # vLLM starts in 10 to 60
ROWS = [[(7 * i * i + 13 * i + 5) % 500 + 2 for i in range(length)] for length in (24, 40)]


def tried() -> tuple[bool, str]:
    """(whether it works, what it came to), from a process of its own."""
    command = [sys.executable, "-m", "slothrl.sharing_check"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return False, f"vLLM did not start in {SECONDS:.0f} s"
    lines = (done.stdout if done.returncode == 0 else done.stderr).strip().splitlines()
    return done.returncode == 0, lines[-1] if lines else f"exit code {done.returncode}"


def make_checkpoint(folder: Path) -> None:
    """A random Llama of two layers with a tokenizer of single words, 1 MB."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            bos_token_id=None,
            eos_token_id=1,
            pad_token_id=0,
        )
    ).bfloat16()
    model.model.embed_tokens.weight.data *= 25  # peaked distributions: a wrong weight shows
    model.lm_head.weight.data *= 10
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<eos>": 1, "<unk>": 2, **{f"w{i}": i for i in range(3, 512)}}
    backend = Tokenizer(WordLevel(words, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)


def check(folder: str) -> str:
    """Share the checkpoint in `folder` in nf4, change the LoRA, sleep and wake; what it came to in words.

    Raises:
        UserError: vLLM cannot be started, shared with, or does not follow the LoRA.
    """
    from peft import LoraConfig, get_peft_model
    from transformers import AutoTokenizer

    from slothrl.lora_slot import lora_shape
    from slothrl.probe import PolicyProbe
    from slothrl.shared_model import SharedModel, empty_model
    from slothrl.vllm_engine import VLLMEngine, VLLMOptions

    adapter = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    outline = get_peft_model(empty_model(folder, torch.float32), adapter, low_cpu_mem_usage=True)
    empty = empty_model(folder, torch.bfloat16)
    options = VLLMOptions(
        folder, 128, 8, "bitsandbytes", gpu_memory_utilization=0.1, kv_cache_gb=0.1, enforce_eager=True
    )
    engine = VLLMEngine(options, lora_shape(outline))
    shared = SharedModel(engine.vllm_model, empty)
    model = get_peft_model(shared.model, adapter)
    engine.follow(model, AutoTokenizer.from_pretrained(folder))
    checksum = shared.checksum()
    probe = PolicyProbe(engine, model, ROWS, bound=0.2)
    difference = probe.check()
    engine.sleep()
    slept = "sleeps" if engine.asleep else "does not sleep here"
    moved, apart = probe.perturbation_test()
    if shared.own_parameters(model) or shared.checksum() != checksum:
        raise RuntimeError("the base is not one any more")
    engine.close()
    return f"one base, {difference:.3f} nat apart; follows a LoRA ({moved:.2f} nat, {apart:.3f} apart); {slept}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made:
        make_checkpoint(Path(made))
        print(check(made))
