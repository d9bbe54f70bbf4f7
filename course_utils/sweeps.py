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


def spread(group, form: str = ".0%") -> str:
    """A mean with its lowest and highest seed, "94% (92% to 95%)"; one number where all three look the same."""
    mean, low, high = (format(value, form) for value in group)
    return mean if mean == low == high else f"{mean} ({low} to {high})"


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


def _shown(value):
    return f"{value:,}" if isinstance(value, int) else str(value).replace("_", " ")


def trade_off(methods, columns, title: str, xlabel: str, ylabel: str, base: float | None = None):
    """(figure, its text): what runs cost against what they gain, a line for each method from its lowest setting to its highest.

    methods: {label: rows of a sweep}; columns: the names of the columns on the x axis, on the y axis, and of the setting,
    which stands beside each mark. A mark is a mean over the seeds. base: an x to mark with a line, before any training.
    """
    import matplotlib.pyplot as plt

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
                    f"{key:g}", (x[key], y[key]), xytext=(6, -11), textcoords="offset points", fontsize=9, color=color
                )
            points = ", ".join(f"{y[key]:.2g} and {x[key]:.3g} at {key:g}" for key in settings)
            told.append(f"{label}: {points}")
        if base is not None:
            axes.axvline(base, color="black", linewidth=1, linestyle=":")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.legend()
        plotting.write_title(figure, title)
    name = of_setting.replace("_", " ")
    return figure, f"{title}. {ylabel} and {xlabel} by {name}, means over the seeds: {'; '.join(told)}."


def curves(lines, title: str, xlabel: str, ylabel: str, log: int | None = None, log_y: bool = False):
    """(figure, its text): {label: {x: (mean, lowest, highest)}} as lines of means in bands from lowest to highest.

    x must ascend. log: the base of a logarithmic x axis, None for a linear one; log_y: a logarithmic y axis.
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
        if log == 2:  # ranks read better as themselves than as powers
            ticks = sorted({x for points in lines.values() for x in points})
            axes.set_xticks(ticks, ticks)
    told = "; ".join(
        f"{label}: " + ", ".join(f"{mean:.2g} at {x:g}" for x, (mean, _, _) in points.items())
        for label, points in lines.items()
    )
    return figure, f"{title}. {ylabel} by {xlabel}, means over the seeds: {told}."
