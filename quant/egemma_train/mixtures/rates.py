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
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from egemma_core.checks import number, whole_number
from egemma_core.errors import ConfigError, InputError, MissingDependencyError
from egemma_core.files import flush
from egemma_core.json_lines import BadRowError, lines_of, parse_row
from egemma_train.data.json_rows import bad_row

Rates = dict[str, float]  # dataset to share; not negative, sum 1
CANDIDATES = 2000  # mixtures among which the next one is chosen
TOLERANCE = 1e-6  # two mixtures that move less than this share are one


@dataclass(frozen=True)
class Scored:
    """A mixture that a model was trained with."""

    rates: Rates
    score: float  # of the dev sets, higher is better


def even_rates(names: Sequence[str]) -> Rates:
    """Return the mixture with the same share for each dataset."""
    return dict.fromkeys(names, 1 / len(names))


def dirichlet_rates(
    names: Sequence[str], count: int, concentration: float, seed: int
) -> list[Rates]:
    """Return random mixtures, the same for the same arguments.

    Args:
        concentration: 1 makes every mixture as likely as any other; below, most are of few
            datasets; above, most are nearly even.
    """
    whole_number("count", count, 0)
    number("concentration", concentration, above=0)
    # (count, datasets)
    drawn = np.random.default_rng(seed).dirichlet(np.full(len(names), concentration), count)
    return [dict(zip(names, row, strict=True)) for row in drawn.tolist()]


def distance(one: Rates, other: Rates) -> float:
    """Return the share of the steps that would go to another dataset: the total variation."""
    return sum(abs(one[name] - other[name]) for name in one) / 2


class RateSearch:
    """A search for the best mixture: propose one, train with it, record its score.

    All that is known lies in a file, one line per scored mixture, so a search that was stopped goes
    on where it was, and the next mixture follows from the file and `seed` alone.

    Args:
        names: the datasets, at least two.
        path: JSON lines, {"rates": {...}, "score": ...}; made when the first score is recorded.
        first: mixtures to begin with; empty for the even one.
        random: how many random ones follow.
        concentration: of these; see `dirichlet_rates`.

    Raises:
        ConfigError: names or mixtures that cannot work.
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
                f"names={list(names)} make no mixture, which needs at least two datasets, each "
                "named once."
            )
        self.names, self.path, self.seed = tuple(names), path, seed
        given = [self._checked(rates) for rates in first] or [even_rates(names)]
        self.planned = [*given, *dirichlet_rates(names, random, concentration, seed)]
        self.history()

    def history(self) -> list[Scored]:
        """Return every scored mixture, in the order in which they were recorded.

        Raises:
            InputError: a line is not a scored mixture of these datasets.
        """
        if not self.path.exists() or not self.path.stat().st_size:
            return []
        return [self._read(line, number) for number, line in lines_of(self.path)]

    def propose(self) -> Rates:
        """Return the mixture to train with next.

        Raises:
            MissingDependencyError: scikit-learn is missing.
        """
        done = self.history()
        for rates in self.planned:
            if all(distance(rates, scored.rates) > TOLERANCE for scored in done):
                return dict(rates)
        return self._improve(done)

    def record(self, rates: Mapping[str, float], score: float) -> None:
        """Add one line to the file.

        Raises:
            InputError: the score is no finite number.
            ConfigError: the mixture is none of these datasets, or does not sum to 1.
        """
        if not math.isfinite(score):
            raise InputError(
                f"score={score} for {dict(rates)}: only finite scores say which mixture is better.",
                hint="Look at that run's log, and leave it out.",
            )
        line = json.dumps({"rates": self._checked(rates), "score": float(score)}) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)
        flush(self.path)
        flush(self.path.parent)

    def best(self, count: int, apart: float = 0.05) -> list[Scored]:
        """Return at most `count` mixtures to make a soup of, the best first.

        Each is at least `apart` in total variation from those before it.
        """
        chosen: list[Scored] = []
        for scored in sorted(self.history(), key=lambda scored: -scored.score):
            if len(chosen) < count and all(
                distance(scored.rates, other.rates) >= apart for other in chosen
            ):
                chosen.append(scored)
        return chosen

    def _improve(self, done: Sequence[Scored]) -> Rates:
        """Return the candidate with the largest expected improvement.

        It is measured from what the process believes of the best mixture so far.
        """
        try:
            from scipy.stats import norm  # type: ignore[import-untyped]
            from sklearn.exceptions import ConvergenceWarning  # type: ignore[import-untyped]
            from sklearn.gaussian_process import GaussianProcessRegressor  # type: ignore[import-untyped]
            from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel  # type: ignore[import-untyped]
        except ImportError as error:
            raise MissingDependencyError(
                "Searching mixture rates needs scikit-learn.", hint="pip install 'egemma[train]'"
            ) from error
        # (scored, datasets)
        known = np.array([[scored.rates[name] for name in self.names] for scored in done])
        scores = np.array([scored.score for scored in done])
        scores = (scores - scores.mean()) / max(scores.std(), 1e-12)
        candidates = self._candidates(known, scores)
        # Smooth, but no more; distances on the sphere are below 1.6. Runs differ by chance: the
        # white part is fitted, too.
        kernel = ConstantKernel(1.0) * Matern(
            length_scale=0.5, length_scale_bounds=(0.05, 5.0), nu=2.5
        ) + WhiteKernel(0.01, (1e-5, 1.0))
        process = GaussianProcessRegressor(kernel, random_state=0)
        with warnings.catch_warnings():
            # a length or noise at its bound is an answer, too
            warnings.simplefilter("ignore", ConvergenceWarning)
            process.fit(np.sqrt(known), scores)
        mean, deviation = process.predict(np.sqrt(candidates), return_std=True)
        above = mean - process.predict(np.sqrt(known)).max()  # (candidates,)
        deviation = np.maximum(deviation, 1e-12)
        improvement = above * norm.cdf(above / deviation) + deviation * norm.pdf(above / deviation)
        return dict(zip(self.names, candidates[int(np.argmax(improvement))].tolist(), strict=True))

    def _candidates(self, known: NDArray[Any], scores: NDArray[Any]) -> NDArray[Any]:
        """Return (CANDIDATES, datasets) mixtures among which the next one is chosen.

        A half is drawn from all mixtures, a quarter from those of few datasets, and a quarter
        around the three best so far, near and wide.
        """
        draw = np.random.default_rng((self.seed, len(known)))
        datasets, quarter = len(self.names), CANDIDATES // 4
        best = known[np.argsort(-scores, kind="stable")[:3]]
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
                f"This is a mixture of {sorted(rates)}, and this search is over "
                f"{sorted(self.names)}.",
                hint="Name every dataset; 0 leaves one out.",
            )
        if (
            not all(math.isfinite(rate) and rate >= 0 for rate in rates.values())
            or abs(sum(rates.values()) - 1) > TOLERANCE
        ):
            raise ConfigError(
                f"The rates {dict(rates)} sum to {sum(rates.values())}; they must be shares that "
                "are not negative and sum to 1."
            )
        return {name: float(rates[name]) for name in self.names}

    def _read(self, line: bytes, number: int) -> Scored:
        if not line.endswith(b"\n"):
            hint = "Remove it; its mixture is proposed again."
            raise bad_row(self.path, number, "the line is cut off.", hint=hint)
        try:
            row = parse_row(line, number)
            scored = Scored(self._checked(row["rates"]), float(row["score"]))
        except (BadRowError, ValueError, TypeError, KeyError, AttributeError) as error:
            problem = f"not a scored mixture of {list(self.names)} ({error})."
            hint = "Take another file for another search."
            raise bad_row(self.path, number, problem, hint=hint) from error
        if not math.isfinite(scored.score):
            problem = f"score={scored.score} is not finite."
            raise bad_row(self.path, number, problem, hint="Remove the line.")
        return scored
