"""What a text says about the run above it, and no sweep holds, is what the stored outputs of the learner's edition show."""

import re

import nbformat
import pytest

from course_utils import paths


def outputs(notebook):
    """All that the cells of a notebook printed or showed, but pictures, as one text."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            found.append(output.get("text", ""))
            found += [text for kind, text in output.get("data", {}).items() if not kind.startswith("image/")]
    return "\n".join(found)


def preference(shown):
    rejected, chosen = (
        float(at_end) - float(at_first)
        for side in ("rejected", "chosen")
        for at_first, at_end in re.findall(rf"{side}: (\S+) nats at first, (\S+) at the end", shown)[:1]
    )
    return -3.5 < rejected < -2.5 and 0.3 < chosen < 0.7


def accuracy(shown):
    (share,) = re.findall(r"pairs ranked right in the last steps: (\d+)%", shown)
    return 65 <= int(share) <= 75


def together(shown):
    rows = [line.split("|")[1:-1] for line in shown.splitlines() if line.startswith("| ")]
    both = {row[0].strip(): row[3].strip() for row in rows if len(row) == 4}
    asked = [prompt for prompt in both if "Who has the tickets?" in prompt]
    forms = [answer for prompt, answer in both.items() if prompt.startswith("Give who, what and where as JSON")]
    return [both[one] for one in asked] == ["Anna"] and forms[0].endswith("}") and not forms[-1].endswith("}")


SAID = [
    ("09_preference", "The rejected replies lose about three nats, and the chosen ones gain half a nat.", preference),
    ("09_preference", "In the last steps only about seven in ten pairs are ranked right", accuracy),
    ("08_combining", "the tickets are now with Anna, and the last JSON stops in the middle.", together),
]


@pytest.mark.parametrize(("stem", "sentence", "holds"), SAID, ids=[holds.__name__ for *_, holds in SAID])
def test_the_stored_run_shows_what_the_text_says(stem, sentence, holds):
    notebook = nbformat.read(paths.project_root() / "notebooks" / f"{stem}.ipynb", as_version=4)
    texts = " ".join(" ".join(cell.source.split()) for cell in notebook.cells if cell.cell_type == "markdown")
    assert sentence in texts
    assert holds(outputs(notebook))


def test_another_run_would_be_found():
    assert not preference("rejected: -2.0 nats at first, -2.5 at the end; chosen: -3.0 nats at first, -2.5 at the end")
    assert not accuracy("pairs ranked right in the last steps: 91%")
    assert not together(
        "| Who has the tickets? | Peter | {} | Peter |\n| Give who, what and where as JSON: A. | a | {} | {} |"
    )
