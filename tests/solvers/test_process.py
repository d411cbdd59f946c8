"""Behaviour in a process: one OpenMP runtime, forked children that work, other Python threads that
run during a call, and calls that Ctrl-C ends."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import textwrap
import threading
import time
from typing import Any

import pytest
import torch

from lobs_native import ops
from stress.forks import Forks


def script(code: str, forks: Forks | None = None, timeout: float = 60.0) -> dict[str, Any]:
    """Run Python code in its own process and return the JSON that its last line prints.

    Without ``forks``, in a fresh interpreter. A test run in the background starts with SIGINT
    ignored. Children inherit that and Python keeps it, so the handler of an interactive run is set
    here.
    """
    setup = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    arguments = ["-c", setup + textwrap.dedent(code)]
    if forks is None:
        done = subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
    else:
        done = forks.run(arguments, timeout=timeout)
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr[-2000:]}"
    return json.loads(done.stdout.splitlines()[-1])


def test_exactly_one_openmp_runtime_is_mapped():
    if ops.parallel_runtime() != "openmp":
        pytest.skip(f"built with {ops.parallel_runtime()}")
    found = script("""
        import json, threadpoolctl, torch
        import lobs_native as lobs
        lobs.prune_weight(torch.randn(64, 64), torch.eye(64), sparsity=0.5)
        info = threadpoolctl.threadpool_info()
        print(json.dumps([x["filepath"] for x in info if x["user_api"] == "openmp"]))
    """)
    assert len(found) == 1, found


def test_a_forked_child_works_after_its_parent_used_threads():
    """Sizes at which torch's own operations use threads too."""
    found = script("""
        import json, os, time
        import torch
        import lobs_native as lobs
        torch.set_num_threads(max(2, torch.get_num_threads()))
        x, w = torch.randn(600, 400), torch.randn(400, 400)
        before = lobs.prune_weight(w, lobs.Hessian(400).update(x), sparsity=0.5)
        begun = time.monotonic()
        child = os.fork()
        if child == 0:
            after = lobs.prune_weight(w, lobs.Hessian(400).update(x), sparsity=0.5)
            os._exit(0 if torch.equal(before.mask, after.mask) else 3)
        status = None
        while status is None and time.monotonic() - begun < 10:
            time.sleep(0.01)
            pid, ended = os.waitpid(child, os.WNOHANG)
            status = os.waitstatus_to_exitcode(ended) if pid else None
        if status is None:
            os.kill(child, 9)
            os.waitpid(child, 0)
        threads = torch.get_num_threads()
        lobs.Hessian(400).update(x)  # the parent still works, with its threads
        print(json.dumps({"status": status, "threads": threads}))
    """)
    assert found["status"] is not None, "the child did not finish within 10 seconds"
    assert found["status"] == 0
    assert found["threads"] >= 2


@pytest.mark.usefixtures("one_thread")
def test_other_python_threads_run_during_a_call():
    X = torch.randn(1, 768).expand(60_000, 768)
    H = torch.zeros(768, 768, dtype=torch.float64)
    ticks: list[float] = []
    running = threading.Event()
    stop = threading.Event()

    def heartbeat() -> None:
        running.set()
        while not stop.wait(0.005):
            ticks.append(time.monotonic())

    beat = threading.Thread(target=heartbeat)
    beat.start()
    running.wait()
    begun = time.monotonic()
    ops.hessian_accumulate_(H, X)
    ended = time.monotonic()
    stop.set()
    beat.join()
    assert ended - begun > 0.2, "the call is too short to tell"
    during = [tick for tick in ticks if begun < tick < ended]
    assert len(during) > 0.25 * (ended - begun) / 0.005
    assert max(b - a for a, b in itertools.pairwise(during)) < 0.5 * (ended - begun)


# Calls that would take many seconds. The tall ones have a single tile or block, so something else
# must bound the work between two checks for signals.
LONG_CALLS = {
    "accumulate, wide": """
        delay = 0.5
        H = torch.zeros(2048, 2048, dtype=torch.float64)
        X = torch.randn(1, 2048).expand(250_000, 2048)
        call = lambda: ops.hessian_accumulate_(H, X)
    """,
    "accumulate, tall": """
        delay = 1.0  # after the check of all values, which looks for signals often enough
        H = torch.zeros(64, 64, dtype=torch.float64)
        X = torch.randn(1, 64).expand(40_000_000, 64)
        call = lambda: ops.hessian_accumulate_(H, X)
    """,
    "prune": """
        delay = 1.0
        W = torch.randn(1500, 4096)
        A = torch.eye(4096)
        order = torch.arange(4096, dtype=torch.int32).repeat(len(W))
        start = torch.arange(len(W) + 1) * 4096
        call = lambda: ops.static_order_prune_(W, A, order, start)
    """,
    "trace": """
        delay = 0.5
        W = torch.randn(64, 3000)
        A = torch.eye(3000)
        call = lambda: ops.exact_trace(W, A)
    """,
    "trace of blocks": """
        delay = 0.5
        W = torch.randn(64, 2048)
        A = torch.eye(2048)
        call = lambda: ops.exact_trace(W, A, block=16)
    """,
    "solve": """
        delay = 0.5
        X = torch.randn(200, 3000)
        M = torch.eye(3000)
        call = lambda: ops.support_solve_(X, M, torch.ones(200, 3000, dtype=torch.bool))
    """,
    "update, tall": """
        delay = 0.5
        F = torch.eye(512)[None] * 1.0
        G = torch.randn(1, 512).expand(500_000, 512)
        call = lambda: ops.inverse_update_(F, G, 1e6)
    """,
}
INTERRUPTED = """
        import json, os, signal, threading, time
        import torch
        from lobs_native import ops
        {setup}
        sent = []
        def interrupt():
            sent.append(time.process_time())
            os.kill(os.getpid(), signal.SIGINT)
        threading.Timer(delay, interrupt).start()
        what = "finished"
        try:
            call()
        except KeyboardInterrupt:
            what = "KeyboardInterrupt"
        print(json.dumps({{"what": what, "late": time.process_time() - sent[0] if sent else None}}))
"""


@pytest.mark.parametrize("name", LONG_CALLS)
def test_ctrl_c_ends_a_long_call_with_keyboard_interrupt(name, forks):
    found = script(INTERRUPTED.format(setup=LONG_CALLS[name].strip()), forks)
    assert found["what"] == "KeyboardInterrupt"
    # In seconds of the processor, so that other work on the machine does not count.
    allowed = 1.0 if name.startswith(("trace", "solve")) else 3.0
    assert found["late"] < allowed, f"{found['late']:.1f} s after the signal"


def test_a_hessian_whose_update_was_interrupted_refuses_further_use(forks):
    code = """
        import json, os, signal, threading, time
        import torch
        import lobs_native as lobs
        h = lobs.Hessian(1024).update(torch.randn(10, 1024))
        first = float(h._sum[0, 0])
        def interrupt():
            # A look at the rows comes first, during which nothing is written.
            while float(h._sum[0, 0]) == first:
                time.sleep(0.001)
            os.kill(os.getpid(), signal.SIGINT)
        threading.Thread(target=interrupt, daemon=True).start()
        outcomes = []
        try:
            h.update(torch.randn(1, 1024).expand(200_000, 1024))
        except KeyboardInterrupt:
            outcomes.append("KeyboardInterrupt")
        for use in (h.matrix, h.state_dict, lambda: h.update(torch.randn(10, 1024))):
            try:
                use()
            except lobs.LobsError as error:
                outcomes.append("interrupted" in str(error))
        print(json.dumps(outcomes))
    """
    found = script(code, forks)
    assert found == ["KeyboardInterrupt", True, True, True]
