"""Text files in encodings and with separators of spreadsheets, and closed, full and broken standard streams."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.layouts import VISA_SPLIT, LabelledImage
from datasets.manifest import draw_manifest, load_manifest
from datasets.mvtec import list_test_items
from experiments.results import read_results
from experiments.run import write_tables
from models.regad import checkpoint, load_checkpoint, untrained
from utils.errors import UserError, run_command
from utils.files import PROJECT_ROOT, load_tensors, save_tensors
from utils.records import git_commit
from utils.text import Stream, read_table, read_text

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]
WORDS = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=6)


@given(
    st.sampled_from(ENCODINGS),
    st.sampled_from([",", ", ", ";", "; ", "\t", "|"]),
    st.sampled_from(["\n", "\r\n"]),
    st.lists(st.tuples(WORDS, WORDS), max_size=4),
    st.sampled_from([[], [""], ["", "  "], [None]]),
    st.booleans(),
    st.sampled_from([None, "sep={}", '"SEP={}"']),
)
def test_tables_in_every_encoding_with_every_separator(encoding, separator, end, rows, blank, is_quoted, told):
    """blank: lines at the end, as spreadsheets leave them; None: of separators alone. told: a line for Excel."""
    lines = [told.format(separator[0])] if told else []
    lines += [
        separator.join(f'"{word}"' if is_quoted else word for word in row) for row in [("object", "label"), *rows]
    ]
    lines += [separator if line is None else line for line in blank]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.csv")
        path.write_bytes(end.join(lines).encode(encoding))
        assert read_table(path) == [{"object": one, "label": other} for one, other in rows]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_manifests_in_every_encoding(encoding, tmp_path):
    manifest = draw_manifest("ring", ["gr\u00fcn.png", "b.png"], 1, 2, 0)
    (tmp_path / "x.json").write_text(json.dumps(manifest._asdict(), ensure_ascii=False), encoding=encoding)
    assert load_manifest(tmp_path / "x.json") == manifest


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16-le", "utf-16-be", "utf-32-le"])  # without a mark
def test_other_encodings_are_one_sentence(encoding, tmp_path):
    (tmp_path / "x.json").write_bytes("gr\u00fcn".encode(encoding))
    with pytest.raises(ValueError, match="not text in UTF-8; save it as UTF-8"):
        read_text(tmp_path / "x.json")


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("separator", [",", ", ", ";", "\t"])
def test_visa_s_splits(encoding, separator, tmp_path):
    rows = [
        ("object", "Split", "LABEL", "image", "mask"),
        ("c", "test", "Normal", "c/a.png", ""),
        ("c", "Test", "ANOMALY", "c\\b.png", "c\\m.png"),
    ]
    file = tmp_path / VISA_SPLIT
    file.parent.mkdir()
    (tmp_path / "c").mkdir()
    file.write_bytes("\n".join(map(separator.join, rows)).encode(encoding))
    assert list_test_items(tmp_path / "c") == [
        LabelledImage(tmp_path / "c/b.png", (tmp_path / "c/m.png",), "anomaly"),
        LabelledImage(tmp_path / "c/a.png", (), "good"),
    ]
    file.write_text(file.read_text(encoding).replace("Normal", "fine"))
    with pytest.raises(UserError, match="labels normal and anomaly; there is no 'fine'") as caught:
        list_test_items(tmp_path / "c")
    assert len(str(caught.value)) < 400


COMMAND = (
    "import sys; from utils.errors import run_command; run_command(lambda _: ([print('x' * 99) for _ in range(999)], "
    "print('e', file=sys.stderr), open(sys.argv[1], 'w').close()))"
)


@pytest.mark.parametrize(
    ("redirected", "code"), [(">&-", 0), ("2>&-", 0), (">&- 2>&-", 0), ("| head -1", 0), ("> /dev/full", 2)]
)
def test_streams_never_end_the_work(redirected, code, tmp_path):
    line = f'"{sys.executable}" -c "{COMMAND}" "{tmp_path}/done" {redirected}; exit ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", line], cwd=PROJECT_ROOT, capture_output=True, text=True)
    assert done.returncode == code and (tmp_path / "done").exists(), done.stderr
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr
    assert ("cannot write the standard output: No space left" in done.stderr) == (code == 2)


def test_control_characters_do_not_reach_the_terminal():
    """A name of a file could clear the screen, or colour all that follows."""
    shown = io.StringIO()
    print("a\x1b[2Jb\x07\x9b.png\tgr\u00fcn", file=Stream(shown))
    assert shown.getvalue() == "a\\x1b[2Jb\\x07\\x9b.png\tgr\u00fcn\n"


def test_an_error_is_one_line_whatever_the_name_of_the_file(capsys):
    def fails(_):
        raise UserError("no file a\nb\r.png")

    with pytest.raises(SystemExit):
        run_command(fails)
    assert capsys.readouterr().err == "error: no file a\\nb\\r.png\n"


@pytest.mark.parametrize("recipe", [3, "x", None, {"resolved": 3}, {"config": 3}, {"resolved": None, "config": []}])
def test_checkpoints_whose_recipe_has_another_type(recipe, tmp_path):
    save_tensors(tmp_path / "x.pt", checkpoint(untrained("none", img_size=64), recipe))
    assert load_checkpoint(tmp_path / "x.pt", "rotation_scale", 64).stn.img_size == 64


def test_checkpoints_of_dataparallel_and_foreign_ones(tmp_path):
    save_tensors(tmp_path / "x.pt", checkpoint(untrained("none", img_size=64), {}))
    content = load_tensors(tmp_path / "x.pt", "checkpoint")
    wrapped = {
        part: {f"module.{name}": value for name, value in content[part].items()} for part in ("STN", "ENC", "PRED")
    }
    save_tensors(tmp_path / "x.pt", wrapped)
    load_checkpoint(tmp_path / "x.pt", "rotation_scale", 64)
    save_tensors(
        tmp_path / "x.pt",
        wrapped | {"PRED": {f"other.{'x' * 90}{n}": value for n, value in enumerate(content["PRED"].values())}},
    )
    with pytest.raises(UserError) as caught:
        load_checkpoint(tmp_path / "x.pt", "rotation_scale", 64)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("beside", "name"),
    [(Namespace(lr=1), r"argparse\.Namespace"), (np.float64(0.9), r"numpy\..*core\.multiarray\.scalar")],
)
def test_what_a_checkpoint_holds_besides_weights_is_named(beside, name, tmp_path):
    save_tensors(tmp_path / "x.pt", {"best": beside})
    with pytest.raises(UserError, match=f"holds objects that could run code: {name}"):
        load_tensors(tmp_path / "x.pt", "checkpoint")


def test_json_that_is_nested_too_deep_is_one_sentence(tmp_path):
    (tmp_path / "a.json").write_text("[" * 100000)
    with pytest.raises(UserError, match=r"cannot read .*a\.json"):
        read_results(tmp_path)


def test_foreign_json_in_a_results_folder_is_left_out(capsys):
    published = PROJECT_ROOT / "results/published/registration"
    with tempfile.TemporaryDirectory() as folder:
        for file in published.glob("*.json"):
            os.symlink(file, Path(folder, file.name))
        Path(folder, "package.json").write_text('{"name": "x"}')
        Path(folder, "list.json").write_text("[]")
        assert read_results(Path(folder)).records
    assert "note: 2 JSON file(s) are no records" in capsys.readouterr().out


def test_a_missing_readme_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match="--readme"):
        write_tables(read_results(PROJECT_ROOT / "results/published/registration"), tmp_path / "missing.md")


def test_the_commit_of_another_repository_is_not_recorded(monkeypatch, tmp_path):
    monkeypatch.setenv("GIT_DIR", str(tmp_path))
    find_commit = git_commit.__wrapped__  # without the cache
    assert (find_commit() is not None) == (PROJECT_ROOT / ".git").exists()
    monkeypatch.setattr("utils.records.PROJECT_ROOT", PROJECT_ROOT / "utils")
    assert find_commit() is None
