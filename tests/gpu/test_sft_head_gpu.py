"""SFT by slothrl's head on a GPU: losses, metrics and LoRA gradients beside TRL's trainer in two dtypes, and peaks."""

import gc

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM
from trl import SFTConfig
from trl import SFTTrainer as TRLSFTTrainer

from slothrl.trainers.sft import SFTTrainer
from tests.helpers import tiny_tokenizer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
VOCABULARY = 128256
FIELDS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "max_length": 1024}


def trainer(kind: type, folder, dtype: torch.dtype, **fields):
    """A narrow Llama with a real vocabulary, the same numbers in both dtypes, over rows of unlike lengths."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1024, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, pad_token_id=0, bos_token_id=None, eos_token_id=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config).to("cuda", torch.bfloat16).to(dtype)
    numbers = range(1, 17)
    rows = {"prompt": ["what is " * n for n in numbers], "completion": ["well, " * (51 - 3 * n) for n in numbers]}
    common = {
        "output_dir": str(folder), "bf16": dtype == torch.bfloat16, "report_to": "none", "save_strategy": "no",
        "logging_steps": 1, "disable_tqdm": True, "optim": "sgd", "learning_rate": 0.1, "max_steps": 2,
        "gradient_checkpointing": False,
    }  # fmt: skip
    lora = LoraConfig(r=8, target_modules="all-linear", init_lora_weights=False)
    made = kind(
        model, SFTConfig(**(common | FIELDS | fields)), train_dataset=Dataset.from_dict(rows), peft_config=lora,
        processing_class=tiny_tokenizer(),
    )  # fmt: skip
    for parameter in made.model.parameters():
        if parameter.requires_grad:
            parameter.data.copy_(parameter.data.bfloat16())
    return made


def first_gradients(made) -> tuple[dict[str, torch.Tensor], float, dict[str, float]]:
    """Gradients of the first micro-batch, its loss, and what TRL would log."""
    made.model.train()
    batch = made._prepare_inputs(next(iter(made.get_train_dataloader())))
    made._metrics["train"].clear()
    loss = made.compute_loss(made.model, batch)
    loss.backward()
    found = {name: p.grad.double() for name, p in made.model.named_parameters() if p.grad is not None}
    return found, loss.item(), {name: values[-1] for name, values in made._metrics["train"].items()}


@pytest.mark.parametrize("packed", [False, True])
def test_float32_is_trls(tmp_path, packed):
    fields = {"packing": True, "max_length": 512} if packed else {}
    torch.backends.cuda.matmul.allow_tf32 = False
    ours, theirs = (trainer(kind, tmp_path, torch.float32, **fields) for kind in (SFTTrainer, TRLSFTTrainer))
    assert ours.trl_head_reason is None
    (found, loss, said), (wanted, expected, metrics) = first_gradients(ours), first_gradients(theirs)
    assert loss == pytest.approx(expected, abs=1e-5) and said == pytest.approx(metrics, abs=1e-5)
    assert len(found) == 28 and max(gradient.abs().max().item() for gradient in wanted.values()) > 1e-4
    for name, gradient in wanted.items():
        bound = 1e-5 * max(1.0, gradient.abs().max().item())
        assert (found[name] - gradient).abs().max() <= bound, name


def test_bfloat16_is_as_near_to_float32_as_trls(tmp_path):
    """All gradients as one vector. The hidden states' gradient is rounded twice, and TRL's, kept in float32, once."""
    truth, expected, _ = first_gradients(trainer(SFTTrainer, tmp_path, torch.float32))
    errors, norm = {}, sum(gradient.square().sum() for gradient in truth.values()).sqrt()
    for kind in (SFTTrainer, TRLSFTTrainer):
        made = trainer(kind, tmp_path, torch.bfloat16)
        found, loss, _ = first_gradients(made)
        assert loss == pytest.approx(expected, rel=5e-3)
        errors[kind] = sum((found[name] - truth[name]).square().sum() for name in truth).sqrt() / norm
    assert errors[SFTTrainer] <= 1.25 * errors[TRLSFTTrainer] + 1e-3 and errors[SFTTrainer] < 0.1


def test_memory_and_whole_steps(tmp_path):
    """4 x 1,024 tokens, all counted: not more at the peak than with TRL's head, and far from whole logits."""
    peaks = {}
    for kind in (SFTTrainer, TRLSFTTrainer):
        made = trainer(kind, tmp_path, torch.bfloat16)
        ids = torch.randint(4, 90, (4, 1024), device="cuda")
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        made.model.train()
        for _ in range(2):  # what stays is there in the second
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            made.compute_loss(made.model, dict(batch)).backward()
            torch.cuda.synchronize()
            peaks[kind] = torch.cuda.max_memory_allocated() - before
        made.train()
        assert all(log["grad_norm"] > 0 for log in made.state.log_history if "grad_norm" in log)
        assert len(made.state.log_history) >= 2
        del made
        gc.collect()
    assert peaks[SFTTrainer] <= 1.05 * peaks[TRLSFTTrainer], peaks
    assert peaks[SFTTrainer] < 4 * 1024 * VOCABULARY * 2, peaks  # the logits alone, in bfloat16
