"""The records of a results folder: read, checked against experiments/record.schema.json, and keyed for tables."""

from __future__ import annotations

import hashlib
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jsonschema import Draft202012Validator

from scorers.registry import SCORERS
from utils.choices import CATEGORIES, RELEASE_BACKBONE, RELEASE_SCORER, WEIGHTS
from utils.config import CONFIG_KEYS, recorded
from utils.errors import UserError
from utils.text import read_text

GRID_FILE = "grid.json"  # what was asked for, so that missing records can be shown: categories, shots, kinds
SEED_FOLDER = "seed_"  # how the folders of --seeds begin: the records of further trainings, in a results folder
SCHEMA_FILE = Path(__file__).with_name("record.schema.json")
SHOWN_PROBLEMS, SHOWN_LETTERS = 3, 100  # of what is wrong with a record
DIGEST_LETTERS = 8  # of a support set's SHA-256, enough to distinguish support sets


class Results(NamedTuple):
    """The records of a folder by (category, shot, kind), with the categories, shots and scorers of its tables.

    A kind is a key of WEIGHTS, followed by the scorer where it is not the release's, see `kind_name`. planned: the
    kinds that were asked for, so that they are shown also where they are missing. training: the seconds of the training
    behind a record, where they are known. repeats: further records of the same kind, of trainings with other seeds.
    files: of a record and of its repeats. folder: of the files.
    """

    records: dict[tuple[str, int, str], dict]
    categories: list[str]
    shots: list[int]
    data_type: str
    scorers: list[str]
    planned: list[str]
    training: dict[tuple[str, int, str], float]
    repeats: dict[tuple[str, int, str], list[dict]]
    files: dict[tuple[str, int, str], list[Path]]
    folder: Path

    @property
    def kinds(self) -> list[str]:
        """The columns: every combination of weights and scorer that was planned or has records."""
        found = {key[2] for key in self.records} | set(self.planned)
        return [kind for scorer in self.scorers for name in WEIGHTS if (kind := kind_name(name, scorer)) in found]

    def part(
        self,
        categories: Sequence[str] | None = None,
        shots: Sequence[int] | None = None,
        kinds: Sequence[str] | None = None,
        only_scored: bool = False,
    ) -> Results:
        """The results of some categories, shots and columns, in this order; None: all. only_scored: that have records.

        Raises:
            UserError: there is no record of them.
        """
        known, asked = (self.categories, self.shots, self.kinds), (categories, shots, kinds)
        wanted = [list(given or every) for given, every in zip(asked, known, strict=True)]
        records = {
            key: record
            for key, record in self.records.items()
            if all(value in values for value, values in zip(key, wanted, strict=True))
        }
        unknown = [repr(value) for values, every in zip(wanted, known, strict=True) for value in set(values) - {*every}]
        if unknown or not records:
            what = f"has no {unknown[0]}" if unknown else "has no record of this choice"
            raise UserError(
                f"{self.folder} {what}; it has {', '.join(known[0])}; K = {', '.join(map(str, known[1]))}; "
                f"the columns {' | '.join(known[2])}"
            )
        for place, values in enumerate(wanted) if only_scored else ():
            values[:] = [value for value in values if value in {key[place] for key in records}]
        of_scorers = [scorer_of(kind) for kind in wanted[2]]
        return self._replace(
            records=records,
            categories=wanted[0],
            shots=wanted[1],
            scorers=[name for name in self.scorers if name in of_scorers],
            planned=wanted[2],
        )


def kind_name(weights: str, scorer: str) -> str:
    """The column of a kind of weights scored by one scorer: `last`, or `last, neighbours`."""
    return weights if scorer == RELEASE_SCORER else f"{weights}, {scorer}"


def weights_of(kind: str) -> str:
    """The kind of weights in a `kind_name`."""
    return kind.split(", ")[0]


def scorer_of(kind: str) -> str:
    """The scorer, or the other method, in a `kind_name`."""
    return kind.split(", ")[1] if ", " in kind else RELEASE_SCORER


def described(kind: str) -> str:
    """A `kind_name` in words: `untrained network, scorer combined`; the name alone of another method."""
    weights, scorer = weights_of(kind), scorer_of(kind)
    network = "untrained network" if weights == "untrained" else f"{weights} weights"
    return f"{network}, {'scorer ' if scorer in SCORERS else ''}{scorer}"


def read_results(folder: Path) -> Results:
    """Reads all records in `folder`, and the further trainings in its folders of --seeds.

    Raises:
        UserError: no folder, no record, a damaged record, or records of several data types, STN modes or image sizes,
            or of two trainings on different support sets.
    """
    if not folder.is_dir():
        raise UserError(f"no results folder {folder}; create it with python reproduce.py --output {folder}")
    (records, files), repeats = _read_records(folder, needed=True), {}
    for further in sorted(folder.glob(f"{SEED_FOLDER}*")):
        again, again_files = _read_records(further)
        for key, record in again.items():
            if key in records and rounds_of(record) != rounds_of(records[key]):
                raise UserError(f"{further} and {folder} have {key[0]}, K = {key[1]} with different support sets")
            repeats.setdefault(key, []).append(record)
            files.setdefault(key, []).append(again_files[key][0])
    _refuse_mixture(folder, [*records.values(), *(record for some in repeats.values() for record in some)])
    asked = _read_json(folder / GRID_FILE) if (folder / GRID_FILE).is_file() else {"kinds": []}
    data_type = next(iter(records.values()))["config"]["data_type"]
    found = {category for category, _, _ in records} | set(asked.get("objs", []))
    order = CATEGORIES.get(data_type) or ()
    others = {record.get("scorer", RELEASE_SCORER) for record in records.values()} - {RELEASE_SCORER}
    return Results(
        records,
        [*order, *sorted(found - set(order))],
        sorted({shot for _, shot, _ in records} | set(asked.get("shots", []))),
        data_type,
        [RELEASE_SCORER, *sorted(others)],
        asked.get("kinds", ["untrained", "last", "best"]),  # folders of earlier versions do not name them
        {key: seconds for key, record in records.items() if (seconds := _training_seconds(folder, record))},
        repeats,
        files,
        folder,
    )


def _read_records(folder: Path, needed: bool = False) -> tuple[dict, dict]:
    """The records in `folder` and their files, by (category, shot, kind). needed: at least one.

    Sub-folders are not searched.
    """
    records, files, foreign = {}, {}, []
    for path in sorted(folder.glob("*.json")):
        if path.name != GRID_FILE and not _may_be_record(path):
            foreign.append(path)
        elif path.name != GRID_FILE:
            record = _read_record(path)
            kind = kind_name(record["weights"], record.get("scorer", RELEASE_SCORER))
            key = record["config"]["obj"], record["config"]["shot"], kind
            records[key], files[key] = record, [path]
    if needed and not records:
        what = f"; {foreign[0]} is not a record" if foreign else ""
        raise UserError(f"no records of test.py in {folder}{what}")
    if foreign:
        print(f"note: {len(foreign)} JSON file(s) are no records and left out, e.g. {foreign[0]}")
    return records, files


def rounds_of(record: dict) -> tuple[str, int]:
    """What two records must have in common for their rounds to be paired: the support sets, and their number."""
    return support_name(record), len(record["rounds"])


def _may_be_record(path: Path) -> bool:
    """Whether a file is a record, also a damaged one; JSON of other programs has no entry in common with it."""
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError):
        return True
    return isinstance(content, dict) and bool({*CONFIG_KEYS, "rounds", "fingerprint"} & set(content))


def _read_record(path: Path) -> dict:
    """A record with all that tables need; UserError names what it lacks.

    Its "config" holds the resolved values too. Records until version 0.1 have "arguments" in its place.
    """
    record = _read_json(path)
    record["config"] = {**recorded(record), **record.get("resolved", {})}
    validator = Draft202012Validator(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))
    problems = [_phrase(error.json_path, error.message) for error in validator.iter_errors(record)]
    problems = problems or _contradictions(record)
    if problems:
        more = f" and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        raise UserError(
            f"{path} is not a record (experiments/record.schema.json, docs/extend.md): "
            f"{'; '.join(problems[:SHOWN_PROBLEMS])}{more}. Correct it, or remove it from {path.parent}"
        )
    if isinstance(shots := record["config"]["shot"], list):
        (record["config"]["shot"],) = shots
    return record


def _phrase(place: str, message: str) -> str:
    return textwrap.shorten(f"{place.removeprefix('$').lstrip('.')}: {message}".removeprefix(": "), SHOWN_LETTERS)


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the record {path}: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a record of test.py")
    return content


def _contradictions(record: dict) -> list[str]:
    """What a schema cannot say: rounds that do not fit each other or the support set, or a support set without name."""
    rounds, support = record["rounds"], record["support_set"]
    problems = [
        f"rounds[{number}] has other metrics than rounds[0]"
        for number, numbers in enumerate(rounds)
        if set(numbers) != set(rounds[0])
    ]
    if support["names"] is None and not support.get("sha256"):
        problems.append("it lacks support_set.sha256, as support_set.names is null")
    if support["names"] is not None and len(support["names"]) != len(rounds):
        problems.append(f"support_set.names has {len(support['names'])} rounds, rounds has {len(rounds)}")
    return problems


def _refuse_mixture(folder: Path, records: list[dict]) -> None:
    """Raises UserError for several data types, and for several settings of the project's own network."""
    own = [record["config"] for record in records if record.get("scorer", RELEASE_SCORER) in SCORERS]
    everything = [record["config"] for record in records]
    for name, configs in (("data_type", everything), *((name, own) for name in ("stn_mode", "img_size", "backbone"))):
        found = {config.get(name, RELEASE_BACKBONE) for config in configs}
        if len(found) > 1:
            raise UserError(f"{folder} has records with different {name}: {' and '.join(map(str, sorted(found)))}")


def _training_seconds(folder: Path, record: dict) -> float | None:
    """The seconds of all epochs, from the record of train.py in the folder of the checkpoint; None where there is none.

    The checkpoint is looked for where it was, and at the same place below `folder`, which may have been moved.
    """
    checkpoint = record.get("checkpoint")
    if not checkpoint:
        return None
    file = Path(checkpoint["path"])
    for ending in ("_model.pt", "_last.pt"):
        file = file.with_name(file.name.replace(ending, "_record.json"))
    for place in (file, folder.joinpath(*file.parts[-5:])):  # save_checkpoints/<mode>/<shot>/<category>/<file>
        if place.suffix == ".json" and place.is_file():
            epochs = _read_json(place).get("epochs", [])
            return sum(entry.get("elapsed_seconds", 0) for entry in epochs) or None
    return None


def support_name(record: dict) -> str:
    """Identifies the support sets of a record: the file name, or "drawn", and the first digits of a SHA-256."""
    support = record["support_set"]
    names, file = support["names"], support.get("path")
    digest = support["sha256"] if names is None else hashlib.sha256(json.dumps(names).encode()).hexdigest()
    return f"{Path(file).name if file else 'drawn'} {digest[:DIGEST_LETTERS]}"
