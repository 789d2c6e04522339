"""Scores images against a few normal images of the same part; writes heat maps, decisions and a report.

python predict.py --support good_1.png good_2.png --input photos/ --output out
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import closing, redirect_stdout, suppress
from pathlib import Path
from typing import TextIO

from tqdm import tqdm

from inspection.detector import FewShotDetector
from inspection.flags import add_detector_flags, check_detector_flags, make_detector
from inspection.inputs import (
    GIVE_UP_SECONDS,
    POLL_SECONDS,
    Watcher,
    absolute,
    identify,
    list_inputs,
)
from inspection.predictions import PANELS, Outputs, map_scale, predict
from inspection.report import choose_previews, is_made_with, known_images, plain_known, report_page
from inspection.results import (
    DEFECTIVE,
    PAGE,
    SCORES,
    SUMMARY,
    UNUSUAL,
    Prediction,
    ResultFiles,
    count_decisions,
    has_results,
)
from inspection.tiles import describe_tiling
from reports.page import PAGE_IMAGES, write_page
from utils.errors import UserError, require_positive, run_command
from utils.files import require_writable, write_json
from utils.interrupts import Interrupts
from utils.records import peak_memory_mb, plain_arguments, provenance

SOME_FAILED = 1  # exit code if some images failed; all others are processed
SOME_CALLED = 3  # exit code with --fail_on_defect if an image is defective or unusual; comes before SOME_FAILED
MOST_CALLED = 10  # images with another decision than normal that are printed at the end
REFRESH_SECONDS, REFRESH_SHARE = 5.0, 0.05  # --watch writes scores.json and the report so seldom, in so little time


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of predict.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_argument_group("images")
    what.add_argument("--input", nargs="+", type=Path, metavar="PATH", help="images to score: files or folders")
    what.add_argument(
        "--watch",
        type=Path,
        metavar="DIR",
        help="score images as they arrive here, until Ctrl-C; an unreadable one is tried again until it has not "
        f"changed for {GIVE_UP_SECONDS:g} s",
    )
    what.add_argument("--output", type=Path, default=Path("./predictions"), help="folder of all output files")
    earlier = what.add_mutually_exclusive_group()
    earlier.add_argument("--append", action="store_true", help="keep the results in --output, score only new images")
    earlier.add_argument("--overwrite", action="store_true", help="remove the results in --output")
    add_detector_flags(parser)
    run = parser.add_argument_group("run")
    run.add_argument("--save", type=Path, metavar="FILE", help="save the detector to a file, e.g. part.regad")
    run.add_argument(
        "--maps",
        choices=("none", "png", "npy"),
        default="none",
        help="score maps; png: 16 bits, scaled by map_scale in scores.json",
    )
    run.add_argument("--jsonl", action="store_true", help="each result as a line of JSON on stdout, the rest on stderr")
    run.add_argument(
        "--fail_on_defect", action="store_true", help=f"exit code {SOME_CALLED} if an image is defective or unusual"
    )
    run.add_argument(
        "--panels",
        choices=PANELS,
        default=PANELS[0],
        help="input, heat map and outlines in one file per image, or in a file each, without titles",
    )
    run.add_argument("--no_pictures", action="store_true", help="write only scores and the report")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    run.add_argument("--num_workers", type=int, default=2, help="threads that decode and draw")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Fits or loads the detector, scores all images, and writes the tables, the record and the report."""
    args = get_args_parser().parse_args(argv)
    lines = sys.stdout if args.jsonl else None
    with redirect_stdout(sys.stderr if args.jsonl else sys.stdout):
        code = _run(args, lines)
    if code:
        sys.exit(code)


def _run(args: argparse.Namespace, lines: TextIO | None) -> int:
    """The command; returns its exit code. lines: where the results go as lines of JSON."""
    _check(args)
    paths = list_inputs(args.input, args.output) if args.input else []
    detector = make_detector(args, args.device)
    if args.save:
        detector.save(args.save)
        print(f"detector: {args.save}")
    if not (args.watch or paths):
        return 0
    root = absolute(args.watch) if args.watch else Path(os.path.commonpath([absolute(p).parent for p in paths]))
    with closing(ResultFiles(args.output, args.overwrite)) as results:
        run = Run(detector, args, results, root, lines)
        with run.interrupts:
            is_whole = run.watch() if args.watch else run.score_all(paths)
    return run.exit_code(is_whole)


def _check(args: argparse.Namespace) -> None:
    check_detector_flags(args)
    require_positive(args, "num_workers")
    if args.input and args.watch:
        raise UserError("--input and --watch exclude each other; images already in the watched folder come first")
    if not (args.input or args.watch or args.save):
        raise UserError("nothing to do: give images with --input or --watch, or a file to --save the detector in")
    require_writable(args.output, "--output", folder=True)
    if args.save:
        require_writable(args.save, "--save")
    if absolute(args.output) in [absolute(path) for path in (args.input or []) + [args.watch or Path("/")]]:
        raise UserError(f"--output {args.output} is also where the images come from; give another folder")
    if args.watch and not args.watch.is_dir():
        raise UserError(f"no folder {args.watch} to watch")
    if args.input and has_results(args.output) and not (args.append or args.overwrite):
        raise UserError(
            f"{args.output} holds results of an earlier run: give --append, --overwrite or another --output"
        )


class Run:
    """One call: scores images, adds their rows to the result files, and writes scores.json and report.html.

    lines: where the rows also go as lines of JSON, or None.
    """

    def __init__(
        self,
        detector: FewShotDetector,
        args: argparse.Namespace,
        results: ResultFiles,
        root: Path,
        lines: TextIO | None,
    ) -> None:
        self.detector, self.args, self.results, self.root, self.lines = detector, args, results, root, lines
        self.interrupts = Interrupts()
        self.earlier = self.refreshed = len(results.rows)  # rows before this call, and in scores.json
        self.next_refresh = 0.0
        panels = None if args.no_pictures else args.panels
        self.outputs = Outputs(args.output, root, panels, args.maps, detector.identity(), results.taken)
        self.known_images = known_images(detector)
        detector.clock.seconds.clear()  # discard the times of fitting

    @property
    def rows(self) -> list[Prediction]:
        """The rows of this call."""
        return self.results.rows[self.earlier :]

    def score_all(self, paths: Sequence[Path]) -> bool:
        """Scores the images that the output folder has no result of; returns False if it was interrupted."""
        new = [path for path in paths if identify(path) not in self.results.done]
        if len(new) < len(paths):
            print(f"{len(paths) - len(new)} of {len(paths)} images have results in {self.args.output} already")
            self._mention_other_decisions()
        begin = time.perf_counter()
        is_whole = False
        with suppress(KeyboardInterrupt):
            self._score(tqdm(new, unit="image", disable=None))
            is_whole = True
        with suppress(KeyboardInterrupt), self.interrupts.held():
            seconds = time.perf_counter() - begin
            self._refresh(seconds)
            self._summarise(is_whole)
            if self.rows:
                print(f"{seconds:.1f} s, {1000 * seconds / len(self.rows):.0f} ms per image")
                stages, total = self.detector.clock.seconds, sum(self.detector.clock.seconds.values())
                print("work:", ", ".join(f"{stage} {took / total:.0%}" for stage, took in stages.items()))
        return is_whole

    def watch(self) -> bool:
        """Scores images as they arrive, until it is interrupted; returns False.

        Resumes earlier runs with the same output folder: what they scored, or recorded as failed, is not tried again.

        Raises:
            UserError: the earlier rows are of another detector, and --append was not given.
        """
        self._check_same_detector()
        before = f"; {self.earlier} results before" if self.earlier else ""
        print(f"watching {self.args.watch}; press Ctrl-C to stop{before}", flush=True)
        watcher = Watcher(self.args.watch, self.args.output, self.results.done)
        with suppress(KeyboardInterrupt):
            while True:
                count = len(self.results.rows)
                self._score(watcher.scan(), watcher)
                self._refresh_if_due()
                if len(self.results.rows) == count:
                    time.sleep(POLL_SECONDS)
        with suppress(KeyboardInterrupt), self.interrupts.held():
            self._refresh()
            self._summarise(False)
        return False

    def exit_code(self, is_whole: bool) -> int:
        """See SOME_CALLED and SOME_FAILED; 0 otherwise, and where only the user ended the run."""
        if self.args.fail_on_defect and any(row.is_called for row in self.rows):
            return SOME_CALLED
        return SOME_FAILED if is_whole and any(row.error for row in self.rows) else 0

    def _check_same_detector(self) -> None:
        own = self.outputs.detector
        before = self.results.rows[-1].detector if self.results.rows else own
        if before != own and not self.args.append:
            raise UserError(
                f"{self.args.output} holds results of another detector ({before}, this one is {own}): "
                "give --append to add results of this one, --overwrite, another --output, or the detector as before"
            )

    def _mention_other_decisions(self) -> None:
        own = self.outputs.detector, self.detector.threshold
        others = sum(not is_made_with(row, *own) for row in self.results.rows)
        if others:
            what = "1 result is" if others == 1 else f"{others} results are"
            print(f"{what} of another detector or threshold and not on the page; --overwrite scores all images again")

    def _score(self, paths: Iterable[Path], watcher: Watcher | None = None) -> None:
        """Scores images and adds their rows. With a watcher, images that may become readable are left out."""
        previews = PAGE_IMAGES - sum(bool(row.preview.thumbnail) for row in self.results.rows)
        with closing(predict(self.detector, paths, self.outputs, self.args.num_workers, previews)) as rows:
            for row in rows:
                if watcher and row.score is None and not watcher.gives_up(row.identity):
                    continue
                with self.interrupts.held():
                    self.results.add(row)
                    self._print_line(row)
                if watcher:
                    _describe(row)
                    self._refresh_if_due()

    def _print_line(self, row: Prediction) -> None:
        if self.lines is None:
            return
        try:
            print(json.dumps(row.plain()), file=self.lines, flush=True)
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.lines.fileno())  # else Python complains once more at its end
            self.lines = None
            print("warning: nobody reads the lines of --jsonl any more; the run goes on", file=sys.stderr)

    def _refresh_if_due(self) -> None:
        begin = time.monotonic()
        if begin >= self.next_refresh and self.refreshed < len(self.results.rows):
            self._refresh()
            took = time.monotonic() - begin
            self.next_refresh = begin + max(REFRESH_SECONDS, took / REFRESH_SHARE)

    def _refresh(self, total_seconds: float | None = None) -> None:
        """Writes scores.json, with all rows, and report.html."""
        try:
            write_json(self.args.output / SUMMARY, self._summary(total_seconds))
            file = self.args.save or self.args.detector
            choose_previews(self.results.rows, self.args.output, self.outputs.detector, self.detector.threshold)
            page = report_page(
                self.detector, self.outputs.detector, file, self.results.rows, self.root, self.known_images
            )
            write_page(self.args.output / PAGE, page)
        except OSError as error:
            raise UserError(f"cannot write to {self.args.output}: {error.strerror}") from error
        self.refreshed = len(self.results.rows)

    def _summary(self, total_seconds: float | None) -> dict:
        detector = self.detector
        return {
            "arguments": plain_arguments(self.args),
            **provenance(detector.clock.device),
            "detector": detector.origin,
            "detector_id": self.outputs.detector,
            "scorer": detector.scorer.name,
            "backbone": getattr(detector.network, "backbone", None),
            "img_size": detector.size,
            "bits": detector.bits,
            "tiles": describe_tiling(detector.tiling),
            "has_region": detector.region is not None,
            "map_scale": map_scale(detector),
            "threshold": None if detector.threshold is None else detector.threshold._asdict(),
            **plain_known(detector),
            "counts": count_decisions(self.results.rows),
            "pictures": [row.plain() for row in self.results.rows],
            "seconds": detector.clock.seconds,
            "total_seconds": total_seconds,
            "peak_memory_mb": peak_memory_mb(),
        }

    def _list_called(self) -> None:
        """Prints the images of this call that somebody should look at, the highest score first."""
        called = sorted((row for row in self.rows if row.is_called), key=lambda row: -row.score)
        for row in called[:MOST_CALLED]:
            print(_outcome(row))
        if len(called) > MOST_CALLED:
            print(f"and {len(called) - MOST_CALLED} more, see {self.args.output / SCORES}")

    def _summarise(self, is_whole: bool) -> None:
        """Prints the failed images and the number of decisions of this call."""
        if not self.args.watch:
            for row in self.rows:
                _complain(row)
            self._list_called()
        count = count_decisions(self.rows)
        doubtful = sum(row.warning is not None for row in self.rows)
        is_classified = self.detector.threshold is not None
        decided = f"{count[DEFECTIVE]} defective" if is_classified else "not classified"
        plural = "" if count["scored"] == 1 else "s"
        parts = [f"{count['scored']} image{plural} scored", decided, f"{count['failed']} failed"]
        parts += [f"{count[UNUSUAL]} unusual"] if count[UNUSUAL] else []
        parts += [f"{doubtful} beyond the bit depth"] if doubtful else []
        in_all = f" ({len(self.results.rows)} results in all)" if self.earlier else ""
        print(f"{'' if is_whole else 'stopped: '}{', '.join(parts)}: {self.args.output}{in_all}")


def _describe(row: Prediction) -> None:
    """Prints the outcome of an image that arrived."""
    _complain(row)
    if row.score is not None:
        print(_outcome(row), flush=True)


def _outcome(row: Prediction) -> str:
    why = f": {row.unusual}" if row.unusual else ""
    return f"{row.path}: {row.score:.3f} {row.decision or ''}{why}".rstrip()


def _complain(row: Prediction) -> None:
    for kind, reason in (("failed", row.error), ("warning", row.warning)):
        if reason:
            print(f"{kind}: {reason}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
