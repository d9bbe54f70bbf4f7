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


PICTURES = {
    "adapter.png": draw_adapter,
    "score_matrix.png": draw_score_matrix,
    "preference.png": draw_preference,
    "qlora.png": draw_qlora,
}


def draw_all(folder):
    """Draw every picture into `folder`."""
    for name, draw in PICTURES.items():
        draw().save(pathlib.Path(folder) / name)


if __name__ == "__main__":
    draw_all(pathlib.Path(__file__).parent)
