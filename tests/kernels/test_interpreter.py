"""Runs this folder's kernel tests in Triton's interpreter, in a process of its own (see conftest.py)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run natively")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this is the interpreter's process")
def test_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    # The child sees the packages where this process found them, installed or not.
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    folder = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    child = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=900)
    assert child.returncode == 0, child.stdout + child.stderr
