"""Which chats are learned from: by length, turns, language, patterns and near duplicates."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from trlhf.errors import UserError
from trlhf.schema import show
from trlhf.types import Message

if TYPE_CHECKING:
    from trlhf.config import FilterConfig

Count = Callable[[Sequence[Message]], int]
LANGUAGE_CHARACTERS = 4000  # of a chat that its language is read from


class ChatFilter:
    """Says of each chat why it is left out, cheap reasons first; it remembers chats, to find their near duplicates.

    Args:
        config: what to keep.
        count: tokens of a chat; asked only where the configuration limits them.
    """

    def __init__(self, config: FilterConfig, count: Count) -> None:
        self._config = config
        self._count = count
        self._drop = [re.compile(pattern) for pattern in config.drop_matching]
        self._keep = [re.compile(pattern) for pattern in config.keep_matching]
        self._seen = None
        if config.languages:
            _check_languages(config.languages)
        if config.near_duplicates:
            from trlhf.duplicates import NearDuplicates

            self._seen = NearDuplicates(config.near_duplicates)

    def reason(self, chat: Sequence[Message], place: str) -> str | None:
        """Return why a chat is left out; None: it is kept.

        Args:
            chat: it.
            place: where it stands, unique.
        """
        config = self._config
        turns = sum(message["role"] == "assistant" for message in chat)
        if turns < config.min_turns:
            return f"fewer responses than data.filters.min_turns={config.min_turns}"
        texts = [message["content"] for message in chat]
        for pattern in self._drop:
            if any(pattern.search(text) for text in texts):
                return f"data.filters.drop_matching: {pattern.pattern!r} is found"
        if self._keep and not any(pattern.search(text) for pattern in self._keep for text in texts):
            return "data.filters.keep_matching: none of the patterns is found"
        if config.min_tokens or config.max_tokens:
            tokens = self._count(chat)
            if tokens < config.min_tokens:
                return f"shorter than data.filters.min_tokens={config.min_tokens}"
            if config.max_tokens and tokens > config.max_tokens:
                return f"longer than data.filters.max_tokens={config.max_tokens}"
        # What is the same in many chats, the system line, says little about one.
        said = "\n".join(message["content"] for message in chat if message["role"] != "system")
        if config.languages and (language := _language(said)) not in config.languages:
            return f"its language is {language}, not in data.filters.languages=[{','.join(config.languages)}]"
        if self._seen is not None and self._seen.find(said, place) is not None:
            return f"a near duplicate of an earlier chat (data.filters.near_duplicates={show(config.near_duplicates)})"
        return None


def _language(text: str) -> str:
    import py3langid

    return str(py3langid.classify(text[:LANGUAGE_CHARACTERS])[0])


def _check_languages(languages: Sequence[str]) -> None:
    import py3langid

    known = sorted(str(code) for code, _ in py3langid.rank("language"))
    for language in languages:
        if language not in known:
            near = difflib.get_close_matches(language, known, n=1, cutoff=0.5)
            raise UserError(
                f"data.filters.languages=[{','.join(languages)}]: py3langid does not know {language!r}; "
                + (f"did you mean {near[0]}? " if near else "")
                + f"it knows {', '.join(known)}"
            )
