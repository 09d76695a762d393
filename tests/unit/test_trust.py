"""Whether uncertainty deserves trust: the bound against simulation, and the sentence."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import spearmanr

from trlhf.targeting.trust import spearman, spearman_lower_bound, trust_test


def pairs(rng: np.random.Generator, rho: float, n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return normal pairs whose Spearman correlation is ``rho``."""
    r = 2 * np.sin(np.pi * rho / 6)
    x = rng.normal(size=n)
    return x, r * x + np.sqrt(1 - r**2) * rng.normal(size=n)


@pytest.mark.parametrize("seed", range(5))
def test_the_rank_correlation_is_scipy_s_with_ties(seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 6, 30).astype(float), rng.normal(size=30)
    assert spearman(x, y) == pytest.approx(spearmanr(x, y).statistic)
    assert spearman(x, np.exp(x)) == pytest.approx(1.0) and spearman(x, -x) == pytest.approx(-1.0)
    assert spearman(x, np.ones(30)) is None


def test_the_bound_by_hand() -> None:
    x = np.arange(10.0)
    y = np.array([0, 2, 1, 4, 3, 6, 5, 9, 8, 7.0])
    rho = 1 - 6 * 14 / 990  # Σd² = 2 + 2 + 2 + 4 + 4
    assert spearman(x, y) == pytest.approx(rho)
    # se = √((1 + r²/2)/7) = 0.45020, z = 1.28155
    assert spearman_lower_bound(x, y) == pytest.approx(np.tanh(np.arctanh(rho) - 1.2815516 * 0.4501984), abs=1e-6)


@pytest.mark.parametrize(("rho", "n"), [(0.0, 20), (0.3, 40), (0.6, 12)])
def test_the_bound_is_below_the_truth_as_often_as_it_says(rho: float, n: int) -> None:
    rng = np.random.default_rng(0)
    below = np.mean([spearman_lower_bound(*pairs(rng, rho, n)) <= rho for _ in range(1000)])
    assert below == pytest.approx(0.9, abs=0.035)


def test_more_confidence_and_fewer_items_lower_the_bound() -> None:
    x, y = pairs(np.random.default_rng(1), 0.5, 60)
    assert spearman_lower_bound(x, y, 0.99) < spearman_lower_bound(x, y, 0.9) < spearman(x, y)  # type: ignore[operator]
    twice = np.tile(x, 2), np.tile(y, 2)
    assert spearman_lower_bound(x, y) < spearman_lower_bound(*twice)


def test_the_bound_feels_ranks_only() -> None:
    x, y = pairs(np.random.default_rng(2), 0.5, 30)
    assert spearman_lower_bound(np.exp(x), y**3) == pytest.approx(spearman_lower_bound(x, y))


def test_too_few_or_constant_items_cannot_say() -> None:
    assert spearman_lower_bound(np.arange(7.0), np.arange(7.0)) == -1
    assert spearman_lower_bound(np.ones(20), np.arange(20.0)) == -1
    assert spearman_lower_bound(np.arange(8.0), np.arange(8.0)) > 0.9


def test_useless_uncertainty_fails_and_useful_passes() -> None:
    rng = np.random.default_rng(3)
    useless = [trust_test(*pairs(rng, 0.0, 60)).passed for _ in range(300)]
    useful = [trust_test(*pairs(rng, 0.6, 60)).passed for _ in range(300)]
    assert np.mean(useless) < 0.06 and np.mean(useful) > 0.95


def test_the_bound_asked_for_is_the_bound_tested() -> None:
    x, y = pairs(np.random.default_rng(5), 0.3, 60)
    sure, unsure = trust_test(x, y, confidence=0.99), trust_test(x, y, confidence=0.6)
    assert (sure.lower, unsure.lower) == (spearman_lower_bound(x, y, 0.99), spearman_lower_bound(x, y, 0.6))
    bar = (sure.lower + unsure.lower) / 2
    assert not trust_test(x, y, bar, 0.99).passed and trust_test(x, y, bar, 0.6).passed
    assert not trust_test(x, y, least=unsure.lower, confidence=0.6).passed


def test_the_words_say_what_was_found() -> None:
    x, y = pairs(np.random.default_rng(4), 0.7, 50)
    good, bad = trust_test(x, y), trust_test(x, -y)
    assert good.passed and good.n == 50 and good.lower > 0.1
    assert good.words == (
        f"the uncertainty foretells errors: rank correlation {good.rho:.2f} on 50 held-out labels, lower 90% bound "
        f"{good.lower:.2f}, above 0.1; it is used"
    )
    assert not bad.passed and "does not reliably foretell errors" in bad.words and bad.words.endswith("it is not used")
    few = trust_test(x[:5], y[:5])
    assert (few.passed, few.lower, few.n) == (False, -1, 5) and "5 held-out labels, at least 8 are needed" in few.words
    flat = trust_test(np.ones(50), y)
    assert (flat.passed, flat.rho) == (False, None) and "the same for all 50" in flat.words


def test_errors_name_value_rule_and_remedy() -> None:
    with pytest.raises(ValueError, match="8 uncertainties and 9 errors; give one of each an item"):
        spearman_lower_bound(np.ones(8), np.ones(9))
    with pytest.raises(ValueError, match="uncertainty and error must be finite"):
        trust_test(np.full(8, np.nan), np.ones(8))
    with pytest.raises(ValueError, match=r"confidence=1\.0 must be between 0 and 1"):
        spearman_lower_bound(np.ones(8), np.ones(8), 1.0)
