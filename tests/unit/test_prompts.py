"""Prompts and SFT rows: templates, systems, chat and plain, and what becomes of long ones."""

import json

import pytest

from slothrl.config import DataConfig
from slothrl.data import build_prompts, build_sft, load_data
from slothrl.errors import UserError
from tests.helpers import tiny_tokenizer

ROWS = [{"prompt": f"question {n}", "answer": f"0{n}", "level": str(n % 3)} for n in range(20)]


def loaded(rows, tmp_path, **knobs):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = DataConfig(source="file", path=str(path), **{"eval_size": 0, **knobs})
    return load_data(config).train, config


CHAT, PLAIN = tiny_tokenizer(), tiny_tokenizer(chat_template=False)
TALK = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes?"}, {"role": "user", "content": "add"}]


def test_chat_prompts_have_the_system_first_and_are_counted_as_the_trainer_counts(tmp_path):
    dataset, config = loaded(ROWS, tmp_path, system="Be brief.")
    report = build_prompts(dataset, config, CHAT)
    first = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "question 0"}]
    assert report.format == "chat" and report.dataset[0]["prompt"] == first
    longest = report.dataset[19]["prompt"]
    tokens = CHAT.apply_chat_template(longest, add_generation_prompt=True, return_dict=False)
    assert (report.kept, report.dropped, report.truncated, report.longest) == (20, 0, 0, len(tokens))
    assert report.dataset["answer"] == dataset["answer"]


def test_plain_prompts_are_text(tmp_path):
    dataset, config = loaded(ROWS, tmp_path, system="Be brief.", template="{prompt} ({level})? {{ok}}")
    report = build_prompts(dataset, config, PLAIN)
    assert report.format == "plain" and report.dataset[4]["prompt"] == "Be brief.\n\nquestion 4 (1)? {ok}"
    assert report.longest == len(report.dataset[19]["prompt"])  # one token a character
    config.format = "plain"
    assert build_prompts(dataset, config, CHAT).format == "plain"
    config.format = "chat"
    with pytest.raises(UserError, match="has no chat template: set data.format=plain"):
        build_prompts(dataset, config, PLAIN)


def test_prompts_may_be_all_there_is(tmp_path):
    dataset, config = loaded([{"prompt": row["prompt"]} for row in ROWS], tmp_path, answer_column=None)
    report = build_prompts(dataset, config, PLAIN)
    assert report.dataset.column_names == ["prompt"] and report.dataset["prompt"][:] == [r["prompt"] for r in ROWS]


def test_special_tokens_count_where_the_trainer_adds_them(tmp_path):
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    specials = [("<|im_start|>", 2)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<|im_start|> $A", special_tokens=specials)
    dataset, config = loaded(ROWS[:1], tmp_path)
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "question 0"}], add_generation_prompt=True)
    assert build_prompts(dataset, config, tokenizer).longest == len(chat["input_ids"])  # the template brings its own
    config.format = "plain"
    assert build_prompts(dataset, config, tokenizer).longest == len("question 0") + 1


def test_message_lists_stay_as_they_are_or_are_joined(tmp_path):
    dataset, config = loaded([{"prompt": TALK, "answer": "1"}], tmp_path, system="unused")
    assert build_prompts(dataset, config, CHAT).dataset[0]["prompt"] == TALK
    assert build_prompts(dataset, config, PLAIN).dataset[0]["prompt"] == "hi\n\nyes?\n\nadd"


LONG = [{"prompt": "short", "answer": "1"}, {"prompt": "start " + "x" * 90 + " the end", "answer": "2"}]


@pytest.mark.parametrize(("tokenizer", "limit"), [(CHAT, 60), (PLAIN, 30)])
def test_long_prompts_are_dropped_cut_or_refused(tmp_path, tokenizer, limit):
    dataset, config = loaded(LONG, tmp_path, system="Sys.", max_prompt_length=limit)
    report = build_prompts(dataset, config, tokenizer)
    assert (report.kept, report.dropped, report.truncated) == (1, 1, 0) and report.dataset["answer"] == ["1"]
    assert report.longest < limit
    config.overlong = "truncate"
    report = build_prompts(dataset, config, tokenizer)
    assert (report.kept, report.dropped, report.truncated, report.longest) == (2, 0, 1, limit)
    prompt = report.dataset[1]["prompt"]
    text = prompt if isinstance(prompt, str) else prompt[0]["content"] + "\n\n" + prompt[1]["content"]
    assert text.startswith("Sys.\n\nx") and text.endswith("x the end")
    config.overlong = "error"
    with pytest.raises(UserError, match=rf"1 of 2 prompts .*data\.max_prompt_length={limit}.*row 2.*data\.overlong"):
        build_prompts(dataset, config, tokenizer)


def test_nothing_left_is_an_error_and_only_the_last_user_message_is_cut(tmp_path):
    dataset, config = loaded([{"prompt": TALK, "answer": "1"}], tmp_path, overlong="truncate", max_prompt_length=50)
    whole = CHAT.apply_chat_template(TALK, add_generation_prompt=True, return_dict=False)
    config.max_prompt_length = len(whole) - 2
    assert build_prompts(dataset, config, CHAT).dataset[0]["prompt"] == [*TALK[:2], {"role": "user", "content": "d"}]
    config.max_prompt_length = len(whole) - 3
    with pytest.raises(UserError, match=rf"none of the 1 prompts.*longest: {len(whole)}.*raise data.max_prompt_length"):
        build_prompts(dataset, config, CHAT)


@pytest.mark.parametrize("prompt", ["", 7, [], [{"role": "user"}], [{"content": "x"}]])
def test_rows_without_a_usable_prompt(tmp_path, prompt):
    dataset, config = loaded([{"prompt": prompt, "answer": "1"}], tmp_path)
    with pytest.raises(UserError, match=r"row 1: the prompt .*data\.prompt_column"):
        build_prompts(dataset, config, CHAT)


def test_template_over_an_empty_cell_and_a_chat_template_that_refuses(tmp_path):
    dataset, config = loaded([{"a": "1"}, {"b": "2"}], tmp_path, template="{a}", answer_column=None)
    with pytest.raises(UserError, match=r"row 2: data\.template asks for \{a\}, which is empty"):
        build_prompts(dataset, config, CHAT)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    dataset, config = loaded(ROWS, tmp_path)
    with pytest.raises(UserError, match=r"no system role.*data\.system=null"):
        build_prompts(dataset, config, tokenizer)


def test_sft_rows(tmp_path):
    user, reply = {"role": "user", "content": "p"}, {"role": "assistant", "content": "s"}
    for row in ({"messages": TALK, "x": "y"}, {"text": "whole", "x": "y"}):
        ready = next(iter(row))
        assert list(build_sft(*loaded([row], tmp_path))) == [{ready: row[ready]}]
    row = {"prompt": "p", "completion": "s", "solution": "t", "answer": "u"}
    assert list(build_sft(*loaded([row], tmp_path))) == [{"prompt": [user], "completion": [reply]}]
    del row["completion"]
    knobs = {"system": "S", "template": "<{prompt}>", "format": "plain"}
    assert list(build_sft(*loaded([row], tmp_path, **knobs))) == [{"prompt": "S\n\n<p>", "completion": "t"}]
    dataset, config = loaded([{"text": "p", "label": 7}], tmp_path, prompt_column="text", answer_column="label")
    assert build_sft(dataset, config)[0]["completion"] == [{"role": "assistant", "content": "7"}]
    with pytest.raises(UserError, match="SFT needs a column messages, or text.*the columns: prompt"):
        build_sft(*loaded([{"prompt": "p"}], tmp_path, answer_column=None))
    with pytest.raises(UserError, match="row 1: no completion in column 'answer'"):
        build_sft(*loaded([{"prompt": "p", "answer": " "}], tmp_path))
