"""Command: draw support sets (K normal images per round), or find and check the images of existing ones.

python make_support.py --obj screw --shots 2 4 8 --rounds 10 --data_path ./MVTec/
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from datasets.images import limit_pixels, resolve_bits
from datasets.manifest import DRAW_SEED, Manifest, draw_from_folder, load_manifest, save_manifest, verify, with_hashes
from datasets.mvtec import category_folder, category_name, list_train_images
from datasets.support import DEFAULT_SUPPORT_PATH, find_names, read_rounds, support_file
from evaluation.config import DataConfig, ImageConfig
from utils.config import Parser, flag
from utils.errors import UserError, run_command
from utils.files import require_writable, save_tensors, sha256

TASK = "task: draw, or one of --from_pt and --verify"


@dataclass(frozen=True, kw_only=True)
class SupportSetConfig(ImageConfig, DataConfig):
    """The flags of make_support.py."""

    obj: tuple[str, ...] = flag(
        "categories to draw from; not for --verify", default=(), group=TASK, convert=category_name, metavar="CATEGORY"
    )
    shots: tuple[int, ...] = flag("images per round", default=(2,), group=TASK, least=1, metavar="K")
    rounds: int = flag("rounds per support set (--inferences of test.py)", default=10, group=TASK, least=1)
    seed: int = flag("seed of the draw", default=DRAW_SEED, group=TASK)
    names_only: bool = flag("write manifests only; test.py reads both", default=False, group=TASK)
    from_pt: Path | None = flag(
        "find the training images that a .pt file was made of", default=None, group=TASK, metavar="FILE"
    )
    verify: tuple[Path, ...] = flag("check manifests against the data", default=(), group=TASK, metavar="MANIFEST")
    write_hashes: bool = flag("with --verify: write the SHA-256 into manifests that fit", default=False, group=TASK)
    support_path: Path = flag("folder to write to", default=DEFAULT_SUPPORT_PATH, group="data")
    img_size: int = flag("side of the stored images in pixels", default=224, group="data", least=1)

    def check(self) -> None:
        """Raises UserError unless the flags give one task."""
        if sum(map(bool, (self.obj and not self.from_pt, self.from_pt, self.verify))) != 1:
            raise UserError("give one task: --obj CATEGORY ..., --from_pt FILE or --verify MANIFEST ...")


def get_args_parser() -> Parser[SupportSetConfig]:
    """The command line of make_support.py."""
    return Parser(SupportSetConfig, __doc__.splitlines()[0])


def main(argv: Sequence[str] | None = None) -> None:
    """Does the task that the arguments select, and prints the images of every round."""
    config = get_args_parser().parse_config(argv)
    limit_pixels(config.max_pixels)
    if config.verify:
        _verify(config)
        return
    require_writable(config.support_path, "--support_path", folder=True)
    if config.from_pt:
        _find_names(config)
        return
    for category in config.obj:
        _draw(config, category)


def _draw(config: SupportSetConfig, category: str) -> None:
    """Draws the largest set and writes every shot as a part of it, because draws are nested."""
    folder = category_folder(config.data_path, config.data_type, category)
    drawn = with_hashes(draw_from_folder(folder, max(config.shots), config.rounds, config.seed), folder)
    images, bits = [], config.bits
    if not config.names_only:
        bits = resolve_bits(config.bits, list_train_images(folder), category)
        images = read_rounds(folder, drawn, config.img_size, config.keep_aspect, bits)
    for shot in config.shots:
        target = support_file(config.support_path, category, shot, config.rounds)
        manifest = target.with_suffix(".json")
        if target.is_file() and not (manifest.is_file() and load_manifest(manifest).tensors == sha256(target)):
            raise UserError(f"{target} was not written by this command; remove it or give another --support_path")
        part = drawn.part(shot, config.rounds)
        if images:
            save_tensors(target, [of_round[:shot].clone() for of_round in images])
            part = part._replace(tensors=sha256(target), keep_aspect=config.keep_aspect, bits=bits)
        save_manifest(manifest, part)
        print(f"wrote {target if images else manifest}")
        _print_rounds(part)


def _find_names(config: SupportSetConfig) -> None:
    category = config.obj[0] if config.obj else config.from_pt.absolute().parent.name
    folder = category_folder(config.data_path, config.data_type, category)
    bits = resolve_bits(config.bits, list_train_images(folder), category)
    manifest, differences = find_names(config.from_pt, folder, config.keep_aspect, bits)
    target = config.support_path / category / config.from_pt.with_suffix(".json").name
    save_manifest(target, manifest)
    _print_rounds(manifest)
    print(manifest.origin)
    for name, difference in differences.items():
        print(f"  {name}: nearest, mean difference {difference:.3f} of 255")
    print(f"wrote {target}")


def _verify(config: SupportSetConfig) -> None:
    bad = 0
    for file in config.verify if config.write_hashes else ():
        require_writable(file, "--verify")
    for file in config.verify:
        manifest = load_manifest(file)
        folder = category_folder(config.data_path, config.data_type, manifest.category)
        problems = verify(manifest, folder)
        bad += bool(problems)
        if config.write_hashes and not problems:
            manifest = with_hashes(manifest, folder)
            save_manifest(file, manifest)
        unverified = f"; {phrase}" if (phrase := manifest.unverified()) else ""
        state = f"{len(manifest.names())} images found, {len(manifest.sha256)} with a SHA-256{unverified}"
        print(f"{file}: {state if not problems else f'{len(problems)} problem(s)'}")
        for problem in problems:
            print(f"  {problem}")
    if bad:
        raise UserError(f"{bad} of {len(config.verify)} manifest(s) do not fit the data in {config.data_path}")


def _print_rounds(manifest: Manifest) -> None:
    for number, names in enumerate(manifest.rounds):
        print(f"  round {number}: {' '.join(names)}")


if __name__ == "__main__":
    run_command(main, get_args_parser)
