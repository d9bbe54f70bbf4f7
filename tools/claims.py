"""Fill the sentences of a lesson with measured numbers, and hold its words by assertions.

A claim cell is plain Python that stands right before the text it holds. It runs whenever the lesson is built, and is
left out of every edition:

    # %% tags=["claim"]
    from tools.claims import fraction, swept

    score = swept("learning_rate", "validation", "method", "learning_rate")
    half = fraction(score["lora", 1.5e-3][0])
    assert score["lora", 5e-2][2] < 0.05, "one step above nothing"

    # %% [markdown]
    # At 1.5e-3 LoRA gets about {{half}} of the answers right, where all weights get
    # {{score["full", 1.5e-3][0]:.0%}}; one step below gives half, one step above nothing.

- `{{…}}` in a text is what stands in an f-string's braces: an expression over what the claim cells above have
  defined, and how to format it. The time and memory of the lesson's last run are known too: `{{time}}`, `{{cores}}`,
  `{{peak_gb}}`.
- The message of an assertion is the words that it holds. The next text must contain them, so neither the words nor
  the numbers can change alone. Quote no more than the words that make the claim.
- Whatever a claim cell computes must be used. So words that take the place of their `{{…}}` are found, too.

All claim cells of a lesson share their names, from top to bottom, and none with the lesson's own code.
"""

import ast
import copy
import re
from fractions import Fraction

from course_utils import data, sweeps
from tools.editions import BuildError, bound_names

FIELD = re.compile(r"\{\{(.+?)\}\}", flags=re.DOTALL)
FRACTIONS = {
    Fraction(1, 10): "a tenth",
    Fraction(1, 5): "a fifth",
    Fraction(1, 4): "a quarter",
    Fraction(1, 3): "a third",
    Fraction(2, 5): "two fifths",
    Fraction(1, 2): "half",
    Fraction(3, 5): "three fifths",
    Fraction(2, 3): "two thirds",
    Fraction(3, 4): "three quarters",
    Fraction(4, 5): "four fifths",
    Fraction(9, 10): "nine tenths",
}


def swept(name, column, *keys):
    """{setting: (mean, lowest, highest)} over the seeds of a committed sweep; see `sweeps.over_seeds`."""
    return sweeps.over_seeds(data.load_results(name), column, *keys)


def fraction(share):
    """The simple fraction nearest to a share of a whole, in words: 0.51 is "half".

    Raises ValueError when none is within 0.03.
    """
    nearest = min(FRACTIONS, key=lambda one: abs(one - share))
    if abs(nearest - share) > 0.03:
        raise ValueError(f"{share:.3f} is no simple fraction: say it in digits, or change the sentence")
    return FRACTIONS[nearest]


def fill(lesson, values, where="the lesson"):
    """Return a parsed lesson with its texts filled in and its claim cells, all of which hold, left out.

    `values` is what is known beside the claims, {name: value}. Raises `BuildError` for a claim that does not hold, for
    words that its text doesn't have, and for a `{{…}}` that can't be filled in.
    """
    names, cells = dict(values), []
    computed, used = {}, set()
    words = None  # what the text after a claim cell must say
    for cell in copy.deepcopy(lesson).cells:
        place = f"{where}, {cell.id}"
        if cell.metadata.lesson.get("role") == "claim":
            tree = _parsed(cell.source, "exec", "the claim cell is not Python", place)
            computed |= {name: place for name in bound_names(tree.body) if not name.startswith("_")}
            used |= _read(tree)
            words = [*(words or ()), *_messages(tree, place)]
            _run(tree, names, place)
            continue
        if cell.cell_type == "markdown":
            used |= {name for field in FIELD.findall(cell.source) for name in _read(_field(field, place))}
            cell.source = FIELD.sub(lambda match, place=place: _filled(match[1], names, place), cell.source)
            _say(words or (), cell.source, place)
        elif words is not None:
            raise BuildError(f"{place}: a claim cell stands right before the text that it holds.")
        words = None
        cells.append(cell)
    unused = [f"{name} ({place})" for name, place in computed.items() if name not in used]
    if unused:
        raise BuildError(
            f"A claim cell computes {', '.join(unused)}, and nothing uses it. Did words take the place of a {{{{…}}}}?"
        )
    return type(lesson)(lesson, cells=cells)


def _messages(tree, place):
    """The words that the assertions of a claim cell hold."""
    messages = [node.msg for node in ast.walk(tree) if isinstance(node, ast.Assert)]
    if not all(isinstance(message, ast.Constant) and isinstance(message.value, str) for message in messages):
        raise BuildError(f"{place}: each assertion ends with the words of the text that it holds, in quotes.")
    return [message.value for message in messages]


def _run(tree, names, place):
    try:
        exec(compile(tree, place, "exec"), names)
    except AssertionError as error:
        raise BuildError(f'{place}: it no longer holds that "{error}". Change the sentence and its claim.') from error
    except Exception as error:
        raise BuildError(f"{place}: the claim cell stopped with {type(error).__name__}: {error}") from error


def _say(words, text, place):
    text = " ".join(text.split())
    for said in words:
        if not re.search(rf"(?<!\w){re.escape(said)}(?!\w)", text):
            raise BuildError(
                f'{place}: the text lacks "{said}", which the claim above it holds. Change both or neither.'
            )


def _parsed(source, mode, complaint, place):
    try:
        return ast.parse(source, mode=mode)
    except SyntaxError as error:
        raise BuildError(f"{place}: {complaint}: {error.msg}.") from error


def _field(field, place):
    return _parsed(_f_string(field), "eval", f"{{{{{field}}}}} is not what can stand in an f-string", place)


def _filled(field, names, place):
    try:
        return eval(_f_string(field), names)
    except NameError as error:
        known = ", ".join(sorted(name for name in names if not name.startswith("_")))
        raise BuildError(f"{place}: nothing is known as {error.name} in {{{{{field}}}}}; known are {known}.") from error
    except Exception as error:
        raise BuildError(f"{place}: {{{{{field}}}}} stopped with {type(error).__name__}: {error}") from error


def _f_string(field):
    return f"f'''{{{' '.join(field.split())}}}'''"


def _read(tree):
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)}
