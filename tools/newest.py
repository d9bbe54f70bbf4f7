"""Run every test on the newest libraries, and say which versions changed and what broke.

    make newest

The libraries go into an environment of their own, runs/newest, made anew each time. The report is Markdown; it is
also written to the job's summary page where there is one ($GITHUB_STEP_SUMMARY). The exit status is that of the tests.
Runs on a bare Python: nothing of the course need be installed.
"""

import json
import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TARGETS = ("lint", "types", "test-code", "test-notebooks")


def unpinned(requirements):
    """Return the text of a requirements file without versions and constraints."""
    return re.sub(r"==[^\s#]+", "", re.sub(r"^-c.*\n", "", requirements, flags=re.MULTILINE))


def changed(constraints, installed):
    """Return (package, pinned, installed) for each package in another version than the text of constraints.txt says.

    `installed` is the list that `pip list --format=json` prints. A package that is not pinned is left out.
    """
    pinned = {}
    for name, version in re.findall(r"^([a-z0-9-]+)==([^\s;]+)", constraints, flags=re.MULTILINE):
        pinned.setdefault(name, []).append(version)
    found = []
    for package in installed:
        name = re.sub(r"[-_.]+", "-", package["name"]).lower()
        version = package["version"].split("+")[0]  # "2.13.0+cpu" is PyTorch's CPU build of 2.13.0.
        if name in pinned and version not in pinned[name]:
            found.append((name, " or ".join(pinned[name]), version))
    return found


def broken(output):
    """Return the lines in the output of make that name a test or a target that failed."""
    return [line for line in output.splitlines() if re.match(r"FAILED |ERROR |make.*\*\*\* \[", line)]


def report(changes, failures):
    """Return the Markdown of what changed and what broke."""
    rows = [f"| {name} | {pinned} | {version} |" for name, pinned, version in changes]
    table = (
        ["| Package | Pinned | Newest |", "| --- | --- | --- |", *rows]
        if rows
        else ["Every version is the pinned one."]
    )
    listed = [f"- `{line}`" for line in failures] or ["Nothing."]
    return "\n".join(["## What changed", "", *table, "", "## What broke", "", *listed, ""])


def run(command, **environment):
    """Run `command` in the checkout, show its output as it comes, and return its exit status and that output."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
    )
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    return process.wait(), "".join(lines)


def main():
    """Install, run the tests and write the report. Returns an exit status."""
    folder = ROOT / "runs" / "newest"
    venv.create(folder, clear=True, with_pip=True)
    python = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    requirements = folder / "requirements.txt"
    requirements.write_text(unpinned((ROOT / "requirements.txt").read_text(encoding="utf-8")), encoding="utf-8")
    install = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    status, output = run([*install, "-r", str(requirements)])
    if status == 0:
        beyond_text = folder / "requirements-beyond-text.txt"
        beyond_text.write_text(unpinned((ROOT / beyond_text.name).read_text(encoding="utf-8")), encoding="utf-8")
        status, output = run([*install, "--no-deps", "-r", str(beyond_text)])
    changes, failures = [], [line for line in output.splitlines() if line.startswith("ERROR: ")]
    if status == 0:
        (folder / ".installed").write_text(
            str(ROOT), encoding="utf-8"
        )  # what make sees as an environment that is ready
        listing = subprocess.check_output([str(python), "-m", "pip", "list", "--format=json"], text=True)
        changes = changed((ROOT / "constraints.txt").read_text(encoding="utf-8"), json.loads(listing))
        command = ["make", "--keep-going", *TARGETS, "VENV=runs/newest"]
        status, output = run(command, PYTEST_ADDOPTS="-m 'not pinned'")
        failures = broken(output)
    text = report(changes, failures)
    print(text)
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with open(summary, "a", encoding="utf-8") as file:
            file.write(text)
    return status


if __name__ == "__main__":
    sys.exit(main())
