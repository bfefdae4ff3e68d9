"""`nf4_tuning.tune` on this GPU: what it finds is kept, taken by the GEMM, and right."""

import pytest
import torch
from slothrl_kernels import nf4_matmul, nf4_matmul_reference
from slothrl_kernels.nf4_config import ROW_BUCKETS
from slothrl_kernels.nf4_launches import cache_file, choose_config, found_launches, untuned
from slothrl_kernels.nf4_tuning import cold_weights, tune

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHAPE = (4096, 2048)  # shipped for no card


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    def forget():
        found_launches.cache_clear()
        choose_config.cache_clear()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget()
    yield
    forget()


def test_tuning_once(empty_cache):
    device = torch.device("cuda", torch.cuda.current_device())
    assert untuned([SHAPE], device) == [(rows, *SHAPE) for rows in ROW_BUCKETS]
    best = tune([SHAPE], [16], device)
    assert set(best) == {(16, *SHAPE)} and cache_file().exists()
    assert untuned([SHAPE], device) == [(rows, *SHAPE) for rows in ROW_BUCKETS if rows != 16]
    assert choose_config(9, *SHAPE, device) == best[16, *SHAPE]
    weight = cold_weights(*SHAPE, device, copies=1)[0]
    x = torch.randn(9, SHAPE[1], device=device).to(torch.bfloat16)
    exact = nf4_matmul_reference(x.float(), weight)
    assert (nf4_matmul(x, weight).float() - exact).norm() <= 1e-2 * exact.norm()
