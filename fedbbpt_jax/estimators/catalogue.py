"""Every gradient estimator by name. A plain table: a new estimator is a file and a row.

A row builds the estimator for q directions and a perturbation size c. Whoever has one of their own needs no row:
`module:factory` with a factory of the same form is a name too.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from typing import NamedTuple

from fedbbpt_jax.estimators import directions as d
from fedbbpt_jax.estimators import structured as s
from fedbbpt_jax.estimators.directions import Directions
from fedbbpt_jax.estimators.guided import guided_spsa
from fedbbpt_jax.estimators.reduction import with_anchor, with_control_variate
from fedbbpt_jax.estimators.spsa import one_sided_spsa, residual_feedback, spsa
from fedbbpt_jax.types import Estimator, ScalarOrSchedule

Build = Callable[[int, ScalarOrSchedule], Estimator]
"""`(q, c) -> estimator`."""


class Entry(NamedTuple):
    """A row of the table.

    Attributes:
      description: one line.
      build: `(q, c) -> estimator`.
      directions: `q -> directions`, for theory; None where no closed form holds.
      num_warmup: estimates to make before one that is typical.
    """

    description: str
    build: Build
    directions: Callable[[int], Directions] | None = None
    num_warmup: int = 0


def _two_sided(description: str, directions: Callable[[int], Directions]) -> Entry:
    return Entry(description, lambda q, c: spsa(directions(q), q, c), directions)


ESTIMATORS: dict[str, Entry] = {
    "spsa": _two_sided("two-sided, Rademacher directions, K = 2q evaluations (the default)", lambda q: d.rademacher()),
    "spsa-one-sided": Entry(
        "one-sided with a shared base point, Rademacher directions, K = q + 1",
        lambda q, c: one_sided_spsa(d.rademacher(), q, c),
        lambda q: d.rademacher(),
    ),
    "spsa-segmented": _two_sided("two-sided, BlackVIP's segmented uniform, inverse", lambda q: d.segmented_uniform()),
    "spsa-segmented-projection": _two_sided(
        "two-sided, segmented uniform, projection", lambda q: d.segmented_uniform_projection()
    ),
    "spsa-gaussian": _two_sided("two-sided, standard normal directions", lambda q: d.gaussian()),
    "spsa-sphere": _two_sided("two-sided, uniform on a sphere", lambda q: d.sphere()),
    "spsa-coordinate": _two_sided("two-sided, random axes", lambda q: d.coordinate()),
    "spsa-sparse": _two_sided("two-sided, signs on a tenth of the numbers", lambda q: d.sparse(0.1)),
    "spsa-orthogonal": _two_sided("two-sided, q orthogonal directions, q up to d", lambda q: s.orthogonal(q)),
    "spsa-hadamard": _two_sided("two-sided, randomised Hadamard rows: orthogonal signs", lambda q: s.hadamard()),
    "spsa-low-rank": _two_sided("two-sided, rank-1 signs for matrices", lambda q: s.low_rank(1)),
    "spsa-lattice": _two_sided("two-sided, quasi-random normal directions", lambda q: s.lattice()),
    "spsa-subspace": Entry(
        "two-sided, signs in a fixed random subspace of 32 dimensions (biased)",
        lambda q, c: spsa(s.subspace(32), q, c),
    ),
    "spsa-control-variate": Entry(
        "two-sided, Hadamard, with the linear prediction of past estimates as control variate",
        lambda q, c: with_control_variate(spsa(s.hadamard(), q, c)),
        num_warmup=20,
    ),
    "spsa-anchor": Entry(
        "two-sided, corrected at an anchor as in SVRG, K = 4q",
        lambda q, c: with_anchor(spsa(d.rademacher(), q, c), period=20),
        num_warmup=10,
    ),
    "spsa-guided": Entry(
        "two-sided, half of each direction within the span of the last 4 estimates (biased)",
        lambda q, c: guided_spsa(q, c),
        num_warmup=6,
    ),
    "residual": Entry(
        "one-point with residual feedback, Gaussian directions, K = q",
        lambda q, c: residual_feedback(d.gaussian(), q, c),
        num_warmup=1,
    ),
}


def find_estimator(name: str) -> Entry:
    """Returns the row of a name, or a row for a factory of your own named as `module:factory`.

    Args:
      name: of the table, or an import path; modules of the working directory are found.

    Raises:
      ValueError: there is no such row, module or factory.

    Example:
      >>> find_estimator("spsa").build(5, 0.05).num_candidates
      10
    """
    if name in ESTIMATORS:
        return ESTIMATORS[name]
    module_name, colon, factory_name = name.partition(":")
    if not colon:
        nearest = difflib.get_close_matches(name, ESTIMATORS, n=1, cutoff=0.0)[0]
        raise ValueError(f"unknown estimator {name!r}; did you mean {nearest!r}, or module:factory of your own?")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"cannot import estimator {name!r}: {error}") from error
    return Entry(f"{name}, your own", factory)
