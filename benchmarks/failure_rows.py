"""The rows of ``failure_modes.py``: which runs each needs, and what their figures say: pure functions of figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from failure_cells import Site
from failure_figures import difference, kept, length_matched_gain, points, share, standard_error
from label_curves import estimate

Cells = Mapping[Site, Mapping[str, Any]]
LABELS, MANY = 64, 256
NOISES = {"clean": "0%", "noise_10": "10%", "noise_20": "20%", "noise_30": "30%", "length_biased": "length-biased"}
CROSSINGS = ("clean", "noise_10", "noise_20", "length_biased")  # up to 20% of the labels are flipped
VERDICTS = 400
LEARNERS = ("full", "dpo")  # PPO and DPO, each as it comes
ERROR, LONGER, PLANS, NO_PLANS = 0.05, 1.25, 0.95, 0.05  # the marks


@dataclass(frozen=True)
class Finding:
    """What a row came to.

    Attributes:
        figure: in words.
        passed: whether the mark is met.
        values: the numbers behind it.
    """

    figure: str
    passed: bool
    values: dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A failure mode: its test, its mark, the runs that it needs of a seed, and how they are judged.

    ``everywhere``: they are judged together with the finished runs of all other rows.
    """

    words: str
    mark: str
    sites: Callable[[int], list[Site]]
    judge: Callable[[Cells], Finding]
    seeds: tuple[int, ...] = (0,)
    everywhere: bool = False


def _pick(cells: Cells, world: str, arm: str, budget: int | None = None) -> list[Mapping[str, Any]]:
    """Return the figures of a world's arm by seed."""
    found = [site for site in cells if (site.world, site.arm) == (world, arm) and budget in (None, site.budget)]
    return [cells[site] for site in sorted(found, key=lambda site: site.seed)]


def scrambled(cells: Cells) -> Finding:
    """Compare the method's scores with the same scores on the wrong questions."""
    found = difference(_pick(cells, "clean", "full", LABELS), _pick(cells, "clean", "scrambled", LABELS))
    told_apart = found["low"] > 0 or found["high"] < 0
    return Finding(f"accuracy with {LABELS} labels, full less scrambled: {points(found)}", told_apart, {**found})


def junk(cells: Cells) -> Finding:
    """Compare the shares of labels that go to junk, and accuracy."""
    shares = {arm: share(_pick(cells, "junk", arm), "junk") for arm in ("full", "uniform_ppo")}
    found = difference(_pick(cells, "junk", "full"), _pick(cells, "junk", "uniform_ppo"))
    figure = (
        f"labels on junk: full {shares['full']:.1%}, uniform {shares['uniform_ppo']:.1%}; accuracy, full less uniform: "
        f"{points(found)}"
    )
    passed = shares["full"] <= shares["uniform_ppo"] and found["value"] >= 0
    return Finding(figure, passed, {"shares": shares, "accuracy": dict(found)})


def noise(cells: Cells) -> Finding:
    """Compare estimated with true shares of flipped labels, and full with uniform."""
    rates, gains = dict[str, Any](), dict[str, Any]()
    for world in NOISES:
        runs = _pick(cells, world, "full", MANY)
        told = [run["rounds"][-1]["estimated_flip_rate"] if run["rounds"] else float("nan") for run in runs]
        true = [run["label_errors"]["share"] for run in runs]
        rates[world] = {"estimated": told, "true": true}
    for world in CROSSINGS:
        gains[world] = dict(difference(_pick(cells, world, "full", MANY), _pick(cells, world, "uniform_ppo", MANY)))
    errors = [e - t for rate in rates.values() for e, t in zip(rate["estimated"], rate["true"], strict=True)]
    estimates = ", ".join(
        f"{NOISES[w]}: {'/'.join(f'{x:.1%}' for x in r['estimated'])} (true {'/'.join(f'{x:.1%}' for x in r['true'])})"
        for w, r in rates.items()
    )
    accuracy = ", ".join(f"{NOISES[world]}: {points(gain)}" for world, gain in gains.items())
    passed = max(map(abs, errors)) <= ERROR and all(gain["value"] >= 0 for gain in gains.values())
    figure = f"estimated flips of {MANY} labels: {estimates}; accuracy, full less uniform: {accuracy}"
    return Finding(figure, passed, {"rates": rates, "accuracy": gains})


def over_optimised(cells: Cells) -> Finding:
    """Say whether accuracy falls while the reward rises, and where the guard stops."""
    start = _pick(cells, "clean", "sft")[0]
    free, guarded = (_pick(cells, "all_at_once", arm)[0] for arm in ("believed", "guarded"))
    curves = {name: [{"step": 0, **start}, *run["curve"]] for name, run in (("free", free), ("guarded", guarded))}
    peak = max(curves["free"], key=lambda point: point["accuracy"])
    fall = estimate(np.array([free["correct"]], float) - np.array([peak["correct"]], float))
    rewards = {
        n: np.mean([x["reward"] for x in free["steps"] if x["round"] == n]) for n in (1, free["steps"][-1]["round"])
    }
    own = max(point["accuracy"] for point in curves["guarded"])
    error = standard_error(own, len(guarded["correct"]))
    falls, stops = fall["high"] < 0 and rewards[max(rewards)] > rewards[1], guarded["accuracy"] >= own - error
    figure = (
        f"without the guard accuracy {start['accuracy']:.1%}, at best {peak['accuracy']:.1%} (step {peak['step']}), at "
        f"the end {free['accuracy']:.1%} ({points(fall)} from the best) as the reward goes {rewards[1]:.2f} → "
        f"{rewards[max(rewards)]:.2f}; with it {guarded['accuracy']:.1%}, best of its run {own:.1%}, standard error "
        f"{100 * error:.1f}; stopped: {(guarded['stopped'] or 'no').split(':')[0]}"
    )
    values = {
        "curves": {k: [{"step": p["step"], "accuracy": p["accuracy"]} for p in curve] for k, curve in curves.items()},
        "rewards": [step["reward"] for step in free["steps"]],
        "guarded": {"stopped": guarded["stopped"], "held_out": [x["held_out_accuracy"] for x in guarded["rounds"]]},
        **{"fall": dict(fall), "falls": bool(falls), "stops_in_time": bool(stops)},
    }
    return Finding(figure, bool(falls and stops), values)


def length(cells: Cells) -> Finding:
    """Compare lengths, and what is gained among responses of equal length, where people reward length."""
    start, values = _pick(cells, "clean", "sft"), dict[str, Any]()
    chosen: list[tuple[str, int, str, int]] = [
        ("length_lover", LABELS, "taste", 2),
        ("length_biased", MANY, "right", 10),
    ]
    for world, budget, of, width in chosen:
        runs = _pick(cells, world, "full", budget)
        pairs = list(zip(start, runs, strict=False))
        tokens = [[kept(run, "tokens", of) for run in pair] for pair in pairs]
        before, after = (float(np.mean([np.mean(pair[side]) for pair in tokens])) for side in (0, 1))
        gain = length_matched_gain(pairs, of, width)
        values[world] = {"before": before, "after": after, "ratio": after / before, "gain": gain}
    told = [
        f"{words}: {found['before']:.1f} → {found['after']:.1f} tokens ({found['ratio'] - 1:+.0%}), gain at equal "
        f"length {found['gain']['value']:+.3f} [{found['gain']['low']:+.3f}, {found['gain']['high']:+.3f}] of {unit}"
        for words, unit, found in (
            ("open prompts, preferences for length", "taste", values["length_lover"]),
            ("exact prompts, verdicts for length", "accuracy", values["length_biased"]),
        )
    ]
    passed = all(found["ratio"] <= LONGER and found["gain"]["value"] > 0 for found in values.values())
    return Finding("; ".join(told), passed, values)


def useless(cells: Cells) -> Finding:
    """Say when noise in place of the model's confidence is found out."""
    values = {world: _fallbacks(_pick(cells, world, "full", MANY)[0]) for world in ("noisy_trust", "asking")}
    found = values["noisy_trust"]
    if found["possible"] is None:
        return Finding("never tested: fewer than 16 uniform verdicts", False, values)
    real = values["asking"]["fallback"]
    figure = (
        f"tested from round {found['possible']} on ({found['uniform_verdicts']} uniform verdicts, {found['labels']:g} "
        f"of {MANY} labels spent), fell back in round {found['fallback'] or 'none'}; the real confidence, in the same "
        f"rounds, {f'fell back in round {real}' if real else 'was used throughout'}"
    )
    return Finding(figure, found["fallback"] is not None and found["fallback"] <= found["possible"] + 1, values)


def _fallbacks(run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the first round that could test, the first that fell back, and what had been spent by then."""
    tested = [x for x in run["rounds"] if not str(x["trust_test"]).startswith("not tested yet")]
    fallen = [x["round"] for x in run["rounds"] if x["fallback"]]
    first = tested[0]["round"] if tested else None
    before = run["rounds"][: first - 1] if first else []
    return {
        "possible": first,
        "fallback": fallen[0] if fallen else None,
        "uniform_verdicts": sum(x["uniform_verdicts"] for x in before),
        "labels": run["labels"]["first"] + sum(x["labels_bought"] for x in before),
        "words": [x["trust_test"] for x in tested],
    }


def displacement(cells: Cells) -> Finding:
    """Say how log p(chosen) stands to the reference over DPO's rounds."""
    values = {}
    for number, run in enumerate(_pick(cells, "with_taste", "dpo", MANY)):
        steps = [x for x in run["steps"] if x["chosen_log_ratio"] is not None]
        rounds = sorted({x["round"] for x in steps})
        values[number] = [float(np.mean([x["chosen_log_ratio"] for x in steps if x["round"] == n])) for n in rounds]
    told = "; ".join(", ".join(f"{x:+.2f}" for x in ratios) for ratios in values.values())
    passed = all(ratios and min(ratios) >= 0 for ratios in values.values())
    return Finding(
        f"log p(chosen) less the reference's, nats per response, by round: {told}", passed, {"rounds": values}
    )


def forgetting(cells: Cells) -> Finding:
    """Compare plain kinds with SFT: right answers, and taste where there are none."""
    values: dict[str, Any] = {}
    for arm in LEARNERS:
        changes: dict[str, list[float]] = {}
        for before, after in zip(_pick(cells, "clean", "sft"), _pick(cells, "with_taste", arm, MANY), strict=False):
            rows = zip(before["kinds"], before["right"], after["right"], before["taste"], after["taste"], strict=True)
            for kind, was, now, liked, likes in rows:
                if kind in ("colour", "opposite"):
                    changes.setdefault(kind, []).append(float(now) - float(was))
                elif liked is not None:
                    changes.setdefault(kind, []).append(likes - liked)
        for kind, gains in sorted(changes.items()):
            error = float(np.std(gains, ddof=1) / len(gains) ** 0.5) if len(gains) > 1 else 0.0
            values[f"{arm} {kind}"] = {"change": float(np.mean(gains)), "standard_error": error, "n": len(gains)}
    told = ", ".join(f"{k} {x['change']:+.3f} (± {x['standard_error']:.3f})" for k, x in values.items())
    passed = all(x["change"] >= -x["standard_error"] for x in values.values())
    return Finding(f"change from SFT (standard error), taste where nothing is exact: {told}", passed, values)


def plans(cells: Cells) -> Finding:
    """Say how many responses have a plan."""
    runs = [run for arm in LEARNERS for run in _pick(cells, "with_taste", arm, MANY)]
    least = min(run["plans"]["reasoning"] for run in runs)
    most = max(run["plans"]["other"] for run in runs)
    values = {"reasoning": least, "other": most, "runs": len(runs)}
    figure = f"at least {least:.1%} of reasoning prompts, at most {most:.1%} of the others ({len(runs)} runs)"
    return Finding(figure, least >= PLANS and most <= NO_PLANS, values)


def leaks(cells: Cells) -> Finding:
    """Compare labels with calls of the labeller and reads of gold answers, in the rl stages of all runs."""
    calls = [run["calls"] for run in cells.values() if "calls" in run]
    total = {name: sum(call[name] for call in calls) for name in calls[0]}
    figure = (
        f"{len(calls)} rl stages: {total['labels']} labels in the ledger, {total['labeler']} questions answered, "
        f"{total['pool_answers_read']} gold answers of the pool read, {total['test_answers_read']} of the test set"
    )
    equal = all(c["labels"] == c["labeler"] >= c["pool_answers_read"] and not c["test_answers_read"] for c in calls)
    return Finding(figure, equal, total)


def _sites(*wanted: tuple[str, Sequence[str], int]) -> Callable[[int], list[Site]]:
    """Return the sites of a seed: SFT's, and those of some worlds' arms at a budget."""
    return lambda seed: [
        Site("clean", "sft", 0, seed),
        *(Site(world, arm, budget, seed) for world, arms, budget in wanted for arm in arms),
    ]


BOTH = ("full", "uniform_ppo")
ROWS: Mapping[str, Row] = {
    "forgetting": Row(
        "knowledge, creative and chat prompts after RL",
        "every kind within 1 standard error of SFT",
        _sites(("with_taste", LEARNERS, MANY)), forgetting,
    ),
    "displacement": Row(
        "log p(chosen) during DPO", "not under the reference in any round", _sites(("with_taste", ("dpo",), MANY)),
        displacement,
    ),
    "mode_collapse": Row(
        "share of responses with a plan", "reasoning at least 95%, others at most 5%",
        _sites(("with_taste", LEARNERS, MANY)), plans,
    ),
    "useless_uncertainty": Row(
        "the model's confidence replaced by noise", "falls back within one round of the first test",
        _sites(("noisy_trust", ("full",), MANY), ("asking", ("full",), MANY)), useless,
    ),
    "over_optimisation": Row(
        f"the mean of a reward model from {VERDICTS} uniform verdicts, nothing else",
        "accuracy falls as the reward rises without the guard; with it, the policy kept is within 1 standard error of "
        "the best",
        _sites(("all_at_once", ("believed", "guarded"), VERDICTS)), over_optimised,
    ),
    "label_noise": Row(
        "flipped verdicts, 0 to 30%, symmetric; 20%, for length",
        "estimated share of flips within 5 points; full not under uniform up to 20%",
        _sites(*((w, BOTH if w in CROSSINGS else BOTH[:1], MANY) for w in NOISES)), noise,
    ),
    "garbage_outliers": Row(
        "15% of the pool gibberish, unanswerable or truncated",
        "share of labels on junk at most uniform's; accuracy not under uniform's",
        _sites(("junk", BOTH, LABELS)), junk, (0, 1),
    ),
    "no_better_than_random": Row(
        "scrambled acquisition scores", "the interval of the difference excludes 0",
        _sites(("clean", ("full", "scrambled"), LABELS)), scrambled, (0, 1),
    ),
    "length_hacking": Row(
        "people who reward length", "mean length at most +25%, gain at equal length above 0",
        _sites(("length_lover", ("full",), LABELS), ("length_biased", ("full",), MANY)), length,
    ),
    "leaked_labels": Row(
        "labeller calls against ledger rows", "equal, and no answer of the test set read in training",
        _sites(("with_taste", ("full",), MANY)), leaks, everywhere=True,
    ),
}  # fmt: skip
