"""Check the architecture's rules that no compiler checks; deny.toml checks those between crates."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Which files, what their code may not name, and the rule.
RULES = [
    (
        r"(?!qdp-core/src/cuda/)",
        r"\bcudarc\b",
        "only qdp-core/src/cuda talks to the driver",
    ),
    (
        r"(?!qdp-core/src/config\.rs|qdp-kernels/build\.rs)",
        r"\bdisallowed_methods\b",
        "only qdp-core/src/config.rs reads the environment",
    ),
    (
        r"qdp-core/src/(encoding|pipeline/ring|pipeline/plan|coalesce/queue|coalesce/batcher/protocol)\b",
        r"\bunsafe\b",
        "these modules are safe Rust",
    ),
    (
        r"(?!qdp-python/)",
        r"\bpyo3\b",
        "only qdp-python knows Python",
    ),
]


def code(line: str) -> str:
    """The line without a trailing comment."""
    return re.sub(r"//.*", "", line)


def violations() -> list[str]:
    """One message for each line that breaks a rule."""
    found = []
    sources = [p for crate in ROOT.glob("qdp-*") for p in crate.rglob("*.rs")]
    if not sources:
        return ["no Rust sources found"]
    for source in sorted(sources):
        path = source.relative_to(ROOT).as_posix()
        for number, line in enumerate(source.read_text().splitlines(), 1):
            found += [
                f"{path}:{number}: {rule}: {line.strip()}"
                for files, pattern, rule in RULES
                if re.match(files, path) and re.search(pattern, code(line))
            ]
    return found


if __name__ == "__main__":
    messages = violations()
    print("\n".join(messages) or "structure: ok")
    sys.exit(bool(messages))
