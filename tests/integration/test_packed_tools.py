"""Conversations with TRL's tools through the packed step: what a tool wrote is read, and is not trained on."""

import copy
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from equality import TOKENIZER, FixedEngine, arguments, assert_same, lora_model, train, use_trl_vllm
from trl import GRPOTrainer as TRLGRPOTrainer
from trl.chat_template_utils import qwen3_chat_template

from slothrl.config import PackingConfig
from slothrl.engine import Rollout
from slothrl.trainers.grpo import GRPOTrainer

pytestmark = pytest.mark.usefixtures("one_thread")
CALL = '<tool_call>\n{"name": "multiply", "arguments": {"a": %d, "b": 7}}\n</tool_call><|im_end|>'


def multiply(a: int, b: int) -> int:
    """Multiplies two integers.

    Args:
        a: The first integer.
        b: The second integer.

    Returns:
        The product.
    """
    return a * b


def scripted(prompt_ids):
    """Every second completion calls the tool; after a tool's answer comes a last word of another length each."""
    texts = []
    for place, ids in enumerate(prompt_ids):
        answered = "<tool_response>" in TOKENIZER.decode(ids)
        last_word = "It is " + "so " * (1 + place % 3) + "<|im_end|>"
        texts.append(CALL % (place + 2) if place % 2 == 0 and not answered else last_word)
    return [TOKENIZER(text, add_special_tokens=False)["input_ids"] for text in texts]


def claimed(completions):
    """Log-probs that an engine may say it sampled them with."""
    return [[-4.6 + 0.7 * ((place * 7 + token) % 5 - 2) for place, token in enumerate(ids)] for ids in completions]


CONTEXT = SimpleNamespace(llm_engine=SimpleNamespace(model_config=SimpleNamespace(max_model_len=4096)))  # as vllm.LLM


class ToolEngine(FixedEngine):
    llm = CONTEXT

    def generate(self, prompt_ids, sampling):
        ids = scripted(prompt_ids)
        return Rollout(ids, claimed(ids) if self.name == "vllm" else None)


class ScriptedTRL(TRLGRPOTrainer):
    def _generate_single_turn(self, prompt_ids, *_, **__):
        ids = scripted(prompt_ids)
        return ids, claimed(ids) if self.use_vllm else None


class Abacus:
    """An environment: its method is the tool, and it scores what was done with it."""

    def reset(self, **row):
        self.total = 0
        return " Use the abacus."

    def multiply(self, a: int, b: int) -> int:
        """Multiplies two integers.

        Args:
            a: The first integer.
            b: The second integer.

        Returns:
            The product.
        """
        self.total += a * b
        return self.total

    def get_reward(self) -> float:
        return self.total / 10


def length(completions, **_):
    return [float(sum(len(str(message)) for message in completion) % 13) for completion in completions]


def run(kind, folder, **named):
    tokenizer = copy.deepcopy(TOKENIZER)
    tokenizer.chat_template = qwen3_chat_template
    rows = Dataset.from_dict({"prompt": [[{"role": "user", "content": f"{n} times 7?"}] for n in (3, 44, 555, 6)] * 2})
    args = arguments(
        folder, max_steps=2, max_completion_length=300, loss_type="grpo", vllm_importance_sampling_mode="token_truncate"
    )
    named = {"tools": [multiply]} | named if "environment_factory" not in named else named
    one = kind(lora_model(), length, args, rows, processing_class=tokenizer, **named)
    if kind is ScriptedTRL and "environment_factory" in named:
        use_trl_vllm(one)
        one.vllm_generation.llm = CONTEXT
    gradients, logs = train(one)
    return gradients, logs, one._buffered_inputs[0]["tool_mask"]


def test_tool_tokens_are_read_and_not_trained_on(tmp_path):
    packing = PackingConfig(mode="on", shared_prefix="always", tokens_per_micro_batch=900)
    found = run(GRPOTrainer, tmp_path, engine=ToolEngine("transformers"), packing=packing)
    wanted = run(ScriptedTRL, tmp_path)
    assert torch.equal(found[2], wanted[2])
    assert 0 < (found[2] == 0).sum() < found[2].numel() / 2
    for mine, theirs in zip(found[0], wanted[0], strict=True):
        assert_same(mine, theirs)
    for log, expected in zip(found[1], wanted[1], strict=True):
        assert log["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert log["tools/call_frequency"] == expected["tools/call_frequency"] == 0.5
        assert log["packing/micro_batches"] > 1


def test_an_environment_and_an_engine_that_reports_its_log_probs(tmp_path):
    """TRL's `environment_factory`: its reward counts, its tokens have no log-probs and no importance ratio."""
    packing, named = PackingConfig(mode="on", tokens_per_micro_batch=900), {"environment_factory": Abacus}
    found = run(GRPOTrainer, tmp_path, engine=ToolEngine("vllm"), packing=packing, **named)
    wanted = run(ScriptedTRL, tmp_path, **named)
    assert torch.equal(found[2], wanted[2]) and (found[2] == 0).any()
    for mine, theirs in zip(found[0], wanted[0], strict=True):
        assert_same(mine, theirs)
    for log, expected in zip(found[1], wanted[1], strict=True):
        assert log["loss"] == pytest.approx(expected["loss"], abs=1e-5)
        assert log["rewards/Abacus/mean"] == expected["rewards/Abacus/mean"] > 0
        ratio = "sampling/importance_sampling_ratio/mean"
        assert log[ratio] == pytest.approx(expected[ratio], abs=1e-5) != 1.0
