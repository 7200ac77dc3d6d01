"""Which share of the steps each dataset gets: a search over mixtures, one finetuning run per
mixture, kept in a file.

First the given mixtures, then random ones from a Dirichlet distribution, then Bayesian optimisation
over all that were scored.

Source: arXiv:2509.20354, section 2.3 (a seed mixture, "10 random mixtures from Dirichlet
distributions", Bayesian optimisation). Not published: the Dirichlet parameter, what is optimised,
how many mixtures. Ours are 1 (all mixtures alike) and the caller's dev score.

The optimiser is a Gaussian process (scikit-learn) with expected improvement over mixtures drawn
from the simplex itself. It sees the square roots of the rates, points on a sphere: there no dataset
is special, a rate's doubling counts for more where the rate is small, and each mixture is one
point. Optimisers over a cube need a map from the cube to the simplex, which either favours some
datasets (stick-breaking) or gives one mixture many points (exponential draws, normalised).
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egemma_core.errors import ConfigError, InputError

Rates = dict[str, float]  # dataset to share; not negative, sum 1
CANDIDATES = 2000  # mixtures among which the next one is chosen
TOLERANCE = 1e-6  # two mixtures that move less than this share are one


@dataclass(frozen=True)
class Scored:
    """A mixture that a model was trained with."""

    rates: Rates
    score: float  # of the dev sets, higher is better


def even_rates(names: Sequence[str]) -> Rates:
    """The same share for each dataset."""
    return dict.fromkeys(names, 1 / len(names))


def dirichlet_rates(
    names: Sequence[str], count: int, concentration: float, seed: int
) -> list[Rates]:
    """Random mixtures, the same for the same arguments.

    Args:
        concentration: 1 makes every mixture as likely as any other; below, most are of few
            datasets; above, most are nearly even.
    """
    if count < 0 or not (math.isfinite(concentration) and concentration > 0):
        raise ConfigError(
            f"count={count}, concentration={concentration}: the first must not be negative, the "
            "second positive."
        )
    # (count, datasets)
    drawn = np.random.default_rng(seed).dirichlet(np.full(len(names), concentration), count)
    return [dict(zip(names, row, strict=True)) for row in drawn.tolist()]


def distance(one: Rates, other: Rates) -> float:
    """Total variation: the share of the steps that would go to another dataset."""
    return sum(abs(one[name] - other[name]) for name in one) / 2


class RateSearch:
    """Ask for a mixture, train with it, tell its score.

    All that is known lies in a file, one line per scored mixture, so a search that was stopped goes
    on where it was, and the next mixture follows from the file and `seed` alone.

    Args:
        names: the datasets, at least two.
        path: JSON lines, {"rates": {...}, "score": ...}; made when the first score is told.
        first: mixtures to begin with; empty for the even one.
        random: how many random ones follow.
        concentration: of these; see `dirichlet_rates`.

    Raises:
        ConfigError: names or mixtures that cannot work, or scikit-learn is missing.
        InputError: a line of the file is not a scored mixture of these datasets.
    """

    def __init__(
        self,
        names: Sequence[str],
        path: Path,
        *,
        seed: int,
        first: Sequence[Mapping[str, float]] = (),
        random: int = 10,
        concentration: float = 1.0,
    ) -> None:
        if len(names) < 2 or len(set(names)) < len(names):
            raise ConfigError(
                f"names={list(names)}: a mixture needs at least two datasets, each named once."
            )
        self.names, self.path, self.seed = tuple(names), path, seed
        given = [self._checked(rates) for rates in first] or [even_rates(names)]
        self.planned = [*given, *dirichlet_rates(names, random, concentration, seed)]
        self.history()

    def history(self) -> list[Scored]:
        """Every scored mixture, in the order in which they were told."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").split("\n")
        if lines.pop():
            raise InputError(
                f"{self.path}:{len(lines) + 1}: the last line is cut off. Remove it; its mixture "
                "is proposed again."
            )
        return [self._read(line, number) for number, line in enumerate(lines, start=1)]

    def propose(self) -> Rates:
        """The mixture to train with next."""
        done = self.history()
        for rates in self.planned:
            if all(distance(rates, scored.rates) > TOLERANCE for scored in done):
                return dict(rates)
        return self._improve(done)

    def tell(self, rates: Mapping[str, float], score: float) -> None:
        """Add one line to the file.

        Raises:
            InputError: the score is no finite number.
            ConfigError: the mixture is none of these datasets, or does not sum to 1.
        """
        if not math.isfinite(score):
            raise InputError(
                f"score={score} for {dict(rates)}: only finite scores say which mixture is better. "
                "Look at that run's log; do not tell it."
            )
        line = json.dumps({"rates": self._checked(rates), "score": float(score)}) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def best(self, count: int, apart: float = 0.05) -> list[Scored]:
        """The best mixtures, best first, each at least `apart` in total variation from those before
        it: runs to make a soup of. At most `count`.
        """
        chosen: list[Scored] = []
        for scored in sorted(self.history(), key=lambda scored: -scored.score):
            if len(chosen) < count and all(
                distance(scored.rates, other.rates) >= apart for other in chosen
            ):
                chosen.append(scored)
        return chosen

    def _improve(self, done: Sequence[Scored]) -> Rates:
        """The candidate with the largest expected improvement on what the process believes of the
        best mixture so far.
        """
        try:
            from scipy.stats import norm  # type: ignore[import-untyped]
            from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
            from sklearn.gaussian_process import GaussianProcessRegressor  # type: ignore[import-untyped]
            from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel  # type: ignore[import-untyped]
        except ImportError as error:
            raise ConfigError(
                "searching mixture rates needs scikit-learn: pip install 'egemma[train]'."
            ) from error
        # (told, datasets)
        told = np.array([[scored.rates[name] for name in self.names] for scored in done])
        scores = np.array([scored.score for scored in done])
        scores = (scores - scores.mean()) / max(scores.std(), 1e-12)
        candidates = self._candidates(told, scores)
        # Smooth, but no more; distances on the sphere are below 1.6. Runs differ by chance: the
        # white part is fitted, too.
        kernel = ConstantKernel(1.0) * Matern(
            length_scale=0.5, length_scale_bounds=(0.05, 5.0), nu=2.5
        ) + WhiteKernel(0.01, (1e-5, 1.0))
        process = GaussianProcessRegressor(kernel, random_state=0)
        with warnings.catch_warnings():
            # a length or noise at its bound is an answer, too
            warnings.simplefilter("ignore", ConvergenceWarning)
            process.fit(np.sqrt(told), scores)
        mean, deviation = process.predict(np.sqrt(candidates), return_std=True)
        above = mean - process.predict(np.sqrt(told)).max()  # (candidates,)
        deviation = np.maximum(deviation, 1e-12)
        improvement = above * norm.cdf(above / deviation) + deviation * norm.pdf(above / deviation)
        return dict(zip(self.names, candidates[int(np.argmax(improvement))].tolist(), strict=True))

    def _candidates(self, told: NDArray[Any], scores: NDArray[Any]) -> NDArray[Any]:
        """(CANDIDATES, datasets): a half of all mixtures, a quarter of few datasets, a quarter
        around the three best so far, near and wide.
        """
        draw = np.random.default_rng((self.seed, len(told)))
        datasets, quarter = len(self.names), CANDIDATES // 4
        best = told[np.argsort(-scores, kind="stable")[:3]]
        near = [
            draw.dirichlet(10 ** draw.uniform(1, 3) * best[draw.integers(len(best))] + 0.1)
            for _ in range(quarter)
        ]
        return np.concatenate(
            [
                draw.dirichlet(np.ones(datasets), CANDIDATES - 2 * quarter),
                draw.dirichlet(np.full(datasets, 0.4), quarter),
                near,
            ]
        )

    def _checked(self, rates: Mapping[str, float]) -> Rates:
        if set(rates) != set(self.names):
            raise ConfigError(
                f"a mixture of {sorted(rates)}, this search is over {sorted(self.names)}. Name "
                "every dataset; 0 leaves one out."
            )
        if (
            not all(math.isfinite(rate) and rate >= 0 for rate in rates.values())
            or abs(sum(rates.values()) - 1) > TOLERANCE
        ):
            raise ConfigError(
                f"rates {dict(rates)} sum to {sum(rates.values())}: want shares that are not "
                "negative and sum to 1."
            )
        return {name: float(rates[name]) for name in self.names}

    def _read(self, line: str, number: int) -> Scored:
        try:
            row = json.loads(line)
            scored = Scored(self._checked(row["rates"]), float(row["score"]))
        except (ValueError, TypeError, KeyError, AttributeError, ConfigError) as error:
            raise InputError(
                f"{self.path}:{number}: not a scored mixture of {list(self.names)} ({error}). Take "
                "another file for another search."
            ) from error
        if not math.isfinite(scored.score):
            raise InputError(f"{self.path}:{number}: score={scored.score}. Remove the line.")
        return scored
