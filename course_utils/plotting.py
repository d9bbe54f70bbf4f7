"""Figures in one style, with text in place of the picture for those who can't see it.

A figure is made by one of the functions below, or with matplotlib, and shown with `show(fig, alt)`.
"""

from __future__ import annotations

import base64
import html
import io
import itertools
import re
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

    A line break or `|` in a cell is shown as such and doesn't break the table. A shape such as 256 × 64 stays on one line.
    Raises ValueError if a row has another number of cells than the header.
    """
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"A row has {len(row)} cells and the header {len(header)}: {row}")
    lines = [header, ["---"] * len(header), *rows]
    text = "\n".join("| " + " | ".join(map(_table_cell, line)) + " |" for line in lines)
    _display(text, markdown=text)


def _table_cell(cell) -> str:
    text = str(cell).replace("|", "\\|").replace("\n", "<br>")
    return re.sub(r"(?<=\d) × (?=\d)", "\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}", text)


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
        write_title(fig, title)
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
        gap = 0.075 * (high - low)
        places = _spread(list(scale.transform([end[0] for end in ends])), gap=gap)
        # The lowest stay above the x axis, too.
        heights = scale.inverted().transform([max(place, low + gap * (n + 0.5)) for n, place in enumerate(places)])
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
        write_title(fig, title)
    return fig


def describe(series, title, xlabel, ylabel, points=6) -> str:
    """The text of a figure of `curves`: the title, and each line at up to `points` places, the first and the last among them."""
    told = []
    for label, (x, y) in series.items():
        places = sorted({round(number * (len(x) - 1) / max(1, points - 1)) for number in range(points)})
        told.append(f"{label}: " + ", ".join(f"{float(y[place]):.2g} at {x[place]:g}" for place in places))
    return f"{title}. {ylabel} by {xlabel}: {'; '.join(told)}."


def show_curves(series, title, xlabel, ylabel, ticks=None, log=None) -> None:
    """Show `curves` with the text of `describe`. ticks: the x that are marked; log: the base of a logarithmic x axis."""
    fig = curves(series, title, xlabel, ylabel)
    axes = fig.axes[0]
    if log:
        axes.set_xscale("log", base=log)
    if ticks:
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    show(fig, describe(series, " ".join(title.split()), xlabel, ylabel))


def show_losses(history, title, ylabel="loss (nats a token)") -> None:
    """Show the training loss and the validation loss of a Trainer's `state.log_history`, on a logarithmic y axis."""
    logged = {"training": "loss", "validation": "eval_loss"}
    points = {label: {log["step"]: float(log[key]) for log in history if key in log} for label, key in logged.items()}
    series = {label: (list(of_step), list(of_step.values())) for label, of_step in points.items() if of_step}
    show(curves(series, title, "step", ylabel, log_y=True), describe(series, title, "step", ylabel))


def stacked_bars(bars, title, xlabel):
    """(figure, its text): a horizontal bar for each of `bars`, {name: {part: size}}, the first on top, its parts side by side.

    All have the same parts in the same order. A part is labelled where it is wide enough, and each bar with its sum.
    Raises ValueError if the parts differ.
    """
    import matplotlib.pyplot as plt

    parts = list(next(iter(bars.values())))
    if any(list(sizes) != parts for sizes in bars.values()):
        raise ValueError("Every bar needs the same parts, in the same order.")
    sums = {name: sum(sizes.values()) for name, sizes in bars.items()}
    with plt.style.context(STYLE_FILE):
        fig, axes = plt.subplots(figsize=(8, 1.5 + 0.55 * len(bars)))
        for place, sizes in enumerate(bars.values()):
            left = 0.0
            for part, color, hatch in zip(parts, COLORS, ("", "//", "..", "xx")):
                # White lines between the parts, and a pattern for each, so that they differ without colours.
                axes.barh(place, sizes[part], left=left, color=color, hatch=hatch, edgecolor="white", height=0.62,
                          label=part if place == 0 else None)  # fmt: skip
                share = sizes[part] / max(sums.values())
                if share > 0.05:
                    digits = 2 if share < 0.08 and sizes[part] < 100 else 3  # three would not fit into a narrow part
                    axes.text(left + sizes[part] / 2, place, f"{sizes[part]:.{digits}g}", ha="center", va="center",
                              color="black", bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.2})  # fmt: skip
                left += sizes[part]
            axes.text(left, place, f"  {left:.3g}", ha="left", va="center", fontweight="bold")
        axes.set_yticks(range(len(bars)), list(bars))
        axes.invert_yaxis()
        axes.grid(axis="y", visible=False)
        axes.set_xlim(0, 1.08 * max(sums.values()))
        axes.set_xlabel(xlabel)
        fig.legend(loc="outside lower right", ncols=len(parts), fontsize=10)
        write_title(fig, title)
    told = "; ".join(
        f"{name}: {', '.join(f'{part} {size:.2g}' for part, size in sizes.items())}, in all {sums[name]:.3g}"
        for name, sizes in bars.items()
    )
    return fig, f"{title}. {xlabel}. {told}."


def show_memory(estimates, title, what) -> None:
    """Show `adapter_checks.memory` estimates, {name: MemoryEstimate}, as `stacked_bars` in GB; `what` says of what they are."""
    bars = {
        name: {part: size / 1e9 for part, size in estimate.sizes().items() if part != "total"}
        for name, estimate in estimates.items()
    }
    show(*stacked_bars(bars, title, f"GB, {what}"))


def spectra(panels, title):
    """(figure, its text): singular values as lines, each divided by its first; a panel for each of {kind: {label: [values]}}.

    The values of a matrix come in descending order. A label has one colour and line style in all panels.
    """
    import matplotlib.pyplot as plt

    labels = list(dict.fromkeys(label for lines in panels.values() for label in lines))
    looks = dict(zip(labels, itertools.product(("-", "--"), COLORS)))
    columns = 4
    rows = -(-len(panels) // columns)
    with plt.style.context(STYLE_FILE):
        fig, grid = plt.subplots(rows, columns, figsize=(9, 0.6 + 2 * rows), sharex=True, sharey=True, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        shown = set()
        for axes, (kind, lines) in zip(grid.flat, panels.items()):
            for label, spectrum in lines.items():
                style, color = looks[label]
                for number, values in enumerate(spectrum):
                    once = label if number == 0 and label not in shown else None
                    axes.plot(values / values[0], style, color=color, marker="", linewidth=1.2, label=once)
            axes.set_title(kind, fontsize=11)
            if new := set(lines) - shown:
                shown |= new
                axes.legend(fontsize=9)
        fig.supxlabel("direction, strongest first", fontsize=11)
        fig.supylabel("strength, the strongest = 1", fontsize=11)
        write_title(fig, title)
    text = f"{title}. Singular values, a panel for each of {', '.join(panels)}; lines are {', '.join(labels)}."
    return fig, text.replace("\n", " ")


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
            figsize=(7, 6.6 * tallest / sum(widths) + 1.0 + 0.25 * lines),
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
            axes.set(xticks=[], yticks=[], anchor="N", xlabel=f"{name}\n{rows} × {columns}\n±{largest:.2g}")
            if rows < tallest:  # its label goes right below it, and not to the foot of the panel
                axes.xaxis.set_label_coords(columns / 2 - 0.5, rows - 0.5 + 0.03 * tallest, transform=axes.transData)
            axes.grid(False)
            axes.spines[:].set_visible(False)
        write_title(fig, title)
    return fig


def show_weights(matrices, title) -> None:
    """Show `weight_picture` with a text that names each matrix, its size and its largest number."""
    fig = weight_picture(matrices, title)
    told = "; ".join(axes.get_xlabel().replace("\n", ", ") for axes in fig.axes)
    show(fig, f"{title}. Pictures of matrices, each with its size and the end of its colour scale: {told}.")


def levels(values, formats, title, xlabel):
    """(figure, its text): a histogram of `values` from -1 to 1, and below it the levels of each of `formats`, {name: levels}."""
    import matplotlib.pyplot as plt

    with plt.style.context(STYLE_FILE):
        fig, (top, bottom) = plt.subplots(2, 1, sharex=True, height_ratios=(2, 1))
        top.hist(_as_array(values).ravel(), bins=120, range=(-1, 1), color="#999999")
        top.set(ylabel="how many", yticks=[])
        for place, marks in enumerate(formats.values()):
            color = COLORS[place % len(COLORS)]
            marks = _as_array(marks)
            bottom.plot(marks, [-place] * len(marks), "|", color=color, markersize=16, markeredgewidth=2)
        bottom.set(
            yticks=[-place for place in range(len(formats))],
            yticklabels=list(formats),
            ylim=(0.6 - len(formats), 0.6),
            xlabel=xlabel,
        )
        for axes in (top, bottom):
            axes.grid(False)
        write_title(fig, title)
    told = "; ".join(f"{name}: " + ", ".join(f"{mark:.2f}" for mark in marks) for name, marks in formats.items())
    return fig, f"{title}. A histogram, and below it the levels of {told}."


def staircase(weights, read_back, title):
    """(figure, its text): numbers in ascending order as dots, the levels that they are stored as, and the errors in between.

    weights, read_back: 1-D, of the same length; the numbers before and after quantising.
    """
    import matplotlib.pyplot as plt

    before, after = _as_array(weights), _as_array(read_back)
    order = before.argsort()
    before, after, places = before[order], after[order], range(len(order))
    with plt.style.context(STYLE_FILE):
        fig, axes = plt.subplots()
        axes.hlines(sorted(set(after)), 0, len(order) - 1, color="#DDDDDD", linewidth=1)
        axes.vlines(places, before, after, color="#999999", linewidth=1.5, label="error")
        for values, label, color, marker in ((before, "weight", COLORS[0], "o"), (after, "read back", COLORS[1], "s")):
            axes.plot(places, values, marker, color=color, markersize=3.5, linestyle="", label=label)
        axes.grid(False)
        axes.set(xlabel="weights of one block, in ascending order", ylabel="value")
        axes.legend(loc="upper left")
        write_title(fig, title)
    alt = (
        f"{title}. {len(order)} weights in ascending order from {before[0]:.2f} to {before[-1]:.2f}, and what is read back: "
        f"steps at {len(set(after))} levels. The largest error is {abs(after - before).max():.3f}."
    )
    return fig, alt


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
        write_title(fig, title)
    return fig


def write_title(fig, title) -> None:
    """A sentence may be wider than the axes, so it stands at the left edge of the figure."""
    fig.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
