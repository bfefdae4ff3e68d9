"""`python -m slothrl export`: a trained adapter as PEFT, as a merged 16-bit checkpoint, or as GGUF."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slothrl.errors import UserError

USAGE = "python -m slothrl export RUN_OR_ADAPTER --format peft|merged|gguf [--out DIR]"
FORMATS = ("peft", "merged", "gguf")
DTYPES = ("bfloat16", "float16")
TYPES = ("f16", "q8_0", "bf16", "f32")
# The files of a tokenizer, as transformers and their predecessors save it.
TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
INDEX = "model.safetensors.index.json"
SPARE_BYTES = 50_000_000  # tokenizer and JSON beside the weights


def main(argv: list[str]) -> int:
    """Export, and say what was written; returns the exit code."""
    from slothrl.train import fail

    try:
        options = parser().parse_args(argv)
    except SystemExit as stop:  # argparse's own way of --help and of mistakes
        return int(stop.code or 0)
    try:
        for line in export(options):
            print(line)
        return 0
    except UserError as error:
        return fail(error)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m slothrl export", description=__doc__, allow_abbrev=False)
    made.add_argument("adapter", metavar="RUN_OR_ADAPTER", type=Path, help="a run, a checkpoint in it, or an adapter")
    made.add_argument("--format", required=True, choices=FORMATS, help="what to make of it")
    made.add_argument("--out", type=Path, help="the folder to write; beside the adapter where not given")
    made.add_argument("--base", help="the base model, where it is not where the adapter says: folder or hub name")
    made.add_argument("--dtype", choices=DTYPES, help="of merged weights (default: bfloat16)")
    made.add_argument("--type", choices=TYPES, help="of the GGUF's matrices (default: f16)")
    made.add_argument("--force", action="store_true", help="write into a folder that is not empty")
    return made


def export(options: argparse.Namespace) -> list[str]:
    """Do what the arguments say; the lines that tell what was done.

    Raises:
        UserError: with what is wrong, before anything is written.
    """
    from slothrl.adapter import find_adapter

    for name, wanted in (("dtype", "merged"), ("type", "gguf")):
        if getattr(options, name) and options.format != wanted:
            raise UserError(f"--{name} belongs to --format {wanted}")
    folder = find_adapter(options.adapter.expanduser())
    kind = options.type or "f16"
    suffix = f"-{kind}" if options.format == "gguf" else ""
    out = options.out.expanduser() if options.out else folder.absolute().parent / f"export-{options.format}{suffix}"
    check_out(out, options.force)
    if options.format == "peft":
        notes = export_peft(folder, out, options.base)
    elif options.format == "merged":
        notes = export_merged(folder, out, options.base, options.dtype or "bfloat16")
    else:
        notes = export_gguf(folder, out, options.base, kind)
    return [f"{folder} -> {out}", *(f"  {file}" for file in _contents(out)), *(f"note: {note}" for note in notes)]


# --- the formats ------------------------------------------------------------------------------------------------------


def export_peft(folder: Path, out: Path, base: str | None = None) -> list[str]:
    """Write the adapter as PEFT loads it, its base under a name that means something elsewhere. Returns notes.

    Args:
        folder: holds adapter_config.json.
        base: a name for the base; None: the adapter's own, for an embedded model that of the hub.
    """
    from slothrl.adapter import CONFIG, WEIGHTS, read_config
    from slothrl.base_weights import base_folder, embedded_name
    from slothrl.embedded import EMBEDDED

    named, notes = read_config(folder).base_model_name_or_path, []
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} has no {WEIGHTS}: other formats are pickles, which are not read")
    embedded = embedded_name(base or named)
    if embedded is not None:
        public = EMBEDDED[embedded].hub_name
        notes.append(f"trained on {EMBEDDED[embedded].title} from a 4-bit file: {public} has the weights before that")
    else:
        public = base or named
        if Path(public).exists():
            public = str(Path(public).absolute())
            notes.append(f"the base is a folder of this machine, {public}: --base HUB_NAME names it for others")
    # `base` is a name for others, which need not be here.
    tokenizer = _tokenizer_folder(folder, lambda: base_folder(named if Path(named).is_dir() else base or named))
    config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    config |= {"base_model_name_or_path": public, "inference_mode": True}
    if public != named:
        config["revision"] = None  # it was one of the other name's

    def fill(scratch: Path) -> None:
        _write_json(scratch / CONFIG, config)
        shutil.copyfile(folder / WEIGHTS, scratch / WEIGHTS)
        _copy(tokenizer, scratch, TOKENIZER)

    _publish(out, (folder / WEIGHTS).stat().st_size, fill)
    return notes


def export_merged(folder: Path, out: Path, base: str | None = None, dtype: str = "bfloat16") -> list[str]:
    """Write a checkpoint of W + scaling * B @ A, computed in float32 and rounded once to `dtype`. Returns notes.

    Args:
        folder: holds adapter_config.json.
        base: where the original weights are; None: where the adapter says.
        dtype: "bfloat16", "float16", or "float32".
    """
    import torch

    from slothrl.safetensors_shards import write_shards

    merged, notes = _merged(folder, base)
    wanted: Any = getattr(torch, dtype)
    entries = merged.entries(wanted)
    tokenizer = _tokenizer_folder(folder, lambda: merged.base.folder)

    def fill(scratch: Path) -> None:
        write_shards(scratch, entries, merged.rounded(wanted))
        _write_json(scratch / "config.json", _merged_config(merged, dtype))
        _copy(merged.base.folder, scratch, ("generation_config.json",))
        _copy(tokenizer, scratch, TOKENIZER)

    _publish(out, sum(entry.nbytes for entry in entries), fill)
    return notes


def export_gguf(folder: Path, out: Path, base: str | None = None, kind: str = "f16") -> list[str]:
    """Write `out/model-<kind>.gguf` of the merged model. Returns notes.

    Args:
        folder: holds adapter_config.json.
        base: where the original weights are; None: where the adapter says.
        kind: of the matrices, one of `TYPES`.
    """
    from transformers import AutoTokenizer

    from slothrl.base_weights import embedded_name
    from slothrl.embedded import EMBEDDED
    from slothrl.gguf_file import plan_tensors, write_gguf
    from slothrl.gguf_layout import window_note
    from slothrl.gguf_vocabulary import read_vocabulary

    merged, notes = _merged(folder, base)
    planned = plan_tensors(merged, kind)
    tokenizer = AutoTokenizer.from_pretrained(_tokenizer_folder(folder, lambda: merged.base.folder))
    read_vocabulary(tokenizer, merged.model_config.vocab_size)  # refused before anything is written
    notes += [note for note in [window_note(merged.model_config)] if note]
    embedded = embedded_name(str(merged.base.folder))
    title = f"{EMBEDDED[embedded].title if embedded else merged.base.folder.name}, slothrl"
    path = f"model-{kind}.gguf"
    needed = sum(tensor.nbytes for tensor in planned)
    _publish(out, needed, lambda scratch: write_gguf(scratch / path, merged, tokenizer, kind, title))
    return notes


# --- what they share --------------------------------------------------------------------------------------------------


def check_out(out: Path, force: bool) -> None:
    """Raise `UserError` where `out` cannot be written to, or would be overwritten without `force`."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    if out.exists() and any(out.iterdir()) and not force:
        raise UserError(f"{out} is not empty: --out names another folder, --force writes into this one")


def _merged(folder: Path, base: str | None) -> tuple[Any, list[str]]:
    """The `MergedWeights` of an adapter, and what to tell about its base."""
    from slothrl.adapter import read_adapter
    from slothrl.base_weights import BaseWeights, base_folder
    from slothrl.merge import MergedWeights

    adapter = read_adapter(folder)
    named = base or adapter.config.base_model_name_or_path
    weights = BaseWeights(base_folder(named, None if base else adapter.config.revision))
    merged, notes = MergedWeights(weights, adapter), []
    if weights.quantized:
        notes.append(
            f"the base {weights.folder} is itself 4-bit: its weights were unpacked, the originals are not in it"
        )
    if merged.untied:
        notes.append("the embedding and the output layer were one matrix: the adapter makes them two")
    return merged, notes


def _merged_config(merged: Any, dtype: str) -> dict[str, Any]:
    """The base's config.json for the merged weights."""
    config = {name: value for name, value in merged.base.config.items() if name != "quantization_config"}
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for name in ("dtype", "torch_dtype"):  # since and before transformers 5
            if name in part:
                part[name] = dtype
    if "torch_dtype" not in config:
        config["dtype"] = dtype
    if merged.untied:
        config["tie_word_embeddings"] = False
    return config


def _tokenizer_folder(adapter: Path, base: Callable[[], Path]) -> Path:
    """Where the tokenizer is: with the adapter, as it was trained; for a checkpoint in its run; else with the base."""
    from slothrl.checkpoint import step_of

    for folder in (adapter, adapter.parent / "adapter") if step_of(adapter) >= 0 else (adapter,):
        if (folder / "tokenizer_config.json").is_file():
            return folder
    return base()


def _publish(out: Path, needed: int, fill: Callable[[Path], None]) -> None:
    """Have `fill` write a folder of about `needed` bytes beside `out`, and move its files there when all are whole."""
    from slothrl.plan import size

    out.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out.parent).free
    if free < needed + SPARE_BYTES:
        raise UserError(f"{out} needs {size(needed + SPARE_BYTES)}, and {size(free)} are free there: --out elsewhere")
    scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        fill(scratch)
        out.mkdir(exist_ok=True)
        if (scratch / INDEX).exists():
            for stale in out.glob("model*.safetensors"):  # an earlier export may have had more shards
                stale.unlink()
        for path in scratch.iterdir():
            path.replace(out / path.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _copy(source: Path, target: Path, names: tuple[str, ...]) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _contents(out: Path) -> list[str]:
    from slothrl.plan import size

    return [f"{path.name}  {size(path.stat().st_size)}" for path in sorted(out.iterdir()) if path.is_file()]
