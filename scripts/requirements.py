"""Print the requirements of one of pyproject.toml's extras, or of the build, one a line.

``pip install '.[demo]'`` would build the package too; the Makefile installs what the build needs
before it builds, and builds in place.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def requirements(name: str) -> list[str]:
    """Requirements of the extra ``name``, or of the build for ``"build-system"``."""
    config = tomllib.loads((ROOT / "pyproject.toml").read_text())
    if name == "build-system":
        return list(config["build-system"]["requires"])
    project = config["project"]
    extras: dict[str, list[str]] = project["optional-dependencies"]

    def expand(extra: str) -> list[str]:
        found: list[str] = []
        for requirement in extras[extra]:
            own = re.fullmatch(rf"{project['name']}\[([\w, -]+)\]", requirement)
            inner = [name.strip() for name in own[1].split(",")] if own else []
            found += [r for name in inner for r in expand(name)] if own else [requirement]
        return found

    return [*project["dependencies"], *dict.fromkeys(expand(name))]


if __name__ == "__main__":
    print("\n".join(r for name in sys.argv[1:] for r in requirements(name)))
