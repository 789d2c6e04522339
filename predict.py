"""Scores images against a few normal images of the same part; writes heat maps, decisions and a report.

python predict.py --support good_1.png good_2.png --input photos/ --output out
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

from inspection.detector import FewShotDetector
from inspection.flags import add_detector_flags, check_detector_flags, make_detector
from inspection.inputs import absolute, list_inputs, watch
from inspection.predictions import Outputs, Prediction, ScoreTable, map_scale, predict, read_scores
from inspection.report import report_page
from reports.page import PAGE_IMAGES, write_page
from scorers.registry import RELEASE_SCORER
from utils.errors import UserError, require_positive, run_command
from utils.files import write_json
from utils.records import peak_memory_mb, plain_arguments, provenance

SOME_FAILED = 1  # exit code if some images failed; all others are processed


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of predict.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_argument_group("images")
    what.add_argument("--input", nargs="+", type=Path, metavar="PATH", help="images to score: files or folders")
    what.add_argument("--watch", type=Path, metavar="DIR", help="score images as they arrive here, until Ctrl-C")
    what.add_argument("--output", type=Path, default=Path("./predictions"), help="folder of all output files")
    add_detector_flags(parser)
    run = parser.add_argument_group("run")
    run.add_argument("--save", type=Path, metavar="FILE", help="save the detector to a file, e.g. part.regad")
    run.add_argument(
        "--maps",
        choices=("none", "png", "npy"),
        default="none",
        help="score maps; png: 16 bits, scaled by map_scale in scores.json",
    )
    run.add_argument("--no_pictures", action="store_true", help="write only scores and the report")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    run.add_argument("--num_workers", type=int, default=2, help="threads that decode and draw")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Fits or loads the detector, scores all images, and writes the table, the record and the report."""
    args = get_args_parser().parse_args(argv)
    _check(args)
    paths = list_inputs(args.input, args.output) if args.input else []
    detector = make_detector(args, args.device)
    if args.save:
        detector.save(args.save)
        print(f"detector: {args.save}")
    if args.watch:
        _watch(detector, args)
    elif paths:
        failed = _predict(detector, paths, args)
        for row in failed:
            print(f"failed: {row.error}", file=sys.stderr)
        if failed:
            sys.exit(SOME_FAILED)


def _check(args: argparse.Namespace) -> None:
    check_detector_flags(args)
    require_positive(args, "num_workers")
    if args.input and args.watch:
        raise UserError("--input and --watch exclude each other; images already in the watched folder come first")
    if not (args.input or args.watch or args.save):
        raise UserError("nothing to do: give images with --input or --watch, or a file to --save the detector in")
    if absolute(args.output) in [absolute(path) for path in (args.input or []) + [args.watch or Path("/")]]:
        raise UserError(f"--output {args.output} is also where the images come from; give another folder")
    if args.watch and not args.watch.is_dir():
        raise UserError(f"no folder {args.watch} to watch")


def _predict(detector: FewShotDetector, paths: Sequence[Path], args: argparse.Namespace) -> list[Prediction]:
    """Scores `paths` and writes all output files; returns the rows that failed."""
    root = Path(os.path.commonpath([absolute(path).parent for path in paths]))
    detector.clock.seconds.clear()  # discard the times of fitting
    begin = time.perf_counter()
    rows = list(_rows(detector, tqdm(paths, unit="image", disable=None), root, args, PAGE_IMAGES, False))
    seconds = time.perf_counter() - begin
    _finish(detector, rows, root, args, seconds)
    failed, doubtful = [row for row in rows if row.error], [row for row in rows if row.warning]
    for row in doubtful:
        print(f"warning: {row.warning}", file=sys.stderr)
    scored, calls = sum(row.score is not None for row in rows), sum(row.decision == "defective" for row in rows)
    print(f"{scored} images scored, {calls} defective, {len(failed)} failed{_count_doubtful(doubtful)}: {args.output}")
    print(f"{seconds:.1f} s, {1000 * seconds / len(rows):.0f} ms per image")
    total = sum(detector.clock.seconds.values())
    print("work:", ", ".join(f"{stage} {s / total:.0%}" for stage, s in detector.clock.seconds.items()))
    return failed


def _count_doubtful(doubtful: Sequence[Prediction]) -> str:
    return f", {len(doubtful)} beyond the bit depth" if doubtful else ""


def _watch(detector: FewShotDetector, args: argparse.Namespace) -> None:
    """Scores images as they arrive; table, record and report are updated after each group.

    Resumes an earlier watch with the same output folder. Its images, including unreadable ones, are not scored again.
    Their decisions use the current threshold.
    """
    _check_same_scorer(detector, args.output)
    rows, root = read_scores(args.output / "scores.csv", detector.threshold), absolute(args.watch)
    print(f"watching {args.watch}; press Ctrl-C to stop" + (f"; {len(rows)} images scored before" if rows else ""))
    for arrived in watch(args.watch, args.output, done={row.path for row in rows}):
        previews = PAGE_IMAGES - sum(bool(row.preview.thumbnail) for row in rows)
        for row in _rows(detector, arrived, root, args, previews, True):
            rows.append(row)
            if row.warning:
                print(f"warning: {row.warning}", file=sys.stderr)
            print(f"{row.path}: {row.error or f'{row.score:.3f} {row.decision or str()}'}", flush=True)
        _finish(detector, rows, root, args)


def _check_same_scorer(detector: FewShotDetector, output: Path) -> None:
    """Raises UserError where the folder holds scores of another scorer, which the threshold does not fit."""
    file = output / "scores.json"
    if not file.is_file():
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        before = content.get("scorer", RELEASE_SCORER)  # earlier versions had no other
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read {file}: {' '.join(str(error).split())}; give another --output") from error
    if before != detector.scorer.name:
        raise UserError(
            f"{output} holds scores of the scorer {before}, not {detector.scorer.name}: "
            "give another --output, or --scorer as before"
        )


def _rows(
    detector: FewShotDetector, paths: Iterable[Path], root: Path, args: argparse.Namespace, previews: int, append: bool
) -> Iterator[Prediction]:
    outputs = Outputs(args.output, root, not args.no_pictures, args.maps)
    with closing(ScoreTable(args.output / "scores.csv", append)) as table:
        for row in predict(detector, paths, outputs, args.num_workers, previews):
            table.add(row)
            yield row


def _finish(
    detector: FewShotDetector,
    rows: Sequence[Prediction],
    root: Path,
    args: argparse.Namespace,
    total_seconds: float | None = None,
) -> None:
    """Writes scores.json and report.html. The report names images relative to `root`."""
    threshold = detector.threshold
    content = {
        "arguments": plain_arguments(args),
        **provenance(detector.clock.device),
        "detector": detector.origin,
        "scorer": detector.scorer.name,
        "backbone": getattr(detector.network, "backbone", None),
        "img_size": detector.size,
        "bits": detector.bits,
        "map_scale": map_scale(detector),
        "threshold": None if threshold is None else threshold._asdict(),
        "pictures": [{key: value for key, value in row._asdict().items() if key != "preview"} for row in rows],
        "seconds": detector.clock.seconds,
        "total_seconds": total_seconds,
        "peak_memory_mb": peak_memory_mb(),
    }
    write_json(args.output / "scores.json", content)
    page = report_page(detector, args.save or args.detector, rows, root)
    write_page(args.output / "report.html", page)


if __name__ == "__main__":
    run_command(main)
