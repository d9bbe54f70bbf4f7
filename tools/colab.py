"""Run by the first cell of a lesson in Colab: installs what the lessons import and makes the course importable.

Colab's own PyTorch, NumPy and matplotlib stay, since they fit its GPU and each other.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KEPT = ("torch", "numpy", "matplotlib", "jupyterlab")


def needed(requirements):
    """Return the pins of requirements.txt that lessons need and Colab is not trusted to have."""
    pins = re.findall(r"^([\w-]+)(==\S+) +# (?:all )?lessons?\b", requirements, re.MULTILINE)
    return [name + version for name, version in pins if name not in KEPT]


def main():
    """Install, and let this process and those that lessons start import the course."""
    pins = needed((ROOT / "requirements.txt").read_text(encoding="utf-8"))
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *pins], check=True)
    folders = [str(ROOT), str(ROOT / "adapter_checks" / "src")]
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]
    os.environ["PYTHONPATH"] = os.pathsep.join(folders)
    print("The course is in", ROOT.name, "and ready. Changes are lost when Colab ends; save a copy to keep them.")


if __name__ == "__main__":
    main()
