"""A script under the bootstrap is as one under python."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
SCRIPT = '''"""What it sees."""
import atexit, json, multiprocessing, pickle, sys
import neighbour

class Thing:
    pass

def worker(queue):
    queue.put(type(thing()).__module__)

def thing():
    return Thing()

@atexit.register
def late():
    pickle.dumps(Thing())

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=worker, args=(queue,))
    process.start()
    main = sys.modules["__main__"]
    print(json.dumps({
        "argv": sys.argv, "path": sys.path[0], "name": __name__, "file": __file__, "package": __package__,
        "doc": __doc__, "spec": str(__spec__), "main": main.__dict__ is globals(), "spawned": queue.get(),
        "annotations": worker.__annotations__, "flags": Thing.__module__,
    }))
    process.join()
    raise LookupError("no more luck")
'''


def run(*command: str, folder: Path, **variables: str) -> tuple[int, dict[str, Any], str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=folder, env=environment, timeout=240
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


def test_a_script_sees_what_python_would_show_it(tmp_path: Path) -> None:
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "script.py").write_text(SCRIPT)
    (tmp_path / "scripts" / "neighbour.py").touch()
    command = ["scripts/script.py", "--lr", "3", "script", "--", "$x"]
    bootstrap = ["-m", "lightning_accel.launching.bootstrap", "script"]
    plain = run(*command, folder=tmp_path)
    ours = run(*bootstrap, *command, folder=tmp_path, TORCHELASTIC_ERROR_FILE=str(tmp_path / "error.json"))
    assert ours == plain
    assert ours[1]["argv"] == command
    assert ours[2].startswith("Traceback")
    assert ours[2].count("File ") == 1
    message = json.loads((tmp_path / "error.json").read_text())["message"]
    assert message["message"] == "LookupError: no more luck"
    assert message["extraInfo"]["py_callstack"] == plain[2]


def test_lines_are_written_whole_and_at_once(tmp_path: Path) -> None:
    # The other end of a pipe sees each write by itself, if it reads before the next.
    (tmp_path / "script.py").write_text("import os\nprint('a', 1)\ninput()\nprint('b', 2)\nos.abort()\n")
    command = [sys.executable, "-u", "-m", "lightning_accel.launching.bootstrap", "script", "script.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        bufsize=0,
        cwd=tmp_path,
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stdout.read(100) == b"a 1\n"
    process.stdin.write(b"\n")
    assert process.stdout.read(100) == b"b 2\n"
    assert process.wait(60) != 0
