"""Scorers by name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from scorers.base import Scorer
from scorers.gaussian import Gaussian
from utils.errors import UserError

SCORERS: dict[str, type[Scorer]] = {scorer.name: scorer for scorer in (Gaussian,)}
RELEASE_SCORER = Gaussian.name  # what the release scores with: the default of train.py and test.py


def make_scorer(name: str) -> Scorer:
    """The scorer called `name`.

    Raises:
        UserError: no such scorer.
    """
    if name not in SCORERS:
        raise UserError(f"no scorer {name!r}; there are {', '.join(SCORERS)}")
    return SCORERS[name]()


def make_scorers(names: Sequence[str]) -> list[Scorer]:
    """The scorers called `names`; UserError as `make_scorer`, or where a name comes twice."""
    if len(set(names)) < len(names):
        raise UserError(f"--scorer must not name anything twice, got {' '.join(names)}")
    return [make_scorer(name) for name in names]


def add_scorer_flag(group: argparse._ArgumentGroup, several: bool = False, default: str = RELEASE_SCORER) -> None:
    """--scorer: one name, or several in a list."""
    what = {"nargs": "+", "default": [default]} if several else {"default": default}
    group.add_argument("--scorer", metavar="NAME", help=f"{', '.join(SCORERS)}; default: {default}", **what)
