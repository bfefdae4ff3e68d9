"""`fuse(model)`: one model instance on fused layers, found by what modules hold and compute; `unfuse(model)`: back.

Every replacement is a forward on one module instance, and is tried against the module's own on random input before it
is put there: what does not agree stays, and is reported with the reason. Parameters, buffers, hooks, names and classes
stay as they are, so that checkpoints, adapters, vLLM's view of the weights and other models know nothing of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from slothrl_kernels import Impl, takes_triton
from torch import Tensor, nn

from slothrl.fuse_layer import FusedLayer
from slothrl.fuse_layer_find import find_layers
from slothrl.fuse_layers import LinearReader, is_linear
from slothrl.fuse_linear import FusedGroup, FusedLinear
from slothrl.fuse_mlp import FusedMLP, activation_of, candidates
from slothrl.fuse_norm import find_norm, looks_like_norm
from slothrl.fuse_qk import join_norms
from slothrl.fuse_replace import Replacement, device_and_dtype, proven, replaced_by_others, trial
from slothrl.fuse_report import FuseReport
from slothrl.fuse_rope import FusedRope, rotates_alike, rotation_of
from slothrl.fuse_timing import time_layer
from slothrl.fuse_trace import Trace, trace
from slothrl.plan import Rows

_KEPT = "_slothrl_replacements"  # on the model, for unfuse
OTHERS = "somebody else replaced its forward"


def fuse(
    model: nn.Module, impl: Impl = "auto", inputs: Mapping[str, Any] | None = None, only_if_faster: bool = False
) -> FuseReport:
    """Put fused layers into `model`, in place: RMSNorm, RoPE, gated MLPs, and linear layers with LoRA.

    Call it after PEFT has wrapped the model. Adapters may be disabled, merged, trained and saved afterwards as before;
    what a fused layer cannot do at a call (several active adapters, say) the module's own forward does.

    Args:
        model: a causal language model of transformers, PEFT-wrapped or not, or any module.
        impl: "auto" runs Triton where it serves, else plain torch; see `slothrl_kernels`.
        inputs: keyword arguments of a small forward, for a model that does not take `inputs_embeds`.
        only_if_faster: time the first decoder layer both ways (`fuse_timing`), and leave the model as it was where
            fusing loses; for a model that takes `inputs_embeds`.

    Returns:
        What was fused, what was not and why.

    Raises:
        ValueError: the model is fused already.
    """
    if is_fused(model):
        raise ValueError("this model is fused already: unfuse(model) comes first")
    base: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    device, dtype = device_and_dtype(base)
    report, names = FuseReport(), {module: name for name, module in base.named_modules()}
    with trial(device, dtype):
        seen = trace(base, inputs)
        found = _Finder(base, names, seen, report, impl, device, dtype).find()
        whole = _whole_layers(base, seen, found, report, inputs, impl)
        found = [*join_norms(base, found, report, inputs), *whole]
        for replacement in found:
            replacement.install()
        vars(model)[_KEPT] = found
        report.difference = _difference(seen.result, trace(base, inputs).result) if found else None
        if only_if_faster and found and not seen.failure:
            _keep_if_faster(model, base, report)
    if seen.failure:
        report.notes.append(f"the model did not run on a sample, so linear layers are fused one by one: {seen.failure}")
    return report


def _keep_if_faster(model: nn.Module, base: nn.Module, report: FuseReport) -> None:
    """Time it, say so, and take everything away where it is slower."""
    try:
        timing = time_layer(base, vars(model)[_KEPT])
    except Exception as error:  # out of memory above all: nobody knows then
        report.notes.append(f"not timed: {type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}")
        return
    if timing is None:
        return
    if timing.loses:
        unfuse(model)
        report.kept = Counter({(what, "slower fused, by measurement"): n for what, n in report.fused.items()})
        report.fused.clear()
        report.difference = None
    report.notes.append(str(timing))


def _whole_layers(
    base: nn.Module,
    seen: Trace,
    found: list[Replacement],
    report: FuseReport,
    inputs: Mapping[str, Any] | None,
    impl: Impl,
) -> list[FusedLayer]:
    """Decoder layers that run as one step; the fused modules inside of them serve where they do not."""
    layers, reasons = find_layers(base, seen, found, inputs, impl)
    if layers:
        report.fused["whole layer"] = len(layers)
    for why, count in reasons.items():
        report.notes.append(f"{count} layers run module by module: {why}")
    return layers


def unfuse(model: nn.Module) -> None:
    """Take away everything that `fuse` put into `model`; nothing where it did not."""
    for replacement in vars(model).pop(_KEPT, []):
        replacement.remove()


def fuse_as_asked(model: Any, wish: str, device: str) -> Rows:
    """What `model.fuse` asks for, done; the rows of the plan table that say what came of it.

    Args:
        wish: "auto" fuses where Triton kernels run (`takes_triton`) and a layer is timed to be no slower so, "on"
            everywhere, "off" nowhere.
        device: "cpu" or "cuda".
    """
    if wish == "off":
        return [("fused", "nothing (model.fuse=off)")]
    if wish == "auto" and not takes_triton("auto", torch.empty(0, device=device)):
        return [
            ("fused", "nothing: Triton kernels do not run here, and plain torch is no faster (model.fuse=on has it)")
        ]
    return fuse(model, only_if_faster=wish == "auto").rows()


def is_fused(model: nn.Module) -> bool:
    """Whether `fuse` worked on this instance."""
    return _KEPT in vars(model)


class _Finder:
    """Walks a model and collects replacements, each of them tried; writes down what it leaves."""

    def __init__(
        self,
        base: nn.Module,
        names: dict[nn.Module, str],
        seen: Trace,
        report: FuseReport,
        impl: Impl,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.base, self.names, self.seen, self.report = base, names, seen, report
        self.impl: Impl = impl
        self.device, self.dtype = device, dtype

    def find(self) -> list[Replacement]:
        norms = self._norms()
        return [*norms, *self._ropes(), *self._mlps([norm.module for norm in norms]), *self._linears()]

    def _norms(self) -> list[Replacement]:
        found = []
        for module in filter(looks_like_norm, self.base.modules()):
            norm = None if replaced_by_others(module) else find_norm(module, self.impl)
            why = OTHERS if replaced_by_others(module) else "another norm than RMSNorm with w or 1 + w"
            found += self._settle("RMSNorm", self._class(module), norm, why)
        return found

    def _ropes(self) -> list[Replacement]:
        found = []
        for module in self.base.modules():
            if (name := rotation_of(module)) is None:
                continue
            rope = None if replaced_by_others(module) else FusedRope(module, name, self.impl)
            why = OTHERS if rope is None else "another rotation than halves by cos and sin"
            rope = rope if rope is not None and rotates_alike(rope, self.device) else None
            found += self._settle("RoPE", f"{self._class(module)}'s RoPE", rope, why)
        return found

    def _mlps(self, norms: list[nn.Module]) -> list[Replacement]:
        found = []
        for module in self.base.modules():
            # An attention's projections can have the shapes of an MLP's.
            if is_linear(module) or rotation_of(module) is not None or not (ways := candidates(module)):
                continue
            mlp, why = None, self._why_no_mlp(module)
            activation = activation_of(module)
            if why is None and activation is not None:
                layer = None if self.seen.feeds(module, norms) else self._checkpointed(module)
                made = [FusedMLP(module, *way, activation, layer, self.impl) for way in ways]
                mlp = next((mlp for mlp in made if proven(mlp, self._sample(ways[0][0][0]))), None)
                why = "its result is not down(act(gate) * up)"
            found += self._settle("gated MLP", self._class(module), mlp, why or "no SiLU or GELU found in it")
        return found

    def _why_no_mlp(self, module: nn.Module) -> str | None:
        if replaced_by_others(module):
            return OTHERS
        linears = [child for child in module.children() if is_linear(child)]
        if not any(isinstance(linear, LoraLayer) for linear in linears):
            return "no LoRA in it"
        return next((why for linear in linears if (why := LinearReader(linear).why_not())), None)

    def _linears(self) -> list[Replacement]:
        reasons, able = {}, {}
        for module in filter(is_linear, self.base.modules()):
            if isinstance(module, LoraLayer) or self._beside_lora(module):
                reasons[module] = OTHERS if replaced_by_others(module) else LinearReader(module).why_not()
                if reasons[module] is None:
                    able[module] = FusedLinear(module, self.impl)
                    if not proven(able[module], self._sample(module)):
                        reasons[module] = "its result is another than base + LoRA"
        able = {module: fused for module, fused in able.items() if reasons[module] is None}
        found: list[Replacement] = []
        for group in self.seen.groups():
            group = [module for module in group if module in able]
            if len(group) > 1 and any(isinstance(module, LoraLayer) for module in group):
                found += FusedGroup(group, self.impl).members
                self.report.fused[" + ".join(self._last(module) for module in group)] += 1
                able = {module: fused for module, fused in able.items() if module not in group}
        for module, fused in able.items():
            if isinstance(module, LoraLayer):
                found += self._settle(self._last(module), "", fused, "")
        for module, why in reasons.items():
            if why and isinstance(module, LoraLayer):
                self.report.kept[(self._last(module), why)] += 1
        return found

    def _beside_lora(self, linear: nn.Module) -> bool:
        """A plain linear layer that is given the same tensor as one with LoRA."""
        return any(linear in group and any(isinstance(m, LoraLayer) for m in group) for group in self.seen.groups())

    def _settle(self, what: str, kept: str, replacement: Replacement | None, why: str) -> list[Any]:
        if replacement is None:
            self.report.kept[(kept, why)] += 1
            return []
        self.report.fused[what] += 1
        return [replacement]

    def _sample(self, linear: Any) -> Tensor:
        return torch.randn(1, 3, linear.in_features, device=self.device).to(self.dtype)

    def _checkpointed(self, module: nn.Module) -> nn.Module | None:
        """The nearest ancestor that transformers checkpoints."""
        path = self.names[module]
        while path:
            path = path.rpartition(".")[0]
            ancestor = self.base.get_submodule(path)
            if hasattr(ancestor, "gradient_checkpointing") and hasattr(ancestor, "_can_checkpoint_with_cache"):
                return ancestor
        return None

    def _class(self, module: nn.Module) -> str:
        return type(module).__name__

    def _last(self, module: Any) -> str:
        return self.names[module].rpartition(".")[2]


def _difference(before: Tensor | None, after: Tensor | None) -> float | None:
    if before is None or after is None:
        return None
    return ((after.double() - before.double()).abs().max() / before.double().abs().max()).item()
