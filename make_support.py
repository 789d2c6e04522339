"""Command: draw support sets (K normal images per round), or find and check the images of existing ones.

python make_support.py --obj screw --shots 2 4 8 --rounds 10 --data_path ./MVTec/
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from datasets.images import limit_pixels, resolve_bits
from datasets.manifest import (
    DRAW_SEED,
    Manifest,
    draw_from_folder,
    load_manifest,
    save_manifest,
    verify,
    with_hashes,
)
from datasets.mvtec import CATEGORIES, category_folder, list_train_images
from datasets.support import find_names, read_rounds, save_support_rounds, support_file
from utils.errors import UserError, require_positive, run_command
from utils.files import require_writable, sha256
from utils.flags import DEFAULT_SUPPORT_PATH, add_data_flags, add_image_flags, category_name


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of make_support.py."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    task = parser.add_argument_group("task: draw, or one of --from_pt and --verify")
    task.add_argument(
        "--obj", type=category_name, nargs="+", metavar="CATEGORY", help="categories to draw from; not for --verify"
    )
    task.add_argument("--shots", nargs="+", type=int, default=[2], metavar="K", help="images per round")
    task.add_argument("--rounds", type=int, default=10, help="rounds per support set (test.py's --inferences)")
    task.add_argument("--seed", type=int, default=DRAW_SEED, help="seed of the draw")
    task.add_argument("--names_only", action="store_true", help="write manifests only; test.py reads both")
    task.add_argument(
        "--from_pt", type=Path, metavar="FILE", help="find the training images that a .pt file was made of"
    )
    task.add_argument("--verify", nargs="+", type=Path, metavar="MANIFEST", help="check manifests against the data")
    task.add_argument(
        "--write_hashes", action="store_true", help="with --verify: write the SHA-256 into manifests that fit"
    )
    data = parser.add_argument_group("data")
    add_data_flags(data, CATEGORIES)
    data.add_argument("--support_path", type=Path, default=DEFAULT_SUPPORT_PATH, help="folder to write to")
    data.add_argument("--img_size", type=int, default=224, help="side of the stored images in pixels")
    add_image_flags(data, strict=False)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Does the task that the arguments select, and prints the images of every round."""
    args = get_args_parser().parse_args(argv)
    require_positive(args, "shots", "rounds", "img_size", "max_pixels")
    limit_pixels(args.max_pixels)
    tasks = {"--obj": args.obj and not args.from_pt, "--from_pt": args.from_pt, "--verify": args.verify}
    if sum(map(bool, tasks.values())) != 1:
        raise UserError("give one task: --obj CATEGORY ..., --from_pt FILE or --verify MANIFEST ...")
    if not args.verify:
        require_writable(args.support_path, "--support_path", folder=True)
    if args.verify:
        _verify(args)
    elif args.from_pt:
        _find_names(args)
    else:
        for category in args.obj:
            _draw(args, category)


def _draw(args: argparse.Namespace, category: str) -> None:
    """Draws the largest set and writes every shot as a part of it, because draws are nested."""
    folder = category_folder(args.data_path, args.data_type, category)
    drawn = with_hashes(draw_from_folder(folder, max(args.shots), args.rounds, args.seed), folder)
    decoded = [] if args.names_only else list_train_images(folder)
    images, bits = [], resolve_bits(args.bits, decoded, category)
    if not args.names_only:
        images = read_rounds(folder, drawn, args.img_size, args.keep_aspect, bits)
    for shot in args.shots:
        target = support_file(args.support_path, category, shot, args.rounds)
        _reject_foreign_file(target)
        part = drawn.part(shot, args.rounds)
        if images:
            save_support_rounds(target, [of_round[:shot].clone() for of_round in images])
            part = part._replace(tensors=sha256(target), keep_aspect=args.keep_aspect, bits=bits)
        save_manifest(target.with_suffix(".json"), part)
        print(f"wrote {target if images else target.with_suffix('.json')}")
        _print_rounds(part)


def _reject_foreign_file(target: Path) -> None:
    """Raises UserError where `target` is a tensor file that this command did not write, such as the release's."""
    beside = target.with_suffix(".json")
    if target.is_file() and not (beside.is_file() and load_manifest(beside).tensors == sha256(target)):
        raise UserError(f"{target} was not written by this command; remove it or give another --support_path")


def _find_names(args: argparse.Namespace) -> None:
    category = args.obj[0] if args.obj else args.from_pt.absolute().parent.name
    folder = category_folder(args.data_path, args.data_type, category)
    bits = resolve_bits(args.bits, list_train_images(folder), category)
    manifest, differences = find_names(args.from_pt, folder, args.keep_aspect, bits)
    target = args.support_path / category / args.from_pt.with_suffix(".json").name
    save_manifest(target, manifest)
    _print_rounds(manifest)
    print(manifest.origin)
    for name, difference in differences.items():
        print(f"  {name}: nearest, mean difference {difference:.3f} of 255")
    print(f"wrote {target}")


def _verify(args: argparse.Namespace) -> None:
    bad = 0
    for file in args.verify if args.write_hashes else ():
        require_writable(file, "--verify")
    for file in args.verify:
        manifest = load_manifest(file)
        folder = category_folder(args.data_path, args.data_type, manifest.category)
        problems = verify(manifest, folder)
        bad += bool(problems)
        count = len(manifest.names())
        if args.write_hashes and not problems:
            manifest = manifest._replace(sha256=with_hashes(manifest, folder).sha256)
            save_manifest(file, manifest)
        unverified = f"; {phrase}" if (phrase := manifest.unverified()) else ""
        state = f"{count} images found, {len(manifest.sha256)} with a SHA-256{unverified}"
        print(f"{file}: {state if not problems else f'{len(problems)} problem(s)'}")
        for problem in problems:
            print(f"  {problem}")
    if bad:
        raise UserError(f"{bad} of {len(args.verify)} manifest(s) do not fit the data in {args.data_path}")


def _print_rounds(manifest: Manifest) -> None:
    for number, names in enumerate(manifest.rounds):
        print(f"  round {number}: {' '.join(names)}")


if __name__ == "__main__":
    run_command(main)
