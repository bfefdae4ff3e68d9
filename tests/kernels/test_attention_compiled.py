"""The attention kernels compiled for GPUs that are not here: tensor cores, and what a consumer card's memory holds."""

import os

import pytest
from slothrl_kernels import HAS_TRITON

from tests.kernels.test_compiled import CONSUMER_SHARED_MEMORY, compile_kernel, instructions

pytestmark = [
    pytest.mark.skipif(not HAS_TRITON, reason="no Triton"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"),
]
POINTERS = dict.fromkeys(("q", "k", "v", "out", "gradient", "dq", "dk", "dv", "far_out"), "*bf16")
POINTERS |= dict.fromkeys(("lse", "delta", "far_lse", "dk_parts", "dv_parts"), "*fp32")
POINTERS |= {"blocks": "*i32", "positions": "*i64", "rows": "*i64"}
NUMBERS = dict.fromkeys(("inner", "outer", "scale"), "fp32")
OPTIONS = ("WINDOW", "SOFTCAP", "BLOCK_M", "BLOCK_N", "WIDTH", "EVEN", "INTERPRETED", "BLOCK", "HEADS")


def compiled(kernel, capability, launch=None, width=128, head_size=128, **options):
    types = {name: kind for name, kind in {**POINTERS, **NUMBERS}.items() if name in kernel.arg_names}
    constants = {"WINDOW": False, "SOFTCAP": False, "WIDTH": width, "EVEN": width == head_size, "INTERPRETED": False}
    constants |= {"BLOCK": 32, "HEADS": 32, **options}
    constants |= {"BLOCK_M": launch.block_m, "BLOCK_N": launch.block_n} if launch else {}
    constants = {name: value for name, value in constants.items() if name in kernel.arg_names}
    integers = [name for name in kernel.arg_names if name not in (*types, *OPTIONS)]
    extra = {"num_warps": launch.warps, "num_stages": launch.stages} if launch else {}
    return compile_kernel(kernel, types, integers, constants, capability, **extra)


def kernels_and_launches(config):
    from slothrl_kernels.attention_backward_kernels import (
        attention_key_gradient_kernel,
        attention_query_gradient_kernel,
    )
    from slothrl_kernels.attention_forward_kernel import attention_forward_kernel

    return {
        "forward": (attention_forward_kernel, config.forward),
        "query": (attention_query_gradient_kernel, config.query),
        "key": (attention_key_gradient_kernel, config.key),
    }


@pytest.mark.parametrize("name, options", [("forward", {}), ("query", {"WINDOW": True}), ("key", {})])
def test_on_hopper(name, options):
    from slothrl_kernels.attention_config import HOPPER

    kernel, launch = kernels_and_launches(HOPPER[128])[name]
    made = compiled(kernel, 90, launch, **options)
    assert instructions(made, r"wgmma\.mma_async") > 0 and instructions(made, r"mma\.sync") == 0
    assert made.metadata.shared <= 164 << 10  # an A100's too


BOTH = {"WINDOW": True, "SOFTCAP": True}


@pytest.mark.parametrize("name, head_size, options", [("forward", 96, BOTH), ("query", 128, {}), ("key", 80, BOTH)])
def test_on_a_consumer_card(name, head_size, options):
    from slothrl_kernels.attention_config import CONSUMER

    kernel, launch = kernels_and_launches(CONSUMER[128])[name]
    made = compiled(kernel, 80, launch, head_size=head_size, **options)
    assert instructions(made, r"mma\.sync") > 0
    assert made.metadata.shared <= CONSUMER_SHARED_MEMORY


def test_the_small_ones():
    from slothrl_kernels.attention_backward_kernels import attention_delta_kernel
    from slothrl_kernels.attention_merge import _merge_kernel

    for kernel in (attention_delta_kernel, _merge_kernel):
        assert instructions(compiled(kernel, 80), r"ld\.global\.v4|ld\.global\.v2|ld\.global") > 0
