"""Exports a fitted detector to an ONNX or torch.export file, for use without this project.

python export.py --detector part.regad --output part.onnx --check photos/
"""

from __future__ import annotations

from collections.abc import Sequence

from inspection.config import ExportConfig
from utils.config import Parser
from utils.errors import require_packages, run_command


def get_args_parser() -> Parser[ExportConfig]:
    """The command line of export.py."""
    return Parser(ExportConfig, __doc__.splitlines()[0])


def main(argv: Sequence[str] | None = None) -> None:
    """Fits or loads the detector, writes the files, and compares them with PyTorch."""
    config = get_args_parser().parse_config(argv)
    from datasets.images import limit_pixels  # all of these are slow: they import torch
    from inspection.export import WRITERS, compare_files
    from inspection.fitting import known_defects, make_detector
    from inspection.inputs import list_inputs
    from utils.devices import command_device
    from utils.files import require_writable

    output = config.output.with_suffix("") if config.output.suffix[1:] in WRITERS else config.output
    files = {kind: output.with_name(f"{output.name}.{kind}") for kind in config.format}
    for file in files.values():
        require_writable(file, "--output")
    if "onnx" in files:
        require_packages("onnx", "onnxscript", *([] if config.compare is None else ["onnxruntime"]))
    command_device("cpu")
    limit_pixels(config.max_pixels)
    images = None if config.compare is None else list_inputs(config.compare or config.support)
    detector = make_detector(config, "cpu")
    known_defects(detector, config)
    for kind, path in files.items():
        WRITERS[kind](detector, path)
        print(f"{kind}: {path} ({path.stat().st_size / 2**20:.0f} MB)")
    if images:
        compare_files(detector, files, images, are_support=not config.compare)


if __name__ == "__main__":
    run_command(main, get_args_parser)
