"""Fidelities over HTTP: an asyncio service that encodes samples as they come.

    pip install "qdp[serve]"
    python examples/serve.py [--device cuda:0] [--port 8080] [--no-coalesce]

``POST /fidelity`` takes one sample: the 64 pixels of a handwritten digit, as a JSON list or, with
the content type ``application/octet-stream``, as little-endian float64. It answers
``{"fidelities": [...], "digit": 7}``: the fidelity of the sample's state to the state of the mean
image of every digit, and the digit where it is highest. Fewer values are padded with zeros.
``GET /stats`` says what the engine, or the batcher, has counted.

By default all requests share a batcher: those that arrive while a batch is being encoded make the
next one. With ``--no-coalesce`` each is encoded by itself. ``load.py`` measures both.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
from typing import TYPE_CHECKING

import numpy as np
import qdp
from aiohttp import web
from sklearn.datasets import load_digits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import numpy.typing as npt

NUM_QUBITS = 6
RAW = "application/octet-stream"
#: Requests that may wait for a batch; the next one is answered with 503.
QUEUE = 4096


class Service:
    """The states of the digits' mean images, and what encodes the samples to compare with them."""

    def __init__(self, device: str | None, *, coalesce: bool) -> None:
        self.engine = qdp.Engine(device)
        self.prototypes = self.engine.encode(mean_images(), NUM_QUBITS).numpy()
        self.batcher: qdp.Batcher | None = None
        if coalesce:
            self.batcher = self.engine.batcher(NUM_QUBITS, queue=QUEUE, when_full="raise")

    async def fidelity(self, request: web.Request) -> web.Response:
        """Answer ``POST /fidelity``: 400 for a wrong sample, 503 where too many wait."""
        body = await request.read()
        try:
            states = await self.encode(sample(body, raw=request.content_type == RAW))
        except (ValueError, TypeError, OverflowError, RecursionError) as error:
            return web.json_response({"error": str(error)}, status=400)
        except qdp.QueueFullError as error:
            return web.json_response({"error": str(error)}, status=503)
        # One row of 64 amplitudes: on a GPU a small copy, which waits for the kernel.
        overlaps = self.prototypes.conj() @ states.numpy()[0]
        fidelities = np.square(np.abs(overlaps))
        answer = {"fidelities": fidelities.tolist(), "digit": int(fidelities.argmax())}
        return web.json_response(answer)

    async def encode(self, x: npt.NDArray[np.float64]) -> qdp.StateBatch:
        """The state of one sample, shape ``(1, 64)``."""
        if self.batcher is None:
            return await self.engine.encode_async(x, NUM_QUBITS)
        return await self.batcher.encode_async(x)

    async def stats(self, _request: web.Request) -> web.Response:
        """Answer ``GET /stats``."""
        counted = self.engine.stats() if self.batcher is None else self.batcher.stats()
        return web.json_response(counted)

    async def close_with(self, _app: web.Application) -> AsyncIterator[None]:
        """Let the batcher end with the application."""
        yield
        if self.batcher is not None:
            self.batcher.close()


def mean_images() -> npt.NDArray[np.float64]:
    """The mean image of every digit in scikit-learn's data set, shape ``(10, 64)``."""
    pixels, labels = load_digits(return_X_y=True)
    return np.stack([pixels[labels == digit].mean(axis=0) for digit in range(10)])


def sample(body: bytes, *, raw: bool) -> npt.NDArray[np.float64]:
    """The sample in a request's body, shape ``(features,)``.

    Raises :class:`ValueError` or :class:`TypeError` for a body that holds none.
    """
    x = np.frombuffer(body, "<f8") if raw else np.asarray(json.loads(body), dtype=np.float64)
    if x.ndim != 1:
        raise ValueError(f"one sample is a list of numbers, not an array of {x.ndim} dimensions")
    return x


def application(service: Service) -> web.Application:
    """The routes of ``service``, which ends with the application."""
    app = web.Application()
    app.router.add_post("/fidelity", service.fidelity)
    app.router.add_get("/stats", service.stats)
    app.cleanup_ctx.append(service.close_with)
    return app


async def serve(args: argparse.Namespace) -> None:
    """Serve until the process is asked to end."""
    end = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, end.set)
    service = Service(args.device, coalesce=args.coalesce)
    runner = web.AppRunner(application(service), access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, args.host, args.port).start()
        host, port = runner.addresses[0][:2]
        how = "coalescing" if args.coalesce else "one by one"
        print(f"{service.engine.device}, {how}: http://{host}:{port}", flush=True)
        await end.wait()
    finally:
        await runner.cleanup()


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="cpu or cuda:N; default: the first GPU, else the CPU")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8080, help="0 takes any that is free")
    parser.add_argument("--coalesce", action=argparse.BooleanOptionalAction, default=True)
    return parser.parse_args()


if __name__ == "__main__":
    asyncio.run(serve(parse_arguments()))
