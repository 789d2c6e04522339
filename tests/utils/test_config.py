"""Configurations: fields as flags, checks, --config."""

from __future__ import annotations

import dataclasses
import json
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evaluation.config import RunConfig, ScoringConfig, SupportSetConfig
from inspection.config import ExportConfig, PredictConfig
from training.config import TrainingConfig
from utils.config import Config, Parser, flag, recorded
from utils.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Draw(Config):
    obj: str = flag("the category", group="data", affects_results=True)
    shot: tuple[int, ...] = flag("images per round", default=(2,), least=1, affects_results=True)
    rate: float = flag("a share of 5 %", default=0.05, least=0)
    mode: str = flag("how", default="fast", choices=("fast", "slow"))
    folder: Path | None = flag("where", default=None)
    strict: bool = flag("refuse more", default=False, aliases=("--severe",))
    nets: str = flag("networks", default="a", joined_by="+")

    def check(self):
        if self.strict and self.mode == "fast":
            raise UserError("--strict needs --mode slow")


def parse(*argv):
    return Parser(Draw, "Draws.").parse_config([str(word) for word in argv])


@pytest.mark.parametrize("words", [["b"], ["b", "c"], ["b+c", "d"]])
def test_several_words_are_joined(words, tmp_path):
    (tmp_path / "draw.json").write_text(json.dumps({"nets": words}))
    for argv in (["--nets", *words], ["--config", tmp_path / "draw.json"]):
        assert parse("--obj", "ring", *argv).nets == "+".join(words)


def test_flags_are_fields():
    config = parse("--obj", "ring", "--shot", 2, 4, "--folder", "a/b", "--severe", "--mode", "slow")
    assert config == Draw(obj="ring", shot=(2, 4), folder=Path("a/b"), strict=True, mode="slow")
    assert config.given == {"obj", "shot", "folder", "strict", "mode"}
    assert config.results_part() == {"obj": "ring", "shot": [2, 4]}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.obj = "board"


@given(
    st.text(min_size=1), st.lists(st.integers(1, 99), min_size=1), st.floats(0, 1e300), st.none() | st.just(Path("x/y"))
)
def test_plain_values_and_json_give_the_same_configuration_again(obj, shot, rate, folder):
    config = Draw(obj=obj, shot=tuple(shot), rate=rate, folder=folder)
    assert Draw.from_plain(json.loads(json.dumps(config.plain()))) == config


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "--obj is required: the category"),
        (["--obj", "a", "--shot", "0"], "--shot must be at least 1, got 0"),
        (["--obj", "a", "--rate", "nan"], "--rate must be a finite number"),
        (["--obj", "a", "--folder", ""], "--folder is empty: give a value, or leave it out"),
        (["--obj", "a", "--nets", ""], "--nets is empty"),
        (["--obj", "a", "--strict"], "--strict needs --mode slow"),
    ],
)
def test_wrong_values(argv, message):
    with pytest.raises(UserError, match=message):
        parse(*argv)


@pytest.mark.parametrize("argv", [["--obj"], ["--shot", "two"], ["--mode", "odd"], ["--sho", "1", "--none"]])
def test_argparse_errors_are_one_line(argv, capsys):
    with pytest.raises(SystemExit) as ended:
        parse(*argv)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: ")


def test_help_shows_defaults_and_percent_signs(capsys):
    with pytest.raises(SystemExit):
        parse("--help")
    text = " ".join(capsys.readouterr().out.split())
    assert "images per round (default: 2)" in text and "5 % (default: 0.05)" in text and "--severe" not in text


VALUES = {"obj": "ring", "shot": [4, 8], "folder": "f"}


@pytest.mark.parametrize("content", [VALUES, {"config": VALUES, "rounds": [1]}, {"arguments": VALUES | {"shot": 4}}])
def test_config_takes_values_from_files_and_the_command_line_wins(content, tmp_path):
    file = tmp_path / "record.json"
    file.write_text(json.dumps(content))
    assert parse("--config", file).folder == Path("f")
    assert parse("--config", file).shot[0] == 4
    assert parse("--config", file, "--shot", 1, "--obj", "board") == Draw(obj="board", shot=(1,), folder=Path("f"))


def test_a_setting_that_a_record_does_not_set_is_not_set(tmp_path):
    (tmp_path / "record.json").write_text(json.dumps({"config": VALUES | {"mode": None}}))
    assert parse("--config", tmp_path / "record.json").mode == "fast"


@pytest.mark.parametrize("key", ["recipe", "origin"])
def test_config_of_torch_files(key, tmp_path):
    torch.save({key: {"config": VALUES}, "weights": torch.zeros(2)}, tmp_path / "file.pt")
    assert parse("--config", tmp_path / "file.pt").shot == (4, 8)


def test_settings_of_other_commands(tmp_path, capsys):
    (tmp_path / "record.json").write_text(json.dumps({"config": VALUES | {"epochs": 3}}))
    assert parse("--config", tmp_path / "record.json").obj == "ring"
    assert "ignored: epochs" in capsys.readouterr().err
    (tmp_path / "own.json").write_text(json.dumps(VALUES | {"epochs": 3}))
    with pytest.raises(UserError, match="no such setting: epochs"):
        parse("--config", tmp_path / "own.json")


@pytest.mark.parametrize(
    "content",
    ["", "[1]", '{"rounds": {"a": 1}}', '{"obj": ["a"], "strict": "yes"}', "PK\x03\x04", "[" * 10**5, '{"obj": null}'],
)
def test_unusable_configuration_files(content, tmp_path):
    (tmp_path / "file.json").write_text(content)
    with pytest.raises(UserError, match=r"file\.json|--strict|--obj is empty"):
        parse("--config", tmp_path / "file.json")
    with pytest.raises(UserError, match="cannot read the configuration"):
        parse("--config", tmp_path / "missing.json")


def test_a_configuration_in_utf_16(tmp_path):
    """As Windows PowerShell writes it."""
    (tmp_path / "file.json").write_text(json.dumps(VALUES), encoding="utf-16")
    assert parse("--config", tmp_path / "file.json").shot == (4, 8)


def test_a_configuration_from_a_pipe():
    """As `--config <(...)` of a shell: it can be read once."""
    reader, writer = os.pipe()
    with open(writer, "w") as stream:
        json.dump(VALUES, stream)
    try:
        assert parse("--config", f"/dev/fd/{reader}").shot == (4, 8)
    finally:
        os.close(reader)


def test_recorded_is_empty_without_a_configuration():
    assert recorded({"rounds": []}) == {}


VALID = {
    RunConfig: {},
    SupportSetConfig: {"obj": ["x"]},
    TrainingConfig: {"obj": "x"},
    ScoringConfig: {"obj": "x"},
    PredictConfig: {"support": ["x"], "input": ["x"]},
    ExportConfig: {"support": ["x"], "output": "y.onnx"},
}
SEEDS = [(kind, "seed", seed) for kind in (RunConfig, PredictConfig, ExportConfig) for seed in (-1, 2**32, 10**30)]


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        *SEEDS,
        (SupportSetConfig, "seed", -1),
        (TrainingConfig, "momentum", 1.5),
        (ScoringConfig, "save_images", -7),
        (PredictConfig, "max_pixels", 0),
    ],
)
def test_numbers_out_of_range_are_one_sentence(kind, name, value):
    with pytest.raises(UserError, match=f"--{name} must be at"):
        kind.from_plain(VALID[kind] | {name: value})


def test_a_flag_is_named_as_it_is_spelt():
    with pytest.raises(UserError, match="--check is empty"):
        ExportConfig.from_plain(VALID[ExportConfig] | {"compare": [""]})


def test_numbers_at_the_limits_are_accepted():
    for kind, name, value in (
        *((kind, "max_pixels", 10**9) for kind in (PredictConfig, ExportConfig)),
        (PredictConfig, "num_workers", 0),
    ):
        assert getattr(kind.from_plain(VALID[kind] | {name: value}), name) == value
