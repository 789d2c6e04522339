"""Implements predict.py: scores images, adds their rows to the result files, and writes scores.json and report.html."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing, suppress
from datetime import date
from pathlib import Path
from typing import TextIO

from datasets.images import limit_pixels
from datasets.listing import Listing, is_folder
from inspection.config import PredictConfig
from inspection.detector import FewShotDetector
from inspection.document import KnownDefect, as_text, describe, listed, settings
from inspection.fitting import known_defects, make_detector, save_detector
from inspection.inputs import POLL_SECONDS, Watcher, absolute, identify, list_inputs
from inspection.predictions import Outputs, map_scale, predict
from inspection.report import choose_previews, known_images, report_page
from inspection.results import (
    DEFECTIVE,
    PAGE,
    REVIEW,
    SCORES,
    SUMMARY,
    Prediction,
    ResultFiles,
    count_decisions,
    has_results,
    now,
)
from reports.page import PAGE_IMAGES, Preview, write_page
from utils.devices import command_device, reader_threads
from utils.errors import UserError, WriteError
from utils.files import require_writable, write_json
from utils.fingerprint import fingerprint
from utils.interrupts import Interrupts
from utils.progress import ProgressBar
from utils.records import peak_memory_mb, provenance
from utils.text import one_line

# Exit codes; where several apply, see `Run.exit_code`
SOME_FAILED = 1  # some images failed; all others are processed
CANNOT_WRITE = 2  # as of every UserError
SOME_FLAGGED = 3  # with --fail_on_defect: an image is defective or for review
SOME_UNDECIDED = 4  # with --fail_on_defect: an image has no decision, as there is no threshold
FEW_IMAGES = 5  # fewer than --min_images were scored, with --watch on a whole day
FOLDER_GONE = 6  # the watched folder is not there any more, or was replaced
MOST_FLAGGED = 10  # images with another decision than normal that are printed at the end
REFRESH_SECONDS, REFRESH_SHARE = 5.0, 0.05  # --watch writes scores.json and the report so seldom, in so little time


def check_paths(config: PredictConfig) -> None:
    """Raises UserError where the folders and files of `config` cannot be used together."""
    if config.input or config.watch:
        require_writable(config.output, "--output", folder=True)
    if config.save:
        require_writable(config.save, "--save")
    sources = [*config.input, *([config.watch] if config.watch else [])]
    if absolute(config.output) in map(absolute, sources):
        raise UserError(f"--output {config.output} is also where the images come from; give another folder")
    if config.watch and not is_folder(config.watch):
        raise UserError(f"no folder {config.watch} to watch")
    if config.input and has_results(config.output) and not (config.append or config.overwrite):
        raise UserError(
            f"{config.output} holds results of an earlier run: give --append, --overwrite or another --output"
        )


def command(config: PredictConfig, lines: TextIO | None) -> int:
    """Fits or loads the detector, scores all images, or watches a folder; returns the exit code.

    lines: where the rows also go as lines of JSON, or None.

    Raises:
        UserError: the data, the detector or the output cannot be used, or its results are of another detector.
    """
    if config.describe:
        described = describe(FewShotDetector.load(config.detector, "cpu", config.scorer), config.detector)
        print(as_text(described) if config.describe == "text" else json.dumps(described, indent=2))
        return 0
    check_paths(config)
    command_device(config.device)
    limit_pixels(config.max_pixels)
    listing = Listing(config.output)
    paths = list_inputs(config.input, listing=listing, may_be_empty=config.append) if config.input else []
    detector = make_detector(config, config.device)
    defects = known_defects(detector, config)
    if config.save:
        save_detector(detector, config.save, defects, config.force)
    code = 0
    if config.watch or config.input:
        part = detector.document.get("part") or ""
        with closing(ResultFiles(config.output, config.overwrite, config.csv, part)) as results:
            run = Run(config, detector, defects, results, paths, lines)
            with run.interrupts:
                is_whole = run.watch() if config.watch else run.score_all(paths)
        code = run.exit_code(is_whole)
    may_lack = listing.unreadable or (config.fail_on_defect and listing.is_partial)
    return code or (SOME_FAILED if may_lack else 0)


class Run:
    """One call of predict.py, of which `results` are open. Images are named relative to `root`."""

    def __init__(
        self,
        config: PredictConfig,
        detector: FewShotDetector,
        defects: Sequence[KnownDefect],
        results: ResultFiles,
        paths: Sequence[Path],
        lines: TextIO | None,
    ) -> None:
        if config.input and results.rows and not config.append:  # another run has ended since `check_paths`
            raise UserError(f"another run has written results into {config.output} meanwhile: give another --output")
        places = [absolute(path).parent for path in paths] or [absolute(path) for path in config.input]
        root = absolute(config.watch or Path(os.path.commonpath(places)))
        self.config, self.detector, self.defects = config, detector, defects
        self.results, self.root, self.lines = results, root, lines
        self.interrupts = Interrupts()
        self.earlier = self.refreshed = len(results.rows)  # rows before this call, and in scores.json
        self.next_refresh = 0.0
        self.first_day = self.day = _today()  # of the watch
        self.before_day = self.earlier  # rows
        self.codes: set[int] = set()  # exit codes that apply
        self.previews: dict[int, Preview] = {}  # by the number of the row
        panels = None if config.no_images else config.panels
        self.outputs = Outputs(config.output, root, panels, config.maps, detector.identity(), results.taken)
        self.known_images = known_images(detector, defects, with_panels=not config.no_images)
        detector.clock.seconds.clear()  # discard the times of fitting

    @property
    def rows(self) -> list[Prediction]:
        """The rows of this call."""
        return self.results.rows[self.earlier :]

    def score_all(self, paths: Sequence[Path]) -> bool:
        """Scores the images that the output folder has no result of; returns False if it was interrupted."""
        new = [path for path in paths if identify(path) not in self.results.done]
        if len(new) < len(paths):
            print(f"{len(paths) - len(new)} of {len(paths)} images have results in {self.config.output} already")
            others = sum(not self._is_own(row) for row in self.results.rows)
            what = "1 result is" if others == 1 else f"{others} results are"
            if others:
                print(f"{what} of another detector or threshold, not on the page; --overwrite scores all images again")
        return self._with_summary(lambda: self._score(ProgressBar("scoring", new)))

    def _with_summary(self, work: Callable[[], None]) -> bool:
        """Whether `work` ended by itself; writes and prints the summary in any case."""
        is_whole, begin = False, time.perf_counter()
        with suppress(KeyboardInterrupt):
            is_whole = self._unless_full(work)
        with suppress(KeyboardInterrupt), self.interrupts.held():
            seconds = None if self.config.watch else time.perf_counter() - begin
            self._unless_full(lambda: self._refresh(seconds))
            self._summarise(is_whole)
            if seconds is not None and self.rows:
                print(f"scored in {seconds:.1f} s, {1000 * seconds / len(self.rows):.0f} ms per image")
        if self.day == self.first_day:
            self._require_images(self.rows)
        return is_whole

    def _unless_full(self, work: Callable[[], None]) -> bool:
        """Whether `work` was done; False where a file cannot be written, which is said: the summary still counts."""
        try:
            work()
        except WriteError as error:
            self.codes.add(CANNOT_WRITE)
            print(f"error: {error}", file=sys.stderr)
        return CANNOT_WRITE not in self.codes

    def _require_images(self, rows: Sequence[Prediction]) -> None:
        """Says where fewer images than --min_images were scored."""
        scored, least = sum(row.score is not None for row in rows), self.config.min_images
        if scored < least:
            self.codes.add(FEW_IMAGES)
            print(f"warning: {_images(scored)} scored, --min_images is {least}", file=sys.stderr, flush=True)

    def watch(self) -> bool:
        """Scores images as they arrive, until it is interrupted, or a file cannot be written; returns False.

        Resumes earlier runs with the same output folder: what they scored, or recorded as failed, is not tried again.

        Raises:
            UserError: the earlier rows are of another detector, and --append was not given.
        """
        own, output = self.outputs.detector, self.config.output
        before = self.results.rows[-1].detector if self.results.rows else own
        if before != own and not self.config.append:
            raise UserError(
                f"{output} holds results of another detector ({before}, this one is {own}): "
                "give --append to add results of this one, --overwrite, another --output, or the detector as before"
            )
        earlier = f"; {self.earlier} results before" if self.earlier else ""
        print(f"watching {self.config.watch}; press Ctrl-C to stop{earlier}", flush=True)
        watcher = Watcher(self.config.watch, output, self.results.done)
        is_whole = self._with_summary(lambda: self._follow(watcher))
        self.codes |= {FOLDER_GONE} if watcher.is_gone else set()
        return is_whole

    def _follow(self, watcher: Watcher) -> None:
        """Scores what has arrived, or waits for a moment, without end."""
        while True:
            count = len(self.results.rows)
            arrived = watcher.scan()
            for note in watcher.notes:
                print(f"{now()} warning: {note}", file=sys.stderr, flush=True)
            self._score(arrived, watcher)
            self._refresh_if_due()
            self._end_day()
            if len(self.results.rows) == count:
                time.sleep(POLL_SECONDS)

    def _end_day(self) -> None:
        """At the first look of a new day, prints a line for the day before, also where no image came.

        The day on which the watch began is not whole.
        """
        if (today := _today()) == self.day:
            return
        rows = self.results.rows[self.before_day :]
        print(f"{now()} {self.day}: {self._counts(rows)}", flush=True)
        if self.day != self.first_day:
            self._require_images(rows)
        self.day, self.before_day = today, len(self.results.rows)

    def exit_code(self, is_whole: bool) -> int:
        """The exit code of the command: 0 if no other one applies, also if the user ended the run with Ctrl-C."""
        if self.config.fail_on_defect:
            self.codes |= {SOME_FLAGGED for row in self.rows if row.is_flagged}
            self.codes |= {SOME_UNDECIDED for row in self.rows if row.is_undecided}
        if is_whole and any(row.error for row in self.rows):
            self.codes.add(SOME_FAILED)
        order = (SOME_FLAGGED, SOME_UNDECIDED, CANNOT_WRITE, FOLDER_GONE, FEW_IMAGES, SOME_FAILED)
        return next((code for code in order if code in self.codes), 0)

    def _score(self, paths: Iterable[Path], watcher: Watcher | None = None) -> None:
        """Scores images and adds their rows. With a watcher, images that may become readable are left out."""
        previews = 0 if self.config.no_images else PAGE_IMAGES - len(self.previews)
        readers = reader_threads(self.config.num_workers, self.detector.clock.device)
        with closing(predict(self.detector, paths, self.outputs, readers, previews)) as scored:
            for row, preview in scored:
                if watcher and row.score is None and not watcher.gives_up(row.identity):
                    continue
                with self.interrupts.held():
                    if preview.thumbnail:
                        self.previews[len(self.results.rows)] = preview
                    self.results.add(row)
                    if self.lines is not None:
                        print(json.dumps(row.plain()), file=self.lines, flush=True)
                if watcher:
                    _print_faults(row, f"{row.time} ")
                    if row.score is not None:
                        print(f"{row.time} {_outcome(row)}", flush=True)
                    self._refresh_if_due()

    def _refresh_if_due(self) -> None:
        begin = time.monotonic()
        if begin >= self.next_refresh and self.refreshed < len(self.results.rows):
            self._refresh()
            took = time.monotonic() - begin
            self.next_refresh = begin + max(REFRESH_SECONDS, took / REFRESH_SHARE)

    def _refresh(self, total_seconds: float | None = None) -> None:
        """Writes scores.json, with all rows, and report.html."""
        rows = {number: row for number, row in enumerate(self.results.rows) if self._is_own(row)}
        drift = self._drift()
        write_json(self.config.output / SUMMARY, self._summary(total_seconds, drift))
        if not self.config.no_images:
            self.previews = choose_previews(rows, self.previews, self.config.output)
        file, others = self.config.save or self.config.detector, len(self.results.rows) - len(rows)
        page = report_page(self.detector, self.outputs.detector, file, rows, others, self.previews, self.root, drift)
        write_page(self.config.output / PAGE, page._replace(references=self.known_images))
        self.refreshed = len(self.results.rows)

    def _is_own(self, row: Prediction) -> bool:
        """Whether this detector and this threshold decided on the image: the page has one threshold for all."""
        threshold = self.detector.threshold
        return (row.detector, row.threshold) == (self.outputs.detector, threshold and threshold.value)

    def _summary(self, total_seconds: float | None, drift: Sequence[str]) -> dict:
        """The content of scores.json."""
        detector, identity = self.detector, self.outputs.detector
        threshold = detector.threshold and detector.threshold.value
        return {
            "config": self.config.plain(),
            "resolved": {"bits": detector.bits, "img_size": detector.size, "device": str(detector.clock.device)},
            "fingerprint": fingerprint({"threshold": threshold}, {"detector": identity}),
            **provenance(detector.clock.device),
            "detector": detector.origin,
            "detector_id": identity,
            "decision_id": detector.decision_identity(),
            **settings(detector),
            "map_scale": map_scale(detector),
            "normal_images": {
                "leave_one_out": listed(detector.loo_scores),
                "calibration": listed(detector.calibration),
            },
            "known_defects": [defect._asdict() for defect in self.defects],
            "warnings": [*detector.warnings, *drift],
            "counts": count_decisions(self.results.rows),
            "images": [row.plain() for row in self.results.rows],
            "seconds": detector.clock.seconds,
            "total_seconds": total_seconds,
            "peak_memory_mb": peak_memory_mb(),
        }

    def _drift(self) -> list[str]:
        """What has changed in the images of this output folder, as sentences."""
        gate = self.detector.gate
        return gate.drift([row.quality for row in self.results.rows if row.quality]) if gate else []

    def _summarise(self, is_whole: bool) -> None:
        """Prints the failed images, those to look at, highest score first, and the number of decisions of this call."""
        if not self.config.watch:
            for row in self.rows:
                _print_faults(row)
            flagged = sorted((row for row in self.rows if row.is_flagged), key=lambda row: -row.score)
            for row in flagged[:MOST_FLAGGED]:
                print(_outcome(row))
            if len(flagged) > MOST_FLAGGED:
                print(f"and {len(flagged) - MOST_FLAGGED} more, see {self.config.output / SCORES}")
        for sentence in self._drift():
            print(f"warning: {sentence}", file=sys.stderr)
        in_all = f" ({len(self.results.rows)} results in all)" if self.earlier else ""
        stopped = "" if is_whole else "stopped: "
        print(f"{now()} {stopped}{self._counts(self.rows)}: {self.config.output}{in_all}")

    def _counts(self, rows: Sequence[Prediction]) -> str:
        """The numbers of decisions as text."""
        count, doubtful = count_decisions(rows), sum(row.warning is not None for row in rows)
        is_classified = self.detector.threshold is not None
        decided = f"{count[DEFECTIVE]} defective" if is_classified else "not classified"
        parts = [f"{_images(count['scored'])} scored", decided, f"{count['failed']} failed"]
        parts += [f"{count[REVIEW]} for review"] if count[REVIEW] else []
        parts += [f"{doubtful} with a warning"] if doubtful else []
        return ", ".join(parts)


def _today() -> date:
    return date.today()


def _images(count: int) -> str:
    return f"{count} image{'' if count == 1 else 's'}"


def _outcome(row: Prediction) -> str:
    why = f": {row.reason}" if row.reason else ""
    return one_line(f"{row.path}: {row.score:.3f} {row.decision or ''}{why}".rstrip())


def _print_faults(row: Prediction, time: str = "") -> None:
    for what, reason in (("failed", row.error), ("warning", row.warning)):
        if reason:
            print(one_line(f"{time}{what}: {reason}"), file=sys.stderr)
