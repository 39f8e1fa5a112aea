"""What a run says about its machine."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import qdp
import torch

PACKAGES = ("numpy", "torch", "qumat-qdp", "pennylane", "cupy-cuda13x")


def describe(device: str, threads: int) -> dict[str, Any]:
    """Date, machine and versions, for the record."""
    versions = {"qdp": qdp.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    machine: dict[str, Any] = {"name": cpu_name(), "threads": threads}
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        machine |= {
            "name": properties.name,
            "host_cpu": cpu_name(),
            "memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "driver": nvidia_driver(),
            "torch_cuda": torch.version.cuda,
        }
    slug = re.sub(r"[^a-z0-9]+", "-", machine["name"].lower()).strip("-")
    machine["slug"] = slug if device != "cpu" else f"cpu-{slug}-{threads}t"
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": machine,
        "qdp": qdp.device_info(),
        "versions": versions,
    }


def headline(record: dict[str, Any]) -> str:
    """Machine and versions in two lines."""
    machine = record["device"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return f"{machine['name']}, {machine['threads']} threads for QDP and torch\n{versions}"


def cpu_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    match = re.search(r"model name\s*:\s*(.+)", text)
    return match[1].strip() if match else platform.machine()


def nvidia_driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(query, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.splitlines()[0].strip()
