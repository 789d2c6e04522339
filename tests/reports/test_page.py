"""The HTML report in a real browser: counts, sorting and drawings, by keyboard, on a phone, without a network."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import roc_auc_score, roc_curve

from reports.page import NO_PREVIEW, Page, PageRow, PageTable, Preview, Reference, make_preview, write_page

webdriver = pytest.importorskip("selenium.webdriver", reason="needs selenium (requirements-dev.txt)")
Select = pytest.importorskip("selenium.webdriver.support.ui").Select
WebDriverWait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait

KINDS = ("good", "rust", "scratch")
PHONE = 390  # CSS pixels
ODD_NAMES = (
    "</script><img src=x onerror=alert(1)>",
    "a&b \"q\" 'x'",
    "größe 部品.png",
    "<!--<script>",
    "$title \\u003c",
)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    binary = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not (binary and driver):
        pytest.skip("needs chromium (or google-chrome) and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    # with its path given, selenium looks for no driver in the network
    chrome = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield chrome
    chrome.quit()


def make_rows(with_kinds: bool, count: int = 12) -> list[PageRow]:
    rng = np.random.default_rng(7)
    scores = rng.normal(15, 3, count) + 2 * (np.arange(count) % len(KINDS))
    scores[1:9:2] = scores[-1]  # equal scores, normal and defective ones
    images = rng.integers(0, 256, (count, 8, 24, 3), dtype=np.uint8)
    rows = zip(rng.permutation(count), scores.tolist(), [*KINDS] * count, images, strict=False)
    return [
        PageRow(f"part {name:03}.png", score, kind if with_kinds else None, of_image(image))
        for name, score, kind, image in rows
    ]


def of_image(image: np.ndarray) -> Preview:
    """Two panels of an image."""
    panel = Image.fromarray(image)
    return make_preview({"input": panel, "heat map": panel.rotate(180)}, "heat map")


def show(
    browser, folder: Path, rows: Sequence[PageRow], threshold: float | None = 16.0, texts: Sequence[str] = ("a", "b")
) -> str:
    """Writes a page with a title and notes, opens it and returns its address."""
    return show_page(browser, folder, Page(texts[0], threshold, rows, notes=texts[1:]))


def show_page(browser, folder: Path, page: Page) -> str:
    """Writes a page, opens it and returns its address."""
    write_page(folder / "page.html", page)
    for log in ("browser", "performance"):
        browser.get_log(log)  # reading empties them
    browser.get((folder / "page.html").as_uri())
    return browser.current_url


def find(browser, selector: str):
    return browser.find_element("css selector", selector)


def cells(browser, table: str) -> list[list[str]]:
    """The texts of a table's rows as shown on the screen."""
    script = "return [...arguments[0].tBodies[0].rows].map(r => [...r.cells].map(c => c.innerText))"
    return browser.execute_script(script, find(browser, table))


def press(browser, *keys: str) -> None:
    webdriver.ActionChains(browser).send_keys(*keys).perform()


def enter(browser, text: str) -> None:
    """Writes a threshold in place of the one that is shown."""
    keys = webdriver.Keys
    find(browser, "#number").send_keys(keys.SHIFT, keys.HOME, keys.NULL, text or keys.DELETE, keys.ENTER)


def tab_to(browser, selector: str):
    """Presses Tab until the first element of `selector` has the focus."""
    wanted = find(browser, selector)
    for _ in range(20):
        if browser.switch_to.active_element == wanted:
            return wanted
        press(browser, webdriver.Keys.TAB)
    pytest.fail(f"Tab does not reach {selector}")


def bars(browser, kind: str = "") -> np.ndarray:
    """The number of images in each bin of the histogram, from its bar's place and height and the label of the axis."""
    script = """return [...document.querySelectorAll('#bars rect' + arguments[0])].map(
        r => ["x", "width", "height"].map(name => +r.getAttribute(name)))"""
    top = int(find(browser, "#histogram text").get_attribute("textContent").split()[0])
    counts = np.zeros(40)
    for x, width, height in browser.execute_script(script, kind):
        counts[round((x - 34.5) / (width + 1))] += height / 150 * top
    return counts


def check_decisions(browser, rows: Sequence[PageRow], limit: float) -> None:
    flagged = {row.name: row.score > limit for row in rows}
    shown = {row[2]: row[1] for row in cells(browser, "#images")}
    assert shown == {name: "defective" if bad else "normal" for name, bad in flagged.items()}
    counts = f"{sum(flagged.values())} of {len(rows)} flagged as defective"
    if rows[0].defect_type is not None:
        found, wrong = (sum(flagged[r.name] for r in rows if (r.defect_type != "good") == bad) for bad in (True, False))
        goods = sum(row.defect_type == "good" for row in rows)
        counts += f"; {found} of {len(rows) - goods} defects found, {wrong} of {goods} false positives"
        counts += f" (false-positive rate {100 * wrong / goods:.0f} %)"
        assert [row[:4] for row in cells(browser, "#defect-types")] == by_kind(rows, limit)
        dot = [float(find(browser, "#dot").get_attribute(key)) for key in ("cx", "cy")]
        np.testing.assert_allclose(roc_points([dot]), [[wrong / goods, found / (len(rows) - goods)]], atol=1e-9)
    assert find(browser, "#counts").text == counts


def by_kind(rows: Sequence[PageRow], limit: float) -> list[list[str]]:
    table = []
    for kind, group in groupby(sorted(rows, key=lambda row: row.defect_type), key=lambda row: row.defect_type):
        scores = np.array([row.score for row in group])
        flagged = int((scores > limit).sum())
        share = f"{100 * flagged / len(scores):.0f} %"
        table.append([kind, str(len(scores)), f"{scores.mean():.2f}", f"{flagged} ({share})"])
    return table


def roc_points(places: Sequence[Sequence[float]]) -> np.ndarray:
    """Points of the drawing -> (false-positive rate, true-positive rate), by the drawn frame."""
    return (np.asarray(places) - [120, 185]) / [180, -175]


def as_share(text: str) -> float:
    """The number at the end of a text."""
    return float(text.split()[-1])


@pytest.mark.parametrize("with_kinds", [True, False])
def test_every_threshold_recounts(with_kinds, browser, tmp_path):
    rows = make_rows(with_kinds)
    show(browser, tmp_path, rows, 16.0)
    check_decisions(browser, rows, 16.0)
    number, slider = find(browser, "#number"), tab_to(browser, "#slider")
    keys = webdriver.Keys
    for key, times, rises in (
        (keys.RIGHT, 1, True),
        (keys.LEFT, 60, False),
        (keys.HOME, 1, False),
        (keys.END, 1, True),
    ):
        before = float(number.get_property("value"))
        press(browser, key * times)
        limit = float(number.get_property("value"))
        assert limit == float(slider.get_property("value")) and (limit > before) == rises
        check_decisions(browser, rows, limit)
    for text in ("14.25", "14,5", str(rows[1].score), "-3", "1e3"):  # a score equal to the threshold is normal
        enter(browser, text)
        check_decisions(browser, rows, float(text.replace(",", ".")))
        assert number.get_property("value") == text
    enter(browser, "")  # restores the initial threshold
    check_decisions(browser, rows, 16.0)


def test_the_drawings_hold_the_scores(browser, tmp_path):
    rows = make_rows(True, 60)
    show(browser, tmp_path, rows)
    defects, scores = np.array([row.defect_type != "good" for row in rows]), np.array([row.score for row in rows])
    points = find(browser, "#curve").get_attribute("points").split()
    wrong, found, _ = roc_curve(defects, scores, drop_intermediate=False)
    shown = roc_points([[float(value) for value in point.split(",")] for point in points])
    np.testing.assert_allclose(shown, np.stack([wrong, found], 1), atol=1e-9)
    reach = tuple(float(find(browser, "#slider").get_property(end)) for end in ("min", "max"))
    for kind, chosen in (("normal", ~defects), ("defective", defects)):
        drawn = bars(browser, f".bar-{kind}")
        np.testing.assert_allclose(drawn, np.histogram(scores[chosen], 40, reach)[0], atol=1e-9)
    ticks = "return [...document.querySelectorAll('#histogram .tick')].map(t => [+t.textContent, +t.getAttribute('x')])"
    values, places = np.array(browser.execute_script(ticks)).T
    assert len(values) > 2
    np.testing.assert_allclose(places, 34 + 376 * (values - reach[0]) / (reach[1] - reach[0]))
    assert float(find(browser, "#mark").get_attribute("x1")) == pytest.approx(np.interp(16, reach, (34, 410)))
    assert as_share(find(browser, "#auroc").text) == pytest.approx(roc_auc_score(defects, scores), abs=6e-5)
    kinds = np.array([row.defect_type for row in rows])
    for kind, *_, area in cells(browser, "#defect-types")[1:]:
        chosen = (kinds == "good") | (kinds == kind)
        expected = roc_auc_score(kinds[chosen] == kind, scores[chosen])
        assert as_share(area) == pytest.approx(expected, abs=6e-5) != roc_auc_score(defects, scores)
    assert cells(browser, "#defect-types")[0][-1] == ""  # good


def test_sorting_by_keyboard_and_nothing_is_fetched(browser, tmp_path):
    rows = make_rows(True)
    address = show(browser, tmp_path, rows)
    states = "return [...document.querySelectorAll('#images th')].map(th => th.getAttribute('aria-sort'))"
    score, by_name = (lambda row: row.score), (lambda row: row.name)
    ordered = sorted(rows, key=score, reverse=True)
    assert [row[2] for row in cells(browser, "#images")] == [row.name for row in ordered]
    assert browser.execute_script(states) == [*[None] * 4, "descending", None, None]
    for column, key, falling in ((2, by_name, False), (2, by_name, True), (4, score, True), (4, score, False)):
        button = tab_to(browser, f"#images th:nth-child({column + 1}) button")
        press(browser, webdriver.Keys.ENTER)
        ordered = sorted(ordered, key=key, reverse=falling)  # the order of equal scores is kept
        shown = cells(browser, "#images")
        assert [row[2] for row in shown] == [row.name for row in ordered]
        assert [row[4] for row in shown] == [f"{row.score:.2f}" for row in ordered]
        expected = [None] * 7
        expected[column] = "descending" if falling else "ascending"
        assert browser.execute_script(states) == expected
        assert browser.switch_to.active_element == button
        find(browser, "#number").click()  # so that Tab starts before the table
    find(browser, "#slider").send_keys(webdriver.Keys.ARROW_LEFT)
    tab_to(browser, ".thumb").send_keys(webdriver.Keys.ENTER)
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    sent = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert address in sent and [url for url in sent if url != address and not url.startswith("data:image/jpeg")] == []
    assert browser.get_log("browser") == []


def test_names_are_text(browser, tmp_path):
    preview = make_rows(False, 1)[0].preview
    rows = [PageRow(name, float(i), name, preview) for i, name in enumerate(ODD_NAMES)]
    show(browser, tmp_path, rows, 2.0, [" ".join(ODD_NAMES), *ODD_NAMES])
    assert browser.title == find(browser, "h1").text == " ".join(ODD_NAMES)
    assert [note.text for note in browser.find_elements("css selector", ".notes li")] == list(ODD_NAMES)
    assert [row[2:4] for row in cells(browser, "#images")] == [[name, name] for name in reversed(ODD_NAMES)]
    assert sorted(row[0] for row in cells(browser, "#defect-types")) == sorted(ODD_NAMES)
    for row, button in zip(reversed(rows), browser.find_elements("css selector", ".thumb"), strict=True):
        assert button.accessible_name == f"enlarge {row.name}"
        button.send_keys(webdriver.Keys.ENTER)
        assert find(browser, "#large-name").text == row.name
        assert row.name in find(browser, "#large-result").text  # its kind
        press(browser, webdriver.Keys.ESCAPE)
    assert len(browser.find_elements("css selector", "script")) == 2
    assert len(browser.find_elements("css selector", "img")) == len(rows) + 2  # thumbnails, and the dialog's panels
    assert browser.get_log("browser") == []  # an open alert would have made the calls above fail


@pytest.fixture
def phone(browser) -> Iterator:
    size = {"width": PHONE, "height": 844, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    yield browser
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("with_kinds", [True, False])
@pytest.mark.parametrize("part", ["x" * 300, "Oberfläche 7/部品_" * 30])
def test_a_phone_needs_no_sideways_scrolling(part, with_kinds, phone, tmp_path):
    rows = [
        row._replace(
            name=part + row.name, defect_type=row.defect_type and row.defect_type + part, score=row.score + 1000
        )
        for row in make_rows(with_kinds)
    ]
    show(phone, tmp_path, rows, 1016.0, [part, part])
    page = find(phone, "html")
    width = page.get_property("clientWidth")
    assert page.get_property("scrollWidth") == width <= PHONE
    tab_to(phone, ".thumb").send_keys(webdriver.Keys.ENTER)
    script = """return [...document.querySelectorAll("button, input, output, svg, table, dialog, img, td")]
        .filter(e => { const box = e.getBoundingClientRect(); return box.left < 0 || box.right > arguments[0]; })
        .map(e => e.outerHTML.slice(0, 60))"""
    assert phone.execute_script(script, width) == []
    dialog = find(phone, "dialog")
    assert dialog.get_property("open") and dialog.get_property("scrollWidth") <= dialog.get_property("clientWidth")


def test_thumbnails_open_by_keyboard(browser, tmp_path):
    rows = sorted(make_rows(False), key=lambda row: -row.score)
    show(browser, tmp_path, rows)
    thumbnail, dialog = tab_to(browser, ".thumb"), find(browser, "dialog")
    assert find(browser, ".thumb img").get_property("src") == rows[0].preview.thumbnail
    assert not dialog.is_displayed()
    press(browser, webdriver.Keys.ENTER)
    assert dialog.is_displayed() and find(browser, "#large-name").text == rows[0].name
    panels = browser.find_elements("css selector", "#panels img")
    assert [panel.get_property("src") for panel in panels] == [image for _, image in rows[0].preview.panels]
    assert [panel.text for panel in browser.find_elements("css selector", "figcaption")] == ["input", "heat map"]
    assert all(panel.size["width"] > 300 for panel in panels) and thumbnail.size["width"] < 100
    press(browser, webdriver.Keys.ESCAPE)
    assert not dialog.is_displayed() and browser.switch_to.active_element == thumbnail
    press(browser, webdriver.Keys.ENTER, webdriver.Keys.ENTER)  # opens, and its button closes
    assert not dialog.is_displayed() and browser.switch_to.active_element == thumbnail


def test_a_long_table_is_cut(browser, tmp_path):
    """Counts and drawings still cover all rows."""
    rows = [row._replace(preview=NO_PREVIEW) for row in make_rows(True, 2100)]
    show(browser, tmp_path, rows)
    assert find(browser, "#left-out").text.startswith("This table shows the first 2000 images")
    assert round(bars(browser).sum()) == 2100
    tab_to(browser, "#slider").send_keys(webdriver.Keys.HOME)
    assert find(browser, "#counts").text.startswith("2100 of 2100 flagged as defective")
    press(browser, webdriver.Keys.PAGE_UP * 4)
    limit = float(find(browser, "#number").get_property("value"))
    names = sorted(row.name for row in rows)
    decisions = {row.name: "defective" if row.score > limit else "normal" for row in rows}
    for expected in (names[:2000], names[:-2001:-1]):
        find(browser, "#images th button").send_keys(webdriver.Keys.ENTER)
        assert [(row[2], row[1]) for row in cells(browser, "#images")] == [(n, decisions[n]) for n in expected]


@pytest.fixture
def full_page() -> Page:
    """A page with everything: three decisions, a failed image, boxes, references, warnings, facts and a table."""
    rows = sorted(make_rows(False), key=lambda row: -row.score)
    rows[0] = rows[0]._replace(decision="review", reason="darker")
    rows[1] = rows[1]._replace(boxes=[(3, 4, 10, 5, 42, 17.25), (1, 2, 3, 4, 5, 16.5)])
    rows.append(PageRow("broken.png", None, error="cannot read the image broken.png"))
    known = [Reference(f"s{n}.png", "support", 12.0 + n, rows[n].preview) for n in range(3)]
    known.append(Reference("c.png", "calibration", 15.5, rows[4].preview))
    known.append(Reference("d.png", "known defect", 19.0))
    known.append(Reference("e.png", "known defect", 11.0, decision="review", reason="turned"))
    known.append(Reference("f.png", "known defect", 13.5))
    facts, table = (
        [("Date", "today"), ("Detector", "a.regad")],
        PageTable("Metrics", ["metric", "mean"], [["AP", "98.1"]]),
    )
    return Page("a", 16.0, rows, facts, ["c.png determines the threshold."], (), known, [table], 12.5, (6.0, 18.0))


def test_what_is_known_is_shown(full_page, browser, tmp_path):
    show_page(browser, tmp_path, full_page)
    assert "c.png determines the threshold." in find(browser, ".warnings").text
    assert find(browser, ".facts").text.split() == ["Date", "today", "Detector", "a.regad"]
    assert cells(browser, ".given") == [["AP", "98.1"]]
    ticks = [tick.text for tick in browser.find_elements("css selector", ".ticks span, .mark span")]
    assert ticks == ["\u2264 6", "\u2265 18", "threshold 16"]
    assert find(browser, "#failed").text == "broken.png: cannot read the image broken.png"
    shown = [row[1:] for row in cells(browser, "#references")]
    assert shown[0] == ["defective", "d.png", "known defect", "19.00", "1.52"]
    names = ["d.png", "c.png", "s2.png", "f.png", "s1.png", "s0.png", "e.png"]
    assert [row[1] for row in shown] == names  # highest score first
    assert shown[-1][0].split() == ["review", "turned"]
    assert find(browser, "#references-count").text == "3 support, 1 calibration, 3 known defects"
    assert find(browser, "#normal-range").text == "Scores of 4 normal images: 12.00 to 15.50."
    reach = tuple(float(find(browser, "#slider").get_property(end)) for end in ("min", "max"))
    marks = browser.execute_script(
        "return [...document.querySelectorAll('.reference')].map(m => m.transform.baseVal.consolidate().matrix.e)"
    )
    np.testing.assert_allclose(marks, np.interp([14, 13, 12, 15.5, 19, 13.5, 11], reach, (34, 410)), atol=1e-3)
    assert len(browser.find_elements("css selector", "#support .thumb")) == 3
    check_labels(browser)
    assert browser.get_log("browser") == []


def test_fixed_decisions_do_not_move_with_the_threshold(full_page, browser, tmp_path):
    show_page(browser, tmp_path, full_page)
    rows = [row for row in full_page.rows if row.score is not None]
    slider = find(browser, "#slider")
    for key in (webdriver.Keys.HOME, webdriver.Keys.END):
        slider.send_keys(key)
        limit = float(slider.get_property("value"))
        decisions = {row[2]: row[1].split("\n")[0] for row in cells(browser, "#images")}
        flagged = {row.name: "defective" if row.score > limit else "normal" for row in rows}
        assert decisions == flagged | {rows[0].name: "review"}
        count = sum(decision == "defective" for decision in decisions.values())
        hits = 1 + sum(score > limit for score in (19.0, 13.5))  # the one for review is found at any threshold
        known = f"{hits} of 3 known defects found"
        counts = f"{count} of {len(rows)} flagged as defective; 1 for review; 1 not scored; {known}"
        assert find(browser, "#counts").text == counts
        assert bars(browser, ".bar-review").sum() == 1 and bars(browser, ".bar-defective").sum() == count


def test_between_two_thresholds_an_image_is_for_review(browser, tmp_path):
    """The lower one stays where the upper one is moved; below it, nothing is left for review."""
    rows = make_rows(False)
    show_page(browser, tmp_path, Page("a", 16.0, rows, review=14.0))
    for limit in (16.0, 18.0, 13.0):
        enter(browser, str(limit))
        shown = {row[2]: row[1].split("\n") for row in cells(browser, "#images")}
        for row in rows:
            below = ["review", "just below the threshold"] if row.score > 14 else ["normal"]
            assert shown[row.name] == (["defective"] if row.score > limit else below)


def test_a_moved_threshold_is_kept_and_the_page_says_how_to_adopt_it(browser, tmp_path):
    rows = make_rows(False)
    show_page(browser, tmp_path, Page("a", 16.0, rows, adopt="python predict.py --threshold {} --save a.regad"))
    assert not find(browser, "#moved").is_displayed()
    enter(browser, "14,5")
    assert find(browser, "#adopt").text == "python predict.py --threshold 14.5 --save a.regad"
    WebDriverWait(browser, 5).until(lambda _: browser.current_url.endswith("#threshold=14.5"))
    browser.refresh()
    assert find(browser, "#number").get_property("value") == "14.5" and find(browser, "#moved").is_displayed()
    check_decisions(browser, rows, 14.5)
    enter(browser, "7 mm")
    assert find(browser, "#counts").text == "7 mm is not a number"
    find(browser, "#reset").click()
    check_decisions(browser, rows, 16.0)
    assert not find(browser, "#moved").is_displayed()
    WebDriverWait(browser, 5).until(lambda _: "#" not in browser.current_url)


def test_days_are_shown_one_by_one(browser, tmp_path):
    """The last day first, in all counts and drawings; all days together with their dates."""
    rows = [row._replace(time=f"2026-11-{27 + n % 2}T22:0{n % 10}:30+01:00") for n, row in enumerate(make_rows(False))]
    failed = PageRow("broken.png", None, error="damaged", time="2026-11-27T23:00:00+01:00")
    show_page(browser, tmp_path, Page("a", 16.0, [*rows, failed], subtitle="Report"))
    days = Select(find(browser, "#day"))
    assert [option.text for option in days.options] == ["all (13)", "2026-11-28 (6)", "2026-11-27 (7)"]
    last = [row for row in rows if row.time.startswith("2026-11-28")]
    check_decisions(browser, last, 16.0)
    assert bars(browser).sum() == 6 and not find(browser, "#failed").is_displayed()
    assert find(browser, ".subtitle").text == "Report, 2026-11-28"
    assert {row[-1] for row in cells(browser, "#images")} == {row.time[11:19] for row in last}
    days.select_by_visible_text("all (13)")
    assert {row[-1] for row in cells(browser, "#images")} == {row.time[:19].replace("T", " ") for row in rows}
    assert bars(browser).sum() == 12 and find(browser, "#unread").text.split("\n")[0] == "1"
    check_labels(browser)
    assert browser.get_log("browser") == []


def test_on_paper_there_is_a_line_to_sign_and_no_normal_image(full_page, browser, tmp_path):
    show_page(browser, tmp_path, full_page._replace(sign_off=True))
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        decisions = {row[1].split("\n")[0] for row in cells(browser, "#images") if row[2]}
        shown = browser.find_elements("css selector", "#images tbody tr")
        assert {row.get_attribute("data-decision") for row in shown if row.is_displayed()} == decisions - {"normal"}
        assert "Signature" in find(browser, ".sign").text and not find(browser, "#slider").is_displayed()
        pdf = browser.execute_cdp_cmd("Page.printToPDF", {"printBackground": True})["data"]
        assert len(pdf) > 10_000
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_filters_by_keyboard(full_page, browser, tmp_path):
    show_page(browser, tmp_path, full_page)
    decisions = [row[1].split("\n")[0] for row in cells(browser, "#images")]
    for name in ("review", "defective", "normal", "all"):
        browser.execute_script("document.activeElement.blur(); window.getSelection().removeAllRanges()")
        button = tab_to(browser, f"[data-filter='{name}']")
        press(browser, webdriver.Keys.SPACE)
        count = len(decisions) if name == "all" else decisions.count(name)
        assert button.text.split() == [str(count), name] and button.get_attribute("aria-pressed") == "true"
        shown = [row[1].split("\n")[0] for row in cells(browser, "#images")]
        assert len(shown) == count and (name == "all" or set(shown) == {name})
    browser.execute_script("document.activeElement.blur()")
    tab_to(browser, "[data-filter='defective']")
    press(browser, webdriver.Keys.SPACE)
    find(browser, "#slider").send_keys(webdriver.Keys.HOME)  # the table follows the threshold
    assert [row[1] for row in cells(browser, "#images")] == ["defective"] * (len(decisions) - 1)


def test_walk_through_the_images_by_keyboard(full_page, browser, tmp_path):
    """Arrow keys between rows and between enlarged images; Escape returns to the row that was shown last."""
    show_page(browser, tmp_path, full_page)
    keys, rows = webdriver.Keys, full_page.rows
    buttons = browser.find_elements("css selector", "#images .thumb")
    tab_to(browser, "#images .thumb")
    for key, row in ((keys.DOWN, 1), (keys.END, len(buttons) - 1), (keys.HOME, 0), (keys.DOWN, 1), (keys.UP, 0)):
        press(browser, key)
        assert browser.switch_to.active_element == buttons[row]
    press(browser, keys.ENTER)
    assert find(browser, "#large-result").text.startswith("review: darker, score")
    assert not find(browser, "#boxes").is_displayed()
    press(browser, keys.RIGHT)
    result = find(browser, "#large-result").text
    assert result.startswith(f"defective, score {rows[1].score:.2f}, {rows[1].score / 12.5:.2f} times")
    assert cells(browser, "#boxes") == [
        ["1", "3, 4", "10 \u00d7 5", "42", "17.25"],
        ["2", "1, 2", "3 \u00d7 4", "5", "16.50"],
    ]
    press(browser, keys.RIGHT, keys.RIGHT, keys.LEFT)
    assert find(browser, "#large-name").text == rows[2].name and find(browser, "#place").text == "3 of 12"
    press(browser, keys.ESCAPE)
    assert not find(browser, "dialog").is_displayed() and browser.switch_to.active_element == buttons[2]
    tab_to_previous = webdriver.ActionChains(browser).key_down(keys.SHIFT).send_keys(keys.TAB).key_up(keys.SHIFT)
    tab_to_previous.perform()
    assert browser.switch_to.active_element == find(browser, "#images th[data-key=score] button")
    find(browser, "#number").click()
    first = tab_to(browser, "#references .thumb")
    press(browser, keys.ENTER)
    assert find(browser, "#large-name").text == "d.png" and "known defect" in find(browser, "#large-result").text
    press(browser, keys.ESCAPE)
    assert browser.switch_to.active_element == first and browser.get_log("browser") == []


def test_a_row_that_is_cut_off_is_left_out(full_page, browser, tmp_path):
    write_page(tmp_path / "page.html", full_page)
    whole = (tmp_path / "page.html").read_text()
    (tmp_path / "page.html").write_text(whole[: whole.index("broken.png") - 30])  # in the middle of the last row
    browser.get((tmp_path / "page.html").as_uri())
    assert len(cells(browser, "#images")) == 12 and not find(browser, "#failed-part").is_displayed()


@pytest.mark.parametrize("long_names", [False, True])
def test_a_full_page_fits_on_a_phone(long_names, full_page, phone, tmp_path):
    rows = [row._replace(defect_type=f"{row.defect_type}_contamination") for row in make_rows(True, 600)]
    show_page(phone, tmp_path, full_page._replace(rows=rows) if long_names else full_page)
    page = find(phone, "html")
    assert page.get_property("scrollWidth") == page.get_property("clientWidth") <= PHONE


ONE = make_rows(True, 1)
ODD_TABLES = {
    "empty": ([], 3.0),
    "one": (ONE, 16.0),
    "equal": ([row._replace(score=5.0) for row in make_rows(True)], 5.0),
    "only good": ([row._replace(defect_type="good") for row in make_rows(True)], 16.0),
    "no threshold": (make_rows(True), None),
    "no images": ([row._replace(preview=NO_PREVIEW) for row in make_rows(False)], 16.0),
    "far threshold": (make_rows(True), -1e6),
    "tiny scores": ([row._replace(score=row.score * 1e-7) for row in make_rows(False)], 1.6e-6),
}


def check_labels(browser) -> None:
    """Every text of the histogram lies inside the drawing, and no two texts of a line overlap."""
    script = """return [...document.querySelectorAll("#histogram, #histogram text")].map(
        e => [e.getBoundingClientRect().left, e.getBoundingClientRect().right, e.getAttribute("y")])"""
    (first, last, _), *texts = browser.execute_script(script)
    assert all(first <= left and right <= last for left, right, _ in texts)
    assert all(right < left or line != other for (_, right, line), (left, _, other) in pairwise(texts))


@pytest.mark.parametrize("case", ODD_TABLES)
def test_odd_tables(case, browser, tmp_path):
    rows, threshold = ODD_TABLES[case]
    show(browser, tmp_path, rows, threshold)
    assert len(cells(browser, "#images")) == len(rows) == round(bars(browser).sum())
    goods = sum(row.defect_type in ("good", None) for row in rows)
    assert find(browser, "#roc-part").is_displayed() == (0 < goods < len(rows))
    if threshold is None:
        assert {row[1] for row in cells(browser, "#images")} | {row[3] for row in cells(browser, "#defect-types")} <= {
            ""
        }
        assert find(browser, "#counts").text.startswith("no threshold: ")
    slider = find(browser, "#slider")
    for key in (webdriver.Keys.HOME, webdriver.Keys.END, webdriver.Keys.ARROW_LEFT):
        slider.send_keys(key)
        limit = float(slider.get_property("value"))
        decisions = {row[2]: row[1] for row in cells(browser, "#images")}
        assert decisions == {row.name: "defective" if row.score > limit else "normal" for row in rows}
    assert len({row[-1] for row in cells(browser, "#images")}) == len({row.score for row in rows})
    check_labels(browser)
    drawn = "return [...document.querySelectorAll('svg *')].filter(e => e.outerHTML.match(/NaN|Infinity/)).length"
    assert browser.execute_script(drawn) == 0 and browser.get_log("browser") == []
