"""Command: few-shot scoring of one category, image and pixel AUROC over several support sets.

python test.py --obj bottle --shot 2 --stn_mode rotation_scale
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from datasets.mvtec import CATEGORIES, LabelledDataset, LabelledImage, category_folder, list_test_items
from datasets.support import find_support_rounds
from evaluation.report import choose_examples, format_summary, save_heat_maps, summary
from evaluation.scoring import SCORING_BATCH, RoundResult, score_category
from models.regad import RegAD, checkpoint_file, last_file, load_checkpoint, untrained
from models.stn import SIZE_DIVISOR, STN_MODES
from utils.utils import (
    DEFAULT_SEED,
    StageClock,
    UserError,
    peak_memory_mb,
    plain_arguments,
    provenance,
    require_positive,
    resolve_device,
    run_command,
    seed_everything,
    sha256,
    write_json,
)


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of test.py: the release's flags, and ours."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_argument_group("what is scored")
    what.add_argument("--obj", required=True, metavar="CATEGORY", help="the category to score")
    what.add_argument("--data_type", choices=list(CATEGORIES), default="mvtec", help="folder: any names, same layout")
    what.add_argument("--data_path", type=Path, default=Path("./MVTec/"), help="folder that holds the categories")
    what.add_argument("--shot", type=int, default=2, metavar="K", help="support pictures per round")
    what.add_argument("--inferences", type=int, default=10, metavar="ROUNDS", help="rounds in the support set")
    what.add_argument("--support_path", type=Path, help="default: ./support_set, or drawn with seed 0")
    network = parser.add_argument_group("network")
    network.add_argument("--stn_mode", choices=list(STN_MODES), default="rotation_scale")
    network.add_argument("--img_size", type=int, default=224, help=f"side in pixels, a multiple of {SIZE_DIVISOR}")
    network.add_argument("--checkpoint", type=Path, help="default: where train.py and the release put it")
    network.add_argument("--last", action="store_true", help="score train.py's weights after the last epoch instead")
    network.add_argument("--untrained", action="store_true", help="score without any registration training")
    network.add_argument("--weights", default="imagenet", help="trunk for --untrained: imagenet, none, or a file")
    run = parser.add_argument_group("run")
    run.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    run.add_argument(
        "--batch_size", type=int, default=SCORING_BATCH, help="pictures per network pass; changes memory, not results"
    )
    run.add_argument("--num_workers", type=int, default=2, help="processes that decode pictures; 0: in this one")
    run.add_argument("--seed", type=int, default=DEFAULT_SEED, help="for --weights none; all else is deterministic")
    run.add_argument("--output", type=Path, default=Path("./results"), help="folder of the JSON record and pictures")
    run.add_argument("--save_images", type=int, default=0, metavar="N", help="heat-maps of round 0; -1: all pictures")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Checks all input, scores every round, prints the numbers and writes the record."""
    args = get_args_parser().parse_args(argv)
    _check_numbers(args)
    device = resolve_device(args.device)
    seed_everything(args.seed)
    folder = category_folder(args.data_path, args.data_type, args.obj)
    items = list_test_items(folder)
    support = find_support_rounds(args.support_path, folder, args.shot, args.inferences, args.img_size)
    model, checkpoint = _load_model(args)
    which = "_untrained" if args.untrained else "_last" if args.last else ""
    name = f"{args.obj}_{args.shot}_{args.stn_mode}{which}"
    print(f"scoring {args.obj}: {len(items)} test pictures, {checkpoint or f'untrained, weights {args.weights}'}")
    print(f"support: {support.source}")

    clock = StageClock(device)
    has_masks = any(item.mask is not None for item in items)
    dataset, labels = LabelledDataset(items, args.img_size), [item.label for item in items]
    scored = score_category(
        model.stn, dataset, labels, has_masks, support.pictures, clock, args.batch_size, args.num_workers
    )
    results = []
    for number, result in enumerate(scored):
        pixel = "n/a" if result.pixel_auroc is None else f"{result.pixel_auroc:.4f}"
        print(f"round {number}: image AUROC {result.image_auroc:.4f}, pixel AUROC {pixel}", flush=True)
        if number == 0 and args.save_images:
            _save_images(args, name, items, result)
        results.append({"image_auroc": result.image_auroc, "pixel_auroc": result.pixel_auroc})

    image, pixel = (summary([result[key] for result in results]) for key in ("image_auroc", "pixel_auroc"))
    print(
        f"mean +- SD of {len(results)} rounds: image AUROC {format_summary(image)}, pixel AUROC {format_summary(pixel)}"
    )
    record = args.output / f"{name}.json"
    content = {
        "arguments": plain_arguments(args),
        **provenance(device),
        "checkpoint": _file_record(checkpoint),
        "support_set": {"source": support.source, "names": support.names, "file": _file_record(support.file)},
        "test_pictures": len(items),
        "rounds": results,
        "image_auroc": image,
        "pixel_auroc": pixel,
        "seconds": clock.seconds,
        "peak_memory_mb": peak_memory_mb(),
    }
    write_json(record, content)
    print(f"record: {record}")


def _check_numbers(args: argparse.Namespace) -> None:
    require_positive(args, "shot", "inferences", "batch_size", "img_size")
    if args.img_size % SIZE_DIVISOR:
        raise UserError(f"--img_size must be a multiple of {SIZE_DIVISOR}, got {args.img_size}")
    if args.untrained + args.last + bool(args.checkpoint) > 1:
        raise UserError("--untrained, --last and --checkpoint exclude each other")
    if args.num_workers < 0:
        raise UserError(f"--num_workers must not be negative, got {args.num_workers}")


def _load_model(args: argparse.Namespace) -> tuple[RegAD, Path | None]:
    """The model and the checkpoint it came from (None: untrained)."""
    if args.untrained:
        return untrained(args.weights, args.stn_mode, args.img_size), None
    default = last_file if args.last else checkpoint_file
    checkpoint = args.checkpoint or default(Path("./save_checkpoints"), args.stn_mode, args.shot, args.obj)
    if not checkpoint.is_file():
        raise UserError(
            f"no checkpoint {checkpoint}; make it with: python train.py --obj {args.obj} --shot {args.shot} "
            f"--stn_mode {args.stn_mode} --data_path <data folder>. Or put the release's file there, name another "
            "with --checkpoint FILE, or score the network before training with --untrained"
        )
    return load_checkpoint(checkpoint, args.stn_mode, args.img_size), checkpoint


def _save_images(args: argparse.Namespace, name: str, items: list[LabelledImage], result: RoundResult) -> None:
    folder = args.output / name
    save_heat_maps(folder, items, result.maps.cpu().numpy(), choose_examples(items, args.save_images))
    print(f"heat-maps: {folder}")


def _file_record(path: Path | None) -> dict | None:
    return None if path is None else {"path": str(path), "sha256": sha256(path)}


if __name__ == "__main__":
    run_command(main)
