"""Prompts out: rows made into what TRL's trainers take as it is."""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slothrl.data_checks import COMPLETIONS, choice_problems, placeholders
from slothrl.data_files import as_dataset, iterate, with_column
from slothrl.errors import ConfigError, UserError
from slothrl.tasks import Row, nearest

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

    from slothrl.config import DataConfig

Messages = list[dict[str, str]]


@dataclass
class PromptReport:
    """Prompts ready for the trainer, and what happened to the long ones.

    `kept` counts the rows of `dataset`, `truncated` those of them that were cut, `dropped` the rows that are gone;
    `longest` is the length of the longest kept prompt in tokens.
    """

    dataset: Dataset
    format: str
    kept: int
    dropped: int
    truncated: int
    longest: int


def build_prompts(
    dataset: Dataset,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> PromptReport:
    """Makes the `prompt` column that TRL's GRPOTrainer takes as it is, within `max_prompt_length` tokens.

    A chat prompt is a list of messages (`system` first), counted with the generation prompt; a plain one is text.
    Rows that are message lists already stay so, without `system`; in plain format their contents are joined by empty
    lines. `overlong=truncate` cuts the last user message from the left, in plain format too, so that `system` and the
    end of the prompt stay; a prompt that is too long even so is dropped.

    Args:
        dataset: rows from `load_data`.
        config: the `data` group.
        tokenizer: the model's.
        chat_template_kwargs: what the trainer hands to the chat template (TRL's `chat_template_kwargs`).

    Returns:
        The rows with their prompts, and what became of the long ones.

    Raises:
        UserError: no chat template, a row without a usable prompt, a prompt too long with `overlong=error`, none left.
    """
    if problems := choice_problems(config):
        raise ConfigError(problems)
    count = _TokenCount(tokenizer, _wants_chat(config, tokenizer), dict(chat_template_kwargs or {}))
    talks = [_conversation(row, config, number) for number, row in enumerate(iterate(dataset), 1)]
    fitted, lengths, truncated = _fit(talks, config, count)
    kept = [index for index, talk in enumerate(fitted) if talk is not None]
    prompts = [talk if count.chat else _joined(talk) for talk in fitted if talk is not None]
    return PromptReport(
        dataset=with_column(dataset.select(kept), "prompt", prompts),
        format="chat" if count.chat else "plain",
        kept=len(kept),
        dropped=len(talks) - len(kept),
        truncated=truncated,
        longest=max(lengths[index] for index in kept),
    )


@dataclass
class _TokenCount:
    """Lengths of prompts as the trainer will tokenize them: chats with the generation prompt, text with specials."""

    tokenizer: PreTrainedTokenizerBase
    chat: bool
    template_kwargs: dict[str, Any]

    def __call__(self, talks: list[Messages]) -> list[int]:
        import jinja2

        tokenizer: Any = self.tokenizer
        try:
            texts = [
                tokenizer.apply_chat_template(talk, tokenize=False, add_generation_prompt=True, **self.template_kwargs)
                if self.chat
                else _joined(talk)
                for talk in talks
            ]
        except jinja2.TemplateError as error:
            raise UserError(
                f"the model's chat template refuses a prompt ({error}): mend its messages, or set data.system=null "
                "or data.format=plain"
            ) from error
        return [len(ids) for ids in tokenizer(texts, add_special_tokens=not self.chat)["input_ids"]] if texts else []


def _fit(talks: list[Messages], config: DataConfig, count: _TokenCount) -> tuple[list[Messages | None], list[int], int]:
    """Applies `overlong`: the prompts (None where dropped), their lengths in tokens, how many were cut."""
    lengths, limit = count(talks), config.max_prompt_length
    over = [index for index, length in enumerate(lengths) if length > limit]
    longest = max(lengths, default=0)
    if over and config.overlong == "error":
        raise UserError(
            f"{len(over)} of {len(talks)} prompts are longer than data.max_prompt_length={limit} tokens (longest: "
            f"{longest}; first: row {over[0] + 1}): raise it, or set data.overlong to drop or truncate"
        )
    fitted: list[Messages | None] = [*talks]
    for index in over:
        fitted[index] = cut = _cut_left(talks[index], limit, count) if config.overlong == "truncate" else None
        lengths[index] = count([cut])[0] if cut else 0
    if not any(fitted):
        raise UserError(
            f"none of the {len(talks)} prompts fits into data.max_prompt_length={limit} tokens (longest: {longest}): "
            "raise data.max_prompt_length"
        )
    return fitted, lengths, sum(fitted[index] is not None for index in over)


def _cut_left(talk: Messages, limit: int, count: _TokenCount) -> Messages | None:
    """The conversation with the longest end of its last user message that fits; None where not even a letter does."""
    last = next((index for index in reversed(range(len(talk))) if talk[index]["role"] == "user"), None)
    if last is None:
        return None
    text = talk[last]["content"]

    def cut(start: int) -> Messages:
        return [*talk[:last], {**talk[last], "content": text[start:]}, *talk[last + 1 :]]

    # By characters, so that the text is never rebuilt from tokens; a start that is returned has been counted.
    start = bisect.bisect_left(range(len(text)), True, key=lambda start: count([cut(start)])[0] <= limit)
    return cut(start) if text[start:].strip() else None


def _wants_chat(config: DataConfig, tokenizer: PreTrainedTokenizerBase) -> bool:
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if config.format == "chat" and not has_template:
        name = getattr(tokenizer, "name_or_path", "") or "this model"
        raise UserError(f"the tokenizer of {name} has no chat template: set data.format=plain")
    return has_template and config.format != "plain"


def _conversation(row: Row, config: DataConfig, number: int) -> Messages:
    """A row's prompt as messages, the one form that both formats are made from."""
    prompt = _filled(config.template, row, number) if config.template else row.get("prompt")
    if isinstance(prompt, str) and prompt.strip():
        system = [{"role": "system", "content": config.system}] if config.system else []
        return [*system, {"role": "user", "content": prompt}]
    messages = prompt if isinstance(prompt, list) else []
    if not messages or not all(
        isinstance(m, dict) and m.get("role") and isinstance(m.get("content"), str) for m in messages
    ):
        shown = "empty" if prompt is None or prompt in ("", []) else f"{prompt!r:.60}"
        raise UserError(
            f"row {number}: the prompt is {shown}, and must be text or a list of messages with role and text content: "
            "check data.prompt_column, or set data.template"
        )
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _filled(template: str, row: Row, number: int) -> str:
    names = placeholders(template)
    for name in names:
        if row.get(name) is None:
            state = "is empty" if name in row else "is no column"
            raise UserError(f"row {number}: data.template asks for {{{name}}}, which {state}{nearest(name, row)}")
    return template.format(**{name: row[name] for name in names})


def _joined(talk: Messages) -> str:
    return "\n\n".join(message["content"] for message in talk)


def build_sft(dataset: Dataset, config: DataConfig) -> Dataset:
    """Makes what TRL's SFTTrainer takes: `messages`, `text`, or `prompt` and `completion`; other columns go.

    `messages` and `text` pass through as they are. Else the completion is the column `completion`, else `solution`,
    else the answer, behind the prompt (`template` and `system` as for GRPO): lists of messages, or text with
    `format=plain`.

    Args:
        dataset: rows from `load_data`.
        config: the `data` group.

    Returns:
        One training example a row.

    Raises:
        UserError: no such columns, or a row without a prompt or a completion.
    """
    columns = dataset.column_names
    if not config.template:
        for ready in ("messages", "text"):
            if ready in columns and ready != config.prompt_column:
                return dataset.select_columns([ready])
    answer = "answer" if "answer" in columns and config.answer_column else None
    source = next((name for name in (*COMPLETIONS, answer) if name in columns), None)
    if source is None or not (config.template or "prompt" in columns):
        raise UserError(
            "SFT needs a column messages, or text, or a prompt beside completion, solution or an answer: set "
            f"data.prompt_column and data.answer_column; the columns: {', '.join(columns)}"
        )
    rows = []
    for number, row in enumerate(iterate(dataset), 1):
        prompt, completion = _conversation(row, config, number), _completion(row[source], source, number)
        row = {"prompt": prompt, "completion": completion}
        rows.append({name: _joined(talk) for name, talk in row.items()} if config.format == "plain" else row)
    return as_dataset(rows, "the SFT data")


def longest_example(dataset: Dataset, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the longest row of `build_sft`, as TRL's SFTTrainer will tokenize it before it cuts it.

    Raises:
        UserError: messages, and the model has no chat template, or one that refuses them.
    """
    import jinja2

    given, texts = [row["text"] if "text" in row else _example(row) for row in iterate(dataset)], []
    try:
        for row in given:
            text: Any = row if isinstance(row, str) else tokenizer.apply_chat_template(row, tokenize=False)
            texts.append(text)
    except (jinja2.TemplateError, ValueError) as error:
        raise UserError(
            f"the model's chat template refuses an example ({error}): mend it, or set data.format=plain"
        ) from error
    plain = [isinstance(row, str) for row in given]
    # Text gets special tokens in front, where the tokenizer has them, and the end token; templates write their own.
    lengths = [
        len(tokenizer(text, add_special_tokens=bare)["input_ids"]) + bare
        for text, bare in zip(texts, plain, strict=True)
    ]
    return max(lengths, default=1)


def _example(row: Mapping[str, Any]) -> Any:
    """Messages, or text, of a row whose prompt and completion are two."""
    return row["messages"] if "messages" in row else row["prompt"] + row["completion"]


def _completion(value: Any, column: str, number: int) -> Messages:
    if isinstance(value, list) and value and all(isinstance(m, dict) and m.get("content") for m in value):
        return value
    if value is None or isinstance(value, list | dict) or not str(value).strip():
        raise UserError(f"row {number}: no completion in column '{column}': mend the row or set data.answer_column")
    return [{"role": "assistant", "content": str(value)}]
