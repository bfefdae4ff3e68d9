"""Where the kernels of this folder run: on CUDA, or in Triton's interpreter, which a process has to be born with.

Triton reads TRITON_INTERPRET while its own modules are imported, and by then some other test has imported them. So on a
machine without CUDA the tests that ask for `kernel_device` run in one child process with the variable set, started by
`test_interpreter.py`; in the parent they are deselected. The variable never reaches the rest of the test run.
"""

import os

import pytest
import torch

CUDA = torch.cuda.is_available()
INTERPRETED = not CUDA and os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if CUDA or INTERPRETED:
        return
    elsewhere = [item for item in items if "kernel_device" in getattr(item, "fixturenames", ())]
    items[:] = [item for item in items if item not in elsewhere]
    config.hook.pytest_deselected(items=elsewhere)


@pytest.fixture
def kernel_device():
    """The device whose tensors a kernel takes; uninitialized memory is NaN there, so that an unwritten output shows."""
    pytest.importorskip("triton")
    # Fills torch.empty with NaN. Only warnings, since cuBLAS is none of our business and refuses otherwise.
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield "cuda" if CUDA else "cpu"
    torch.use_deterministic_algorithms(False)
