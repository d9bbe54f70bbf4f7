"""Figures in one style, with text in place of the picture for those who can't see it.

A figure is made by one of the functions below, or with matplotlib, and shown with `show(fig, alt)`.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import sys
from pathlib import Path

# Okabe-Ito, which people tell apart with any colour vision (https://jfly.uni-koeln.de/color/)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")

STYLE_FILE = Path(__file__).with_name("course.mplstyle")


def use_style() -> None:
    """Draw every later figure in the course's style."""
    import matplotlib.pyplot as plt

    plt.style.use(STYLE_FILE)


def show(fig, alt: str) -> None:
    """Show a figure with `alt` as its text, and close it.

    The picture goes into the notebook as an HTML image, which keeps its alt text in JupyterLab and in exported
    pages; metadata of a plain PNG output is lost there. Outside a notebook the text alone is printed.

    Raises ValueError if `alt` is empty.
    """
    if not alt.strip():
        raise ValueError("Give the figure a text: alt should say what it shows to somebody who can't see it.")
    import matplotlib.pyplot as plt

    picture = io.BytesIO()
    # Without the version of matplotlib in the file, the same figure is the same bytes.
    fig.savefig(picture, format="png", metadata={"Software": None})
    plt.close(fig)  # else the notebook shows it once more at the end of the cell
    source = base64.b64encode(picture.getvalue()).decode("ascii")
    image = f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{source}">'
    _display(alt, html=image)


def table(header, rows) -> None:
    """Show rows of cells under a header as a Markdown table; outside a notebook, print them.

    A line break or `|` in a cell is shown as such and doesn't break the table.
    Raises ValueError if a row has another number of cells than the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"A row has {len(row)} cells and the header {len(header)}: {row}")
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", "<br>") for cell in line) + " |" for line in lines
    )
    _display(text, markdown=text)


def token_strip(tokenizer, input_ids, labels) -> None:
    """Show the tokens of one row, and which of them carry loss; outside a notebook, print them.

    input_ids, labels: the row's token ids and labels, lists or tensors of shape (length,); loss falls on a token
    whose label isn't -100. Such tokens are bold, white on blue, and between ⟦ and ⟧, so that nobody needs the
    colour. A line break shows as ↵. Raises ValueError if the two aren't rows of one length.
    """
    ids, labels = (row.tolist() if hasattr(row, "tolist") else list(row) for row in (input_ids, labels))
    if len(ids) != len(labels) or any(isinstance(entry, (list, tuple)) for entry in ids + labels):
        raise ValueError(
            f"Give one row's input_ids and labels, equally long; these have {len(ids)} and {len(labels)} entries."
        )
    supervised = [label != -100 for label in labels]
    count = f"{sum(supervised)} of {len(ids)} tokens carry loss; they stand between ⟦ and ⟧."
    text, page = "", ""
    for carries_loss, group in itertools.groupby(zip(supervised, ids), key=lambda pair: pair[0]):
        tokens = [tokenizer.decode([token]).replace("\n", "↵") for _, token in group]
        spans = "".join(f'<span style="{_TOKEN}">{html.escape(token)}</span>' for token in tokens)
        text += f"⟦{''.join(tokens)}⟧" if carries_loss else "".join(tokens)
        page += f'<b><mark style="{_MARKED}">⟦{spans}⟧</mark></b>' if carries_loss else spans
    text = f"{count}\n{text}"
    _display(text, html=f'<p>{count}</p><p style="line-height: 1.8">{page}</p>')


def _display(text, **rich):
    """Show `text` in a notebook in its rich form, which is named by its kind; elsewhere print it."""
    if "IPython" not in sys.modules or sys.modules["IPython"].get_ipython() is None:
        print(text)
        return
    from IPython.display import display

    display({f"text/{kind}": form for kind, form in rich.items()} | {"text/plain": text}, raw=True)


# A token's outline shows where it ends; white space in it is kept.
_TOKEN = "border: 1px solid #999; border-radius: 3px; white-space: pre-wrap"
_MARKED = f"background: {COLORS[0]}; color: white"


def score_matrix(scores, rows, columns, title):
    """Scores from 0 to 1 as a grid of percentages; `scores` has the shape (len(rows), len(columns)).

    Raises ValueError for another shape.
    """
    import matplotlib.pyplot as plt
    import numpy

    scores = numpy.asarray(scores, dtype=float)
    if scores.shape != (len(rows), len(columns)):
        raise ValueError(f"scores has the shape {scores.shape}; {len(rows)} rows and {len(columns)} columns are named.")
    with plt.style.context(STYLE_FILE):
        fig, axes = plt.subplots(figsize=(2.2 + 0.95 * len(columns), 1.3 + 0.5 * len(rows)))
        axes.imshow(scores, vmin=0, vmax=1, aspect="auto")
        for row, column in numpy.ndindex(scores.shape):
            value = scores[row, column]
            axes.text(column, row, f"{value:.0%}", ha="center", va="center", color="white" if value > 0.6 else "black")
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        _title(fig, title)
    return fig


def show_matrix(scores, title, xlabel, ylabel) -> None:
    """Show scores from 0 to 1, {row: {column: score}}, as a `score_matrix` with named axes and a text that says them all."""
    columns = list(next(iter(scores.values())))
    fig = score_matrix([[line[column] for column in columns] for line in scores.values()], list(scores), columns, title)
    fig.axes[0].set(xlabel=xlabel, ylabel=ylabel)
    told = "; ".join(
        f"{row}: " + ", ".join(f"{column} {line[column]:.0%}" for column in columns) for row, line in scores.items()
    )
    show(fig, f"{title}. Matrix of scores, {ylabel} by {xlabel}. {told}.")


def curves(series, title, xlabel, ylabel, log_y=False):
    """Lines of `series`, {label: (x, y)}, each labelled at its end; xlabel and ylabel name the units.

    log_y: a logarithmic y axis, on which all y must be above 0.
    """
    import matplotlib.pyplot as plt

    with plt.style.context(STYLE_FILE):
        fig, axes = plt.subplots()
        if log_y:
            axes.set_yscale("log")
        ends = []
        for label, (x, y) in series.items():
            (line,) = axes.plot(x, y, markevery=max(1, len(x) // 12))
            ends.append((float(y[-1]), float(x[-1]), label, line.get_color()))
        # Where lines end close together, their labels are moved apart, and keep their order.
        ends.sort()
        scale = axes.yaxis.get_transform()  # to where heights on the page are differences
        low, high = scale.transform(axes.get_ylim())
        heights = scale.inverted().transform(
            _spread(list(scale.transform([end[0] for end in ends])), gap=0.075 * (high - low))
        )
        right = max(end[1] for end in ends)
        for height, (_, _, label, color) in zip(heights, ends):
            axes.annotate(
                label,
                (right, height),
                xytext=(8, 0),
                textcoords="offset points",
                color=color,
                va="center",
                annotation_clip=False,
            )
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        _title(fig, title)
    return fig


def _spread(heights, gap):
    """Move sorted heights apart to at least `gap`, around the middle of each crowd."""
    crowds = []  # each: [mean, number of members]
    for height in heights:
        crowds.append([height, 1])
        while len(crowds) > 1 and crowds[-1][0] - crowds[-2][0] < gap * (crowds[-1][1] + crowds[-2][1]) / 2:
            mean, count = crowds.pop()
            before = crowds[-1]
            before[0] = (before[0] * before[1] + mean * count) / (before[1] + count)
            before[1] += count
    return [mean + gap * (member - (count - 1) / 2) for mean, count in crowds for member in range(count)]


def weight_picture(matrices, title):
    """Weights of `matrices`, {name: 2-D array or tensor}, side by side; white is 0 and the darkest colour the largest weight.

    Each has a colour scale of its own, whose end stands below it: the change that an adapter makes is far smaller than
    the weight that it changes, and on one scale would be white. All are drawn at one size, so a low-rank factor
    shows as the thin strip that it is. Raises ValueError if one of them isn't 2-D.
    """
    import matplotlib.pyplot as plt
    import numpy
    from matplotlib.patches import Rectangle

    arrays = {name: _as_array(matrix) for name, matrix in matrices.items()}
    for name, array in arrays.items():
        if array.ndim != 2:
            raise ValueError(f"{name} has the shape {array.shape}; a matrix with two dimensions is needed.")
    tallest = max(len(array) for array in arrays.values())
    with plt.style.context(STYLE_FILE):
        widths = [max(array.shape[1], 0.3 * tallest) for array in arrays.values()]
        lines = title.count("\n") + 1
        fig, panels = plt.subplots(
            1,
            len(arrays),
            width_ratios=widths,
            squeeze=False,
            figsize=(7, 6.6 * tallest / sum(widths) + 0.9 + 0.2 * lines),
        )
        for axes, (name, array) in zip(panels[0], arrays.items()):
            largest = float(numpy.abs(array).max()) or 1.0
            axes.imshow(array, cmap="PuOr", vmin=-largest, vmax=largest, interpolation="nearest")
            rows, columns = array.shape
            # One scale for all: each panel is as tall as the tallest matrix, and the matrix stands at its top.
            width = max(columns, 0.3 * tallest)
            axes.set(xlim=((columns - width) / 2 - 0.5, (columns + width) / 2 - 0.5), ylim=(tallest - 0.5, -0.5))
            axes.add_patch(
                Rectangle((-0.5, -0.5), columns, rows, fill=False, edgecolor="black", linewidth=0.8, clip_on=False)
            )
            axes.set(xticks=[], yticks=[], xlabel=f"{name}\n{rows} × {columns}\n±{largest:.2g}")
            if rows < tallest:  # its label goes right below it, and not to the foot of the panel
                axes.xaxis.set_label_coords(columns / 2 - 0.5, rows - 0.5 + 0.03 * tallest, transform=axes.transData)
            axes.grid(False)
            axes.spines[:].set_visible(False)
        _title(fig, title)
    return fig


def show_weights(matrices, title) -> None:
    """Show `weight_picture` with a text that names each matrix, its size and its largest number."""
    fig = weight_picture(matrices, title)
    told = "; ".join(axes.get_xlabel().replace("\n", ", ") for axes in fig.axes)
    show(fig, f"{title}. Pictures of matrices, each with its size and the end of its colour scale: {told}.")


def _as_array(matrix):
    import numpy

    if hasattr(matrix, "detach"):
        matrix = matrix.detach().float().cpu()  # NumPy knows no bfloat16
    return numpy.asarray(matrix, dtype=float)


def picture_rows(rows, title, columns=()):
    """Small pictures in rows, {label: arrays of shape (height, width, 3)}; columns: what stands above each, if anything."""
    import matplotlib.pyplot as plt

    across = max(len(pictures) for pictures in rows.values())
    with plt.style.context(STYLE_FILE):
        # 7 inches are as wide as the other figures; a label takes a sixth of them.
        side = 5.6 / across
        fig, panels = plt.subplots(
            len(rows), across, squeeze=False, figsize=(7, side * len(rows) + (0.75 if columns else 0.55))
        )
        for axes_row, (label, pictures) in zip(panels, rows.items()):
            for axes in axes_row:
                axes.set_axis_off()
            for axes, picture in zip(axes_row, pictures):
                axes.imshow(picture, interpolation="nearest")
            axes_row[0].text(-0.12, 0.5, label, transform=axes_row[0].transAxes, ha="right", va="center", fontsize=9)
        for axes, name in zip(panels[0], columns):
            axes.set_title(name, fontsize=8, fontweight="normal", loc="center", pad=3)
        _title(fig, title)
    return fig


def _title(fig, title):
    """A sentence may be wider than the axes, so it stands at the left edge of the figure."""
    fig.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
