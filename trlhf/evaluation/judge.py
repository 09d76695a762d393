"""A judge behind any server that speaks OpenAI's chat completions: asked, asked again, and never invented.

What it cannot say is recorded as a failure with its reason. Ratings are kept on disk, so none is paid for twice.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import re
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trlhf import files
from trlhf.config import JudgeConfig
from trlhf.errors import UserError
from trlhf.types import Message

_RATING = re.compile(r"\[\[\s*([0-9]+(?:\.[0-9]+)?)\s*\]\]")
LOWEST, HIGHEST = 1.0, 10.0
LONGEST_WAIT = 60.0  # seconds between two attempts, whatever the server asks for
_PASSING = {408, 409, 425, 429}  # of the statuses below 500, those that another attempt may mend


@dataclass(frozen=True)
class Rating:
    """What a judge said about one answer.

    Attributes:
        value: from 1 to 10; None where it never gave a rating.
        text: its last words.
        error: why there is no rating; None where there is one.
        attempts: how often it was asked.
    """

    value: float | None
    text: str
    error: str | None
    attempts: int


class _NoRating(Exception):
    """One attempt failed in a way that the next may not; ``wait`` is what the server asks for, in seconds."""

    def __init__(self, reason: str, text: str = "", wait: float = 0.0) -> None:
        super().__init__(reason)
        self.text, self.wait = text, wait


class Judge:
    """A judge and what it has said so far.

    Args:
        config: where it is, and how patient to be with it.
        cache: JSON-lines file with its ratings; a request that is in it is not made again.
    """

    def __init__(self, config: JudgeConfig, cache: Path) -> None:
        self._config, self._cache = config, cache
        self._stopping = threading.Event()  # ends the pauses when the work is broken off
        self._known = {row["key"]: Rating(**row["rating"]) for row in files.read_jsonl(cache)}

    def rate(
        self, requests: Sequence[Sequence[Message]], advance: Callable[[int], None] = lambda done: None
    ) -> list[Rating]:
        """Return one rating a request, in order; several are under way at once.

        Raises:
            UserError: the server refuses what no further attempt could mend (no such model, a wrong key).
        """
        keys = [self._key(request) for request in requests]
        todo = {key: request for key, request in zip(keys, requests, strict=True) if key not in self._known}
        advance(len(requests) - len(todo))
        failed: dict[str, Rating] = {}
        with ThreadPoolExecutor(self._config.concurrency) as pool:
            try:
                under_way = {pool.submit(self._ask, request): key for key, request in todo.items()}
                for done in as_completed(under_way):
                    key, rating = under_way[done], done.result()
                    (failed if rating.value is None else self._known)[key] = rating
                    if rating.value is not None:  # a failure is asked for again by the next process
                        files.append_json(self._cache, {"key": key, "rating": asdict(rating)})
                    advance(1)
            except BaseException:
                self._stopping.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [self._known.get(key) or failed[key] for key in keys]

    def _key(self, request: Sequence[Message]) -> str:
        asked = [self._config.model, self._config.max_tokens, [dict(message) for message in request]]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:24]

    def _ask(self, request: Sequence[Message]) -> Rating:
        """Ask until there is a rating, ``retries`` times more at most."""
        error = _NoRating("never asked")
        for attempt in range(self._config.retries + 1):
            pause = min(LONGEST_WAIT, max(error.wait, self._config.backoff * 2 ** (attempt - 1))) if attempt else 0.0
            if self._stopping.wait(pause):
                break
            try:
                text = self._complete(request)
                return Rating(rating_in(text), text, None, attempt + 1)
            except _NoRating as failure:
                error = failure
        return Rating(None, error.text, str(error), attempt + 1)

    def _complete(self, request: Sequence[Message]) -> str:
        """Return what the server answers."""
        config = self._config
        url = f"{(config.url or '').rstrip('/')}/chat/completions"
        body = {"model": config.model, "messages": list(request), "temperature": 0, "max_tokens": config.max_tokens}
        headers = {"Content-Type": "application/json"}
        if config.key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ.get(config.key_env, '')}"
        posted = urllib.request.Request(url, json.dumps(body).encode(), headers, method="POST")
        try:
            with urllib.request.urlopen(posted, timeout=config.timeout) as answer:
                found: Any = json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                said = error.read(500).decode(errors="replace").strip()
            if error.code < 500 and error.code not in _PASSING:
                raise UserError(
                    f"evaluation.judge: {url} answers {error.code} {error.reason} ({said}); check "
                    f"evaluation.judge.url, evaluation.judge.model={config.model} and evaluation.judge.key_env"
                ) from error
            wait = error.headers.get("Retry-After", "")
            raise _NoRating(f"HTTP {error.code}", said, float(wait) if wait.isdigit() else 0.0) from error
        except TimeoutError as error:
            raise _NoRating(f"no answer within {config.timeout:g} s") from error
        except (urllib.error.URLError, http.client.HTTPException, OSError) as error:
            reason = getattr(error, "reason", error)
            late = isinstance(reason, TimeoutError)
            raise _NoRating(
                f"no answer within {config.timeout:g} s" if late else f"no connection ({reason})"
            ) from error
        except ValueError as error:
            raise _NoRating("its answer is no JSON") from error
        try:
            return str(found["choices"][0]["message"]["content"] or "")
        except (KeyError, IndexError, TypeError) as error:
            raise _NoRating("its answer has no choices[0].message.content", str(found)[:500]) from error


def rating_in(text: str) -> float:
    """Return the last rating, ``[[7]]``, of a judgement.

    Raises:
        _NoRating: there is none, or it is not from 1 to 10.
    """
    found = _RATING.findall(text)
    if not found:
        raise _NoRating("no rating such as [[7]] in its answer", text)
    value = float(found[-1])
    if not LOWEST <= value <= HIGHEST:
        raise _NoRating(f"its rating is {value:g}, not from {LOWEST:g} to {HIGHEST:g}", text)
    return value
