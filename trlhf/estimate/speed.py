"""How long a run takes: operations and bytes, over what a card is said to do, or what the CPU was just seen to do.

Modelled throughout. The shares of a card's peak that are reached, and the time to start a layer, are assumptions that
were not measured on any card; a CPU's speed is that of NumPy's matrix product and copy, measured in half a second.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np

from trlhf.checks import labels_come_with
from trlhf.estimate.memory import Job
from trlhf.estimate.passes import of_responses
from trlhf.hardware import cards
from trlhf.run import planned

# Dense bfloat16 with float32 sums, and memory, by NVIDIA's data sheets: (name, TFLOP/s, GB/s), the longer names first.
CARDS = (
    ("H200", 989, 4800), ("H100 PCIe", 756, 2000), ("H100", 989, 3350), ("A100", 312, 1935), ("L40S", 362, 864),
    ("RTX 6000 Ada", 364, 960), ("RTX A6000", 155, 768), ("L4", 121, 300), ("RTX 4090", 165, 1008),
    ("RTX 3090", 71, 936), ("A10", 125, 600),
)  # fmt: skip
BY_NAME = {"gpu-24gb": "RTX 3090", "gpu-80gb": "A100", "multi-gpu": "A100"}
SECONDS_MEASURED = 0.25  # for each of the two figures of a CPU


@dataclass(frozen=True)
class Machine:
    """What a device does.

    Attributes:
        name: of the card, or CPU.
        flops: a second at most.
        bandwidth: bytes a second.
        training: share of ``flops`` that forward and backward passes reach.
        reading: share of ``bandwidth`` that decoding reaches.
        launch: seconds that a layer takes at least, whatever its size.
        source: of these figures, in words.
    """

    name: str
    flops: float
    bandwidth: float
    training: float
    reading: float
    launch: float
    source: str


def machine_of(job: Job) -> Machine:
    """Return the card that is there or that the hardware's name stands for; on a CPU, measure for half a second."""
    if job.device == "cpu":
        return measure_cpu()
    hardware = job.config.hardware
    found = cards() if hardware.automatic else ()
    wanted = found[0].name if found else BY_NAME.get(hardware.name, "A100")
    name, tflops, gigabytes = next(
        (card for card in CARDS if card[0] in wanted), next(c for c in CARDS if c[0] == "A100")
    )
    source = f"assumed {name}: {tflops} TFLOP/s and {gigabytes} GB/s, of which 35% and 50% are reached"
    return Machine(name, tflops * 1e12, gigabytes * 1e9, 0.35, 0.5, 5e-4, source)


def measure_cpu() -> Machine:
    """Multiply and copy matrices for half a second."""
    left = np.ones((768, 768), dtype=np.float32)
    done, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < SECONDS_MEASURED:
        left @ left
        done += 1
    flops = done * 2 * 768**3 / (time.perf_counter() - begun)
    block, other = np.ones(2**24, dtype=np.float32), np.ones(2**24, dtype=np.float32)
    copied, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < SECONDS_MEASURED:
        np.copyto(other, block)
        copied += 2 * block.nbytes
    bandwidth = copied / (time.perf_counter() - begun)
    source = f"measured just now: {flops / 1e9:.0f} GFLOP/s, of which half are reached, and {bandwidth / 1e9:.0f} GB/s"
    return Machine("CPU", flops, bandwidth, 0.5, 0.5, 3e-4, source)


def seconds_of(job: Job, machine: Machine) -> dict[str, float]:
    """Return the seconds of each stage that a run does, its longest sequences and all its prompts taken together."""
    parts = {"sft": _sft, "reward": _reward, "rl": _rl, "eval": _eval}
    names = [name for name in planned(job.config) if name in parts]  # others load no model
    return {name: parts[name](job, machine) / (job.processes if name == "sft" else 1) for name in names}


def forward_flops(job: Job, tokens: float, length: float, logits: float) -> float:
    """Return the operations of a forward pass: two a weight and token, attention, and two a weight of the head."""
    shape = job.shape
    attention = (
        2.0 * tokens * length * shape.queries * shape.layers
    )  # half of all pairs, once for scores, once for sums
    return 2.0 * tokens * shape.linear_parameters + attention + 2.0 * logits * shape.vocabulary * shape.hidden


def _training(job: Job, machine: Machine, tokens: float, length: float, logits: float) -> float:
    """Return the seconds of forward and backward passes: twice the forward's work again, once under adapters."""
    passes = (3 if job.full else 2) + job.config.model.gradient_checkpointing
    return passes * forward_flops(job, tokens, length, logits) / (machine.flops * machine.training)


def _decoding(job: Job, machine: Machine, responses: float, batch: int, prompt: float, adapters: bool) -> float:
    """Return the seconds to write responses: for every token of a batch all weights and its cache are read."""
    shape, lengths, dtype = job.shape, job.lengths, job.config.model.dtype
    batches, steps = math.ceil(responses / batch), lengths.response
    weights = job.base if adapters else float(shape.parameters * (2 if dtype == "bfloat16" else 4))
    cache = shape.cache_bytes(batch * (prompt + lengths.mean_response), dtype)
    read = (weights + cache) / (machine.bandwidth * machine.reading)
    computed = forward_flops(job, batch, prompt, batch) / (machine.flops * machine.training)
    launch = shape.layers * machine.launch * (2 if adapters and not job.full else 1)
    prefill = forward_flops(job, batch * prompt, prompt, batch) / (machine.flops * machine.training)
    return batches * (prefill + steps * (max(read, computed) + launch))


def _sft(job: Job, machine: Machine) -> float:
    lengths = job.lengths
    tokens = job.config.sft.epochs * lengths.demonstrations * lengths.mean_demonstration
    return _training(job, machine, tokens, lengths.mean_demonstration, tokens)


def _reward(job: Job, machine: Machine) -> float:
    config, lengths = job.config, job.lengths
    reward, length = config.reward, lengths.mean_prompt + lengths.mean_response
    seconds, responses = 0.0, float(reward.labels)
    if not labels_come_with(config.data):
        responses = 1.25 * reward.labels * reward.samples_per_prompt
        seconds = _decoding(job, machine, responses, config.rl.rollout_batch_size, lengths.mean_prompt, adapters=False)
    read = forward_flops(job, responses * length, length, responses * lengths.mean_response)
    seconds += read / (machine.flops * machine.training)
    if reward.finetune != "frozen":
        tokens = reward.epochs * reward.labels * (1 + config.targeting.preference_share) * length
        seconds += _training(job, machine, tokens, length, 0)
    return seconds


def _rl(job: Job, machine: Machine) -> float:
    config, lengths = job.config, job.lengths
    rl, targeting = config.rl, config.targeting
    steps, responses = rl.rounds * rl.steps_per_round, rl.prompts_per_step * rl.samples_per_prompt
    looked_at = rl.rounds * targeting.candidates * targeting.samples_per_prompt
    prompt = lengths.mean_prompt
    seconds = _decoding(job, machine, steps * responses + looked_at, rl.rollout_batch_size, prompt, adapters=True)
    mean = max(1, round(lengths.mean_response))
    _, layout = of_responses(config.model, round(prompt), mean, rl.microbatch_size, rl.samples_per_prompt)
    share, width = layout.tokens / rl.microbatch_size, prompt + mean  # tokens of a response, with its part of a prompt
    tokens = steps * responses * share
    logits = steps * responses * lengths.mean_response
    learners = 1 + (rl.algorithm == "ppo" and rl.advantage == "gae")
    seconds += 2 * forward_flops(job, tokens, width, logits) / (machine.flops * machine.training)
    seconds += rl.epochs * learners * _training(job, machine, tokens, width, logits)
    anchors = rl.anchor_prompts / max(1, rl.minibatch_size) if rl.anchor_coef else 0.0
    return seconds * (1 + anchors)


def _eval(job: Job, machine: Machine) -> float:
    models = 3 if job.config.stage == "all" else 1
    evaluation, lengths = job.config.evaluation, job.lengths
    one = _decoding(job, machine, lengths.tests, evaluation.batch_size, lengths.test_prompt, adapters=False)
    return models * one
