"""Who uses the device: a memory measurement needs it for itself, and what this process takes outside torch."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import torch

BARE_CONTEXT = 0.6e9  # bytes, about, on an H100
OWN_CONTEXT = 0.8e9  # bytes, with cuBLAS and some kernels loaded
NOBODY = 0.4e9  # bytes in use on a device that nobody uses, at most; a CUDA context takes more


def used_by_others() -> int | None:
    """Bytes in use on the first device beside this process; None where there is none.

    By nvidia-smi, and all users count, since inside a container it lists no processes; less what this process has of
    torch, and a context with kernels loaded where it has one (importing bitsandbytes makes one). Where nvidia-smi is
    not installed, by the driver's figure for a process of its own, less what a bare context takes.
    """
    if not torch.cuda.is_available():
        return None
    mine = torch.cuda.memory_reserved() + OWN_CONTEXT if torch.cuda.is_initialized() else 0
    if shutil.which("nvidia-smi") is None:
        asked = "import torch; free, total = torch.cuda.mem_get_info(); print(total - free)"
        done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, check=True)
        return max(0, int(done.stdout) - int(BARE_CONTEXT) - int(mine))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")[0] or "0"  # asking torch would make a context
    query = ["nvidia-smi", f"--id={visible}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True)
    words = done.stdout.split()
    if done.returncode != 0 or not words or not words[0].isdigit():
        return None
    return max(0, int(words[0]) * 2**20 - int(mine))


def why_not_alone() -> str | None:
    """Why the driver's figures would be somebody else's too; None where this process has the device for itself."""
    used = used_by_others()
    if used is None:
        return "nobody says whether somebody else uses the device"
    return f"{used / 1e6:,.0f} MB of the device are in use already" if used > NOBODY else None


def outside_torch() -> int:
    """What the driver says is in use beside torch's reservation: this process' context, where it is alone."""
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def load_kernels() -> None:
    """Make the context and load cuBLAS, so that `outside_torch` is what it will be later, about."""
    a = torch.randn(512, 512, device="cuda", dtype=torch.bfloat16)
    (a @ a).float().softmax(-1).sum().item()
    del a
    torch.cuda.synchronize()
