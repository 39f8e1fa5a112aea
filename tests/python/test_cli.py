"""The ``qdp`` command: every format, every kind of error, nothing half-written."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest
import qdp
from qdp import _io, cli
from qdp._io import StateWriter, open_source

pytest.importorskip("rich", reason="the command line needs the extra cli")
pa = pytest.importorskip("pyarrow", reason="tables need the extra cli")
arrow_csv = pytest.importorskip("pyarrow.csv")
feather = pytest.importorskip("pyarrow.feather")
parquet = pytest.importorskip("pyarrow.parquet")


Array: TypeAlias = npt.NDArray[Any]
Table: TypeAlias = Callable[[Array], Any]

RNG = np.random.default_rng(7)
SAMPLES = RNG.normal(size=(101, 8))
NAMES = [f"x{k}" for k in range(8)]


def columns_table(x: Array) -> Any:
    return pa.table({name: x[:, k] for k, name in enumerate(NAMES[: x.shape[1]])})


def fixed_list_table(x: Array) -> Any:
    values = pa.array(np.ascontiguousarray(x).reshape(-1))
    return pa.table({"x": pa.FixedSizeListArray.from_arrays(values, x.shape[1])})


def list_table(x: Array) -> Any:
    return pa.table({"x": pa.array(list(x))})


def write(path: Path, x: Array, table: Table = columns_table, row_group: int = 17) -> Path:
    """Write samples in the format that the suffix names, in several groups of rows."""
    if path.suffix == ".npy":
        np.save(path, x)
    elif path.suffix == ".parquet":
        parquet.write_table(table(x), path, row_group_size=row_group)
    elif path.suffix == ".feather":
        feather.write_feather(table(x), path, chunksize=row_group)
    elif path.suffix == ".csv":
        arrow_csv.write_csv(table(x), path)
    else:
        opener = pa.ipc.new_stream if path.suffix == ".arrows" else pa.ipc.new_file
        data = table(x)
        with opener(path, data.schema) as writer:
            writer.write_table(data, max_chunksize=row_group)
    return path


def encode(
    source: Path, output: Path, *options: object, n: int = 3, encoding: str = "amplitude"
) -> int:
    arguments = [source, "-n", n, "-e", encoding, "-o", output, "--device", "cpu", *options]
    return cli.main(["encode", *map(str, arguments)])


def expected(x: npt.ArrayLike, n: int = 3, encoding: str = "amplitude", **options: Any) -> Array:
    return qdp.Engine("cpu").encode(x, n, encoding, **options).numpy()


def assert_one_line(capsys: pytest.CaptureFixture[str], *parts: str) -> None:
    captured = capsys.readouterr()
    assert captured.err.startswith("qdp: error: ")
    assert captured.err.count("\n") == 1, captured.err
    for part in parts:
        assert part in captured.err


@pytest.mark.parametrize("batch_size", [None, 1, 10, 101, 1000])
@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".arrow", ".arrows", ".feather", ".csv"])
def test_every_format(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str, batch_size: int | None
) -> None:
    source = write(tmp_path / f"in{suffix}", SAMPLES)
    output = tmp_path / "out.npy"
    options = [] if batch_size is None else ["--batch-size", batch_size]
    assert encode(source, output, *options) == 0
    states = np.load(output, mmap_mode="r")
    assert states.dtype == np.complex128
    np.testing.assert_allclose(states, expected(SAMPLES), atol=1e-15)
    assert "(101, 8) complex128" in capsys.readouterr().out
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([source.name, "out.npy"])


@pytest.mark.parametrize("table", [fixed_list_table, list_table])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".arrows"])
def test_list_columns(tmp_path: Path, suffix: str, table: Table) -> None:
    source = write(tmp_path / f"in{suffix}", SAMPLES, table)
    assert encode(source, tmp_path / "out.npy", "--batch-size", 10) == 0
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected(SAMPLES), atol=1e-15)


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f4", ">f8", "i4", "i8", "u1", "c8", "c16"])
def test_npy_dtypes_follow_the_library(tmp_path: Path, dtype: str) -> None:
    x = np.ceil(np.abs(SAMPLES) * 10).astype(dtype)
    np.save(tmp_path / "in.npy", x)
    assert encode(tmp_path / "in.npy", tmp_path / "out.npy", "--batch-size", 30) == 0
    states = np.load(tmp_path / "out.npy")
    reference = expected(x.astype(x.dtype.newbyteorder("=")))
    assert states.dtype == reference.dtype
    np.testing.assert_allclose(states, reference, atol=1e-6)


def test_npy_fortran_order_and_one_sample(tmp_path: Path) -> None:
    np.save(tmp_path / "f.npy", np.asfortranarray(SAMPLES))
    assert encode(tmp_path / "f.npy", tmp_path / "out.npy", "--batch-size", 9) == 0
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected(SAMPLES), atol=1e-15)
    np.save(tmp_path / "one.npy", SAMPLES[0])
    assert encode(tmp_path / "one.npy", tmp_path / "one-out.npy") == 0
    assert np.load(tmp_path / "one-out.npy").shape == (1, 8)


def test_options_reach_the_engine(tmp_path: Path) -> None:
    x = SAMPLES[:, :3]
    np.save(tmp_path / "in.npy", x)
    output = tmp_path / "out.npy"
    options = ["--reps", 1, "--entanglement", "linear", "--convention", "qiskit"]
    assert encode(tmp_path / "in.npy", output, *options, encoding="zz") == 0
    reference = expected(x, encoding="zz", reps=1, entanglement="linear", convention="qiskit")
    np.testing.assert_allclose(np.load(output), reference, atol=1e-14)
    options = ["--force", "--entanglement", "0-2,1-2", "--precision", "complex64"]
    assert encode(tmp_path / "in.npy", output, *options, encoding="zz") == 0
    assert np.load(output).dtype == np.complex64
    reference = expected(x, encoding="zz", entanglement=[[0, 2], [1, 2]])
    np.testing.assert_allclose(np.load(output), reference, atol=1e-5)
    assert encode(tmp_path / "in.npy", output, "--force", "--rotation", "x", encoding="angle") == 0
    reference = expected(x, encoding="angle", rotation="x")
    np.testing.assert_allclose(np.load(output), reference, atol=1e-14)


@pytest.mark.parametrize("header", [True, False])
def test_csv_header_is_detected(tmp_path: Path, header: bool) -> None:
    np.savetxt(
        tmp_path / "in.csv",
        SAMPLES,
        delimiter=",",
        header=",".join(NAMES) if header else "",
        comments="",
    )
    assert encode(tmp_path / "in.csv", tmp_path / "out.npy") == 0
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected(SAMPLES), atol=1e-15)


def test_csv_header_can_be_told(tmp_path: Path) -> None:
    (tmp_path / "in.csv").write_text("1,2\n3,4\n")
    assert encode(tmp_path / "in.csv", tmp_path / "out.npy", "--header", n=1) == 0
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected([[3.0, 4.0]], n=1))


def test_csv_text_columns_are_no_features(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.csv").write_text('name,a,b\n"x, y",3,4\nz,0.6,0.8')
    assert encode(tmp_path / "in.csv", tmp_path / "out.npy", n=1) == 0
    assert capsys.readouterr().err == "qdp: not numeric, left out: name\n"
    reference = expected([[3.0, 4.0], [0.6, 0.8]], n=1)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), reference, atol=1e-15)


def test_csv_integers_first_and_fractions_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_io, "CSV_BLOCK_BYTES", 64)
    x = np.array([[1.0, 2.0]] * 100 + [[0.5, 0.25]])
    lines = "".join(f"{a:g},{b:g}\n" for a, b in x)
    (tmp_path / "in.csv").write_text("a,b\n" + lines)
    assert encode(tmp_path / "in.csv", tmp_path / "out.npy", n=1) == 0
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected(x, n=1), atol=1e-15)


def test_csv_line_longer_than_the_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_io, "CSV_BLOCK_BYTES", 64)
    x = RNG.normal(size=(5, 512))
    np.savetxt(tmp_path / "in.csv", x, delimiter=",")
    assert encode(tmp_path / "in.csv", tmp_path / "out.npy", n=9) == 0
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), expected(x, n=9), atol=1e-15)


def test_columns_are_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.parquet", SAMPLES)
    assert encode(source, tmp_path / "out.npy", "--columns", "x5,x1", n=1) == 0
    reference = expected(SAMPLES[:, [5, 1]], n=1)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), reference, atol=1e-15)
    assert encode(source, tmp_path / "no.npy", "--columns", "x5,y") == 1
    assert_one_line(capsys, "one column named 'y'")


ZERO = np.where(np.arange(101)[:, None] == 57, 0.0, SAMPLES)
NAN = np.where(np.arange(101)[:, None] == 57, np.nan, SAMPLES)


@pytest.mark.parametrize(("bad", "reason"), [(ZERO, "zero norm"), (NAN, "NaN")])
@pytest.mark.parametrize("batch_size", [10, 1000])
@pytest.mark.parametrize("suffix", [".npy", ".parquet", ".arrows", ".csv"])
def test_errors_name_the_sample_in_the_file(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    suffix: str,
    batch_size: int | None,
    bad: Array,
    reason: str,
) -> None:
    source = write(tmp_path / f"in{suffix}", bad)
    if suffix == ".csv" and reason == "NaN":
        reason = "no value"  # Arrow reads "nan" in a CSV file as a missing value
    assert encode(source, tmp_path / "out.npy", "--batch-size", batch_size) == 1
    assert_one_line(capsys, str(source), "sample 57", reason)
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_a_missing_value_names_its_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "in.csv").write_text("a,b\n1,2\n3,\n")
    assert encode(tmp_path / "in.csv", tmp_path / "out.npy", n=1) == 1
    assert_one_line(capsys, "column 'b' has no value for sample 1")
    table = pa.table({"x": [[1.0, 2.0], [3.0, 4.0], [5.0, None]]})
    parquet.write_table(table, tmp_path / "in.parquet", row_group_size=1)
    assert encode(tmp_path / "in.parquet", tmp_path / "out.npy", n=1) == 1
    assert_one_line(capsys, "column 'x' lacks a value in sample 2")


@pytest.mark.parametrize("row_group", [1, 3])
def test_ragged_lists_name_the_sample(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row_group: int
) -> None:
    table = pa.table({"x": [[1.0, 2.0], [3.0, 4.0], [5.0]]})
    parquet.write_table(table, tmp_path / "in.parquet", row_group_size=row_group)
    assert encode(tmp_path / "in.parquet", tmp_path / "out.npy", n=1) == 1
    assert_one_line(capsys, "sample 2 has 1 values, those before it have 2")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("in.txt", b"1,2", "expected a .npy"),
        ("in.npy", b"not numpy", "in.npy"),
        ("in.npy", b"", "No data left"),
        ("in.parquet", b"not parquet", "in.parquet"),
        ("in.arrow", b"not arrow at all", "in.arrow"),
        ("in.csv", b"", "empty"),
        ("in.csv", b"a,b\n", "no numeric column among a, b"),
        ("in.csv", b"a,b\nx,y\n", "no numeric column among a, b"),
        ("in.csv", b"a,b\n1,2\n3,4,5\n", "in.csv"),
    ],
)
def test_unusable_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: bytes, reason: str
) -> None:
    (tmp_path / name).write_bytes(content)
    assert encode(tmp_path / name, tmp_path / "out.npy") == 1
    assert_one_line(capsys, reason)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("array", [np.zeros((2, 2, 2)), np.array(["a"]), np.zeros((0, 4))])
def test_unusable_arrays(tmp_path: Path, capsys: pytest.CaptureFixture[str], array: Array) -> None:
    np.save(tmp_path / "in.npy", array)
    assert encode(tmp_path / "in.npy", tmp_path / "out.npy") == 1
    assert_one_line(capsys, "in.npy")


def test_mixed_columns_ask_for_a_choice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parquet.write_table(pa.table({"id": [1], "x": [[1.0, 2.0]]}), tmp_path / "in.parquet")
    assert encode(tmp_path / "in.parquet", tmp_path / "out.npy", n=1) == 1
    assert_one_line(capsys, "--columns")
    assert encode(tmp_path / "in.parquet", tmp_path / "out.npy", "--columns", "x", n=1) == 0


def test_missing_file_and_library_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert encode(tmp_path / "none.npy", tmp_path / "out.npy") == 1
    assert_one_line(capsys, "none.npy")
    source = write(tmp_path / "in.npy", SAMPLES)
    assert encode(source, tmp_path / "out.npy", n=2) == 1
    assert_one_line(capsys, "amplitude encoding of 2 qubit(s)")
    assert cli.main(["encode", str(source), "-n", "3", "-o", "x.npy", "--device", "cuda:99"]) == 1
    assert_one_line(capsys, "cuda:99")


def test_usage_errors() -> None:
    for arguments in (["encode"], ["encode", "a.npy", "-n", "1", "-o", "b.npy", "-e", "none"], []):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2


def test_output_is_not_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.npy", SAMPLES)
    output = tmp_path / "out.npy"
    output.write_bytes(b"precious")
    assert encode(source, output) == 1
    assert_one_line(capsys, "--force")
    assert output.read_bytes() == b"precious"
    assert encode(source, output, "--force") == 0
    assert np.load(output).shape == (101, 8)


def test_a_failed_overwrite_leaves_the_old_file(tmp_path: Path) -> None:
    output = tmp_path / "out.npy"
    output.write_bytes(b"precious")
    assert encode(write(tmp_path / "in.npy", ZERO), output, "--force", "--batch-size", 10) == 1
    assert output.read_bytes() == b"precious"
    assert not list(tmp_path.glob("*.partial"))


def test_output_path_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write(tmp_path / "in.npy", SAMPLES)
    assert encode(source, tmp_path / "out.bin") == 1
    assert_one_line(capsys, "must be a .npy file")
    assert encode(source, tmp_path / "none" / "out.npy") == 1
    assert_one_line(capsys, "not a directory")


def test_disk_space_is_checked_before_writing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10_000))
    source = write(tmp_path / "in.csv", SAMPLES)
    assert encode(source, tmp_path / "out.npy", "--batch-size", 1) == 1
    assert_one_line(capsys, "needs 12.9 kB, but 10.0 kB are free")
    assert [path.name for path in tmp_path.iterdir()] == ["in.csv"]


def test_a_full_disk_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(StateWriter):
        def write(self, states: Array) -> None:
            super().write(states)
            if self.rows > 50:
                raise OSError(28, "No space left on device")

    monkeypatch.setattr(cli, "StateWriter", Full)
    source = write(tmp_path / "in.npy", SAMPLES)
    assert encode(source, tmp_path / "out.npy", "--batch-size", 10) == 1
    assert_one_line(capsys, "No space left on device")
    assert [path.name for path in tmp_path.iterdir()] == ["in.npy"]


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    source = write(tmp_path / "samples.csv", SAMPLES)
    script = (
        "import os, signal, sys; from qdp import cli\n"
        # Whoever runs the tests in the background has it ignored, and children inherit that.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "class Interrupted(cli.StateWriter):\n"
        "    def write(self, states):\n"
        "        super().write(states)\n"
        "        assert self.partial.exists()\n"
        "        if self.rows > 50: os.kill(os.getpid(), 2)\n"
        "cli.StateWriter = Interrupted\n"
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    arguments = ["encode", source, "-n", "3", "-o", tmp_path / "out.npy", "--batch-size", "10"]
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments), "--device", "cpu"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 130
    assert result.stderr.strip().endswith("qdp: interrupted")
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_memory_stays_constant(tmp_path: Path) -> None:
    """A child encodes a file to an output several times larger than what its memory may grow."""
    rows, n, megabyte = 16_384, 10, 2**20
    samples = tmp_path / "in.npy"
    array = np.lib.format.open_memmap(samples, "w+", np.float64, (rows, 1 << n))
    array[:] = 1.0
    array.flush()
    script = (
        "import resource, sys; from qdp import cli\n"
        "def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "run = lambda source, output: cli.main(['encode', source, '-n', '10', '-o', output,"
        " '--batch-size', '256', '--device', 'cpu'])\n"
        "assert run(sys.argv[1], sys.argv[3]) == 0\n"
        "warm = peak()\n"
        "assert run(sys.argv[2], sys.argv[4]) == 0\n"
        "print(peak() - warm)"
    )
    warm_up = tmp_path / "small.npy"
    np.save(warm_up, np.ones((1024, 1 << n)))
    output = tmp_path / "out.npy"
    paths = [warm_up, samples, tmp_path / "small-out.npy", output]
    result = subprocess.run(
        [sys.executable, "-c", script, *map(str, paths)],
        capture_output=True,
        text=True,
        check=True,
    )
    growth = int(result.stdout.splitlines()[-1]) * 1024
    assert output.stat().st_size > 256 * megabyte
    assert growth < 32 * megabyte
    assert np.load(output, mmap_mode="r").shape == (rows, 1 << n)
    output.unlink()
    samples.unlink()


@pytest.mark.parametrize("expected_rows", [None, 1, 10**12])
def test_header_grows_in_place(
    tmp_path: Path, expected_rows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2**60))
    path = tmp_path / "out.npy"
    states = RNG.normal(size=(1003, 2)) + 0j
    with StateWriter(path, expected_rows) as writer:
        for start in range(0, 1003, 100):
            writer.write(states[start : start + 100])
            assert not path.exists()
        assert writer.nbytes == states.nbytes
    np.testing.assert_array_equal(np.load(path), states)
    # The header must have room for more rows than these.
    header = path.read_bytes()[: path.stat().st_size - states.nbytes]
    assert len(header) % 64 == 0
    assert header.rstrip(b"\n").endswith(b" " * 16)


def test_writer_refuses_another_shape(tmp_path: Path) -> None:
    with StateWriter(tmp_path / "out.npy", 2) as writer:
        writer.write(np.zeros((1, 2), complex))
        for other in (np.zeros((1, 4), complex), np.zeros((1, 2), np.complex64)):
            with pytest.raises(ValueError, match="after"):
                writer.write(other)
    assert np.load(tmp_path / "out.npy").shape == (1, 2)


def test_row_counts(tmp_path: Path) -> None:
    for suffix in (".npy", ".parquet", ".arrow", ".feather", ".csv"):
        assert open_source(write(tmp_path / f"in{suffix}", SAMPLES)).rows == 101
    assert open_source(write(tmp_path / "in.arrows", SAMPLES)).rows is None


def test_missing_extra_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.parquet", SAMPLES)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    assert encode(source, tmp_path / "out.npy") == 1
    assert_one_line(capsys, 'pyarrow is not installed: pip install "qdp[cli]"')
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    assert encode(write(tmp_path / "in.npy", SAMPLES), tmp_path / "out.npy") == 1
    assert_one_line(capsys, 'rich is not installed: pip install "qdp[cli]"')
    assert not (tmp_path / "out.npy").exists()


def test_info(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    info = json.loads(capsys.readouterr().out)
    assert info["version"] == qdp.__version__
    assert info["cpu_threads"] >= 1
    assert info["packages"]["numpy"] == np.__version__
    assert (info["cuda_unavailable"] is None) == ("CUDA" not in info["missing"])
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert np.__version__ in text
    assert f"{info['cpu_threads']} threads" in text


def test_info_says_how_to_get_what_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = {
        "version": "1.2.3",
        "kernels": "sm_90",
        "driver": "13.0",
        "devices": [
            {
                "name": "NVIDIA H200",
                "ordinal": 0,
                "compute_capability": "9.0",
                "memory_bytes": 140 * 2**30,
            }
        ],
        "cuda_unavailable": None,
        "cpu_threads": 16,
    }
    monkeypatch.setattr(qdp, "device_info", lambda: fake)
    monkeypatch.setattr(cli, "_version", lambda package: None if package == "torch" else "9.9")
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "NVIDIA H200, compute capability 9.0, 140.0 GiB" in text
    assert 'pip install "qdp[torch]"' in text
    assert "qdp[demo]" not in text
    monkeypatch.setitem(fake, "cuda_unavailable", "no NVIDIA driver is installed")
    assert cli.main(["info"]) == 0
    assert "no NVIDIA driver is installed" in capsys.readouterr().out


def test_module_runs_as_a_script(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "qdp.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == f"qdp {qdp.__version__}"
