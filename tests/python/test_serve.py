"""The serving example: its answers, what it refuses, and its load run."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("aiohttp", reason="needs the extra serve")
pytest.importorskip("sklearn", reason="needs the extra serve")

import load
import serve
from aiohttp.test_utils import TestClient, TestServer
from sklearn.datasets import load_digits

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import aiohttp

    Client = TestClient[Any, Any]

IMAGES = load_digits(return_X_y=True)[0]
JSON, RAW = "application/json", serve.RAW


@pytest.fixture(params=[True, False], ids=["coalesce", "no-coalesce"])
def service(request: pytest.FixtureRequest, device: str) -> serve.Service:
    return serve.Service(device, coalesce=request.param)


def with_client(service: serve.Service, work: Callable[[Client], Awaitable[Any]]) -> Any:
    async def run() -> Any:
        async with TestClient(TestServer(serve.application(service))) as client:
            return await work(client)

    return asyncio.run(run())


async def post(client: Client, body: Any, content_type: str = JSON) -> tuple[int, Any]:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    response: aiohttp.ClientResponse
    async with client.post("/fidelity", data=data, headers={"Content-Type": content_type}) as (
        response
    ):
        return response.status, await response.json()


def assert_fidelities(answer: tuple[int, Any], x: Any) -> None:
    status, body = answer
    assert status == 200, body
    expected = load.fidelities(np.reshape(x, (1, -1)))[0]
    np.testing.assert_allclose(body["fidelities"], expected, rtol=0, atol=1e-12)
    assert body["digit"] == expected.argmax()


def test_answers_are_fidelities(service: serve.Service) -> None:
    async def work(client: Client) -> list[tuple[int, Any]]:
        return [
            await post(client, IMAGES[0].tolist()),
            await post(client, IMAGES[1].astype("<f8").tobytes(), RAW),
        ]

    for answer, x in zip(with_client(service, work), IMAGES, strict=False):
        assert_fidelities(answer, x)


def test_fewer_values_are_padded(service: serve.Service) -> None:
    x = IMAGES[2][:40]
    answer = with_client(service, lambda client: post(client, x.tolist()))
    assert_fidelities(answer, np.pad(x, (0, 24)))


def test_many_at_once_each_get_their_own(service: serve.Service) -> None:
    """And a bad one among them fails alone."""
    bad = 17

    async def work(client: Client) -> list[tuple[int, Any]]:
        bodies = [x.tolist() for x in IMAGES[:64]]
        bodies[bad] = [0.0] * 64
        return list(await asyncio.gather(*(post(client, body) for body in bodies)))

    for number, answer in enumerate(with_client(service, work)):
        if number == bad:
            assert answer[0] == 400
            assert "norm" in answer[1]["error"]
        else:
            assert_fidelities(answer, IMAGES[number])


@pytest.mark.parametrize(
    ("body", "content_type", "text"),
    [
        (b"not json", JSON, "Expecting value"),
        (b"\xff\xfe\xff", JSON, "decode"),
        (b"[" * 100_000, JSON, "recursion"),
        ({"pixels": 1}, JSON, "dict"),
        (["a"], JSON, "could not convert"),
        ([[1.0], [2.0, 3.0]], JSON, "inhomogeneous"),
        ([[1.0] * 64], JSON, "2 dimensions"),
        (3.0, JSON, "0 dimensions"),
        ([10**400], JSON, "too large"),
        ([1.0] * 65, JSON, "64"),
        ([], JSON, "0"),
        ([0.0] * 64, JSON, "norm"),
        ([1.0, float("nan")], JSON, "NaN"),
        ([1.0, None], JSON, "NaN"),
        (b"1234567", RAW, "buffer size"),
        (b"", RAW, "0"),
        (np.array([1.0, np.inf]).tobytes(), RAW, "inf"),
    ],
)
def test_bad_input_is_refused_and_said(
    body: Any, content_type: str, text: str, service: serve.Service
) -> None:
    async def work(client: Client) -> list[tuple[int, Any]]:
        return [
            await post(client, body, content_type),
            await post(client, IMAGES[0].tolist()),
        ]

    (status, answer), after = with_client(service, work)
    assert status == 400, answer
    assert text.lower() in answer["error"].lower()
    assert_fidelities(after, IMAGES[0])


def test_stats(service: serve.Service) -> None:
    async def work(client: Client) -> Any:
        await post(client, IMAGES[0].tolist())
        async with client.get("/stats") as response:
            return await response.json()

    stats = with_client(service, work)
    if service.batcher is not None:
        assert stats["requests"] == 1
    else:
        assert stats.keys() == service.engine.stats().keys()


def test_load_run(device: str, tmp_path: Path) -> None:
    """The script as its users run it, shortly."""
    script, record = Path(load.__file__), tmp_path / "load.json"
    options = ["--device", device, "--connections", "8", "--seconds", "0.2", "--rounds", "1"]
    options += ["--json", str(record)]
    result = subprocess.run(
        [sys.executable, script, *options], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    rows = {line.split()[0]: line.split() for line in result.stdout.splitlines()}
    for how in ("on", "off"):
        answers, wrong = map(int, rows[how][-2:])
        assert answers > 0
        assert wrong == 0
    saved = json.loads(record.read_text())
    assert saved["device"] == "cpu" or device != "cpu"
    assert [result["coalescing"] for result in saved["results"]] == ["on", "off"]
    assert all(result["requests_per_second"] > 0 for result in saved["results"])
