"""A load run of serve.py: requests per second and latencies, with coalescing on and off.

    python examples/load.py [--device cuda:0] [--connections 64] [--seconds 1.5] [--rounds 3]
        [--json FILE]

Both services run in processes of their own and have their turns, round by round. On every
connection one request follows another. Every answer is compared with fidelities computed here,
straight from the definition; the exit code is 1 if one is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import sys
import time
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import qdp
from serve import RAW, mean_images
from sklearn.datasets import load_digits

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import numpy.typing as npt

SERVE = Path(__file__).with_name("serve.py")


@dataclass
class Load:
    """What came back from one service."""

    rates: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    #: Number of the sample, status and body of every answer.
    answers: list[tuple[int, int, bytes]] = field(default_factory=list)

    def figures(self) -> dict[str, float]:
        """The median rate of the rounds, and the latencies in milliseconds."""
        p50, p99 = np.percentile(self.latencies, [50, 99]) * 1e3
        rate = float(np.median(self.rates))
        return {"requests_per_second": rate, "p50_ms": float(p50), "p99_ms": float(p99)}

    def wrong(self, expected: npt.NDArray[np.float64]) -> int:
        """How many answers are not ``expected``, a row of fidelities for each sample."""
        return sum(not _right(*answer[1:], expected[answer[0]]) for answer in self.answers)


def _right(status: int, body: bytes, expected: npt.NDArray[np.float64]) -> bool:
    if status != 200:
        return False
    answer = json.loads(body)
    close = np.allclose(answer["fidelities"], expected, rtol=0, atol=1e-12)
    return bool(close and answer["digit"] == expected.argmax())


def fidelities(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Fidelities of amplitude states to those of the mean images, shape ``(samples, 10)``."""
    means = mean_images()
    overlaps = x @ means.T / np.outer(np.linalg.norm(x, axis=1), np.linalg.norm(means, axis=1))
    squares: npt.NDArray[np.float64] = np.square(overlaps)
    return squares


@asynccontextmanager
async def service(device: str | None, *options: str) -> AsyncIterator[tuple[str, int]]:
    """Start serve.py on a free port; the value is its host and port."""
    arguments = ["--port", "0", *options, *(["--device", device] if device else [])]
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(SERVE), *arguments, stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        line = (await process.stdout.readline()).decode().strip()
        if not line:
            raise RuntimeError(f"the service did not start: {' '.join(arguments)}")
        print(line, flush=True)
        host, port = line.rpartition("//")[2].rsplit(":", 1)
        yield host, int(port)
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def drive(
    address: tuple[str, int], bodies: list[bytes], connections: int, seconds: float, load: Load
) -> None:
    """Send requests on all connections for so many seconds, and add what comes back to ``load``.

    HTTP by hand: a client library would take the processor longer than the service does.
    """
    numbers = itertools.count()
    heads = [
        f"POST /fidelity HTTP/1.1\r\nHost: {address[0]}\r\nContent-Type: {RAW}\r\n"
        f"Content-Length: {len(body)}\r\n\r\n".encode()
        for body in bodies
    ]
    opened = await asyncio.gather(*(asyncio.open_connection(*address) for _ in range(connections)))
    began = time.perf_counter()
    end = began + seconds

    async def send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while (sent := time.perf_counter()) < end:
            index = next(numbers) % len(bodies)
            writer.write(heads[index] + bodies[index])
            status, body = await receive(reader)
            load.latencies.append(time.perf_counter() - sent)
            load.answers.append((index, status, body))

    before = len(load.answers)
    await asyncio.gather(*(send(*connection) for connection in opened))
    load.rates.append((len(load.answers) - before) / (time.perf_counter() - began))
    for _, writer in opened:
        writer.close()
        await writer.wait_closed()


async def batch_size(address: tuple[str, int]) -> float:
    """Requests of an average batch, as the coalescing service has counted them."""
    reader, writer = await asyncio.open_connection(*address)
    writer.write(f"GET /stats HTTP/1.1\r\nHost: {address[0]}\r\n\r\n".encode())
    _, body = await receive(reader)
    writer.close()
    await writer.wait_closed()
    stats = json.loads(body)
    return float(stats["requests"] / stats["batches"])


async def receive(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Status and body of the next response."""
    status, *lines = (await reader.readuntil(b"\r\n\r\n")).split(b"\r\n")
    headers = dict(line.lower().split(b": ", 1) for line in lines if line)
    return int(status.split()[1]), await reader.readexactly(int(headers[b"content-length"]))


async def run(args: argparse.Namespace) -> int:
    """Drive both services in turn; print the table; return how many answers are wrong."""
    samples, _ = load_digits(return_X_y=True)
    bodies = [sample.astype("<f8").tobytes() for sample in samples]
    loads = {"on": Load(), "off": Load()}
    async with (
        service(args.device, "--coalesce") as coalescing,
        service(args.device, "--no-coalesce") as one_by_one,
    ):
        addresses = {"on": coalescing, "off": one_by_one}
        for address in addresses.values():  # warm up
            await drive(address, bodies, args.connections, args.seconds / 5, Load())
        for _ in range(args.rounds):
            for how, load in loads.items():
                await drive(addresses[how], bodies, args.connections, args.seconds, load)
        average = await batch_size(coalescing)
    expected = fidelities(samples)
    wrong = {how: load.wrong(expected) for how, load in loads.items()}
    print(f"{args.connections} connections, {args.rounds} rounds of {args.seconds:g} s each")
    print(f"requests of an average batch, coalescing on: {average:.1f}")
    results = [
        {"coalescing": how, **load.figures(), "answers": len(load.answers), "wrong": wrong[how]}
        for how, load in loads.items()
    ]
    print("  ".join(f"{name:>19}" for name in results[0]))
    for result in results:
        cells = (f"{v:,.2f}" if isinstance(v, float) else str(v) for v in result.values())
        print("  ".join(f"{cell:>19}" for cell in cells))
    if args.json:
        about = {
            "date": datetime.now(UTC).date().isoformat(),
            "device": device_name(args.device),
            "processors": os.cpu_count(),
            "qdp": qdp.__version__,
            "aiohttp": version("aiohttp"),
            "connections": args.connections,
            "rounds": args.rounds,
            "seconds": args.seconds,
            "average_batch": average,
        }
        args.json.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    return sum(wrong.values())


def device_name(name: str | None) -> str:
    """The model of the device that the services encode on."""
    device = qdp.Engine(name).device
    if device == "cpu":
        return device
    return str(qdp.device_info()["devices"][int(device.rpartition(":")[2])]["name"])


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", help="as of serve.py")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=1.5, help="of a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="where to write the results")
    args = parser.parse_args()
    if args.json and not args.json.parent.is_dir():
        parser.error(f"--json: there is no folder {args.json.parent}")
    return args


if __name__ == "__main__":
    sys.exit(1 if asyncio.run(run(parse_arguments())) else 0)
