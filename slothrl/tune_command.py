"""`python -m slothrl tune`: the fastest launches of the nf4 GEMM for a model on this GPU, found once and kept."""

from __future__ import annotations

import torch
from torch import nn

from slothrl.errors import ConfigError, UserError

USAGE = """\
python -m slothrl tune [--config-dir FOLDER] [group=choice] [key=value] …

Times the launches of the nf4 GEMM for the linear layers of a model on this GPU, and keeps the fastest for later runs in
~/.cache/slothrl/nf4_launches.json. Takes the arguments of `train`; reads the model's config.json and loads no weights.
What is kept already, or shipped, is left as it is; an interrupted call goes on where it was. It takes minutes: every
candidate is compiled. Runs work without it, by default launches.
Example: python -m slothrl tune model=hub model.name=Qwen/Qwen2.5-7B-Instruct
"""
FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # what vLLM makes one layer of


def main(argv: list[str]) -> int:
    """Tune and print; exit codes: 0; 2 for a mistake, or where there is no GPU."""
    from slothrl.train import fail

    if {"--help", "-h"} & set(argv):
        print(USAGE)
        return 0
    try:
        return _run(argv)
    except UserError as error:
        return fail(error)


def _run(argv: list[str]) -> int:
    from slothrl_kernels.nf4_launches import cache_file, untuned
    from slothrl_kernels.nf4_tuning import tune

    from slothrl.compose import compose_config
    from slothrl.models import plan_model
    from slothrl.shared_model import empty_model
    from slothrl.train import _take_overlay

    overlay, overrides = _take_overlay(argv)
    if flags := [word for word in overrides if word.startswith("-")]:
        raise ConfigError([f"{flag}: no such option of `slothrl tune`; see --help" for flag in flags])
    config = compose_config(overrides, overlay, anywhere=True)
    plan = plan_model(config.model, config.gpu.device)
    shapes = layer_shapes(empty_model(plan.path, plan.dtype, plan.revision))
    if not torch.cuda.is_available():
        raise UserError("slothrl tune times launches on a GPU, and there is none here")
    device = torch.device("cuda", torch.cuda.current_device())
    for rows, outputs, inputs in untuned(shapes, device):
        print(f"{plan.title}: W ({outputs}, {inputs}), {rows} rows", flush=True)
        tune([(outputs, inputs)], [rows], device)
    print(f"{plan.title}: launches of {len(shapes)} shapes are known; yours are in {cache_file()}")
    return 0


def layer_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """(N, K) of the linear layers that generation runs, each once: q, k and v as one, gate and up as one.

    The GEMM takes those whose K is a multiple of 64; others are dequantised, and nothing is to be tuned.
    """
    groups: dict[str, tuple[int, int]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and "lm_head" not in name and layer.in_features % 64 == 0:
            parent, _, leaf = name.rpartition(".")
            fused = next((group[0] for group in FUSED if leaf in group), leaf)
            outputs, _ = groups.get(f"{parent}.{fused}", (0, 0))
            groups[f"{parent}.{fused}"] = outputs + layer.out_features, layer.in_features
    return list(dict.fromkeys(groups.values()))
