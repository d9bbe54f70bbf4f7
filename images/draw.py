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


def draw_low_rank():
    """A change of rank 1 with its numbers: a frozen matrix, plus a column times a row."""
    column, row = (2, 0, -1, 1, 3, -2), (1, 0, 2, -1, 0, 1, 3, 0)
    canvas = Canvas(900, 330)
    cell, top = 30, 236
    canvas.text(24, 305, "A change of rank 1", size=14, weight="bold", ha="left")
    canvas.text(
        24,
        282,
        "each of its rows is a multiple of the row A: 14 numbers stand for 48",
        size=10.5,
        color=QUIET,
        ha="left",
    )

    def grid(left, bottom, columns, rows, numbers=None, face=FROZEN, edge="white"):
        for y in range(rows):
            for x in range(columns):
                place = left + x * cell, bottom + (rows - 1 - y) * cell
                value = numbers(y, x) if numbers else None
                shade = face if value is None else "white" if value == 0 else tint(READING, 0.1 + 0.07 * abs(value))
                canvas.axes.add_patch(
                    Polygon(
                        [(place[0] + a, place[1] + b) for a, b in ((0, 0), (cell, 0), (cell, cell), (0, cell))],
                        facecolor=shade,
                        edgecolor=edge,
                        linewidth=1,
                        zorder=2,
                    )
                )
                if value is not None:
                    canvas.text(place[0] + cell / 2, place[1] + cell / 2, f"{value}".replace("-", "\u2212"), zorder=3)

    bottom = top - 6 * cell
    grid(24, bottom, 8, 6)
    canvas.text(24 + 4 * cell, bottom + 3 * cell + 10, "W", size=22, weight="bold", zorder=3)
    canvas.lock(24 + 4 * cell - 28, bottom + 3 * cell - 20)
    canvas.text(24 + 4 * cell - 12, bottom + 3 * cell - 22, "frozen", size=11, color=QUIET, ha="left", zorder=3)
    canvas.text(24 + 4 * cell, bottom - 20, "6 × 8 = 48 numbers", color=QUIET)
    canvas.text(294, bottom + 3 * cell, "+", size=20, weight="bold")
    grid(324, bottom, 8, 6, lambda y, x: column[y] * row[x], edge="#BBBBBB")
    canvas.text(324 + 4 * cell, bottom - 20, "the change BA: 6 × 8 = 48 numbers", color=QUIET)
    canvas.text(586, bottom + 3 * cell, "=", size=20, weight="bold")
    grid(602, bottom, 1, 6, lambda y, x: column[y], edge=READING)
    canvas.text(617, bottom - 20, "B: 6", color=DARK_READING, weight="bold")
    grid(644, bottom + 5 * cell, 8, 1, lambda y, x: row[x], edge=READING)
    canvas.text(644 + 4 * cell, bottom + 5 * cell - 20, "A: 8", color=DARK_READING, weight="bold")
    canvas.text(644 + 4 * cell, bottom + 2 * cell, "trained: 6 + 8 = 14 numbers", size=11, color=DARK_READING)
    return canvas


RUNGS = (  # what to do, what it shrinks, what it costs
    ("LoRA, not all weights", "gradients, optimizer", "many new facts may not fit"),
    ("fewer rows at once, accumulated", "activations", "time: less is done at once"),
    ("gradient checkpointing", "activations", "a second forward pass"),
    ("the base in 4 bits (QLoRA)", "weights", "rounded weights; often time"),
    ("shorter rows", "activations", "the text that is cut"),
    ("a smaller model, or another GPU", "everything", "quality, or money"),
)


def draw_memory_ladder():
    """Six things to do when memory runs out, in order, as the rungs of a ladder."""
    canvas = Canvas(900, 400)
    canvas.text(24, 372, "When memory runs out, go up one rung at a time", size=14, weight="bold", ha="left")
    for x, head in ((100, "do this"), (448, "it shrinks"), (644, "it costs")):
        canvas.text(x, 340, head, size=10.5, color=QUIET, ha="left")
    for x in (34, 70):
        canvas.box(x - 4, 14, 8, 312, face=EDGE, edge=EDGE, corner=3, line=0, order=1)
    for number, (name, shrinks, costs) in enumerate(RUNGS):
        y = 20 + 51 * number
        canvas.box(26, y + 14, 52, 10, face=QUIET, edge=QUIET, corner=3, line=0)
        canvas.panel(88, y, 790, 40, face=tint(FLOW, 0.08 + 0.03 * number), edge="#CFCFCF")
        canvas.text(100, y + 20, f"{number + 1}   {name}", size=11.5, weight="bold", ha="left")
        canvas.text(448, y + 20, shrinks, size=11.5, ha="left")
        canvas.text(644, y + 20, costs, size=11.5, color=QUIET, ha="left")
    return canvas


PICTURES = {
    "adapter.png": draw_adapter,
    "score_matrix.png": draw_score_matrix,
    "preference.png": draw_preference,
    "low_rank.png": draw_low_rank,
    "memory_ladder.png": draw_memory_ladder,
}


def draw_all(folder):
    """Draw every picture into `folder`."""
    for name, draw in PICTURES.items():
        draw().save(pathlib.Path(folder) / name)


if __name__ == "__main__":
    draw_all(pathlib.Path(__file__).parent)
