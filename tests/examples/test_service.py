"""The HTTP service as a process of its own on the loopback: good, broken, huge and parallel requests, and a kill."""

from __future__ import annotations

import hashlib
import io
import json
import signal
import socket
import struct
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.service import Server, killed_in_the_middle
from examples import service
from inspection.detector import FewShotDetector
from inspection.results import decide
from models.regad import untrained
from utils.devices import seed_everything
from utils.errors import UserError

for package in ("fastapi", "uvicorn", "python_multipart"):
    pytest.importorskip(package, reason="needs the packages of requirements-examples.txt")

SIZE, MAX_MB, MAX_PIXELS, MAX_WAITING = 64, 0.5, 100_000, 16
FLAGS = ("--device", "cpu", "--max_mb", str(MAX_MB), "--max_pixels", str(MAX_PIXELS), "--max_seconds", "3")
BOUNDARY = "frontier"
FORM = f"multipart/form-data; boundary={BOUNDARY}"


@pytest.fixture(scope="module")
def images(demo_data) -> list[Path]:
    return sorted((demo_data / "ring/test").rglob("*.png"))


@pytest.fixture(scope="module")
def server(part):
    with Server(part, *FLAGS, "--max_waiting", str(MAX_WAITING)) as running:
        yield running


def form(*files: bytes) -> bytes:
    head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{{}}"; filename="a.png"\r\n\r\n'
    parts = [head.format(number).encode() + content + b"\r\n" for number, content in enumerate(files)]
    text = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="note"\r\n\r\nhello\r\n'.encode()
    return b"".join([text, *parts, f"--{BOUNDARY}--\r\n".encode()])


def png_of(width: int, height: int) -> bytes:
    """A PNG file of a few bytes whose header states this size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b""))
    sums = [struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks]
    packed = [struct.pack(">I", len(data)) + name + data + crc for (name, data), crc in zip(chunks, sums, strict=True)]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def encoded(image: Image.Image, kind: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind)
    return stream.getvalue()


def test_scores_are_those_of_the_detector(server, detector, images):
    scores, maps, reasons, _ = detector.inspect(images)
    decisions, other_case = set(), FORM.replace("multipart/form-data", "Multipart/Form-Data")
    for path, score, scored, stopped in zip(images, scores, maps, reasons, strict=True):
        body = path.read_bytes()
        for reply in (server.send(body), *(server.send(form(body), kind=kind) for kind in (FORM, other_case))):
            assert reply.status == 200, reply.content
            result = reply.result
            assert result["score"] == pytest.approx(float(score), rel=1e-4)
            assert result["relative"] == pytest.approx(float(score) / detector.threshold.typical, rel=1e-4)
            expected = decide(float(score), detector.threshold, stopped)
            assert (result["decision"], result["reason"]) == expected
            assert (result["threshold"], result["detector"]) == (detector.threshold.value, detector.identity())
            decisions.add(result["decision"])
            assert bool(result["boxes"]) == bool(detector.restore(scored, SIZE, SIZE).max() > result["threshold"])
    result = server.send(encoded(Image.new("L", (80, 60)), "PNG")).result
    assert result["decision"] == "review" and result["reason"] and decisions != {"review"}


def test_the_map_is_a_png_in_the_size_of_the_image(server, images):
    photo = Image.open(images[0]).resize((90, 70))
    reply = server.send(encoded(photo, "JPEG"), path="/map")
    assert (reply.status, reply.headers["content-type"]) == (200, "image/png")
    drawn = Image.open(io.BytesIO(reply.content))
    assert drawn.size == (90, 70) and len(np.unique(np.asarray(drawn).reshape(-1, 3), axis=0)) > 50
    result = json.loads(reply.headers["x-result"])
    assert result == {k: v for k, v in server.send(encoded(photo, "JPEG")).result.items() if k != "boxes"}


def test_requests_that_never_end_are_timed_out(server, images):
    """In their headers or their body, all at once, as each takes 3 seconds; another client goes away in the middle."""
    post = b"POST /score HTTP/1.1\r\n"
    half = post + b"Host: localhost\r\nContent-Length: 1000\r\n\r\nhalf"
    begins = [b"", post + b"Host: local", post + b"X: " + b"y" * 999, half, half]
    connections = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in begins]
    for connection, begin in zip(connections, begins, strict=True):
        connection.sendall(begin)
    connections.pop().close()
    for slow in connections:
        assert slow.recv(4096).startswith(b"HTTP/1.1 408")
        slow.close()
    assert server.send(images[0].read_bytes()).status == 200


@pytest.mark.parametrize(
    ("head", "status", "sentence"),
    [
        ("Content-Encoding: GZIP", 415, "Content-Encoding gzip is not supported"),
        ("Content-Encoding: identity\r\nContent-Encoding: br", 415, "Content-Encoding identity, br is not supported"),
        ("Content-Encoding: Identity", 415, "not an image"),
        (f"Expect: 100-continue\r\nContent-Length: {2**30}", 413, "more than the 0.5 MB of --max_mb"),
        (f"Content-Length: {2**30}", 413, "more than the 0.5 MB of --max_mb"),
    ],
)
def test_what_a_head_alone_says(head, status, sentence, server):
    """Nothing is sent after a length: the client waits for the answer, or is slow."""
    rest = "\r\n" if "Length" in head else "Content-Length: 2\r\n\r\nab"
    with socket.create_connection(("127.0.0.1", server.port), timeout=10) as client:
        client.sendall(f"POST /score HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{head}\r\n{rest}".encode())
        reply = b"".join(iter(lambda: client.recv(4096), b"")).decode()
    assert reply.startswith(f"HTTP/1.1 {status}") and sentence in reply


def test_health(server, detector):
    before = server.send(method="GET", path="/health").result
    limits = {"threshold": detector.threshold.value, "review_threshold": detector.threshold.review_value}
    assert before["detectors"] == {"part": {"id": detector.identity(), **limits}}
    assert before["status"] == "ok" and before["waiting"] == 0
    assert server.send(method="HEAD", path="/health").status == 200


def test_bad_requests_are_refused_with_a_sentence(server, images):
    good = images[0].read_bytes()
    many = b"\0" * int(MAX_MB * 2**20 + 1)
    cases = [
        (400, "no image", {"body": b""}),
        (400, "cannot read the image in the request", {"body": good[: len(good) // 2]}),
        (415, "not an image", {"body": b"hello"}),
        (415, "not an image", {"body": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"}),
        (415, "known formats: PNG, JPEG, BMP, TIFF, WEBP, GIF", {"body": encoded(Image.new("L", (8, 8)), "PPM")}),
        (404, "no detector of screw, only of part", {"body": good, "path": "/score/screw"}),
        (413, "more than the 0.5 MB", {"body": many}),
        (413, "more than the 0.5 MB", {"body": iter([many] * 4)}),  # chunked: the size is not known before
        (413, "exceeds limit", {"body": png_of(50_000, 50_000)}),
        (413, "exceeds limit", {"body": encoded(Image.new("L", (400, 300)), "PNG")}),
        (400, "0 files instead of one", {"body": form(), "kind": FORM}),
        (400, "2 files instead of one", {"body": form(good, good), "kind": FORM}),
        (400, "no image", {"body": form(b""), "kind": FORM}),
        (400, "", {"body": good, "kind": "multipart/form-data"}),  # the sentences are those of python-multipart
        (400, "", {"body": good, "kind": FORM}),
        (405, "Method Not Allowed", {"method": "GET"}),
        (405, "Method Not Allowed", {"method": "POST", "path": "/health"}),
        (404, "Not Found", {"body": good, "path": "/"}),
        (404, "Not Found", {"body": good, "path": "/score/part/"}),
    ]
    for status, sentence, request in cases:
        reply = server.send(**request)
        assert reply.status == status and sentence in reply.result["detail"], (reply, request)
    assert server.send(good).status == 200


def test_two_hundred_requests_from_eight_clients(server, images):
    bodies = [path.read_bytes() for path in images]
    alone = [server.send(body).content for body in bodies]
    before = server.send(method="GET", path="/health").result["scored"]
    replies = server.send_all(bodies * (200 // len(bodies)) + bodies[: 200 % len(bodies)], 8)
    assert [reply.status for reply in replies] == [200] * 200
    for number, reply in enumerate(replies):
        assert reply.content == alone[number % len(bodies)]
    after = server.send(method="GET", path="/health").result
    assert (after["scored"] - before, after["waiting"]) == (200, 0)


def test_more_clients_than_may_wait_are_asked_to_try_again(server):
    connections = [socket.create_connection(("127.0.0.1", server.port), timeout=10) for _ in range(MAX_WAITING)]
    for one in connections:
        one.sendall(b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000\r\n\r\nhalf")
    end = time.monotonic() + 2.5
    while server.send(method="GET", path="/health").result["waiting"] < MAX_WAITING and time.monotonic() < end:
        time.sleep(0.01)
    reply = server.send(b"more")
    for one in connections:
        one.close()
    assert reply.status == 503 and "requests are waiting" in reply.result["detail"]
    assert reply.headers["retry-after"] == "1"


def test_of_a_gif_the_first_frame_is_scored(server, images):
    frames = [Image.open(path).convert("L") for path in (images[0], images[-1])]
    alone, stream = [server.send(encoded(frame, "PNG")).result["score"] for frame in frames], io.BytesIO()
    frames[0].save(stream, "GIF", save_all=True, append_images=frames[1:])
    assert server.send(stream.getvalue()).result["score"] == pytest.approx(alone[0], rel=1e-3)
    assert alone[0] != pytest.approx(alone[1], rel=1e-3)


@pytest.fixture(scope="module")
def tiled(demo_data) -> FewShotDetector:
    """Cuts images above 64 pixels into tiles."""
    seed_everything(0)
    support = sorted((demo_data / "ring/train/good").iterdir())[:2]
    return FewShotDetector(untrained("none", img_size=SIZE).stn.eval(), "cpu", tile=SIZE).fit(support)


@pytest.fixture(scope="module")
def log(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("log") / "decisions.jsonl"


@pytest.fixture(scope="module")
def two_parts(part, tiled, log):
    """A service with a detector for whole images and one for tiles, and a log of decisions."""
    file = log.with_name("tiled.regad")
    tiled.save(file)
    flags = ("--log", str(log), "--max_tiles", "600", "--answer_seconds", "60", "--device", "cpu")
    with Server(part, str(file), *flags) as running:
        yield running


def test_a_large_image_lets_the_others_go_first(two_parts, tiled, detector, images):
    large = Image.open(images[0]).resize((1100, 1100))
    body, bodies = encoded(large, "PNG"), [path.read_bytes() for path in images]
    alone = [two_parts.send(one, "/score/part").result for one in bodies]
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(two_parts.send, body, "/score/tiled")
        while two_parts.send(method="GET", path="/health").result["waiting"] == 0:
            time.sleep(0.01)
        replies = [two_parts.send(one, "/score/part").result for one in bodies]
        assert not slow.done()
        reply = slow.result()
    assert replies == alone
    assert reply.result["score"] == pytest.approx(float(tiled.score([large])[0][0]), rel=1e-4)


def test_an_image_with_too_many_tiles_is_refused(two_parts):
    reply = two_parts.send(encoded(Image.new("L", (1500, 1500)), "PNG"), "/score/tiled")
    assert reply.status == 413 and "tiles, more than the 600 of --max_tiles" in reply.result["detail"]


def test_without_a_part_the_parts_are_named(two_parts, images):
    reply = two_parts.send(images[0].read_bytes())
    assert reply.status == 404 and "only of part, tiled" in reply.result["detail"]


def test_decisions_are_logged(two_parts, log, images):
    body = images[0].read_bytes()
    before = len(log.read_text().splitlines()) if log.exists() else 0
    result = two_parts.send(body, "/score/part").result
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(rows) == before + 1
    about = {"client": "127.0.0.1", "part": "part", "sha256": hashlib.sha256(body).hexdigest()}
    assert rows[-1] == {"time": rows[-1]["time"], **about, **result}
    log.rename(log.with_name("kept.jsonl"))
    log.mkdir()  # a decision that cannot be recorded is none
    reply = two_parts.send(body, "/score/part")
    assert reply.status == 507 and str(log) in reply.result["detail"]
    log.rmdir()


@pytest.mark.slow
def test_two_processes_and_an_answer_in_time(tiled, tmp_path, images):
    """Answers are those of one process; an image that takes too long is refused, and the others go on."""
    tiled.save(tmp_path / "tiled.regad")
    with Server(tmp_path / "tiled.regad", "--workers", "2", "--answer_seconds", "0.5", "--device", "cpu") as running:
        body, large = images[0].read_bytes(), encoded(Image.open(images[0]).resize((900, 900)), "PNG")
        with ThreadPoolExecutor(8) as pool:
            slow = pool.submit(running.send, large)
            replies = list(pool.map(running.send, [body] * 20))
        assert len({reply.content for reply in replies if reply.status == 200}) == 1
        reply = slow.result()
        assert reply.status == 503 and "within the 0.5 s of --answer_seconds" in reply.result["detail"]
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(20) == 0


def test_killed_in_the_middle_and_started_again(part, images):
    bodies = [path.read_bytes() for path in images] * 20
    with Server(part, *FLAGS) as first:
        before = [reply.content for reply in first.send_all(bodies[: len(images)], 2)]
        statuses = [reply.status for reply in killed_in_the_middle(first, bodies, 8)]
        assert set(statuses) == {0, 200}  # some were answered, some were not, none was answered with an error
    with Server(part, *FLAGS, port=first.port) as second:
        assert [reply.content for reply in second.send_all(bodies[: len(images)], 2)] == before
        second.process.send_signal(signal.SIGTERM)
        assert second.process.wait(20) == 0 and second.process.stdout.read() == "ended\n"


INVALID = {
    "--port 70000": "--port must be between 0 and 65535, got 70000",
    "--max_waiting 0": "--max_waiting must be at least 1",
    "--max_mb 0": "--max_mb, --max_seconds and --answer_seconds must be above 0",
    "--max_mb nan": "--max_mb must be a finite number",
    "--detector part.regad sub/part.regad": "files of different parts need different names",
    "--detector missing.regad": "no detector file",
    "": r"no package fastapi and .*requirements-examples\.txt",
}


@pytest.mark.parametrize(("flags", "sentence"), INVALID.items())
def test_invalid_arguments(flags, sentence, part, monkeypatch):
    if not flags:
        monkeypatch.setattr("utils.errors.find_spec", lambda name: None)
    with pytest.raises(UserError, match=sentence):
        service.main(["--detector", str(part), "--device", "cpu", *flags.split()])


def test_a_port_that_is_taken(part):
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="cannot listen at"):
        service.main(["--detector", str(part), "--device", "cpu", "--port", str(taken.getsockname()[1])])
