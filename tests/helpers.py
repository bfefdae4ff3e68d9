"""Models and tokenizers of a few kilobytes, for tests that need the real classes and no real weights."""

from __future__ import annotations

import gc

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Trainer

PAD, EOS, START, UNK = "<|endoftext|>", "<|im_end|>", "<|im_start|>", "<unk>"

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(chat_template: bool = True, pad: bool = True, size: int = 0) -> PreTrainedTokenizerFast:
    """A tokenizer with one token a printable ASCII character, so that lengths can be counted by hand.

    Args:
        chat_template: with a ChatML template; else without any.
        pad: with a pad token; else `pad_token` is None.
        size: words for the ids from there up to this one, which no text becomes, but which decode to text.

    Returns:
        The tokenizer: ids 0 to 3 are pad, eos, start of message and unknown; decoding gives the text back.
    """
    characters = ["\n", *(chr(code) for code in range(32, 127))]
    vocabulary = {token: index for index, token in enumerate([PAD, EOS, START, UNK, *characters])}
    vocabulary |= {f" word{index}": index for index in range(len(vocabulary), size)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([PAD, EOS, START, UNK])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=PAD if pad else None,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )
    tokenizer.chat_template = CHATML if chat_template else None
    return tokenizer


def tiny_model(vocab_size: int, hidden: int = 64, layers: int = 2) -> LlamaForCausalLM:
    """A Llama with random fp32 weights, the same at every call; the global random state stays as it was.

    Args:
        vocab_size: at least `len(tokenizer)`.
        hidden: width, a multiple of 8.
        layers: depth.

    Returns:
        The model on the CPU, in eval mode, with the token ids of `tiny_tokenizer`.
    """
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval()


def models_alive() -> set[int]:
    """Ids of all trainers, models and engines in this process that something still holds, or the collector has not
    come by yet."""
    from slothrl.engine import Engine

    kinds = (Trainer, PreTrainedModel, Engine)
    return {id(found) for found in gc.get_objects() if issubclass(type(found), kinds)}
