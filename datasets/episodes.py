"""Training episodes: the queries of each training step and their support images (RegAD section 3.2).

In an epoch, every normal image of the source categories is used as a query exactly once. An episode holds up to
`batch_size` queries of one category and, for each query, K support images of the same category, never the query itself
(release behaviour).

Sampling is deterministic: candidates are ordered by the SHA-256 digest of seed, epoch and file name. The episodes of an
epoch are therefore the same on every machine, with any number of workers, and after a resume.

python -m datasets.episodes --obj screw --data_type folder --data_path DATA --epoch 1      prints them as JSON
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from datasets.layouts import short_name
from datasets.mvtec import list_source_images
from utils.choices import CATEGORIES, DEFAULT_SEED, category_name
from utils.config import Config, Parser, flag
from utils.errors import UserError, run_command


class Episode(NamedTuple):
    """The images of one training step, by name: B queries, and K support images for each query."""

    category: str
    query: tuple[str, ...]
    support: tuple[tuple[str, ...], ...]


def draw_episodes(
    names: Mapping[str, Sequence[str]], shot: int, batch_size: int, seed: int, epoch: int
) -> list[Episode]:
    """The episodes of an epoch, in training order. `names`: at least two images of each source category."""
    episodes = []
    for category, of_category in names.items():
        ordered = sorted(of_category)
        index = {name: number for number, name in enumerate(ordered)}
        queries = sorted(ordered, key=lambda name: _digest(seed, epoch, category, "query", name))
        for start in range(0, len(queries), batch_size):
            batch = tuple(queries[start : start + batch_size])
            support = tuple(
                tuple(
                    _other(ordered, index[name], _digest(seed, epoch, category, "support", name, k))
                    for k in range(shot)
                )
                for name in batch
            )
            episodes.append(Episode(category, batch, support))
    return sorted(episodes, key=lambda episode: _digest(seed, epoch, "order", episode.category, episode.query[0]))


def _digest(*what: object) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(what).encode()).digest(), "big")


def _other(ordered: Sequence[str], own: int, draw: int) -> str:
    """One of `ordered` other than number `own`; all have the same probability, up to 2**-240."""
    number = draw % (len(ordered) - 1)
    return ordered[number + (number >= own)]


def write_episodes(episodes: Sequence[Episode]) -> str:
    """Episodes as JSON text: a list of objects with the keys category, query and support."""
    return json.dumps([episode._asdict() for episode in episodes], indent=1)


def read_episodes(path: Path, names: Mapping[str, Sequence[str]]) -> list[Episode]:
    """Episodes from a file that `write_episodes` wrote.

    Raises:
        UserError: the file is missing or malformed, or names images that are not in `names`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        episodes = [Episode(e["category"], tuple(e["query"]), tuple(map(tuple, e["support"]))) for e in content]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read the episodes {path}: {' '.join(str(error).split())}") from error
    if not episodes:
        raise UserError(f"the file {path} holds no episode")
    for number, episode in enumerate(episodes):
        unknown = {*episode.query, *(name for k in episode.support for name in k)} - {*names.get(episode.category, ())}
        shots = {len(k) for k in episode.support}
        if unknown or len(shots) != 1 or 0 in shots or len(episode.support) != len(episode.query):
            uneven = "it needs one support list per query, all of one length"
            reason = f"unknown image {min(unknown)} of {episode.category}" if unknown else uneven
            raise UserError(f"episode {number} of {path} is invalid: {reason}")
    return episodes


@dataclass(frozen=True, kw_only=True)
class EpisodesConfig(Config):
    """The flags of this command; they have the meaning of those of train.py."""

    obj: str = flag("the target category, not drawn from", convert=category_name, metavar="CATEGORY")
    data_type: str = flag("the data set", default="mvtec", choices=tuple(CATEGORIES))
    data_path: Path = flag("folder that holds the categories", default=Path("./MVTec/"))
    sources: tuple[str, ...] | None = flag(
        "draw from these categories (default: all but the target)",
        default=None,
        convert=category_name,
        metavar="CATEGORY",
    )
    source_path: Path | None = flag(
        "data set of the sources (default: that of the target)", default=None, metavar="DIR"
    )
    shot: int = flag("support images per query", default=2, least=1)
    batch_size: int = flag("queries per episode, at most", default=32, least=1)
    seed: int = flag("of the draw", default=DEFAULT_SEED, least=0)
    epoch: int = flag("number of the epoch, from 1", default=1, least=1)


def get_args_parser() -> Parser[EpisodesConfig]:
    """The command line of datasets.episodes."""
    return Parser(EpisodesConfig, "Prints the episodes of one training epoch as JSON.")


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the episodes of one epoch: those that train.py draws with the same arguments."""
    config = get_args_parser().parse_config(argv)
    sources = list_source_images(config.data_path, config.data_type, config.obj, config.sources, config.source_path)
    names = {category: [short_name(path) for path in paths] for category, paths in sources.items()}
    print(write_episodes(draw_episodes(names, config.shot, config.batch_size, config.seed, config.epoch)))


if __name__ == "__main__":
    run_command(main, get_args_parser)
