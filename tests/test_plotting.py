"""Figures: what stands on them, and that a notebook keeps their text."""

import base64
import html
import io
import math
import re

import numpy
import pytest
import torch

from course_utils import plotting

SCORES = [[0.034, 0.98], [0.5, 1.0]]


@pytest.fixture
def figures():
    """The three kinds of figure, closed afterwards."""
    import matplotlib.pyplot as plt

    yield {
        "matrix": plotting.score_matrix(SCORES, ["base", "sailor"], ["mood", "sailor"], "Adapters learn their task"),
        "curves": plotting.curves(
            {"a": ([0, 1], [1, 0.5]), "b": ([0, 2], [1, 0.5])}, "Both end alike", "step", "loss (nats)"
        ),
        "weights": plotting.weight_picture({"B": numpy.ones((64, 4)), "A": -2 * numpy.ones((4, 64))}, "Thin strips"),
    }
    plt.close("all")


def texts(fig):
    import matplotlib.text

    return [text.get_text() for text in fig.findobj(matplotlib.text.Text) if text.get_text()]


def test_titles_and_labels(figures):
    assert {"Adapters learn their task", "base", "sailor", "mood", "3%", "98%", "50%", "100%"} <= set(
        texts(figures["matrix"])
    )
    assert {"Both end alike", "step", "loss (nats)", "a", "b"} <= set(texts(figures["curves"]))
    assert {"Thin strips", "B\n64 × 4\n±1", "A\n4 × 64\n±2"} <= set(texts(figures["weights"]))


def test_score_matrix_shows_rows_as_rows_and_has_a_fixed_scale(figures):
    (image,) = figures["matrix"].axes[0].images
    assert numpy.array_equal(image.get_array(), SCORES) and image.get_clim() == (0, 1)


def test_score_matrix_refuses_names_that_do_not_fit():
    with pytest.raises(ValueError, match=r"\(2, 2\); 1 rows and 2 columns"):
        plotting.score_matrix(SCORES, ["base"], ["mood", "sailor"], "x")


def test_lines_differ_in_colour_style_and_marker():
    fig = plotting.curves({str(i): ([0, 1], [i, i]) for i in range(4)}, "t", "x", "y")
    lines = fig.axes[0].lines
    assert [line.get_color().upper() for line in lines] == list(plotting.COLORS)
    assert len({line.get_linestyle() for line in lines}) == len({line.get_marker() for line in lines}) == 4
    assert not fig.axes[0].get_legend()
    labels = {text.get_text(): text for text in fig.axes[0].texts}
    assert all(labels[str(i)].get_color() == lines[i].get_color() for i in range(4))
    plotting.show(fig, "closed")


def test_labels_of_lines_that_end_alike_do_not_overlap():
    ends = {"full": 0.200, "rank 8": 0.201, "rank 64": 0.2005, "rank 1": 0.9}
    fig = plotting.curves({name: ([0, 1], [1.5, end]) for name, end in ends.items()}, "t", "x", "y")
    fig.canvas.draw()
    boxes = {text.get_text(): text.get_window_extent() for text in fig.axes[0].texts}
    in_order = [boxes[name] for name in sorted(ends, key=ends.get)]
    assert all(below.y1 <= above.y0 + 1 for below, above in zip(in_order, in_order[1:]))
    assert all(box.x1 <= fig.bbox.x1 + 1 for box in boxes.values())
    plotting.show(fig, "closed")


def test_spread_keeps_order_and_leaves_room():
    assert plotting._spread([0.0, 5.0], gap=1) == [0.0, 5.0]
    assert plotting._spread([1.0, 1.0, 1.0], gap=1) == [0.0, 1.0, 2.0]
    rng = numpy.random.default_rng(0)
    for _ in range(50):
        spread = plotting._spread(sorted(rng.random(6)), gap=0.2)
        assert all(b - a >= 0.2 - 1e-9 for a, b in zip(spread, spread[1:]))


def test_weight_picture_has_a_scale_around_zero_for_each_matrix_and_takes_tensors(figures):
    import torch

    limits = {axes.get_xlabel(): axes.images[0].get_clim() for axes in figures["weights"].axes}
    assert limits == {"B\n64 × 4\n±1": (-1.0, 1.0), "A\n4 × 64\n±2": (-2.0, 2.0)}
    fig = plotting.weight_picture({"W": torch.full((3, 3), 0.5, dtype=torch.bfloat16, requires_grad=True)}, "t")
    assert fig.axes[0].images[0].get_array().max() == 0.5
    plotting.show(fig, "closed")
    with pytest.raises(ValueError, match=r"bias has the shape \(3,\)"):
        plotting.weight_picture({"bias": numpy.zeros(3)}, "t")


def test_a_thin_matrix_has_its_label_right_below_it(figures):
    upright, flat = figures["weights"].axes
    figures["weights"].canvas.draw()
    for axes, rows in ((upright, 64), (flat, 4)):
        foot = axes.transData.transform((0, rows - 0.5))[1]
        assert 0 < foot - axes.xaxis.label.get_window_extent().y1 < 0.1 * axes.get_window_extent().height


def test_matrices_and_weights_are_shown_with_a_text_that_says_them(capsys):
    plotting.show_matrix({"base": {"a": 0, "b": 0.5}, "tuned": {"a": 1, "b": 0.25}}, "Tuning helps", "task", "model")
    plotting.show_weights({"B": numpy.ones((64, 4)), "A": -2 * numpy.ones((4, 64))}, "Thin strips")
    matrix, weights = capsys.readouterr().out.splitlines()
    assert matrix == "Tuning helps. Matrix of scores, model by task. base: a 0%, b 50%; tuned: a 100%, b 25%."
    assert weights.startswith("Thin strips. ") and weights.endswith(": B, 64 × 4, ±1; A, 4 × 64, ±2.")


def test_drawing_leaves_other_figures_alone_until_asked(figures):
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        plotting.curves({"a": ([0, 1], [0, 1])}, "t", "x", "y")
        assert matplotlib.rcParams["axes.spines.top"]
        plotting.use_style()
        assert not matplotlib.rcParams["axes.spines.top"]
        assert [entry["color"].upper().lstrip("#") for entry in matplotlib.rcParams["axes.prop_cycle"]] == [
            color.lstrip("#") for color in plotting.COLORS
        ]


# ---------------------------------------------------------------------------------------------- show


@pytest.fixture
def shown(monkeypatch):
    """What reaches the notebook."""
    import IPython
    import IPython.display

    bundles = []
    monkeypatch.setattr(IPython, "get_ipython", lambda: object())
    monkeypatch.setattr(IPython.display, "display", lambda data, raw: bundles.append(data))
    return bundles


def test_show_gives_a_picture_with_its_text_and_closes_the_figure(figures, shown):
    import matplotlib.image
    import matplotlib.pyplot as plt

    alt = 'Scores < 5% for "base" & 98% for sailor: é'
    open_before = len(plt.get_fignums())
    plotting.show(figures["matrix"], alt)
    assert len(plt.get_fignums()) == open_before - 1
    (bundle,) = shown
    assert bundle["text/plain"] == alt
    found = re.fullmatch(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]*)">', bundle["text/html"])
    assert html.unescape(found[1]) == alt
    picture = matplotlib.image.imread(io.BytesIO(base64.b64decode(found[2])))
    assert picture.shape[0] > 100 and picture.shape[1] > 100 and picture[..., :3].std() > 0.05


def test_the_same_figure_is_the_same_bytes(shown):
    for _ in range(2):
        plotting.show(plotting.curves({"a": ([0, 1], [0, 1])}, "t", "x", "y"), "a line")
    assert shown[0] == shown[1]


@pytest.mark.parametrize("alt", ["", "  \n"])
def test_show_refuses_a_figure_without_text(alt, figures):
    with pytest.raises(ValueError, match="alt"):
        plotting.show(figures["matrix"], alt)


def test_show_prints_the_text_outside_a_notebook(figures, capsys):
    plotting.show(figures["curves"], "two lines that meet")
    assert capsys.readouterr().out == "two lines that meet\n"


def test_a_notebook_keeps_the_text_and_shows_the_figure_once():
    import nbformat
    from nbclient import NotebookClient

    code = f"""
import sys
sys.path.insert(0, {str(plotting.STYLE_FILE.parent.parent)!r})
from course_utils import plotting
plotting.use_style()
fig = plotting.curves({{"a": ([0, 1], [0, 1])}}, "t", "x", "y")
plotting.show(fig, "a line going up")
"""
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(notebook, timeout=200, kernel_name="python3").execute()
    (output,) = notebook.cells[0].outputs
    assert set(output.data) == {"text/html", "text/plain"} and 'alt="a line going up"' in output.data["text/html"]


def test_table_is_markdown_and_survives_bars_and_line_breaks(capsys):
    plotting.table(["a", "b"], [["1|2", "x\ny"]])
    assert capsys.readouterr().out.splitlines() == ["| a | b |", "| --- | --- |", "| 1\\|2 | x<br>y |"]


def test_table_keeps_a_shape_on_one_line(capsys):
    plotting.table(["shape", "factor"], [["256 × 64", "2 × as fast"]])
    assert capsys.readouterr().out.splitlines()[-1] == "| 256\N{NO-BREAK SPACE}×\N{NO-BREAK SPACE}64 | 2 × as fast |"


def test_table_refuses_a_row_of_another_length():
    with pytest.raises(ValueError, match="1 cells and the header 2"):
        plotting.table(["a", "b"], [["1"]])


# ---------------------------------------------------------------------------------------------- token_strip

ROW = ("<|user|>a<\n<|end|><|assistant|>", "Tobin <b>&<|end|>")  # without loss, with loss


def row_of(tokenizer):
    asked, answered = (tokenizer(part)["input_ids"] for part in ROW)
    return asked + answered, [-100] * len(asked) + answered


def test_token_strip_marks_tokens_with_loss_in_text_and_not_by_colour_alone(tiny_tokenizer, shown):
    plotting.token_strip(tiny_tokenizer, *row_of(tiny_tokenizer))
    (bundle,) = shown
    # A byte is a token here, and so is each special token: 6 in the question, 11 in the answer.
    assert bundle["text/plain"] == (
        "11 of 17 tokens carry loss; they stand between ⟦ and ⟧.\n<|user|>a<↵<|end|><|assistant|>⟦Tobin <b>&<|end|>⟧"
    )
    page = bundle["text/html"]
    before, marked, after = re.fullmatch(r"(.*)<b><mark[^>]*>⟦(.*)⟧</mark></b>(.*)", page).groups()
    assert html.unescape(re.sub("<[^>]*>", "", marked)) == ROW[1]
    assert html.unescape(re.sub("<[^>]*>", "", before)).endswith("<|user|>a<↵<|end|><|assistant|>")
    assert "⟦" not in re.sub("<p>.*?</p>", "", before) and after == "</p>"
    assert page.count("<span") == len(row_of(tiny_tokenizer)[0]), "each token has an outline of its own"


def test_token_strip_follows_the_labels(tiny_tokenizer, capsys):
    import torch

    ids = tiny_tokenizer("abcd")["input_ids"]
    for labels, line in (
        (ids, "⟦abcd⟧"),
        ([-100] * 4, "abcd"),
        ([-100, ids[1], -100, ids[3]], "a⟦b⟧c⟦d⟧"),
    ):
        plotting.token_strip(tiny_tokenizer, torch.tensor(ids), torch.tensor(labels))
        assert capsys.readouterr().out.splitlines()[1] == line


@pytest.mark.parametrize("labels", [[-100], [[-100, 1]], []])
def test_token_strip_refuses_what_is_not_one_row(labels, tiny_tokenizer):
    with pytest.raises(ValueError, match="equally long"):
        plotting.token_strip(tiny_tokenizer, [1, 2] if labels != [[-100, 1]] else [[1, 2]], labels)


def test_token_strip_is_readable():
    """White on the strip's blue: a contrast of at least 4.5 (WCAG 2.1, success criterion 1.4.3)."""
    channels = [int(plotting.COLORS[0][place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    assert f"background: {plotting.COLORS[0]}; color: white" in plotting._MARKED
    assert 1.05 / (luminance + 0.05) >= 4.5


def test_labels_of_crowded_ends_are_apart_on_a_logarithmic_axis():
    series = {name: ([1, 2], [1.0, end]) for name, end in (("a", 0.010), ("b", 0.011), ("c", 0.012), ("d", 0.5))}
    figure = plotting.curves(series, "Ends", "step", "loss", log_y=True)
    axes = figure.axes[0]
    low, high = (math.log(limit) for limit in axes.get_ylim())
    heights = sorted(math.log(text.xy[1]) for text in axes.texts)
    assert axes.get_yscale() == "log" and min(b - a for a, b in zip(heights, heights[1:])) > 0.07 * (high - low)


def test_the_text_of_curves_has_their_ends_and_some_points_between():
    series = {"a": (list(range(1, 101)), [step / 10 for step in range(1, 101)]), "b": ([5], [2.0])}
    text = plotting.describe(series, "Rising", "step", "loss", points=3)
    assert text == "Rising. loss by step: a: 0.1 at 1, 5.1 at 51, 10 at 100; b: 2 at 5."


def test_curves_are_shown_with_marked_places_and_their_text(figures, monkeypatch):
    shown = []
    monkeypatch.setattr(plotting, "show", lambda fig, alt: shown.append((fig, alt)))
    plotting.show_curves({"a": ([1, 4, 64], [1, 2, 3])}, "Two\nlines", "rank", "score", ticks=(1, 4, 64), log=2)
    ((figure, alt),) = shown
    axes = figure.axes[0]
    assert axes.get_xscale() == "log" and [tick.get_text() for tick in axes.get_xticklabels()] == ["1", "4", "64"]
    assert alt == "Two lines. score by rank: a: 1 at 1, 2 at 4, 3 at 64."


def test_estimates_of_memory_are_bars_of_their_parts_in_gb(figures, capsys):
    from adapter_checks.memory import MemoryEstimate

    plotting.show_memory({"LoRA": MemoryEstimate(16_000_000_000, 500_000_000, 1_000_000_000, 0)}, "Most", "of a Llama")
    assert capsys.readouterr().out.strip() == (
        "Most. GB, of a Llama. LoRA: weights 16, gradients 0.5, optimizer 1, activations 0, in all 17.5."
    )


def test_the_losses_of_a_trainer_are_told_by_their_kind(capsys):
    history = [
        {"step": 5, "loss": "3.0"},
        {"step": 5, "eval_loss": 2.0},
        {"step": 10, "loss": 1.0},
        {"step": 10, "train_runtime": 7.0},
    ]
    plotting.show_losses(history, "Both fall")
    told = capsys.readouterr().out.strip()
    assert told == "Both fall. loss (nats a token) by step: training: 3 at 5, 1 at 10; validation: 2 at 5."
    plotting.show_losses(history[::2], "It falls", "loss")
    assert capsys.readouterr().out.strip() == "It falls. loss by step: training: 3 at 5, 1 at 10."


def test_pictures_stand_in_rows_under_their_columns():
    red, blue = (numpy.full((4, 4, 3), colour, numpy.uint8) for colour in ((255, 0, 0), (0, 0, 255)))
    figure = plotting.picture_rows({"first": [red, blue, red], "second": [blue]}, "Reds and blues", ("a", "b", "c"))
    shown = [[image.get_array()[0, 0].tolist() for image in axes.images] for axes in figure.axes]
    assert shown == [[[255, 0, 0]], [[0, 0, 255]], [[255, 0, 0]], [[0, 0, 255]], [], []]
    labels = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert labels == ["first", "second"] and figure.axes[1].get_title() == "b"
    assert figure.get_suptitle() == "Reds and blues" and not figure.axes[4].axison


# ---------------------------------------------------------------------------------------- stacked_bars and spectra


def test_stacked_bars_put_parts_side_by_side_and_say_them():
    bars = {"all": {"weights": 16.0, "optimizer": 32.0}, "LoRA": {"weights": 16.2, "optimizer": 0.3}}
    figure, alt = plotting.stacked_bars(bars, "LoRA needs less", "GB")
    axes = figure.axes[0]
    boxes = sorted((round(bar.get_y()), round(bar.get_x(), 9), round(bar.get_width(), 9)) for bar in axes.patches)
    assert boxes == [(0, 0, 16), (0, 16, 32), (1, 0, 16.2), (1, 16.2, 0.3)]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["all", "LoRA"] and axes.yaxis_inverted()
    written = {text.get_text().strip() for text in axes.texts}
    assert written == {"16", "32", "48", "16.2", "16.5"}, "a part too narrow for its number has none"
    assert (
        alt
        == "LoRA needs less. GB. all: weights 16, optimizer 32, in all 48; LoRA: weights 16, optimizer 0.3, in all 16.5."
    )


def test_a_narrow_part_has_a_shorter_number():
    bars = {"all": {"weights": 16.13, "optimizer": 81.2}, "QLoRA": {"weights": 5.87, "optimizer": 0.2}}
    figure, _ = plotting.stacked_bars(bars, "QLoRA needs less", "GB")
    figure.draw_without_rendering()
    axes = figure.axes[0]
    number = next(text for text in axes.texts if text.get_text() == "5.9")
    bar = next(bar for bar in axes.patches if bar.get_width() == 5.87)
    assert number.get_window_extent().width < bar.get_window_extent().width
    assert "16.1" in {text.get_text() for text in axes.texts}


def test_stacked_bars_refuse_bars_of_other_parts():
    with pytest.raises(ValueError, match="the same parts, in the same order"):
        plotting.stacked_bars({"a": {"x": 1, "y": 2}, "b": {"y": 2, "x": 1}}, "t", "GB")


def test_spectra_are_relative_and_a_label_looks_alike_in_all_panels():
    values = numpy.array([4.0, 2.0, 1.0])
    panels = {"q_proj": {"reading": [values, 2 * values], "sailor": [values]}, "v_proj": {"sailor": [values]}}
    figure, alt = plotting.spectra(panels, "They fall\nsteeply")
    first, second = figure.axes[:2]
    assert all(line.get_ydata().tolist() == [1, 0.5, 0.25] for line in [*first.lines, *second.lines])
    assert len(first.lines) == 3 and [axes.get_visible() for axes in figure.axes] == [True, True, False, False]
    assert second.lines[0].get_color() == first.lines[2].get_color() != first.lines[0].get_color()
    assert [text.get_text() for text in first.get_legend().get_texts()] == ["reading", "sailor"]
    assert second.get_legend() is None
    assert alt == "They fall steeply. Singular values, a panel for each of q_proj, v_proj; lines are reading, sailor."


def test_levels_stand_below_the_histogram_at_their_place():
    values, formats = numpy.linspace(-1, 1, 50), {"two": torch.tensor([-1.0, 1.0]), "three": [-0.5, 0, 0.5]}
    fig, alt = plotting.levels(values, formats, "Levels", "weight")
    top, bottom = fig.axes
    assert sum(patch.get_height() for patch in top.patches) == 50
    assert [list(line.get_xdata()) for line in bottom.lines] == [[-1, 1], [-0.5, 0, 0.5]]
    assert [label.get_text() for label in bottom.get_yticklabels()] == ["two", "three"]
    assert "two: -1.00, 1.00; three: -0.50, 0.00, 0.50" in alt


def test_a_staircase_orders_both_alike_and_shows_each_error():
    weights, read_back = torch.tensor([0.4, -1.0, 1.0]), torch.tensor([0.5, -1.0, 1.0])
    fig, alt = plotting.staircase(weights, read_back, "Three weights")
    dots, steps = fig.axes[0].lines
    assert list(dots.get_ydata()) == pytest.approx([-1, 0.4, 1]) and list(steps.get_ydata()) == pytest.approx(
        [-1, 0.5, 1]
    )
    assert len(dots.get_xdata()) == 3 and dots.get_marker() != steps.get_marker()
    errors = fig.axes[0].collections[-1].get_segments()
    assert [abs(segment[1][1] - segment[0][1]) for segment in errors] == pytest.approx([0, 0.1, 0])
    assert "steps at 3 levels" in alt and "largest error is 0.100" in alt


def test_no_label_of_a_curve_lies_on_the_x_axis():
    fig = plotting.curves({f"rank {n}": ([0, 1], [5, 0.01 * n]) for n in (1, 2, 3, 4)}, "t", "step", "loss")
    fig.canvas.draw()
    axes = fig.axes[0]
    bottom = axes.get_window_extent().y0
    assert len(axes.texts) == 4 and all(text.get_window_extent().y0 >= bottom for text in axes.texts)
