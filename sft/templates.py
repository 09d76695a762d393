"""Chat templates: how a chat becomes the text that the model reads. No torch here."""

from __future__ import annotations

import difflib
import json
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trlhf.checks import TEMPLATES
from trlhf.errors import UserError
from trlhf.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trlhf.config import Config, TemplateConfig

OWN_TEMPLATE = "tokenizer"
_SYSTEM_LINE = re.compile(r'(\{%-? set default_system = )"(?:[^"\\]|\\.)*"( -?%\})')
_CHATML_MARKS = ("<|im_start|>", "<|im_end|>")
_log = logging.getLogger(__name__)


def load_template(name_or_path: str, system: str | None = None) -> str:
    """Return the Jinja text of a chat template.

    Args:
        name_or_path: name of a file in ``chat_templates``, or the path of a ``.jinja`` file.
        system: replaces the system line that the template writes when a chat brings none of its own.

    Raises:
        UserError: no such template, or ``system`` is given and the template has no ``default_system`` line.
    """
    path = Path(name_or_path) if name_or_path.endswith(".jinja") else TEMPLATES / f"{name_or_path}.jinja"
    if not path.is_file():
        known = [*sorted(file.stem for file in TEMPLATES.glob("*.jinja")), OWN_TEMPLATE]
        near = difflib.get_close_matches(name_or_path, known, n=1)
        raise UserError(
            f"template.name={name_or_path!r}: there is no such template (looked for {path}); "
            + (f"did you mean {near[0]}? " if near else "")
            + f"use {', '.join(known[:-1])}, {OWN_TEMPLATE!r} for the tokenizer's own, or the path of a .jinja file"
        )
    return _with_system(path.read_text(encoding="utf-8"), system, name_or_path)


def base_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """Load the base model's tokenizer with the chat template of the run and the tokens that it needs.

    Raises:
        UserError: there is none, it has no EOS or no pad token, or the template cannot do.
    """
    from trlhf.models import load_tokenizer, model_path

    model = config.model
    tokenizer = load_tokenizer(model_path(model.name), pad_token=model.pad_token, revision=model.revision)
    return apply_template(tokenizer, config.template)


def apply_template(tokenizer: PreTrainedTokenizerBase, config: TemplateConfig) -> PreTrainedTokenizerBase:
    """Give ``tokenizer`` the configured chat template and the tokens that it needs, and return it.

    Raises:
        UserError: the tokenizer has no template of its own (``tokenizer``), lacks a token that the template needs, or
            the template cannot be rendered.
    """
    if config.name == OWN_TEMPLATE:
        own = tokenizer.chat_template
        if not isinstance(own, str):
            raise UserError("template.name='tokenizer': the tokenizer has no chat template; use template=cerebrum")
        tokenizer.chat_template = _with_system(own, config.system, OWN_TEMPLATE)
    else:
        tokenizer.chat_template = load_template(config.name, config.system)
    _add_tokens(tokenizer, config)
    if config.name == "chatml":
        _check_chatml(tokenizer)
    try:
        _warn_if_tokens_disagree(tokenizer, config.name)
    except Exception as error:  # a template is a program, with more errors than jinja2's: a text plus a number, say
        raise UserError(f"template.name={config.name!r}: the template cannot be rendered ({error}); mend it") from error
    return tokenizer


def _add_tokens(tokenizer: PreTrainedTokenizerBase, config: TemplateConfig) -> None:
    """Let the tokenizer know the template's tokens; `trlhf.embeddings` makes room for them in the model."""
    from tokenizers import AddedToken

    known = tokenizer.get_vocab()
    new = [AddedToken(text, special=True, normalized=False) for text in config.added_tokens if text not in known]
    if new:
        tokenizer.add_tokens(new, special_tokens=True)
        _log.info("template %s: added the tokens %s", config.name, ", ".join(token.content for token in new))
    if config.eos_token is None:
        return
    if config.eos_token not in tokenizer.get_vocab():
        raise UserError(
            f"template.eos_token={config.eos_token!r}: the tokenizer has no such token; add it with "
            "template.added_tokens, or name one of its own"
        )
    tokenizer.eos_token = config.eos_token
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise UserError(
            f"template.eos_token={config.eos_token!r} is the tokenizer's pad token too, so masking the padding would "
            "hide the end of every response; name another"
        )


def _with_system(template: str, system: str | None, name: str) -> str:
    if system is None:
        return template
    literal = json.dumps(system.strip(), ensure_ascii=False)
    changed, count = _SYSTEM_LINE.subn(lambda match: match[1] + literal + match[2], template, count=1)
    if count == 0:
        raise UserError(
            f"template.system: the template {name!r} has no line '{{%- set default_system = \"…\" -%}}' to replace; "
            "add one, or put a system message into the data"
        )
    return changed


def _check_chatml(tokenizer: PreTrainedTokenizerBase) -> None:
    missing = [mark for mark in _CHATML_MARKS if mark not in tokenizer.get_vocab()]
    if missing:
        raise UserError(
            f"template.name='chatml': the tokenizer has no token {' and no '.join(missing)}; "
            "use template=chatml, which adds them, or template=cerebrum, which needs no new tokens"
        )
    if tokenizer.eos_token != _CHATML_MARKS[1]:
        raise UserError(
            f"template.name='chatml': a turn ends in <|im_end|>, but the tokenizer's EOS is {tokenizer.eos_token!r}, "
            "so no response would ever end; use template=chatml or set template.eos_token='<|im_end|>'"
        )


def _warn_if_tokens_disagree(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Say so when a whole chat, templated at once, is not the prompt's tokens followed by the response's."""
    from trlhf.models import encode_prompt, encode_response

    prompt: Message = {"role": "user", "content": "What is 2 + 3?"}
    answer: Message = {"role": "assistant", "content": "It is 5."}
    chat: Any = [dict(prompt), dict(answer)]
    whole: Any = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False)
    parts = encode_prompt(tokenizer, [prompt]) + encode_response(tokenizer, answer["content"])
    if list(whole) != parts:
        _log.warning(
            "template %s: a whole chat reads %r, but prompt and response are trained and sampled as %r",
            name,
            tokenizer.decode(list(whole)),
            tokenizer.decode(parts),
        )
