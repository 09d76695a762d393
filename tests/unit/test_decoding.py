"""Decoding with prompts held once: the logits of the plain way, whoever leaves and whatever was padded."""

from __future__ import annotations

import pytest
import torch
from architectures import tiny

from trlhf import shared_prompts
from trlhf.decoding import PlainDecoder, SharedDecoder, start_decoding
from trlhf.packed_attention import SHARING, plain_attention
from trlhf.shared_prompts import SharedPrompts

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12, 13], [14, 15], [16, 17, 18, 19]]
ALIKE = [[*range(20, 30), *tokens] for tokens in PROMPTS]  # as prompts of one template are


@pytest.mark.parametrize("kind", SHARING)
@pytest.mark.parametrize("prompts", [PROMPTS, [[5, 6, 7], [8, 9, 10]], ALIKE], ids=["padded", "equal", "alike"])
@pytest.mark.parametrize("samples", [1, 3])
@torch.no_grad()
def test_logits_are_those_of_the_plain_way_while_rows_leave(kind: str, prompts: list[list[int]], samples: int) -> None:
    model = tiny(kind)
    shared, plain = SharedDecoder(model, prompts, samples, 3), PlainDecoder(model, prompts, samples, 3)
    torch.testing.assert_close(shared.logits, plain.logits)
    generator, rows = torch.Generator().manual_seed(0), len(prompts) * samples
    for step in range(9):
        if step % 2 == 0 and rows > 1:  # one row leaves before the first step, then three, …: at once or later
            keep = torch.randperm(rows, generator=generator)[: max(1, rows - step - 1)].sort().values
            rows = len(keep)
            shared.keep(keep)
            plain.keep(keep)
        tokens = torch.randint(4, 40, (rows,), generator=generator)
        torch.testing.assert_close(shared.step(tokens), plain.step(tokens), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_room_for_responses_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_prompts, "FIRST_CAPACITY", 2)
    model = tiny("mistral")
    shared, plain = SharedDecoder(model, PROMPTS, 2, 3), PlainDecoder(model, PROMPTS, 2, 3)
    for step in range(7):
        tokens = torch.arange(8) + 4 + step
        torch.testing.assert_close(shared.step(tokens), plain.step(tokens), atol=2e-5, rtol=1e-5)


@torch.no_grad()
def test_prompts_are_held_once_and_let_go_with_their_last_row() -> None:
    decoder = SharedDecoder(tiny("mistral"), PROMPTS, 4, 3)
    assert decoder._shared.layers[0][0].shape == (4, 2, 6, 8)
    decoder.step(torch.full((16,), 9))
    decoder.keep(torch.tensor([0, 1, 2, 3, 5, 12, 13]))
    assert decoder._shared.layers[0][0].shape[0] == 3
    assert len(decoder._layers[0]._held[0]) == 7
    decoder.keep(torch.arange(1, 7))  # one row in seven: it leaves at once, though its prompt's others stay
    assert len(decoder._layers[0]._held[0]) == 6


@torch.no_grad()
def test_a_single_row_of_many_does_not_leave_at_once() -> None:
    decoder = SharedDecoder(tiny("mistral"), PROMPTS, 4, 3)
    decoder.step(torch.full((16,), 9))
    decoder.keep(torch.arange(1, 16))
    assert len(decoder._layers[0]._held[0]) == 16
    assert decoder.step(torch.full((15,), 9)).shape[0] == 15


def test_gather_and_scatter_undo_each_other_in_any_order() -> None:
    layers = [(torch.zeros(3, 2, 5, 4), torch.zeros(3, 2, 5, 4))]
    for prompt_of in ([0, 0, 1, 1, 2, 2], [2, 0, 1, 0, 2, 2], [0, 0, 0, 1, 2]):
        shared = SharedPrompts(layers, torch.ones(3, 5, dtype=torch.long), torch.tensor(prompt_of))
        rows = torch.randn(len(prompt_of), 2, 3, 4)
        torch.testing.assert_close(shared.scatter(shared.gather(rows)), rows)


def test_what_cannot_be_shared_is_decoded_plainly() -> None:
    assert plain_attention(tiny("mistral"), 20)
    assert plain_attention(tiny("mistral", sliding_window=20), 20)
    assert not plain_attention(tiny("mistral", sliding_window=19), 20)
    flash = tiny("mistral")
    flash.config._attn_implementation = "flash_attention_2"
    assert not plain_attention(flash, 20)


@torch.no_grad()
def test_the_models_own_attention_is_back_after_every_step() -> None:
    model = tiny("mistral")
    decoder = start_decoding(model, PROMPTS, 2, 3, 5)
    assert isinstance(decoder, SharedDecoder)
    decoder.step(torch.full((8,), 9))
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(IndexError):
        decoder.step(torch.full((8,), 10_000))
    assert model.config._attn_implementation == "sdpa"
    assert isinstance(start_decoding(tiny("mistral", sliding_window=8), PROMPTS, 2, 3, 5), PlainDecoder)
    waiting = tiny("mistral")
    waiting.model.layers[1].register_forward_pre_hook(lambda *_: None)  # as FSDP, which gathers a layer's weights so
    assert isinstance(start_decoding(waiting, PROMPTS, 2, 3, 5), PlainDecoder)
