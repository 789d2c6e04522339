"""The HTTP application of examples/service.py; needs FastAPI and python-multipart.

GET /health        whether the detectors answer: status, detectors by part, number of images scored and waiting
POST /score/PART   an image as the body, or as the one file of multipart/form-data: its `Judgement` as JSON
POST /map/PART     the same image: the heat map over it as PNG; the result without boxes is in the header X-Result

PART may be left out where there is one detector.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import json
import re
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import NamedTuple, TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
from PIL import Image
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from datasets.images import ImageError, eight_bit, read_pixels
from examples.judge import Judge, Judgement
from utils.files import write_line

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "GIF")  # Pillow's others may start programs
READ_AND_DROPPED = 10  # times the limit: so much of a body that is too large is read, so that the client is answered
MB = 2**20
LARGE_PIXELS = 4_000_000  # decoding and drawing more takes longer than scoring

Answer = TypeVar("Answer")
Scores = TypeVar("Scores")
Make = Callable[[Judge, Image.Image, Judgement], Answer]


class Limits(NamedTuple):
    """body: bytes of a request. waiting: requests at the same time. seconds: for the body to arrive. tiles: into which
    an image is cut. answer_seconds: from the arrival of an image to its answer.
    """

    body: int
    waiting: int
    seconds: float
    tiles: int
    answer_seconds: float


class Upload(NamedTuple):
    """An image that has arrived. client: its address. deadline: of its answer, by time.monotonic."""

    body: bytes
    part: str
    client: str
    deadline: float


class Service:
    """Reads requests at the same time. All detectors work in one thread, which takes the images in order of arrival.

    So the results are those of single images, whatever the number of clients. A large image is decoded and drawn in a
    second thread, and queues again after each group of tiles: the images that have come meanwhile are scored first.
    Two images are decoded at a time at most.

    judges: by part. log: where decisions are recorded, or None.
    """

    def __init__(self, judges: Mapping[str, Judge], limits: Limits, log: Path | None = None) -> None:
        self.judges, self.limits, self.log = judges, limits, log
        self.worker, self.worker_of_large = ThreadPoolExecutor(1, "detector"), ThreadPoolExecutor(1, "large")
        self.of_large = threading.local()  # deadline: of the image in this thread
        self.waiting = self.scored = 0
        for judge in judges.values():
            judge.detector.score_squares = partial(self._in_turn, judge.detector.score_squares)

    async def answer(self, request: Request, part: str | None, make: Make[Answer]) -> Answer:
        """What `make` makes of the image of a request and its result.

        Raises:
            HTTPException: there is no such part or no usable image in the request, or too much is to be done.
        """
        if part is None and len(self.judges) == 1:
            (part,) = self.judges
        if part not in self.judges:
            raise HTTPException(404, f"no detector of {part or 'an unnamed part'}, only of {', '.join(self.judges)}")
        if self.waiting >= self.limits.waiting:
            raise _busy(f"{self.waiting} requests are waiting")
        self.waiting += 1
        try:
            body = await asyncio.wait_for(self._image(request), self.limits.seconds)
            client = request.client.host if request.client else ""
            upload = Upload(body, part, client, time.monotonic() + self.limits.answer_seconds)
            is_large = await asyncio.to_thread(self._is_large, upload)
            worker, judge = (self.worker_of_large, self._judge_large) if is_large else (self.worker, self._judge)
            return await asyncio.get_running_loop().run_in_executor(worker, judge, upload, make)
        except (TimeoutError, asyncio.TimeoutError) as error:  # two classes before Python 3.11
            raise HTTPException(408, f"the image did not arrive within {self.limits.seconds:g} s") from error
        except ClientDisconnect as error:
            raise HTTPException(400, "the client went away") from error
        finally:
            self.waiting -= 1

    def _is_large(self, upload: Upload) -> bool:
        """Whether others need not wait for this image, by its header alone; HTTPException if it has too many tiles."""
        try:
            with Image.open(io.BytesIO(upload.body), formats=FORMATS) as image:
                width, height = image.size
        except Exception:  # see `read_pixels`, which will say what is wrong
            return False
        layout = self.judges[upload.part].detector.layout_of(width, height)
        if layout and len(layout.corners) > self.limits.tiles:
            raise HTTPException(413, f"{layout}, more than the {self.limits.tiles} of --max_tiles")
        return layout is not None or width * height > LARGE_PIXELS

    def _in_turn(self, score: Callable[..., Scores], *arguments: object) -> Scores:
        """What `score` makes of a group of squares, in the thread of the detectors."""
        if not (deadline := getattr(self.of_large, "deadline", None)):
            return score(*arguments)
        self._require_time(deadline)
        return self.worker.submit(score, *arguments).result()

    def _require_time(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise _busy(f"no result within the {self.limits.answer_seconds:g} s of --answer_seconds")

    def _judge_large(self, upload: Upload, make: Make[Answer]) -> Answer:
        """Runs in the worker of large images."""
        self.of_large.deadline = upload.deadline
        return self._judge(upload, make)

    def _judge(self, upload: Upload, make: Make[Answer]) -> Answer:
        """Runs in one of the workers."""
        self._require_time(upload.deadline)
        judge = self.judges[upload.part]
        convert = partial(eight_bit, bits=judge.detector.bits)
        try:
            image = read_pixels(io.BytesIO(upload.body), convert, "in the request", FORMATS)
        except ImageError as error:
            is_bomb = isinstance(error.__cause__, Image.DecompressionBombError)
            is_other = isinstance(error.__cause__, Image.UnidentifiedImageError)
            known = f"; known formats: {', '.join(FORMATS)}" if is_other else ""
            raise HTTPException(413 if is_bomb else 415 if is_other else 400, f"{error}{known}") from error
        judgement = judge.judge(image)
        self._record(upload, judgement)
        self.scored += 1
        return make(judge, image, judgement)

    def _record(self, upload: Upload, judgement: Judgement) -> None:
        """Appends a decision to the log; HTTPException where it cannot be, as nobody would find it again."""
        if self.log is None:
            return
        now = datetime.now().astimezone().isoformat(timespec="milliseconds")
        digest = hashlib.sha256(upload.body).hexdigest()
        row = {"time": now, "client": upload.client, "part": upload.part, "sha256": digest, **judgement.plain()}
        try:
            with open(self.log, "ab", buffering=0) as stream:
                write_line(stream, json.dumps(row))
        except OSError as error:
            raise HTTPException(507, f"the decision cannot be recorded in {self.log}: {error.strerror}") from error

    async def _image(self, request: Request) -> bytes:
        """The image file in a request: the body, or the one file of a form."""
        encodings = ", ".join(request.headers.getlist("content-encoding")).lower()
        if set(filter(None, re.split(r"[,\s]+", encodings))) - {"identity"}:
            raise HTTPException(415, f"Content-Encoding {encodings} is not supported: send the file as it is")
        body = await self._body(request)
        if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            body = await _only_file(request, body)
        if not body:
            raise HTTPException(400, "no image: send the file as the body, or as one file of multipart/form-data")
        return body

    async def _body(self, request: Request) -> bytes:
        limit, parts, size = self.limits.body, [], 0
        too_large = HTTPException(413, f"the request has more than the {limit / MB:g} MB of --max_mb")
        announced = int(request.headers.get("content-length", 0))
        if announced > (limit if "expect" in request.headers else READ_AND_DROPPED * limit):
            raise too_large  # the client waits for it and sends nothing, or would send too much to be read
        async for part in request.stream():
            size += len(part)
            if size <= limit:
                parts.append(part)
            elif size > READ_AND_DROPPED * limit:
                break
        if size > limit:
            raise too_large
        return b"".join(parts)


async def _only_file(request: Request, body: bytes) -> bytes:
    async def receive() -> dict:
        return {"type": "http.request", "body": body, "more_body": False}

    try:
        async with Request(request.scope, receive).form() as form:
            files = [value for _, value in form.multi_items() if isinstance(value, UploadFile)]
            if len(files) != 1:
                raise HTTPException(400, f"the form has {len(files)} files instead of one")
            return await files[0].read()
    except FormParserError as error:  # newer versions of Starlette answer by themselves
        raise HTTPException(400, f"the form is damaged: {error}") from error


def timed_protocol(seconds: float) -> type[H11Protocol]:
    """uvicorn's protocol, which closes a connection whose request line and headers do not end within `seconds`."""

    class Timed(H11Protocol):
        deadline: asyncio.TimerHandle | None = None

        def connection_made(self, transport: asyncio.Transport) -> None:
            super().connection_made(transport)
            self.deadline = self.loop.call_later(seconds, self.give_up)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            is_asked = self.cycle is not None and not self.cycle.response_complete
            if is_asked and self.deadline:
                self.deadline.cancel()
                self.deadline = None
            elif not is_asked and self.deadline is None:
                self.deadline = self.loop.call_later(seconds, self.give_up)

        def connection_lost(self, error: Exception | None) -> None:
            if self.deadline:
                self.deadline.cancel()
            super().connection_lost(error)

        def give_up(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
                self.transport.close()

    return Timed


def _busy(reason: str) -> HTTPException:
    return HTTPException(503, f"{reason}; try again", {"Retry-After": "1"})


def make_app(judges: Mapping[str, Judge], limits: Limits, log: Path | None = None) -> FastAPI:
    """The application; see the module's docstring and `Service`."""
    service = Service(judges, limits, log)
    pages = {"docs_url": None, "redoc_url": None, "openapi_url": None}  # they load scripts from the network
    app = FastAPI(redirect_slashes=False, **pages)  # few clients follow a redirection of POST

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> dict:
        detectors = {part: _facts(judge) for part, judge in judges.items()}
        return {"status": "ok", "detectors": detectors, "scored": service.scored, "waiting": service.waiting}

    @app.post("/score")
    @app.post("/score/{part}")
    async def score(request: Request, part: str | None = None) -> dict:
        return await service.answer(request, part, lambda _judge, _image, judgement: judgement.plain())

    @app.post("/map")
    @app.post("/map/{part}")
    async def heat_map(request: Request, part: str | None = None) -> Response:
        return await service.answer(request, part, _map_response)

    return app


def _facts(judge: Judge) -> dict:
    threshold = judge.detector.threshold
    limits = {"threshold": threshold.value, "review_threshold": threshold.review_value} if threshold else {}
    return {"id": judge.name, **limits}


def _map_response(judge: Judge, image: Image.Image, judgement: Judgement) -> Response:
    encoded = io.BytesIO()
    judge.heat_map(image, judgement).save(encoded, "PNG")
    result = {name: value for name, value in judgement.plain().items() if name != "boxes"}  # headers must be short
    return Response(encoded.getvalue(), media_type="image/png", headers={"X-Result": json.dumps(result)})
