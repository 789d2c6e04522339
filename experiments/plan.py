"""The plan of a table: its runs, and which of them are finished."""

from __future__ import annotations

from collections.abc import Sequence

from datasets.mvtec import category_folder, category_names, list_test_items
from evaluation.config import ScoringConfig
from experiments.config import ExperimentConfig
from experiments.results import SEED_FOLDER, kind_name
from experiments.runs import Run, Scoring, is_finished
from models.networks import is_trainable, network_name
from models.regad import selection
from scorers.registry import make_scorers
from training.config import TrainingConfig
from training.run import checkpoint_files
from utils.choices import CATEGORIES, WEIGHTS
from utils.errors import UserError
from utils.fingerprint import FileDigests
from utils.naming import CheckpointFiles, record_name, stored


class Plan:
    """The runs of the table that a configuration of reproduce.py describes.

    Raises:
        UserError: a category is missing, or has no test images.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        self.config, self.digests = config, FileDigests()
        self.categories = _categories(config)
        for name in self.categories:
            list_test_items(category_folder(config.data_path, config.data_type, name), need_both=False)
        self.scorers = [scorer.name for scorer in make_scorers(config.scorer)]
        self.network = network_name(config.backbone, config.stn_mode)

    def runs(self) -> list[Run]:
        """The runs in order: one untrained run per category, then the trained ones.

        With --eval_only, the scorings of existing checkpoints.

        Raises:
            UserError: --eval_only finds no checkpoint, or train.py or test.py refuses the settings.
        """
        if self.config.eval_only:
            runs = [run for name in self.categories for run in self._found_runs(name)]
            if not runs:
                raise UserError(
                    f"{self.config.eval_only} has no checkpoint of these categories and shots; "
                    "save_checkpoints/README.md shows the layout"
                )
            return runs
        untrained = [self._untrained_run(name) for name in self.categories]
        if not is_trainable(self.config.backbone):
            return untrained
        trained = [
            self._trained_run(name, shot, select, number)
            for number in range(self.config.seeds)
            for shot in self.config.shots
            for name in self.categories
            for select in (("best",) if self._one_training() else self.config.select)
        ]
        return [*untrained, *trained]

    def asked(self, runs: Sequence[Run]) -> dict:
        """The categories, shots and columns of the table of `runs`, for results.GRID_FILE."""
        weights = {scoring.weights for run in runs for scoring in run.scorings}
        kinds = [kind_name(name, scorer) for scorer in self.scorers for name in WEIGHTS if name in weights]
        return {"objs": self.categories, "shots": list(self.config.shots), "kinds": kinds}

    def print_plan(self, runs: Sequence[Run]) -> list[Run]:
        """Prints one line per run. Returns the runs that are not finished."""
        to_do = [run for run in runs if not is_finished(run, self.digests)]
        for run in runs:
            is_begun = run.training and checkpoint_files(run.training).state.is_file()
            print(f"  {'finished' if run not in to_do else 'resume' if is_begun else 'new':9} {run.name}")
        print(f"{len(runs)} runs, {len(runs) - len(to_do)} finished, {len(to_do)} to do")
        return to_do

    def _scoring(self, weights: str, category: str, shots: Sequence[int], **settings: object) -> Scoring:
        """The scoring of one kind of weights. settings: of test.py, which identify the weights."""
        config = self.config.part(
            ScoringConfig,
            obj=category,
            shot=tuple(shots),
            overwrite=True,
            batch_size=self.config.scoring_batch_size,
            **{"output": self.config.output, **settings},
        )
        names = [record_name(category, shot, self.network, weights, name) for shot in shots for name in self.scorers]
        return Scoring(weights, config, tuple(config.output / f"{name}.json" for name in names))

    def _untrained_run(self, category: str) -> Run:
        name = f"{category}_{'-'.join(map(str, self.config.shots))}_{self.network}_untrained"
        return Run(name, None, (self._scoring("untrained", category, self.config.shots, untrained=True),))

    def _trained_run(self, category: str, shot: int, select: str, number: int = 0) -> Run:
        """A training and its scorings. number: of the training, from 0; later ones are in separate folders."""
        config, ending = self.config, "" if select == "best" else "_source"
        seed = config.seed + number
        output = config.output / f"{SEED_FOLDER}{seed}" if number else config.output
        save_dir, own = output / f"save_checkpoints{ending}", {"seed": seed, "output": output}
        training = config.part(
            TrainingConfig,
            obj=category,
            shot=shot,
            select=select,
            sources=self._sources(category),
            held_out=self._held_out(category, select),
            scorer=config.scorer[:1],
            save_dir=save_dir,
            seed=seed,
            resume=True,
        )
        scorings = [self._scoring(select, category, [shot], save_dir=save_dir, **own)]
        if select == "best":
            scorings.append(self._scoring("last", category, [shot], save_dir=save_dir, last=True, **own))
        if self._one_training():
            file = CheckpointFiles.of(save_dir, self.network, shot, category).source
            scorings.append(self._scoring("source", category, [shot], checkpoint=file, **own))
        ending += f"_{SEED_FOLDER}{seed}" if number else ""
        return Run(f"{category}_{shot}_{self.network}{ending}", training, tuple(scorings))

    def _one_training(self) -> bool:
        """Whether one training selects epochs both by test labels and by held-out categories."""
        return bool(self.config.held_out) and {"best", "source"} <= set(self.config.select)

    def _held_out(self, category: str, select: str) -> tuple[str, ...] | None:
        """The value of --held_out of train.py, without the target."""
        if not self.config.held_out or not (select == "source" or self._one_training()):
            return None
        names = tuple(name for name in self.config.held_out if name != category)
        if not names and self._one_training():
            raise UserError(f"--held_out names {category} alone, which is a target: its images must not select")
        return names or None  # None: the next category by name

    def _sources(self, category: str) -> tuple[str, ...] | None:
        """The value of --sources of train.py, without the target; None if it was not given."""
        sources, path = self.config.sources, self.config.source_path
        if not sources or (path is not None and path.resolve() != self.config.data_path.resolve()):
            return sources
        names = tuple(name for name in sources if name != category)
        if not names:
            raise UserError(f"--sources names {category} alone, which is a target: it must not be trained on")
        return names

    def _found_runs(self, category: str) -> list[Run]:
        """The runs of a category's existing checkpoints. A run covers all K, so that equal files are scored once."""
        folder, shots_of = self.config.eval_only, {}  # (rule of selection, --last of test.py) -> shots
        for last in (True, False):
            for shot in self.config.shots:
                files = CheckpointFiles.of(folder, self.network, shot, category)
                file = stored(files.last if last else files.selected)
                rule = selection(file)[0] if file.is_file() else None
                if rule and shot not in shots_of.get((rule, True), ()):
                    shots_of.setdefault((rule, last), []).append(shot)
                elif not rule and not last:
                    print(f"no checkpoint {file}: the table will show the run as missing")
        runs = []
        for (rule, last), shots in shots_of.items():
            name = f"{category}_{'-'.join(map(str, shots))}_{self.network}_{rule}{'_last' if last else ''}_eval"
            runs.append(Run(name, None, (self._scoring(rule, category, shots, save_dir=folder, last=last),)))
        return runs


def _categories(config: ExperimentConfig) -> list[str]:
    if config.objs != ("all",):
        return list(config.objs)
    if CATEGORIES[config.data_type] is not None:
        return list(CATEGORIES[config.data_type])
    names = category_names(config.data_path, config.data_type)
    return [name for name in names if (config.data_path / name / "test").is_dir()]
