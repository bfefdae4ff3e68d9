"""The flash-attn package as a backend, which no machine of ours has: what a stand-in of it is handed, and refusals."""

import sys
from functools import partial
from types import ModuleType

import pytest
import torch
from slothrl_kernels import PackedLayout, attention_package, packed_attention, packed_attention_reference
from slothrl_kernels.attention_choice import CANDIDATES, refusal
from slothrl_kernels.attention_package import installed_version, package, package_attention, refusal_of_package
from slothrl_kernels.attention_rule import Rule

from tests.kernels.attention_cases import LAYOUTS, TREE, values

CALLS = []


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    """The documented arguments and meaning of version 2.8, in plain torch of any dtype, for q and k of one length."""
    CALLS.append({"dropout": dropout_p, "deterministic": deterministic, "window": window_size})
    assert causal and cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
    assert max_seqlen_q == max_seqlen_k == int(cu_seqlens_q.diff().max())
    group, rows = q.size(1) // k.size(1), []
    for a, b in zip(cu_seqlens_q[:-1].tolist(), cu_seqlens_q[1:].tolist(), strict=True):
        keys, vals = (x[a:b].repeat_interleave(group, 1) for x in (k, v))
        scores = torch.einsum("nhd,mhd->hnm", q[a:b], keys) * softmax_scale
        scores = softcap * torch.tanh(scores / softcap) if softcap > 0 else scores
        ahead = torch.arange(b - a) - torch.arange(b - a)[:, None]
        left, right = window_size if window_size != (-1, -1) else (b - a, b - a)
        hidden = (ahead > 0) | (ahead > right) | (-ahead > left)
        rows.append(torch.einsum("hnm,mhd->nhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), vals))
    return torch.cat(rows)


@pytest.fixture
def stand_in(monkeypatch):
    """A module called flash_attn, of a version to be changed."""
    module, version = ModuleType("flash_attn"), ["2.8.3.post1"]
    module.flash_attn_varlen_func = flash_attn_varlen_func  # pyright: ignore
    module.__spec__ = sys.__spec__
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    monkeypatch.setattr(attention_package, "installed_version", lambda: version[0])
    monkeypatch.setattr(torch.version, "cuda", None)  # no capability to ask for
    package.cache_clear()
    CALLS.clear()
    yield version
    package.cache_clear()


def run(function, inputs, gradient):
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, gradient)]


@pytest.mark.parametrize("window, softcap, scale", [(None, None, None), (6, None, 0.3), (None, 2.0, None), (6, 2.0, 1)])
@pytest.mark.parametrize("layout", ["one", "rows"])
def test_what_a_stand_in_of_its_signature_is_handed(layout, window, softcap, scale, stand_in):
    """Values and gradients are the reference's: masks, window, cap, scale, GQA and the order of segments arrive."""
    layout = PackedLayout.build(*LAYOUTS[layout])
    *inputs, gradient = values(layout, (4, 2), 16, torch.float64)
    rule = Rule(16**-0.5 if scale is None else scale, window, softcap)
    ours = run(partial(package_attention, layout=layout, rule=rule), inputs, gradient)
    wanted = partial(packed_attention_reference, layout=layout, scale=scale, window=window, softcap=softcap)
    torch.testing.assert_close(ours, run(wanted, inputs, gradient), rtol=0, atol=1e-12)
    (seen,) = CALLS
    assert seen == {"dropout": 0.0, "deterministic": False, "window": (-1, -1) if window is None else (5, 0)}
    torch.use_deterministic_algorithms(True)
    try:
        package_attention(*inputs, layout, rule)
    finally:
        torch.use_deterministic_algorithms(False)
    assert CALLS[1]["deterministic"]


def test_what_is_refused_with_a_stand_in(stand_in):
    rows, tree = PackedLayout.build([40, 40]), PackedLayout.build(*TREE)
    q = torch.zeros(80, 4, 64, dtype=torch.bfloat16)
    assert refusal_of_package(q, rows, Rule(1.0, 6, 30.0)) is None and package().version == (2, 8, 3)
    for tensor, layout, reason in [
        (q, tree, "across a shared prefix"),
        (q.float(), rows, "16 bits and head sizes up to 256, not torch.float32"),
        (torch.zeros(80, 1, 264, dtype=torch.bfloat16), rows, "not torch.bfloat16 and 264"),
    ]:
        assert reason in str(refusal_of_package(tensor, layout, Rule(1.0)))
    stand_in[0] = "2.6.3"
    package.cache_clear()
    assert refusal_of_package(q, rows, Rule(1.0)) is None
    assert refusal_of_package(q, rows, Rule(1.0, None, 30.0)) == "a softcap needs its version 2.7, not 2.6.3"


def test_packages_that_cannot_serve(stand_in, monkeypatch):
    q, rows = torch.zeros(4, 1, 8, dtype=torch.bfloat16), PackedLayout.build([4])
    module = sys.modules["flash_attn"]
    monkeypatch.setattr(module, "flash_attn_varlen_func", lambda q, k, v, softmax_scale=None, causal=False: q)
    package.cache_clear()
    assert "has no window_size, softcap, deterministic" in str(refusal_of_package(q, rows, Rule(1.0)))
    monkeypatch.delattr(module, "flash_attn_varlen_func")
    package.cache_clear()
    assert "cannot be imported: cannot import name" in str(refusal_of_package(q, rows, Rule(1.0)))
    with pytest.raises(RuntimeError, match="impl='flash_attn': the flash-attn package cannot be imported"):
        package_attention(q, q, q, rows, Rule(1.0))


def test_without_the_package(monkeypatch):
    """Nobody imports it off CUDA, and nobody needs it."""
    q, rows = torch.zeros(4, 1, 8), PackedLayout.build([4])
    assert "flash_attn" in CANDIDATES and refusal("flash_attn", q, rows, Rule(1.0)) == "it has no backward on a CPU"
    with pytest.raises(ValueError, match="cannot serve this attention: it has no backward on a CPU"):
        packed_attention(q, q, q, rows, impl="flash_attn")
    assert "flash_attn" not in sys.modules
    if installed_version() == "none":
        package.cache_clear()
        monkeypatch.setattr(torch.version, "cuda", None)
        assert refusal_of_package(q.bfloat16(), rows, Rule(1.0)) == "the flash-attn package is not installed"
