"""README and docs match the project: sizes, links, file tree, and Python examples that run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from datasets.mvtec import LabelledDataset, list_test_items
from datasets.support import find_support_rounds
from experiments import comparison
from experiments.comparison import compare
from experiments.results import read_results
from experiments.tables import make_tables, to_markdown
from inspection.results import BOX_COLUMNS, CSV_COLUMNS
from scorers.views import VIEWS_PER_IMAGE
from tests.commands.test_commands import DOCUMENTS
from utils.files import PROJECT_ROOT

SIZE = 64
README_BYTES, FIGURE_BYTES = 10_000, 150_000
TEXTS = {str(path.relative_to(PROJECT_ROOT)): path.read_text(encoding="utf-8") for path in DOCUMENTS}


def test_sizes():
    assert (PROJECT_ROOT / "README.md").stat().st_size <= README_BYTES
    figures = list((PROJECT_ROOT / "docs/figures").iterdir())
    assert figures and all(figure.stat().st_size < FIGURE_BYTES for figure in figures)


def anchors(text: str) -> set[str]:
    """The anchor names of the headings in a Markdown page."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_links_lead_somewhere(name):
    for link in re.findall(r"\]\(([^)\s]+)\)", TEXTS[name]):
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = (PROJECT_ROOT / name).parent / file if file else PROJECT_ROOT / name
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text(encoding="utf-8")), link


def product_files() -> set[str]:
    """All .py files except tests and empty files."""
    rooms = {path.parent for path in PROJECT_ROOT.glob("*/__init__.py")} - {PROJECT_ROOT / "tests"}
    files = [*PROJECT_ROOT.glob("*.py"), *(file for room in rooms for file in room.rglob("*.py"))]
    return {str(file.relative_to(PROJECT_ROOT)) for file in files if file.stat().st_size}


def listed_files(tree: str) -> list[str]:
    """The .py files in the tree of docs/design.md: one line per file, indented below its folder."""
    folder, files = "", []
    for line in tree.splitlines():
        name = line.split()[0] if line.strip() else ""
        if name.endswith("/"):
            folder = name
        elif name.endswith(".py"):
            files.append((folder if line.startswith(" ") else "") + name)
    return files


def test_the_tree_lists_every_file():
    (tree,) = re.findall(r"```text\n(train\.py.*?)```", TEXTS["docs/design.md"], flags=re.DOTALL)
    listed = listed_files(tree)
    assert len(set(listed)) == len(listed)
    assert set(listed) == product_files()


def python_blocks() -> dict[str, str]:
    """All Python blocks in README and docs, by their first line."""
    blocks = [block for text in TEXTS.values() for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)]
    return {block.splitlines()[0]: block for block in blocks}


def test_every_python_block_has_a_test():
    here = {"# nearest.py", "# backbone.py"}
    in_tests_inspection = {"from inspection.detector import FewShotDetector", "import numpy as np"}
    assert set(python_blocks()) == here | in_tests_inspection


def test_the_scorer_of_the_docs():
    """The distance is 0 at the support views and positive elsewhere; shapes are those of scorers.base."""
    names: dict = {}
    exec(python_blocks()["# nearest.py"], names)
    scorer = names["NearestView"]()
    generator = torch.Generator().manual_seed(0)
    sides = {8: 4, 4: 8, 2: 16}  # side of the grid -> channels
    support, test = (
        [torch.rand(count, channels, side, side, generator=generator) for side, channels in sides.items()]
        for count in (VIEWS_PER_IMAGE, 3)
    )
    fitted = scorer.fit(scorer.prepare(support))
    distances = scorer.distance_maps(fitted, scorer.prepare(test))
    assert distances.shape == (3, 8, 8) and (distances > 0.1).all()
    own = scorer.distance_maps(fitted, scorer.prepare([layer[:2] for layer in support]))
    torch.testing.assert_close(own, torch.zeros(2, 8, 8), atol=1e-2, rtol=0)
    moved = [layer.clone() for layer in support]
    moved[0][0, :, 5, 6] += 1
    (changed,) = scorer.distance_maps(fitted, scorer.prepare([layer[:1] for layer in moved]))
    assert changed[5, 6] > 0.1 and (changed > 0.01).sum() == 1


def test_the_backbone_of_the_docs(demo_data):
    """Runs on synthetic data at a small size, with random weights instead of the download."""
    code = python_blocks()["# backbone.py"].replace('"IMAGENET1K_V2"', "None").replace("224", str(SIZE))
    folder = Path(demo_data) / "ring"
    items = list_test_items(folder)
    names = {
        "dataset": LabelledDataset(items, SIZE),
        "labels": [item.label for item in items],
        "rounds": find_support_rounds(None, folder, 2, 2, SIZE).images,
    }
    exec(code, names)
    assert len(names["aurocs"]) == 2 and all(0 <= value <= 1 for value in names["aurocs"])


def test_the_record_of_the_docs(tmp_path):
    """It writes a table that can be compared with another one of the same support sets."""
    (text,) = re.findall(r"```json\n(.*?)```", TEXTS["docs/extend.md"], flags=re.DOTALL)
    record = json.loads(text)
    for name, gain in (("a", 0), ("b", 0.01)):
        (tmp_path / name).mkdir()
        rounds = [{metric: value + gain for metric, value in one.items()} for one in record["rounds"]]
        (tmp_path / name / "bottle_2.json").write_text(json.dumps(record | {"rounds": rounds}))
    results = [read_results(tmp_path / name) for name in "ab"]
    assert "| bottle | 95.1 ± 0.3 |" in to_markdown(results[0], make_tables(results[0]))
    assert "| image AUROC | 2 | last | +1.00 |" in comparison.to_markdown(compare(*results))


@pytest.mark.parametrize(("file", "columns"), [("scores.csv", CSV_COLUMNS), ("boxes.csv", BOX_COLUMNS)])
def test_the_columns_of_the_docs(file, columns):
    (content,) = re.findall(rf"^\| `{re.escape(file)}` \| (.*) \|$", TEXTS["docs/inspection.md"], flags=re.MULTILINE)
    assert tuple(re.findall(r"`(\w+)`", content)) == columns
