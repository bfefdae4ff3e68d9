"""`python -m slothrl eval`: the held-out score of any adapter, or of the base, without training."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slothrl.errors import ConfigError, UserError

if TYPE_CHECKING:
    from slothrl.prepare import Prepared

USAGE = """\
python -m slothrl eval adapter=PATH [--config-dir FOLDER] [out=FILE] [group=choice] [key=value] …

Completes the held-out prompts greedily, with the engine that training would use, scores them and writes JSON.
  adapter=PATH  a run folder, an adapter folder (PEFT's adapter_config.json in it), or `none` for the base alone
  out=FILE      where the JSON goes; default: eval.json in the run folder, or here for other adapters
For a run, or the adapter in it, the run's own overrides come first; yours replace them. The LoRA's shape is read from
the adapter. reward.score_samples=K samples K completions a prompt as well, for pass@k.
Example: python -m slothrl eval adapter=outputs/2026-11-22/10-15-00-slothrl data.eval_size=200
"""
SHAPE = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora")  # of PEFT's LoraConfig, under our names


def main(argv: list[str]) -> int:
    """Evaluate and print the score; returns the exit code."""
    from slothrl.train import INTERRUPTED, fail

    try:
        if {"--help", "-h"} & set(argv):
            print(USAGE)
            return 0
        return _run(argv)
    except UserError as error:
        return fail(error)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return INTERRUPTED


def _run(argv: list[str]) -> int:
    from slothrl.compose import compose_config
    from slothrl.report import write_json
    from slothrl.train import _take_overlay

    ours = dict(word.split("=", 1) for word in argv if word.startswith(("adapter=", "out=")))
    given = [word for word in argv if not word.startswith(("adapter=", "out="))]
    if not ours.get("adapter"):
        raise ConfigError(["adapter=… is needed: a run folder, an adapter folder, or none; see --help"])
    adapter = None if ours["adapter"] == "none" else find_adapter(Path(ours["adapter"]).expanduser())
    overlay, overrides = _take_overlay(_with_run(adapter, given))
    if flags := [word for word in overrides if word.startswith("-")]:
        raise ConfigError([f"{flag}: no such option of `slothrl eval`; see --help" for flag in flags])
    shape = lora_overrides(adapter) if adapter else []
    config = compose_config([*overrides, *shape, "logger.report_to=[]"], overlay)
    result = evaluate(config, adapter)
    run = _run_of(adapter)
    target = Path(ours["out"]).expanduser() if ours.get("out") else (run or Path()) / "eval.json"
    try:
        write_json(target, result)
    except OSError as error:
        raise UserError(f"out={target}: {error.strerror}") from error
    for score in result["scores"]:
        print(f"{score['name']}: {score['value']:.3f} [{score['low']:.3f}, {score['high']:.3f}] ({score['method']})")
    print(f"wrote {target}")
    return 0


def find_adapter(place: Path) -> Path:
    """The folder with the adapter's weights: `place`, or `place/adapter` of a run.

    Raises:
        UserError: there is none.
    """
    if not place.is_dir():
        raise UserError(f"adapter={place}: no such folder; name a run, an adapter's folder, or none for the base")
    for folder in (place / "adapter", place):
        if (folder / "adapter_config.json").is_file() and (folder / "adapter_model.safetensors").is_file():
            return folder
    raise UserError(f"adapter={place}: no adapter_config.json with adapter_model.safetensors there, nor in adapter/")


def _run_of(adapter: Path | None) -> Path | None:
    """The run folder that an adapter lies in."""
    from slothrl.resume import RUN

    parent = adapter.absolute().parent if adapter else None
    return parent if parent is not None and (parent / RUN).is_file() else None


def _with_run(adapter: Path | None, given: list[str]) -> list[str]:
    """The overrides of the adapter's run, then those given."""
    from slothrl.resume import recorded

    run = _run_of(adapter)
    return recorded(run, given) if run else given


def lora_overrides(adapter: Path) -> list[str]:
    """The adapter's own shape as overrides.

    Raises:
        UserError: it is no LoRA that slothrl trains.
    """
    shape = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    if shape.get("peft_type") != "LORA":
        raise UserError(f"adapter={adapter}: a {shape.get('peft_type')} adapter; eval takes LoRA")
    return [f"model.lora.{name}={json.dumps(shape[name])}" for name in SHAPE if shape.get(name) is not None]


def evaluate(config: Any, adapter: Path | None) -> dict[str, Any]:
    """Score an adapter, or the base, on the held-out rows of a composed config.

    Returns:
        What was evaluated, `scores` with 95% intervals, and the records of `slothrl.scoring.score_policy`.

    Raises:
        UserError: nothing is held out, or the adapter is another model's.
    """
    from slothrl.checkpoint import digest
    from slothrl.fingerprint import fingerprint
    from slothrl.prepare import prepare
    from slothrl.provenance import device_name, versions
    from slothrl.reward_workers import closing_workers
    from slothrl.trainers.build import trainer_config

    with closing_workers(), tempfile.TemporaryDirectory() as scratch:
        prepared = prepare(config)
        if prepared.score is None and prepared.eval_loss is None:
            raise UserError("nothing is held out: data.eval_size=… or data.eval_split=…, and reward.score=…")
        arguments = trainer_config(prepared, Path(scratch))
        records = _score(prepared, arguments, adapter)
        made_of = fingerprint(prepared, arguments)
    return {
        "adapter": str(adapter.absolute()) if adapter else None,
        "adapter_sha256": digest(adapter / "adapter_model.safetensors") if adapter else None,
        "model": prepared.model.title,
        "data": prepared.data_title,
        "engine": prepared.engine.name,
        "device": device_name(config.gpu.device),
        "scores": summarised(records),
        "versions": versions(),
        "made_of": made_of,
        "records": records,
    }


def _score(prepared: Prepared, arguments: Any, adapter: Path | None) -> list[dict[str, Any]]:
    """The records of the adapter in the policy that training would start with, on training's engine."""
    from rich.console import Console

    from slothrl.rollout import attach_engine, open_base
    from slothrl.scoring import score_policy, watched
    from slothrl.trainers.build import build_trainer

    base = open_base(prepared, arguments)
    trainer = build_trainer(prepared, arguments, base.model)
    engine = attach_engine(prepared, trainer, base, Console(stderr=True))
    # The stacks of a hang go where anybody may write.
    watch = watched(prepared, Path(tempfile.gettempdir()), "give it more time: rollout.timeout=…")
    try:
        if adapter is not None:
            load_adapter(trainer.model, adapter)
        return score_policy(prepared, trainer, engine, watch)
    finally:
        engine.close()


def load_adapter(model: Any, adapter: Path) -> None:
    """Put saved LoRA weights into a PEFT model in place, so that engines tied to its tensors see them.

    Raises:
        UserError: the names or shapes are another model's.
    """
    from peft import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors.torch import load_file

    saved, expected = load_file(adapter / "adapter_model.safetensors"), get_peft_model_state_dict(model)
    wrong = [name for name in {**saved, **expected} if _shape(saved.get(name)) != _shape(expected.get(name))]
    if wrong:
        differing = f"{wrong[0]}: {_shape(saved.get(wrong[0]))} there, {_shape(expected.get(wrong[0]))} in this model"
        raise UserError(f"adapter={adapter} is another model's: {len(wrong)} tensors differ, as in {differing}")
    set_peft_model_state_dict(model, saved)


def _shape(tensor: Any) -> list[int] | None:
    return None if tensor is None else list(tensor.shape)


def summarised(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each held-out number of one measurement with its 95% interval."""
    from slothrl.outcome import measurements

    found = [(m.name, m.before) for m in measurements(records)]
    return [
        {"name": name, "value": part.value, "low": part.low, "high": part.high, "method": part.method}
        for name, part in found
        if part is not None
    ]
