"""Triton kernels, each beside a plain-torch reference under the same signature. Imports torch and triton only.

Without Triton (`HAS_TRITON` is False) the package imports all the same; a kernel then raises RuntimeError when called.
"""

from slothrl_kernels.selective_log_softmax import (
    HAS_TRITON,
    IGNORE_LABEL,
    selective_log_softmax,
    selective_log_softmax_reference,
)

__all__ = ["HAS_TRITON", "IGNORE_LABEL", "selective_log_softmax", "selective_log_softmax_reference"]
