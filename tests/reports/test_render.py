"""The templates: what they escape, what they refuse, and how much memory a large page takes."""

from __future__ import annotations

import json
import re
import tracemalloc

import pytest
from jinja2 import UndefinedError

from reports.page import Page, PageRow, Preview, get_template, write_page


def read_data(page: str) -> dict:
    return json.loads(re.search(r'id="data" type="application/json">(.*?)</script>', page, re.DOTALL)[1])


def read_rows(page: str) -> list[dict]:
    return [json.loads(row) for row in re.findall(r'class="row">(.*?)</script>', page)]


def test_every_value_is_given():
    values = Page("a")._asdict() | {"gradient": "black, white", "mark": None}
    assert "<title>a</title>" in get_template("page.html").render(values)
    with pytest.raises(UndefinedError, match="title"):
        get_template("page.html").render({name: value for name, value in values.items() if name != "title"})


def test_style_and_script_are_inlined(tmp_path):
    write_page(tmp_path / "page.html", Page("a"))
    page = (tmp_path / "page.html").read_text()
    assert ".thumb {" in page and "function drawHistogram()" in page and "Content-Security-Policy" in page
    assert not re.search(r"<link|@import|src=|href=|{{|{%", page)
    nothing = {"threshold": None, "review": None, "adopt": "", "typical": None, "references": []}
    assert read_data(page) == nothing and read_rows(page) == []


def test_no_name_ends_a_script_element(tmp_path):
    names = ["</script><script>alert(1)</script>", "<!--", "'\"&", "\udcff.png"]
    rows = [PageRow(name, 0.1 + number, "good", error=name) for number, name in enumerate(names)]
    write_page(tmp_path / "page.html", Page("\udcff", 1e-9, rows, warnings=names, notes=names))
    page = (tmp_path / "page.html").read_text()
    assert page.count("<script") == page.count("</script>") == 2 + len(rows) and "<!--" not in page
    assert read_data(page)["threshold"] == 1e-9
    shown = [{key: row[key] for key in ("name", "score", "error")} for row in read_rows(page)]
    assert shown == [{"name": row.name, "score": row.score, "error": row.error} for row in rows]


@pytest.mark.parametrize(("score", "threshold"), [(float("nan"), 1.0), (1.0, float("inf"))])
def test_numbers_that_json_lacks_are_refused(score, threshold, tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_page(tmp_path / "page.html", Page("a", threshold, [PageRow("a.png", score)]))
    assert list(tmp_path.iterdir()) == []


def test_rows_are_written_one_by_one(tmp_path):
    preview, count = Preview("", [("input", "data:image/jpeg;base64," + "A" * 2**18)]), 40
    page = Page("a", rows=[PageRow(f"{number}.png", 1.0, None, preview) for number in range(count)])
    write_page(tmp_path / "page.html", page._replace(rows=[]))  # compiles the template
    tracemalloc.start()
    write_page(tmp_path / "page.html", page)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    size = (tmp_path / "page.html").stat().st_size
    assert size > count * 2**18 and peak < size / 4
