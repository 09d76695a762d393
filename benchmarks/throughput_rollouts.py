"""Rollouts: sampled tokens a second against ``model.generate``; evaluation: problems a second against lm-eval."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
from throughput_setting import Arm, Done, Setting, alternate, build, compared, prompts, tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase

from trlhf.config import EvaluationConfig
from trlhf.evaluation.answers import extract_answer
from trlhf.evaluation.evaluate import evaluate
from trlhf.models import encode_prompt, load_tokenizer
from trlhf.roles import Role
from trlhf.rollout import Sampling, sample_responses
from trlhf.types import Prompt

SAMPLES = 8
BATCH = 128  # responses decoded together
LIMIT = 200  # tokens of a response
LM_EVAL = "lm-eval, batch {}"


def generated(
    model: Any, ids: PreTrainedTokenizerBase, chosen: Sequence[Prompt], samples: int, sampled: bool, limit: int
) -> list[list[int]]:
    """Return what ``model.generate`` answers to prompts of like length, up to EOS; samples of a prompt side by side."""
    encoded = [encode_prompt(ids, prompt.messages) for prompt in chosen]
    width = max(map(len, encoded))
    pad, eos = int(ids.pad_token_id), int(ids.eos_token_id)
    tokens = torch.tensor([[pad] * (width - len(row)) + row for row in encoded], device=model.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=model.device)
    drawn = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sampled else {}
    config = GenerationConfig(
        do_sample=sampled,
        max_new_tokens=limit,
        num_return_sequences=samples,
        eos_token_id=eos,
        pad_token_id=pad,
        **drawn,
    )
    with torch.no_grad():
        rows = model.generate(tokens, attention_mask=mask, generation_config=config)[:, width:].tolist()
    return [row[: row.index(eos) + 1] if eos in row else row for row in rows]


def generate_arm(
    model: Any, ids: PreTrainedTokenizerBase, asked: Sequence[Prompt], batch: int = BATCH, limit: int = LIMIT
) -> Arm:
    """Return an arm that samples by ``generate``, in batches of like length as ours are."""
    ordered = sorted(asked, key=lambda prompt: len(encode_prompt(ids, prompt.messages)))
    size = batch // SAMPLES

    def work() -> Done:
        torch.manual_seed(0)
        rows = [
            row
            for start in range(0, len(ordered), size)
            for row in generated(model, ids, ordered[start : start + size], SAMPLES, True, limit)
        ]
        return Done(sum(map(len, rows)), {"responses": len(rows)})

    return Arm("generate", lambda: work)


def our_arm(
    model: Any, ids: PreTrainedTokenizerBase, asked: Sequence[Prompt], batch: int = BATCH, limit: int = LIMIT
) -> Arm:
    """Return an arm that samples as the rl stage does."""

    def work() -> Done:
        sampling = Sampling(1.0, limit, SAMPLES, batch)
        groups = sample_responses(model, ids, asked, sampling, torch.Generator().manual_seed(0))
        rows = [rollout.token_ids for group in groups for rollout in group]
        return Done(sum(map(len, rows)), {"responses": len(rows)})

    return Arm("trlhf", lambda: work)


def measure_rollouts(setting: Setting) -> dict[str, Any]:
    """Measure sampling; greedily both say the same.

    Raises:
        AssertionError: they do not.
    """
    ids = tokenizer()
    asked = prompts(setting.size(32, 8, 4), ids)
    greedy = build(setting)
    few = asked[:8]
    expected = generated(greedy, ids, few, 1, False, 12)
    found = sample_responses(greedy, ids, few, Sampling(0.0, 12, 1, len(few)), torch.Generator())
    assert [list(rows[0].token_ids) for rows in found] == expected
    model = build(setting, ends=True)
    measured = alternate([generate_arm(model, ids, asked), our_arm(model, ids, asked)], setting)
    return compared("tokens/s", measured, {"generate": 1.3})


def measure_evaluation(setting: Setting) -> dict[str, Any] | None:
    """Measure greedy answers of the SFT model of the embedded world; every answer must be lm-eval's.

    Returns:
        None for models other than the embedded one: random weights answer nothing that could be compared.

    Raises:
        AssertionError: an answer differs.
    """
    if setting.model != "micro":
        return None
    if importlib.util.find_spec("lm_eval") is None:
        return {
            "unit": "problems/s",
            "arms": {},
            "skipped": "lm-eval is not installed: pip install 'trlhf[benchmarks]'",
        }
    from trlhf.micro.world import generate

    folder = sft_model(setting)
    ids = load_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    items = generate("test", setting.size(128, 128, 8))
    asked = [item.prompt for item in items]
    gold = {item.prompt.id: item.answer for item in items if item.answer is not None}
    limit = setting.size(160, 160, 24)
    answers: dict[str, list[str]] = {}

    def ours() -> Done:
        config = EvaluationConfig(batch_size=BATCH, max_new_tokens=limit)
        answers["trlhf"] = [rollout.text for rollout in evaluate(Role(model), ids, asked, gold, config).rollouts]
        return Done(len(asked))

    arms = [Arm("trlhf", lambda: ours)]
    for size, part in ((1, asked[:16]), (BATCH, asked)):  # one at a time is lm-eval's default, and slow
        name = LM_EVAL.format(size)
        arms.append(Arm(name, lambda n=name, s=size, p=part: lm_eval_work(n, model, ids, p, s, limit, answers)))
    measured = alternate(arms, setting)
    for name, texts in answers.items():
        both = list(zip(texts, answers["trlhf"], strict=False))  # some answer the first problems only
        other = [pair for pair in both if extract_answer(pair[0]) != extract_answer(pair[1])]
        assert not other, (name, other)
        measured[name]["same_text"] = sum(a == b for a, b in both) / len(both)
    return compared("problems/s", measured, {LM_EVAL.format(BATCH): 3.0})


def lm_eval_work(
    name: str,
    model: Any,
    ids: PreTrainedTokenizerBase,
    asked: Sequence[Prompt],
    size: int,
    limit: int,
    answers: dict[str, list[str]],
) -> Callable[[], Done]:
    """Return lm-eval's `generate_until` at temperature 0 on prompts that went through the chat template."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    judge = HFLM(pretrained=model, tokenizer=ids, batch_size=size, device="cpu", max_length=1024, add_bos_token=False)
    options = {"until": [ids.eos_token], "do_sample": False, "temperature": 0.0, "max_gen_toks": limit}
    requests = []
    for n, prompt in enumerate(asked):
        text = ids.apply_chat_template([dict(m) for m in prompt.messages], add_generation_prompt=True, tokenize=False)
        requests.append(Instance("generate_until", {}, (text, dict(options)), n))

    def work() -> Done:
        answers[name] = [text.strip() for text in judge.generate_until(requests, disable_tqdm=True)]
        return Done(len(asked))

    return work


def sft_model(setting: Setting) -> str:
    """Return the folder of the embedded world's SFT model, after making it where it is not there yet."""
    import trlhf

    folder = setting.folder.resolve() / ("sft-quick" if setting.quick else "sft-model")
    quick = ["data.sft_prompts=16", "sft.epochs=1"] if setting.quick else []
    trlhf.run(["stage=sft", f"run.dir={folder}", *quick])
    return str(folder / "sft" / "model")
