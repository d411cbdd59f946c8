"""Processes forked from one that has imported the package: a start takes milliseconds, not seconds.

    with Forks() as forks:
        done = forks.run(["-m", "lobs_native", "--version"])

A child has its own working directory, environment, arguments, standard streams and default signal
handlers, and its exit code is that of an interpreter. What a fresh interpreter decides while it
imports has been decided before: which modules are there, what libraries read from the environment,
and the memory that this takes. Tests of these need a fresh one.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import lobs_native

__all__ = ["Forks", "Process"]

MODULES = ("lobs_native.cli",)
LARGEST = 1 << 17  # bytes of a message: arguments and environment


# ---- the first process ---------------------------------------------------------------------------


def serve(channel: socket.socket) -> Callable[[], None] | None:
    """Fork a child for each request, and report its pid and later its exit code.

    Returns None when the other side has closed the channel, and in a child what it has to do.
    """
    alarm, alarm_in = os.pipe()
    os.set_blocking(alarm_in, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(alarm_in)
    gc.freeze()  # or a collection in a child copies the heap, for most of the child's life
    children = set[int]()
    with contextlib.suppress(ConnectionError):  # the other side has closed without listening
        while True:
            ready, _, _ = select.select([channel, alarm], [], [])
            if alarm in ready:
                os.read(alarm, 4096)
                while children:
                    pid, status = os.waitpid(-1, os.WNOHANG)
                    if not pid:
                        break
                    children.remove(pid)
                    channel.send(json.dumps([pid, os.waitstatus_to_exitcode(status)]).encode())
            if channel in ready:
                message, streams, _, _ = socket.recv_fds(channel, LARGEST, 3)
                if not message:
                    break
                request = json.loads(message)
                if "modules" in request:
                    for name in request["modules"]:
                        importlib.import_module(name)
                    gc.freeze()
                    channel.send(json.dumps([0, None]).encode())
                    continue
                pid = os.fork()
                if not pid:
                    channel.close()
                    signal.set_wakeup_fd(-1)
                    os.close(alarm)
                    os.close(alarm_in)
                    return become(request, streams)
                for stream in streams:
                    os.close(stream)
                children.add(pid)
                channel.send(json.dumps([pid, None]).encode())
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    return None


def become(request: dict[str, Any], streams: list[int]) -> Callable[[], None]:
    """Make this process as if Python had been started for the request, and return its task."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin = os.fdopen(0, closefd=False)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    first, *rest = request["arguments"]
    if first == "-c":
        code, *rest = rest
        sys.argv[:], top = ["-c", *rest], ""
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        task = lambda: exec(compile(code, "<string>", "exec"), vars(main))  # noqa: E731
    elif first == "-m":
        module, *rest = rest
        sys.argv[:], top = ["-m", *rest], os.getcwd()
        task = lambda: runpy.run_module(module, run_name="__main__", alter_sys=True)  # noqa: E731
    else:
        sys.argv[:], top = [first, *rest], str(Path(first).resolve().parent)
        task = lambda: runpy.run_path(first, run_name="__main__")  # noqa: E731
    sys.path.insert(0, top)
    return task


def end(task: Callable[[], None]) -> NoReturn:
    """Do the task and end as an interpreter does, but without its last part, which frees every
    object and takes half a second."""
    code = 0
    try:
        task()
    except SystemExit as stop:
        if isinstance(stop.code, str):
            print(stop.code, file=sys.stderr)
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
        if isinstance(error, KeyboardInterrupt):
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


# ---- the other side ------------------------------------------------------------------------------


class Process:
    """A child, with the methods of ``subprocess.Popen`` in text mode."""

    def __init__(
        self, forks: Forks, args: Sequence[str], pid: int, pipes: list[IO[str] | None]
    ) -> None:
        self.args, self.pid, self._forks = args, pid, forks
        self.stdin, self.stdout, self.stderr = pipes
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The exit code, or None while it is running."""
        if self.returncode is None:
            self._forks.receive(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end and return the exit code, -9 after SIGKILL."""
        limit = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            left = None if limit is None else limit - time.monotonic()
            if left is not None and left < 0:
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
            self._forks.receive(left)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """Read both outputs to their ends, and wait. They are None where they are not pipes."""
        limit = None if timeout is None else time.monotonic() + timeout

        def left() -> float | None:
            return None if limit is None else max(0.0, limit - time.monotonic())

        texts: dict[IO[str], str] = {}

        def read(pipe: IO[str]) -> None:
            texts[pipe] = pipe.read()

        pipes = [pipe for pipe in (self.stdout, self.stderr) if pipe]
        readers = [threading.Thread(target=read, args=[pipe], daemon=True) for pipe in pipes]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(left())
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(left())
        for pipe in pipes:
            pipe.close()
        out, errors = (texts.get(pipe) if pipe else None for pipe in (self.stdout, self.stderr))
        return out, errors

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it may have ended since
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End it by SIGKILL, unless it has ended."""
        self.send_signal(signal.SIGKILL)


class Forks:
    """Starts children; a context manager, and for one thread. Its end kills those that run."""

    def __init__(self) -> None:
        self.running: dict[int, Process] = {}

    def __enter__(self) -> Forks:
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths())},
                start_new_session=True,  # Ctrl-C is for the other side, which then closes
            )
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()
        self.process.wait()

    def preload(self, *modules: str) -> None:
        """Import modules into the first process, so that no child has to."""
        self.request([], modules=modules)

    def start(
        self,
        arguments: Sequence[str],
        *,
        cwd: str | Path | None = None,
        env: Mapping[str, str] | None = None,
        stdin: int | None = None,
        stdout: int | None = None,
        stderr: int | None = None,
    ) -> Process:
        """Start ``python arguments...``: "-m" and a module, "-c" and code, or a script.

        A stream is a file descriptor, a constant of ``subprocess``, or None for this process's own.
        """
        pipes: list[IO[str] | None] = [None, None, None]
        with contextlib.ExitStack() as stack:
            theirs: list[int] = []
            for number, stream in enumerate((stdin, stdout, stderr)):
                if stream == subprocess.PIPE:
                    read, write = os.pipe()
                    mine, stream = (write, read) if number == 0 else (read, write)
                    pipes[number] = os.fdopen(mine, "r" if number else "w")
                    stack.callback(os.close, stream)
                elif stream == subprocess.DEVNULL:
                    stream = os.open(os.devnull, os.O_RDWR)
                    stack.callback(os.close, stream)
                elif stream == subprocess.STDOUT:
                    stream = theirs[1]
                theirs.append(number if stream is None else stream)
            pid = self.request(
                theirs,
                arguments=[str(argument) for argument in arguments],
                folder=os.path.abspath(cwd or os.getcwd()),
                environment=dict(os.environ if env is None else env),
            )
        self.running[pid] = process = Process(self, arguments, pid, pipes)
        return process

    def run(
        self,
        arguments: Sequence[str],
        *,
        timeout: float | None = 120,
        check: bool = False,
        stdout: int | None = subprocess.PIPE,
        stderr: int | None = subprocess.PIPE,
        **options: Any,
    ) -> subprocess.CompletedProcess[str]:
        """Start it as ``start`` does, wait for its end, and return what it wrote."""
        process = self.start(arguments, stdout=stdout, stderr=stderr, **options)
        try:
            out, errors = process.communicate(timeout)
        except BaseException:
            process.kill()
            raise
        done = subprocess.CompletedProcess(process.args, process.wait(), out, errors)
        if check:
            done.check_returncode()
        return done

    def request(self, streams: list[int], **what: Any) -> int:
        """Send a request, and return the number that the answer holds."""
        socket.send_fds(self.channel, [json.dumps(what).encode()], streams)
        self.answer: int | None = None
        while self.answer is None:
            self.receive()
        return self.answer

    def receive(self, timeout: float | None = None) -> None:
        """Take the messages that are there, or wait for the first one."""
        while select.select([self.channel], [], [], timeout)[0]:
            message = self.channel.recv(LARGEST)
            if not message:
                raise RuntimeError(f"the process that forks ended with {self.process.wait()}")
            pid, code = json.loads(message)
            if code is None:  # an answer; the end of that child may follow, once it is known
                self.answer = pid
                return
            self.running.pop(pid).returncode = code
            timeout = 0


def paths() -> list[str]:
    """Where a child finds the package and the folders of benches and tests, if they are in use."""
    here = str(Path(lobs_native.__file__).parents[1])
    return [here, *(path for path in sys.path if path and path != here)]


def main() -> None:
    sys.path.remove(str(Path(__file__).resolve().parent))
    for name in MODULES:
        importlib.import_module(name)
    task = serve(socket.socket(fileno=int(sys.argv[1])))
    if task is not None:
        end(task)


if __name__ == "__main__":
    main()
