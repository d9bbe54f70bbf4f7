"""Results of sweeps, shown with their spread: what `data.load_results` gives, by setting, over the seeds."""

from __future__ import annotations

from collections import defaultdict

from course_utils import plotting


def over_seeds(rows, column: str, *keys: str) -> dict:
    """{setting: (mean, lowest, highest)} of a column, over the rows that share the setting.

    A setting is the value of the one key, or the tuple of the values of several, in the order of the rows.
    Raises ValueError without a key.
    """
    if not keys:
        raise ValueError("Name at least one column to group by.")
    groups = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys) if len(keys) > 1 else row[keys[0]]].append(row[column])
    return {setting: (sum(values) / len(values), min(values), max(values)) for setting, values in groups.items()}


def losses(rows) -> dict:
    """{step: (mean, lowest, highest)} of the columns loss_5, loss_10, … over these rows."""
    steps = sorted(int(column.removeprefix("loss_")) for column in rows[0] if column.startswith("loss_"))
    return {
        step: (sum(values) / len(values), min(values), max(values))
        for step in steps
        for values in [[row[f"loss_{step}"] for row in rows]]
    }


def steps_to_loss(rows, level: float) -> tuple:
    """(mean, lowest, highest) over these rows of the first step whose column loss_… is at most `level`.

    A row that never gets there counts as if it did one step behind its last.
    """
    steps = list(losses(rows))
    behind = 2 * steps[-1] - steps[-2]
    firsts = [min((step for step in steps if row[f"loss_{step}"] <= level), default=behind) for row in rows]
    return sum(firsts) / len(firsts), min(firsts), max(firsts)


def spread(group, form: str = ".0%") -> str:
    """A mean with its lowest and highest seed, "94% (92% to 95%)"; one number where all three look the same.

    The spaces in the brackets don't break, so that a narrow column keeps both numbers on one line.
    """
    mean, low, high = (format(value, form) for value in group)
    return mean if mean == low == high else f"{mean} ({low}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{high})"


def table(rows, keys, columns) -> None:
    """Show what each setting of a sweep came to: a line for each setting, with the spread over the seeds.

    keys: the columns that make the setting, shown first; columns: {header: (column, format)} of the results.
    """
    groups = {header: over_seeds(rows, column, *keys) for header, (column, _) in columns.items()}
    lines = [
        [
            *(_shown(value) for value in (setting if len(keys) > 1 else [setting])),
            *(spread(groups[header][setting], form) for header, (_, form) in columns.items()),
        ]
        for setting in next(iter(groups.values()))
    ]
    plotting.table([*(key.replace("_", " ") for key in keys), *columns], lines)


def side_by_side(lines, key: str, names) -> None:
    """Show what a few settings came to beside each other: a column for each of `names`, {value of `key`: header}.

    lines: {what: (rows of a sweep, column, format)}, or with a unit, by which the column is divided, as a fourth.
    """
    shown = []
    for what, (rows, column, form, *unit) in lines.items():
        groups = over_seeds(rows, column, key)
        scale = unit[0] if unit else 1
        shown.append([what, *(spread([value / scale for value in groups[name]], form) for name in names)])
    plotting.table(["", *names.values()], shown)


def _shown(value):
    return f"{value:,}" if isinstance(value, int) else str(value).replace("_", " ")


def trade_off(methods, columns, title: str, xlabel: str, ylabel: str, base: float | None = None):
    """(figure, its text): what runs cost against what they gain, a line for each method from its lowest setting to its highest.

    methods: {label: rows of a sweep}; columns: the names of the columns on the x axis, on the y axis, and of the setting,
    which stands beside each mark. A mark is a mean over the seeds. base: an x to mark with a line, before any training.
    """
    import matplotlib.pyplot as plt
    from matplotlib.patheffects import withStroke

    of_x, of_y, of_setting = columns
    told = []
    with plt.style.context(plotting.STYLE_FILE):
        figure, axes = plt.subplots()
        for (label, rows), mark, color in zip(methods.items(), "osD^", plotting.COLORS):
            x, y = (
                {key: mean for key, (mean, _, _) in over_seeds(rows, column, of_setting).items()}
                for column in (of_x, of_y)
            )
            settings = sorted(x)
            axes.plot([x[key] for key in settings], [y[key] for key in settings], marker=mark, color=color, label=label)
            for key in settings:
                axes.annotate(
                    f"{key:g}",
                    (x[key], y[key]),
                    xytext=(6, -11),
                    textcoords="offset points",
                    fontsize=9,
                    color=color,
                    path_effects=[withStroke(linewidth=2.5, foreground="white")],  # where a line crosses it
                    zorder=3,
                )
            points = ", ".join(f"{y[key]:.2g} and {x[key]:.3g} at {key:g}" for key in settings)
            told.append(f"{label}: {points}")
        if base is not None:
            axes.axvline(base, color="black", linewidth=1, linestyle=":")
        axes.margins(0.1)  # room for the settings beside the lowest and the last mark
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.legend()
        plotting.write_title(figure, title)
    name = of_setting.replace("_", " ")
    return figure, f"{title}. {ylabel} and {xlabel} by {name}, means over the seeds: {'; '.join(told)}."


def curves(lines, title: str, xlabel: str, ylabel: str, log: int | None = None, log_y: bool = False, crosses=None):
    """(figure, its text): {label: {x: (mean, lowest, highest)}} as lines of means in bands from lowest to highest.

    x must ascend. log: the base of a logarithmic x axis, None for a linear one; log_y: a logarithmic y axis.
    crosses: {x: y} of one more run, drawn as black crosses.
    """
    figure = plotting.curves(
        {label: (list(points), [mean for mean, _, _ in points.values()]) for label, points in lines.items()},
        title,
        xlabel,
        ylabel,
        log_y,
    )
    axes = figure.axes[0]
    for line, points in zip(axes.lines, lines.values()):
        _, low, high = zip(*points.values())
        axes.fill_between(list(points), low, high, color=line.get_color(), alpha=0.2, linewidth=0)
    if log:
        axes.set_xscale("log", base=log)
        ticks = sorted({x for points in lines.values() for x in points})
        # Ranks and counts read better as themselves than as powers.
        if log == 2 or all(isinstance(x, int) for x in ticks):
            axes.set_xticks(ticks, ticks)
            axes.set_xticks([], minor=True)
    told = "; ".join(
        f"{label}: " + ", ".join(f"{mean:.2g} at {x:g}" for x, (mean, _, _) in points.items())
        for label, points in lines.items()
    )
    text = f"{title}. {ylabel} by {xlabel}, means over the seeds: {told}."
    if crosses:
        axes.plot(list(crosses), list(crosses.values()), "kx", markersize=9)
        text += f" Crosses, one more run: {', '.join(f'{y:.2g} at {x:g}' for x, y in crosses.items())}."
    return figure, text


def dial(rows, title: str, baseline: str = "alone"):
    """(figure, its text): two skills by the weight w of the second, where the first has 1 - w; a panel for each pair.

    rows: of `experiments/dial.py` or `dial_control.py`, with the columns pair ("one+other"), weight, first, second, and
    first_BASELINE and second_BASELINE, which are dashed. Lines are means over the seeds.
    """
    import matplotlib.pyplot as plt

    pairs, told = list(dict.fromkeys(row["pair"] for row in rows)), []
    with plt.style.context(plotting.STYLE_FILE):
        figure, panels = plt.subplots(1, len(pairs), figsize=(1 + 3 * len(pairs), 3.8), sharey=True, squeeze=False)
        for axes, pair in zip(panels[0], pairs):
            of_pair = [row for row in rows if row["pair"] == pair]
            for column, name, color in zip(("first", "second"), pair.split("+"), plotting.COLORS):
                for part, style in ((column, "-"), (f"{column}_{baseline}", "--")):
                    means = {w: mean for w, (mean, _, _) in over_seeds(of_pair, part, "weight").items()}
                    axes.plot(list(means), list(means.values()), style, color=color, marker="o" if style == "-" else "")
                    label = name if part == column else f"{name} {baseline.replace('_', ' ')}"
                    told.append(f"{pair}, {label}: " + ", ".join(f"{mean:.0%} at {w:g}" for w, mean in means.items()))
            first, second = pair.split("+")
            corner = axes.get_yaxis_transform()  # x as a share of the panel, whatever weights there are
            axes.text(0.03, 1.04, first, transform=corner, color=plotting.COLORS[0])
            axes.text(0.97, 1.04, second, transform=corner, color=plotting.COLORS[1], ha="right")
            axes.set(xlabel=f"w: weight of {second}", ylim=(-0.03, 1.12))
        panels[0][0].set_ylabel("score, from 0 to 1")
        figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    return figure, f"{' '.join(title.split())}. Score by the weight of the second adapter: {'; '.join(told)}."
