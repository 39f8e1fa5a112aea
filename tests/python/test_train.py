"""The training example: what it refuses to start."""

from __future__ import annotations

import sys

import pytest

pytest.importorskip("torch", exc_type=ImportError)
pytest.importorskip("sklearn", reason="needs the extra demo")

import train_digits


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--epochs 0", "--epochs: expected at least 1, got 0"),
        ("--batch -3", "--batch: expected at least 1, got -3"),
        ("--qubits 0", "--qubits: expected at least 1, got 0"),
        ("--batch 1258", "--batch: at most 1257, the images to train on"),
    ],
)
def test_nothing_to_train(
    arguments: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_digits.py", *arguments.split()])
    with pytest.raises(SystemExit) as stopped:
        train_digits.main()
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
