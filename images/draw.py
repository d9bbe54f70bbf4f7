"""Draws every picture in this folder, beside itself:

    python images/draw.py

The same version of matplotlib draws the same bytes.
"""

import json
import pathlib

import matplotlib.colors
import matplotlib.style
from matplotlib.figure import Figure
from matplotlib.patches import Arc, Circle, FancyArrowPatch, FancyBboxPatch, Polygon
from matplotlib.path import Path

from course_utils.plotting import COLORS, STYLE_FILE

# Blue is what flows through the model, grey what is frozen; the adapters have a colour each.
FLOW, READING, SAILOR, EXTRACT = COLORS
DARK_READING = "#A84A00"  # for words, which need more contrast with white
INK, QUIET, EDGE, FROZEN, PANEL = "#222222", "#595959", "#8C8C8C", "#E0E0E0", "#F5F5F5"

MEASURED = pathlib.Path(__file__).parent.parent / "models" / "measured.json"

# Lengths are pixels of a page, stored twice as fine. 10 pt, the smallest text, is 13.3 of them.
PAGE_DPI, SHARPNESS = 96, 2

# As in the course's model, from the bottom up: an adapter sits beside each linear layer of each block.
BLOCKS = 4
ATTENTION = [["q_proj", "k_proj", "v_proj"], ["o_proj"]]
MLP = [["gate_proj", "up_proj"], ["down_proj"]]
CARTRIDGES = {"reading": READING, "sailor": SAILOR, "extract": EXTRACT}


class Canvas:
    """A white page of `width` × `height` pixels, and the few shapes that pictures are made of."""

    def __init__(self, width, height):
        with matplotlib.style.context(STYLE_FILE):
            self.figure = Figure(figsize=(width / PAGE_DPI, height / PAGE_DPI), layout="none", facecolor="white")
            self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
        self.axes.set_axis_off()

    def save(self, path):
        """Write the PNG file, without the version of matplotlib and packed as small as goes."""
        packing = {"compress_level": 9, "compress_type": 0}
        self.figure.savefig(path, dpi=PAGE_DPI * SHARPNESS, metadata={"Software": None}, pil_kwargs=packing)

    def text(self, x, y, words, size=10, color=INK, ha="center", **style):
        self.axes.text(x, y, words, fontsize=size, color=color, ha=ha, va="center_baseline", **style)

    def panel(self, x, y, width, height, face="white", edge=EDGE, corner=8, order=1):
        """A large box that others stand in; wedges and arrows pass over it."""
        self.box(x, y, width, height, face, edge, corner, order=order)

    def box(self, x, y, width, height, face=FROZEN, edge=EDGE, corner=4, line=1.2, order=2):
        """A box with round corners; (x, y) is its lower left one."""
        shape = f"round,pad=0,rounding_size={corner}"
        self.axes.add_patch(
            FancyBboxPatch(
                (x, y), width, height, boxstyle=shape, facecolor=face, edgecolor=edge, linewidth=line, zorder=order
            )
        )

    def wedge(self, *corners):
        """Leads from a thing to the same thing enlarged."""
        self.axes.add_patch(Polygon(corners, facecolor="black", alpha=0.07, linewidth=0, zorder=1.2))

    def arrow(self, *points, color=FLOW, line=1.8, head=11):
        """A line through the points, with a head at the last."""
        self.axes.add_patch(
            FancyArrowPatch(
                path=Path(points),
                arrowstyle="-|>",
                mutation_scale=head,
                color=color,
                linewidth=line,
                joinstyle="miter",
                capstyle="butt",
                snap=False,
                zorder=1.5,
            )
        )

    def lock(self, x, y, color=QUIET):
        """A closed padlock, its middle at (x, y)."""
        self.axes.add_patch(Arc((x, y + 1), 10, 15, theta1=0, theta2=180, edgecolor=color, linewidth=2.2, zorder=3))
        self.box(x - 8, y - 10, 16, 12, face=color, edge=color, corner=2, line=0, order=3)


def tint(color, share=0.15):
    """The colour, mixed with white."""
    return tuple(1 - share * (1 - part) for part in matplotlib.colors.to_rgb(color))


def draw_adapter():
    """What an adapter is and where it sits: the model, one of its blocks, one linear layer; and three to choose from."""
    canvas = Canvas(900, 580)
    for x, title, more in (
        (24, "Where adapters sit", "one beside each linear layer of each block"),
        (512, "What each one is", "two thin matrices beside a frozen one"),
    ):
        canvas.text(x, 555, title, size=14, weight="bold", ha="left")
        canvas.text(x, 530, more, size=10.5, color=QUIET, ha="left")
    _model(canvas)
    _block(canvas)
    _linear_layer(canvas)
    _cartridges(canvas)
    return canvas


def _model(canvas):
    canvas.panel(24, 158, 124, 342, face=PANEL)
    names = ["embedding", *(f"block {number}" for number in range(1, BLOCKS + 1)), "head"]
    for place, name in enumerate(names):
        y = 204 + 48 * place
        canvas.box(35, y, 90, 32)
        canvas.text(80, y + 16, name)
        if place:
            canvas.arrow((80, y - 16), (80, y), line=1.5, head=9)
        if name.startswith("block"):
            _tab(canvas, 125, y + 16, 20)
    canvas.lock(46, 184)
    canvas.text(60, 183, "base model", color=QUIET, ha="left")


def _tab(canvas, x, y, height):
    """A small adapter at the right edge of a layer."""
    canvas.box(x + 1.5, y - height / 2, 9, height, face=READING, edge=READING, corner=2, line=0)


def _block(canvas):
    left, width, third = 188, 284, 204 + 48 * 3
    canvas.wedge((138, third + 32), (left, 500), (left, 158), (138, third))
    canvas.panel(left, 158, width, 342)
    canvas.text(left + 14, 477, "block 3", size=10.5, weight="bold", ha="left")
    for name, rows, bottom in (("attention", ATTENTION, 172), ("MLP", MLP, 322)):
        canvas.panel(left + 12, bottom, width - 24, 134, face=PANEL, edge="#CFCFCF", corner=6, order=1.1)
        canvas.text(left + 24, bottom + 118, name, color=QUIET, ha="left")
        for height, row in zip((12, 64), rows):
            slot = 34 + 8 * max(map(len, row))
            start = left + width / 2 - (len(row) * slot - 12) / 2
            for place, linear in enumerate(row):
                x = start + place * slot - 3
                canvas.box(x, bottom + height, slot - 18, 32)
                canvas.text(x + slot / 2 - 9, bottom + height + 16, linear)
                _tab(canvas, x + slot - 18, bottom + height + 16, 20)


def _linear_layer(canvas):
    left, bottom, width, height = 512, 44, 364, 456
    canvas.wedge((450, 216), (left, 500), (left, bottom), (450, 184))
    canvas.panel(left, bottom, width, height)
    frozen, middle, adapter = left + 96, left + 182, left + 268
    # x, and the two ways that it takes
    canvas.arrow((middle, 82), (middle, 112), (frozen, 112), (frozen, 184))
    canvas.arrow((middle, 82), (middle, 112), (adapter, 112), (adapter, 150))
    canvas.box(middle - 60, 56, 120, 26, face=tint(FLOW), edge=FLOW)
    canvas.text(middle, 69, "x", size=13, weight="bold")
    canvas.text(middle + 72, 69, "d numbers", color=QUIET, ha="left")
    # the frozen one
    canvas.box(frozen - 70, 184, 140, 140, corner=3)
    canvas.text(frozen, 270, "W", size=22, weight="bold")
    canvas.text(frozen, 240, "d × d", size=11)
    canvas.lock(frozen - 32, 208)
    canvas.text(frozen - 18, 206, "frozen", size=11, color=QUIET, ha="left")
    # the adapter
    canvas.box(adapter - 70, 150, 140, 14, face=READING, edge=READING, corner=2, line=0)
    canvas.arrow((adapter, 164), (adapter, 206))
    canvas.box(adapter - 7, 206, 14, 140, face=READING, edge=READING, corner=2, line=0)
    canvas.text(adapter + 14, 134, "A", size=15, weight="bold", ha="left")
    canvas.text(adapter + 37, 134, "r × d", size=11, ha="left")
    canvas.text(adapter + 18, 286, "B", size=15, weight="bold", ha="left")
    canvas.text(adapter + 18, 264, "d × r", size=11, ha="left")
    canvas.text(adapter + 18, 326, "trained", size=11, color=DARK_READING, ha="left")
    canvas.text(adapter + 10, 184, "r numbers", color=QUIET, ha="left")
    # their sum
    canvas.arrow((frozen, 324), (frozen, 420), (middle - 13, 420))
    canvas.arrow((adapter, 346), (adapter, 372))
    canvas.arrow((adapter, 396), (adapter, 420), (middle + 13, 420))
    canvas.box(adapter - 20, 372, 40, 24, face="white", edge=READING, corner=12, line=1.6)
    canvas.text(adapter, 384, "× s", size=11)
    canvas.axes.add_patch(Circle((middle, 420), 13, facecolor="white", edgecolor=FLOW, linewidth=1.8, zorder=2))
    canvas.text(middle, 420, "+", size=15, weight="bold")
    canvas.arrow((middle, 433), (middle, 456))
    canvas.box(middle - 110, 456, 220, 32, face=tint(FLOW), edge=FLOW)
    canvas.text(middle + 14, 472, "h  =  Wx  +", size=14, weight="bold", ha="right")
    canvas.text(middle + 26, 472, "s·B(Ax)", size=14, weight="bold", color=DARK_READING, ha="left")
    canvas.text(left + width, 24, "Not to scale: the rank r is far smaller than d.", color=QUIET, ha="right")


def _cartridges(canvas):
    canvas.box(46, 152, 80, 10, face=QUIET, edge=QUIET, corner=2, line=0)
    for place, (name, color) in enumerate(CARTRIDGES.items()):
        x, y = 36 + 124 * place, 82 if place == 0 else 60
        for pin in range(5):
            canvas.box(x + 22 + 12 * pin, y + 56, 7, 20, face="#C9A227", corner=1, line=0, order=1)
        canvas.box(x, y, 100, 58, face=tint(color), edge=color, corner=6, line=2)
        canvas.text(x + 50, y + 28, name, size=11.5, weight="bold")
    canvas.text(24, 24, 'One is active. set_adapter("sailor") plugs in another.', ha="left")


def draw_score_matrix():
    """What each adapter can do, as it was measured when the shipped ones were made: one skill each."""
    measured = json.loads(MEASURED.read_text(encoding="utf-8"))
    matrix, rows_scored = measured["matrix"], measured["matrix_rows"]
    canvas = Canvas(900, 340)
    left, top, width, height = 250, 236, 150, 44
    canvas.text(24, 312, "One base model, four skills", size=14, weight="bold", ha="left")
    canvas.text(
        24,
        288,
        f"share of {rows_scored} held-out rows of each task answered exactly right, with each adapter plugged in",
        size=10.5,
        color=QUIET,
        ha="left",
    )
    tasks = list(matrix["none"])
    for column, task in enumerate(tasks):
        canvas.text(left + (column + 0.5) * width, top + 18, task, size=11, weight="bold")
    for row, (adapter, scores) in enumerate(matrix.items()):
        y = top - (row + 1) * height
        label = "base model alone" if adapter == "none" else f"with the {adapter} adapter"
        canvas.text(left - 16, y + height / 2, label, size=11, ha="right")
        for column, task in enumerate(tasks):
            own = adapter == task
            face = tint(READING, 0.08 + 0.62 * scores[task]) if scores[task] else "white"
            canvas.box(
                left + column * width + 2,
                y + 2,
                width - 4,
                height - 4,
                face=face,
                edge=READING if own else "#CFCFCF",
                line=2.4 if own else 1,
            )
            canvas.text(
                left + (column + 0.5) * width,
                y + height / 2,
                f"{100 * scores[task]:.0f}%",
                size=12,
                weight="bold" if own else "normal",
            )
    return canvas


def draw_preference():
    """Four ways from data to a model: SFT, then a reward model and reinforcement learning, or DPO without the two in between."""
    canvas = Canvas(900, 340)
    for y, name in ((248, "RLHF"), (92, "DPO")):
        canvas.text(14, y, name, size=14, ha="left", weight="bold")
    _step(canvas, 96, 170, "prompts with\none reply each", "SFT", "gives a start", FLOW)
    for x, target in ((300, (352, 248)), (300, (352, 92))):
        canvas.arrow((x, 170), (326, 170), (326, target[1]), target)
    _step(
        canvas,
        352,
        248,
        "pairs: a better and\na worse reply",
        "reward model",
        "gives a reply its score",
        SAILOR,
        width=230,
    )
    canvas.arrow((582, 248), (638, 248))
    _step(
        canvas,
        638,
        248,
        "replies that the\nmodel draws",
        "reinforcement learning",
        "the trained model",
        EXTRACT,
        width=248,
    )
    _step(canvas, 352, 92, "the same pairs", "DPO", "gives the trained model in one step", READING, width=534)
    return canvas


def _step(canvas, x, y, data, method, result, color, width=204):
    """A stage of training around the height y: what it learns from, its name, and what comes out."""
    canvas.panel(x, y - 62, width, 124, face=tint(color), edge=color)
    canvas.text(x + width / 2, y + 30, data, color=QUIET)
    canvas.text(x + width / 2, y - 8, method, size=13, weight="bold")
    canvas.text(x + width / 2, y - 38, result)


def draw_olora():
    """What OLoRA does to a layer: a part of the weight goes into the adapter, and what is left of the weight is another one."""
    canvas = Canvas(900, 330)
    side, thin, bottom = 150, 26, 118
    left, middle, right = 40, 352, 640
    taken, kept = tint(READING, 0.75), FROZEN
    # Before: the whole weight. The stripe on its left is what OLoRA takes out.
    canvas.box(left, bottom, side, side, face=kept)
    canvas.box(left, bottom, thin, side, face=taken, line=0, order=2.1)
    canvas.text(left + side / 2, bottom + side + 24, "W", size=13, weight="bold")
    canvas.text(left + side / 2, bottom - 24, "the base model's weight")
    canvas.arrow((left + side + 22, bottom + side / 2), (middle - 30, bottom + side / 2))
    canvas.text((left + side + middle) / 2 - 4, bottom + side / 2 + 20, "QR decomposition", size=10.5)
    # After: two thin matrices, and a weight with a gap.
    canvas.box(middle, bottom, thin, side, face=taken)
    canvas.box(middle + 44, bottom + side - thin, side, thin, face=taken)
    canvas.text(middle + thin / 2, bottom + side + 24, "B", size=13, weight="bold")
    canvas.text(middle + 44 + side / 2, bottom + side + 24, "A", size=13, weight="bold")
    canvas.text(middle + 97, bottom - 24, "the adapter, which is trained")
    canvas.text(right - 50, bottom + side / 2, "+", size=18)
    canvas.box(right, bottom, side, side, face=kept)
    canvas.box(right, bottom, thin, side, face="white", order=2.1)
    canvas.text(right + side / 2, bottom + side + 24, "W − s·BA", size=13, weight="bold")
    canvas.text(right + side / 2, bottom - 24, "the moved base, which is frozen")
    canvas.text(
        24,
        46,
        "At first both together compute what W did. With the adapter off, a part of W is missing,",
        ha="left",
        size=11,
    )
    canvas.text(24, 22, "and an adapter that was trained on W meets another weight.", ha="left", size=11)
    return canvas


def draw_merging():
    """The states of a model with an adapter: beside the weights or in them, PEFT's layers there or gone; and the calls that lead from one to another."""
    canvas = Canvas(900, 400)
    left, right, upper, lower, width, height = 158, 598, 222, 34, 278, 116
    for x, weights in ((left, "weights: W"), (right, "weights: W + s·BA")):
        canvas.text(x + width / 2, upper + height + 26, weights, size=13, weight="bold")
    for y, first, second in ((upper, "PEFT's layers", "are there"), (lower, "a plain model,", "no PEFT")):
        canvas.text(14, y + height / 2 + 10, first, size=11, color=QUIET, ha="left")
        canvas.text(14, y + height / 2 - 10, second, size=11, color=QUIET, ha="left")
    for x, y, merged, beside in (
        (left, upper, False, True),
        (right, upper, True, True),
        (left, lower, False, False),
        (right, lower, True, False),
    ):
        _state(canvas, x, y, width, height, merged, beside)
    across = (left + width, right)
    canvas.arrow((across[0] + 4, upper + 84), (across[1] - 4, upper + 84))
    canvas.text(sum(across) / 2, upper + 98, "merge_adapter()")
    canvas.arrow((across[1] - 4, upper + 44), (across[0] + 4, upper + 44))
    canvas.text(sum(across) / 2, upper + 58, "unmerge_adapter()")
    canvas.text(sum(across) / 2, upper + 30, "back, up to rounding", color=QUIET)
    for x in (left + 70, right + width - 70):
        canvas.arrow((x, upper - 4), (x, lower + height + 4))
        canvas.text(x + 10, (upper + lower + height) / 2, "unload()", ha="left")
    start, end, gap = left + width - 30, right + 60, (upper + lower + height) / 2
    canvas.arrow((start, upper - 4), (start, gap), (end, gap), (end, lower + height + 4), color=READING)
    canvas.text((start + end) / 2, gap + 15, "merge_and_unload()", color=DARK_READING, weight="bold")
    return canvas


def _state(canvas, x, y, width, height, merged, beside):
    """A model in a box: its weight matrix, with the change in it or not, and the adapter's two matrices if they are there."""
    canvas.panel(x, y, width, height, face=PANEL)
    middle = x + width / 2 - (40 if beside else 0)
    canvas.box(
        middle - 60, y + 18, 120, 80, face=tint(READING, 0.35) if merged else FROZEN, edge=READING if merged else EDGE
    )
    canvas.text(middle, y + 58, "W + s·BA" if merged else "W", size=14, weight="bold")
    if beside:
        canvas.box(middle + 84, y + 24, 62, 10, face=READING, edge=READING, corner=2, line=0)
        canvas.box(middle + 110, y + 46, 10, 50, face=READING, edge=READING, corner=2, line=0)
        canvas.text(middle + 154, y + 29, "A", size=11, weight="bold", ha="left")
        canvas.text(middle + 128, y + 70, "B", size=11, weight="bold", ha="left")


def draw_combining():
    """What cat does: the columns of B side by side and the rows of A below each other, so that the product is the sum of both changes."""
    canvas = Canvas(900, 300)
    canvas.text(
        20,
        274,
        'combination_type="cat" stacks two adapters of rank 8 into one of rank 16',
        size=14,
        weight="bold",
        ha="left",
    )
    base = 60
    for x, name, number, color in ((40, "reading", "1", READING), (250, "extract", "2", EXTRACT)):
        _factors(canvas, x, base, [(color, number)])
        canvas.text(x + 73, 26, f"{name}: s{number}·B{number}A{number}", size=11)
    canvas.text(218, base + 75, "+", size=20, weight="bold")
    canvas.text(430, base + 75, "=", size=20, weight="bold")
    _factors(canvas, 470, base, [(READING, "1"), (EXTRACT, "2")])
    canvas.text(556, 26, "both: BA, with scaling 1", size=11)
    for line, words in enumerate(
        (
            "Weights and scalings are",
            "multiplied into the numbers.",
            "",
            "B1 meets only A1, and B2",
            "only A2, so the product is",
            "the sum of both changes.",
        )
    ):
        if words:
            canvas.text(680, base + 126 - 20 * line, words, ha="left", color=QUIET)
    return canvas


def _factors(canvas, x, y, parts):
    """B as columns and, to its right, A as rows, of one adapter or of several that are stacked."""
    for place, (color, number) in enumerate(parts):
        canvas.box(x + 24 * place, y, 22, 150, face=color, edge=color, corner=2, line=0)
        canvas.text(x + 24 * place + 11, y + 75, f"B{number}", size=10, weight="bold", color="white")
        right, top = x + 24 * len(parts) + 14, y + 128 - 24 * place
        canvas.box(right, top, 110, 22, face=color, edge=color, corner=2, line=0)
        canvas.text(right + 55, top + 11, f"A{number}", size=10, weight="bold", color="white")


PICTURES = {
    "adapter.png": draw_adapter,
    "score_matrix.png": draw_score_matrix,
    "preference.png": draw_preference,
    "olora.png": draw_olora,
    "merging.png": draw_merging,
    "combining.png": draw_combining,
}


def draw_all(folder):
    """Draw every picture into `folder`."""
    for name, draw in PICTURES.items():
        draw().save(pathlib.Path(folder) / name)


if __name__ == "__main__":
    draw_all(pathlib.Path(__file__).parent)
