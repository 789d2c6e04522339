"""Names of categories as people and shells write them."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets.mvtec import category_name

NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), min_size=1).filter(
    lambda name: name not in (".", "..")
)


@given(NAMES, st.sampled_from(["", "./", ".//", "././"]), st.sampled_from(["", "/", "//", "/."]))
def test_what_tab_completion_adds_is_taken_away(name, before, after):
    assert category_name(before + name + after) == name


@given(st.lists(NAMES, min_size=2, max_size=4))
def test_a_path_is_no_category(parts):
    with pytest.raises(argparse.ArgumentTypeError, match="is not the name of a category"):
        category_name("/".join(parts))


@pytest.mark.parametrize("text", ["", ".", "..", "/", "./", "../ring", "ring/..", "/ring"])
def test_what_names_no_folder_in_the_data_folder(text):
    with pytest.raises(argparse.ArgumentTypeError):
        category_name(text)


def test_the_target_is_not_trained_on_however_it_is_written(demo_data, tmp_path):
    import train

    parser = train.get_args_parser()
    for spelling in ("ring", "ring/", "./ring"):
        assert parser.parse_args(["--obj", spelling]).obj == "ring"
    with pytest.raises(SystemExit) as ended:
        parser.parse_args(["--obj", str(Path(demo_data) / "ring")])
    assert ended.value.code == 2
