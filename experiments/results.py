"""The records of a results folder: read, checked against experiments/record.schema.json, and keyed for tables."""

from __future__ import annotations

import hashlib
import itertools
import json
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from jsonschema import Draft202012Validator

from scorers.registry import SCORERS
from utils.choices import CATEGORIES, RELEASE_BACKBONE, RELEASE_SCORER, SAFETENSORS, WEIGHTS
from utils.config import CONFIG_KEYS, recorded
from utils.errors import UserError
from utils.text import read_text

GRID_FILE = "grid.json"  # what was asked for, so that missing records can be shown: categories, shots, kinds
SEED_FOLDER = "seed_"  # how the folders of --seeds begin: the records of further trainings, in a results folder
SCHEMA_FILE = Path(__file__).with_name("record.schema.json")
SHOWN_PROBLEMS, SHOWN_LETTERS = 3, 100  # of what is wrong with a record
DIGEST_LETTERS = 8  # of a support set's SHA-256, enough to distinguish support sets


class RecordKey(NamedTuple):
    """What a record is of. kind: its weights, and its scorer where it is not that of the release, see kind_name."""

    category: str
    shot: int
    kind: str


class Results(NamedTuple):
    """The records of a folder, and the categories, shots and kinds (columns) of its tables.

    records: one for each training, those of other seeds last; its entry "file" is where it was read. categories, shots,
    kinds: also those that were asked for, and all categories of a known data set, so that missing ones are shown.
    """

    folder: Path
    records: dict[RecordKey, list[dict]]
    categories: list[str]
    shots: list[int]
    kinds: list[str]

    @property
    def data_type(self) -> str:
        """The data set, a key of CATEGORIES."""
        return next(iter(self.records.values()))[0]["config"]["data_type"]

    @property
    def scorers(self) -> list[str]:
        """The scorers of the columns."""
        return list(dict.fromkeys(map(scorer_of, self.kinds)))

    def part(
        self,
        categories: Sequence[str] | None = None,
        shots: Sequence[int] | None = None,
        kinds: Sequence[str] | None = None,
        only_scored: bool = False,
    ) -> Results:
        """The results of some categories, shots and columns; None: all. only_scored: that have records.

        Categories and shots are in the given order.

        Raises:
            UserError: there is no record of them.
        """
        known, asked = (self.categories, self.shots, self.kinds), (categories, shots, kinds)
        wanted = [list(given or every) for given, every in zip(asked, known, strict=True)]
        records = {
            key: records
            for key, records in self.records.items()
            if all(value in values for value, values in zip(key, wanted, strict=True))
        }
        unknown = [
            repr(value) for values, every in zip(wanted, known, strict=True) for value in values if value not in every
        ]
        if unknown or not records:
            what = f"has no {unknown[0]}" if unknown else "has no record of this choice"
            raise UserError(
                f"{self.folder} {what}; it has {', '.join(known[0])}; K = {', '.join(map(str, known[1]))}; "
                f"the columns {' | '.join(known[2])}"
            )
        if only_scored:
            scored = [set(values) for values in zip(*records, strict=True)]
            wanted = [[value for value in asked if value in has] for asked, has in zip(wanted, scored, strict=True)]
        columns = [kind for kind in self.kinds if kind in wanted[2]]
        return Results(self.folder, records, *wanted[:2], columns)


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
    """A `kind_name` in words: `untrained network, scorer combined`; for another method: `untrained network, NAME`."""
    weights, scorer = weights_of(kind), scorer_of(kind)
    network = "untrained network" if weights == "untrained" else f"{weights} weights"
    return f"{network}, {'scorer ' if scorer in SCORERS else ''}{scorer}"


def read_results(folder: Path) -> Results:
    """Reads all records in `folder`, and those of further trainings in its folders of --seeds.

    Raises:
        UserError: no folder, no record, a damaged record, or records of several data types, STN modes or image sizes,
            or of two trainings on different support sets.
    """
    if not folder.is_dir():
        raise UserError(f"no results folder {folder}; create it with python reproduce.py --output {folder}")
    records = {key: [record] for key, record in _read_records(folder, needed=True).items()}
    for further in sorted(folder.glob(f"{SEED_FOLDER}*")):
        for key, record in _read_records(further).items():
            if key not in records:
                continue
            if rounds_of(record) != rounds_of(records[key][0]):
                raise UserError(f"{further} and {folder} have {key[0]}, K = {key[1]} with different support sets")
            records[key].append(record)
    _refuse_mixture(folder, list(itertools.chain(*records.values())))
    asked = _read_json(folder / GRID_FILE) if (folder / GRID_FILE).is_file() else {"kinds": []}
    scored, shots, kinds = (set(values) for values in zip(*records, strict=True))
    kinds |= set(asked.get("kinds", ["untrained", "last", "best"]))  # folders of earlier versions do not name them
    scorers = (RELEASE_SCORER, *sorted({scorer_of(kind) for kind in kinds} - {RELEASE_SCORER}))
    results = Results(
        folder,
        records,
        sorted(scored | set(asked.get("objs", []))),
        sorted(shots | set(asked.get("shots", []))),
        [kind for scorer in scorers for weights in WEIGHTS if (kind := kind_name(weights, scorer)) in kinds],
    )
    order = CATEGORIES.get(results.data_type) or ()
    return results._replace(categories=[*order, *(name for name in results.categories if name not in order)])


def _read_records(folder: Path, needed: bool = False) -> dict[RecordKey, dict]:
    """The records in `folder`, without those in sub-folders. needed: at least one."""
    records, foreign = {}, []
    for path in sorted(folder.glob("*.json")):
        content = {} if path.name == GRID_FILE else _read_json(path)
        if {*CONFIG_KEYS, "rounds", "fingerprint"} & set(content):
            record = _checked(path, content)
            kind = kind_name(record["weights"], record.get("scorer", RELEASE_SCORER))
            key = RecordKey(record["config"]["obj"], record["config"]["shot"], kind)
            if key in records:
                print(f"note: {records[key]['file']} and {path} are of the same category, K and kind; {path} is used")
            records[key] = record
        elif path.name != GRID_FILE:
            foreign.append(path)  # JSON of another program has no entry in common with a record
    if needed and not records:
        what = f"; {foreign[0]} is not a record" if foreign else ""
        raise UserError(f"no records of test.py in {folder}{what}")
    if foreign:
        print(f"note: {len(foreign)} JSON file(s) are no records and left out, e.g. {foreign[0]}")
    return records


def rounds_of(record: dict) -> tuple[str, int]:
    """What two records must have in common for their rounds to be paired: the support sets, and their number."""
    return support_name(record), len(record["rounds"])


def _checked(path: Path, record: dict) -> dict:
    """A record with all that tables need, and its file as "file"; UserError names what it lacks.

    Its "config" holds the resolved values too. Records until version 0.1 have "arguments" in its place.
    """
    resolved = record.get("resolved")
    record["config"] = recorded(record) | (resolved if isinstance(resolved, dict) else {})
    validator = Draft202012Validator(json.loads(SCHEMA_FILE.read_text(encoding="utf-8")))
    problems = []
    for error in validator.iter_errors(record):
        place = error.json_path.removeprefix("$").lstrip(".")
        problems.append(textwrap.shorten(f"{place}: {error.message}".removeprefix(": "), SHOWN_LETTERS))
    problems = problems or _contradictions(record)
    if problems:
        more = f" and {len(problems) - SHOWN_PROBLEMS} more" if len(problems) > SHOWN_PROBLEMS else ""
        raise UserError(
            f"{path} is not a record (experiments/record.schema.json, docs/extend.md): "
            f"{'; '.join(problems[:SHOWN_PROBLEMS])}{more}. Correct it, or remove it from {path.parent}"
        )
    if isinstance(shots := record["config"]["shot"], list):
        (record["config"]["shot"],) = shots
    return record | {"file": path}


def _read_json(path: Path) -> dict:
    """The object in a JSON file; empty if it holds another value."""
    try:
        content = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    return content if isinstance(content, dict) else {}


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
    configs = [record["config"] for record in records]
    own = [record["config"] for record in records if record.get("scorer", RELEASE_SCORER) in SCORERS]
    for name in ("data_type", "stn_mode", "img_size", "backbone"):
        values = {config.get(name, RELEASE_BACKBONE) for config in (configs if name == "data_type" else own)}
        if len(values) > 1:
            raise UserError(f"{folder} has records with different {name}: {' and '.join(map(str, sorted(values)))}")


def training_seconds(record: dict) -> float | None:
    """The seconds of all epochs, from the record of train.py in the folder of the checkpoint; None where there is none.

    The checkpoint is looked for where it was, and at the same place below the results folder, which may have been
    moved.
    """
    if not record.get("checkpoint"):
        return None
    file = Path(record["checkpoint"]["path"])
    for ending, suffix in itertools.product(("_model", "_last"), (".pt", SAFETENSORS)):
        file = file.with_name(file.name.replace(ending + suffix, "_record.json"))
    # the parts of save_checkpoints/<mode>/<shot>/<category>/<file>
    for place in (file, record["file"].parent.joinpath(*file.parts[-5:])):
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
