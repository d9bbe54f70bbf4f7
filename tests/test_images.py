"""The drawn pictures: each is the script's own, can be read at page width, and shows the model as it is."""

import importlib.util
from itertools import combinations
from pathlib import Path

import matplotlib.image
import matplotlib.text
import numpy
import pytest

from tiny_models import make_tiny_tokenizer

FOLDER = Path(__file__).resolve().parent.parent / "images"
WIDTH = 900  # pixels of a page
SMALLEST_TEXT = 10  # pt at that width
LARGEST_FILE = 150_000  # bytes

# Loaded by its path, as it is run: the folder is no package.
_spec = importlib.util.spec_from_file_location("draw", FOLDER / "draw.py")
draw = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(draw)

each_picture = pytest.mark.parametrize("name", sorted(draw.PICTURES))


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    """A folder with all pictures, drawn just now."""
    folder = tmp_path_factory.mktemp("images")
    draw.draw_all(folder)
    return folder


def text_complaints(canvas):
    """What is wrong with the text of a picture: too small, cut at the edge, or over other text."""
    figure = canvas.figure
    figure.canvas.draw()
    texts = [text for text in figure.findobj(matplotlib.text.Text) if text.get_text().strip() and text.get_visible()]
    # Hidden axes still own their tick labels.
    ticks = set(canvas.axes.xaxis.findobj(matplotlib.text.Text) + canvas.axes.yaxis.findobj(matplotlib.text.Text))
    boxes = {text: text.get_window_extent() for text in texts if text not in ticks}
    found = []
    for text, box in boxes.items():
        if text.get_fontsize() * WIDTH / (figure.get_figwidth() * draw.PAGE_DPI) < SMALLEST_TEXT:
            found.append(f"too small: {text.get_text()}")
        if box.x0 < 0 or box.y0 < 0 or box.x1 > figure.bbox.x1 or box.y1 > figure.bbox.y1:
            found.append(f"cut: {text.get_text()}")
    for (one, first), (other, second) in combinations(boxes.items(), 2):
        # Neighbours on one line touch by a fraction of a pixel.
        if (
            min(first.x1, second.x1) - max(first.x0, second.x0) > 1
            and min(first.y1, second.y1) - max(first.y0, second.y0) > 1
        ):
            found.append(f"overlap: {one.get_text()} / {other.get_text()}")
    return found


def test_the_script_draws_every_picture_of_the_folder(drawn):
    committed = {path.name for path in FOLDER.iterdir() if path.is_file() and path.suffix != ".py"}
    assert committed == {path.name for path in drawn.iterdir()}


@each_picture
def test_the_committed_picture_is_the_one_that_the_script_draws(drawn, name):
    committed, new = (matplotlib.image.imread(folder / name) for folder in (FOLDER, drawn))
    assert committed.shape == new.shape
    # One changed word is 5 in 10,000 pixels; another platform may round the edges of letters otherwise.
    differing = (numpy.abs(committed - new).max(axis=-1) > 0.2).mean()
    assert differing < 1e-4, "Run `python images/draw.py` and commit what it draws."


@each_picture
def test_the_same_bytes_are_drawn_again(drawn, tmp_path, name):
    draw.draw_all(tmp_path)
    assert (tmp_path / name).read_bytes() == (drawn / name).read_bytes()


@each_picture
def test_a_picture_is_small_and_stands_on_opaque_white(name):
    picture = matplotlib.image.imread(FOLDER / name)
    assert (FOLDER / name).stat().st_size < LARGEST_FILE
    assert picture.shape[1] == WIDTH * draw.SHARPNESS
    assert picture.shape[-1] == 3 or (picture[..., 3] == 1).all()
    edges = numpy.concatenate([picture[0], picture[-1], picture[:, 0], picture[:, -1]])
    assert (edges == 1).all()


@each_picture
def test_text_is_large_enough_whole_and_apart(name):
    assert text_complaints(draw.PICTURES[name]()) == []


def test_complaints_about_text_are_made():
    canvas = draw.Canvas(900, 200)
    canvas.text(450, 100, "tiny", size=9)
    canvas.text(895, 100, "at the edge")
    canvas.text(100, 50, "one over")
    canvas.text(120, 52, "the other")
    assert text_complaints(canvas) == ["too small: tiny", "cut: at the edge", "overlap: one over / the other"]


def test_the_adapter_picture_shows_the_models_blocks_and_linear_layers():
    from torch import nn

    from pretraining.model import build_model

    model = build_model(make_tiny_tokenizer(), hidden=64, intermediate=64)
    assert len(model.model.layers) == draw.BLOCKS
    for part, rows in (("self_attn", draw.ATTENTION), ("mlp", draw.MLP)):
        real = {
            name
            for name, module in getattr(model.model.layers[0], part).named_children()
            if isinstance(module, nn.Linear)
        }
        assert {name for row in rows for name in row} == real


def test_the_adapter_picture_offers_shipped_adapters():
    from pretraining.adapters import SHIPPED

    assert set(draw.CARTRIDGES) <= set(SHIPPED)
