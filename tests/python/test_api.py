"""The shape of the package: frozen classes, honest stubs, light imports, threads."""

from __future__ import annotations

import ast
import inspect
import os
import pickle
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import qdp
import qdp.exceptions
import reference
from cases import PLAIN_CASES
from qdp import _qdp

STUB = ast.parse(Path(_qdp.__file__).with_name("_qdp.pyi").read_text())
CLASSES = (
    qdp.Engine,
    qdp.Plan,
    qdp.StateBatch,
    qdp.PipelineConfig,
    qdp.Pinned,
    qdp.Coalescer,
    qdp.CoalesceHandle,
    qdp.Graph,
    qdp.Replay,
    qdp.GraphInput,
)
ERRORS = tuple(getattr(qdp.exceptions, name) for name in qdp.exceptions.__all__)

BUILTINS = {
    "InvalidArgumentError": ValueError,
    "ShapeError": ValueError,
    "FeatureCountError": ValueError,
    "DTypeError": TypeError,
    "InvalidDataError": ValueError,
    "ZeroNormError": qdp.InvalidDataError,
    "NormOverflowError": qdp.InvalidDataError,
    "NonFiniteError": qdp.InvalidDataError,
    "BasisValueError": qdp.InvalidDataError,
    "DeviceMismatchError": ValueError,
    "DeviceUnavailableError": RuntimeError,
    "OutOfMemoryError": MemoryError,
    "CaptureError": RuntimeError,
    "DriverError": RuntimeError,
    "QueueFullError": RuntimeError,
    "DeadlineExceededError": TimeoutError,
    "BatcherClosedError": RuntimeError,
    "QdpError": Exception,
}


def run_python(code: str, **environment: str) -> str:
    """What a fresh interpreter prints; it must end well."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def instance(cls: type) -> Any:
    engine = qdp.Engine("cpu")
    if cls is qdp.Engine:
        return engine
    if cls is qdp.Plan:
        return engine.plan(2, "angle")
    graph = engine.capture(2, "angle", 1, constants={"one": np.ones(1)})
    if cls is qdp.Graph:
        return graph
    if cls in (qdp.Replay, qdp.GraphInput):
        replay = graph.replay([1.0, 2.0])
        return replay if cls is qdp.Replay else replay.inputs["one"]
    return engine.encode([1.0, 2.0], 1)


class TestClasses:
    @pytest.mark.parametrize("cls", CLASSES)
    def test_frozen(self, cls: type) -> None:
        value = instance(cls)
        public = [name for name in dir(cls) if not name.startswith("_")]
        assert public
        for name in (*public, "extra"):
            with pytest.raises(AttributeError):
                setattr(value, name, 1)

    @pytest.mark.parametrize("cls", CLASSES)
    def test_final(self, cls: type) -> None:
        with pytest.raises(TypeError):
            type("Sub", (cls,), {})

    @pytest.mark.parametrize("cls", [qdp.Plan, qdp.StateBatch, qdp.Graph, qdp.Replay])
    def test_made_by_engines_only(self, cls: type) -> None:
        with pytest.raises(TypeError):
            cls()

    @pytest.mark.parametrize("cls", CLASSES)
    def test_module_name_and_docs(self, cls: type) -> None:
        assert cls.__module__.startswith("qdp")
        assert cls.__doc__
        for name, member in inspect.getmembers(cls):
            if not name.startswith("_"):
                assert member.__doc__, f"{cls.__name__}.{name} has no docstring"


class TestStub:
    def test_covers_the_module(self) -> None:
        stubbed = {
            node.name for node in STUB.body if isinstance(node, ast.ClassDef | ast.FunctionDef)
        }
        aliases = {
            target.id: node.value.id
            for node in STUB.body
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Name)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        native = {name for name in dir(_qdp) if not name.startswith("_")}
        assert native == stubbed | set(aliases)
        for alias, name in aliases.items():
            of_alias, of_name = (inspect.signature(getattr(_qdp, n)) for n in (alias, name))
            assert of_alias == of_name

    @pytest.mark.parametrize("cls", CLASSES)
    def test_covers_the_class(self, cls: type) -> None:
        node = next(n for n in STUB.body if isinstance(n, ast.ClassDef) and n.name == cls.__name__)
        methods = {f.name: f for f in node.body if isinstance(f, ast.FunctionDef)}
        public = {name for name in dir(cls) if not name.startswith("_")}
        assert public == {name for name in methods if not name.startswith("_")}
        for name, method in methods.items():
            assert hasattr(cls, name)
            if method.decorator_list or name.startswith("__"):
                continue
            parameters = list(inspect.signature(getattr(cls, name)).parameters)
            args = method.args
            named = (*args.posonlyargs, *args.args, *args.kwonlyargs)
            others = [args.kwarg] if args.kwarg else []
            assert parameters == [a.arg for a in (*named, *others)]

    def test_package_exports(self) -> None:
        assert sorted(qdp.__all__, key=str.casefold) == sorted(set(qdp.__all__), key=str.casefold)
        for name in qdp.__all__:
            assert hasattr(qdp, name)
        assert set(qdp.exceptions.__all__) <= set(qdp.__all__)
        assert qdp.__version__.count(".") >= 2


class TestExceptions:
    def test_hierarchy(self) -> None:
        assert {cls.__name__ for cls in ERRORS} == set(BUILTINS)
        for cls in ERRORS:
            assert issubclass(cls, qdp.QdpError)
            assert issubclass(cls, BUILTINS[cls.__name__])
            assert cls.__doc__

    def test_exceptions_travel(self) -> None:
        """A worker process sends its exception home with its attributes."""
        with pytest.raises(qdp.NonFiniteError) as caught:
            qdp.Engine("cpu").encode([[1.0, 2.0], [1.0, np.nan]], 1)
        copy = pickle.loads(pickle.dumps(caught.value))
        assert type(copy) is qdp.NonFiniteError
        assert (copy.sample, copy.position) == (1, 1)
        assert str(copy) == str(caught.value)


class TestImport:
    def test_light(self) -> None:
        loaded = run_python(
            "import sys, qdp\n"
            "heavy = {'torch', 'pyarrow', 'rich', 'sklearn', 'matplotlib'}\n"
            "print(*heavy & set(sys.modules))\n"
            "print([l for l in open('/proc/self/maps') if 'libcuda' in l or 'libnv' in l])"
        )
        assert loaded.split() == ["[]"]

    def test_no_device_is_needed(self) -> None:
        code = "import qdp; print(qdp.Engine().encode([3.0, 4.0], 1).numpy(), qdp.Engine().device)"
        assert run_python(code, CUDA_VISIBLE_DEVICES="").split()[-1] == "cpu"

    def test_exit_with_live_objects(self) -> None:
        printed = run_python(
            "import qdp, numpy as np\n"
            "engine = qdp.Engine()\n"
            "state = engine.encode(np.ones((4, 8)), 3)\n"
            "view, capsule, plan = state[1:], state.__dlpack__(), engine.plan(3)\n"
            "qdp.cycle = [state, capsule, view]; qdp.cycle.append(qdp.cycle)\n"
            "print(len(state), len(view), plan.num_qubits)\n"
        )
        assert printed.split() == ["4", "3", "3"]

    def test_device_info(self) -> None:
        info = qdp.device_info()
        assert info["version"] == qdp.__version__
        assert isinstance(info["devices"], list)


class TestFork:
    def test_a_child_encodes(self) -> None:
        script = (
            "import os, signal, numpy as np, qdp\n"
            "x = np.ones((64, 2**14))\n"
            "want = qdp.Engine('cpu').encode(x, 14).numpy()\n"
            "child = os.fork()\n"
            "if child == 0:\n"
            "    signal.alarm(60)  # a hang ends the child\n"
            "    same = (qdp.Engine('cpu').encode(x, 14).numpy() == want).all()\n"
            "    os._exit(0 if same else 1)\n"
            "assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0\n"
        )
        subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)


class TestThreads:
    def test_share_one_engine(self, engine: qdp.Engine) -> None:
        """Every thread gets the states of its own samples, whatever the others do."""

        def work(seed: int) -> None:
            for case in PLAIN_CASES:
                for n in (2, 6, 9):
                    x = np.roll(case.samples(n, batch=8), seed, axis=0)
                    states = engine.encode(x, n, case.encoding).numpy()
                    reference.assert_states(states, x, n, case.encoding)

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(8)))

    def test_one_plan(self, engine: qdp.Engine) -> None:
        plan = engine.plan(8, "zz")
        rng = np.random.default_rng(8)
        samples = [rng.uniform(-1, 1, size=(3, 8)) for _ in range(64)]
        with ThreadPoolExecutor(8) as pool:
            states = list(pool.map(lambda x: plan.encode(x).numpy(), samples))
        for x, state in zip(samples, states, strict=True):
            reference.assert_states(state, x, 8, "zz")

    def test_engines_open_and_close_everywhere(self, device: str) -> None:
        def work(_: int) -> float:
            state = qdp.Engine(device).encode(np.ones((2, 8)), 3)
            return float(np.abs(state.numpy()).sum())

        with ThreadPoolExecutor(8) as pool:
            np.testing.assert_allclose(list(pool.map(work, range(32))), 2 * 8**0.5)

    def test_errors_stay_with_their_thread(self, engine: qdp.Engine) -> None:
        def work(k: int) -> None:
            x = np.ones((8, 4))
            if k % 2:
                x[k % 8, 3] = np.nan
                with pytest.raises(qdp.NonFiniteError) as caught:
                    engine.encode(x, 2)
                assert caught.value.sample == k % 8
            else:
                reference.assert_states(engine.encode(x, 2).numpy(), x, 2, "amplitude")

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(work, range(64)))

    def test_gil_is_released(self, engine: qdp.Engine) -> None:
        """With no forced switches, another thread runs only while encode lets go of the GIL."""
        x = np.random.default_rng(9).normal(size=(8, 2**20))
        engine.encode(x, 20)  # the plan and the buffers are there
        steps, stop = [0], threading.Event()

        def step() -> None:
            while not stop.wait(1e-4):
                steps[0] += 1

        thread = threading.Thread(target=step)
        interval = sys.getswitchinterval()
        thread.start()
        try:
            sys.setswitchinterval(1000)
            before = steps[0]
            for _ in range(5):
                state = engine.encode(x, 20)
            after = steps[0]
        finally:
            sys.setswitchinterval(interval)
            stop.set()
            thread.join()
        assert after > before
        assert state.shape == (8, 2**20)
