"""Each export reloaded and held against the adapter's own outputs: transformers + PEFT on the unquantised base.

The tiny models have peaked distributions (log-probs 25 times those of a random model), on which rounding shows far more
than on a trained one; without its adapter each is off by nats. Tolerances are (largest, mean) in nat.
"""

import json
import shutil
import weakref

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from gguf import GGUFReader
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from slothrl.__main__ import main
from slothrl.adapter import read_adapter
from slothrl.base_weights import BaseWeights
from slothrl.checkpoint import write as write_checkpoint
from slothrl.export import export_gguf, export_merged, export_peft
from slothrl.merge import MergedWeights
from slothrl.safetensors_shards import write_shards
from tests.export_models import TEXTS, adapted, bpe_tokenizer, difference, logprobs, make_adapter, make_base

TOLERANCE = {
    "f32": (5e-5, 1e-5),
    "f16": (0.015, 0.002),
    "bf16": (0.15, 0.03),
    "q8_0": (0.6, 0.1),
}
# family, how its tokenizer cuts text, config fields that the family's real models have
COVERED = [
    ("llama", "gpt-2", {}),
    ("llama_tied", "gpt-2", {}),
    ("mistral", "llama", {}),
    ("qwen2", "qwen2", {}),
    ("qwen3", "qwen2", {"head_dim": 128}),  # transformers' GGUF reader takes 128 for granted
]


@pytest.fixture(scope="module", params=COVERED, ids=lambda row: row[0])
def case(request, tmp_path_factory):
    """(base, adapter, the adapter's log-probs, tokenizer)."""
    family, kind, options = request.param
    folder, tokenizer = tmp_path_factory.mktemp(family), bpe_tokenizer(kind)
    base = make_base(family, folder / "base", tokenizer, **options)
    adapter = make_adapter(base, folder / "run" / "adapter")
    return base, adapter, logprobs(adapted(base, adapter)), tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """(base, adapter) of a Llama in float32."""
    folder = tmp_path_factory.mktemp("llama32")
    base = make_base("llama", folder / "base", bpe_tokenizer("gpt-2"), torch.float32)
    return base, make_adapter(base, folder / "adapter")


def assert_close(model, reference, kind):
    largest, mean = difference(model, reference)
    print(f"{kind}: {largest:.2g}, {mean:.2g}")
    assert largest < TOLERANCE[kind][0] and mean < TOLERANCE[kind][1], (largest, mean)


# --- merged -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "kind"), [("bfloat16", "bf16"), ("float16", "f16"), ("float32", "f32")])
def test_merged(case, tmp_path, dtype, kind):
    base, adapter, reference, tokenizer = case
    assert export_merged(adapter, tmp_path / "out", dtype=dtype) == []
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {getattr(torch, dtype)}
    assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32), reference, kind)
    bare = difference(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), reference)
    assert bare[1] > 5 * TOLERANCE[kind][1]  # a lost adapter would be seen
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert [again(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]
    assert again.chat_template == tokenizer.chat_template
    for name in ("config.json", "generation_config.json"):
        kept = json.loads((base / name).read_text())
        made = json.loads((tmp_path / "out" / name).read_text())
        assert made == kept | ({"dtype": dtype} if name == "config.json" else {})


VARIANTS = {
    "rslora": {"use_rslora": True, "r": 4},
    "patterns": {"rank_pattern": {"q_proj": 4, r"layers\.1\.mlp\.up_proj": 2}, "alpha_pattern": {"k_proj": 3}},
    "rslora_alpha": {"use_rslora": True, "alpha_pattern": {"q_proj": 5}},
    "some_layers": {"layers_to_transform": [1], "target_modules": ["q_proj"]},
    "embedding": {"target_modules": ["embed_tokens", "q_proj"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
}


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_merged_weights_are_pefts(tmp_path, family, variant):
    base = make_base(family, tmp_path / "base", None, torch.float32)
    adapter = make_adapter(base, tmp_path / "adapter", **VARIANTS[variant])
    notes = export_merged(adapter, tmp_path / "out", dtype="float32")
    model, reference = AutoModelForCausalLM.from_pretrained(tmp_path / "out"), adapted(base, adapter)
    assert_close(model, logprobs(reference), "f32")
    untied = family == "llama_tied" and variant in ("embedding", "head")
    assert bool(notes) == untied and model.config.tie_word_embeddings == (family == "llama_tied" and not untied)
    if untied:  # PEFT's own merge writes into the one matrix that both share
        return
    wanted = reference.merge_and_unload().state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-6)


def test_merged_transposed_weights(tmp_path):
    """GPT-2's weights are (in, out); one of them is square, so that only fan_in_fan_out tells."""
    config = GPT2Config(vocab_size=1003, n_embd=64, n_layer=2, n_head=4, n_positions=128)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "base")
    bpe_tokenizer("gpt-2").save_pretrained(tmp_path / "base")
    options = {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter", **options)
    export_merged(adapter, tmp_path / "out", dtype="float32")
    wanted = adapted(tmp_path / "base", adapter).merge_and_unload().state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-6)


def test_shards_are_streamed(llama, tmp_path):
    """A base in shards gives a merge in shards, and no more than two tensors are ever held."""
    base, adapter = llama
    model = AutoModelForCausalLM.from_pretrained(base)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="300KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 3
    merged = MergedWeights(BaseWeights(tmp_path / "sharded"), read_adapter(adapter))
    living: weakref.WeakSet = weakref.WeakSet()
    most = 0

    def watched():
        nonlocal most
        for name, tensor in merged.rounded(torch.bfloat16):
            living.add(tensor)
            most = max(most, len(living))
            yield name, tensor
            del tensor

    (tmp_path / "out").mkdir()
    paths = write_shards(tmp_path / "out", merged.entries(torch.bfloat16), watched(), limit=200_000)
    assert len(paths) > 3 and most <= 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(merged.names)
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert torch.equal(opened.get_tensor(name), merged.tensor(name).bfloat16())
    shutil.copy(base / "config.json", tmp_path / "out")
    assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), logprobs(adapted(base, adapter)), "bf16")


def test_four_bit_base_is_unpacked(llama, tmp_path):
    base, _ = llama
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    packed = AutoModelForCausalLM.from_pretrained(base, quantization_config=quantization, dtype=torch.float32)
    packed.save_pretrained(tmp_path / "packed")
    adapter = make_adapter(base, tmp_path / "adapter")
    notes = export_merged(adapter, tmp_path / "out", base=str(tmp_path / "packed"), dtype="float32")
    assert len(notes) == 1 and "4-bit" in notes[0]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config
    stored, layers = load_file(tmp_path / "out" / "model.safetensors"), read_adapter(adapter).layers
    for name, layer in layers.items():
        weight = packed.get_submodule(name).weight
        unpacked = dequantize_4bit(weight.data, weight.quant_state)  # by the model that was quantised, not from disk
        wanted = unpacked.float() + layer.scaling * layer.b @ layer.a
        torch.testing.assert_close(stored[f"{name}.weight"], wanted, rtol=0, atol=1e-6)
    reference = logprobs(PeftModel.from_pretrained(packed, str(adapter)).eval())
    # bitsandbytes' matmul on packed weights rounds more on a CPU.
    assert_close(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), reference, "bf16")


# --- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0"])
def test_gguf(case, tmp_path, kind):
    base, adapter, reference, tokenizer = case
    export_gguf(adapter, tmp_path, kind=kind)
    file = f"model-{kind}.gguf"
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file, dtype=torch.float32)
    assert_close(model, reference, kind)
    if kind == "f16":
        again = AutoTokenizer.from_pretrained(tmp_path, gguf_file=file)
        assert [again(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]
        assert again.chat_template == tokenizer.chat_template
    stored = {tensor.name: tensor.tensor_type.name for tensor in GGUFReader(tmp_path / file).tensors}
    assert stored["blk.1.attn_q.weight"] == kind.upper() and stored["blk.1.attn_norm.weight"] == "F32"
    tied = AutoModelForCausalLM.from_pretrained(base).config.tie_word_embeddings
    assert ("output.weight" in stored) == (not tied)


def test_gguf_of_an_untied_model(tmp_path):
    base = make_base("llama_tied", tmp_path / "base", bpe_tokenizer("gpt-2"))
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["lm_head", "v_proj"])
    (note,) = export_gguf(adapter, tmp_path / "out", kind="f32")
    assert "makes them two" in note
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model-f32.gguf", dtype=torch.float32)
    assert_close(model, logprobs(adapted(base, adapter)), "f32")


# --- PEFT and the command line ----------------------------------------------------------------------------------------


def test_peft(case, tmp_path):
    base, adapter, reference, tokenizer = case
    (note,) = export_peft(adapter, tmp_path / "named")
    assert "--base" in note
    export_peft(adapter, tmp_path / "out", base="somebody/model")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "somebody/model"
    assert config | {"base_model_name_or_path": str(base)} == json.loads((adapter / "adapter_config.json").read_text())
    assert torch.equal(logprobs(adapted(base, tmp_path / "out")), reference)  # exact
    again = AutoTokenizer.from_pretrained(tmp_path / "named")
    assert [again(text).input_ids for text in TEXTS] == [tokenizer(text).input_ids for text in TEXTS]


def test_newest_checkpoint_of_an_interrupted_run(case, tmp_path):
    """A run that was stopped has no adapter/ yet; its checkpoints have no tokenizer, which the base then gives."""
    _, adapter, reference, tokenizer = case
    run = tmp_path / "run"
    run.mkdir()
    names = ("adapter_config.json", "adapter_model.safetensors")
    for step in (1, 2):
        write_checkpoint(run, step, lambda folder: [shutil.copy(adapter / name, folder) for name in names], {})
    (run / "checkpoint-2" / names[1]).write_bytes(b"damaged")
    assert main(["export", str(run), "--format", "merged", "--dtype", "float16"]) == 0
    made = run / "export-merged"
    assert_close(AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32), reference, "f16")
    assert AutoTokenizer.from_pretrained(made)(TEXTS[0]).input_ids == tokenizer(TEXTS[0]).input_ids


def test_command(case, tmp_path, capsys):
    """A run folder is enough; a folder that is not empty is left alone unless told otherwise."""
    base, adapter, reference, _ = case
    shutil.copytree(adapter, tmp_path / "run" / "adapter")
    run = str(tmp_path / "run")
    assert main(["export", run, "--format", "merged"]) == 0
    made = tmp_path / "run" / "export-merged"
    assert "model.safetensors" in capsys.readouterr().out
    assert_close(AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32), reference, "bf16")
    (made / "model-00001-of-00002.safetensors").write_bytes(b"stale")
    (made / "notes.txt").write_text("mine")
    assert main(["export", run, "--format", "merged", "--dtype", "float16"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert main(["export", run, "--format", "merged", "--dtype", "float16", "--force"]) == 0
    assert {path.name for path in made.iterdir()} >= {"model.safetensors", "notes.txt"}
    assert not (made / "model-00001-of-00002.safetensors").exists()
    assert_close(AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32), reference, "f16")
    assert main(["export", run, "--format", "gguf", "--type", "q8_0"]) == 0
    assert [path.name for path in (tmp_path / "run" / "export-gguf-q8_0").iterdir()] == ["model-q8_0.gguf"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "adapter",
        "export-gguf-q8_0",
        "export-merged",
    ]
