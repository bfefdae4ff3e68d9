"""What cannot be exported is refused by name, before anything is written; and what a GGUF file says of its model."""

import json
import math

import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from slothrl.__main__ import main
from slothrl.base_weights import base_folder, embedded_name
from slothrl.embedded import EMBEDDED
from slothrl.errors import UserError
from slothrl.export import export_gguf, export_merged, export_peft
from slothrl.gguf_vocabulary import read_vocabulary
from tests.export_models import bpe_tokenizer, make_adapter, make_base
from tests.helpers import tiny_tokenizer


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    base = make_base("llama", folder / "base", bpe_tokenizer("gpt-2"))
    return base, make_adapter(base, folder / "adapter")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias=lora_only"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights=pissa"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
    ],
)
def test_adapters_that_are_not_plain(llama, tmp_path, options, named):
    """Merging refuses them by name; PEFT's own format keeps them whole."""
    base, _ = llama
    adapter = make_adapter(base, tmp_path / "adapter", **options)
    for export in (export_merged, export_gguf):
        with pytest.raises(UserError, match=named):
            export(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_peft(adapter, tmp_path / "out")
    ours, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "out", adapter))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_another_base(llama, tmp_path):
    _, adapter = llama
    make_base("llama", tmp_path / "wider", None, hidden_size=64)
    with pytest.raises(UserError, match="belongs to another model"):
        export_merged(adapter, tmp_path / "out", base=str(tmp_path / "wider"))
    make_base("llama", tmp_path / "shallow", None, num_hidden_layers=1)
    with pytest.raises(UserError, match=r"no weight for the adapter's model\.layers\.1"):
        export_merged(adapter, tmp_path / "out", base=str(tmp_path / "shallow"))
    with pytest.raises(UserError, match="not on this machine"):
        export_merged(adapter, tmp_path / "out", base=str(tmp_path / "nowhere"))
    config = json.loads((llama[0] / "config.json").read_text()) | {"quantization_config": {"quant_method": "gptq"}}
    (tmp_path / "shallow" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="gptq"):
        export_merged(adapter, tmp_path / "out", base=str(tmp_path / "shallow"))
    (tmp_path / "wider" / "model.safetensors").rename(tmp_path / "wider" / "pytorch_model.bin")
    with pytest.raises(UserError, match="pickled"):
        export_merged(adapter, tmp_path / "out", base=str(tmp_path / "wider"))
    assert not (tmp_path / "out").exists()


def test_beyond_float16(llama, tmp_path):
    base, _ = llama
    weights = load_file(base / "model.safetensors")
    weights["model.layers.0.mlp.up_proj.weight"][0, 0] = 1e6
    (tmp_path / "base").mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            (tmp_path / "base" / path.name).write_bytes(path.read_bytes())
    save_file(weights, tmp_path / "base" / "model.safetensors", {"format": "pt"})
    adapter = make_adapter(tmp_path / "base", tmp_path / "adapter")
    for export, options in ((export_merged, {"dtype": "float16"}), (export_gguf, {"kind": "f16"})):
        with pytest.raises(UserError, match=r"layers\.0\.mlp\.up_proj\.weight has values beyond"):
            export(adapter, tmp_path / "out", **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "base"]  # nothing half-written is left
    export_merged(adapter, tmp_path / "out", dtype="bfloat16")


def test_command_line(llama, tmp_path, capsys):
    _, adapter = llama

    def said(*arguments, code=2):
        assert main(["export", *map(str, arguments)]) == code
        return capsys.readouterr().err

    assert "no such folder" in said(tmp_path / "typo", "--format", "peft")
    assert "--format" in said(adapter)
    assert "invalid choice" in said(adapter, "--format", "onnx")
    assert "--dtype belongs to --format merged" in said(adapter, "--format", "gguf", "--dtype", "float16")
    assert "holds no adapter" in said(tmp_path, "--format", "peft")
    (tmp_path / "whole").mkdir()
    (tmp_path / "whole" / "config.json").write_text("{}")
    assert "a whole model" in said(tmp_path / "whole", "--format", "merged")
    assert main(["export", "--help"]) == 0
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled" / "adapter_config.json").write_bytes((adapter / "adapter_config.json").read_bytes())
    (tmp_path / "pickled" / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    for kind in ("peft", "merged"):
        assert "pickles" in said(tmp_path / "pickled", "--format", kind, "--out", tmp_path / "out")


def test_embedded_base_is_known_by_its_folder():
    model = EMBEDDED["smollm2"]
    assert embedded_name(f"/elsewhere/.cache/slothrl/smollm2-{model.sha256[:12]}-1") == "smollm2"
    assert embedded_name("smollm2") == "smollm2" and embedded_name("org/smollm2") is None


def test_unknown_hub_name(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="--base"):
        base_folder("no-such-organisation/no-such-model")


# --- GGUF -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gemma2", "phi3", "smollm3"])
def test_architectures_without_gguf(tmp_path, family):
    base = make_base(family, tmp_path / "base", bpe_tokenizer("gpt-2"))
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=["o_proj"])
    with pytest.raises(UserError, match=f"does not cover {family}"):
        export_gguf(adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokenizers_without_gguf(llama, tmp_path):
    with pytest.raises(UserError, match="this one is WordLevel"):
        read_vocabulary(tiny_tokenizer(), 1003)
    with pytest.raises(UserError, match="do not belong together"):
        read_vocabulary(bpe_tokenizer("gpt-2"), 100)
    odd = bpe_tokenizer("gpt-2")
    odd.backend_tokenizer.pre_tokenizer = None  # pyright: ignore
    with pytest.raises(UserError, match="pre-tokenizer"):
        read_vocabulary(odd, 1003)


@pytest.mark.parametrize("kind", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_vocabulary(kind):
    tokenizer = bpe_tokenizer(kind)
    found = read_vocabulary(tokenizer, len(tokenizer) + 3)
    assert (found.model, found.pre, found.scores, found.space_prefix) == ("gpt2", kind, None, False)
    assert found.tokens[:-3] == tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    assert found.tokens[-1] == f"[PAD{len(tokenizer) + 2}]" and found.types[-3:] == [5, 5, 5]
    assert found.types[:4] == [3, 3, 3, 3] and set(found.types[4:-3]) == {1}
    assert len(found.merges) > 50 and all(merge.count(" ") == 1 for merge in found.merges)


def test_sentencepiece_vocabulary():
    """Scores give the merges their order: text merged by score comes out as the tokenizer has it."""
    tokenizer = bpe_tokenizer("llama")
    found = read_vocabulary(tokenizer, len(tokenizer))
    assert (found.model, found.space_prefix) == ("llama", True) and found.scores is not None
    assert found.types[0] == 2 and found.types[1:4] == [3, 3, 3] and found.types[4:260] == [6] * 256
    scores = dict(zip(found.tokens, found.scores, strict=True))
    for text in ("the cat sat on the mat", "What is 12 + 305? It isn't 9,999."):
        pieces = list("▁" + text.replace(" ", "▁"))
        while pairs := [i for i in range(len(pieces) - 1) if pieces[i] + pieces[i + 1] in scores]:
            best = max(pairs, key=lambda i: (scores[pieces[i] + pieces[i + 1]], -i))
            pieces[best : best + 2] = [pieces[best] + pieces[best + 1]]
        assert pieces == tokenizer.tokenize(text)


def test_metadata(llama, tmp_path):
    base, adapter = llama
    export_gguf(adapter, tmp_path, kind="q8_0")
    reader = GGUFReader(tmp_path / "model-q8_0.gguf")
    said = {name: field.contents() for name, field in reader.fields.items()}
    tokenizer = AutoTokenizer.from_pretrained(base)
    expected = {
        "general.architecture": "llama",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "llama.context_length": 256,
        "llama.embedding_length": 128,
        "llama.block_count": 2,
        "llama.feed_forward_length": 256,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.attention.key_length": 32,
        "llama.rope.dimension_count": 32,
        "llama.rope.freq_base": 10000.0,
        "llama.vocab_size": 1003,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": tokenizer.bos_token_id,
        "tokenizer.ggml.eos_token_id": tokenizer.eos_token_id,
        "tokenizer.ggml.padding_token_id": tokenizer.pad_token_id,
        "tokenizer.ggml.unknown_token_id": tokenizer.unk_token_id,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": tokenizer.chat_template,
    }
    assert {name: said.get(name) for name in expected} == expected
    assert said["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-6)
    assert len(said["tokenizer.ggml.tokens"]) == 1003


def test_rope_of_llama_3(tmp_path):
    """Low frequencies divided by the factor, high ones left, a line between (Llama 3.1's published scheme)."""
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    base = make_base("llama", tmp_path / "base", bpe_tokenizer("llama-bpe"), rope_parameters=rope)
    export_gguf(make_adapter(base, tmp_path / "adapter"), tmp_path / "out", kind="f16")
    (found,) = (t for t in GGUFReader(tmp_path / "out" / "model-f16.gguf").tensors if t.name == "rope_freqs.weight")
    for pair, factor in enumerate(found.data.tolist()):
        turns = 64 * 500000.0 ** (-2 * pair / 32) / (2 * math.pi)  # within the original context
        smooth = min(max((turns - 1.0) / (4.0 - 1.0), 0.0), 1.0)
        assert factor == pytest.approx(1 / ((1 - smooth) / 8.0 + smooth), rel=1e-5)
    base = make_base(
        "llama", tmp_path / "yarn", bpe_tokenizer("gpt-2"), rope_parameters=rope | {"rope_type": "dynamic"}
    )
    with pytest.raises(UserError, match="rope_type dynamic"):
        export_gguf(make_adapter(base, tmp_path / "adapter2"), tmp_path / "out2")


def test_sliding_window_is_told(tmp_path):
    base = make_base("mistral", tmp_path / "base", bpe_tokenizer("gpt-2"), sliding_window=64)
    (note,) = export_gguf(make_adapter(base, tmp_path / "adapter"), tmp_path / "out")
    assert "last 64 tokens" in note
