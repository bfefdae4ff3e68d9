"""LoRA layers over nf4, forward and backward: the bare base GEMMs, slothrl (and its layouts), PEFT, Unsloth.

    python -m slothrl bench layers                     # q, k, v; gate, up; o; down; the MLP; Llama-3-8B and Qwen3-0.6B
    python -m slothrl bench layers --tokens 4096 --only 8b

r=16 with float32 adapters under bf16 autocast. "bare" is one bf16 GEMM for all outputs and one for dx, as if the
weights lay in memory side by side in bf16: the least that any implementation could take. "in a layer" is what a whole
layer's backward runs (`LoraGroup`): x and the gradients lie where its neighbours wrote them, and weights are unpacked
once for the forward, which is computed again there, and the backward. Milliseconds are those of the GPU, by replays of
a CUDA graph of forward and backward with a cold L2 cache, the arms in turns, for every arm that can be captured; "wall"
is between events around a plain call. Outputs and gradients must be PEFT's to bf16's precision, those of a replay too.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_timing import Prepared, prepare, timed
from random_models import SHAPES, random_linear, randomize_adapter
from torch import nn

CASES = {"q, k, v": ["q", "k", "v"], "gate, up": ["gate", "up"], "o": ["o"], "down": ["down"]}
HEADS = ["case", "bare", "slothrl", "in a layer", "narrow", "wide", "tall", "recompute", "PEFT"]
TOLERANCE = 4e-2  # of the largest value: bf16 sums of 4,096 terms in another order


class Layers(nn.Module):
    """Linear layers of one input."""

    def __init__(self, widths: dict[str, tuple[int, int]], generator: torch.Generator) -> None:
        super().__init__()
        self.names = list(widths)
        for name, (inputs, outputs) in widths.items():
            self.add_module(name, random_linear(inputs, outputs, generator))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        return [self.get_submodule(name)(x) for name in self.names]


class MLP(nn.Module):
    """Llama's, under its own names."""

    def __init__(self, width: int, inner: int, generator: torch.Generator) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (random_linear(width, inner, generator) for _ in range(2))
        self.down_proj = random_linear(inner, width, generator)
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def widths_of(shape: str) -> dict[str, tuple[int, int]]:
    c = SHAPES[shape]
    width, inner = c["hidden_size"], c["intermediate_size"]
    head = c.get("head_dim", width // c["num_attention_heads"])
    q, k = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    widths = {"q": (width, q), "k": (width, k), "v": (width, k), "o": (q, width)}
    return widths | {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}


def adapted(module: nn.Module) -> Any:
    from peft import LoraConfig, get_peft_model

    module.is_loaded_in_4bit = True  # pyright: ignore - PEFT's bitsandbytes dispatch asks for it
    targets = [name for name, child in module.named_children() if hasattr(child, "weight")]
    model: Any = get_peft_model(module, LoraConfig(r=16, lora_alpha=32, target_modules=targets))  # pyright: ignore
    randomize_adapter(model)
    return model.train()


# --- what is timed ---------------------------------------------------------------------------------------------------


def step_of(function: Callable, x: torch.Tensor, parameters: list, gradients: list) -> Callable[[], list]:
    """A forward and a backward; its results are outputs and gradients."""

    def call() -> list:
        with torch.autocast(x.device.type, torch.bfloat16):
            outputs = function(x)
        outputs = outputs if isinstance(outputs, list) else [outputs]
        found = torch.autograd.grad(outputs, [x, *parameters], gradients)
        # Without their history: the leaves' nodes would live on, and belong to the stream of the first call, which no
        # capture on another one can wait for.
        return [*(y.detach() for y in outputs), *found]

    return call


def bare(layers: nn.Module, x: torch.Tensor, gradients: list) -> Callable[[], Any]:
    """One GEMM forward and one for dx, over bf16 weights side by side."""
    whole = torch.randn(sum(g.size(-1) for g in gradients), x.size(-1), dtype=x.dtype, device=x.device)
    upstream, x = torch.cat(gradients, -1), x.detach()
    return lambda: (x @ whole.T, upstream @ whole)


def bare_mlp(width: int, inner: int, x: torch.Tensor) -> Callable[[], Any]:
    make = lambda *shape: torch.randn(*shape, dtype=x.dtype, device=x.device)  # noqa: E731
    both, down, h, to_h = make(2 * inner, width), make(width, inner), make(len(x), inner), make(len(x), 2 * inner)
    x = x.detach()
    return lambda: (x @ both.T, h @ down.T, x @ down, to_h @ both)


def agrees(ours: list, theirs: list) -> bool:
    """Outputs and gradients to bf16's precision, and no gradient zero."""
    for a, b in zip(ours, theirs, strict=True):
        largest = b.abs().max().item()
        if not largest > 0 or (a.double() - b.double()).abs().max().item() > TOLERANCE * largest:
            return False
    return True


# --- cases ----------------------------------------------------------------------------------------------------------


def in_a_layer(readers: list, x: torch.Tensor, gradients: list) -> Callable[[], list]:
    """Projections of one input as `decoder_layer` runs them, without autograd: [x | x A'^T], gradients side by side."""
    from slothrl_kernels.lora_flat import AdapterGradients, adapter_values
    from slothrl_kernels.lora_group import LoraGroup

    plain = x.detach()
    projections = [reader.read(plain).projection for reader in readers]
    made = LoraGroup(projections, adapter_values([projections], plain)[0], plain, "auto")
    both, upstream, sizes = made.buffer(len(plain)), made.upstream(len(plain)), [g.size(-1) for g in gradients]
    both[:, : made.inputs] = plain
    upstream[:, : made.outputs] = torch.cat(gradients, -1)
    whole = plain.new_empty(made.outputs + made.rank, made.inputs + made.rank)

    @torch.no_grad()
    def call() -> list:
        values = adapter_values([projections], plain)
        group, found = LoraGroup(projections, values[0], plain, "auto"), AdapterGradients([projections], plain)
        y = group.held(group.unpacked(whole)).forward(both, hold=True)
        if len(sizes) == 3:
            to_x = group.backward(both, upstream, found.found[0])
        else:  # gate and up, whose gradients lie where they did
            to_x, to_xa = group.input_gradient(upstream[:, : group.outputs])
            group.parameter_gradients(both, to_xa, upstream[:, : group.outputs], found.found[0])
        return [*y.split(sizes, 1), to_x, *found.finish()]

    return call


def group_case(name: str, shape: str, tokens: int, device: str, missed: list[str]) -> list[str]:
    """One row: a group of linear layers that share their input."""
    from slothrl_kernels import lora_linear

    from slothrl.fuse import fuse
    from slothrl.fuse_layers import LinearReader

    generator = torch.Generator(device).manual_seed(0)
    widths = {key: widths_of(shape)[key] for key in CASES[name]}
    model = adapted(Layers(widths, generator))
    x = torch.randn(tokens, next(iter(widths.values()))[0], device=device).bfloat16().requires_grad_()
    gradients = [torch.randn(tokens, n, device=device).bfloat16() for _, n in widths.values()]
    parameters = [p for p in model.parameters() if p.requires_grad]
    plain = step_of(model, x, parameters, gradients)
    expected = plain()
    fixed = {"bare": prepare(bare(model, x, gradients)), "PEFT": prepare(plain, lambda found: agrees(found, expected))}
    report = fuse(model, inputs={"x": torch.randn(2, x.size(1), device=device).bfloat16().requires_grad_()})
    assert sum(report.fused.values()) == 1 and not report.kept, str(report)
    arms = {"slothrl": step_of(model, x, parameters, gradients)}
    readers: Any = [LinearReader(model.get_submodule(f"base_model.model.{key}")) for key in widths]
    layouts: tuple[Any, ...] = ("narrow", "wide", *(["tall"] if len(widths) == 1 else []))
    for layout in layouts:

        def call(x: torch.Tensor, layout: Any = layout) -> list[torch.Tensor]:
            return lora_linear(x, [r.read(x).projection for r in readers], layout=layout)

        arms[layout] = step_of(call, x, parameters, gradients)
    if len(widths) > 1:
        arms["in a layer"] = in_a_layer(readers, x, gradients)
    return row(f"{name}, {shape}", fixed, arms, expected, missed)


def mlp_case(shape: str, tokens: int, device: str, missed: list[str]) -> list[str]:
    """One row: the whole MLP, gate and up kept; and recomputed, as under a checkpoint (one forward GEMM pair more)."""
    from slothrl_kernels import lora_mlp

    from slothrl.fuse import fuse
    from slothrl.fuse_layers import LinearReader

    generator, sizes = torch.Generator(device).manual_seed(0), widths_of(shape)
    model = adapted(MLP(*sizes["gate"], generator))
    x = torch.randn(tokens, sizes["gate"][0], device=device).bfloat16().requires_grad_()
    gradients = [torch.randn(tokens, sizes["gate"][0], device=device).bfloat16()]
    parameters = [p for p in model.parameters() if p.requires_grad]
    plain = step_of(model, x, parameters, gradients)
    expected = plain()
    fixed = {"bare": prepare(bare_mlp(*sizes["gate"], x)), "PEFT": prepare(plain, lambda y: agrees(y, expected))}
    report = fuse(model, inputs={"x": torch.randn(2, x.size(1), device=device).bfloat16().requires_grad_()})
    assert report.fused["gated MLP"] == 1, str(report)
    arms = {"slothrl": step_of(model, x, parameters, gradients)}
    names = ("gate_proj", "up_proj", "down_proj")
    readers: Any = [LinearReader(model.get_submodule(f"base_model.model.{name}")) for name in names]

    def recomputed(x: torch.Tensor) -> torch.Tensor:
        gate, up, down = (r.read(x).projection for r in readers)
        return lora_mlp(x, [gate, up], down, recompute=True)

    arms["recompute"] = step_of(recomputed, x, parameters, gradients)
    return row(f"MLP, {shape}", fixed, arms, expected, missed)


def row(
    name: str, fixed: dict[str, Prepared], arms: dict[str, Callable], expected: list, missed: list[str]
) -> list[str]:
    """A table's row; a wrong arm is marked, and `missed` gets what could not be captured.

    fixed: "bare" and "PEFT", of before the model was fused.
    """
    right = lambda results: agrees(results, expected)  # noqa: E731
    wrong = {arm for arm, call in arms.items() if not right(call())}
    found = timed(fixed | {arm: prepare(call, right) for arm, call in arms.items() if arm not in wrong})
    missed += [f"{name}: {arm} was not captured, {t.why}" for arm, t in found.items() if t.why]
    base, cells = found["bare"], [name, found["bare"].cell()]
    for arm in HEADS[2:]:
        cells.append(found[arm].cell(base) if arm in found else "WRONG" if arm in wrong else "-")
    return cells


def unsloth_row(shape: str, tokens: int) -> list[str]:
    """Unsloth's q, k, v over the same layers, in a process that imported it first; its MLP has no gate and up alone."""
    kernels: Any = importlib.import_module("unsloth.kernels")
    generator, sizes = torch.Generator("cuda").manual_seed(0), widths_of(shape)
    layers = Layers({f"{key}_proj": sizes[key] for key in ("q", "k", "v")}, generator)
    model = adapted(layers)
    x = torch.randn(1, tokens, sizes["q"][0], device="cuda").bfloat16().requires_grad_()
    gradients = [torch.randn(1, tokens, sizes[key][1], device="cuda").bfloat16() for key in ("q", "k", "v")]
    parameters = [p for p in model.parameters() if p.requires_grad]
    inner = model.base_model.model
    # inplace=False: else dx is written over x, and the next call has another input
    call = step_of(lambda x: list(kernels.apply_lora_qkv(inner, x, inplace=False)), x, parameters, gradients)
    expected = step_of(model, x, parameters, gradients)()
    if not agrees(call(), expected):
        return [f"q, k, v, {shape}", "WRONG"]
    arms = {"bare": prepare(bare(model, x[0], [g[0] for g in gradients]))}
    found = timed(arms | {"Unsloth": prepare(call, lambda results: agrees(results, expected))})
    return [f"q, k, v, {shape}", found["bare"].cell(), f"{found['Unsloth'].cell(found['bare'])} {found['Unsloth'].why}"]


def main() -> int:
    parser = argparse.ArgumentParser(prog="slothrl bench layers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--only", choices=list(SHAPES), help="one model's shapes")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--unsloth", action="store_true", help=argparse.SUPPRESS)  # in the process that imports it
    arguments = parser.parse_args()
    shapes, wrong = [arguments.only] if arguments.only else ["8b", "0.6b"], 0
    if arguments.unsloth:
        importlib.import_module("unsloth")
        for shape in shapes:
            print("| " + " | ".join(unsloth_row(shape, arguments.tokens)) + " |", flush=True)
        return 0
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "CPU"
    print(f"### LoRA layers over nf4, r=16, {arguments.tokens} tokens, forward and backward\n")
    print(f"{device}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}")
    print("ms of the GPU (times bare; ms between events; extra memory)\n")
    print("| " + " | ".join(HEADS) + " |\n" + "|---" * len(HEADS) + "|", flush=True)
    missed: list[str] = []
    for shape in shapes:
        for case in [*CASES, "MLP"]:
            run = mlp_case if case == "MLP" else group_case
            try:
                options = (shape, arguments.tokens, arguments.device, missed)
                cells = run(*options) if case == "MLP" else run(case, *options)  # pyright: ignore
            except Exception as error:  # the other rows still count
                cells = [f"{case}, {shape}", f"FAILED: {type(error).__name__}: {str(error)[:150]!r}"]
            wrong += any("WRONG" in cell or "FAILED" in cell for cell in cells)
            print("| " + " | ".join(cells) + " |", flush=True)
    print("\n" + ("\n".join(missed) if missed else "every arm was captured"), flush=True)
    if importlib.util.find_spec("unsloth"):
        print("\n| case | bare | Unsloth |\n|---|---|---|", flush=True)
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--unsloth"])
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
