"""Who uses the device: a memory measurement needs it for itself, and what this process takes outside torch."""

from __future__ import annotations

import shutil
import subprocess

import torch

NOBODY = 0.4e9  # bytes in use on a device that nobody uses, at most; a CUDA context takes more


def used_by_others() -> int | None:
    """Bytes in use on the first device, by nvidia-smi; None where there is none. Call it before this process has a
    context. All users count: inside a container nvidia-smi lists no processes."""
    if torch.cuda.is_initialized():
        raise RuntimeError("used_by_others() belongs before the first use of CUDA")
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True)
    words = done.stdout.split()
    return int(words[0]) * 2**20 if done.returncode == 0 and words and words[0].isdigit() else None


def why_not_alone() -> str | None:
    """Why the driver's figures would be somebody else's too; None where this process has the device for itself."""
    used = used_by_others()
    if used is None:
        return "nvidia-smi does not say whether somebody else uses the device"
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
