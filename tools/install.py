"""Install the course into the Python that runs this, with the build of PyTorch that fits the machine.

    python tools/install.py

Does what `pip install -r requirements.txt` does, and then installs what lesson 12 needs, without what that would bring
in turn (requirements-beyond-text.txt says why). On Linux without an NVIDIA driver it first installs the CPU build
of PyTorch, since the default one brings gigabytes of CUDA. uv knows where PyTorch's builds lie, so nobody has to name an
index; one that pip was told of already is asked instead. It runs before anything is installed.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REQUIREMENTS = ROOT / "requirements.txt"


def cpu_build_wanted(system, driver, settings, installed):
    """Return whether the CPU build is to be installed first, and a sentence that says why or why not.

    system: `sys.platform`; driver: is there an NVIDIA driver?; settings: the lines of `pip config list`;
    installed: is there a PyTorch already?
    """
    if installed:
        return False, "PyTorch is installed already; it is replaced only if another version is needed."
    if not system.startswith("linux"):
        return False, "The default build of PyTorch fits this system."
    if driver:
        return False, "There is an NVIDIA driver, so PyTorch comes with CUDA (some gigabytes)."
    own = [line for line in settings if re.search(r"(index-url|find-links|no-index)\b.*=.*\w", line)]
    if own:
        return False, "pip has been told where to look for packages, and PyTorch is taken from there."
    return True, "There is no NVIDIA driver, so PyTorch's CPU build is installed, without the gigabytes of CUDA."


def main():
    """Install everything. Returns pip's exit status, that of the first step that failed."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    settings = subprocess.run([*pip, "config", "list"], capture_output=True, text=True).stdout.splitlines()
    driver = shutil.which("nvidia-smi") or Path("/proc/driver/nvidia/version").exists()
    wanted, why = cpu_build_wanted(sys.platform, driver, settings, importlib.util.find_spec("torch"))
    print(why, flush=True)
    if wanted:
        torch = re.search(r"^torch==\S+", REQUIREMENTS.read_text(encoding="utf-8"), re.MULTILINE)[0]
        uv = [sys.executable, "-m", "uv", "pip", "install", "--python", sys.executable, "--torch-backend=cpu"]
        got_uv = subprocess.run([*pip, "install", "-c", str(ROOT / "constraints.txt"), "uv"]).returncode == 0
        if not got_uv or subprocess.run([*uv, "--no-deps", torch]).returncode:
            print("The CPU build could not be had; the default one follows, and is far larger.", flush=True)
    steps = (["-r", "requirements.txt"], ["--no-deps", "-r", "requirements-beyond-text.txt"])
    return next((code for step in steps if (code := subprocess.run([*pip, "install", *step], cwd=ROOT).returncode)), 0)


if __name__ == "__main__":
    sys.exit(main())
