"""``bench/stress/forks.py``: a forked child is what a fresh interpreter would be."""

from __future__ import annotations

import json
import subprocess

import pytest

SEEN = """
import json, os, signal, sys
print(json.dumps([sys.argv, sys.path[0], os.getcwd(), dict(os.environ), __name__]))
print(signal.getsignal(signal.SIGINT) is signal.default_int_handler, file=sys.stderr)
"""


@pytest.mark.parametrize("how", ["-c", "-m", "script"])
def test_it_has_its_own_arguments_folder_and_environment(forks, tmp_path, how):
    (tmp_path / "seen.py").write_text(SEEN)
    first = {"-c": ["-c", SEEN], "-m": ["-m", "seen"], "script": ["seen.py"]}[how]
    done = forks.run([*first, "x", "--y"], cwd=tmp_path, env={"ONLY": "this"})
    argv, path, folder, environment, name = json.loads(done.stdout)
    assert argv[1:] == ["x", "--y"]
    assert argv[0] == {"-c": "-c", "-m": str(tmp_path / "seen.py"), "script": "seen.py"}[how]
    assert path == ("" if how == "-c" else str(tmp_path))
    assert (folder, environment, name) == (str(tmp_path), {"ONLY": "this"}, "__main__")
    assert done.stderr == "True\n"
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("code", "status", "errors"),
    [
        ("pass", 0, ""),
        ("raise SystemExit", 0, ""),
        ("raise SystemExit(3)", 3, ""),
        ("raise SystemExit('why')", 1, "why\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("raise KeyboardInterrupt", -2, "KeyboardInterrupt\n"),
        ("import os; os.abort()", -6, ""),
    ],
)
def test_its_exit_code_is_that_of_an_interpreter(forks, code, status, errors):
    done = forks.run(["-c", code])
    assert (done.returncode, done.stdout) == (status, "")
    assert done.stderr.endswith(errors) if errors else not done.stderr


def test_threads_and_functions_at_exit_run_to_their_ends(forks):
    code = """
import atexit, threading, time
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.1), print("thread"))).start()
"""
    assert forks.run(["-c", code]).stdout == "thread\nat exit\n"


def test_it_can_be_waited_for_and_killed(forks):
    process = forks.start(["-c", "import time; time.sleep(60)"], stdout=subprocess.PIPE)
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.01)
    process.kill()
    assert process.communicate(10) == ("", None)
    assert process.poll() == process.returncode == -9
