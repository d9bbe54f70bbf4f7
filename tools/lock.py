"""Renew constraints.txt: the versions of what the direct dependencies pull in.

    make lock        (or: python -m tools.lock)

pip resolves requirements.txt afresh, without installing anything and without the old
constraints. What is kept is portable: version tags such as "+cpu" are dropped, and so
is every package that only some of Linux, macOS and Windows need.

Then it resolves requirements-instructor.txt on top of that, and writes what this adds to
constraints-instructor.txt: a class uses the very versions that the lessons were built with.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
HEADER = """\
# Versions of what requirements.txt pulls in. Written by "make lock"; do not edit.
# Portable: no local version tags, nothing that only one system needs.
"""
INSTRUCTOR_HEADER = """\
# Versions of what requirements-instructor.txt pulls in beside constraints.txt. Written by "make lock"; do not edit.
"""
# PEP 508 marker values of the systems that the course supports.
SYSTEMS = [
    {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"},
    {"sys_platform": "darwin", "platform_system": "Darwin", "os_name": "posix", "platform_machine": "arm64"},
    {"sys_platform": "win32", "platform_system": "Windows", "os_name": "nt", "platform_machine": "AMD64"},
]


def direct_requirements(text):
    """Return the `Requirement`s of a requirements file, without options such as `-c`."""
    lines = (line.split("#")[0].strip() for line in text.splitlines())
    return [Requirement(line) for line in lines if line and not line.startswith("-")]


def needed_on(system, requirements, metadata):
    """Return the names that `requirements` pull in on one system.

    `system` holds PEP 508 marker values, `metadata` maps a canonical name to pip's
    report of that package (`version`, `requires_dist`). A package that pip did not
    report (it was resolved on another system) is left out.
    """
    seen = set()
    waiting = [(canonicalize_name(r.name), frozenset(r.extras)) for r in requirements]
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen or name not in metadata:
            continue
        seen.add((name, extras))
        for line in metadata[name].get("requires_dist", []):
            dependency = Requirement(line)
            wanted = dependency.marker is None or any(
                dependency.marker.evaluate({**system, "extra": extra}) for extra in extras | {""}
            )
            if wanted:
                waiting.append((canonicalize_name(dependency.name), frozenset(dependency.extras)))
    return {name for name, _ in seen}


def constraints(requirements, report):
    """Return the text of constraints.txt for pip's installation report (a dict)."""
    metadata = {canonicalize_name(item["metadata"]["name"]): item["metadata"] for item in report["install"]}
    everywhere = set.intersection(*(needed_on(system, requirements, metadata) for system in SYSTEMS))
    indirect = everywhere - {canonicalize_name(r.name) for r in requirements}
    return HEADER + "".join(f"{name}=={Version(metadata[name]['version']).public}\n" for name in sorted(indirect))


def resolved(requirements, *options):
    """Return pip's installation report (a dict) for `requirements`; nothing is installed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", *options]
        subprocess.run([*command, "--report", str(report), *map(str, requirements)], check=True)
        return json.loads(report.read_text(encoding="utf-8"))


def added(text, more):
    """Return the constraints in `more` that `text` lacks, under the instructor's header."""
    known = set(text.splitlines())
    return INSTRUCTOR_HEADER + "".join(f"{line}\n" for line in more.splitlines() if line not in known)


def main():
    """Resolve both requirements files with pip and write their constraints beside them."""
    course, instructor = (
        direct_requirements((ROOT / name).read_text(encoding="utf-8"))
        for name in ("requirements.txt", "requirements-instructor.txt")
    )
    text = constraints(course, resolved(course))
    path = ROOT / "constraints.txt"
    path.write_text(text, encoding="utf-8")
    together = [*course, *instructor]
    more = added(text, constraints(together, resolved(together, "-c", str(path))))
    (ROOT / "constraints-instructor.txt").write_text(more, encoding="utf-8")
    print(f"constraints.txt holds {text.count('==')} packages, constraints-instructor.txt {more.count('==')} more.")


if __name__ == "__main__":
    main()
