"""Which launch the nf4 GEMM takes: this user's winner for the GPU and shape, the one shipped, or the default.

Winners are found by `nf4_tuning.tune` (a model's by `python -m slothrl tune`) and kept by GPU and Triton version, in
~/.cache/slothrl/nf4_launches.json (or under XDG_CACHE_HOME).
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch

from slothrl_kernels.nf4_config import DEFAULTS, ROW_BUCKETS, Nf4Config, bucket, complete
from slothrl_kernels.switch import processors
from slothrl_kernels.user_cache import cached, read, write

KERNEL = 4  # winners of another kernel, or of other fields, are nobody's
Winners = dict[tuple[int, int, int], Nf4Config]  # by (rows bucket, N, K)

# The linear layers of models of 8, 3 and 0.5 billion parameters, on 2026-11-23 (kernels/README.md): from
# tests/gpu/sweep_nf4_decode.py on an H100; for 32 rows bench_kernels.py there, a day before. An H200 has the same
# multiprocessors.
HOPPER: Winners = {
    (16, 6144, 4096): Nf4Config(16, 64, 4, 4, 3, 5, 0, 1, 1),
    (32, 6144, 4096): Nf4Config(32, 64, 2, 4, 4, 5),
    (64, 6144, 4096): Nf4Config(64, 64, 2, 4, 4, 1, 128, 2, 0, 2),
    (128, 6144, 4096): Nf4Config(128, 64, 2, 4, 3, 1, 0, 2, 0, 2),
    (256, 6144, 4096): Nf4Config(128, 64, 2, 4, 3, 1, 0, 2, 0, 2),
    (16, 4096, 4096): Nf4Config(16, 64, 2, 2, 4, 8, 0, 1, 1),
    (32, 4096, 4096): Nf4Config(32, 32, 2, 2, 4, 4),
    (64, 4096, 4096): Nf4Config(64, 64, 2, 4, 4, 4, 128, 2, 1),
    (128, 4096, 4096): Nf4Config(128, 64, 2, 4, 3, 1, 0, 2, 0, 2),
    (256, 4096, 4096): Nf4Config(128, 64, 2, 4, 3, 1, 0, 2, 0, 2),
    (16, 28672, 4096): Nf4Config(16, 64, 4, 4, 3, 2, 128, 1),
    (32, 28672, 4096): Nf4Config(32, 64, 4, 4, 3, 2),
    (64, 28672, 4096): Nf4Config(64, 64, 2, 4, 3, 1, 0, 2, 0, 3),
    (128, 28672, 4096): Nf4Config(128, 64, 2, 4, 3, 1, 0, 2, 0, 2),
    (256, 28672, 4096): Nf4Config(128, 64, 2, 4, 3, 1, 0, 2, 0, 2),
    (16, 4096, 14336): Nf4Config(16, 64, 4, 4, 3, 8, 128, 2),
    (32, 4096, 14336): Nf4Config(32, 32, 4, 2, 3, 4),
    (64, 4096, 14336): Nf4Config(64, 64, 2, 4, 4, 1, 128, 2, 0, 2),
    (128, 4096, 14336): Nf4Config(128, 64, 2, 4, 3, 1, 0, 2, 0, 2),
    (256, 4096, 14336): Nf4Config(128, 64, 2, 4, 3, 1, 0, 2, 0, 2),
    (16, 2560, 2048): Nf4Config(16, 64, 4, 4, 3, 8, 128, 2),
    (64, 2560, 2048): Nf4Config(64, 64, 2, 4, 4, 4, 128, 2, 1),
    (128, 2560, 2048): Nf4Config(128, 64, 2, 4, 3, 1, 0, 2, 0, 2),
    (256, 2560, 2048): Nf4Config(128, 64, 2, 4, 3, 1, 0, 2, 0, 2),
    (16, 2048, 2048): Nf4Config(16, 64, 4, 4, 3, 4, 0, 1),
    (64, 2048, 2048): Nf4Config(64, 64, 2, 4, 4, 8, 128, 2),
    (128, 2048, 2048): Nf4Config(128, 64, 2, 4, 3, 1, 0, 2, 0, 1),
    (256, 2048, 2048): Nf4Config(128, 64, 2, 4, 3, 1, 0, 2, 0, 2),
    (16, 22016, 2048): Nf4Config(16, 64, 4, 4, 3, 1, 0, 1, 1),
    (64, 22016, 2048): Nf4Config(64, 64, 2, 4, 3, 1, 0, 2),
    (128, 22016, 2048): Nf4Config(128, 64, 2, 4, 3, 1, 0, 2, 0, 2),
    (256, 22016, 2048): Nf4Config(128, 64, 2, 4, 3, 1, 0, 2, 0, 2),
    (16, 2048, 11008): Nf4Config(16, 64, 2, 2, 4, 8, 0, 1, 1),
    (64, 2048, 11008): Nf4Config(64, 64, 2, 4, 4, 8, 128, 2, 1),
    (128, 2048, 11008): Nf4Config(128, 64, 2, 4, 3, 1, 0, 2, 0, 2),
    (256, 2048, 11008): Nf4Config(128, 64, 2, 4, 3, 1, 0, 2, 0, 2),
    (16, 1152, 896): Nf4Config(16, 64, 2, 4, 3, 7, 128, 1),
    (64, 1152, 896): Nf4Config(64, 64, 2, 4, 4, 1, 128, 1, 1),
    (128, 1152, 896): Nf4Config(128, 64, 2, 4, 3, 1, 0, 2, 1),
    (256, 1152, 896): Nf4Config(128, 64, 2, 4, 3, 1, 0, 2, 1),
    (64, 896, 896): Nf4Config(64, 64, 2, 4, 3, 1, 0, 2, 0, 3),
    (128, 896, 896): Nf4Config(128, 64, 2, 4, 3, 1, 0, 2, 1),
    (256, 896, 896): Nf4Config(128, 64, 2, 4, 3, 1, 0, 2),
    (16, 9728, 896): Nf4Config(16, 64, 2, 4, 3, 3, 128, 1, 1),
    (64, 9728, 896): Nf4Config(64, 64, 2, 4, 4, 1, 128, 2, 1),
    (128, 9728, 896): Nf4Config(128, 64, 2, 4, 3, 1, 0, 2),
    (256, 9728, 896): Nf4Config(128, 64, 2, 4, 3, 1, 0, 2, 1),
    (16, 896, 4864): Nf4Config(16, 32, 4, 2, 3, 8),
    (64, 896, 4864): Nf4Config(64, 64, 2, 4, 4, 4, 128, 2),
    (128, 896, 4864): Nf4Config(128, 64, 2, 4, 3, 1, 0, 2, 0, 1),
    (256, 896, 4864): Nf4Config(128, 64, 2, 4, 3, 1, 0, 2, 0, 2),
}
SHIPPED: dict[str, Winners] = {"NVIDIA H100 80GB HBM3": HOPPER, "NVIDIA H200": HOPPER}


@cache
def choose_config(rows: int, outputs: int, inputs: int, device: torch.device) -> Nf4Config:
    """The launch for X (rows, K=inputs) and W (N=outputs, K), splits filled in."""
    key = bucket(rows), outputs, inputs
    config = known_launches(device).get(key, DEFAULTS[key[0]])
    return complete(config, rows, outputs, inputs, processors(device))


def known_launches(device: torch.device) -> Winners:
    """What was timed on this kind of GPU: this user's winners, before the shipped ones."""
    if device.type != "cuda":
        return {}
    return SHIPPED.get(torch.cuda.get_device_name(device), {}) | found_launches(device)


def untuned(shapes: Iterable[tuple[int, int]], device: torch.device) -> list[tuple[int, int, int]]:
    """(rows bucket, N, K) of each shape (N, K) for which the default launch would run: nothing was timed for it."""
    known = known_launches(device)
    return [(rows, *shape) for shape in dict.fromkeys(shapes) for rows in ROW_BUCKETS if (rows, *shape) not in known]


def cache_file() -> Path:
    """Where this user's winners are kept."""
    return cached("nf4_launches")


def gpu_key(device: torch.device) -> str:
    """Which GPU and Triton a winner is one for."""
    import triton

    return f"{torch.cuda.get_device_name(device)}, triton {triton.__version__}, kernel {KERNEL}"


@cache
def found_launches(device: torch.device) -> Winners:
    """This user's winners for a GPU by (rows bucket, N, K); empty where nothing was tuned or the file is unreadable."""
    try:
        stored = read(cache_file()).get(gpu_key(device), {})
        return {(*map(int, key.split(",")),): Nf4Config(*fields) for key, fields in stored.items()}  # pyright: ignore
    except (ValueError, TypeError, AttributeError):
        return {}


def keep(best: Winners, device: torch.device) -> None:
    """Write winners into the file, beside other GPUs'; whole or not at all.

    Raises:
        OSError: it cannot be written.
    """
    stored = read(cache_file())
    stored[gpu_key(device)] = {",".join(map(str, key)): config.fields() for key, config in best.items()}
    write(cache_file(), stored)
    found_launches.cache_clear()
    choose_config.cache_clear()
