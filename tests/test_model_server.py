"""A server is up inside the block, gone after it, and says why where it never came up. The program is a stand-in; lesson 13 runs the real one."""

import os
import subprocess
import sys
import time
import urllib.request

import psutil
import pytest

from adapter_checks.errors import InputError
from course_utils import model_server
from course_utils.model_server import serving

pytestmark = pytest.mark.skipif(os.name == "nt", reason="the stand-in is a script with a first line for Unix")

HEALTHY = """
import http.server, sys

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/fail":
            print("RuntimeError: no such model", file=sys.stderr, flush=True)
        self.send_response(500 if self.path == "/fail" else 200)
        self.end_headers()

    def log_message(self, *given):
        pass

assert sys.argv[1:4] == ["serve", "folder", "--host"] and sys.argv[4] == "127.0.0.1", sys.argv
http.server.HTTPServer(("127.0.0.1", int(sys.argv[6])), Handler).serve_forever()
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A function that makes a program of this source stand for `transformers`."""

    def make(source):
        file = tmp_path / "transformers"
        file.write_text(f"#!{sys.executable}\n{source}", encoding="utf-8")
        file.chmod(0o755)
        monkeypatch.setattr(model_server.shutil, "which", lambda *given, **keywords: str(file))

    return make


def servers(tmp_path):
    found = []
    for process in psutil.process_iter(["cmdline"]):
        if any(str(tmp_path) in part for part in process.info["cmdline"] or ()):
            found.append(process)
    return found


def test_it_answers_inside_the_block_and_is_gone_after_it(program, tmp_path):
    program(HEALTHY)
    with serving("folder") as address:
        assert address.startswith("http://127.0.0.1:") and address.endswith("/v1")
        assert urllib.request.urlopen(address).status == 200 and len(servers(tmp_path)) == 1
    assert servers(tmp_path) == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_it_is_gone_after_an_error(program, tmp_path, error):
    program(HEALTHY)
    with pytest.raises(error), serving("folder"):
        raise error
    assert servers(tmp_path) == []


def test_the_servers_own_error_is_shown(program, capsys):
    program(HEALTHY)
    with pytest.raises(OSError), serving("folder") as address:
        urllib.request.urlopen(address.replace("/v1", "/fail"))
    assert "The server's last error: RuntimeError: no such model" in capsys.readouterr().out


@pytest.mark.parametrize(
    "source, said",
    [
        (
            "raise SystemExit('ImportError: Missing dependencies for serving')",
            "Missing dependencies.* Run `make setup`",
        ),
        (
            "raise SystemExit('OSError: no such folder')",
            "exit status 1: OSError: no such folder Look at what it was given",
        ),
        ("", "exit status 0: it wrote nothing"),
    ],
)
def test_one_that_ends_at_once_says_why(program, source, said):
    program(source)
    with pytest.raises(InputError, match=said), serving("folder"):
        pass


def test_one_that_never_answers_is_ended(program, tmp_path):
    program("import time\nprint('loading', flush=True)\ntime.sleep(60)")
    with pytest.raises(InputError, match="After 1 seconds .*loading"), serving("folder", seconds=1):
        pass
    assert servers(tmp_path) == []


def test_no_program(monkeypatch):
    monkeypatch.setattr(model_server.shutil, "which", lambda *given, **keywords: None)
    with pytest.raises(InputError, match="make setup"), serving("folder"):
        pass


def test_a_server_whose_notebook_is_gone_is_ended_and_others_stay(program, tmp_path):
    program(HEALTHY)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    waits = [sys.executable, "-c", "import time; time.sleep(60)", "serve"]
    orphan = subprocess.Popen(waits, env={**os.environ, model_server._OWNER: str(gone.pid)})
    kept = subprocess.Popen(waits, env={**os.environ, model_server._OWNER: str(os.getpid())})
    other = subprocess.Popen(waits)
    try:
        time.sleep(0.2)
        with serving("folder"):
            assert not psutil.pid_exists(orphan.pid) and kept.poll() is None and other.poll() is None
    finally:
        for process in (orphan, kept, other):
            process.kill()
            process.wait()
