"""README and docs match the project: commands, links, file tree, and Python examples that run."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

import reproduce
from experiments import runs
from experiments.examples import read_examples
from experiments.formats import to_markdown
from experiments.results import read_results
from experiments.run import compare, make_tables
from inspection.results import BOX_COLUMNS, CSV_COLUMNS
from scorers.views import VIEWS_PER_IMAGE
from utils.files import PROJECT_ROOT

SIZE = 64
DOCUMENTS = [
    *(
        PROJECT_ROOT / name
        for name in (
            "README.md",
            "CONTRIBUTING.md",
            "CHANGELOG.md",
            "support_set/README.md",
            "save_checkpoints/README.md",
        )
    ),
    *sorted((PROJECT_ROOT / "docs").glob("*.md")),
]
TEXTS = {str(path.relative_to(PROJECT_ROOT)): path.read_text(encoding="utf-8") for path in DOCUMENTS}


def documented_commands() -> list[str]:
    """The lines of all ```bash blocks, and inline code of the form `python ...` or `make ...`."""
    lines = []
    for text in TEXTS.values():
        for block in re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL):
            lines += block.replace("\\\n", " ").splitlines()
        lines += re.findall(r"`((?:python|make)\s[^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    commands = (line.split("#")[0].strip() for line in lines)
    return list(dict.fromkeys(filter(None, commands)))


def command_parser(words: list[str]):
    """The parser of a command, and its arguments. words: python FILE.py ..., or python -m MODULE ..."""
    name, rest = (words[2], words[3:]) if words[1] == "-m" else (words[1].removesuffix(".py"), words[2:])
    if name == "test":  # `import test` would import the package `test` of the standard library
        spec = importlib.util.spec_from_file_location("test_command", PROJECT_ROOT / "test.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(name)
    return module.get_args_parser(), rest


@pytest.mark.parametrize("command", documented_commands())
def test_documented_commands(command, tmp_path):
    """Every command would start: the make target or file exists, and all flags are known."""
    words = shlex.split(command)
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (PROJECT_ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert words[1] in targets
    elif words[:3] == ["python", "-m", "pip"]:
        assert words[3:] == ["install", "."] or (
            words[3:5] == ["install", "-r"] and all((PROJECT_ROOT / file).is_file() for file in words[5:])
        )
    elif words[:3] == ["python", "-m", "pytest"]:
        assert words[3:] == ["-m", "cuda"]
    elif words[0] == ".":
        assert words[1:] == [".venv/bin/activate"]  # made by the Makefile
    else:
        assert words[0] == "python"
        parser, rest = command_parser(words)
        if "--config" in rest:
            rest[rest.index("--config") + 1] = str(tmp_path / "record.json")
            (tmp_path / "record.json").write_text('{"obj": "bottle"}')
        parser.parse_args(rest)  # exits with an error for an unknown flag


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
    packages = {path.parent for path in PROJECT_ROOT.glob("*/__init__.py")} - {PROJECT_ROOT / "tests"}
    files = [*PROJECT_ROOT.glob("*.py"), *(file for package in packages for file in package.rglob("*.py"))]
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


@pytest.mark.parametrize("file", sorted(path.name for path in PROJECT_ROOT.glob("*.py")))
def test_every_flag_is_used(file):
    """A flag that no module reads would have no effect."""
    parser, _ = command_parser(["python", file])
    files = [path for path in product_files() if not path.startswith(("benchmarks/", "examples/"))]
    code = "".join((PROJECT_ROOT / path).read_text(encoding="utf-8") for path in files)
    for action in parser._actions:
        read = re.search(rf"\w\.{action.dest}\b", code)
        assert action.dest in ("help", "config") or read, f"{file} never reads --{action.dest}"


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
    code = code.replace("MVTec/bottle", str(Path(demo_data) / "ring")).replace("rounds=10", "rounds=2")
    names: dict = {}
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
    assert "| bottle | 95.1 ± 0.3 |" in to_markdown(make_tables(results[0]))
    assert "| category | last: b - a |\n|---|---:|\n| bottle | +1.0 (" in to_markdown(compare(*results))


def test_from_scores_to_a_paper(demo_data, tmp_path, monkeypatch):
    """The commands of "Compare and publish" make the table and the figures: three methods, four categories."""
    monkeypatch.chdir(tmp_path)
    for number, name in enumerate(("bottle", "pill", "screw", "transistor")):
        shutil.copytree(demo_data / ("ring", "weave")[number % 2], tmp_path / "MVTec" / name)
    text = TEXTS["docs/reproduce.md"].split("## Compare and publish")[1]
    lines = re.search(r"```bash\n(.*?)```", text, flags=re.DOTALL)[1].replace("\\\n", " ").splitlines()
    score, report, part = (shlex.split(line)[2:] for line in lines if "results/paper" in line)
    # in this process, which has imported everything
    monkeypatch.setattr(runs, "_start", lambda words, run, *_: runs.perform(runs.from_json(run)))
    small = "--inferences 2 --img_size 32 --weights none --num_workers 0 --device cpu"
    reproduce.main([*score, *shlex.split(small)])
    reproduce.main(report)
    part[part.index("--images") + 1 :] = ["good/000.png"]
    reproduce.main(part)
    folder = tmp_path / "results/paper"
    for name in ("figure.pdf", "examples.pdf", "screw.pdf"):
        content = (folder / name).read_bytes()
        assert content.startswith(b"%PDF") and content.count(b"/Type /Page ") == 1
    text = (folder / "tables.tex").read_text()
    rows = text[text.index("PRO, K = 2") : text.index("\\end{tabular}", text.index("PRO, K = 2"))].splitlines()
    assert [row.split(" &")[0] for row in rows if "&" in row] == ["category", "screw", "mean"]  # of the last command
    (examples,) = read_examples(read_results(folder).part(["pill"]), "median")
    assert len(examples.columns) == 3 and len(examples.names) == len({name.split("/")[0] for name in examples.names})


@pytest.mark.parametrize(("file", "columns"), [("scores.csv", CSV_COLUMNS), ("boxes.csv", BOX_COLUMNS)])
def test_the_columns_of_the_docs(file, columns):
    (content,) = re.findall(rf"^\| `{re.escape(file)}` \| (.*) \|$", TEXTS["docs/inspection.md"], flags=re.MULTILINE)
    assert tuple(re.findall(r"`(\w+)`", content)) == columns
