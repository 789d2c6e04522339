"""Meta-trains the registration network on all categories except the target.

python train.py --obj bottle --shot 2 --stn_mode rotation_scale
python train.py --obj bottle --shot 2 --select source       select the epoch without using bottle
"""

from __future__ import annotations

from collections.abc import Sequence

from training.config import TrainingConfig
from utils.config import Parser
from utils.errors import run_command


def get_args_parser() -> Parser[TrainingConfig]:
    """The command line of train.py: the flags of the release and those of this project."""
    return Parser(TrainingConfig, __doc__.splitlines()[0])


def main(argv: Sequence[str] | None = None) -> None:
    """Trains the network, scores it epoch by epoch, and writes checkpoints and a record."""
    config = get_args_parser().parse_config(argv)
    from training.run import run  # slow: imports torch

    run(config)


if __name__ == "__main__":
    run_command(main, get_args_parser)
