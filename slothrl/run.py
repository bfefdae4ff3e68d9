"""One run, from a checked config to its summary: `python -m slothrl` and the notebooks both come through here."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from slothrl_kernels import attention_choice

from slothrl.activations import keep_activations
from slothrl.checkpoint import checkpoints, set_aside, sweep
from slothrl.config import Config
from slothrl.engine import Engine, describe_engine
from slothrl.fingerprint import fingerprint, settings
from slothrl.fuse import fuse_as_asked
from slothrl.graphs import graph_layers, graphs_of
from slothrl.host_embeddings import move_embeddings
from slothrl.interrupts import Interrupts
from slothrl.memory import memory_given_back
from slothrl.models import parameter_bytes
from slothrl.plan import Batch, Plan, Rows, size
from slothrl.prepare import Prepared, check_targets, prepare
from slothrl.provenance import record_provenance
from slothrl.report import append_jsonl, draw_curve, read_json, read_jsonl, write_json
from slothrl.resume import ResumePoint, resume_command, settle
from slothrl.reward_workers import closing_workers
from slothrl.rollout import Base, attach_engine, open_base
from slothrl.run_lock import only_writer
from slothrl.run_report import REPORT_HTML, reported
from slothrl.scoring import headline, metric_name, score_policy, watched
from slothrl.training import train


@dataclass(frozen=True)
class Summary:
    """What came of a run.

    Attributes:
        metric: what `before` and `after` measure: a reward function's name (greedy, held-out), or "eval_loss".
        before, after: None where nothing was held out, or where the run stopped before measuring.
        resume: the command that goes on, where the run was interrupted.
        signal: what interrupted it, "SIGINT" or "SIGTERM".
    """

    output_dir: str
    metric: str | None
    before: float | None
    after: float | None
    steps: int
    train_seconds: float
    seconds: float
    engine: str
    resume: str | None = None
    signal: str | None = None


@closing_workers()
def run(config: Config, output_dir: Path, overrides: Sequence[str] = (), console: Console | None = None) -> Summary:
    """Train as `config` says.

    Args:
        config: composed and checked (`slothrl.checks.problems`).
        output_dir: everything the run writes lands here.
        overrides: the command line that led here, for the command that resumes.
    Raises:
        UserError: something the user can mend; nothing has been trained, unless it is a `FaultError`.
        Stopped: a signal came while there was no step to finish, or a second one.
    """
    with memory_given_back(), only_writer(output_dir), Interrupts() as interrupts:
        return _run(config, output_dir, overrides, console or Console(), interrupts)


def _run(
    config: Config, output_dir: Path, overrides: Sequence[str], console: Console, interrupts: Interrupts
) -> Summary:
    start = time.monotonic()
    sweep(output_dir)
    prepared = prepare(config, output_dir)
    check_targets(prepared.model, config.model.lora.target_modules)
    # Libraries keep exceptions of their imports (vLLM that of a missing torchcodec), which keep every frame they came
    # through and all that it names: the model is named in none from which TRL and vLLM are imported.
    from slothrl.trainers.build import trainer_config

    arguments = trainer_config(prepared, output_dir)
    made_of = fingerprint(prepared, arguments)
    point = _resume_point(prepared, output_dir, made_of, console)
    record_provenance(output_dir, prepared, made_of, overrides)
    job = Job(prepared, arguments, output_dir, point, made_of, resume_command(overrides, output_dir), start)
    with reported(output_dir):
        return _work(job, console, interrupts)


@dataclass(frozen=True)
class Job:
    """A run whose config, data and rewards have been tried, and of which nothing is loaded yet.

    Attributes:
        arguments: TRL's config.
        point: where it goes on; None: from the start.
        made_of: as `slothrl.fingerprint.fingerprint` makes it.
        command: the shell command that goes on with it.
        start: `time.monotonic()` when it began.
    """

    prepared: Prepared
    arguments: Any
    output_dir: Path
    point: ResumePoint | None
    made_of: dict[str, Any]
    command: str
    start: float


def _work(job: Job, console: Console, interrupts: Interrupts) -> Summary:
    """Load, score, train, score: nothing of it is left in memory when `run` returns."""
    prepared, output_dir, command = job.prepared, job.output_dir, job.command
    base, trainer, engine = open_base(prepared, job.arguments), None, None
    try:
        trainer, engine = _start(prepared, job.arguments, base, output_dir, console)
        trainer.made_of, trainer.settings = job.made_of, settings(prepared)
        before = _first_score(prepared, trainer, engine, output_dir, command, resumed=job.point is not None)
        _say_score(console, prepared, "before", before)
        train_seconds = train(trainer, prepared, output_dir, job.point, console, interrupts, command)
        if (graphs := graphs_of(trainer.model)) is not None:
            console.print(f"CUDA graphs of layers: {graphs}", markup=False)
        for line in attention_choice.said():
            console.print(f"attention over packs: {line}", markup=False)
        after = None if interrupts.number else _score(prepared, trainer, engine, output_dir, command)
        summary = Summary(
            output_dir=str(output_dir),
            metric=metric_name(prepared),
            before=before,
            after=after,
            steps=trainer.state.global_step,
            train_seconds=round(train_seconds, 1),
            seconds=round(time.monotonic() - job.start, 1),
            engine=engine.name,
            resume=command if interrupts.number else None,
            signal=signal.Signals(interrupts.number).name if interrupts.number else None,
        )
        _close(trainer, engine, summary, console, sft=prepared.sft)
        return summary
    except Exception:
        if base.engine is not None:  # a sweep's next run needs the memory
            with contextlib.suppress(Exception):  # what broke is what is told
                base.engine.close()
        raise
    finally:
        base = trainer = engine = None  # whoever keeps this frame (see `_run`) does not keep them


def _start(prepared: Prepared, arguments, base: Base, output_dir: Path, console: Console):
    """The trainer around the base and its engine, with the plan shown before anything is generated."""
    from slothrl.trainers.build import build_trainer

    trainer = build_trainer(prepared, arguments, base.model)
    wish, cuda = prepared.config.model.embeddings, prepared.config.gpu.device == "cuda"
    moved = move_embeddings(trainer.model, wish, base.shared is not None) if cuda or wish == "host" else []
    fused = fuse_as_asked(trainer.model, prepared.config.model.fuse, prepared.config.gpu.device)
    wanted = prepared.config.model
    if arguments.gradient_checkpointing:
        fused += keep_activations(trainer.model, wanted.activations, wanted.activation_gib)
    elif wanted.activations != "auto" or wanted.activation_gib is not None:
        asked = f"activation_gib={wanted.activation_gib}" if wanted.activations == "auto" else ""
        asked = asked or f"activations={wanted.activations}"
        fused += [("activations", f"all of them: model.{asked} is for trainer.gradient_checkpointing=true")]
    if prepared.config.gpu.device == "cuda":
        vllm = prepared.engine.name == "vllm"
        fused += graph_layers(trainer.model, prepared.config.model.graphs, beside_vllm=vllm)
    describe(prepared, trainer, base, output_dir, moved + fused).show(console)
    return trainer, attach_engine(prepared, trainer, base, console)


def _resume_point(prepared: Prepared, output_dir: Path, made_of: dict, console: Console) -> ResumePoint | None:
    config = prepared.config
    if not config.resume:
        for moved in set_aside(output_dir, above=-1):
            console.print(f"renamed to {moved.name}: a new run begins here", markup=False)
        return None
    place = Path(config.resume).expanduser()
    return settle(place, output_dir, made_of, settings(prepared), config.resume_changed, console)


# --- the plan -------------------------------------------------------------------------------------------------------


def describe(prepared: Prepared, trainer, base: Base, output_dir: Path, fused: Rows) -> Plan:
    """The plan table of a run whose model is loaded, before anything is generated; `fused`: rows on fused layers."""
    config, args, model = prepared.config, trainer.args, prepared.model
    weights, trainable, count = parameter_bytes(trainer.model)
    plan = Plan(f"slothrl: {config.algo.name}")
    plan.add("model", f"{model.title}, {count / 1e6:,.1f}M parameters, {size(weights)} in memory")
    quantization = "not quantised" if model.quantization == "none" else model.quantization
    plan.add("weights", f"{quantization}, {str(model.dtype).removeprefix('torch.')}, on {config.gpu.device}")
    plan.add("base", base.note)
    lora = config.model.lora
    adapter = f"{trainable / 1e6:.2f}M trainable, {size(trainable * 4)} in float32"
    plan.add("LoRA", f"r={lora.r}, alpha={lora.lora_alpha}, {adapter}")
    for what, how in fused:
        plan.add(what, how)
    plan.add("data", f"{prepared.data_title}{_prompt_note(prepared)}")
    plan.add("step", _batch(prepared, args).describe())
    steps = args.max_steps if args.max_steps > 0 else f"{args.num_train_epochs:g} epochs"
    plan.add("steps", f"{steps}, lr {args.learning_rate:g}")
    if prepared.sft:
        plan.add("head", trainer.describe_head())
    else:
        plan.add("update", trainer.describe_update())
        plan.add("engine", describe_engine(prepared.engine, config.rollout))
        if base.engine is not None:
            plan.add("generation", base.engine.describe())
        for reward in prepared.rewards:
            plan.add("reward", f"{reward.name} x {reward.weight:g} ({reward.source})")
    if prepared.score is not None:
        plan.add("held-out score", f"{prepared.score.name}, greedy")
    plan.add("output", str(output_dir))
    return plan


def _batch(prepared: Prepared, args) -> Batch:
    if prepared.sft:
        return Batch(args.per_device_train_batch_size, args.gradient_accumulation_steps, 1, 1, args.max_length or 0)
    longest = (prepared.prompts.longest if prepared.prompts else 0) + args.max_completion_length
    return Batch(
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.num_generations,
        args.steps_per_generation,
        longest,
    )


def _prompt_note(prepared: Prepared) -> str:
    report = prepared.prompts
    if report is None:
        return ""
    note = f"; {report.format} prompts of at most {report.longest} tokens"
    if report.dropped or report.truncated:
        note += f"; over-long: {report.dropped} dropped, {report.truncated} truncated (data.overlong)"
    return note


# --- scoring -------------------------------------------------------------------------------------------------------


def _first_score(
    prepared: Prepared, trainer, engine: Engine, output_dir: Path, command: str, resumed: bool
) -> float | None:
    """The score before training; a resumed run takes it from where the first part wrote it."""
    path = output_dir / "held_out_before.json"
    if resumed and path.exists():
        return read_json(path)["value"]
    value = _score(prepared, trainer, engine, output_dir, command)
    write_json(path, {"metric": metric_name(prepared), "value": value})
    return value


def _score(prepared: Prepared, trainer, engine: Engine, output_dir: Path, command: str) -> float | None:
    """The held-out score of the policy as it is now; what was measured goes to held_out.jsonl."""
    advice = f"go on with: {command}" if checkpoints(output_dir) else "nothing is trained yet: start it again"
    records = score_policy(prepared, trainer, engine, watched(prepared, output_dir, advice))
    for record in records:
        append_jsonl(output_dir / "held_out.jsonl", record)
    return headline(records)


def _say_score(console: Console, prepared: Prepared, when: str, value: float | None) -> None:
    if value is not None:
        console.print(f"held-out {metric_name(prepared)} {when}: {value:.3f}")


def _close(trainer, engine: Engine, summary: Summary, console: Console, sft: bool) -> None:
    """Draw the curve, write the summary, say what came out, let the engine go."""
    folder = Path(summary.output_dir)
    curve = folder / ("loss_curve.png" if sft else "reward_curve.png")
    drawn = draw_curve(read_jsonl(folder / "metrics.jsonl"), curve, "loss" if sft else "reward")
    write_json(folder / "summary.json", asdict(summary))
    plan = Plan("interrupted" if summary.resume else "done")
    plan.add("steps", f"{summary.steps} in {summary.train_seconds:.0f} s of training, {summary.seconds:.0f} s in all")
    if summary.before is not None:
        change = "" if summary.after is None else f" -> {summary.after:.3f} ({summary.after - summary.before:+.3f})"
        plan.add(f"held-out {summary.metric}", f"{summary.before:.3f}{change}")
    plan.add("adapter", str(folder / "adapter"))
    if drawn:
        plan.add("curve", str(curve))
    plan.add("metrics", str(folder / "metrics.jsonl"))
    plan.add("report", str(folder / REPORT_HTML))
    if summary.resume:
        plan.add("go on with", summary.resume)
    plan.show(console)
    engine.close()
