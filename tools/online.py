"""Ways to try the course in a browser without installing it; all need its address on GitHub, as GITHUB_REPOSITORY=owner/name.

    python -m tools.online readme           writes the links at the head of README.md
    python -m tools.online colab FOLDER     writes the lessons for Colab there, each with a first cell that fetches the course

GitHub's workflows have that variable; `make badges GITHUB_REPOSITORY=owner/name` sets it elsewhere.
"""

import argparse
import os
import re
import sys
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- try:begin -->", "<!-- try:end -->"
FIRST_CELL = """\
# Fetches the course and installs what its lessons need: some minutes. The lessons for your own machine lack this cell.
import os

if not os.path.exists("../tools/colab.py"):
    !test -d course || git clone --quiet --depth 1 {address} course
    %cd -q course/notebooks
%run ../tools/colab.py"""


def ways(repository, notebook):
    """Return {name: address} of the services that open the notebook of this file name; `repository` is owner/name."""
    return {
        "Open in Colab": f"https://colab.research.google.com/github/{repository}/blob/colab/{notebook}",
        "Open in Binder": f"https://mybinder.org/v2/gh/{repository}/main?urlpath=lab/tree/work/{notebook}",
        "Open in Codespaces": f"https://codespaces.new/{repository}",
    }


def for_colab(notebook, address):
    """Return a copy of the notebook with the cell in front that fetches the course from `address`."""
    cell = nbformat.v4.new_code_cell(FIRST_CELL.format(address=address), id="fetch-the-course")
    return nbformat.from_dict({**notebook, "cells": [cell, *notebook.cells]})


def write_colab(root, folder, address):
    """Write every lesson for Colab to `folder`."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for path in sorted(Path(root, "notebooks").glob("*.ipynb")):
        notebook = for_colab(nbformat.read(path, as_version=4), address)
        nbformat.validate(notebook)
        nbformat.write(notebook, Path(folder, path.name))


def with_links(readme, repository, notebook):
    """Return the README's text with links that open `notebook` between its two markers."""
    links = " · ".join(f"[{name}]({address})" for name, address in ways(repository, notebook).items())
    return re.sub(f"{BEGIN}.*?{END}", lambda _: f"{BEGIN}\n{links}\n{END}", readme, count=1, flags=re.DOTALL)


def main(arguments=None, root=ROOT):
    """Write what the command line asks for. Returns an exit status or a sentence for stderr."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["readme", "colab"])
    parser.add_argument("folder", nargs="?", default="runs/colab", help="where the lessons for Colab go")
    chosen = parser.parse_args(arguments)
    repository = os.environ.get("GITHUB_REPOSITORY", "")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        return f"Say where the course lies on GitHub, as GITHUB_REPOSITORY=owner/name; it is {repository!r}."
    if chosen.what == "colab":
        write_colab(root, chosen.folder, f"https://github.com/{repository}")
        return 0
    readme, first = Path(root, "README.md"), min(path.name for path in Path(root, "notebooks").glob("*.ipynb"))
    readme.write_text(with_links(readme.read_text(encoding="utf-8"), repository, first), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
