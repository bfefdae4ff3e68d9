"""A fast tokenizer's vocabulary as GGUF metadata: tokens, merges, special tokens, how text is split, chat template."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType

from slothrl.errors import UserError

_SPLIT = (  # what Llama 3 and Qwen2 cut text by; they differ in how many digits stay together
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|DIGITS"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3, QWEN2 = _SPLIT.replace("DIGITS", r"\p{N}{1,3}"), _SPLIT.replace("DIGITS", r"\p{N}")
_PATTERNS = {LLAMA3: "llama-bpe", QWEN2: "qwen2"}
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"  # what SentencePiece writes for a space


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp needs to split text as the tokenizer does.

    Attributes:
        model: "gpt2" for byte-level BPE, "llama" for SentencePiece's BPE with bytes to fall back on.
        pre: llama.cpp's name for the way text is cut before the merges.
        tokens, types: one a row of the embedding, ids without a token filled up with unused ones.
        scores: one a token for "llama", by which llama.cpp orders the merges; None for "gpt2".
        merges: "left right" each, the first ones first.
        space_prefix: a space is put before the text.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    scores: list[float] | None
    merges: list[str]
    space_prefix: bool


def read_vocabulary(tokenizer: Any, size: int) -> Vocabulary:
    """Read a `PreTrainedTokenizerFast`.

    Args:
        size: the rows of the model's embedding.
    Raises:
        UserError: it is no BPE of the kinds that llama.cpp knows by name, or it has more tokens than the model.
    """
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UserError("GGUF export needs a fast tokenizer (tokenizer.json)")
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    if spec["model"]["type"] != "BPE":
        raise UserError(f"GGUF export covers BPE tokenizers, this one is {spec['model']['type']}")
    sentencepiece = _is_sentencepiece(spec)
    pre = "default" if sentencepiece else _pre_tokenizer(spec)
    tokens, types = _tokens(spec, size, sentencepiece)
    pairs = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in spec["model"]["merges"]]
    return Vocabulary(
        model="llama" if sentencepiece else "gpt2",
        pre=pre,
        tokens=tokens,
        types=types,
        scores=_scores(tokens, types, pairs) if sentencepiece else None,
        merges=[f"{left} {right}" for left, right in pairs],
        space_prefix=sentencepiece and _puts_space(spec),
    )


def add_vocabulary(writer: GGUFWriter, tokenizer: Any, size: int) -> None:
    """Write the vocabulary, the special tokens and the chat template of `tokenizer` for a model with `size` rows."""
    found = read_vocabulary(tokenizer, size)
    writer.add_tokenizer_model(found.model)
    writer.add_tokenizer_pre(found.pre)
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.types)
    if found.scores is not None:
        writer.add_token_scores(found.scores)
        writer.add_add_space_prefix(found.space_prefix)
    writer.add_token_merges(found.merges)
    add = {
        "bos": writer.add_bos_token_id,
        "eos": writer.add_eos_token_id,
        "unk": writer.add_unk_token_id,
        "pad": writer.add_pad_token_id,
    }
    for name, write in add.items():
        token = getattr(tokenizer, f"{name}_token_id")
        if token is not None:
            write(token)
    ids = tokenizer("a").input_ids  # whether they are added shows in what is added
    writer.add_add_bos_token(ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(ids[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.get_chat_template())


# --- the parts --------------------------------------------------------------------------------------------------------


def _tokens(spec: dict[str, Any], size: int, sentencepiece: bool) -> tuple[list[str], list[int]]:
    places = {index: token for token, index in spec["model"]["vocab"].items()}
    added = {token["id"]: token for token in spec["added_tokens"]}
    places |= {index: token["content"] for index, token in added.items()}
    if max(places) >= size:
        raise UserError(f"the tokenizer has {max(places) + 1} tokens and the model {size}: they do not belong together")
    unknown = spec["model"].get("unk_token") if sentencepiece else None
    tokens, types = [], []
    for index in range(size):
        token = places.get(index)
        if token is None:
            token, kind = f"[PAD{index}]", TokenType.UNUSED
        elif token == unknown:
            kind = TokenType.UNKNOWN
        elif index in added:
            kind = TokenType.CONTROL if added[index]["special"] else TokenType.USER_DEFINED
        elif sentencepiece and _BYTE.fullmatch(token):
            kind = TokenType.BYTE
        else:
            kind = TokenType.NORMAL
        tokens.append(token)
        types.append(int(kind))
    return tokens, types


def _scores(tokens: list[str], types: list[int], merges: list[list[str]]) -> list[float]:
    """llama.cpp merges the pair whose result scores highest: so the earlier a merge, the higher its result's score."""
    first: dict[str, int] = {}
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
    plain = int(TokenType.NORMAL)
    return [
        -float(first.get(token, len(merges) + index)) if kind == plain else 0.0
        for index, (token, kind) in enumerate(zip(tokens, types, strict=True))
    ]


def _is_sentencepiece(spec: dict[str, Any]) -> bool:
    marks = json.dumps([spec.get("normalizer"), spec.get("pre_tokenizer")], ensure_ascii=False)
    return bool(spec["model"].get("byte_fallback")) and _SPACE in marks


def _puts_space(spec: dict[str, Any]) -> bool:
    return any(
        part.get("type") == "Prepend" or part.get("prepend_scheme") in ("first", "always")
        for part in [*_parts(spec, "normalizer"), *_parts(spec, "pre_tokenizer")]
    )


def _parts(spec: dict[str, Any], field: str) -> list[dict[str, Any]]:
    found: dict[str, Any] = spec.get(field) or {"type": "none"}
    if found["type"] != "Sequence":
        return [found]
    return found["normalizers" if field == "normalizer" else "pretokenizers"]


def _pre_tokenizer(spec: dict[str, Any]) -> str:
    """llama.cpp's name for a byte-level pre-tokenizer. Raises `UserError` where it has none that is known here."""
    match _parts(spec, "pre_tokenizer"):
        case [{"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}]:
            return "gpt-2"
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False},
        ]:
            return "smollm"
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "use_regex": False, "add_prefix_space": False},
        ] if pattern in _PATTERNS:
            return _PATTERNS[pattern]
    raise UserError(
        "GGUF export does not know this tokenizer's pre-tokenizer (it knows GPT-2's, SmolLM's, Llama 3's, Qwen2's and"
        " SentencePiece's): use --format merged and llama.cpp's own convert_hf_to_gguf.py"
    )
