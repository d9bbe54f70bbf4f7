"""What every committed notebook must look like. Each check returns a list of complaints."""

import copy
import json
import re
from pathlib import Path
from urllib.parse import unquote

from tools import editions

LARGEST = 1_000_000  # bytes
LONGEST_LINE = 100  # characters


def complaints(notebook, path, executed):
    """Return every complaint about the notebook stored at `path`.

    `executed` says whether it should hold outputs (the learner's edition) or none.
    """
    found = runs_in_order(notebook) if executed else has_no_outputs(notebook)
    for check in (
        no_stderr_and_no_errors,
        no_widgets,
        no_timing,
        plain_metadata,
        sound_ids,
        alt_texts,
        short_lines,
        nothing_of_this_machine,
        nothing_left_to_fill,
        answers_folded,
    ):
        found += check(notebook)
    return found + links_resolve(notebook, path) + small(path)


def runs_in_order(notebook):
    """Code cells were run once each, from the first to the last."""
    counts = [cell.execution_count for cell in _code(notebook)]
    return [] if counts == list(range(1, len(counts) + 1)) else [f"run counts are {counts}, not 1 to {len(counts)}"]


def has_no_outputs(notebook):
    """Nothing was run."""
    return [f"{cell.id} has outputs" for cell in _code(notebook) if cell.outputs or cell.execution_count]


def no_stderr_and_no_errors(notebook):
    """No cell wrote to stderr or stopped with an error."""
    return [
        f"{cell.id} has {'an error' if output.output_type == 'error' else 'text on stderr'}"
        for cell, output in _outputs(notebook)
        if output.output_type == "error" or output.get("name") == "stderr"
    ]


def no_widgets(notebook):
    """No widget state: it is large, and shows nothing outside a live kernel."""
    found = ["the notebook holds widget state"] if "widgets" in notebook.metadata else []
    return found + [
        f"{cell.id} shows a widget"
        for cell, output in _outputs(notebook)
        if any("widget" in kind for kind in output.get("data", {}))
    ]


def no_timing(notebook):
    """No time stamps: they would make every build differ."""
    return [f"{cell.id} holds time stamps" for cell in notebook.cells if "execution" in cell.metadata]


def plain_metadata(notebook):
    """The notebook's metadata is what JupyterLab writes, for whatever version of Python it was built with."""
    wanted = copy.deepcopy(editions.NOTEBOOK_METADATA)
    wanted["language_info"]["version"] = notebook.metadata.get("language_info", {}).get("version")
    return [] if notebook.metadata == wanted else ["the notebook's metadata is not that which JupyterLab writes"]


def sound_ids(notebook):
    """Cell ids are unique, and words rather than chance."""
    ids = [cell.get("id", "") for cell in notebook.cells]
    found = [f"the id {one!r} occurs twice" for one in sorted(set(ids)) if ids.count(one) > 1]
    return found + [
        f"the id {one!r} is not derived from a name"
        for one in ids
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", one) or re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f-]+)?", one)
    ]


def alt_texts(notebook):
    """Every image, in text and in outputs, says what it shows."""
    found = []
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            found += [f"{cell.id}: {problem}" for problem in missing_alt(cell.source)]
    for cell, output in _outputs(notebook):
        data = output.get("data", {})
        html = _text(data.get("text/html", ""))
        found += [f"{cell.id}: {problem}" for problem in missing_alt(html, markdown=False)]
        # A bare image output cannot carry a text; one beside an <img alt> is its fallback.
        if any(kind.startswith("image/") for kind in data) and "<img" not in html:
            found.append(f"{cell.id}: an image output without alt text")
    return found


def links_resolve(notebook, path):
    """Every link to a file, in text and in outputs, leads to one. `path` is the notebook's own."""
    texts = [(cell.id, cell.source) for cell in notebook.cells if cell.cell_type == "markdown"]
    texts += [(cell.id, _text(output.get("data", {}).get("text/html", ""))) for cell, output in _outputs(notebook)]
    return [
        f"{identity}: the link {target} leads nowhere"
        for identity, text in texts
        for target in broken_links(text, Path(path).parent)
    ]


def broken_links(text, folder):
    """Return the targets in Markdown or HTML `text` that are no web address and no file under `folder`."""
    text = _without_code(text)
    targets = [bare or angled for angled, bare in re.findall(r"\]\(\s*(?:<([^>]+)>|([^)\s]+))", text)]
    targets += re.findall(r"""(?:src|href)\s*=\s*["']([^"']+)["']""", text)
    targets += re.findall(r"^\[[^\]]+\]:\s*(\S+)", text, flags=re.MULTILINE)
    return [
        target
        for target in targets
        if not re.match(r"[a-z][a-z0-9+.-]*:|#|//", target)
        and not (Path(folder) / unquote(target.split("#")[0])).exists()
    ]


def missing_alt(text, markdown=True):
    """Return a complaint for each image in Markdown or HTML `text` that has no alt text."""
    if markdown:
        text = _without_code(text)
    found = []
    if markdown:
        found += [f"the image {target} has no alt text" for target in re.findall(r"!\[\s*\]\(([^)]*)\)", text)]
    for image in re.findall(r"<img\b[^>]*>", text, flags=re.IGNORECASE):
        if not re.search(r"""\balt\s*=\s*("[^"]*[^\s"][^"]*"|'[^']*[^\s'][^']*')""", image):
            found.append("an <img> has no alt text")
    return found


def short_lines(notebook):
    """Code fits the width of a page."""
    return [
        f"{cell.id} has a line of {len(line)} characters"
        for cell in _code(notebook)
        for line in cell.source.splitlines()
        if len(line) > LONGEST_LINE
    ]


def nothing_of_this_machine(notebook):
    """No absolute path and no memory address in an output: both differ on every machine."""
    found = []
    for cell, output in _outputs(notebook):
        data = output.get("data", {})
        shown = [output.get("text", "")] + [value for kind, value in data.items() if kind.startswith("text/")]
        for text in map(_text, shown):
            text = re.sub(r"data:image/[^\"']*", "", text)
            place = re.search(
                r"(?<![\w.:/<])/(home|Users|root|tmp|work|usr|opt|var|mnt|private)/\S*|\b[A-Z]:\\\S*", text
            )
            if place:
                found.append(f"{cell.id} shows the path {place[0]}")
            if re.search(r"\bat 0x[0-9a-f]{6,}", text):
                found.append(f"{cell.id} shows a memory address")
    return found


def nothing_left_to_fill(notebook):
    """No {{placeholder}} is left in a text, and no marker of the source anywhere."""
    marks = {"markdown": r"\{\{.*?\}\}|### (?:BEGIN|END) [A-Z ]+", "code": r"### (?:BEGIN|END) [A-Z ]+"}
    return [
        f"{cell.id} still holds {mark}"
        for cell in notebook.cells
        for mark in re.findall(marks[cell.cell_type], cell.source)
    ]


def answers_folded(notebook):
    """Outputs are folded if they answer a prediction, and only then."""
    wanted = copy.deepcopy(notebook)
    editions.fold_answers(wanted)
    return [
        f"{cell.id} {'should' if right.metadata.get('jupyter') else 'should not'} have its outputs folded"
        for cell, right in zip(notebook.cells, wanted.cells)
        if cell != right
    ]


def small(path):
    """The file is below `LARGEST`."""
    size = Path(path).stat().st_size
    return [] if size < LARGEST else [f"the file has {size:,} bytes, not less than {LARGEST:,}"]


def _code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def _outputs(notebook):
    return [(cell, output) for cell in _code(notebook) for output in cell.outputs]


def _text(value):
    return value if isinstance(value, str) else json.dumps(value)


def _without_code(text):
    return re.sub(r"```.*?```|`[^`\n]*`", "", text, flags=re.DOTALL)
