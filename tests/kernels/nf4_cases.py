"""nf4 weights for the tests, quantised by bitsandbytes itself."""

import pytest
import torch
from slothrl_kernels import Nf4Weight


def quantized(shape, blocksize=64, nested=False, device="cpu", dtype=torch.bfloat16):
    """(bitsandbytes' packed bytes, its QuantState, our view of both) of a random matrix."""
    functional = pytest.importorskip("bitsandbytes.functional")
    generator = torch.Generator().manual_seed(sum(shape) + blocksize)
    values = (torch.randn(shape, generator=generator) * 0.02).to(dtype).to(device)
    packed, state = functional.quantize_4bit(values, None, None, blocksize, nested, "nf4")
    return packed, state, Nf4Weight.from_quant_state(packed, state)


def bitsandbytes_weight(packed, state):
    import bitsandbytes.functional as functional

    return functional.dequantize_4bit(packed, state)
