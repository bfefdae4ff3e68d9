"""The completion is JSON, or XML, of the form that was asked for."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any
from xml.parsers import expat

from .ranges import ranged
from .text import Completion, completion_text

MAX_CHARS = 20_000
MAX_DEPTH = 64

_FENCE = re.compile(r"```(?:json)?\s*\n(.*?)\n\s*```", re.DOTALL | re.IGNORECASE)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"?', re.DOTALL)


@ranged(0.0, 1.0)
def json_schema(prompts: list[Any], completions: list[Completion], schema: Any = None, **kwargs: Any) -> list[float]:
    """Ask for one JSON value, bare or in one ```json fence, that a JSON Schema (draft 2020-12) allows.

    NaN and Infinity are no JSON; a text of more than 20,000 characters or with brackets nested deeper than 64 scores 0.

    Args:
        prompts: unused.
        completions: strings or chat messages.
        schema: a mapping, or the JSON text of one; a dataset column `schema` gives each completion its own (None: any
            value). Without it every JSON value is right. References to other documents are not followed.

    Returns:
        1.0 valid; 0.2 JSON, but not as the schema wants it; 0.0 no JSON.

    Raises:
        ValueError: the schema is none.
        ImportError: there is a schema, and jsonschema is not installed.
    """
    per_row = isinstance(schema, Sequence) and not isinstance(schema, str) and len(schema) == len(completions)
    schemas = list(schema) if per_row else [schema] * len(completions)
    validators: dict[str, Any] = {}
    scores = []
    for completion, wanted in zip(completions, schemas, strict=True):
        key = wanted if isinstance(wanted, str) else repr(wanted)
        if key not in validators:
            validators[key] = None if wanted is None else _validator(wanted)
        scores.append(_json_score(completion_text(completion), validators[key]))
    return scores


def read_json(text: str) -> Any:
    """A JSON value from text that a model wrote, bare or in a fence.

    Raises:
        ValueError: no JSON, too long or too deep.
    """
    text = text.strip()
    if len(text) > MAX_CHARS:
        raise ValueError("too long")
    fence = _FENCE.fullmatch(text)
    text = fence.group(1) if fence else text
    depth = 0
    for char in re.sub(r"[^][{}]", "", _STRING.sub("", text)):
        depth += 1 if char in "[{" else -1
        if depth > MAX_DEPTH:
            raise ValueError("too deep")
    return json.loads(text, parse_constant=_refuse)


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


def _json_score(text: str, validator: Any) -> float:
    try:
        value = read_json(text)
    except (ValueError, RecursionError):
        return 0.0
    if validator is None:
        return 1.0
    try:
        return 1.0 if validator.is_valid(value) else 0.2
    except (OverflowError, RecursionError):  # multipleOf with an enormous number; a schema that refers to itself
        return 0.2


def _validator(schema: Any) -> Any:
    try:
        import jsonschema
        import referencing
    except ImportError as error:
        raise ImportError("json_schema with a schema needs one more package: pip install 'slothrl[json]'") from error
    try:
        schema = json.loads(schema) if isinstance(schema, str) else _plain(schema)
        if not isinstance(schema, dict | bool):
            raise ValueError(f"a {type(schema).__name__}")
        checker = jsonschema.Draft202012Validator.FORMAT_CHECKER  # "pattern" must be a regular expression
        jsonschema.Draft202012Validator.check_schema(schema, format_checker=checker)
    except (ValueError, jsonschema.SchemaError) as error:
        reason = str(getattr(error, "message", error)).splitlines()[0][:200]
        hint = "'+reward.params.json_schema.schema={type: object, required: [name]}'"
        raise ValueError(f"json_schema has no valid schema ({reason}): {hint}") from error
    # An empty registry: jsonschema's own would fetch references over the network.
    return jsonschema.Draft202012Validator(schema, registry=referencing.Registry())


def _plain(value: Any) -> Any:
    """Configurations come as OmegaConf's containers, which jsonschema does not take for dicts and lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value


@ranged(0.0, 1.0)
def xml_format(
    prompts: list[Any], completions: list[Completion], tags: Sequence[str] = ("think", "answer"), **kwargs: Any
) -> list[float]:
    """Ask for well-formed XML with each of some tags once, at any depth; text around elements is allowed.

    A document type (and with it entities of one's own) is refused, and so are more than 20,000 characters and elements
    nested deeper than 64: they score 0.

    Args:
        prompts: unused.
        completions: strings or chat messages.
        tags: names that must be there.

    Returns:
        0.0 not well-formed; else 0.5 times the share of `tags` that are there exactly once; 1.0 when all are.

    Raises:
        ValueError: `tags` is empty, a single string, or holds anything but strings.
    """
    if isinstance(tags, str) or not tags or not all(isinstance(tag, str) for tag in tags):
        hint = "'+reward.params.xml_format.tags=[think,answer]'"
        raise ValueError(f"xml_format takes a list of tag names, not {tags!r}: {hint}")
    return [_xml_score(completion_text(completion), tags) for completion in completions]


def _xml_score(text: str, tags: Sequence[str]) -> float:
    counts = _elements(text)
    if counts is None:
        return 0.0
    share = sum(counts.get(tag) == 1 for tag in tags) / len(tags)
    return 1.0 if share == 1.0 else 0.5 * share


def _elements(text: str) -> dict[str, int] | None:
    """How often each element is there; None where the text is not well-formed or not allowed."""
    if len(text) > MAX_CHARS:
        return None
    text = re.sub(r"^\s*<\?xml[^>]*\?>", "", text)
    counts: dict[str, int] = {}
    depth = 0

    def start(name: str, attributes: Any) -> None:
        nonlocal depth
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError("too deep")
        counts[name] = counts.get(name, 0) + 1

    def end(name: str) -> None:
        nonlocal depth
        depth -= 1

    def refuse(*declaration: Any) -> None:
        raise ValueError("document type")

    parser = expat.ParserCreate(encoding="utf-8")
    parser.StartElementHandler, parser.EndElementHandler = start, end
    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    try:  # one root around it: within an element a document type is an error anyway
        parser.Parse(f"<root>{text}</root>".encode("utf-8", "replace"), True)
    except (expat.ExpatError, ValueError):
        return None
    counts["root"] -= 1
    return counts
