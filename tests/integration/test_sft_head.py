"""SFT's log-probs by slothrl's frozen head: TRL's loss, metrics and gradients over kinds of heads; where TRL's runs."""

import pytest
import torch
from equality import assert_same, lora_gradients, lora_model, train
from peft import LoraConfig, get_peft_model
from test_equality_sft import DATA, made
from torch import nn
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM
from trl import SFTTrainer as TRLSFTTrainer

from slothrl.label_scores import label_scores, why_no_label_scores
from slothrl.trainers.sft import SFTTrainer
from tests.helpers import tiny_model

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = {"intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1}


def with_bias(vocabulary: int, hidden: int):
    model = tiny_model(vocabulary, hidden)
    head, model.lm_head = model.lm_head, nn.Linear(hidden, vocabulary)
    model.lm_head.weight = head.weight
    return model


def softcapped(vocabulary: int, hidden: int):
    """Gemma 2: tied, its logits under a cap that bends most of them."""
    torch.manual_seed(0)
    fields = {"head_dim": 8, "sliding_window": 8, "final_logit_softcapping": 0.2, "attn_implementation": "eager"}
    return Gemma2ForCausalLM(Gemma2Config(vocab_size=vocabulary, hidden_size=hidden, **SIZES, **fields))


def scaled(vocabulary: int, hidden: int):
    """Cohere: tied, its logits times a factor."""
    torch.manual_seed(0)
    return CohereForCausalLM(CohereConfig(vocab_size=vocabulary, hidden_size=hidden, logit_scale=3.0, **SIZES))


def route(trainer, rows: int = 4) -> set[str]:
    """Names of all autograd nodes behind the loss of a batch."""
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(rows)])
    nodes = [trainer.compute_loss(trainer.model.train(), dict(batch)).grad_fn]
    seen = set()
    while nodes:
        node = nodes.pop()
        if node is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
    return {node.name() for node in seen}


METRICS = ("loss", "entropy", "mean_token_accuracy", "num_tokens", "grad_norm")
OURS, THEIRS = "_FrozenHeadBackward", "ChunkedLogProb"
HEADS = {"bias": with_bias, "tied, under a softcap": softcapped, "tied, scaled": scaled}
FIELDS = {"completion_only_loss": True, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("head", HEADS)
def test_heads(head, tmp_path, monkeypatch):
    """Completions only, two accumulation steps of unlike lengths, one evaluation; what is logged is TRL's."""
    monkeypatch.setattr("test_equality_sft.lora_model", lambda: lora_model(HEADS[head]))
    found = {}
    for kind in (SFTTrainer, TRLSFTTrainer):
        trainer = made(kind, "pairs", tmp_path, **FIELDS)
        gradients, logs = train(trainer)
        trainer.eval_dataset = trainer.train_dataset
        found[kind] = gradients, [*logs, trainer.evaluate()], trainer
    (ours, logs, trainer), (wanted, expected, other) = found.values()
    assert trainer.trl_head_reason is None and "gradient written in the forward" in trainer.describe_head()
    assert OURS in route(trainer) and not any(THEIRS in name for name in route(trainer))
    assert any(THEIRS in name for name in route(other))
    for mine, theirs in zip(ours, wanted, strict=True):
        assert_same(mine, theirs)
    for log, theirs in zip(logs, expected, strict=True):
        names = [name for name in theirs if name.removeprefix("eval_") in METRICS]
        assert len(names) >= 3
        assert {name: log[name] for name in names} == pytest.approx({name: theirs[name] for name in names}, abs=1e-5)


def test_a_batch_without_labels_and_ties(tmp_path):
    """No token counts: a loss of 0 with gradients of 0. All logits alike: the first token is the likeliest."""
    trainer = made(SFTTrainer, "text", tmp_path)
    ids = torch.arange(12).reshape(2, 6) % 7 + 3
    labels = torch.full_like(ids, -100)
    trainer.compute_loss(trainer.model, {"input_ids": ids, "attention_mask": ids > 0, "labels": labels}).backward()
    assert all(gradient.eq(0).all() for gradient in lora_gradients(trainer.model).values())
    model = tiny_model(9, 32)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    scores = label_scores(model.requires_grad_(False), torch.tensor([[5, 0, 3, -100, 0]]), {"input_ids": ids[:1, :5]})
    assert scores.is_top1.tolist() == [[True, False, False, True]]
    assert scores.label_mask.tolist() == [[True, True, False, True]]


def test_where_trls_head_runs(tmp_path, monkeypatch):
    """A trained head trains as TRL trains it, and the plan says why."""

    def trained():
        torch.manual_seed(1)
        config = LoraConfig(r=4, target_modules="all-linear", modules_to_save=["lm_head"], init_lora_weights=False)
        return get_peft_model(tiny_model(100, hidden=32), config)

    monkeypatch.setattr("test_equality_sft.lora_model", trained)
    trainer, other = (made(kind, "pairs", tmp_path / kind.__module__) for kind in (SFTTrainer, TRLSFTTrainer))
    assert trainer.describe_head() == "TRL's: the output head is trained" and OURS not in route(trainer)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(len(DATA["pairs"]["prompt"]))])
    gradients = []
    for each in (trainer, other):
        each.model.train().zero_grad()
        each.compute_loss(each.model, dict(batch)).backward()
        gradients.append({name: p.grad for name, p in each.model.named_parameters() if p.grad is not None})
    assert any("lm_head" in name for name in gradients[0])
    assert_same(*gradients)


def test_reasons(tmp_path):
    smoothed = made(SFTTrainer, "text", tmp_path, label_smoothing_factor=0.1)
    assert "label smoothing" in smoothed.describe_head() and OURS not in route(smoothed)
    assert "torch_compile" in made(SFTTrainer, "text", tmp_path, torch_compile=True).describe_head()
    model = lora_model()
    assert why_no_label_scores(model) is None and why_no_label_scores(model, torch.float32) is None
    assert why_no_label_scores(model, torch.bfloat16) == "the output head is float32, and bfloat16 is computed in"
    adapted = get_peft_model(tiny_model(9), LoraConfig(target_modules=["lm_head"]))
    assert "wrapped by an adapter" in str(why_no_label_scores(adapted))
    assert "has no output embeddings" in str(why_no_label_scores(tiny_model(9).model))
