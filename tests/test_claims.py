"""The claims of the lessons hold, and a claim that doesn't hold, or that its sentence has left, is found."""

import pytest

from tools import build, claims, editions
from tools.editions import BuildError

CLAIM = """\
# %% tags=["claim"]
share = 0.51
assert share > 0.4, "more than a few"

# %% [markdown]
# # Count the apples
# Of ten apples {{claims}} are red, {{share:.0%}}, which is more
# than a few.
""".replace("{{claims}}", "{{round(10 * share)}}")


def text(source, values=None):
    (cell,) = claims.fill(editions.parse(source), values or {}, "01_apples.py").cells
    return cell.source


def test_a_text_is_filled_with_what_its_claim_cell_computed():
    assert text(CLAIM) == "# Count the apples\nOf ten apples 5 are red, 51%, which is more\nthan a few."


def test_values_are_known_beside_the_claims_and_what_is_not_known_is_told():
    source = "# %% [markdown]\n# About {{time}}.\n"
    assert text(source, {"time": "2 minutes"}) == "About 2 minutes."
    with pytest.raises(
        BuildError, match="01_apples.py, start-1: nothing is known as time in {{time}}; known are hours"
    ):
        text(source, {"hours": 1})


@pytest.mark.parametrize(
    "old, new, complaint",
    [
        ("which is more", "which is less", 'the text lacks "more than a few"'),
        ("than a few.", "than a fewest.", 'the text lacks "more than a few"'),
        ("0.51", "0.31", 'it no longer holds that "more than a few"'),
        (", {{share:.0%}},", ", half,", None),
        ("assert share > 0.4", "assert True", None),
        ('> 0.4, "more than a few"', "> 0.4", "ends with the words of the text"),
        ('"more than a few"', 'f"more than {1}"', "ends with the words of the text"),
        (
            "share = 0.51",
            "share = 0.51\nother = 2",
            r"A claim cell computes other \(01_apples.py, start-claim",
        ),
        ("share = 0.51", "share = 1 / 0", "the claim cell stopped with ZeroDivisionError"),
        ("share = 0.51", "share =", "the claim cell is not Python: invalid syntax"),
        ("{{share:.0%}}", "{{share[3]}}", r"{{share\[3\]}} stopped with TypeError"),
        ("{{share:.0%}}", "{{share +}}", "is not what can stand in an f-string"),
        ("# %% [markdown]", "# %%\nprint(1)\n\n# %% [markdown]", "stands right before the text"),
    ],
)
def test_a_change_of_one_side_alone_is_found(old, new, complaint):
    assert old in CLAIM
    changed = CLAIM.replace(old, new)
    if complaint is None:
        text(changed)
    else:
        with pytest.raises(BuildError, match=complaint):
            text(changed)


def test_a_number_that_is_overwritten_by_words_is_found():
    with pytest.raises(BuildError, match=r"A claim cell computes part \(01_apples.py, start-claim"):
        text(CLAIM.replace("share = 0.51", "share = 0.51\nfrom tools.claims import fraction\npart = fraction(share)"))


def test_a_claim_changes_no_id_and_is_in_no_edition():
    lesson = '# %% [markdown]\n# # Count\n\n# %%\na = 1\n\n# %% tags=["claim"]\nb = 1\n\n# %% [markdown]\n# b\n'
    ids = ["count", "count-1", "count-2"]
    for make in (editions.learner, editions.solved, editions.staging):
        assert [cell.id for cell in make(editions.parse(lesson)).cells] == ids


@pytest.mark.parametrize(
    "share, words",
    [
        (0.507, "half"),
        (0.79, "four fifths"),
        (0.1, "a tenth"),
        (0.38, "two fifths"),
        (0.33, "a third"),
        (0.9, "nine tenths"),
    ],
)
def test_a_share_in_words(share, words):
    assert claims.fraction(share) == words


@pytest.mark.parametrize("share", [0, 0.05, 0.45, 0.95, 1])
def test_a_share_that_is_no_simple_fraction_is_refused(share):
    with pytest.raises(ValueError, match=r"is no simple fraction"):
        claims.fraction(share)


@pytest.mark.parametrize("path", build.sources(build.ROOT), ids=lambda path: path.stem)
def test_the_claims_of_a_lesson_hold(path):
    build.filled(path, build.read_record(build.ROOT))
