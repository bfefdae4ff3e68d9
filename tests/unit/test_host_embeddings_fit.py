"""What `model.embeddings` may be, and what the prediction takes off where embeddings lie in the host's memory."""

from dataclasses import replace

import pytest

from slothrl.checks import problems
from slothrl.compose import compose_config
from slothrl.errors import ConfigError
from slothrl.fit_constants import card_bytes
from slothrl.fit_memory import BASE, COPY, Settings, fits, held
from slothrl.fit_memory import host_embeddings as predicted
from slothrl.fit_search import smaller
from slothrl.fit_shape import Shape


def test_the_key_is_checked():
    with pytest.raises(ConfigError) as refused:
        compose_config(["gpu=24gb", "model.embeddings=hots"], anywhere=True)
    assert "model.embeddings" in str(refused.value) and "host" in str(refused.value)
    assert problems(compose_config(["gpu=24gb", "model.embeddings=host"], anywhere=True), anywhere=True) == []


LLAMA_8B = Shape(
    32, 4096, 14336, 32, 8, 128, 128256, matrices=((14336, 4096),) * 32, embedding=128256 * 4096, head=128256 * 4096,
    rest=0, adapter=1000, adapter_tensors=2,
)  # fmt: skip
GIVEN_BACK = 128256 * 4096 * 2


@pytest.mark.parametrize(
    ("shape", "settings", "moved"),
    [
        ({}, {"trainer": "sft", "embeddings": "auto"}, GIVEN_BACK),
        ({}, {"engine": "transformers", "embeddings": "auto"}, GIVEN_BACK),
        ({}, {"shared": False, "embeddings": "auto"}, GIVEN_BACK),
        ({}, {"embeddings": "host"}, 0),  # vLLM shares them
        ({}, {"trainer": "sft"}, 0),
        ({}, {"trainer": "sft", "embeddings": "auto", "cuda": False}, 0),
        ({"head": 0}, {"trainer": "sft", "embeddings": "host"}, 0),  # tied
        ({"frozen_embedding": False}, {"trainer": "sft", "embeddings": "host"}, 0),
        ({"embedding": 2**27 - 1}, {"trainer": "sft", "embeddings": "auto"}, 0),
        ({"embedding": 2**27 - 1}, {"trainer": "sft", "embeddings": "host"}, 2**28 - 2),
    ],
)
def test_predicted_bytes(shape, settings, moved):
    shape, settings = replace(LLAMA_8B, **shape), Settings(**settings)
    there, here = held(shape, settings), held(shape, replace(settings, embeddings="device"))
    assert predicted(shape, settings) == moved
    fallen = {name: here[name] - there[name] for name in here if here[name] != there[name]}
    assert fallen == ({COPY if settings.uses_vllm else BASE: moved} if moved else {})


def test_the_first_remedy():
    settings, total = Settings(trainer="sft", rows=1, prompt=0, completion=64), card_bytes(8)
    tight = next(total - n * 2**26 for n in range(200) if not fits(LLAMA_8B, settings, total - n * 2**26))
    change = smaller(LLAMA_8B, settings, tight)
    assert change is not None and change.overrides == ("model.embeddings=host",)
