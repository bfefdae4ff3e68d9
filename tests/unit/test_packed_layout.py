"""Packed attention without a GPU: layouts, the reference against rows alone, what backends add to torch's ops."""

from functools import partial

import pytest
import torch
from slothrl_kernels import PackedLayout, attention_choice, packed_attention, packed_attention_reference
from slothrl_kernels.attention_choice import Choice, refusal
from slothrl_kernels.attention_flash import Varlen, child_tokens, flash_attention, shared_part
from slothrl_kernels.attention_rule import Rule

from tests.kernels.attention_cases import LAYOUTS, TREE, attention_by_rows, values
from tests.kernels.varlen_parts import varlen_backward, varlen_forward


def run(function, inputs, gradient):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


def test_positions_and_spans():
    layout = PackedLayout.build(*TREE)
    wanted = [*range(5), *range(5, 8), *range(5, 45), *range(4), *range(33), 33, 34]
    assert layout.position_ids.tolist() == wanted and layout.position_ids.dtype == torch.int64
    assert layout.cu_seqlens.tolist() == [0, 5, 8, 48, 52, 85, 87] and layout.cu_seqlens.dtype == torch.int32
    assert (layout.tokens, layout.max_length, layout.max_position) == (87, 40, 44)
    assert layout.families == ((0, 5, 48), (52, 85, 87))
    assert layout.prefix_tokens.tolist() == [*range(5), *range(52, 85)]
    assert child_tokens(layout).tolist() == [*range(5, 48), 85, 86]
    part = shared_part(layout, 1.0)  # sequences without keys between those of the children
    assert part.cu_q.tolist() == [0, 5, 48, 85, 87] and part.cu_k.tolist() == [0, 0, 5, 5, 38]
    assert (part.max_q, part.max_k) == (43, 33)


@pytest.mark.parametrize(
    "lengths, parents, message",
    [
        ([], None, "at least one token"),
        ([3, 0], None, "at least one token"),
        ([3, 4], [-1], "1 parents for 2 segments"),
        ([3, 4], [-1, 1], "segment 1 names 1"),
        ([3, 4, 5], [-1, 0, 1], "segment 2 names 1"),  # a prefix has no prefix
        ([3, 4, 5], [-1, -1, 0], "segment 2 names 0"),  # children follow their prefix
        ([3], [0], "segment 0 names 0"),
    ],
)
def test_layouts_that_are_none(lengths, parents, message):
    with pytest.raises(ValueError, match=message):
        PackedLayout.build(lengths, parents)


@pytest.mark.parametrize("window, softcap, scale", [(None, None, None), (6, None, 0.3), (6, 2.0, None)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_is_rows_alone(layout, window, softcap, scale):
    layout = PackedLayout.build(*LAYOUTS[layout])
    *inputs, gradient = values(layout, (4, 2), 16, torch.float64)
    options = {"layout": layout, "window": window, "softcap": softcap, "scale": scale}
    ours = run(partial(packed_attention, **options), inputs, gradient)
    torch.testing.assert_close(ours, run(partial(attention_by_rows, **options), inputs, gradient), rtol=0, atol=1e-12)


def test_a_sibling_changes_nothing_else():
    layout = PackedLayout.build(*TREE)
    q, k, v, _ = values(layout, (4, 2), 16)
    before = packed_attention(q, k, v, layout)
    for x in (q, k, v):
        x[8:48] += 1  # segment 2
    changed = (packed_attention(q, k, v, layout) != before).any(-1).any(-1)
    assert changed[8:48].all() and not changed[:8].any() and not changed[48:].any()


def test_a_window_beyond_every_position_is_none():
    layout = PackedLayout.build([40, 40])
    *inputs, gradient = values(layout, (2, 2), 8)
    with_it = run(partial(packed_attention, layout=layout, window=40, impl="sdpa"), inputs, gradient)
    without = run(partial(packed_attention, layout=layout, impl="sdpa"), inputs, gradient)
    torch.testing.assert_close(with_it, without, rtol=0, atol=0)


def test_dense_is_the_reference():
    layout = PackedLayout.build([21, 21])
    *inputs, gradient = values(layout, (4, 2), 16, torch.float64)
    dense = run(partial(packed_attention, layout=layout, scale=0.4, impl="sdpa"), inputs, gradient)
    reference = run(partial(packed_attention, layout=layout, scale=0.4, impl="torch"), inputs, gradient)
    torch.testing.assert_close(dense, reference, rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_flash_parts_merge_exactly(layout):
    """The merging of outputs and the adding of gradients; torch's flash op itself exists on CUDA only."""
    layout, window = PackedLayout.build(*LAYOUTS[layout]), None if layout == "tree" else 6
    *inputs, gradient = values(layout, (4, 2), 16, torch.float64)
    rule = Rule(16**-0.5, window)
    ours = partial(flash_attention, layout=layout, rule=rule, varlen=Varlen(varlen_forward, varlen_backward))
    wanted = partial(packed_attention_reference, layout=layout, window=window)
    torch.testing.assert_close(run(ours, inputs, gradient), run(wanted, inputs, gradient), rtol=0, atol=1e-12)


@pytest.mark.parametrize("layout", ["rows", "tree"])
@pytest.mark.parametrize("window, softcap", [(None, None), (50, 3.0)])
def test_flex_mask(layout, window, softcap):
    """FlexAttention uncompiled, forward: a CPU has no backward of it. Blocks of 128 that are full, partial, empty."""
    lengths, parents = {"rows": ([150, 131], None), "tree": ([140, 3, 130], [-1, 0, 0])}[layout]
    from slothrl_kernels.attention_flex import flex_packed_attention

    layout = PackedLayout.build(lengths, parents)
    q, k, v, _ = values(layout, (2, 1), 16)
    with torch.no_grad():
        ours = flex_packed_attention(q, k, v, layout, Rule(0.25, window, softcap))
        torch.testing.assert_close(ours, packed_attention(q, k, v, layout, 0.25, window, softcap), rtol=0, atol=2e-6)


def test_what_does_not_fit_is_refused():
    layout = PackedLayout.build([5, 3])
    q, k, v, _ = values(layout, (4, 2), 16)
    for arguments, message in [
        ((q[:-1], k, v), "do not fit"),
        ((q[:, :3], k, v), "no multiple"),
        ((q[:-1], k[:-1], v[:-1]), "the layout has 8"),
        ((q, k.half(), v), "one float dtype"),
    ]:
        with pytest.raises(ValueError, match=message):
            packed_attention(*arguments, layout)
    for options, message in [
        ({"scale": -1.0}, "scale must be above 0"),
        ({"window": 0}, "window must be at least 1"),
        ({"softcap": 0.0}, "softcap must be above 0"),
        ({"impl": "cuda"}, "not one of auto, flash"),
        ({"impl": "flash"}, "cannot serve this attention: it has no backward on a CPU"),
        ({"impl": "sdpa"}, "segments differ in length"),
    ]:
        with pytest.raises(ValueError, match=message):
            packed_attention(q, k, v, layout, **options)
    assert refusal("triton", q.double(), layout, Rule(1.0)) and refusal("sdpa", q, layout, Rule(1.0, window=3))


def test_what_was_measured_in_words(monkeypatch):
    """Of the key that a call makes, a pack with a shared prefix and a window."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    layout = PackedLayout.build(*TREE)
    q, k = torch.empty(87, 8, 64, dtype=torch.bfloat16), torch.empty(87, 2, 64, dtype=torch.bfloat16)
    key = attention_choice._kind(q, k, layout, Rule(0.125, 6, None))
    monkeypatch.setattr(attention_choice, "CHOICES", {key: Choice("triton", {"triton": 1.25, "sdpa": "no memory"})})
    (line,) = attention_choice.said()
    wanted = "triton for up to 128 tokens, 8 heads on 2 of 64, a window, shared prefixes, bfloat16"
    assert line == f"{wanted} (triton 1.25 ms; sdpa: no memory)"
