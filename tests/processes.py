"""Processes that tests start, forked from a server that has imported the programs once: importing them takes
six CPU seconds a process, and a test may need a dozen. What is about torchrun itself starts torchrun.
"""

import contextlib
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from unittest import mock

TESTS = Path(__file__).parent
FORKS = multiprocessing.get_context("forkserver")
PRELOAD = ["torch._dynamo", "midtrain", "rl", "verify", "processes", "pytest"]


class Process:
    """function(*args), of a module of the tests, in a process of its own; as much of Popen as tests use.
    stdout and stderr are names of files, which are appended to (default: the test's own)."""

    def __init__(self, function: Callable, *args, stdout="", stderr=""):
        FORKS.set_forkserver_preload(PRELOAD)
        paths = f"{TESTS.parent}:{TESTS}:{os.environ.get('PYTHONPATH', '')}"
        with mock.patch.dict(os.environ, PYTHONPATH=paths):  # the server's, which this may start
            multiprocessing.forkserver.ensure_running()
        begin = (function, args, str(stdout), str(stderr), dict(os.environ))
        self.process = FORKS.Process(target=run, args=begin)
        self.process.start()
        self.pid = self.process.pid

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, timeout: float = 120) -> int:
        self.process.join(timeout)
        if self.poll() is None:
            self.kill()
            raise TimeoutError(f"process {self.pid} did not end in {timeout} s")
        return self.process.exitcode

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)


def run(function: Callable, args: tuple, stdout: str, stderr: str, environment: dict) -> None:
    """What the new process does."""
    os.environ.clear()
    os.environ.update(environment)
    for name, fd in ((stdout, 1), (stderr, 2)):
        if name:
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), fd)
    sys.stdout, sys.stderr = (open(fd, "w", encoding="utf-8", buffering=1, closefd=False) for fd in (1, 2))
    function(*args)


def launch(ranks: int, function: Callable, *args) -> None:
    """As torchrun: so many processes that know of each other; when one fails, all end, with its exit code."""
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_NUM_THREADS": "1"}
    world |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    running = {fork(world | {"RANK": str(i), "LOCAL_RANK": str(i)}, function, args) for i in range(ranks)}
    while running:
        pid, status = os.wait()
        running.remove(pid)
        if code := os.waitstatus_to_exitcode(status):
            for other in running:
                os.kill(other, signal.SIGKILL)
            sys.exit(code)


def fork(environment: dict, function: Callable, args: tuple) -> int:
    """→ the process id. A rank leaves as the programs do, before gloo's threads can abort it at its end."""
    import midtrain

    if pid := os.fork():
        return pid
    code = 1
    try:
        os.environ.update(environment)
        with midtrain.clean_exit():
            function(*args)
        code = 0
    except SystemExit as end:
        code = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def on_ranks(ranks: int, folder: Path, function: Callable, *args, code: int = 0) -> tuple[str, str]:
    """function(*args) in so many ranks, which must end with this exit code → what all printed, (stdout,
    stderr)."""
    out, err = (folder / f"{name}-{time.monotonic_ns()}" for name in ("stdout", "stderr"))
    found = Process(launch, ranks, function, *args, stdout=out, stderr=err).wait()
    assert found == code, (found, err.read_text())
    return out.read_text(), err.read_text()
