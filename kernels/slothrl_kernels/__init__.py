"""Triton kernels, each beside a plain-torch reference under the same signature. Imports torch and triton only.

Without Triton (`HAS_TRITON` is False) the package imports all the same; a kernel then raises RuntimeError when called.
"""

from slothrl_kernels.base_weight import BaseWeight, Int8Weight
from slothrl_kernels.glu import glu, glu_backward, glu_backward_reference, glu_forward, glu_reference
from slothrl_kernels.lora_linear import lora_linear, lora_linear_reference
from slothrl_kernels.lora_math import Projection
from slothrl_kernels.lora_mlp import lora_mlp, lora_mlp_reference
from slothrl_kernels.nf4_dequantize import nf4_dequantize, nf4_dequantize_reference
from slothrl_kernels.nf4_lora import LoraDelta, nf4_lora_matmul, nf4_lora_matmul_reference
from slothrl_kernels.nf4_matmul import nf4_matmul, nf4_matmul_reference
from slothrl_kernels.nf4_weight import NestedAbsmax, Nf4Weight
from slothrl_kernels.packed_attention import packed_attention, packed_attention_reference
from slothrl_kernels.packed_layout import PackedLayout
from slothrl_kernels.qk_norm_rope import (
    QKGradients,
    QKNorm,
    qk_norm_rope,
    qk_norm_rope_backward,
    qk_norm_rope_forward,
    qk_norm_rope_reference,
)
from slothrl_kernels.rms_norm import add_rms_norm, add_rms_norm_reference, rms_norm, rms_norm_reference
from slothrl_kernels.rms_norm_math import rms_norm_backward, rms_norm_forward
from slothrl_kernels.rope import rope, rope_reference, rope_turn
from slothrl_kernels.selective_log_softmax import (
    IGNORE_LABEL,
    selective_log_softmax,
    selective_log_softmax_reference,
)
from slothrl_kernels.switch import HAS_TRITON, Impl, takes_triton

__all__ = [
    "HAS_TRITON",
    "IGNORE_LABEL",
    "BaseWeight",
    "Impl",
    "Int8Weight",
    "LoraDelta",
    "NestedAbsmax",
    "Nf4Weight",
    "PackedLayout",
    "Projection",
    "QKGradients",
    "QKNorm",
    "add_rms_norm",
    "add_rms_norm_reference",
    "glu",
    "glu_backward",
    "glu_backward_reference",
    "glu_forward",
    "glu_reference",
    "lora_linear",
    "lora_linear_reference",
    "lora_mlp",
    "lora_mlp_reference",
    "nf4_dequantize",
    "nf4_dequantize_reference",
    "nf4_lora_matmul",
    "nf4_lora_matmul_reference",
    "nf4_matmul",
    "nf4_matmul_reference",
    "packed_attention",
    "packed_attention_reference",
    "qk_norm_rope",
    "qk_norm_rope_backward",
    "qk_norm_rope_forward",
    "qk_norm_rope_reference",
    "rms_norm",
    "rms_norm_backward",
    "rms_norm_forward",
    "rms_norm_reference",
    "rope",
    "rope_reference",
    "rope_turn",
    "selective_log_softmax",
    "selective_log_softmax_reference",
    "takes_triton",
]
