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
CARTRIDGES = {"reading": READING, "sailor": SAILOR, "extract": EXTRACT, "mood": "#8C6D00"}


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

    def arrow(self, *points, color=FLOW, line=1.8, head=11, dashed=False):
        """A line through the points, with a head at the last; if dashed, a straight one to the left or right."""
        if dashed:
            (start, y), (end, _) = points
            near = end + (14 if start > end else -14)
            self.axes.plot(
                [start, near], [y, y], color=color, linewidth=line, linestyle=(0, (4, 3)), marker="", zorder=1.5
            )
            points = ((near, y), (end, y))
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
        x, y = 36 + 111 * place, 82 if place == 0 else 60
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


def draw_low_rank():
    """A change of rank 1 with its numbers: a frozen matrix, plus a column times a row."""
    column, row = (2, 0, -1, 1, 3, -2), (1, 0, 2, -1, 0, 1, 3, 0)
    canvas = Canvas(900, 368)
    cell, top = 30, 236
    canvas.text(24, 343, "A change of rank 1", size=14, weight="bold", ha="left")
    canvas.text(
        24,
        320,
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
    canvas.text(300, bottom + 3 * cell, "+", size=20, weight="bold")
    # B and A stand at the sides of their product, as the factors of a multiplication table.
    grid(336, bottom, 1, 6, lambda y, x: column[y], edge=READING)
    canvas.text(351, bottom - 20, "B: 6", color=DARK_READING, weight="bold")
    grid(378, top + 12, 8, 1, lambda y, x: row[x], edge=READING)
    canvas.text(636, top + 27, "A: 8", color=DARK_READING, weight="bold", ha="left")
    grid(378, bottom, 8, 6, lambda y, x: column[y] * row[x], edge="#BBBBBB")
    canvas.text(378 + 4 * cell, bottom - 20, "the change BA: 6 × 8 = 48 numbers", color=QUIET)
    canvas.text(636, top - 15, "trained: 6 + 8 = 14 numbers", size=11, color=DARK_READING, ha="left")
    for line, text in enumerate(
        ("each number of the change is", "a number of B times one of A,", "for example 3 × 3 = 9")
    ):
        canvas.text(636, bottom + 3 * cell - 20 * line, text, size=10.5, color=QUIET, ha="left")
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


def draw_qlora():
    """One layer in QLoRA: what is stored, what is there for a moment, what is trained, and the ways of data and gradients."""
    canvas = Canvas(900, 440)
    left, right, lane, low, middle = 300, 560, 250, 84, 170
    # what is stored: a corner of the codes, each of which names one of 16 levels
    canvas.panel(left - 70, 314, right - left + 140, 112, face=PANEL)
    for row in range(4):
        for column in range(6):
            grey = 0.35 + 0.04 * ((7 * row + 5 * column + row * column) % 16)
            canvas.box(left - 54 + 16 * column, 339 + 16 * row, 14, 14, face=str(grey), corner=1, line=0)
    canvas.text(left + 60, 405, "W, stored in 4 bits", size=13, weight="bold", ha="left")
    canvas.text(left + 60, 381, "each number names one of 16 levels;", ha="left")
    canvas.text(left + 60, 362, "64 neighbours share a scale", ha="left")
    canvas.lock(left + 68, 336)
    canvas.text(left + 86, 335, "frozen", color=QUIET, ha="left")
    # what is there for a moment
    canvas.arrow((430, 314), (430, lane + 34), color=QUIET)
    canvas.text(444, 299, "read back", color=QUIET, ha="left")
    canvas.axes.add_patch(
        FancyBboxPatch(
            (left, lane - 32),
            right - left,
            64,
            boxstyle="round,pad=0,rounding_size=4",
            facecolor="white",
            edgecolor=EDGE,
            linewidth=1.4,
            linestyle=(0, (2, 2)),
            zorder=2,
        )
    )
    canvas.text(430, lane + 12, "W in 16 bits", size=13, weight="bold")
    canvas.text(430, lane - 12, "one layer at a time, then dropped", color=QUIET)
    # what is trained
    for x, name in ((left, "A"), (right - 80, "B")):
        canvas.box(x, low - 22, 80, 44, face=READING, edge=READING)
        canvas.text(x + 40, low, name, size=15, weight="bold", color="white")
    canvas.arrow((left + 80, low + 8), (right - 80, low + 8))
    canvas.text(430, low - 40, "in 16 or 32 bits: trained, with gradients and Adam's numbers", color=DARK_READING)
    # the ways of the data
    canvas.box(40, middle - 22, 70, 44, face=tint(FLOW), edge=FLOW)
    canvas.text(75, middle, "x", size=15, weight="bold")
    for y, start in ((lane + 10, left), (low + 8, left)):
        canvas.arrow((110, middle), (180, middle), (180, y), (start, y))
    canvas.arrow((right, lane + 10), (680, lane + 10), (680, middle + 13))
    canvas.arrow((right, low + 8), (680, low + 8), (680, middle - 13))
    canvas.axes.add_patch(Circle((680, middle), 13, facecolor="white", edgecolor=FLOW, linewidth=1.8, zorder=2))
    canvas.text(680, middle, "+", size=15, weight="bold")
    canvas.arrow((693, middle), (730, middle))
    canvas.box(730, middle - 22, 150, 44, face=tint(FLOW), edge=FLOW)
    canvas.text(805, middle, "h = Wx + s·BAx", size=12, weight="bold")
    # the ways of the gradients
    for y in (lane - 14, low - 10):
        canvas.arrow((664, y), (right, y), color=READING, dashed=True)
        canvas.arrow((left, y), (196, y), color=READING, dashed=True)
    canvas.arrow((right - 80, low - 10), (left + 80, low - 10), color=READING, dashed=True)
    for y, words, dashed, color in ((414, "data", False, FLOW), (388, "gradients", True, READING)):
        canvas.arrow((24, y), (74, y), color=color, dashed=dashed)
        canvas.text(84, y, words, ha="left")
    canvas.text(430, 196, "gradients pass through W and do not change it", color=DARK_READING)
    return canvas


def draw_sft():
    """One row of SFT: which tokens carry loss, and which weights that loss trains."""
    canvas = Canvas(900, 330)
    prompt = ["<|bos|>", "<|user|>", "Say it like a sailor: …", "<|end|>", "<|assistant|>"]
    answer = ["Ahoy!", "Anden be hauling …", "<|end|>"]
    x, spans = 24, []
    for words, face, edge in ((prompt, FROZEN, EDGE), (answer, tint(FLOW, 0.25), FLOW)):
        left = x
        for word in words:
            width = 22 + 7.2 * len(word)
            canvas.box(x, 226, width, 34, face=face, edge=edge)
            canvas.text(x + width / 2, 243, word)
            x += width + 4
        spans.append((left, x - 4))
    (asked, _), (answered, answered_end) = spans
    canvas.text(asked, 296, "the prompt: read as context", size=12, weight="bold", ha="left")
    canvas.text(answered, 296, "the answer: to be learned", size=12, weight="bold", ha="left")
    canvas.text(asked, 274, "label −100: no loss", color=QUIET, ha="left")
    canvas.text(answered, 274, "label: the token itself", color=QUIET, ha="left")
    middle = (answered + answered_end) / 2
    canvas.arrow((middle, 226), (middle, 188))
    canvas.box(middle - 164, 152, 328, 36, face=tint(FLOW, 0.25), edge=FLOW)
    canvas.text(middle, 170, "loss: the mean over the answer's tokens", size=11)
    canvas.arrow((middle, 152), (middle, 118))
    canvas.box(middle - 164, 62, 328, 56, face=tint(READING), edge=READING)
    canvas.text(middle, 100, "the adapter, A and B", size=12, weight="bold")
    canvas.text(middle, 78, "trained", color=DARK_READING)
    canvas.box(asked, 62, 300, 56)
    canvas.text(asked + 160, 100, "the base model, W", size=12, weight="bold")
    canvas.text(asked + 160, 78, "frozen", color=QUIET)
    canvas.lock(asked + 34, 82)
    canvas.text(
        asked, 30, "With completion_only_loss=False the prompt's tokens carry loss as well.", color=QUIET, ha="left"
    )
    return canvas


ROW_LENGTHS = (9, 3, 7, 5, 4, 8)  # of the rows that are padded, grouped and packed
ROW_COLORS = (FLOW, READING, SAILOR, EXTRACT, "#8C6D00", "#555555")


def draw_packing():
    """The same six rows in batches of three: padded, grouped by length, and packed."""
    canvas = Canvas(900, 250)
    for left, name, batches in (
        (24, "padded", ((0, 1, 2), (3, 4, 5))),
        (320, "grouped by length", ((0, 5, 2), (3, 4, 1))),
        (616, "packed", (((0, 1), (5, 4), (2, 3)),)),
    ):
        y, pads, places = 186, 0, 0
        canvas.text(left, 226, name, size=13, weight="bold", ha="left")
        for batch in batches:
            lines = [line if isinstance(line, tuple) else (line,) for line in batch]
            width = max(sum(ROW_LENGTHS[row] for row in line) for line in lines)
            for line in lines:
                x = left
                for row in line:
                    for _ in range(ROW_LENGTHS[row]):
                        color = ROW_COLORS[row]
                        canvas.box(x, y, 17, 17, face=tint(color, 0.45), edge=color, corner=2, line=1)
                        x += 20
                for _ in range(width - sum(ROW_LENGTHS[row] for row in line)):
                    canvas.box(x, y, 17, 17, face="white", edge="#BBBBBB", corner=2, line=1)
                    canvas.text(x + 8.5, y + 8.5, "×", color=QUIET)
                    x, pads = x + 20, pads + 1
                places += width
                y -= 22
            y -= 10
        canvas.text(
            left, 26, f"{places} places, {pads} of them pads" if pads else f"{places} places, no pads", ha="left"
        )
    return canvas


def draw_decide():
    """From a task to a way of working: five questions from top to bottom, each with its answers to the right."""
    questions = (
        ("Is a prompt with examples\ngood enough?", [("yes", "Stay with the prompt", "3", True)]),
        (
            "Are facts missing that change\nfrom week to week?",
            [("yes", "Look them up for the prompt", "3", True)],
        ),
        (
            "Does each row have\nthe right answer?",
            [
                ("yes", "SFT with LoRA", "2 to 4", False),
                ("no", "DPO on better and worse, or GRPO", "9", False),
            ],
        ),
        (
            "Do 16-bit weights and\nactivations fit into memory?",
            [
                ("yes", "LoRA", "4", False),
                ("no", "QLoRA, or more devices", "4, 5, 11", False),
            ],
        ),
        (
            "Will one served model\ndo this one task?",
            [
                ("yes", "Merge, prove, ship one folder", "7", False),
                ("no", "Keep adapters beside one base", "1, 8, 11", False),
            ],
        ),
    )
    canvas, step, left, right = Canvas(900, 550), 108, 24, 430
    for number, (question, answers) in enumerate(questions):
        y = 505 - step * number  # the middle of this row
        canvas.box(left, y - 32, 320, 64, face=tint(FLOW, 0.12), edge=FLOW)
        canvas.text(left + 160, y, question, size=11.5, linespacing=1.5)
        for place, (said, way, lessons, ends) in enumerate(answers):
            height = y + (23 if len(answers) == 2 else 0) - 46 * place
            canvas.arrow((left + 320, height), (right, height))
            canvas.text((left + 320 + right) / 2 - 4, height + 10, said, color=QUIET)
            face, edge = (FROZEN, EDGE) if ends else (tint(READING), READING)
            canvas.box(right, height - 18, 446, 36, face=face, edge=edge)
            canvas.text(right + 14, height, way, size=11.5, ha="left", zorder=3)
            canvas.text(
                right + 434, height, f"lesson{'s' if len(lessons) > 1 else ''} {lessons}", color=QUIET, ha="right"
            )
        if number < len(questions) - 1:
            canvas.arrow((left + 160, y - 32), (left + 160, y - step + 32))
            canvas.text(left + 172, y - step / 2, "no" if answers[0][3] else "then", color=QUIET, ha="left")
    return canvas


PICTURES = {
    "adapter.png": draw_adapter,
    "score_matrix.png": draw_score_matrix,
    "preference.png": draw_preference,
    "olora.png": draw_olora,
    "merging.png": draw_merging,
    "combining.png": draw_combining,
    "low_rank.png": draw_low_rank,
    "memory_ladder.png": draw_memory_ladder,
    "qlora.png": draw_qlora,
    "sft.png": draw_sft,
    "packing.png": draw_packing,
    "decide.png": draw_decide,
}


def draw_all(folder):
    """Draw every picture into `folder`."""
    for name, draw in PICTURES.items():
        draw().save(pathlib.Path(folder) / name)


if __name__ == "__main__":
    draw_all(pathlib.Path(__file__).parent)
