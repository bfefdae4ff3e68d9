"""Our SFTTrainer computes what TRL's computes: losses and gradients of every LoRA matrix over whole steps."""

import copy

import pytest
from datasets import Dataset
from equality import assert_same, lora_model, train
from trl import SFTConfig
from trl import SFTTrainer as TRLSFTTrainer

from slothrl.trainers.sft import SFTTrainer
from tests.helpers import tiny_tokenizer

pytestmark = pytest.mark.usefixtures("one_thread")
# ChatML whose assistant turns are marked, as TRL needs it to tell them apart.
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['role'] == 'assistant' %}{% generation %}"
    "{{ m['content'] }}<|im_end|>{% endgeneration %}{% else %}{{ m['content'] }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = ["a short one", "two and two are four, and nobody minds", "x", "the third is a little longer"] * 3
PAIRS = [("1+1=", "2"), ("what is 23 - 4?", "19, I think"), ("say hi", "hi there"), ("x", "y")] * 3


def talk(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


DATA = {
    "text": {"text": TEXTS},
    "pairs": {"prompt": [question for question, _ in PAIRS], "completion": [answer for _, answer in PAIRS]},
    "messages": {"messages": [talk(*pair) for pair in PAIRS]},
}
CASES = {
    "padded text": ("text", {}),
    "packed text": ("text", {"packing": True, "max_length": 64}),
    "wrapped text": ("text", {"packing": True, "packing_strategy": "wrapped", "max_length": 48}),
    "completions only": ("pairs", {"completion_only_loss": True}),
    "packed pairs": ("pairs", {"packing": True, "max_length": 64}),
    "messages": ("messages", {"assistant_only_loss": False}),
    "assistant only": ("messages", {"assistant_only_loss": True}),
    "packed, assistant only": ("messages", {"assistant_only_loss": True, "packing": True, "max_length": 128}),
    "accumulation": ("text", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "dft": ("text", {"loss_type": "dft"}),
}


def made(kind: type, data: str, folder, **fields):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = MARKED
    common = {
        "output_dir": str(folder),
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "optim": "sgd",
        "learning_rate": 0.5,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": False,
    }
    rows = Dataset.from_dict(copy.deepcopy(DATA[data]))
    return kind(lora_model(), SFTConfig(**(common | fields)), train_dataset=rows, processing_class=tokenizer)


@pytest.mark.parametrize("case", CASES)
def test_training(case, tmp_path):
    data, fields = CASES[case]
    gradients, logs = train(made(SFTTrainer, data, tmp_path, **fields))
    expected, expected_logs = train(made(TRLSFTTrainer, data, tmp_path, **fields))
    assert len(gradients) == len(expected) == 2
    for found, wanted in zip(gradients, expected, strict=True):
        assert_same(found, wanted)
    for key in ("loss", "num_tokens", "mean_token_accuracy"):
        assert [log[key] for log in logs] == pytest.approx([log[key] for log in expected_logs], abs=1e-5)


def test_the_cases_differ(tmp_path):
    """Assistant-only loss counts other tokens than the whole conversation: else the test above would prove little."""
    losses = [
        train(made(SFTTrainer, "messages", tmp_path, assistant_only_loss=only))[1][0]["loss"] for only in (False, True)
    ]
    assert abs(losses[0] - losses[1]) > 1e-3
