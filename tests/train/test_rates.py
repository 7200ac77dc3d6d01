"""Mixtures are shares, the search resumes from its file to the very same proposal, and it finds
better mixtures than chance does.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from egemma_core.errors import ConfigError, InputError, MissingDependencyError
from egemma_train.mixtures.rates import Rates, RateSearch, dirichlet_rates, distance, even_rates

NAMES = ("questions", "titles", "code", "similarity")
BEST = (0.45, 0.05, 0.35, 0.15)  # the mixture that the made-up dev score wants


def score(rates: Rates) -> float:
    """Concave, 0 at its best."""
    return -sum((rates[name] - best) ** 2 for name, best in zip(NAMES, BEST, strict=True))


def step(search: RateSearch) -> Rates:
    rates = search.propose()
    search.record(rates, score(rates))
    return rates


def test_dirichlet_mixtures_are_shares_with_the_moments_of_the_distribution() -> None:
    drawn = dirichlet_rates(NAMES, 20_000, 2.0, 0)
    shares = np.array([list(rates.values()) for rates in drawn])
    assert all(tuple(rates) == NAMES for rates in drawn)
    assert shares.min() >= 0
    np.testing.assert_allclose(shares.sum(1), 1, atol=1e-12)
    # Mean a/A, variance a(A - a) / (A²(A + 1)) with a = 2, A = 8.
    np.testing.assert_allclose(shares.mean(0), 0.25, atol=0.005)
    np.testing.assert_allclose(shares.var(0), 2 * 6 / (64 * 9), rtol=0.05)
    assert dirichlet_rates(NAMES, 3, 1.0, 0) == dirichlet_rates(NAMES, 3, 1.0, 0)
    assert dirichlet_rates(NAMES, 1, 1.0, 0) != dirichlet_rates(NAMES, 1, 1.0, 1)
    with pytest.raises(ConfigError, match="concentration=0"):
        dirichlet_rates(NAMES, 1, 0, 0)


def test_the_given_mixtures_come_first_then_the_random_ones_then_others(tmp_path: Path) -> None:
    given = {"questions": 0.7, "titles": 0.0, "code": 0.3, "similarity": 0.0}
    search = RateSearch(NAMES, tmp_path / "study.jsonl", seed=3, first=[given], random=2)
    planned = [given, *dirichlet_rates(NAMES, 2, 1.0, 3)]
    assert [step(search) for _ in range(3)] == planned
    later = [step(search) for _ in range(3)]
    for rates in later:
        assert tuple(rates) == NAMES
        assert min(rates.values()) >= 0
        assert sum(rates.values()) == pytest.approx(1, abs=1e-9)
        assert min(distance(rates, early) for early in planned) > 1e-6
    assert [scored.rates for scored in search.history()] == planned + later
    assert RateSearch(NAMES, tmp_path / "other.jsonl", seed=3).propose() == even_rates(NAMES)


def test_a_resumed_search_proposes_what_an_unbroken_one_does(tmp_path: Path) -> None:
    unbroken = RateSearch(NAMES, tmp_path / "one.jsonl", seed=0, random=3)
    expected = [step(unbroken) for _ in range(6)]
    found = []
    for _ in range(6):
        found.append(step(RateSearch(NAMES, tmp_path / "two.jsonl", seed=0, random=3)))
    assert found == expected
    assert (tmp_path / "one.jsonl").read_text() == (tmp_path / "two.jsonl").read_text()
    (tmp_path / "three.jsonl").write_text(
        "".join((tmp_path / "one.jsonl").read_text().splitlines(keepends=True)[:5])
    )
    assert RateSearch(NAMES, tmp_path / "three.jsonl", seed=1, random=0).propose() != expected[5], (
        "the seed counts"
    )


def test_the_search_beats_as_many_random_mixtures(tmp_path: Path) -> None:
    """Mean over seeds of the best mixture's distance from the optimum, with noise of 0.02 on every
    score.
    """
    found, chance = [], []
    for seed in range(3):
        noise = np.random.default_rng(seed)
        search = RateSearch(NAMES, tmp_path / f"{seed}.jsonl", seed=seed)
        for _ in range(19):
            rates = search.propose()
            search.record(rates, score(rates) + noise.normal(0, 0.02))
        found.append(score(search.best(1)[0].rates))
        drawn = [even_rates(NAMES), *dirichlet_rates(NAMES, 18, 1.0, seed)]
        chance.append(
            score(drawn[int(np.argmax([score(rates) + noise.normal(0, 0.02) for rates in drawn]))])
        )
    assert np.mean(found) > np.mean(chance) / 2, f"search {found}, chance {chance}"


def test_no_dataset_is_special_to_the_search(tmp_path: Path) -> None:
    """Whichever dataset alone is right, it is found."""
    for name in (NAMES[0], NAMES[-1]):
        search = RateSearch(NAMES, tmp_path / f"{name}.jsonl", seed=0, random=4)
        for _ in range(10):
            rates = search.propose()
            search.record(rates, rates[name])
        best = search.best(1)[0].rates
        assert best[name] > 0.9, best


def test_the_best_mixtures_are_apart_from_each_other(tmp_path: Path) -> None:
    search = RateSearch(("a", "b"), tmp_path / "study.jsonl", seed=0)
    for share, value in ((0.50, 0.7), (0.52, 0.9), (0.90, 0.8), (0.60, 0.85), (0.1, 0.1)):
        search.record({"a": share, "b": 1 - share}, value)
    assert [scored.rates["a"] for scored in search.best(3)] == [0.52, 0.60, 0.90]
    assert [scored.rates["a"] for scored in search.best(3, apart=0.0)] == [0.52, 0.60, 0.90]
    assert [scored.score for scored in search.best(2, apart=0.3)] == [0.9, 0.8]
    assert len(search.best(5)) == 4


def test_a_score_that_is_no_number_is_refused(tmp_path: Path) -> None:
    search = RateSearch(NAMES, tmp_path / "study.jsonl", seed=0)
    for bad in (float("nan"), float("inf"), float("-inf")):
        with pytest.raises(InputError, match="finite"):
            search.record(search.propose(), bad)
    assert not (tmp_path / "study.jsonl").exists()


@pytest.mark.parametrize(
    ("rates", "message"),
    [
        ({"a": 1.0}, r"this search is over \['a', 'b'\]"),
        ({"a": 0.5, "b": 0.25, "c": 0.25}, r"mixture of \['a', 'b', 'c'\]"),
        ({"a": 0.5, "b": 0.6}, "sum to 1.1"),
        ({"a": 1.5, "b": -0.5}, "not negative"),
        ({"a": float("nan"), "b": 0.5}, "not negative"),
    ],
)
def test_rates_that_are_no_mixture_of_these_datasets_are_refused(
    rates: Rates, message: str, tmp_path: Path
) -> None:
    search = RateSearch(("a", "b"), tmp_path / "study.jsonl", seed=0)
    with pytest.raises(ConfigError, match=message):
        search.record(rates, 0.5)
    with pytest.raises(ConfigError, match=message):
        RateSearch(("a", "b"), tmp_path / "study.jsonl", seed=0, first=[rates])
    with pytest.raises(ConfigError, match="at least two"):
        RateSearch(("a", "a"), tmp_path / "study.jsonl", seed=0)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        ('{"rates": {"a": 0.5, "b": 0.5}}', "'score'"),
        ('{"rates": {"a": 0.5, "x": 0.5}, "score": 1}', "this search is over"),
        ('{"rates": {"a": 0.5, "b": 0.5}, "score": NaN}', "score=nan"),
        ('{"rates": {"a": 0.5, "b": "half"}, "score": 1}', "not a scored mixture"),
        ('["a"]', "not a scored mixture"),
        ("", "not a scored mixture"),
    ],
)
def test_a_bad_line_of_the_file_is_named(second: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    path.write_text(
        json.dumps({"rates": {"a": 0.4, "b": 0.6}, "score": 0.5}) + "\n" + second + "\n"
    )
    with pytest.raises(InputError, match=f"study.jsonl, line 2: .*{message}"):
        RateSearch(("a", "b"), path, seed=0)


def test_a_line_that_was_cut_off_is_named(tmp_path: Path) -> None:
    path = tmp_path / "study.jsonl"
    search = RateSearch(("a", "b"), path, seed=0)
    step_rates = search.propose()
    search.record(step_rates, 1.0)
    search.record({"a": 0.3, "b": 0.7}, 1.0)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"study.jsonl, line 2: the line is cut off"):
        search.propose()


def test_equal_scores_still_give_a_mixture(tmp_path: Path) -> None:
    search = RateSearch(("a", "b"), tmp_path / "study.jsonl", seed=0, random=1)
    for _ in range(4):
        search.record(search.propose(), 0.5)
    assert sum(search.propose().values()) == pytest.approx(1)


def test_a_missing_library_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    search = RateSearch(("a", "b"), tmp_path / "study.jsonl", seed=0, random=0)
    search.record(search.propose(), 0.5)
    monkeypatch.setitem(sys.modules, "sklearn.gaussian_process", None)
    with pytest.raises(MissingDependencyError, match=r"egemma\[train\]"):
        search.propose()
