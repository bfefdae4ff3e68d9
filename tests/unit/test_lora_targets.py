"""Names of layers that a model has not are told, with those it has."""

import pytest
from torch import nn

from slothrl.lora_targets import target_problems
from tests.helpers import tiny_model


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.k_proj, self.norm = nn.Linear(2, 2), nn.Linear(2, 2), nn.LayerNorm(2)


def model() -> nn.Module:
    return nn.Sequential(Layer(), Layer())


@pytest.mark.parametrize(
    "targets", ["all-linear", "All-Linear", ["q_proj"], ["0.q_proj", "1.k_proj"], r".*\.[qk]_proj"]
)
def test_names_that_are_there(targets):
    assert target_problems(model(), targets) == []


def test_one_name_of_several_that_is_not():
    """PEFT itself passes over it where another name is found."""
    assert target_problems(model(), ["q_proj", "k_prj"]) == [
        "model.lora.target_modules: the model has no 'k_prj'; did you mean k_proj?;"
        " its linear layers are k_proj, q_proj"
    ]


def test_patterns():
    (line,) = target_problems(model(), "q_proj")  # of a whole name, as PEFT has it
    assert line.startswith(
        "model.lora.target_modules=q_proj: no module of the model is called so; it is matched with whole"
    )
    assert "such as 0.q_proj" in line
    (line,) = target_problems(model(), "(q_proj")
    assert line.startswith("model.lora.target_modules=(q_proj: no regular expression (")


@pytest.mark.parametrize("targets", [["q_proj", "lm_head"], ".*(q_proj|lm_head)"])
def test_the_output_head(targets):
    """TRL refuses it too, once the model is loaded."""
    (line,) = target_problems(tiny_model(50), targets)
    assert line.startswith("model.lora.target_modules: 'lm_head' is the output head") and "all-linear" in line
    assert target_problems(tiny_model(50), ["q_proj"]) == []
