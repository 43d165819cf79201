"""A fork begins as a fresh process does, ends as one, and is ended with all that it started."""

import json
import os
import signal
import subprocess
import sys

# What a process looks like: its session, folder, files, signals, random state and streams.
LOOK = """
import json, os, random, signal, sys, threading
def look():
    print(json.dumps({
        "leads": os.getsid(0) == os.getpid() == os.getpgid(0), "folder": os.getcwd(),
        "files": len(os.listdir("/proc/self/fd")), "stdin": sys.stdin.read(), "threads": threading.active_count(),
        "random": random.random(), "blocked": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, [])),
        "signals": {n.name: str(signal.getsignal(n)) for n in signal.Signals},
    }))
"""
FORKED = """
import atexit, os, random, signal, sys, tempfile, threading, time
from benchmarks import forks
from look import look

output = tempfile.TemporaryFile()
kept = os.open("/dev/null", os.O_RDONLY)  # no business of a fork
random.seed(0)
signal.signal(signal.SIGTERM, lambda *given: None)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])

def run(work, seconds=20.0):
    output.seek(0)
    output.truncate()
    end = forks.end(forks.start(work, output.fileno(), "/tmp"), seconds)
    output.seek(0)
    return end, output.read().decode()

def says_so():
    atexit.register(print, "the end")

def starts():
    if os.fork() == 0:
        time.sleep(60)

end, said = run(look)
assert end == (0, False), (end, said)
print(said.strip())
assert run(says_so) == ((0, False), "the end\\n")
assert run(lambda: sys.exit(3))[0].code == 3 and run(lambda: sys.exit("no"))[0].code == 1
assert run(lambda: 4)[0].code == 4
end, said = run(lambda: 1 / 0)
assert end.code == 1 and "ZeroDivisionError" in said
assert run(lambda: os.kill(os.getpid(), signal.SIGTERM)) == ((-signal.SIGTERM, False), "")
assert run(lambda: time.sleep(60), 0.2)[0] == (forks.HANGS, False)
began = time.monotonic()
assert run(starts)[0] == (0, True) and time.monotonic() - began < 20  # and what it started is ended
thread = threading.Thread(target=time.sleep, args=(1,))
thread.start()
try:
    run(look)
except RuntimeError as error:
    assert "other threads run" in str(error)
else:
    raise AssertionError("a fork beside a thread")
"""


def test_a_fork_is_as_a_fresh_process(tmp_path):
    (tmp_path / "look.py").write_text(LOOK)
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    kept = {**os.environ, "PYTHONPATH": path}

    def said(code: str, **options) -> dict:
        done = subprocess.run([sys.executable, "-c", code], env=kept, capture_output=True, text=True, **options)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    def nohup() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    def at_a_terminal() -> None:  # these tests may have been started with nohup, or with a shell's &
        signal.signal(signal.SIGHUP, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    fresh = "from look import look; look()"
    wanted = said(fresh, cwd="/tmp", stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=at_a_terminal)
    found = said(FORKED, preexec_fn=nohup)
    assert found.pop("random") != wanted.pop("random") and found == wanted
    assert wanted["leads"] and wanted["files"] == 4  # with the one that lists them
