"""Exported detectors: equal maps in ONNX Runtime and torch.export for any batch size, and the metadata."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import export
import inspection.export
import predict
from benchmarks.reference import DATA, GOLDEN_CHECKPOINT
from datasets.images import read_image
from inspection.detector import FewShotDetector
from inspection.export import (
    METADATA_FILE,
    OPENERS,
    TOLERANCE,
    WRITERS,
    ExportedDetector,
    Runtime,
    compare_files,
    export_metadata,
    largest_difference,
)
from inspection.images import as_tensor
from inspection.inputs import list_inputs
from inspection.threshold import Threshold
from models.regad import RegAD, load_checkpoint
from scorers.registry import SCORERS
from tests.reference import needs_reference
from utils.errors import UserError
from utils.files import PROJECT_ROOT, sha256
from utils.records import VERSION

SIZE = 64
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
has_onnx = all(map(find_spec, PACKAGES))
needs_onnx = pytest.mark.skipif(not has_onnx, reason="needs the packages of requirements-export.txt")


@pytest.fixture(scope="module")
def network():
    """Random weights, with warps that sample far outside the image."""
    torch.manual_seed(0)
    model = RegAD("affine", SIZE)
    for stn in (model.stn.stn1, model.stn.stn2, model.stn.stn3):
        torch.nn.init.normal_(stn.fc[2].weight, std=0.01)
        stn.fc[2].bias.data += 0.2 * torch.randn(6)
    return model.stn.eval()


@pytest.fixture(scope="module")
def normal(rings) -> list[Path]:
    return rings["support"]


@pytest.fixture(scope="module")
def images(demo_data) -> np.ndarray:
    """Seven images, the last one grey."""
    files = [
        *sorted((demo_data / "ring/test").rglob("*.png"))[:3],
        *sorted((demo_data / "weave/test").rglob("*.png"))[:3],
    ]
    squares = [read_image(path, SIZE) for path in files]
    return np.stack([*squares, squares[0][..., :1].repeat(3, axis=2)])


@pytest.fixture(scope="module", params=["neighbours", pytest.param("gaussian", marks=pytest.mark.slow)])
def detector(network, normal, request):
    fitted = FewShotDetector(network, "cpu", scorer=request.param).fit(normal[:3])
    fitted.calibrate(0.05)
    return fitted


@pytest.fixture(scope="module")
def exported(detector, normal, tmp_path_factory) -> dict[str, Path]:
    """The files that export.py writes of the saved detector, after its check of them, by format."""
    folder, saved = tmp_path_factory.mktemp("exported"), tmp_path_factory.mktemp("saved") / "part.regad"
    kinds = [kind for kind in WRITERS if kind != "onnx" or has_onnx]
    detector.save(saved)
    with redirect_stdout(io.StringIO()) as printed:
        export.main(
            ["--detector", str(saved), "--output", str(folder / "part.v2.onnx"), "--format", *kinds]
            + ["--check", *map(str, normal[:2])]
        )
    said = re.findall(r"(onnx|pt2): largest relative difference (\S+) on 2 images", printed.getvalue())
    assert [kind for kind, _ in said] == kinds and all(float(value) < TOLERANCE for _, value in said)
    files = {kind: folder / f"part.v2.{kind}" for kind in kinds}
    assert sorted(folder.iterdir()) == sorted(files.values())
    return files


@pytest.fixture(scope="module")
def opened(exported) -> dict[str, Runtime]:
    """The files, each opened once: torch.export takes a second."""
    return {kind: OPENERS[kind](path) for kind, path in exported.items()}


# gaussian: every form of the distance; 18 x 22 views exceed 384 channels
@pytest.mark.parametrize(
    ("scorer", "shots"), [("gaussian", 1), ("gaussian", 3), ("gaussian", 18), ("neighbours", 1), ("neighbours", 3)]
)
def test_module_is_the_detector(network, normal, images, scorer, shots):
    generator = np.random.default_rng(0)
    support = [read_image(path, SIZE) for path in normal[:shots]]
    support += [generator.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8) for _ in range(shots - len(support))]
    detector = FewShotDetector(network, "cpu", scorer=scorer).fit(support, for_threshold=False)
    with torch.no_grad():
        maps, scores = ExportedDetector(detector)(torch.from_numpy(images))
    expected_scores, expected_maps = detector.score(list(images))
    np.testing.assert_allclose(maps.numpy(), expected_maps, rtol=1e-4)
    np.testing.assert_allclose(scores.numpy(), expected_scores, rtol=1e-4)


@pytest.mark.parametrize("kind", ["pt2", pytest.param("onnx", marks=needs_onnx)])
@pytest.mark.parametrize("batch", [1, 2, 7])
def test_files_give_the_detector_s_maps(detector, opened, images, kind, batch):
    maps, scores = opened[kind](images[-batch:])
    expected_scores, expected_maps = detector.score(list(images[-batch:]))
    assert maps.shape == (batch, SIZE, SIZE) and maps.dtype == scores.dtype == np.float32
    np.testing.assert_allclose(maps, expected_maps, rtol=1e-4)
    np.testing.assert_allclose(scores, expected_scores, rtol=1e-4)


@needs_onnx
def test_onnx_is_one_file_that_says_how_to_use_it(detector, exported):
    import onnx

    model = onnx.load(exported["onnx"], load_external_data=False)
    onnx.checker.check_model(model)
    assert [opset.version for opset in model.opset_import if not opset.domain] == [inspection.export.ONNX_OPSET]
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    about = {entry.key: entry.value for entry in model.metadata_props}
    assert float(about["threshold"]) == detector.threshold.value and about["threshold_rule"] == detector.threshold.how
    assert (about["size"], about["keep_aspect"]) == (str(SIZE), "false")
    assert (about["scorer"], about["backbone"]) == (detector.scorer.name, "resnet18")


def test_pt2_carries_the_same_metadata(detector, exported):
    extra = {METADATA_FILE: ""}
    torch.export.load(exported["pt2"], extra_files=extra)
    found, expected = json.loads(extra[METADATA_FILE]), export_metadata(detector)
    assert found.pop("date") <= expected.pop("date") and found == expected


def test_metadata_without_a_threshold(network, normal):
    detector = FewShotDetector(network, "cpu", keep_aspect=True).fit(normal[:1])
    about = export_metadata(detector)
    assert about["threshold"] == "" and about["keep_aspect"] == "true"
    detector.threshold = Threshold(np.float64(1) / 3, "given", 1.0, 1.0)
    assert float(export_metadata(detector)["threshold"]) == 1 / 3


def test_metadata_say_where_a_file_comes_from(normal, tmp_path):
    """Of a detector that a command fitted: support images by content, network, rate, detector and versions."""
    flags = ["--weights", "none", "--img_size", str(SIZE), "--false_alarm", "0.2"]
    support, part = ["--support", *map(str, normal[:5])], tmp_path / "part.regad"
    predict.main([*support, *flags, "--save", str(part), "--output", str(tmp_path / "out")])
    detector = FewShotDetector.load(part, "cpu")
    about = export_metadata(detector)
    assert about["support_sha256"].split(",") == [sha256(path) for path in normal[:5]]
    assert about["network"] == "not trained, weights none" and about["detector"] == detector.identity()
    assert (about["false_alarm"], about["normal_images"]) == ("0.2", "5")
    assert about["torch"] == torch.__version__ and about["regad"].startswith(VERSION)
    assert all(isinstance(value, str) for value in about.values())


def test_comparison_finds_a_file_of_another_detector(detector, network, normal, exported, opened, images, monkeypatch):
    monkeypatch.setattr("inspection.export.OPENERS", {"pt2": lambda _: opened["pt2"]})
    assert largest_difference(detector, opened["pt2"], images) < TOLERANCE
    compare_files(detector, {"pt2": exported["pt2"]}, normal, are_support=False)
    other = FewShotDetector(network, "cpu").fit(normal[:2])
    with pytest.raises(UserError, match="pt2 file must not be used"):
        compare_files(other, {"pt2": exported["pt2"]}, normal, are_support=False)


@pytest.mark.parametrize("name", SCORERS)
def test_a_difference_counts_relative_to_the_threshold(name, network, normal, images):
    """Far below the threshold, rounding is large relative to a pixel and decides nothing."""
    detector = FewShotDetector(network, "cpu", scorer=name).fit(normal[:3])
    limit = detector.calibrate(0.05).value
    scores, maps = detector.score([as_tensor(square) for square in images])
    number = {image.tobytes(): n for n, image in enumerate(images)}
    for share, place in {0.5 * TOLERANCE: maps.argmin(), 2 * TOLERANCE: maps.argmax()}.items():
        changed = maps.copy()
        changed.flat[place] += share * max(limit, changed.flat[place])

        def runtime(batch: np.ndarray, maps: np.ndarray = changed) -> tuple[np.ndarray, np.ndarray]:
            rows = [number[image.tobytes()] for image in batch]
            return maps[rows], scores[rows]

        assert largest_difference(detector, runtime, images) == pytest.approx(share, rel=1e-2)


def open_openvino(path: Path):
    """As the documents say: without the hint, OpenVINO computes in bfloat16 where the processor can."""
    openvino = pytest.importorskip("openvino")
    model = openvino.Core().compile_model(str(path), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda batch: (model([batch])["map"], model([batch])["score"])


def open_opencv(path: Path):
    cv2 = pytest.importorskip("cv2", minversion="5")  # OpenCV 4 refuses tensors of six axes
    model = cv2.dnn.readNetFromONNX(str(path))

    def run(batch: np.ndarray) -> tuple[np.ndarray, ...]:
        model.setInput(batch, "image")
        return tuple(model.forward(["map", "score"]))

    return run


@needs_onnx
@pytest.mark.parametrize("opener", [open_openvino, open_opencv])
def test_other_runtimes_read_the_onnx_file(opener, detector, exported, images):
    assert largest_difference(detector, opener(exported["onnx"]), images) < TOLERANCE


def test_invalid_arguments_are_one_sentence(detector, network, normal, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="either normal images with --support"):
        export.main([])
    detector.save(tmp_path / "part.regad")
    saved = ["--detector", str(tmp_path / "part.regad"), "--output", str(tmp_path / "part.onnx")]
    with pytest.raises(UserError, match="--check needs images"):
        export.main([*saved, "--check"])
    with pytest.raises(UserError, match="only a fitted detector"):
        ExportedDetector(FewShotDetector(network, "cpu"))
    with monkeypatch.context() as limited:
        limited.setattr(inspection.export, "ONNX_LIMIT", 2**20)
        with pytest.raises(UserError, match=r"one ONNX file holds 2 GB.*the format pt2"):
            inspection.export.write_onnx(detector, tmp_path / "part.onnx")
    monkeypatch.setattr("utils.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"no package onnx and onnxscript: .*requirements-export.txt"):
        export.main(saved)
    assert not (tmp_path / "part.onnx").exists()


@needs_onnx
def test_readme_example_runs_without_torch(exported, detector, images, tmp_path):
    """Runs the example from the docs in a new interpreter, with the file it names."""
    (example,) = re.findall(
        r"```python\n(import.*?onnxruntime.*?)```", (PROJECT_ROOT / "docs/inspection.md").read_text(), re.DOTALL
    )
    assert len(example.splitlines()) <= 10
    (tmp_path / "part.onnx").symlink_to(exported["onnx"])
    Image.fromarray(images[0]).resize((100, 80)).save(tmp_path / "photo.png")
    more = "\nimport sys\nassert 'torch' not in sys.modules\nprint(repr(float(scores[0])))"
    call = [sys.executable, "-W", "error", "-c", example + more]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (score,), _ = detector.score([tmp_path / "photo.png"])
    said, precise = done.stdout.splitlines()
    assert float(precise) == pytest.approx(float(score), rel=1e-4)
    assert ("defective" if score > detector.threshold.value else "normal") in said


@needs_onnx
@needs_reference
@pytest.mark.slow
def test_twenty_real_images(tmp_path):
    """Screws and tiles at 224 pixels, with trained warps; the support set contains screws only."""
    network = load_checkpoint(GOLDEN_CHECKPOINT, "rotation_scale", 224).stn
    normal = sorted((DATA / "screw/train/good").iterdir())[:2]
    detector = FewShotDetector(network, "cpu").fit(normal, for_threshold=False)
    found = [list_inputs([DATA / category / "test"]) for category in ("screw", "magnetic_tile")]
    chosen = [path for paths in found for path in paths[:: len(paths) // 10][:10]]
    images = np.stack([read_image(path, 224) for path in chosen])
    files = {kind: tmp_path / f"part.{kind}" for kind in WRITERS}
    for kind, path in files.items():
        WRITERS[kind](detector, path)
        assert largest_difference(detector, OPENERS[kind](path), images) < TOLERANCE
