"""The contract of the shared base on a GPU: one memory, families, sleep, streams, CUDA graphs."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from slothrl.engine import Sampling, model_logprobs
from slothrl.lora_slot import lora_shape
from slothrl.probe import PolicyProbe, mean_difference, perturbed_lora
from slothrl.shared_model import SharedModel, empty_model
from tests.families import FAMILIES, ROWS, make_checkpoint
from tests.helpers import tiny_tokenizer

pytest.importorskip("vllm")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
BOUND = 0.15  # bf16 rounding of two implementations, on random weights with peaked distributions


def start(folder, quantization, eager=True, view=False):
    """(engine, shared base, PEFT model) over one checkpoint."""
    from slothrl.vllm_engine import VLLMEngine, VLLMOptions

    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    outline = get_peft_model(empty_model(str(folder), torch.float32), config, low_cpu_mem_usage=True)
    empty = empty_model(str(folder), torch.bfloat16)
    more = {"gpu_memory_utilization": 0.05, "kv_cache_gb": 1.0, "enforce_eager": eager, "view": view}
    options = VLLMOptions(str(folder), 128, 8, quantization, **more)
    engine = VLLMEngine(options, lora_shape(outline))
    shared = SharedModel(engine.vllm_model, empty)
    model = get_peft_model(shared.model, config)
    return engine.follow(model, tiny_tokenizer()), shared, model


def check(engine, shared, model):
    assert shared.own_parameters(model) == []
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    probe = PolicyProbe(engine, model, ROWS, bound=BOUND)
    probe.check()
    probe.perturbation_test()


@pytest.mark.parametrize("family", FAMILIES)
def test_nf4_families(family, tmp_path):
    engine, shared, model = start(make_checkpoint(family, tmp_path), "bitsandbytes")
    check(engine, shared, model)
    engine.close()


@pytest.mark.parametrize("family", ["qwen2", "gemma3", "phi3"])
def test_plain_families(family, tmp_path):
    engine, shared, model = start(make_checkpoint(family, tmp_path), None)
    check(engine, shared, model)
    engine.close()


def test_prequantized_checkpoint(tmp_path):
    """bnb-4bit with double quantisation: the shared weights are bit for bit what transformers loads."""
    from bitsandbytes.functional import dequantize_4bit

    plain = make_checkpoint("llama", tmp_path / "plain")
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype="bfloat16"
    )
    loaded = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16, quantization_config=config, device_map=0)
    folder = tmp_path / "bnb-4bit"
    loaded.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    engine, shared, model = start(folder, None)
    check(engine, shared, model)
    for layer, theirs in zip(model.get_base_model().model.layers, loaded.model.layers, strict=True):
        for ours, other in ((layer.self_attn.k_proj, theirs.self_attn.k_proj), (layer.mlp.up_proj, theirs.mlp.up_proj)):
            weight, expected = ours.base_layer.weight, other.weight
            assert torch.equal(weight.data.view(-1), expected.data.view(-1))
            same = dequantize_4bit(weight.data, weight.quant_state)
            assert torch.equal(same, dequantize_4bit(expected.data, expected.quant_state))
    engine.close()


def test_view_sleeps_and_follows(tmp_path):
    """The 16-bit view of an nf4 base, in CUDA graphs: gone while asleep, and made anew from the LoRA of the day."""
    engine, shared, model = start(make_checkpoint("qwen2", tmp_path), "bitsandbytes", eager=False, view=True)
    check(engine, shared, model)
    view, rows = engine.holdings()["16-bit view"], engine.logprobs(ROWS)
    assert view == 2 * 2 * (256 * 128 + 128 * 128 + 512 * 128 + 128 * 256)
    engine.sleep()
    assert engine.holdings()["16-bit view"] == 0
    with perturbed_lora(model, 0.1):
        engine.push_lora()
        greedy = engine.generate([ROWS[0]], Sampling(max_tokens=12, temperature=0.0))
        row = ROWS[0] + greedy.completion_ids[0]
        expected = model_logprobs(model, [row])[0][len(ROWS[0]) - 1 :]
        assert (expected - torch.tensor(greedy.sampling_logprobs[0])).abs().mean() < BOUND
    engine.push_lora()
    assert mean_difference(engine.logprobs(ROWS), rows) < 0.01
    engine.close()


# --- one engine with CUDA graphs for what follows -------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    folder = make_checkpoint("llama", tmp_path_factory.mktemp("shared"))
    engine, shared, model = start(folder, "bitsandbytes", eager=False)
    yield engine, shared, model
    engine.close()


def test_graphs_follow(parts):
    check(*parts)
    engine, _, model = parts
    greedy = Sampling(max_tokens=12, temperature=0.0)
    with perturbed_lora(model, 0.1):
        engine.push_lora()
        # The decode path, which runs in captured graphs, must see the new weights as the prefill path does.
        rollout = engine.generate([ROWS[0]], greedy)
        row = ROWS[0] + rollout.completion_ids[0]
        expected = model_logprobs(model, [row])[0][len(ROWS[0]) - 1 :]
        assert (expected - torch.tensor(rollout.sampling_logprobs[0])).abs().mean() < BOUND
    engine.push_lora()


def test_sleep_frees_the_cache_only(parts):
    engine, shared, model = parts
    rows, ours, checksum = engine.logprobs(ROWS), model_logprobs(model, ROWS), shared.checksum()
    cache = engine.holdings()["KV cache"]
    assert cache >= 0.99 * 2**30
    torch.cuda.empty_cache()
    before = torch.cuda.mem_get_info()[0]
    engine.sleep()
    freed = torch.cuda.mem_get_info()[0] - before
    assert freed >= 0.95 * cache
    assert engine.holdings()["KV cache"] == 0
    # The memory is really there for others, and what others write to it harms nobody.
    other = torch.full((int(freed * 0.8),), 255, dtype=torch.uint8, device="cuda")
    assert mean_difference(model_logprobs(model, ROWS), ours) == 0
    assert shared.checksum() == checksum
    with perturbed_lora(model, 0.1):
        engine.push_lora()  # while it sleeps
        del other
        torch.cuda.empty_cache()
        changed = engine.logprobs(ROWS)  # wakes it
        assert mean_difference(changed, model_logprobs(model, ROWS)) < BOUND
    engine.push_lora()
    assert mean_difference(engine.logprobs(ROWS), rows) < 0.01
    assert abs(torch.cuda.mem_get_info()[0] - before) < 64 * 2**20


def test_prefix_cache_forgets_the_old_policy(parts):
    engine, _, model = parts
    greedy = Sampling(max_tokens=2, temperature=0.0)
    prompt = (ROWS[2] * 2)[:100]
    before = engine.generate([prompt], greedy)
    with perturbed_lora(model, 0.1):
        engine.push_lora()
        changed = engine.generate([prompt], greedy)
        expected = model_logprobs(model, [prompt + changed.completion_ids[0]])[0][99:]
        assert (expected - torch.tensor(changed.sampling_logprobs[0])).abs().mean() < BOUND
    engine.push_lora()
    assert engine.generate([prompt], greedy).completion_ids == before.completion_ids


def test_streams(parts):
    """vLLM on its own stream, 8-bit Adam and bitsandbytes' layers on the default one, over and over: nothing races."""
    import bitsandbytes as bnb

    engine, shared, model = parts
    weights = [p for p in model.parameters() if p.requires_grad]
    kept = [weight.detach().clone() for weight in weights]
    optimizer = bnb.optim.AdamW8bit(weights, lr=1e-4, min_8bit_size=16)
    checksum = shared.checksum()
    ids = torch.tensor([ROWS[1]] * 4, device="cuda")
    for _ in range(20):
        rollout = engine.generate([ROWS[0]] * 8, Sampling(max_tokens=4))
        assert all(rollout.completion_ids)
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        engine.push_lora()
        assert mean_difference(engine.logprobs(ROWS[:1]), model_logprobs(model, ROWS[:1])) < BOUND
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert shared.checksum() == checksum
    with torch.no_grad():
        for weight, value in zip(weights, kept, strict=True):
            weight.copy_(value)
    engine.push_lora()
