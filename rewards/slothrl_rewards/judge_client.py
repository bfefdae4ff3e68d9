"""One request to a chat-completions endpoint, with a deadline, retries and a memory. Standard library only."""

from __future__ import annotations

import hashlib
import http.client
import json
import random
import threading
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

MAX_REPLY = 1_000_000  # bytes
_MAX_WAIT = 60.0  # seconds between two tries, whatever Retry-After says
_REMEMBERED = 100_000
_HOPELESS = {401: "the key is wrong", 403: "access is denied", 404: "no such address or model"}

_memory: OrderedDict[str, str] = OrderedDict()
_lock = threading.Lock()


class JudgeError(Exception):
    """No further request could go better."""


@dataclass(frozen=True)
class Reply:
    """What the judge said (None: nothing), and how many requests it took."""

    text: str | None
    requests: int


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to another host."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


@dataclass(frozen=True)
class Endpoint:
    """Where the judge is.

    Args:
        base_url: up to and with "/v1"; http or https.
        key: sent as a bearer token; None: none.
        timeout: seconds for one request.
        retries: further tries after the first one.
        backoff: seconds before the second try; doubled before each further one.

    Raises:
        ValueError: `base_url` is no http address.
    """

    base_url: str
    key: str | None
    timeout: float
    retries: int
    backoff: float

    def __post_init__(self) -> None:
        if not self.base_url.startswith(("http://", "https://")):
            raise ValueError(f"llm_judge needs base_url as an http address up to /v1, not {self.base_url!r}")

    def __repr__(self) -> str:  # never the key
        return f"Endpoint({self.base_url})"

    @property
    def url(self) -> str:
        return self.base_url.rstrip("/") + "/chat/completions"

    def ask(self, body: dict[str, Any]) -> Reply:
        """Send a request until a reply comes.

        Returns:
            The reply; its text is None where all tries failed.

        Raises:
            JudgeError: key, address or model are wrong.
        """
        for attempt in range(self.retries + 1):
            wait = self.backoff * 2**attempt * random.uniform(1.0, 1.25)  # so that threads do not come back together
            try:
                return Reply(_content(self._post(body)), attempt + 1)
            except urllib.error.HTTPError as error:
                with error:
                    if error.code in _HOPELESS:
                        raise JudgeError(f"{self.url} answers {error.code}: {_HOPELESS[error.code]}") from error
                    if error.code != 429 and error.code < 500:
                        return Reply(None, attempt + 1)
                    wait = max(wait, _seconds(error.headers.get("Retry-After")))
            except (OSError, http.client.HTTPException, ValueError, KeyError, IndexError, TypeError):
                pass  # no connection, a timeout, half a reply, or a reply of another shape
            if attempt < self.retries:
                time.sleep(min(wait, _MAX_WAIT))
        return Reply(None, self.retries + 1)

    def _post(self, body: dict[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        request = urllib.request.Request(self.url, json.dumps(body).encode(), headers, method="POST")
        deadline = time.monotonic() + self.timeout
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=self.timeout) as response:
            parts, size = [], 0
            # A socket's timeout starts anew with every byte; a server that drips must not hold a training run.
            while part := response.read1(65_536):
                parts.append(part)
                size += len(part)
                if size > MAX_REPLY or time.monotonic() > deadline:
                    raise TimeoutError
        return b"".join(parts)


def request_key(url: str, body: dict[str, Any]) -> str:
    """SHA-256 of address and request."""
    return hashlib.sha256(json.dumps([url, body], sort_keys=True).encode()).hexdigest()


def cached(key: str) -> str | None:
    """The reply to a request that was sent before."""
    with _lock:
        return _memory.get(key)


def remember(key: str, text: str | None) -> None:
    """Keep a reply; failures are not kept."""
    if text is None:
        return
    with _lock:
        _memory[key] = text
        while len(_memory) > _REMEMBERED:
            _memory.popitem(last=False)


def _content(reply: bytes) -> str | None:
    text = json.loads(reply)["choices"][0]["message"]["content"]
    return text if isinstance(text, str) else None


def _seconds(retry_after: str | None) -> float:
    try:
        return max(float(retry_after or 0), 0.0)
    except ValueError:  # a date
        return 0.0
