"""What a packed step saves changes nothing in bf16 over nf4: fused layers, dropped rows, elided log-probs, siblings."""

import pytest
import torch

from slothrl.activations import keep_activations
from slothrl.fuse import fuse
from slothrl.packed_batch import build_pack, pack_logprobs, rows_to_pack
from slothrl.packed_model import packed_mode
from slothrl.packing import plan_micro_batches
from tests.gpu.test_packed_step_gpu import DEVICE, PACKINGS, base, distance, gradients_and_logprobs, lora, trainer

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
SHARED = {"mode": "on", **PACKINGS["shared"]}
MORE = 5e-3  # of a gradient's norm, beyond 1.2 times the error of what is compared with


def dull_group(completions, completion_ids, **_):
    """Rewards of which the first group's are all the same."""
    scores = [sum(ids) % 17 / 7 for ids in completion_ids]
    return [0.5] * 4 + scores[4:]


def step(folder, kind="nf4", checkpointing=True, reward=None, beta=0.0, two_passes=False, fused=False, **packing):
    """Gradients, log-probs and loss of one step."""
    one = trainer("llama", kind, folder, checkpointing, **packing)
    if reward is not None:
        one.reward_funcs[0] = reward
    one.beta = beta
    one.vllm_importance_sampling_correction = two_passes  # TRL's switch for its pass over the old policy
    if fused:
        assert fuse(one.model).fused["gated MLP"] == 4
        keep_activations(one.model, "attention")
    return *gradients_and_logprobs(one), one


@pytest.mark.parametrize("packing", PACKINGS)
def test_fused_layers_are_no_further_from_float32(packing, tmp_path):
    truth, true_logprobs, true_loss, _ = step(tmp_path, "nf4 in float32", False, mode="off")
    padded, padded_logprobs, *_ = step(tmp_path, mode="off")
    found, logprobs, loss, _ = step(tmp_path, fused=True, mode="on", **PACKINGS[packing])
    assert (logprobs - padded_logprobs).abs().mean().item() < 1e-2
    apart = (padded_logprobs - true_logprobs).abs().mean().item()
    assert (logprobs - true_logprobs).abs().mean().item() < 1.2 * apart + 1e-3
    assert distance(found, truth) < 1.2 * distance(padded, truth) + MORE
    assert loss == pytest.approx(true_loss, abs=5e-3)


def test_rows_without_advantage_may_be_left_out(tmp_path):
    truth, _, true_loss, _ = step(tmp_path, "nf4 in float32", False, reward=dull_group, mode="off")
    # A weight of the KL term that is next to nothing keeps all rows.
    kept, _, kept_loss, whole = step(tmp_path, reward=dull_group, beta=1e-9, **SHARED)
    dropped, _, loss, one = step(tmp_path, reward=dull_group, **SHARED)
    counts = [trained.state.log_history[0]["packing/dropped_completions"] for trained in (whole, one)]
    assert counts[0] == 0 and counts[1] >= 4
    assert distance(dropped, truth) < 1.2 * distance(kept, truth) + MORE
    assert loss == pytest.approx(true_loss, abs=5e-3) and kept_loss == pytest.approx(true_loss, abs=5e-3)


def test_old_logprobs_need_no_pass_of_their_own(tmp_path):
    truth, _, true_loss, _ = step(tmp_path, "nf4 in float32", False, mode="off")
    twice, _, twice_loss, two = step(tmp_path, two_passes=True, **SHARED)
    once, _, loss, one = step(tmp_path, **SHARED)
    assert "old_per_token_logps" in two._buffered_inputs[0] and "old_per_token_logps" not in one._buffered_inputs[0]
    assert distance(once, truth) < 1.2 * distance(twice, truth) + MORE
    assert loss == pytest.approx(true_loss, abs=5e-3) and twice_loss == pytest.approx(true_loss, abs=5e-3)


@pytest.mark.parametrize("fused", [False, True])
def test_a_sibling_changes_nothing_else(fused):
    model = lora(base("llama", "nf4"))
    if fused:
        fuse(model)
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(4, 1000, (4, 90 + 130), generator=generator)
    ids[:, :90] = ids[0, :90]
    counted = torch.ones(4, 130, dtype=torch.bool)
    found = []
    for changed in (False, True):
        batch = ids.clone()
        if changed:
            batch[2, 90:] = batch[2, 90:].flip(0)
        batch, mask = batch.to(DEVICE), counted.to(DEVICE)
        rows = rows_to_pack(batch[:, :90], torch.ones_like(batch[:, :90]), mask)
        (micro_batch,) = plan_micro_batches(rows, 10_000, "always")
        with torch.no_grad(), torch.autocast(DEVICE, torch.bfloat16), packed_mode(model):
            found.append(pack_logprobs(model, build_pack(micro_batch, batch, mask))[0])
    apart = (found[0] - found[1]).abs()
    assert apart[[0, 1, 3]].max().item() < 1e-3 and apart[2].mean().item() > 0.1
