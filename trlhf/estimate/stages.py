"""The phases of each stage: what is held when. Follows `trlhf.sft.train`, `trlhf.reward.train`, `trlhf.rl`, `_eval`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

from trlhf.checks import labels_come_with
from trlhf.config import ModelConfig
from trlhf.estimate.activations import Packed, Rows, forward_of
from trlhf.estimate.memory import Job, Phase
from trlhf.estimate.passes import POOLED_ROWS, backward, decoding, fused_head, of_responses, own_head, reading
from trlhf.run import planned

# Measured on the embedded and a larger model (benchmarks/estimate.py), two cores, glibc:
CPU_CONSTANT = 60e6  # bytes: Python's objects, data, buffers of the maths library
CPU_ADAPTERS = 35e6  # bytes: what peft loads when it makes the first adapter
CPU_SHARE = 0.36  # of what comes and goes: what the C library keeps in holes between what is in use
PASSING = ("activations", "logits", "KV cache")


def phases_of(job: Job) -> list[Phase]:
    """Return every phase of the stages that a run does."""
    stages: dict[str, Callable[[Job], Iterator[Phase]]] = {"sft": _sft, "reward": _reward, "rl": _rl, "eval": _eval}
    names = [name for name in planned(job.config) if name in stages]  # others load no model
    return [_with_overhead(phase, job) for name in names for phase in stages[name](job)]


def _with_overhead(phase: Phase, job: Job) -> Phase:
    if job.device != "cpu":
        return phase
    passing = sum(phase.parts.get(part, 0.0) for part in PASSING)
    other = phase.parts.get("other", 0.0) + CPU_CONSTANT + CPU_SHARE * passing
    other += CPU_ADAPTERS if phase.parts.get("adapters") else 0.0
    return Phase(phase.stage, phase.name, {**phase.parts, "other": other})


def _sft(job: Job) -> Iterator[Phase]:
    config, lengths, shape = job.config, job.lengths, job.shape
    sft = config.sft
    rows, width, steps = sft.microbatch_size, lengths.demonstration, sft.batch_size // sft.microbatch_size
    if sft.packing:  # rows are laid end to end, as one of all their tokens
        per_row = max(1.0, config.model.max_length / lengths.mean_demonstration)
        per_step = max(1, round(sft.batch_size / per_row))
        packed = min(per_step, max(1, round(sft.microbatch_size / per_row)))
        rows, width, steps = 1, packed * config.model.max_length, max(1, round(per_step / packed))
    how = forward_of(config.model, training=True, masked=sft.packing or rows > 1)
    held = {"weights": job.base, "adapters": job.adapter, "optimizer": 2 * job.learned}
    head = 4.0 * shape.vocabulary * shape.hidden if job.full else 0.0
    own = not (sft.packing or config.model.gradient_checkpointing or config.model.attention.startswith("flash"))
    if own and job.processes == 1:  # trlhf.sft.unpadded; of the longest rows that share a step at random
        width = round((width + lengths.mean_demonstration) / 2) if rows > 1 else width
        prompt = max(1, min(round(lengths.mean_prompt), width - 1))
        labels = rows * (width - prompt)
        parts = backward(job, how, Packed(rows, prompt, rows, width - prompt), 1.25 * own_head(job, how, labels))
    else:
        parts = backward(job, how, Rows(rows, width), fused_head(job, how, rows * width))
    yield Phase("sft", "backward pass", held | parts | {"gradients": job.learned if steps > 1 else head})
    yield Phase("sft", "optimizer step", held | {"gradients": job.learned, "other": _step(job)})


def _step(job: Job) -> float:
    """Return what AdamW's step holds beside its states: on a GPU one list of the size of all, on a CPU a matrix."""
    buckets = job.learned if job.processes > 1 else 0.0  # of gradients on their way between processes
    return buckets + (2 * job.largest if job.device == "cpu" else job.learned)


def _reward(job: Job) -> Iterator[Phase]:
    config, lengths = job.config, job.lengths
    reward, rl = config.reward, config.rl
    sft_adapter = job.adapter if config.model.quantization != "none" else 0.0
    own = "float32" if reward.finetune == "full" else config.model.dtype
    base = job.shape.base_bytes(config.model)
    labelled, length = lengths.labelled or reward.max_labelled or POOLED_ROWS, lengths.prompt + lengths.response
    if labels_come_with(config.data):
        length = lengths.labelled_response or length
    else:
        held = {"weights": base, "adapters": sft_adapter}
        samples = reward.samples_per_prompt
        batch, labelled = min(rl.rollout_batch_size, reward.labels * samples), reward.labels * max(2, samples // 2)
        for parts in decoding(job, batch, samples, lengths.prompt, lengths.response, config.model.dtype):
            yield Phase("reward", "sampling", held | parts)
    weights = job.shape.parameters * 4.0 if reward.finetune == "full" else base
    learned = 4.0 * (job.shape.parameters if reward.finetune == "full" else job.shape.adapter_parameters(config.model))
    adapters = sft_adapter + (learned if reward.finetune == "lora" else 0.0)
    held = {"weights": weights, "adapters": adapters}  # read once more when it has been trained
    yield Phase("reward", "reading", held | reading(job, labelled, length, own, adapters > 0))
    if reward.finetune == "frozen":
        return
    held |= {"gradients": learned, "optimizer": 2 * learned}
    held["other"] = 2 * learned  # the best epoch so far, and the next
    how = forward_of(_as_trained(job, reward.finetune), training=False, masked=True)
    # A comparison is about two responses, but a verdict becomes a label of every response that ends as it says.
    rows = min(labelled, round(reward.microbatch_size * (1 + config.targeting.preference_share / 3)))
    yield Phase("reward", "backward pass", held | backward(job, how, Rows(rows, length), 0.0))


def _as_trained(job: Job, finetune: str) -> ModelConfig:
    """Return the model as the reward stage trains it, whatever the policy is trained as."""
    model = job.config.model
    return replace(model, lora=replace(model.lora, enabled=finetune == "lora"))


def _rl(job: Job) -> Iterator[Phase]:
    config, lengths = job.config, job.lengths
    rl, model = config.rl, config.model
    critic = rl.algorithm == "ppo" and rl.advantage == "gae"
    tuned = config.reward.finetune != "frozen"
    learners = 1 + critic
    if job.full:
        own = job.shape.parameters * 4.0 if config.reward.finetune == "full" else job.shape.base_bytes(model)
        weights = job.whole * (2 + critic) + (own if tuned or model.dtype != "float32" else 0.0)
        adapters = 0.0
    else:
        weights = job.base
        adapters = job.adapter * (learners + (model.quantization != "none") + tuned)
    held = {"weights": weights, "adapters": adapters, "gradients": learners * job.learned}
    held["optimizer"] = 2 * learners * job.learned
    sampled = rl.prompts_per_step * rl.samples_per_prompt
    batch = min(rl.rollout_batch_size, sampled)
    for parts in decoding(job, batch, rl.samples_per_prompt, lengths.prompt, lengths.response, job.loaded):
        yield Phase("rl", "rollouts", held | parts)
    looked_at = config.targeting.candidates * config.targeting.samples_per_prompt
    length = max(lengths.prompt + lengths.response, lengths.labelled_response)
    fresh = {"weights": weights, "adapters": adapters}  # the first round's reading comes before any step
    yield Phase(
        "rl", "first reading", fresh | reading(job, max(looked_at, lengths.labelled), length, job.loaded, adapters > 0)
    )
    later = sampled if rl.rounds == 1 else max(sampled, looked_at)
    yield Phase(
        "rl", "reading", held | reading(job, later, lengths.prompt + lengths.response, job.loaded, adapters > 0)
    )
    group = 2 if rl.algorithm == "dpo" else rl.samples_per_prompt
    how, layout = of_responses(model, lengths.prompt, lengths.response, rl.microbatch_size, group)
    logits = own_head(job, how, rl.microbatch_size * lengths.response)
    yield Phase("rl", "backward pass", held | backward(job, how, layout, logits))
    if rl.anchor_coef and rl.anchor_prompts:  # whatever is mastered is short: their mean length is taken
        anchors, response = min(rl.anchor_prompts, rl.microbatch_size), round(lengths.mean_response)
        how, layout = of_responses(model, round(lengths.mean_prompt), response, anchors, 1)
        logits = own_head(job, how, anchors * response, anchors=True)
        yield Phase("rl", "anchors", held | backward(job, how, layout, logits))
    yield Phase("rl", "optimizer step", held | {"other": _step(job)})


def _eval(job: Job) -> Iterator[Phase]:
    config, lengths = job.config, job.lengths
    evaluation, dtype = config.evaluation, config.model.dtype
    weights = {"weights": job.shape.parameters * (2.0 if dtype == "bfloat16" else 4.0)}
    response = min(evaluation.max_new_tokens, max(lengths.response, 1))
    batch = min(evaluation.batch_size, lengths.tests)
    for parts in decoding(job, batch, 1, lengths.test_prompt, response, dtype):
        yield Phase("eval", "decoding", weights | parts)
