"""The templates: what they escape, what they refuse, and how much memory a large page takes."""

from __future__ import annotations

import json
import re
import tracemalloc

import pytest
from jinja2 import UndefinedError

from reports.page import PageRow, write_page
from reports.render import get_template


def read_data(page: str) -> dict:
    return json.loads(re.search(r'type="application/json">(.*?)</script>', page, re.DOTALL)[1])


def test_every_value_is_given():
    with pytest.raises(UndefinedError, match="title"):
        get_template("page.html").render(notes=[], threshold=None, rows=[])


def test_style_and_script_are_inlined(tmp_path):
    write_page(tmp_path / "page.html", "a", [], [], None)
    page = (tmp_path / "page.html").read_text()
    assert ".thumb {" in page and "function drawHistogram()" in page and "Content-Security-Policy" in page
    assert not re.search(r"<link|@import|src=|href=|{{|{%", page)
    assert read_data(page) == {"threshold": None, "rows": []}


def test_no_name_ends_the_script_element(tmp_path):
    names = ["</script><script>alert(1)</script>", "<!--", "'\"&", "\udcff.png"]
    rows = [PageRow(name, 0.1 + number, "good", "") for number, name in enumerate(names)]
    write_page(tmp_path / "page.html", "\udcff", names, rows, 1e-9)
    page = (tmp_path / "page.html").read_text()
    assert page.count("<script") == page.count("</script>") == 2 and "<!--" not in page
    assert read_data(page) == {"threshold": 1e-9, "rows": [row._asdict() for row in rows]}


@pytest.mark.parametrize(("score", "threshold"), [(float("nan"), 1.0), (1.0, float("inf"))])
def test_numbers_that_json_lacks_are_refused(score, threshold, tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_page(tmp_path / "page.html", "a", [], [PageRow("a.png", score, None, "")], threshold)
    assert list(tmp_path.iterdir()) == []


def test_rows_are_written_one_by_one(tmp_path):
    preview, count = "data:image/jpeg;base64," + "A" * 2**18, 40
    rows = [PageRow(f"{number}.png", 1.0, None, preview) for number in range(count)]
    write_page(tmp_path / "page.html", "a", [], rows[:1], None)  # compiles the template
    tracemalloc.start()
    write_page(tmp_path / "page.html", "a", [], rows, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = (tmp_path / "page.html").stat().st_size
    assert size > count * len(preview) and peak < size / 4
