"""Implements make_support.py: draws, identifies and verifies support sets."""

from __future__ import annotations

from datasets.images import limit_pixels, resolve_bits
from datasets.manifest import Manifest, draw_from_folder, load_manifest, save_manifest, verify, with_hashes
from datasets.mvtec import category_folder, list_train_images
from datasets.support import find_names, read_rounds, support_file
from evaluation.config import SupportSetConfig
from utils.errors import UserError
from utils.files import require_writable, save_tensors, sha256


def run(config: SupportSetConfig) -> None:
    """Does the task of `config`, and prints the images of every round.

    Raises:
        UserError: data or a file cannot be used, or a manifest does not fit the data.
    """
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
    """Draws the set with the largest K; sets with fewer images per round are parts of it."""
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
