"""JSON, XML, repetition, language and the reward model, value by value."""

import sys

import pytest
import torch
from slothrl_rewards import json_schema, language_consistency, ranged, repetition_penalty, xml_format

from slothrl.errors import UserError
from tests.helpers import tiny_tokenizer


def one(function, completion, prompt="?", **params):
    (score,) = function(prompts=[prompt], completions=[completion], trainer_state=None, other=[1], **params)
    return score


def chat(content):
    return [{"role": "user", "content": "?"}, {"role": "assistant", "content": content}]


SCHEMA = {"type": "object", "properties": {"age": {"type": "integer", "minimum": 0}}, "required": ["age"]}


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ('{"age": 3}', 1.0),
        ('```json\n{"age": 3}\n```', 1.0),
        ('{"age": -3}', 0.2),
        ("[]", 0.2),
        ('{"age": 3', 0.0),
        ('Here: {"age": 3}', 0.0),
        ("", 0.0),
        ("NaN", 0.0),
        ("[" * 5000 + "]" * 5000, 0.0),
        ("[" * 65 + "]" * 65, 0.0),
        ('"' + "[" * 100 + '"', 0.2),
        ("1" * 10_000, 0.0),
        ('"' + "a" * 30_000 + '"', 0.0),
    ],
)
def test_json_schema(text, score):
    assert one(json_schema, text, schema=SCHEMA) == score
    assert one(json_schema, chat(text)) == (1.0 if score else 0.0)


def test_json_schemas_of_every_kind():
    omegaconf = pytest.importorskip("omegaconf")
    assert one(json_schema, "[1]", schema=omegaconf.OmegaConf.create({"type": "array", "enum": [[1]]})) == 1.0
    rows = json_schema(["?"] * 3, ["1", "1", "1"], schema=['{"type": "string"}', {"type": "integer"}, None])
    assert rows == [0.2, 1.0, 1.0]
    for wrong in ("{", {"type": "nonsense"}, 3, "[]"):
        with pytest.raises(ValueError, match="no valid schema"):
            one(json_schema, "1", schema=wrong)


def test_json_schema_fetches_nothing():
    with pytest.raises(Exception, match="(?i)unresolvable|schema"):
        one(json_schema, "1", schema={"$ref": "http://127.0.0.1:9/schema.json"})


def test_json_schema_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "jsonschema", None)
    assert one(json_schema, "{}") == 1.0
    with pytest.raises(ImportError, match=r"pip install 'slothrl\[json\]'"):
        one(json_schema, "{}", schema={})


BILLION = '<!DOCTYPE a [<!ENTITY x "ha"><!ENTITY y "&x;&x;&x;">]><think>&y;</think><answer>1</answer>'


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("<think>a</think> <answer>b</answer>", 1.0),
        ('<?xml version="1.0"?><all><think/><answer>b</answer></all>', 1.0),
        ("<think>a</think>", 0.25),
        ("<think>a</think><think>a</think><answer>b</answer>", 0.25),
        ("text", 0.0),
        ("<think>a < b</think><answer>b</answer>", 0.0),
        ("<think>a</answer>", 0.0),
        ("</root><root>", 0.0),
        (BILLION, 0.0),
        ("<a>" * 5000 + "</a>" * 5000, 0.0),
        ("<a>" * 64 + "</a>" * 64, 0.0),
        ("<think>\ud800</think><answer/>", 1.0),
    ],
)
def test_xml_format(text, score):
    assert one(xml_format, text) == one(xml_format, chat(text)) == score


def test_xml_tags():
    assert one(xml_format, "<a/><b/><c/>", tags=["a", "b", "d", "e"]) == 0.25
    for tags in ("answer", [], [1]):
        with pytest.raises(ValueError, match="list of tag names"):
            one(xml_format, "<a/>", tags=tags)


def test_repetition_penalty():
    assert one(repetition_penalty, "a b c a b c") == pytest.approx(-0.25)  # 4 trigrams, 3 different
    assert one(repetition_penalty, "A a a a", ngram=1) == pytest.approx(-0.75)
    assert one(repetition_penalty, chat("yes " * 1000)) == pytest.approx(-1 + 1 / 998)
    assert one(repetition_penalty, "yes " * 1000, max_penalty=-0.5) == pytest.approx(-0.5 + 0.5 / 998)
    assert one(repetition_penalty, "") == one(repetition_penalty, "a b") == 0.0
    assert one(repetition_penalty, "好好好好", unit="character") == pytest.approx(-0.5)
    assert one(repetition_penalty, "x", unit="token", completion_ids=[[1, 1, 1, 1]]) == pytest.approx(-0.5)
    for wrong in ({"ngram": 0}, {"max_penalty": 1}, {"unit": "line"}, {"unit": "token"}):
        with pytest.raises(ValueError, match="repetition_penalty"):
            one(repetition_penalty, "a", **wrong)


def test_language_consistency():
    assert one(language_consistency, "Hello there", prompt="Say hello") == 1.0
    assert one(language_consistency, "ab вг", prompt="Say hello") == 0.5
    assert one(language_consistency, "ab вг", script="cyrillic") == 0.5
    assert one(language_consistency, "私はカメラ", prompt="これは何ですか") == 1.0
    assert one(language_consistency, "카메라 漢字", prompt="안녕하세요") == 1.0
    assert one(language_consistency, "的是hi", prompt="你好") == 0.5
    assert one(language_consistency, "Let α and β be 3 𝑥", prompt="Say hello") == 1.0  # formulas
    assert one(language_consistency, "γειά", script="greek") == 1.0
    assert one(language_consistency, "12", prompt="Say") is None
    assert one(language_consistency, "hi", prompt="1 + 1") is None
    prompt = [{"role": "system", "content": "Answer in one word, please."}, {"role": "user", "content": "Привет"}]
    assert one(language_consistency, chat("Да"), prompt=prompt) == 1.0
    with pytest.raises(ValueError, match="knows no script"):
        one(language_consistency, "a", script="klingon")


def test_ranged_only_adds_an_attribute():
    def function():
        return 3

    assert ranged(0.0, 1.0)(function) is function and function.reward_range == (0.0, 1.0)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    folder = tmp_path_factory.mktemp("reward_model")
    tokenizer = tiny_tokenizer(pad=False)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, num_labels=1, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_reward_model(model_folder):
    from slothrl.reward_model import reward_model

    assert reward_model.needs_main_process is True
    prompts, texts = ["What?"] * 3, ["short", "a much longer completion", "z" * 500]
    scores = reward_model(prompts, texts, model=model_folder, batch_size=2, device="cpu")
    alone = [reward_model(["What?"], [text], model=model_folder, device="cpu")[0] for text in texts]
    assert scores == pytest.approx(alone, abs=1e-5)  # padding changes nothing
    assert len(set(scores)) == 3
    talks = [[{"role": "user", "content": "What?"}]] * 3
    assert reward_model(talks, [chat(t)[1:] for t in texts], model=model_folder, device="cpu") == pytest.approx(
        scores, abs=1e-5
    )
    squashed = reward_model(prompts, texts, model=model_folder, device="cpu", sigmoid=True)
    assert squashed == pytest.approx(torch.sigmoid(torch.tensor(scores)).tolist(), abs=1e-5)


def test_reward_model_refusals(model_folder, tmp_path):
    from slothrl.reward_model import reward_model
    from tests.helpers import tiny_model

    with pytest.raises(UserError, match="no model"):
        reward_model(["?"], ["a"])
    with pytest.raises(UserError, match="cannot be loaded"):
        reward_model(["?"], ["a"], model=str(tmp_path / "gone"))
    with pytest.raises(UserError, match="label=1"):
        reward_model(["?"], ["a"], model=model_folder, device="cpu", label=1)
    with pytest.raises(UserError, match="dtype"):
        reward_model(["?"], ["a"], model=model_folder, dtype="int8")
    tokenizer = tiny_tokenizer()
    tiny_model(len(tokenizer), hidden=32).save_pretrained(tmp_path / "lm")
    tokenizer.save_pretrained(tmp_path / "lm")
    with pytest.raises(UserError, match="no reward model"):
        reward_model(["?"], ["a"], model=str(tmp_path / "lm"), device="cpu")
