"""Requests run by vLLM to their ends, and what its scheduler made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Served:
    """What came of some requests.

    Attributes:
        outputs: vLLM's, in the order of the prompts.
        steps: steps of the engine that gave a token to at least one of them.
        preemptions: how often one gave its cache up to the others and was computed again, prompt and completion.
            Both None where this vLLM's scheduler cannot be asked.
    """

    outputs: list[Any]
    steps: int | None = None
    preemptions: int | None = None


def serve(llm, prompts: Sequence[Any], parameters, lora_request) -> Served:
    """`vllm.LLM.generate`, told by the scheduler's own requests (seen with 0.26 and 0.31; `test_preemptions`).

    All requests are handed over at once, and vLLM starts as many as its cache holds: holding some back until theirs is
    expected to be free won nothing, and took up to 15 % longer (tests/gpu/results/decode.md).
    """
    engine = llm.llm_engine
    known = _known_requests(engine)
    if known is None:
        return Served(llm.generate(prompts, parameters, use_tqdm=False, lora_request=lora_request))
    ids = llm.enqueue(prompts, parameters, use_tqdm=False, lora_request=lora_request)
    requests = [known[i] for i in ids]  # kept: the scheduler forgets them when they are finished
    outputs, steps, tokens = [], 0, 0
    while engine.has_unfinished_requests():
        outputs += [output for output in engine.step() if output.finished]
        before, tokens = tokens, sum(request.num_output_tokens for request in requests)
        steps += tokens > before
    outputs.sort(key=lambda output: int(output.request_id))
    return Served(outputs, steps, sum(request.num_preemptions for request in requests))


def _known_requests(engine) -> dict[str, Any] | None:
    """The scheduler's requests by id; None where the engine runs elsewhere, or where they are kept in another way."""
    scheduler = getattr(getattr(engine.engine_core, "engine_core", None), "scheduler", None)
    found = getattr(scheduler, "requests", None)
    return found if isinstance(found, dict) else None
