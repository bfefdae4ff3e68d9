"""Fixtures for tests that run whole trainers on models of a few kilobytes."""

import pytest
import torch

from tests.helpers import tiny_model, tiny_tokenizer


@pytest.fixture
def one_thread():
    """For tensors this small the threads of OpenMP cost more than they bring: a hundred times, on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tiny_folders(tmp_path_factory) -> dict[str, str]:
    """Folders of the tiny model: "tiny", "no_chat" without a chat template, "no_pad" without a pad token."""
    made = {}
    for name, options in (("tiny", {}), ("no_chat", {"chat_template": False}), ("no_pad", {"pad": False})):
        folder = tmp_path_factory.mktemp("models") / name
        tokenizer = tiny_tokenizer(**options)
        tiny_model(len(tokenizer), hidden=32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[name] = str(folder)
    return made


@pytest.fixture
def smollm3_as_it_was():
    """vLLM runs SmolLM3 by its transformers backend, which rewrites transformers' class: undone for later tests."""
    from transformers.models.smollm3.modeling_smollm3 import SmolLM3Model as rewritten

    kept, bases = dict(vars(rewritten)), rewritten.__bases__
    yield
    rewritten.__bases__ = bases
    for name in set(vars(rewritten)) - set(kept):
        delattr(rewritten, name)
    for name, value in kept.items():
        if vars(rewritten)[name] is not value:
            setattr(rewritten, name, value)


@pytest.fixture
def plain_linears(monkeypatch):
    """vLLM's CPU build packs plain weights for oneDNN and drops the originals; the GPU build keeps them. Keep them."""
    import vllm.model_executor.layers.utils as utils

    def keep(layer, remove_weight):
        layer.cpu_linear = torch.nn.functional.linear

    monkeypatch.setattr(utils, "dispatch_cpu_unquantized_gemm", keep)
