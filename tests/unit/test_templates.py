"""The chat templates: their text, character by character, and their tokens."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from trlhf.config import TemplateConfig
from trlhf.errors import UserError
from trlhf.models import encode_prompt, encode_response, load_tokenizer
from trlhf.sft.templates import apply_template, load_template

SYSTEM = (
    "A chat between a user and a thinking artificial intelligence assistant. The assistant describes its thought "
    "process and gives helpful and detailed answers to the user's questions."
)
CHAT: Any = [
    {"role": "user", "content": "Are you conscious?"},
    {"role": "assistant", "content": "Plan: think. No."},
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "I compute."},
]


@pytest.fixture
def tokenizer(tiny_model_dir: Path) -> Any:
    return load_tokenizer(tiny_model_dir)


def test_cerebrum_is_the_text_of_the_card(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert text == f"<s>{SYSTEM}\nUser: Are you conscious?\nAI:"


def test_eos_ends_a_chat_but_no_earlier_turn(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert text == (f"<s>{SYSTEM}\nUser: Are you conscious?\nAI: Plan: think. No.\nUser: Why?\nAI: I compute.</s>")
    waiting = tokenizer.apply_chat_template(CHAT[:3], tokenize=False, add_generation_prompt=True)
    assert waiting == f"<s>{SYSTEM}\nUser: Are you conscious?\nAI: Plan: think. No.\nUser: Why?\nAI:"


def test_a_system_message_replaces_the_default_line(tokenizer: Any) -> None:
    chat: Any = [{"role": "system", "content": "Be brief."}, *CHAT[:1]]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<s>Be brief.\nUser: Are you conscious?\nAI:"


@pytest.mark.parametrize("system", ["Be brief.", 'Say "hi" {% x %} {{ y }} \\ done', "Zwei\nZeilen: ä 😀"])
def test_the_configured_system_line_replaces_the_default_one(tokenizer: Any, system: str) -> None:
    apply_template(tokenizer, TemplateConfig(name="cerebrum", system=system))
    text = tokenizer.apply_chat_template(CHAT[:1], tokenize=False, add_generation_prompt=True)
    assert text == f"<s>{system}\nUser: Are you conscious?\nAI:"
    apply_template(tokenizer, TemplateConfig(name="tokenizer", system="Again."))
    assert tokenizer.apply_chat_template(CHAT[:1], tokenize=False).startswith("<s>Again.\n")


@pytest.mark.parametrize("turns", [2, 4])
def test_prompt_and_response_tokens_are_those_of_the_whole_chat(tokenizer: Any, turns: int) -> None:
    whole = tokenizer.apply_chat_template(CHAT[:turns], tokenize=True, return_dict=False)
    response = encode_response(tokenizer, CHAT[turns - 1]["content"])
    assert encode_prompt(tokenizer, CHAT[: turns - 1]) + response == list(whole)
    assert whole[-1] == tokenizer.eos_token_id
    assert list(whole).count(tokenizer.bos_token_id) == 1


def test_generation_markers_cover_response_and_eos(tokenizer: Any) -> None:
    tokens = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    marked = [i for i, m in zip(tokens["input_ids"], tokens["assistant_masks"], strict=True) if m]
    assert tokenizer.decode(marked) == " Plan: think. No. I compute.</s>"


@pytest.mark.parametrize(
    ("chat", "message"),
    [
        (CHAT[1:], "turn 1 is by 'assistant' where 'user' was expected"),
        ([CHAT[0], CHAT[0]], "turn 2 is by 'user' where 'assistant' was expected"),
        ([CHAT[0], {"role": "system", "content": "x"}], "turn 2 is by 'system'"),
    ],
)
def test_turns_in_the_wrong_order_are_refused(tokenizer: Any, chat: Any, message: str) -> None:
    from jinja2 import TemplateError

    with pytest.raises(TemplateError, match=message):
        tokenizer.apply_chat_template(chat, tokenize=False)


def test_chatml_needs_its_tokens(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"no token <\|im_start\|> and no <\|im_end\|>.*template=cerebrum"):
        apply_template(tokenizer, TemplateConfig(name="chatml"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    with pytest.raises(UserError, match=r"EOS is '</s>'"):
        apply_template(tokenizer, TemplateConfig(name="chatml"))


def test_chatml_renders_and_agrees_with_prompt_and_response(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"], "eos_token": "<|im_end|>"})
    with caplog.at_level(logging.WARNING):
        apply_template(tokenizer, TemplateConfig(name="chatml", system="Be brief."))
    assert not caplog.records
    assert tokenizer.apply_chat_template(CHAT[:3], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nAre you conscious?<|im_end|>\n"
        "<|im_start|>assistant\n Plan: think. No.<|im_end|>\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_that_disagrees_with_the_response_tokens_is_reported(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}assistant:")
    with caplog.at_level(logging.WARNING):
        apply_template(tokenizer, TemplateConfig(name=str(path)))
    assert "prompt and response are trained and sampled as" in caplog.text
    path.write_text("{% for m in messages %}")
    with pytest.raises(UserError, match="cannot be rendered"):
        apply_template(tokenizer, TemplateConfig(name=str(path)))


def test_unknown_templates_and_missing_system_lines_are_named(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"template.name='cerbrum'.*use cerebrum, chatml"):
        load_template("cerbrum")
    plain = tmp_path / "plain.jinja"
    plain.write_text("{{ messages }}")
    assert load_template(str(plain)) == "{{ messages }}"
    with pytest.raises(UserError, match=r"template\.system: .* has no line"):
        load_template(str(plain), system="x")
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        apply_template(tokenizer, TemplateConfig(name="tokenizer"))
