"""The chat templates: their text, character by character, and their tokens."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest

from trlhf.config import TemplateConfig
from trlhf.errors import UserError
from trlhf.models import encode_prompt, encode_response, load_tokenizer
from trlhf.sft.encode import encode_demonstrations
from trlhf.sft.templates import apply_template, load_template
from trlhf.types import Demonstration

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


CHATML = TemplateConfig(name="chatml", added_tokens=["<|im_start|>", "<|im_end|>"], eos_token="<|im_end|>")
USER_ASSISTANT = TemplateConfig(name="user-assistant")


def test_chatml_needs_its_tokens(tokenizer: Any) -> None:
    with pytest.raises(
        UserError, match=r"no token <\|im_start\|> and no <\|im_end\|>; use template=chatml, which adds"
    ):
        apply_template(tokenizer, TemplateConfig(name="chatml"))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    with pytest.raises(UserError, match=r"EOS is '</s>'"):
        apply_template(tokenizer, TemplateConfig(name="chatml"))


def test_tokens_are_added_once_and_eos_is_switched(tokenizer: Any, tmp_path: Path) -> None:
    before = len(tokenizer)
    apply_template(tokenizer, CHATML)
    apply_template(tokenizer, CHATML)
    assert len(tokenizer) == before + 2
    assert tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"]) == [before, before + 1]
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("<|im_end|>", before + 1)
    assert tokenizer("a<|im_end|>b", add_special_tokens=False)["input_ids"].count(before + 1) == 1
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    assert (len(again), again.eos_token, again.pad_token) == (before + 2, "<|im_end|>", "<pad>")
    assert again.chat_template == load_template("chatml")


def test_an_eos_that_cannot_be_is_refused(tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"template\.eos_token='<end>': the tokenizer has no such token"):
        apply_template(tokenizer, TemplateConfig(eos_token="<end>"))
    with pytest.raises(UserError, match=r"template\.eos_token='<pad>' is the tokenizer's pad token too"):
        apply_template(tokenizer, TemplateConfig(eos_token="<pad>"))


# ---- the cards' own examples, character by character ----


def test_the_card_of_mistral_orca(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """https://huggingface.co/Open-Orca/Mistral-7B-OpenOrca, "Prompt Template".

    The card prints a line break before the system line's <|im_end|>, which its chat does not have.
    """
    with caplog.at_level(logging.WARNING):
        apply_template(tokenizer, CHATML)
    assert not caplog.records, "prompt and response are the whole chat"
    system = (
        "You are MistralOrca, a large language model trained by Alignment Lab AI. Write out your reasoning "
        "step-by-step to be sure you get the right answers!"
    )
    turns = (
        "<|im_start|>user\nHow are you?<|im_end|>\n<|im_start|>assistant\nI am doing well!<|im_end|>\n"
        "<|im_start|>user\nPlease tell me about how mistral winds have attracted super-orcas.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    chat: Any = [
        {"role": "system", "content": system},
        {"role": "user", "content": "How are you?"},
        {"role": "assistant", "content": "I am doing well!"},
        {"role": "user", "content": "Please tell me about how mistral winds have attracted super-orcas."},
    ]
    assert read(tokenizer, chat) == f"<|im_start|>system\n{system}<|im_end|>\n{turns}"
    chat[0]["content"] += "\n"
    assert read(tokenizer, chat) == f"<|im_start|>system\n{system}\n<|im_end|>\n{turns}"  # as printed


def test_the_card_of_jackalope(tokenizer: Any) -> None:
    """https://huggingface.co/openaccess-ai-collective/jackalope-7b, "Prompt Template"."""
    apply_template(tokenizer, CHATML)
    chat: Any = [
        {
            "role": "system",
            "content": "You are JackalopeAI. Write out your reasoning step-by-step to be sure you get the right "
            "answers!\n",
        },
        {"role": "user", "content": "How are you?"},
        {"role": "assistant", "content": "I am doing well!"},
        {"role": "user", "content": "Please tell me about the mythical creatures called jackalopes."},
    ]
    assert (
        read(tokenizer, chat)
        == """<|im_start|>system
You are JackalopeAI. Write out your reasoning step-by-step to be sure you get the right answers!
<|im_end|>
<|im_start|>user
How are you?<|im_end|>
<|im_start|>assistant
I am doing well!<|im_end|>
<|im_start|>user
Please tell me about the mythical creatures called jackalopes.<|im_end|>
<|im_start|>assistant
"""
    )


def test_the_card_of_collective_cognition(tokenizer: Any, caplog: pytest.LogCaptureFixture) -> None:
    """https://huggingface.co/teknium/CollectiveCognition-v1-Mistral-7B, "Usage", behind BOS, which it leaves out."""
    with caplog.at_level(logging.WARNING):
        apply_template(tokenizer, USER_ASSISTANT)
    assert not caplog.records, "prompt and response are the whole chat"
    chat: Any = [{"role": "user", "content": "<prompt>"}]
    assert read(tokenizer, chat) == "<s>USER: <prompt>\nASSISTANT:"
    chat.insert(0, {"role": "system", "content": "<system message>"})
    assert read(tokenizer, chat) == "<s><system message>\nUSER: <prompt>\nASSISTANT:"
    apply_template(tokenizer, TemplateConfig(name="user-assistant", system="<system message>"))
    assert read(tokenizer, chat[1:]) == "<s><system message>\nUSER: <prompt>\nASSISTANT:"


def test_the_markers_of_capybara(tokenizer: Any) -> None:
    """https://huggingface.co/NousResearch/Nous-Capybara-7B-V1.9, "Prompt Format": "USER:", the prompt, "ASSISTANT:"."""
    apply_template(tokenizer, USER_ASSISTANT)
    assert read(tokenizer, CHAT[:3]) == (
        "<s>USER: Are you conscious?\nASSISTANT: Plan: think. No.</s>\nUSER: Why?\nASSISTANT:"
    )
    assert tokenizer.apply_chat_template(CHAT, tokenize=False) == (
        "<s>USER: Are you conscious?\nASSISTANT: Plan: think. No.</s>\nUSER: Why?\nASSISTANT: I compute.</s>"
    )


def test_the_card_of_cerebrum(tokenizer: Any) -> None:
    """https://huggingface.co/AetherResearch/Cerebrum-1.0-7b, "Usage": no EOS in a multi-turn dialogue's history."""
    chat: Any = [
        {"role": "user", "content": "What is self-consistency decoding?"},
        {"role": "assistant", "content": "Self-consistency decoding is a technique."},
        {"role": "user", "content": "Why does self-consistency work?"},
    ]
    assert read(tokenizer, chat) == (
        f"<s>{SYSTEM}\nUser: What is self-consistency decoding?\nAI: Self-consistency decoding is a technique.\n"
        "User: Why does self-consistency work?\nAI:"
    )


def read(tokenizer: Any, chat: Any) -> Any:
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


@pytest.mark.parametrize("config", [CHATML, USER_ASSISTANT], ids=["chatml", "user-assistant"])
def test_marks_and_tokens_of_templates_that_keep_eos_in_the_history(tokenizer: Any, config: TemplateConfig) -> None:
    apply_template(tokenizer, config)
    tokens = tokenizer.apply_chat_template(CHAT, tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
    whole = Demonstration(tuple(CHAT), "a:1")
    (row,), _ = encode_demonstrations(tokenizer, [whole], 320, "whole")
    assert list(row.input_ids) == tokens["input_ids"] and list(row.completion_mask) == tokens["assistant_masks"]
    assert [tokenizer.decode(response).strip() for response in row.responses] == [
        f"Plan: think. No.{tokenizer.eos_token}",
        f"I compute.{tokenizer.eos_token}",
    ]
    last = Demonstration(tuple(CHAT), "a:1")
    (unrolled,), _ = encode_demonstrations(tokenizer, [last], 320)
    assert unrolled.input_ids == row.input_ids and unrolled.responses == row.responses[1:]
    assert encode_prompt(tokenizer, CHAT[:3]) == list(row.input_ids[: -len(row.responses[1])])


def test_a_template_that_drops_eos_from_the_history_cannot_hold_a_whole_chat(tokenizer: Any) -> None:
    single = Demonstration(tuple(CHAT[:2]), "a:1")
    (row,), _ = encode_demonstrations(tokenizer, [single], 320, "whole")
    assert len(row.responses) == 1
    with pytest.raises(UserError, match=r"sft\.multi_turn=whole: a:2: .*drops its EOS.*use sft\.multi_turn=unrolled"):
        encode_demonstrations(tokenizer, [single, Demonstration(tuple(CHAT), "a:2")], 320, "whole")


def test_a_template_that_disagrees_with_the_response_tokens_is_reported(
    tokenizer: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "own.jinja"
    path.write_text("{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}\n{% endfor %}assistant:")
    with caplog.at_level(logging.WARNING):
        apply_template(tokenizer, TemplateConfig(name=str(path)))
    assert "prompt and response are trained and sampled as" in caplog.text
    for broken in ("{% for m in messages %}", "{{ messages | nosuch }}", "{{ bos_token + 1 }}", "{{ x.y.z }}"):
        path.write_text(broken)
        with pytest.raises(UserError, match=r"own\.jinja': the template cannot be rendered \(.+\); mend it"):
            apply_template(tokenizer, TemplateConfig(name=str(path)))


def test_unknown_templates_and_missing_system_lines_are_named(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"template.name='cerbrum'.*did you mean cerebrum\? use cerebrum, chatml, user-a"
    ):
        load_template("cerbrum")
    plain = tmp_path / "plain.jinja"
    plain.write_text("{{ messages }}")
    assert load_template(str(plain)) == "{{ messages }}"
    with pytest.raises(UserError, match=r"template\.system: .* has no line"):
        load_template(str(plain), system="x")
    tokenizer.chat_template = None
    with pytest.raises(UserError, match="has no chat template"):
        apply_template(tokenizer, TemplateConfig(name="tokenizer"))
