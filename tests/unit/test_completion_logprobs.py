"""Log-probs of completions under LoRA models with padding, against the model's own logits, and reading its head."""

from types import SimpleNamespace

import peft
import pytest
import torch
import torch.nn.functional as F
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from slothrl.logprobs import completion_logprobs, head_spec

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "tied": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.3)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=4.0)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=2.0)),
}
LENGTH, COMPLETION = 11, 6


def lora_model(family: str) -> peft.PeftModel:
    torch.manual_seed(0)
    model = FAMILIES[family]()
    with torch.no_grad():  # a tiny model's logits are all alike: spread them, so that a wrong scale shows
        model.get_output_embeddings().weight.mul_(20)
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    return peft.get_peft_model(model, config).eval()


def padded_batch() -> tuple[torch.Tensor, torch.Tensor]:
    """(3, 11) ids and mask: left-padded prompts, right-padded completions, one completion without a token."""
    ids = torch.randint(3, 61, (3, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, -2:] = 0
    mask[2, -COMPLETION:] = 0
    return ids.masked_fill(mask == 0, 0), mask


def whole_logits(model, ids, mask, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    logits = model(input_ids=ids, attention_mask=mask).logits[:, -COMPLETION - 1 : -1].float()
    log_probs = F.log_softmax(logits / temperature, dim=-1)
    kept = mask[:, -COMPLETION:]
    chosen = log_probs.gather(2, ids[:, -COMPLETION:, None]).squeeze(2) * kept
    return chosen, -(log_probs.exp() * log_probs).sum(-1) * kept


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("chunk_size", [4, 1024])
def test_completion_logprobs_of_a_lora_model(family, chunk_size):
    model = lora_model(family)
    ids, mask = padded_batch()
    lora = [p for p in model.parameters() if p.requires_grad]
    expected, expected_entropy = whole_logits(model, ids, mask, 0.8)
    logprobs, entropy = completion_logprobs(model, ids, mask, COMPLETION, 0.8, chunk_size=chunk_size)
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(entropy, expected_entropy, atol=1e-5, rtol=1e-5)
    weights = torch.linspace(-1, 1, COMPLETION)
    ours = torch.autograd.grad((logprobs * weights).sum(), lora)
    theirs = torch.autograd.grad((expected * weights).sum(), lora)
    assert max(g.abs().max() for g in theirs) > 1e-2
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_adapters_can_be_switched_off():
    model = lora_model("llama")
    ids, mask = padded_batch()
    with torch.no_grad(), model.disable_adapter():
        logprobs, _ = completion_logprobs(model, ids, mask, COMPLETION)
        torch.testing.assert_close(logprobs, whole_logits(model, ids, mask, 1.0)[0], atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        assert not torch.allclose(completion_logprobs(model, ids, mask, COMPLETION)[0], logprobs, atol=1e-2)


def test_batch_without_completion_tokens_still_has_a_backward():
    model = lora_model("llama")
    ids, mask = padded_batch()
    logprobs, _ = completion_logprobs(model, ids[2:], mask[2:], COMPLETION)
    logprobs.sum().backward()
    assert logprobs.tolist() == [[0.0] * COMPLETION]


@pytest.mark.parametrize("length", [0, LENGTH])
def test_completion_must_leave_a_prompt(length):
    ids, mask = padded_batch()
    with pytest.raises(ValueError, match="completion_len"):
        completion_logprobs(lora_model("llama"), ids, mask, length)


class Head(torch.nn.Module):
    """The least of a transformers model that `head_spec` reads."""

    def __init__(self, head: torch.nn.Module | None, **fields):
        super().__init__()
        self.head = head
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(**{"model_type": "llama", **fields}))

    def get_output_embeddings(self):
        return self.head


@pytest.mark.parametrize(
    "fields, scale, softcap",
    [
        ({}, 1.0, None),
        ({"logit_scale": None}, 1.0, None),
        ({"logit_scale": 0.0625}, 0.0625, None),
        ({"lm_head_multiplier": 0.5}, 0.5, None),
        ({"logits_scaling": 8.0}, 0.125, None),
        ({"logits_scaling": 8.0, "model_type": "hyperclovax"}, 8.0, None),
        ({"final_logit_softcapping": 30.0, "output_multiplier": 2.0}, 2.0, 30.0),
        ({"final_logit_softcapping": None, "logits_soft_cap": 20.0}, 1.0, 20.0),
    ],
)
def test_head_spec_reads_the_config(fields, scale, softcap):
    head = torch.nn.Linear(4, 6)
    spec = head_spec(Head(head, **fields))
    assert (spec.scale, spec.softcap) == (scale, softcap)
    assert spec.weight is head.weight and spec.bias is head.bias and spec.trainable


def test_head_spec_refuses_what_it_cannot_read():
    packed = torch.nn.Linear(4, 6)
    packed.weight = torch.nn.Parameter(torch.zeros(12, 1, dtype=torch.uint8), requires_grad=False)
    for head, message in ((None, "no output embeddings"), (packed, "packed")):
        with pytest.raises(ValueError, match=message):
            head_spec(Head(head))
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"])
    with pytest.raises(ValueError, match="adapter"):
        head_spec(peft.get_peft_model(FAMILIES["llama"](), config))
    prompts = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="prompt learning"):
        head_spec(peft.get_peft_model(FAMILIES["llama"](), prompts))


def test_saved_head_of_peft_is_trained():
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"])
    model = peft.get_peft_model(FAMILIES["llama"](), config)
    assert head_spec(model).trainable
    with model.disable_adapter():
        assert not head_spec(model).trainable
