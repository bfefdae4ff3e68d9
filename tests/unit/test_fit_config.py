"""What the memory prediction reads out of a run's config."""

import pytest

from slothrl import fit_config
from slothrl.compose import compose_config
from slothrl.fit_batch import micro_batch
from slothrl.fit_config import device_bytes, settings_of
from slothrl.fit_memory import LAYER_GRAPHS, Settings, update
from slothrl.fit_shape import Shape

SHAPE = Shape(2, 64, 128, 4, 2, 16, 100, matrices=((64, 64),), embedding=6400, head=0, rest=0)


def settings(*overrides: str) -> Settings:
    return settings_of(compose_config(["gpu=24gb", *overrides], anywhere=True), "nf4", 2, None, None, 4096)


def test_presets_and_overrides():
    found = settings("data.max_prompt_length=100", "trainer.max_completion_length=50", "rollout.kv_cache_gb=2")
    assert (found.rows, found.prompt, found.completion, found.sequences) == (16, 100, 50, 64)
    assert (found.engine, found.shared, found.sleep, found.checkpointing) == ("vllm", True, True, True)
    assert (found.cache, found.utilization, found.optimizer) == (2 * 2**30, 0.5, "adamw_torch_fused")
    assert settings("trainer.steps_per_generation=8").sequences == 128
    assert settings("trainer.generation_batch_size=32").sequences == 32
    assert settings("trainer.optim=adamw_8bit", "rollout=transformers").engine == "transformers"
    assert settings("trainer.optim=adamw_8bit").optimizer == "adamw_8bit"


def test_packs_and_layers():
    found = settings("packing.tokens_per_micro_batch=3000", "packing.shared_prefix=never", "model.fuse=on")
    assert (found.packs, found.tokens, found.shared_prefix) == (True, 3000, "never")
    assert (found.completions, found.group, found.fused, found.activations) == (64, 8, True, "auto")
    assert not settings("packing=off").packs and not settings("algo=sft").packs
    assert settings("model.fuse=auto", "model.activations=offload").route.offload and not found.route.offload
    assert found.within is None and settings("model.activations=all", "model.activation_gib=1.5").within == 3 << 29
    assert settings("model.fuse=auto").fused and settings().fused and not settings("model.fuse=off").fused


def test_where_embeddings_lie():
    assert settings().embeddings == "auto" and settings("model.embeddings=host").embeddings == "host"


def test_graphs_of_layers():
    """Their frame and the pool for an MLP's backward, where they are asked for and layers run as one step."""
    one = ("algo=sft", "trainer.per_device_train_batch_size=1", "trainer.max_length=64")
    assert not settings("model.graphs=auto").layer_graphs and settings("model.graphs=on").layer_graphs
    frame = 64 * 2 * (3 * 64 + 2 * 64 + 2 * 32)  # h, q and v of SHAPE: 64, 64, 32
    pool = 64 * 2 * (3 * 128 + 2 * 64) + 2 * 64 * 64
    assert update(SHAPE, settings(*one, "model.graphs=on"), 2**34).parts[LAYER_GRAPHS] == frame + pool
    for other in ("model.graphs=off", "model.fuse=off"):
        assert LAYER_GRAPHS not in update(SHAPE, settings(*one, "model.graphs=on", other), 2**34).parts


def test_two_bases():
    assert not settings("rollout.share_base=never").shared
    assert not settings("rollout.dtype=float16").shared
    assert settings("rollout.dtype=bfloat16").shared


def test_sft():
    found = settings("algo=sft", "trainer.max_length=2048")
    assert (found.prompt, found.completion, found.generates, found.uses_vllm) == (0, 2048, False, False)
    assert settings("algo=sft", "trainer.max_length=null").completion == 4096  # the model's context
    one = settings("algo=sft", "trainer.per_device_train_batch_size=1", "trainer.max_length=64")
    batch = micro_batch(SHAPE, one, free=0)
    assert (batch.tokens, batch.kept, batch.mask_cells) == (64, 64, 0)


@pytest.mark.parametrize(
    ("card", "preset", "expected"),
    [
        (None, "24gb", 25.38e9),
        (85.0, "80gb", 85.0e9),  # the card that is here
        (34.2, "24gb", 34.2e9),  # the largest preset under it
        (85.0, "8gb", 8.46e9),  # another card is asked about
    ],
)
def test_whose_bytes(card, preset, expected, monkeypatch):
    monkeypatch.setattr("slothrl.checks.gpu_memory_gb", lambda: card)
    monkeypatch.setattr(fit_config, "gpu_memory_gb", lambda: card)
    config = compose_config([f"gpu={preset}"], anywhere=True)
    assert device_bytes(config) == pytest.approx(expected, rel=0.001)


def test_on_a_cpu_the_machine_is_meant():
    config = compose_config(["gpu=cpu"], anywhere=True)
    assert 2**30 < device_bytes(config) < 2**50
    found = settings_of(config, "none", 4, None, None, None)
    assert (found.engine, found.cuda) == ("transformers", False)
