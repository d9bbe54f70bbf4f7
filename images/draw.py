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


def draw_sft():
    """One row of SFT: which tokens carry loss, and which weights that loss trains."""
    canvas = Canvas(900, 330)
    prompt = ["<|bos|>", "<|user|>", "Say it like a sailor: …", "<|end|>", "<|assistant|>"]
    answer = ["Ahoy!", "Anden be hauling …", "<|end|>"]
    x, spans = 24, []
    for words, face, edge in ((prompt, FROZEN, EDGE), (answer, tint(FLOW, 0.25), FLOW)):
        left = x
        for word in words:
            width = 18 + 6.9 * len(word)
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
    canvas.box(middle - 156, 152, 312, 36, face=tint(FLOW, 0.25), edge=FLOW)
    canvas.text(middle, 170, "loss: the mean over the answer's tokens", size=11)
    canvas.arrow((middle, 152), (middle, 118))
    canvas.box(middle - 156, 62, 312, 56, face=tint(READING), edge=READING)
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


PICTURES = {
    "adapter.png": draw_adapter,
    "score_matrix.png": draw_score_matrix,
    "sft.png": draw_sft,
    "packing.png": draw_packing,
    "preference.png": draw_preference,
}


def draw_all(folder):
    """Draw every picture into `folder`."""
    for name, draw in PICTURES.items():
        draw().save(pathlib.Path(folder) / name)


if __name__ == "__main__":
    draw_all(pathlib.Path(__file__).parent)
