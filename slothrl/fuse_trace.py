"""One small forward of a model, watched: which linear layers are given one tensor, and where an MLP's output goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from slothrl.fuse_layers import is_linear

TOKENS = 8


@dataclass
class Trace:
    """What a forward did.

    Attributes:
        given: (linear layer, its input), in the order of the calls.
        inputs, outputs: ids of the tensors that other modules took and gave, by module, in the order of the calls.
        calls: the last arguments of each module, positional and by keyword.
        result: the forward's first tensor; None where it could not be run, for the reason in `failure`.
    """

    given: list[tuple[nn.Module, Tensor]] = field(default_factory=list)
    inputs: dict[nn.Module, int] = field(default_factory=dict)
    outputs: dict[nn.Module, int] = field(default_factory=dict)
    calls: dict[nn.Module, tuple[tuple, dict[str, Any]]] = field(default_factory=dict)
    result: Tensor | None = None
    failure: str | None = None
    _alive: list[Tensor] = field(default_factory=list)  # or an id could be a later tensor's

    def groups(self) -> list[list[nn.Module]]:
        """Linear layers called one after the other with one tensor, and never again: two or more, in their order."""
        calls = [module for module, _ in self.given]
        runs: list[tuple[Tensor, list[nn.Module]]] = []
        for module, x in self.given:
            if runs and runs[-1][0] is x:
                runs[-1][1].append(module)
            else:
                runs.append((x, [module]))
        return [modules for _, modules in runs if len(modules) > 1 and all(calls.count(m) == 1 for m in modules)]

    def feeds(self, module: nn.Module, others: list[nn.Module]) -> bool:
        """Whether `module`'s output was the very input of one of `others`."""
        given = self.outputs.get(module)
        return given is not None and given in {self.inputs.get(other) for other in others}


def trace(model: nn.Module, inputs: Mapping[str, Any] | None = None) -> Trace:
    """Run `model` once, on `inputs` or on random embeddings (1, 8, h), and watch.

    The embeddings require grad: bitsandbytes lays weights out anew in a forward that needs none, on some CPUs.
    """
    seen, leaves = Trace(), [m for m in model.modules() if not isinstance(m, nn.ModuleList)]
    handles = []
    inside = {child for module in leaves if is_linear(module) for child in module.modules() if child is not module}
    for module in leaves:
        if module in inside:
            continue
        handles.append(module.register_forward_pre_hook(_watch_input(seen), with_kwargs=True))
        handles.append(module.register_forward_hook(_watch_output(seen)))
    try:
        with torch.enable_grad():
            result = model(**(inputs if inputs is not None else random_embeddings(model)))
        seen.result = next(x.detach() for x in _tensors(result) if x.is_floating_point())
    except Exception as error:  # whatever a model that is no causal language model makes of it
        seen.failure = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:120]}"
    finally:
        for handle in handles:
            handle.remove()
    return seen


def random_embeddings(model: Any, tokens: int = TOKENS) -> dict[str, Any]:
    """What a transformers causal language model takes for input, without tokens."""
    weight = model.get_input_embeddings().weight
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(1, tokens, weight.shape[1], generator=generator, device=weight.device).to(weight.dtype)
    return {"inputs_embeds": x.requires_grad_(), "use_cache": False}


def _watch_input(seen: Trace) -> Any:
    def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
        x = next(iter([*_tensors(args), *_tensors(kwargs)]), None)
        if x is None:
            return
        seen._alive.append(x)
        seen.inputs[module] = id(x)
        seen.calls[module] = (args, kwargs)
        if is_linear(module):
            seen.given.append((module, x))

    return hook


def _watch_output(seen: Trace) -> Any:
    def hook(module: nn.Module, args: tuple, output: Any) -> None:
        y = next(iter(_tensors(output)), None)
        if y is not None:
            seen._alive.append(y)
            seen.outputs[module] = id(y)

    return hook


def _tensors(value: Any) -> list[Tensor]:
    """The tensors at the top of arguments or of a result."""
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, Mapping) else value if isinstance(value, (tuple, list)) else []
    return [x for x in values if isinstance(x, Tensor)]
