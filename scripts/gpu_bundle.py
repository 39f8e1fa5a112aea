"""Pack what a GPU machine without Rust, a network or this repository needs into ``gpu-bundle/``.

The folder holds a release wheel, the Rust tests and benchmarks of qdp-core as stripped binaries,
the Python tests and benchmarks, and ``run.sh``, which says what it can do with them. Arguments go
to ``cargo test``.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = ROOT / "gpu-bundle"
LIMIT = 56 * 2**20  # bytes; what is comfortable to carry
#: Rust tests that need no GPU, and run where they are built.
CPU_TESTS = {"batcher_stress", "cpu", "gradient", "loom", "loom_batcher"}


def cargo_binaries(command: list[str], kinds: set[str]) -> dict[str, Path]:
    """Build qdp-core's test or benchmark programs of these kinds; their paths by name."""
    output = subprocess.run(
        ["cargo", *command, "--no-run", "--package=qdp-core", "--message-format=json"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout
    messages: list[dict[str, Any]] = [json.loads(line) for line in output.splitlines()]
    return {
        message["target"]["name"]: Path(message["executable"])
        for message in messages
        if message.get("executable") and kinds & set(message["target"]["kind"])
    }


def copy_binaries(binaries: dict[str, Path], folder: Path) -> None:
    """Copy programs without their symbols."""
    folder.mkdir()
    for name, path in binaries.items():
        subprocess.run(["strip", "-o", folder / name, path], check=True)


def copy_tree(name: str) -> None:
    """Copy a folder of the repository less what running it left there."""
    ignore = shutil.ignore_patterns("__pycache__", ".*", "results")
    shutil.copytree(ROOT / name, BUNDLE / name, ignore=ignore)


def refuse_without_kernels() -> None:
    """Fail where the wheel is a CPU-only one: on a GPU machine nothing in the bundle would run."""
    (wheel,) = (BUNDLE / "wheels").glob("*.whl")
    with tempfile.TemporaryDirectory() as site, zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
        code = "import qdp; print(qdp.device_info()['kernels'])"
        kernels = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONPATH": site},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
        ).stdout.strip()
    if kernels == "None":
        sys.exit("the wheel has no kernels: build the bundle without QDP_SKIP_KERNELS")
    print(f"kernels for {kernels}")


def main() -> None:
    """Build and pack everything, and fail if it is too large."""
    shutil.rmtree(BUNDLE, ignore_errors=True)
    BUNDLE.mkdir()
    maturin = Path(sys.executable).parent / "maturin"
    subprocess.run(
        [maturin, "build", "--release", "--out", BUNDLE / "wheels"], cwd=ROOT, check=True
    )
    refuse_without_kernels()
    test = ["test", "--release", *sys.argv[1:]]
    faults = ["--features=fault-injection", "--test=gpu_faults"]
    tests = cargo_binaries(test, {"lib", "test"}) | cargo_binaries([*test, *faults], {"test"})
    copy_binaries(
        {name: path for name, path in tests.items() if name not in CPU_TESTS},
        BUNDLE / "rust-tests",
    )
    copy_binaries(cargo_binaries(["bench"], {"bench"}), BUNDLE / "rust-benches")
    copy_tree("tests/python")
    copy_tree("benches")
    copy_tree("examples")  # tests/python runs them
    shutil.copy(ROOT / "pyproject.toml", BUNDLE)  # pytest's settings
    shutil.copy(ROOT / "scripts/gpu_run.sh", BUNDLE / "run.sh")

    files = sorted(path for path in BUNDLE.rglob("*") if path.is_file())
    size = sum(path.stat().st_size for path in files)
    print(f"{BUNDLE.name}: {len(files)} files, {size / 2**20:.1f} MiB")
    if size > LIMIT:
        largest = sorted(files, key=lambda path: path.stat().st_size, reverse=True)[:5]
        sys.exit(f"larger than {LIMIT / 2**20:.0f} MiB; the largest: {largest}")


if __name__ == "__main__":
    main()
