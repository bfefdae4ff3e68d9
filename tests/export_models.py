"""Tiny bases with BPE tokenizers, perturbed adapters on them, and their log-probs: what the export tests compare."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from slothrl.gguf_vocabulary import LLAMA3, QWEN2
from tests.families import ROWS, make_checkpoint
from tests.helpers import CHATML

SPECIAL = ["<unk>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "What is 12 + 305? It isn't 9,999.",
    "  Two  spaces,\n\na line, and Ünïcödé — naïve café 北京 🙂.",
    "<|im_start|>user\nhello there<|im_end|>\n",
    "def f(x):\n    return x ** 2",
]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def bpe_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A trained BPE tokenizer of a few hundred tokens, split as "gpt-2", "smollm", "llama-bpe", "qwen2" or "llama"."""
    if kind == "llama":  # SentencePiece's: spaces are marked, unknown characters become bytes
        backend = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        alphabet, bytes_ = [], [f"<0x{byte:02X}>" for byte in range(256)]
        steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
        backend.decoder = decoders.Sequence(steps)
    else:
        backend = Tokenizer(models.BPE())
        backend.normalizer = normalizers.NFC() if kind == "qwen2" else None  # pyright: ignore
        backend.pre_tokenizer = _pre_tokenizer(kind)
        alphabet, bytes_ = pre_tokenizers.ByteLevel.alphabet(), []
        backend.decoder = decoders.ByteLevel()
    # Without the ß no token covers it, and the SentencePiece kind has to fall back on its bytes.
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*SPECIAL, *bytes_], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(TEXTS * 3 + ["the cat sat on the mat and the hat; is it the one? 1 2 3"] * 3, trainer)
    if bytes_:
        backend = _unspecial(backend, bytes_)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def _pre_tokenizer(kind: str):
    if kind in ("gpt-2", "smollm"):
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False)
        return plain if kind == "gpt-2" else pre_tokenizers.Sequence([pre_tokenizers.Digits(True), plain])
    pattern = {"llama-bpe": LLAMA3, "qwen2": QWEN2}[kind]
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _unspecial(backend: Tokenizer, tokens: list[str]) -> Tokenizer:
    """The trainer makes everything special that it is given: the bytes are ordinary tokens."""
    import json

    spec = json.loads(backend.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] not in tokens]
    return Tokenizer.from_str(json.dumps(spec))


def make_base(
    family: str, folder: Path, tokenizer: PreTrainedTokenizerFast | None, dtype: torch.dtype = torch.bfloat16, **options
) -> Path:
    """A checkpoint of `tests.families` whose config has `options` too; `tokenizer` None: the one it comes with."""
    make_checkpoint(family, folder, dtype, **options)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def make_adapter(base: Path, folder: Path, deviation: float = 0.05, **options) -> Path:
    """An adapter on `base`, saved as PEFT saves it; its matrices are random, of standard deviation `deviation`."""
    config = LoraConfig(
        **{"r": 8, "lora_alpha": 16, "target_modules": PROJECTIONS, "task_type": "CAUSAL_LM", **options}
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = deviation * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def adapted(base: Path, adapter: Path):
    """transformers + PEFT on the unquantised base, in float32."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(model, str(adapter)).eval()


@torch.no_grad()
def logprobs(model) -> torch.Tensor:
    """Log-probs of every token at every place of `ROWS`, (places, vocab) float32."""
    rows = [model(torch.tensor([row])).logits[0].float().log_softmax(-1) for row in ROWS]
    return torch.cat(rows)


def difference(model, reference: torch.Tensor) -> tuple[float, float]:
    """(largest, mean) absolute difference in nat of the tokens that have a log-prob above -10 in `reference`."""
    apart = (logprobs(model) - reference).abs()[reference > -10]
    return apart.max().item(), apart.mean().item()
