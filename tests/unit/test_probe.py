"""The policy probe with an engine that is the model itself: what it can tell, and what it says that it cannot."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from slothrl.engine import Engine, model_logprobs
from slothrl.errors import PolicyMismatchError
from slothrl.lora_slot import lora_layers
from slothrl.probe import PolicyProbe, perturbed_lora
from tests.helpers import tiny_model, tiny_tokenizer

ROWS = [list(range(4, 36)), list(range(40, 56))]


class Rounding(Engine):
    """The model's own log-probs, off by 0.01 nat; of projections named in `deaf` it never hears."""

    name = "rounding"

    def __init__(self, model, deaf=()):
        self.model, self.deaf, self.kept = model, deaf, {}
        self.push_lora()

    def generate(self, prompt_ids, sampling):
        raise NotImplementedError

    def push_lora(self):
        self.kept = {n: x.lora_B["default"].weight.detach().clone() for n, x in lora_layers(self.model).items()}

    def logprobs(self, token_ids):
        layers, own = lora_layers(self.model), {}
        for name, layer in layers.items():
            weight = layer.lora_B["default"].weight
            own[name] = weight.detach().clone()
            weight.data.copy_(torch.zeros_like(weight) if name.endswith(self.deaf) else self.kept[name])
        found = model_logprobs(self.model, token_ids)
        for name, layer in layers.items():
            layer.lora_B["default"].weight.data.copy_(own[name])
        signs = torch.tensor([0.01, -0.01]).repeat(64)
        return [row + signs[: len(row)] for row in found]


@pytest.fixture
def model():
    names = ["q_proj", "k_proj", "v_proj"]
    return get_peft_model(tiny_model(len(tiny_tokenizer())), LoraConfig(r=4, target_modules=names)).eval()


def test_an_engine_that_follows(model):
    probe = PolicyProbe(Rounding(model), model, ROWS)
    assert probe.check() == pytest.approx(0.01, abs=1e-4)
    moved, apart = probe.perturbation_test()
    assert moved > 0.08 and apart == pytest.approx(0.01, abs=1e-4) and "v_proj" not in probe.undecided
    assert all(not x.lora_B["default"].weight.any() for x in lora_layers(model).values())


def test_a_projection_too_weak_to_tell(model):
    """Its A is nearly 0, so no test change of its B shows beside the rounding: said, and no reason to fail."""
    for name, layer in lora_layers(model).items():
        if name.endswith("k_proj"):
            layer.lora_A["default"].weight.data.mul_(1e-6)
    probe = PolicyProbe(Rounding(model), model, ROWS)
    probe.check()
    probe.perturbation_test()
    assert "k_proj" in probe.undecided


def test_an_engine_that_never_hears_of_one_projection(model):
    probe = PolicyProbe(Rounding(model, deaf=("v_proj",)), model, ROWS)
    probe.check()
    with pytest.raises(PolicyMismatchError, match="does not follow the LoRA"):
        probe.perturbation_test()


def test_a_change_is_taken_out_again(model):
    before = [x.lora_B["default"].weight.clone() for x in lora_layers(model).values()]
    with perturbed_lora(model, 0.1, "q_proj"):
        changed = [n for n, x in lora_layers(model).items() if x.lora_B["default"].weight.any()]
    assert changed and all(name.endswith("q_proj") for name in changed)
    after = [x.lora_B["default"].weight for x in lora_layers(model).values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
