"""Requests run by vLLM to their ends, and what its scheduler made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Completed:
    """Completions, in the order of the prompts.

    Attributes:
        token_ids: the end token included where one was sampled.
        logprobs: of each of these tokens, nats.
        steps: steps of the engine that gave a token to at least one of them.
        preemptions: how often one gave its cache up to the others and was computed again, prompt and completion.
            Both None where this vLLM's scheduler cannot be asked.
    """

    token_ids: list[list[int]]
    logprobs: list[list[float]]
    steps: int | None = None
    preemptions: int | None = None


def complete(llm, prompts: Sequence[Any], parameters, lora_request) -> Completed:
    """One completion a prompt with its tokens' log-probs: what `vllm.LLM.generate` gives, in less of the host's time.

    Tokens are taken as the engine's core hands them over. `LLMEngine.step` would make a dict, an object and a dozen
    calls of every token, on the way to texts and stop strings that a rollout does not ask for; where one is asked for,
    it does. Seen with 0.26 (read) and 0.31; `test_completions_are_vllms`.

    All requests are handed over at once, and vLLM starts as many as its cache holds: holding some back until theirs is
    expected to be free won nothing, and took up to 15 % longer (tests/gpu/results/decode.md).

    Args:
        parameters: `vllm.SamplingParams` with `logprobs` set; how they are kept is chosen here, in place.
    """
    engine = llm.llm_engine
    known = _known_requests(engine)
    parameters.skip_clone = True  # one set of parameters for all: nobody changes a request's own
    parameters.flat_logprobs = True  # lists of numbers, where vLLM collects them
    if known is None or parameters.n != 1:
        return Completed(*_rows(serve(llm, prompts, parameters, lora_request)))
    ids = llm.enqueue(prompts, parameters, use_tqdm=False, lora_request=lora_request)
    requests = [known[i] for i in ids]  # kept: the scheduler forgets them when they are finished
    try:
        token_ids, logprobs, steps = (_by_core if _tokens_only(parameters) else _by_engine)(engine, ids, requests)
    finally:  # the engine's own books, and all that is under way where something broke
        engine.abort_request(ids, internal=True)
    return Completed(token_ids, logprobs, steps, sum(request.num_preemptions for request in requests))


def _by_core(engine, ids: list[str], requests: list[Any]) -> tuple[list[list[int]], list[list[float]], int]:
    """Tokens, log-probs and steps, past `LLMEngine.step`."""
    rows: dict[str, tuple[list[int], list[float]]] = {i: ([], []) for i in ids}
    steps, left = 0, len(ids)
    while left:
        outputs = [output for output in engine.engine_core.get_output().outputs if output.request_id in rows]
        steps += take_step(outputs, rows)
        left -= sum(output.finish_reason is not None for output in outputs)
    return [rows[i][0] for i in ids], [rows[i][1] for i in ids], steps


def _by_engine(engine, ids: list[str], requests: list[Any]) -> tuple[list[list[int]], list[list[float]], int]:
    """Tokens, log-probs and steps, by `LLMEngine.step`."""
    outputs, steps, tokens = [], 0, 0
    while engine.has_unfinished_requests():
        outputs += [output for output in engine.step() if output.finished]
        before, tokens = tokens, sum(request.num_output_tokens for request in requests)
        steps += tokens > before
    return *_rows(sorted(outputs, key=lambda output: int(output.request_id))), steps


def _rows(outputs: Sequence[Any]) -> tuple[list[list[int]], list[list[float]]]:
    """Tokens and flat log-probs of vLLM's own outputs; the sampled token comes first at its place."""
    found = [output.outputs[0] for output in outputs]
    logprobs = [[out.logprobs.logprobs[i] for i in out.logprobs.start_indices] for out in found]
    return [list(out.token_ids) for out in found], logprobs


def take_step(outputs: Sequence[Any], rows: dict[str, tuple[list[int], list[float]]]) -> bool:
    """Append what a step gave to its requests' tokens and log-probs; returns whether it gave anything."""
    given = [output for output in outputs if output.new_token_ids]
    if not given:
        return False
    # The sampled token comes first of a row, (tokens, 1 + alternatives). All rows at once: numpy takes its time a call.
    logprobs = iter(np.concatenate([output.new_logprobs.logprobs for output in given])[:, 0].tolist())
    for output in given:
        token_ids, token_logprobs = rows[output.request_id]
        for token in output.new_token_ids:
            token_ids.append(token)
            token_logprobs.append(next(logprobs))
    return True


def serve(llm, prompts: Sequence[Any], parameters, lora_request) -> list[Any]:
    """vLLM's own outputs, in the order of the prompts."""
    return llm.generate(prompts, parameters, use_tqdm=False, lora_request=lora_request)


def _tokens_only(parameters) -> bool:
    """Whether nothing is asked for that vLLM makes of the tokens outside its core."""
    return parameters.prompt_logprobs is None and not (parameters.detokenize or parameters.stop)


def _known_requests(engine) -> dict[str, Any] | None:
    """The scheduler's requests by id; None where the engine runs elsewhere, or where they are kept in another way."""
    scheduler = getattr(getattr(engine.engine_core, "engine_core", None), "scheduler", None)
    found = getattr(scheduler, "requests", None)
    return found if isinstance(found, dict) else None
