"""Looks up scorers by name and loads custom scorers from files."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path

from scorers.base import Scorer
from scorers.combined import Combined
from scorers.gaussian import Gaussian
from scorers.neighbours import Neighbours
from scorers.positions import Positions
from scorers.views import VIEWS_PER_IMAGE
from utils.choices import BACKBONE_NAMES
from utils.errors import UserError

SCORERS: dict[str, type[Scorer]] = {scorer.name: scorer for scorer in (Gaussian, Neighbours, Positions, Combined)}
TAKEN_NAMES = {*SCORERS, *BACKBONE_NAMES, "untrained", "last", "source", "best"}  # used in file names of records
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # a scorer's name becomes part of file names


def make_scorer(name: str) -> Scorer:
    """The scorer with this name, or an instance of a class given as `FILE.py:CLASS`.

    The file is imported, which executes its code.

    Raises:
        UserError: the scorer, file or class does not exist, or the class is not a Scorer.
    """
    if ":" in name:
        return _from_file(*name.rsplit(":", 1))
    if name not in SCORERS:
        raise UserError(f"no scorer {name!r}; there are {', '.join(SCORERS)}, or a custom one as FILE.py:CLASS")
    return SCORERS[name]()


def make_scorers(names: Sequence[str]) -> list[Scorer]:
    """The scorers with these names, see `make_scorer`.

    Raises:
        UserError: as for `make_scorer`, or two scorers have the same name.
    """
    scorers = [make_scorer(name) for name in names]
    used = [scorer.name for scorer in scorers]
    if len(set(used)) < len(used):
        raise UserError(f"--scorer needs different names, got {', '.join(used)}")
    return scorers


def _from_file(file: str, name: str) -> Scorer:
    path = Path(file)
    if not path.is_file():
        raise UserError(f"no file {path} with the scorer {name}; --scorer takes a name or FILE.py:CLASS")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file; --scorer takes FILE.py:CLASS")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # importing a user's file can raise any exception
        raise UserError(f"the scorer's file {path} cannot be imported: {type(error).__name__}: {error}") from error
    custom = getattr(module, name, None)
    if not (isinstance(custom, type) and issubclass(custom, Scorer)):
        raise UserError(f"{path} has no class {name} derived from scorers.base.Scorer (docs/extend.md)")
    try:
        scorer = custom()
    except Exception as error:  # a missing abstract method, a required argument, or any error of the class
        raise UserError(f"{name} in {path} cannot be made without arguments: {error}") from error
    if not SAFE_NAME.fullmatch(str(getattr(scorer, "name", ""))) or scorer.name in TAKEN_NAMES:
        raise UserError(f"{name} in {path} needs a `name` of letters, digits, - and _ that is not in use")
    views = list(scorer.views)
    if not views or views[0] != 0 or views != sorted(set(views)) or views[-1] >= VIEWS_PER_IMAGE:
        expected = f"ascending indices that start with 0, below {VIEWS_PER_IMAGE}"
        raise UserError(f"{name} in {path}: `views` must be {expected}; got {views}")
    return scorer
