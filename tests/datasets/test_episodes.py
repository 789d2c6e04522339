"""Training episodes: their content, their repeatability, and lists that are rejected."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from datasets import episodes as command
from datasets.episodes import draw_episodes, read_episodes, write_episodes
from utils.errors import UserError

SOURCES = {
    "ring": [f"{n:03d}.png" for n in range(37)],
    "weave": ["a.png", "b.png"],
    "teeth": ["x.jpg", "y.jpg", "z"],
}


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2**63), st.integers(1, 10**6))
def test_every_image_is_a_query_once_and_never_its_own_support(shot, batch_size, seed, epoch):
    drawn = draw_episodes(SOURCES, shot, batch_size, seed, epoch)
    for category, names in SOURCES.items():
        own = [e for e in drawn if e.category == category]
        assert sorted(name for e in own for name in e.query) == sorted(names)
        assert all(1 <= len(e.query) <= batch_size for e in own)
        assert len(own) == -(-len(names) // batch_size)
        for e in own:
            assert len(e.support) == len(e.query)
            for query, support in zip(e.query, e.support, strict=True):
                assert len(support) == shot and query not in support and set(support) <= set(names)


def test_draws_are_the_same_on_every_machine():
    """This literal must never change: runs repeat on another machine and after a resume because of it."""
    (first, *_), again = (draw_episodes(SOURCES, 2, 4, 668, 1) for _ in range(2))
    assert first == again[0]
    assert (first.category, first.query[0], first.support[0]) == ("ring", "017.png", ("016.png", "020.png"))


def test_order_of_listing_does_not_matter_and_epochs_differ():
    turned = {name: names[::-1] for name, names in reversed(SOURCES.items())}
    assert draw_episodes(turned, 2, 4, 1, 1) == draw_episodes(SOURCES, 2, 4, 1, 1)
    assert (
        draw_episodes(SOURCES, 2, 4, 1, 2) != draw_episodes(SOURCES, 2, 4, 1, 1) != draw_episodes(SOURCES, 2, 4, 2, 1)
    )


def test_draws_are_uniform():
    """Support images of one query over many epochs: 7,200 draws among 4 images, within 5 standard deviations."""
    counts = Counter()
    for epoch in range(1, 3601):
        (e,) = draw_episodes({"ring": SOURCES["ring"][:5]}, 2, 5, 0, epoch)
        counts.update(e.support[e.query.index("002.png")])
    assert set(counts) == {"000.png", "001.png", "003.png", "004.png"}
    assert all(abs(count - 1800) < 5 * (7200 * 0.25 * 0.75) ** 0.5 for count in counts.values())


def test_printed_episodes_can_be_read(tmp_path, demo_data, capsys):
    command.main(["--obj", "ring", "--data_type", "folder", "--data_path", str(demo_data), "--shot", "3"])
    file = tmp_path / "episodes.json"
    file.write_text(capsys.readouterr().out)
    names = {"weave": sorted(path.name for path in (demo_data / "weave/train/good").iterdir())}
    assert read_episodes(file, names) == draw_episodes(names, 3, 32, 668, 1)
    assert json.loads(write_episodes(read_episodes(file, names))) == json.loads(file.read_text())


WRONG = {
    "no JSON": ("hello", "cannot read the episodes"),
    "no list": ('{"a": 1}', "cannot read the episodes"),
    "empty": ("[]", "holds no episode"),
    "lacks a key": ('[{"category": "ring", "query": ["000.png"]}]', "cannot read the episodes"),
    "unknown category": ('[{"category": "b", "query": ["1"], "support": [["2"]]}]', "unknown image 1 of b"),
    "unknown image": (
        '[{"category": "ring", "query": ["000.png"], "support": [["q.png"]]}]',
        r"episode 0 of .* is invalid: unknown image q\.png of ring",
    ),
    "uneven": (
        '[{"category": "ring", "query": ["000.png", "001.png"], "support": [["002.png"], ["003.png", "004.png"]]}]',
        "one support list per query",
    ),
    "no support": (
        '[{"category": "ring", "query": ["000.png"], "support": [[]]}]',
        "one support list per query",
    ),
    "no queries": ('[{"category": "ring", "query": [], "support": []}]', "one support list per query"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_lists_are_rejected(case, tmp_path):
    content, sentence = WRONG[case]
    file = tmp_path / "episodes.json"
    file.write_text(content)
    with pytest.raises(UserError, match=sentence) as caught:
        read_episodes(file, SOURCES)
    assert "\n" not in str(caught.value) and str(file) in str(caught.value)
