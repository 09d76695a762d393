"""The losses against TRL's own code, called on the same log-probabilities; docs/mutants.md says where it cannot be.

TRL's methods are called unbound, on a stand-in that holds what they read of a trainer.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from trlhf.advantages import leave_one_out
from trlhf.logprobs import pad_sequences, response_logprobs, token_entropy, token_logprobs
from trlhf.losses.dpo import chosen_nll, dpo_loss
from trlhf.losses.ppo import full_kl_loss, kl_estimate, ppo_loss
from trlhf.losses.reward import preference_loss

MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] + [False] * 4])


def stand_in(**attributes: Any) -> SimpleNamespace:
    """Return what TRL's methods read of a trainer in evaluation, on one process."""
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        num_processes=1,
        process_index=0,
        gather=lambda x: x,
        gather_for_metrics=lambda x: x,
        reduce=lambda x, reduction: x,
    )
    metrics: Any = defaultdict(lambda: defaultdict(list))
    model = SimpleNamespace(training=False, is_gradient_checkpointing=False)
    return SimpleNamespace(
        accelerator=accelerator,
        model=model,
        _metrics=metrics,
        _total_train_tokens=0,
        aux_loss_enabled=False,
        **attributes,
    )


def draws(n: int, shape: tuple[int, ...] = (3, 5), scale: float = 0.5) -> list[Tensor]:
    torch.manual_seed(n)
    return [scale * torch.randn(shape, dtype=torch.float64) for _ in range(n)]


def grpo(logprobs: Tensor, old: Tensor, advantages: Tensor, beta: float, **arguments: Any) -> tuple[Tensor, Any]:
    """Call GRPOTrainer's loss ("bnpo": the mean over the real tokens)."""
    from trl import GRPOTrainer

    trainer = stand_in(
        _get_per_token_logps_and_entropies=lambda *_, **__: (logprobs, torch.zeros_like(logprobs), None),
        args=SimpleNamespace(delta=arguments.get("delta"), use_bias_correction_kl=False),
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        loss_type="bnpo",
        beta=beta,
        epsilon_low=0.2,
        epsilon_high=0.2,
        use_vllm=False,
        _entropy_bonus_enabled=False,
    )
    ids = torch.ones(3, 5, dtype=torch.long)
    inputs = {"prompt_ids": ids, "prompt_mask": ids, "completion_ids": ids, "completion_mask": MASK.long()}
    inputs |= {"advantages": advantages, "old_per_token_logps": old, "ref_per_token_logps": arguments.get("reference")}
    return GRPOTrainer._compute_loss(trainer, None, inputs), trainer._metrics["eval"]


@pytest.mark.parametrize(("scale", "delta"), [(0.2, None), (1.0, None), (1.0, 3.0), (1.0, 1.5)])
def test_ppo_loss_is_the_surrogate_of_grpo_and_delta_is_the_dual_clip(scale: float, delta: float | None) -> None:
    logprobs, old, advantages = draws(3, scale=scale)
    logprobs.requires_grad_()
    theirs, _ = grpo(logprobs, old, advantages, beta=0.0, delta=delta)
    ours, _ = ppo_loss(logprobs, old, advantages, MASK, float(MASK.sum()), 0.2, delta or 1e12)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)
    gradients = [torch.autograd.grad(loss, logprobs, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)


def test_k3_is_the_kl_of_grpo() -> None:
    logprobs, reference = draws(2)
    _, metrics = grpo(logprobs, logprobs, torch.zeros(3, 5, dtype=torch.float64), beta=0.1, reference=reference)
    ours = kl_estimate(logprobs, reference, "k3")[MASK].mean()
    assert ours.item() == pytest.approx(metrics["kl"][0], abs=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_leave_one_out_with_the_kl_in_the_reward_is_the_advantage_of_rloo(beta: float) -> None:
    from trl import RLOOTrainer

    rewards = draws(1, (2, 3), 1.0)[0]
    policy, reference = draws(2, (6, 4))
    lengths = [4, 1, 3, 2, 4, 4]
    mask = torch.arange(4)[None] < torch.tensor(lengths)[:, None]
    frozen = SimpleNamespace()
    trainer = stand_in(
        ref_model=frozen,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, per_device_eval_batch_size=6),
        _generate=lambda prompts: ([[5, 6]] * 6, [[7] * n for n in lengths], ["text"] * 6),
        _get_per_token_logps_and_entropies=lambda model, *_, **__: [reference if model is frozen else policy, 0, 0],
        _calculate_rewards=lambda *_: rewards.view(6, 1),
        reward_weights=torch.ones(1, dtype=torch.float64),
        reward_func_names=["exact"],
        reward_clip_range=None,
        num_generations_eval=3,
        normalize_advantages=False,
        beta=beta,
        _tokenizer=SimpleNamespace(pad_token_id=3),
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        _logs=defaultdict(list, rewards=defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
    )
    theirs = RLOOTrainer._generate_and_score_completions(trainer, [{"prompt": "x"}] * 6)["advantages"]
    kl = torch.where(mask, kl_estimate(policy, reference, "k1"), 0.0).sum(1).view(2, 3)
    torch.testing.assert_close(leave_one_out(rewards - beta * kl).flatten(), theirs, atol=1e-12, rtol=0)


def dpo(logprobs: Tensor, mask: Tensor, loss_type: str, beta: float, *reference: Tensor) -> tuple[Tensor, Any]:
    """Call DPOTrainer's loss on log-probabilities of tokens, chosen responses above the rejected ones."""
    from trl import DPOTrainer

    blank = torch.zeros_like(logprobs)
    outputs = SimpleNamespace(log_probs=logprobs, entropy=blank, mean_logits=blank, is_top1=blank.bool())
    trainer = stand_in(
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        use_weighting=False,
        beta=beta,
    )
    shifted = torch.cat([torch.zeros_like(mask[:, :1]), mask], 1).long()  # the first token is predicted by nothing
    inputs = {"input_ids": torch.ones_like(shifted), "completion_mask": shifted}
    inputs |= {"ref_chosen_logps": reference[0], "ref_rejected_logps": reference[1]}
    return DPOTrainer._compute_loss(trainer, lambda **_: outputs, inputs, False), trainer._metrics["eval"]


@pytest.mark.parametrize("beta", [0.1, 0.6])
def test_dpo_loss_is_the_sigmoid_loss_of_dpo(beta: float) -> None:
    policy, reference = draws(2, (6, 4), 2.0)
    policy.requires_grad_()
    sums = [part for x in (policy, reference) for part in x.sum(1).chunk(2)]
    theirs, logged = dpo(policy, torch.ones(6, 4), "sigmoid", beta, *sums[2:])
    ours, metrics = dpo_loss(*sums, 3.0, beta)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)
    gradients = [torch.autograd.grad(loss, policy, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)
    assert metrics["chosen_reward"] / 3 == pytest.approx(logged["rewards/chosen"][0], abs=1e-12)
    assert metrics["rejected_reward"] / 3 == pytest.approx(logged["rewards/rejected"][0], abs=1e-12)
    assert metrics["correct"] / 3 == pytest.approx(logged["rewards/accuracies"][0], abs=1e-6)


def test_chosen_nll_of_one_pair_is_the_sft_loss_of_dpo() -> None:
    """Of one pair: over several, TRL takes the mean over all tokens, ours the mean over pairs of means over tokens."""
    policy, zero = draws(1, (2, 4), 2.0)[0], torch.zeros(1, dtype=torch.float64)
    mask = torch.tensor([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    theirs, _ = dpo(policy * mask, mask, "sft", 0.1, zero, zero)
    ours = chosen_nll((policy * mask)[:1].sum(1), mask[:1].sum(1), 1.0)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)


def test_full_kl_loss_is_the_distillation_loss_of_gkd_from_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd import GKDTrainer

    policy, reference = draws(2, (3, 5, 7), 1.0)
    labels = torch.where(MASK, 1, -100)
    theirs = GKDTrainer.generalized_jsd_loss(policy, reference, labels, beta=0, num_items_in_batch=11)
    ours = full_kl_loss(policy, reference, MASK, 11.0)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)  # ours computes in float32


def test_preference_loss_is_the_bradley_terry_loss_of_reward() -> None:
    from trl import RewardTrainer

    chosen, rejected = (x.requires_grad_() for x in draws(2, (6, 1), 1.0))
    trainer = stand_in(args=SimpleNamespace(center_rewards_coefficient=None))
    outputs = SimpleNamespace(logits=torch.cat([chosen, rejected]))
    theirs = RewardTrainer.compute_loss(trainer, lambda **_: outputs, {"attention_mask": torch.ones(12, 4)})
    one = torch.ones(6, 1, dtype=torch.float64)
    ours, metrics = preference_loss(chosen, rejected, one[:, 0], one, denominator=6.0)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-12)
    for leaf in (chosen, rejected):
        gradients = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (ours, theirs)]
        torch.testing.assert_close(*gradients, atol=1e-12, rtol=0)
    logged = trainer._metrics["eval"]
    assert metrics["accuracy"] == pytest.approx(logged["accuracy"][0], abs=1e-6)
    assert metrics["margin"] == pytest.approx(logged["margin"][0], abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_token_logprobs_and_entropy_are_those_of_trl(temperature: float) -> None:
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logits = draws(1, (3, 5, 11), 2.0)[0].float()
    tokens = torch.randint(0, 11, (3, 5))
    theirs = selective_log_softmax(logits, tokens, temperature)
    torch.testing.assert_close(token_logprobs(logits, tokens, temperature), theirs, atol=1e-6, rtol=0)
    entropy = entropy_from_logits(logits / temperature)
    torch.testing.assert_close(token_entropy(logits, temperature), entropy, atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing` is deprecated:FutureWarning")  # TRL uses them
def test_dpo_from_tokens_to_gradients_is_that_of_a_dpo_trainer(tiny_model_dir: Path, tmp_path: Path) -> None:
    """The whole way: padding, the shift by one, sums over responses, loss; on a policy that has left its reference."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    rows = [
        ("what is 2 plus 3?", " 5.", " The answer is 7."),
        ("Plan: add.", " 2 + 3 = 5.", "?"),
        ("what", " is", " 3 3"),
    ]
    data = Dataset.from_list([{"prompt": p, "chosen": c, "rejected": r} for p, c, r in rows])
    options: Any = {"use_cpu": True, "bf16": False, "report_to": "none", "dataloader_pin_memory": False, "beta": 0.3}
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(tiny_model_dir),
        args=DPOConfig(str(tmp_path), per_device_train_batch_size=3, **options),
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(tiny_model_dir),
    )
    policy, reference = trainer.model.eval(), AutoModelForCausalLM.from_pretrained(tiny_model_dir).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    batch = next(iter(trainer.get_train_dataloader()))
    weight = policy.model.layers[0].self_attn.v_proj.weight
    theirs = trainer.compute_loss(policy, batch)
    (expected,) = torch.autograd.grad(theirs, weight)

    prompts, responses = [], []
    for ids, real, answer in zip(batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True):
        prompts.append(tuple(ids[(real == 1) & (answer == 0)].tolist()))
        responses.append(tuple(ids[answer == 1].tolist()))
    assert {response[-1] for response in responses} == {trainer.processing_class.eos_token_id}
    layout = pad_sequences(prompts, responses, pad_id=3)
    sums = []
    for model in (policy, reference):
        logprobs = response_logprobs(model, layout)
        sums += (logprobs * layout.response_mask).sum(1).chunk(2)
    ours, _ = dpo_loss(sums[0], sums[1], sums[2].detach(), sums[3].detach(), 3.0, 0.3)
    (found,) = torch.autograd.grad(ours, weight)
    assert abs(ours.item() - 0.6931) > 0.01
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-5)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
