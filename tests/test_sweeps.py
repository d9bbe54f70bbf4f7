"""Results of sweeps, grouped and shown with their spread."""

import pytest

from course_utils import sweeps

ROWS = [
    {"seed": seed, "rank": rank, "alpha": 16, "score": score}
    for rank, scores in ((1, (0.5, 0.25, 0.75)), (8, (1.0, 1.0, 1.0)))
    for seed, score in enumerate(scores)
]


def test_groups_are_over_the_seeds_alone():
    assert sweeps.over_seeds(ROWS, "score", "rank") == {1: (0.5, 0.25, 0.75), 8: (1.0, 1.0, 1.0)}
    assert sweeps.over_seeds(ROWS, "score", "rank", "alpha") == {(1, 16): (0.5, 0.25, 0.75), (8, 16): (1.0, 1.0, 1.0)}
    assert list(sweeps.over_seeds(ROWS[::-1], "score", "rank")) == [8, 1]
    with pytest.raises(ValueError, match="at least one column"):
        sweeps.over_seeds(ROWS, "score")


CURVES = [
    {"seed": 0, "loss_100": 0.1, "loss_5": 3.0, "loss_20": 0.4},
    {"seed": 1, "loss_100": 0.3, "loss_5": 1.0, "loss_20": 0.5},
]


def test_losses_go_by_step_and_not_by_name():
    assert sweeps.losses(CURVES) == {5: (2.0, 1.0, 3.0), 20: (0.45, 0.4, 0.5), 100: (0.2, 0.1, 0.3)}


def test_the_steps_to_a_loss_are_the_first_and_one_behind_the_last_if_never():
    assert sweeps.steps_to_loss(CURVES, 0.4) == (60.0, 20, 100)
    assert sweeps.steps_to_loss(CURVES, 1.0) == (12.5, 5, 20)
    assert sweeps.steps_to_loss(CURVES, 0.2) == (140.0, 100, 180)


def test_a_spread_is_shown_unless_it_is_below_the_digits():
    assert sweeps.spread((0.5, 0.25, 0.75)) == "50% (25%\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}75%)"
    assert sweeps.spread((0.951, 0.9509, 0.9511)) == "95%"
    assert sweeps.spread((1234.5, 1000, 1500), ",.0f") == "1,234 (1,000\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}1,500)"
    assert sweeps.spread((float("inf"),) * 3, ".2f") == "inf"


def test_curves_draw_the_mean_in_a_band_from_lowest_to_highest():
    import matplotlib.pyplot as plt

    lines = {"a": sweeps.over_seeds(ROWS, "score", "rank"), "b": {1: (0.1, 0.0, 0.2), 8: (0.3, 0.3, 0.3)}}
    figure, text = sweeps.curves(lines, "Rank helps", "rank", "score", log=2)
    axes = figure.axes[0]
    assert [list(line.get_ydata()) for line in axes.lines] == [[0.5, 1.0], [0.1, 0.3]]
    (band, _) = (collection.get_paths()[0].get_extents() for collection in axes.collections)
    assert (band.y0, band.y1) == (0.25, 1.0) and axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "8"]
    assert text == "Rank helps. score by rank, means over the seeds: a: 0.5 at 1, 1 at 8; b: 0.1 at 1, 0.3 at 8."
    plain, _ = sweeps.curves(lines, "Rank helps", "rank", "score")
    assert plain.axes[0].get_xscale() == "linear"
    crossed, text = sweeps.curves(lines, "Rank helps", "rank", "score", crosses={1: 0.4, 8: 0.9})
    assert list(crossed.axes[0].lines[-1].get_ydata()) == [0.4, 0.9]
    assert text.endswith("0.3 at 8. Crosses, one more run: 0.4 at 1, 0.9 at 8.")
    counted, _ = sweeps.curves({"a": {10: (0, 0, 0), 300: (1, 1, 1)}}, "More room", "adapters", "share", log=10)
    assert [tick.get_text() for tick in counted.axes[0].get_xticklabels()] == ["10", "300"]
    rates, _ = sweeps.curves({"a": {1e-4: (0, 0, 0), 1e-2: (1, 1, 1)}}, "A rate", "rate", "score", log=10)
    assert "0.0001" not in [tick.get_text() for tick in rates.axes[0].get_xticklabels()]
    plt.close("all")


def test_the_dial_draws_a_panel_for_each_pair_with_the_baseline_dashed():
    import matplotlib.pyplot as plt

    rows = [
        {"seed": seed, "pair": pair, "weight": weight, "first": 1 - weight, "second": weight}
        | {"first_alone": 1.0, "second_alone": 0.5, "first_noisy": 0.25, "second_noisy": 0.25}
        for seed in (0, 1)
        for pair in ("a+b", "a+c")
        for weight in (0.0, 0.5, 1.0)
    ]
    figure, text = sweeps.dial(rows, "Two\npairs")
    assert [axes.get_xlabel() for axes in figure.axes] == ["w: weight of b", "w: weight of c"]
    drawn = {line.get_linestyle(): list(line.get_ydata()) for line in figure.axes[1].lines[:2]}
    assert drawn == {"-": [1.0, 0.5, 0.0], "--": [1.0, 1.0, 1.0]}
    assert text.startswith(
        "Two pairs. Score by the weight of the second adapter: a+b, a: 100% at 0, 50% at 0.5, 0% at 1; a+b, a alone: "
    )
    other, text = sweeps.dial(rows, "Two pairs", "noisy")
    assert list(other.axes[0].lines[3].get_ydata()) == [0.25] * 3 and "a+c, c noisy: 25% at 0" in text
    plt.close("all")


def test_a_table_has_a_line_for_each_setting(capsys):
    sweeps.table(ROWS, ["rank", "alpha"], {"right": ("score", ".0%")})
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| rank | alpha | right |" and lines[2:] == [
        "| 1 | 16 | 50% (25%\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}75%) |",
        "| 8 | 16 | 100% |",
    ]
    sweeps.table(
        [{"seed": 0, "task_name": "all_linear", "n": 12345, "score": 1}], ["task_name", "n"], {"s": ("score", ".1f")}
    )
    assert capsys.readouterr().out.splitlines()[::2] == ["| task name | n | s |", "| all linear | 12,345 | 1.0 |"]


def test_settings_side_by_side_are_the_columns_in_their_own_units(capsys):
    lines = {"right": (ROWS, "score", ".0%"), "right, thousandths": (ROWS, "score", ",.0f", 1e-3)}
    sweeps.side_by_side(lines, "rank", {8: "rank eight", 1: "rank one"})
    assert capsys.readouterr().out.splitlines() == [
        "|  | rank eight | rank one |",
        "| --- | --- | --- |",
        "| right | 100% | 50% (25%\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}75%) |",
        "| right, thousandths | 1,000 | 500 (250\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}750) |",
    ]


def test_a_trade_off_follows_each_method_from_its_lowest_setting():
    import matplotlib.pyplot as plt

    rows = [
        {"seed": seed, "rate": rate, "lost": lost + seed, "score": score}
        for rate, lost, score in ((0.1, 4.0, 0.5), (0.01, 1.0, 0.25))
        for seed in (0, 1)
    ]
    figure, text = sweeps.trade_off({"a": rows}, ("lost", "score", "rate"), "Both grow", "nats lost", "right", base=1.5)
    axes = figure.axes[0]
    line, base = axes.lines
    assert (list(line.get_xdata()), list(line.get_ydata())) == ([1.5, 4.5], [0.25, 0.5])
    assert list(base.get_xdata()) == [1.5, 1.5] and [note.get_text() for note in axes.texts] == ["0.01", "0.1"]
    figure.canvas.draw()
    frame = axes.get_window_extent()
    for note in axes.texts:
        box = note.get_window_extent()
        assert frame.x0 < box.x0 < box.x1 < frame.x1 and frame.y0 < box.y0 < box.y1 < frame.y1, "cut by the frame"
    assert text == (
        "Both grow. right and nats lost by rate, means over the seeds: a: 0.25 and 1.5 at 0.01, 0.5 and 4.5 at 0.1."
    )
    plt.close("all")
