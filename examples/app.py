"""The HTTP application of examples/service.py; needs FastAPI and python-multipart.

GET /health   whether the detector answers: status, detector, threshold, number of images scored and waiting
POST /score   an image as the body, or as the one file of multipart/form-data: its `Judgement` as JSON
POST /map     the same image: the heat map over it as PNG; the result without boxes is in the header X-Result
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

from fastapi import FastAPI, HTTPException, Request, Response
from PIL import Image
from python_multipart.exceptions import FormParserError
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from datasets.images import ImageError, eight_bit, read_pixels
from examples.judge import Judge, Judgement

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")  # the formats of IMAGE_SUFFIXES; Pillow's others may start programs
READ_AND_DROPPED = 10  # times the limit: so much of a body that is too large is read, so that the client is answered
MB = 2**20

Answer = TypeVar("Answer")


class Limits(NamedTuple):
    """body: bytes of a request. waiting: requests at the same time. seconds: for the body to arrive."""

    body: int
    waiting: int
    seconds: float


class Service:
    """Reads requests at the same time, and passes their images to one thread, in which the detector works.

    So the results are those of single images, and one image is decoded at a time, whatever the number of clients.
    """

    def __init__(self, judge: Judge, limits: Limits) -> None:
        self.judge, self.limits = judge, limits
        self.worker = ThreadPoolExecutor(1, "detector")
        self.waiting = self.scored = 0

    async def answer(self, request: Request, make: Callable[[Image.Image, Judgement], Answer]) -> Answer:
        """What `make` makes of the image of a request and its result.

        Raises:
            HTTPException: there is no usable image in the request, or too many requests are waiting.
        """
        if self.waiting >= self.limits.waiting:
            raise HTTPException(503, f"{self.waiting} requests are waiting; try again", {"Retry-After": "1"})
        self.waiting += 1
        try:
            body = await asyncio.wait_for(self._image(request), self.limits.seconds)
            work = partial(self._judge, body, make)
            return await asyncio.get_running_loop().run_in_executor(self.worker, work)
        except (TimeoutError, asyncio.TimeoutError) as error:  # two classes before Python 3.11
            raise HTTPException(408, f"the image did not arrive within {self.limits.seconds:g} s") from error
        except ClientDisconnect as error:
            raise HTTPException(400, "the client went away") from error
        finally:
            self.waiting -= 1

    def _judge(self, body: bytes, make: Callable[[Image.Image, Judgement], Answer]) -> Answer:
        """Runs in the worker."""
        convert = partial(eight_bit, bits=self.judge.detector.bits)
        try:
            image = read_pixels(io.BytesIO(body), convert, "in the request", FORMATS)
        except ImageError as error:
            is_bomb = isinstance(error.__cause__, Image.DecompressionBombError)
            is_other = isinstance(error.__cause__, Image.UnidentifiedImageError)
            raise HTTPException(413 if is_bomb else 415 if is_other else 400, str(error)) from error
        answer = make(image, self.judge.judge(image))
        self.scored += 1
        return answer

    async def _image(self, request: Request) -> bytes:
        """The image file in a request: the body, or the one file of a form."""
        if (encoding := request.headers.get("content-encoding", "identity").lower()) != "identity":
            raise HTTPException(415, f"Content-Encoding {encoding} is not supported: send the file as it is")
        body = await self._body(request)
        if request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
            body = await _only_file(request, body)
        if not body:
            raise HTTPException(400, "no image: send the file as the body, or as one file of multipart/form-data")
        return body

    async def _body(self, request: Request) -> bytes:
        limit, parts, size = self.limits.body, [], 0
        async for part in request.stream():
            size += len(part)
            if size <= limit:
                parts.append(part)
            elif size > READ_AND_DROPPED * limit:
                break
        if size > limit:
            raise HTTPException(413, f"the request has more than the {limit / MB:g} MB of --max_mb")
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


def make_app(judge: Judge, limits: Limits) -> FastAPI:
    """The application; see the module's docstring."""
    service, detector = Service(judge, limits), judge.detector
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # pages that load scripts from the network

    @app.api_route("/health", methods=["GET", "HEAD"])
    async def health() -> dict:
        threshold = detector.threshold and detector.threshold.value
        counts = {"scored": service.scored, "waiting": service.waiting}
        return {"status": "ok", "detector": judge.name, "threshold": threshold, **counts}

    @app.post("/score")
    async def score(request: Request) -> dict:
        return await service.answer(request, lambda _, judgement: judgement.plain())

    @app.post("/map")
    async def heat_map(request: Request) -> Response:
        return await service.answer(request, partial(_map_response, judge))

    return app


def _map_response(judge: Judge, image: Image.Image, judgement: Judgement) -> Response:
    encoded = io.BytesIO()
    judge.heat_map(image, judgement).save(encoded, "PNG")
    result = {name: value for name, value in judgement.plain().items() if name != "boxes"}  # headers must be short
    return Response(encoded.getvalue(), media_type="image/png", headers={"X-Result": json.dumps(result)})
