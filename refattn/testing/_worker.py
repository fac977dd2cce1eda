"""A process that calls somebody's function with a deadline, so that one that hangs or crashes is a verdict too."""

from __future__ import annotations

import atexit
import contextlib
import importlib
import importlib.util
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

from refattn.testing._calling import Ask, Told, call

START = 180.0
"""Seconds that a module may take to import."""


def resolve(name: str) -> Callable[..., Any]:
    """Return a function by "module:name" or "file.py:name".

    Raises
    ------
    ValueError
        Where nothing callable is there: one sentence, with what was given.

    Examples
    --------
    >>> resolve("math:sqrt")(4.0)
    2.0
    """
    module, colon, path = name.rpartition(":")
    if not colon or not module or not path:
        raise ValueError(f"fn is {name!r}; expected module:function or file.py:function")
    try:
        found: Any = _module(module)
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"fn is {name!r}; {module} cannot be imported: {why}") from None
    for part in path.split("."):
        if not hasattr(found, part):
            raise ValueError(f"fn is {name!r}; {module} has no {path}")
        found = getattr(found, part)
    if not callable(found):
        raise ValueError(f"fn is {name!r}, which is a {type(found).__name__}; expected a function")
    return found


def _module(name: str) -> ModuleType:
    if not name.endswith(".py"):
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        return importlib.import_module(name)
    path = Path(name).resolve()
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise FileNotFoundError(f"no such file: {name}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.parent))
    spec.loader.exec_module(module)
    return module


def name_of(function: Callable[..., Any]) -> str | None:
    """Return the name under which another process finds a function; None where there is none.

    >>> import math
    >>> name_of(math.sqrt), name_of(lambda x: x)
    ('math:sqrt', None)
    """
    module, path = getattr(function, "__module__", None), getattr(function, "__qualname__", None)
    if not module or not path or module == "__main__" or "<" in path:
        return None
    found: Any = sys.modules.get(module)
    for part in path.split("."):
        found = getattr(found, part, None)
    try:
        findable = found is function and importlib.util.find_spec(module) is not None
    except (ValueError, ImportError):
        return None
    return f"{module}:{path}" if findable else None


class Worker:
    """A process that answers one `Ask` after the other, and is started again where it dies.

    Parameters
    ----------
    function, vjp
        Functions, or their names. What has no name is forked, or called in this process where that is not safe.
    """

    def __init__(self, function: Callable[..., Any] | str, vjp: Callable[..., Any] | str | None = None) -> None:
        """Hold the functions; the process starts when it is asked."""
        self.function, self.vjp = function, vjp
        names = [f if f is None or isinstance(f, str) else name_of(f) for f in (function, vjp)]
        named = names[0] is not None and (vjp is None or names[1] is not None)
        self.names = (str(names[0]), names[1]) if named else None
        self.note = ""
        self.inside = False
        if not named:
            why = _no_fork()
            self.inside = bool(why)
            if why:
                self.note = f"{_shown(function)} was called in this process, {why}: a hang would have hung this too"
        self._process: _Process | None = None

    def __enter__(self) -> Worker:
        """Start the process, so that a wrong name is said before any work."""
        if not self.inside:
            self._start()
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._stop()

    def ask(self, ask: Ask, seconds: float) -> Told:
        """Return what a call did within so many seconds."""
        if self.inside:
            return call(self.function, self.vjp, ask)  # pyright: ignore[reportArgumentType]
        if self._process is None:
            self._start()
        assert self._process is not None
        self._process.send(ask)
        try:
            told = self._process.receive(seconds)
        except TimeoutError:
            self._stop()
            return Told(kind="hung", said=f"no answer within {seconds:g} s")
        except EOFError:
            why = self._process.why()
            self._stop()
            return Told(kind="crashed", said=why)
        assert isinstance(told, Told)
        return told

    def _start(self) -> None:
        self._process = _Spawned(*self.names) if self.names else _Forked(self.function, self.vjp)
        try:
            ready = self._process.receive(START)
        except (TimeoutError, EOFError) as error:
            why = self._process.why() if isinstance(error, EOFError) else f"not imported within {START:g} s"
            self._stop()
            raise ValueError(f"fn is {_shown(self.function)}; {why}") from None
        if isinstance(ready, str):
            self._stop()
            raise ValueError(ready)
        atexit.register(self._stop)

    def _stop(self) -> None:
        if self._process is not None:
            atexit.unregister(self._stop)
            self._process.kill()
            self._process = None


class _Process:
    """Pickles through two pipes; what comes is read by a thread, so that waiting has a deadline on every platform."""

    def __init__(self, reader: BinaryIO, writer: BinaryIO) -> None:
        self.writer = writer
        self.came: queue.Queue[Any] = queue.Queue()
        threading.Thread(target=self._read, args=(reader,), daemon=True).start()

    def _read(self, reader: BinaryIO) -> None:
        with contextlib.suppress(EOFError, OSError, pickle.UnpicklingError), reader:
            while True:
                self.came.put((pickle.load(reader),))
        self.came.put(None)

    def send(self, message: Any) -> None:
        with contextlib.suppress(OSError):  # it is gone, and receiving says so
            pickle.dump(message, self.writer)
            self.writer.flush()

    def receive(self, seconds: float) -> Any:
        try:
            came = self.came.get(timeout=seconds)
        except queue.Empty:
            raise TimeoutError from None
        if came is None:
            raise EOFError
        return came[0]

    def kill(self) -> None: ...

    def why(self) -> str:
        return "the process died"


class _Spawned(_Process):
    """A fresh interpreter that imports the functions by name."""

    def __init__(self, function: str, vjp: str | None) -> None:
        self.errors = tempfile.TemporaryFile()
        paths = [os.path.abspath(path) for path in sys.path]
        # -c: the module must not be run as __main__, where its pickles would not be found
        script = f"from refattn.testing._worker import serve_names; serve_names({function!r}, {vjp!r})"
        self.process = subprocess.Popen(
            [sys.executable, "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        super().__init__(self.process.stdout, self.process.stdin)  # pyright: ignore[reportArgumentType]

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(OSError):
            self.writer.close()
        self.errors.close()

    def why(self) -> str:
        code = self.process.wait()
        self.errors.seek(0)
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        last = f": {lines[-1][:200]}" if lines else ""
        return f"the process ended with {_signal(-code) if code < 0 else f'exit status {code}'}{last}"


class _Forked(_Process):
    """A copy of this process."""

    def __init__(self, function: Any, vjp: Any) -> None:
        asks, tells = os.pipe(), os.pipe()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of threads: the copy uses none of theirs
            self.pid = os.fork()
        if not self.pid:
            try:
                os.close(asks[1])
                os.close(tells[0])
                with os.fdopen(asks[0], "rb") as reader, os.fdopen(tells[1], "wb") as writer:
                    _alone()
                    serve(function, vjp, reader, writer)
            finally:
                os._exit(0)
        os.close(asks[0])
        os.close(tells[1])
        self.status: int | None = None
        super().__init__(os.fdopen(tells[0], "rb"), os.fdopen(asks[1], "wb"))

    def kill(self) -> None:
        if self.status is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            self.status = os.waitpid(self.pid, 0)[1]
        with contextlib.suppress(OSError):
            self.writer.close()

    def why(self) -> str:
        self.status = os.waitpid(self.pid, 0)[1]
        died = os.WIFSIGNALED(self.status)
        return f"the process ended with {_signal(os.WTERMSIG(self.status)) if died else 'an exit of its own'}"


def serve(function: Callable[..., Any], vjp: Callable[..., Any] | None, reader: BinaryIO, writer: BinaryIO) -> None:
    """Answer until the pipe ends."""
    pickle.dump(True, writer)
    writer.flush()
    with contextlib.suppress(EOFError):
        while True:
            told = call(function, vjp, pickle.load(reader))
            pickle.dump(told, writer)
            writer.flush()


def serve_names(function: str, vjp: str | None) -> None:
    """Serve functions by name on standard input and output; what they print goes to standard error."""
    writer = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        found = resolve(function), None if vjp is None else resolve(vjp)
    except ValueError as error:
        pickle.dump(str(error), writer)
        writer.flush()
        return
    serve(*found, sys.stdin.buffer, writer)


def _alone() -> None:
    """Leave the threads of libraries alone, of which a copy of a process has none."""
    torch: Any = sys.modules.get("torch")
    if torch is not None:
        torch.set_num_threads(1)


def _no_fork() -> str:
    """Return why this process is not copied; "" where it can be."""
    if not hasattr(os, "fork") or sys.platform == "darwin":
        return "as it has no name to import it by and this platform does not copy processes"
    torch: Any = sys.modules.get("torch")
    if "jax" in sys.modules or (torch is not None and torch.cuda.is_initialized()):
        return "as it has no name to import it by and its framework's threads cannot be copied"
    return ""


def _shown(function: Any) -> str:
    return repr(function) if isinstance(function, str) else getattr(function, "__qualname__", repr(function))


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
