"""The ``qdp`` command: ``qdp info``, ``qdp encode`` and ``qdp demo``."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import qdp
from qdp._io import InputError, StateWriter, human_bytes, open_source, require

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

__all__ = ["main"]

ENCODINGS = ("amplitude", "angle", "basis", "phase", "iqp", "iqp-z", "zz", "iqp-embedding")

#: Bytes of states that one batch aims at, and the most samples it takes.
BATCH_BYTES = 64 << 20
BATCH_SAMPLES = 1 << 16

#: Optional packages and what brings them.
EXTRAS = {
    "torch": 'pip install "qdp[torch]"',
    "pyarrow": 'pip install "qdp[cli]"',
    "rich": 'pip install "qdp[cli]"',
    "scikit-learn": 'pip install "qdp[demo]"',
    "matplotlib": 'pip install "qdp[demo]"',
}

Options: TypeAlias = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    0 is success, 1 an error told in one line on stderr, 2 a usage error, 130 an interrupt.
    """
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (InputError, qdp.QdpError, OSError, MemoryError) as error:
        print(f"qdp: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("qdp: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qdp", description="Classical data to quantum state vectors."
    )
    parser.add_argument("--version", action="version", version=f"qdp {qdp.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    info = commands.add_parser("info", help="devices, versions, and what is missing")
    info.add_argument("--json", action="store_true", help="print JSON")
    info.set_defaults(run=_info)

    encode = commands.add_parser(
        "encode",
        help="encode a file of samples into a .npy file of states",
        description="Encode a file, one sample per row, into a .npy file of shape "
        "(samples, 2**QUBITS), in constant memory. OUT appears only when it is complete.",
    )
    encode.add_argument(
        "input", type=Path, metavar="IN", help=".npy, .parquet, .arrow, .feather or .csv"
    )
    encode.add_argument("-n", "--num-qubits", type=int, required=True, metavar="QUBITS")
    encode.add_argument("-e", "--encoding", choices=ENCODINGS, default="amplitude")
    encode.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.npy")
    encode.add_argument("--rotation", choices=("x", "y", "z"), help="axis of angle encoding")
    encode.add_argument("--reps", type=int, help="repetitions of zz and iqp-embedding")
    encode.add_argument(
        "--entanglement",
        type=_entanglement,
        help="full, linear, reverse_linear, circular, pairwise, sca, none, or pairs: 0-1,1-2",
    )
    encode.add_argument("--convention", choices=("qdp", "qiskit", "pennylane"), default="qdp")
    encode.add_argument(
        "--precision", choices=("complex64", "complex128"), help="default: that of the input"
    )
    encode.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda:0 if usable)")
    encode.add_argument(
        "--batch-size", type=_positive, metavar="SAMPLES", help="samples encoded at once"
    )
    encode.add_argument(
        "--columns",
        type=lambda text: text.split(","),
        metavar="A,B,...",
        help="columns of a table that are features (default: the numeric ones)",
    )
    encode.add_argument(
        "--header",
        action=argparse.BooleanOptionalAction,
        help="whether a CSV file has a header (default: look at its first line)",
    )
    encode.add_argument("--force", action="store_true", help="overwrite OUT")
    encode.set_defaults(run=_encode)

    demo = commands.add_parser(
        "demo", help="classify handwritten digits with quantum fidelity kernels"
    )
    demo.add_argument("--output", type=Path, default=Path("demo-output"), metavar="DIR")
    demo.add_argument("--device", help="cpu, cuda or cuda:N (default: cuda:0 if usable)")
    demo.set_defaults(run=_demo)
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def _entanglement(text: str) -> str | list[list[int]]:
    if not any(character.isdigit() for character in text):
        return text
    try:
        return [[int(qubit) for qubit in block.split("-")] for block in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected a name or pairs as 0-1,1-2, got {text!r}"
        ) from None


# info


def _info(args: argparse.Namespace) -> None:
    info = _collect_info()
    if args.json:
        print(json.dumps(info, indent=2))
        return
    lines = [("qdp", info["version"]), ("python", info["python"])]
    lines.append(("kernels", info["kernels"] or "none"))
    lines.append(("driver", f"CUDA {info['driver']}" if info["driver"] else "none"))
    for device in info["devices"]:
        capability, memory = device["compute_capability"], device["memory_bytes"] / 2**30
        text = f"{device['name']}, compute capability {capability}, {memory:.1f} GiB"
        lines.append((f"cuda:{device['ordinal']}", text))
    lines.append(("cpu", f"{info['cpu_threads']} threads"))
    lines += [(name, found or "not installed") for name, found in info["packages"].items()]
    for name, text in lines:
        print(f"{name:<14}{text}")
    if info["missing"]:
        print("\nmissing")
        for name, text in info["missing"].items():
            print(f"  {name:<14}{text}")


def _collect_info() -> Options:
    info = qdp.device_info()
    packages = {name: _version(name) for name in ("numpy", *EXTRAS)}
    missing = {name: how for name, how in EXTRAS.items() if packages[name] is None}
    if info["cuda_unavailable"]:
        missing = {"CUDA": info["cuda_unavailable"], **missing}
    return {
        **info,
        "python": platform.python_version(),
        "packages": packages,
        "missing": missing,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


# encode


def _encode(args: argparse.Namespace) -> None:
    output: Path = args.output
    if output.suffix != ".npy":
        raise InputError(f"{output}: the output must be a .npy file")
    if output.exists() and not args.force:
        raise InputError(f"{output} exists; --force overwrites it")
    if not output.parent.is_dir():
        raise InputError(f"{output.parent} is not a directory")
    source = open_source(args.input, args.columns, args.header)
    if source.left_out and not args.columns:
        print(f"qdp: not numeric, left out: {', '.join(source.left_out)}", file=sys.stderr)
    engine = qdp.Engine(args.device, precision=args.precision)
    size = args.batch_size or _batch_size(args.num_qubits)
    names = ("rotation", "reps", "entanglement", "convention")
    options: Options = {name: getattr(args, name) for name in names}

    began = time.perf_counter()
    with StateWriter(output, source.rows) as writer, _progress(source.rows) as progress:
        for data in source.batches(size):
            try:
                state = engine.encode(data, args.num_qubits, args.encoding, **options)
                states = state.numpy()
            except qdp.InvalidDataError as error:
                raise _in_file(error, args.input, writer.rows) from error
            writer.write(states)
            progress(writer.rows, writer.nbytes, time.perf_counter() - began)
        if writer.rows == 0:
            raise InputError(f"{args.input}: the file holds no samples")
    seconds = time.perf_counter() - began
    print(
        f"{output}: {writer.shape} {writer.dtype}, {human_bytes(writer.nbytes)}, "
        f"{writer.rows / seconds:,.0f} samples/s on {engine.device}"
    )


def _batch_size(num_qubits: int) -> int:
    return min(BATCH_SAMPLES, max(1, BATCH_BYTES >> (max(num_qubits, 0) + 4)))


def _in_file(error: qdp.InvalidDataError, path: Path, first: int) -> InputError:
    """The error with the sample's index in the file instead of its index in the batch."""
    sample = first + error.sample
    message = str(error).removeprefix("data: ")
    return InputError(f"{path}: {message.replace(f'sample {error.sample}', f'sample {sample}', 1)}")


@contextmanager
def _progress(total: int | None) -> Iterator[Any]:
    """A progress bar on stderr: call it with samples, bytes and seconds so far."""
    bars = require("rich.progress", "cli")
    console = require("rich.console", "cli").Console(stderr=True)
    columns = (
        bars.TextColumn("encoding"),
        bars.BarColumn(),
        bars.MofNCompleteColumn(),
        bars.TextColumn("{task.fields[rate]}"),
        bars.TimeRemainingColumn(),
    )
    hidden = not console.is_terminal
    with bars.Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        task = progress.add_task("encoding", total=total, rate="")

        def update(samples: int, nbytes: int, seconds: float) -> None:
            rate = f"{samples / seconds:,.0f} samples/s, {human_bytes(nbytes)}"
            progress.update(task, completed=samples, rate=rate)

        yield update


# demo


def _demo(args: argparse.Namespace) -> None:
    from qdp.demo import run

    run(args.output, args.device)


if __name__ == "__main__":
    sys.exit(main())
