"""Pictures of a coast, 32 × 32 pixels: six subjects in three styles, drawn by code, the same for the same seed.

A picture is a uint8 array of shape (32, 32, 3); models take them as float tensors of shape (n, 3, 32, 32) from -1 to 1.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

from adapter_checks.errors import InputError

SUBJECTS = ("boat", "house", "lantern", "lighthouse", "tree", "fish")
STYLES = ("day", "night", "ink")
NEW_SUBJECT = "windmill"  # in no picture of the pretraining, so that an adapter has something to learn
SIZE = 32
COLOURS = {
    "red": (205, 62, 52),
    "orange": (236, 140, 46),
    "yellow": (244, 205, 74),
    "green": (72, 148, 90),
    "blue": (58, 102, 178),
    "purple": (148, 84, 156),
    "white": (246, 244, 236),
}

_SCALE = 8  # drawn eight times as large, then averaged: edges come out smooth
_PAPER, _INK = (247, 241, 226), (34, 32, 44)
_SKIES = (
    ((150, 202, 238), (214, 236, 246)),
    ((122, 184, 230), (196, 226, 242)),
    ((176, 214, 240), (250, 232, 206)),
    ((196, 206, 232), (252, 214, 190)),
    ((160, 210, 222), (232, 242, 226)),
)
_NIGHTS = (((12, 18, 58), (48, 66, 128)), ((22, 16, 58), (86, 66, 128)), ((8, 26, 62), (36, 88, 126)))
_SEAS = ((64, 132, 184), (58, 150, 168), (84, 148, 202), (70, 160, 150))
_GROUNDS = ((124, 176, 92), (152, 186, 98), (196, 176, 124), (108, 160, 104), (216, 196, 144))
_HILLS = ((134, 172, 134), (150, 166, 176), (126, 158, 168), (164, 180, 128))
_WOODS = ((112, 74, 46), (92, 66, 60), (134, 92, 58))
_ROOFS = ((122, 66, 54), (84, 80, 96), (150, 84, 56), (96, 72, 60))
_LIGHT, _GLOW = (255, 240, 166), (255, 214, 92)


def draw(subject: str, style: str = "day", colour: str | None = None, seed: int = 0):
    """A picture of a subject. The same subject and seed give the same scene in each style and colour.

    colour: one of COLOURS, for the hull, the wall, the crown, ...; None draws one by the seed. Ink knows no colours.
    Raises InputError for a subject, style or colour that there is not.
    """
    import numpy
    from PIL import Image

    for value, known, kind in (
        (subject, (*SUBJECTS, NEW_SUBJECT), "subject"),
        (style, STYLES, "style"),
        (colour, (None, *COLOURS), "colour"),
    ):
        if value not in known:
            raise InputError(f"There is no {kind} {value!r}. Choose one of: {', '.join(filter(None, known))}.")
    rng = random.Random(f"{subject} {seed}")
    main = colour or rng.choice(colours_of(subject))
    canvas = _Canvas(style)
    _PAINTERS[subject](canvas, rng, COLOURS[main])
    return numpy.asarray(canvas.image.resize((SIZE, SIZE), Image.Resampling.BOX))


def colours_of(subject: str) -> tuple[str, ...]:
    """The colours that a subject has in the pictures of the pretraining."""
    return ("red", "orange", "yellow", "green") if subject == "tree" else tuple(COLOURS)


class _Canvas:
    """Shapes in a style. Coordinates are in pixels of the finished picture, from the upper left corner.

    In ink, shapes are paper with an outline, or all ink if they are `dark`.
    """

    def __init__(self, style):
        from PIL import Image, ImageDraw

        self.style, self.ink = style, style == "ink"
        self.image = Image.new("RGB", (SIZE * _SCALE, SIZE * _SCALE), _PAPER)
        self.pen = ImageDraw.Draw(self.image)

    def shade(self, colour):
        """A colour as it looks in this style."""
        if self.style == "night":
            return tuple(
                round(share * part + rest) for part, share, rest in zip(colour, (0.50, 0.48, 0.58), (2, 6, 34))
            )
        return tuple(round(part) for part in colour)

    def polygon(self, points, colour, dark=False, outline=True, width=0.9):
        points = [(x * _SCALE, y * _SCALE) for x, y in points]
        self.pen.polygon(points, fill=self._fill(colour, dark))
        if self.ink and outline:
            self.pen.line([*points, points[0], points[1]], fill=_INK, width=round(width * _SCALE), joint="curve")

    def box(self, left, top, right, bottom, colour, dark=False, outline=True):
        self.polygon([(left, top), (right, top), (right, bottom), (left, bottom)], colour, dark, outline)

    def ellipse(self, x, y, across, down, colour, dark=False, outline=True, width=0.9):
        """An ellipse around (x, y) with these half-axes."""
        self.polygon(
            [
                (x + across * math.cos(turn * math.pi / 20), y + down * math.sin(turn * math.pi / 20))
                for turn in range(40)
            ],
            colour,
            dark,
            outline,
            width,
        )

    def blobs(self, ellipses, colour, width=0.9):
        """Ellipses (x, y, across, down) that run together into one shape, as a cloud or a crown does."""
        for x, y, across, down in ellipses:
            self.ellipse(x, y, across, down, colour, width=width)
        if self.ink:  # once more without outlines, which leaves the outer one
            for x, y, across, down in ellipses:
                self.ellipse(x, y, across - width / 2, down - width / 2, colour, outline=False)

    def line(self, points, colour, width=0.8):
        points = [(x * _SCALE, y * _SCALE) for x, y in points]
        self.pen.line(points, fill=_INK if self.ink else self.shade(colour), width=round(width * _SCALE), joint="curve")

    def light(self, left, top, right, bottom, glow=True):
        """A lit window or lamp: it keeps its colour at night."""
        if self.ink:
            self.box(left, top, right, bottom, _PAPER)
        else:
            colour = _GLOW if self.style == "night" and glow else _LIGHT
            area = [left * _SCALE, top * _SCALE, right * _SCALE - 1, bottom * _SCALE - 1]
            self.pen.rectangle(area, fill=colour)

    def gradient(self, top, bottom, upper, lower):
        """Rows from `top` to `bottom` whose colour goes from `upper` to `lower`; ink leaves the paper as it is."""
        if self.ink:
            return
        first, last = round(top * _SCALE), round(bottom * _SCALE)
        for row in range(first, last):
            share = (row - first) / max(1, last - first - 1)
            colour = tuple(round(a + share * (b - a)) for a, b in zip(upper, lower))
            self.pen.line([(0, row), (SIZE * _SCALE, row)], fill=colour)

    def _fill(self, colour, dark):
        if self.ink:
            return _INK if dark else _PAPER
        return self.shade(colour)


# What is around the subject. All chance is drawn before it is asked which style it is, so that a scene is the same in each.


def _sky(canvas, rng, horizon):
    skies = rng.choice(_SKIES), rng.choice(_NIGHTS)
    upper, lower = skies[canvas.style == "night"]
    sun = (rng.choice((rng.uniform(3.5, 8), rng.uniform(24, 28.5))), rng.uniform(4, 8), rng.random() < 0.6)
    clouds = [(rng.uniform(2, 30), rng.uniform(3, 10), rng.uniform(2, 3.4)) for _ in range(rng.choice((0, 1, 1, 2)))]
    birds = [(rng.uniform(4, 28), rng.uniform(3, 12)) for _ in range(rng.choice((0, 0, 1, 2)))]
    stars = [(rng.uniform(1, 31), rng.uniform(1, horizon - 5)) for _ in range(rng.randint(5, 9))]
    hills = [
        (rng.uniform(-2, 34), rng.uniform(7, 13), rng.uniform(2.5, 6), rng.choice(_HILLS))
        for _ in range(rng.choice((0, 1, 1, 2)))
    ]
    canvas.gradient(0, horizon + 1.5, upper, lower)  # the ground below may dip
    if canvas.style == "night":
        for x, y in stars:
            canvas.pen.rectangle([x * _SCALE, y * _SCALE, x * _SCALE + 7, y * _SCALE + 7], fill=(226, 226, 206))
    if sun[2]:
        x, y = sun[:2]
        if canvas.style == "night":
            canvas.pen.ellipse(
                [(x - 2.4) * _SCALE, (y - 2.4) * _SCALE, (x + 2.4) * _SCALE, (y + 2.4) * _SCALE], fill=(244, 240, 214)
            )
            dark = tuple(round(a + (y - 1) / horizon * (b - a)) for a, b in zip(upper, lower))
            canvas.pen.ellipse(
                [(x - 1.2) * _SCALE, (y - 3) * _SCALE, (x + 3.4) * _SCALE, (y + 1.6) * _SCALE], fill=dark
            )
        else:
            canvas.ellipse(x, y, 2.5, 2.5, (255, 226, 120))
    if canvas.style != "night":
        for x, y, size in clouds:
            parts = ((-1, 0.25, 0.62), (0.9, 0.3, 0.6), (0, -0.15, 0.8))
            canvas.blobs(
                [(x + a * size, y + b * size, size * c, size * c * 0.62) for a, b, c in parts], (252, 252, 250), 0.6
            )
        for x, y in birds:
            canvas.line([(x - 1.5, y - 0.6), (x, y + 0.4), (x + 1.5, y - 0.6)], (70, 74, 92), 0.55)
    for x, across, high, colour in hills:
        points = [
            (x + across * math.cos(turn * math.pi / 16), horizon - high * math.sin(turn * math.pi / 16))
            for turn in range(17)
        ]
        canvas.polygon(points, colour, width=0.6)


def _sea(canvas, rng, horizon):
    colour = rng.choice(_SEAS)
    waves = [
        (rng.uniform(0, 28), rng.uniform(horizon + 1.2, 31), rng.uniform(2.5, 5)) for _ in range(rng.randint(4, 7))
    ]
    canvas.gradient(horizon, SIZE, canvas.shade([part + 14 for part in colour]), canvas.shade(_darker(colour)))
    canvas.line([(0, horizon), (SIZE, horizon)], [part + 14 for part in colour], 0.5)
    for x, y, long in waves:
        crest = [(x + step * long / 4, y - (0.45 if step % 2 else 0)) for step in range(5)]
        canvas.line(crest, [min(255, part + 52) for part in colour], 0.5)


def _ground(canvas, rng, horizon):
    colour = rng.choice(_GROUNDS)
    bend = rng.uniform(-1.2, 1.2)
    tufts = [(rng.uniform(1, 31), rng.uniform(horizon + 2.2, 31)) for _ in range(rng.randint(2, 5))]
    flowers = [
        (rng.uniform(1, 31), rng.uniform(horizon + 3, 31), rng.choice(("red", "yellow", "white")))
        for _ in range(rng.choice((0, 0, 3)))
    ]
    edge = [(x, horizon + bend * math.sin(x * math.pi / SIZE)) for x in range(0, SIZE + 1, 2)]
    canvas.polygon([*edge, (SIZE + 2, SIZE + 2), (-2, SIZE + 2)], colour, width=0.6)
    for x, y in tufts:
        canvas.line([(x - 0.9, y - 1.1), (x, y), (x + 0.9, y - 1.1)], _darker(colour, 0.78), 0.45)
    for x, y, name in flowers:
        canvas.ellipse(x, y, 0.6, 0.6, COLOURS[name], dark=True, outline=False)


def _landscape(canvas, rng, sea):
    horizon = rng.uniform(19, 23)
    _sky(canvas, rng, horizon)
    (_sea if sea else _ground)(canvas, rng, horizon)
    return horizon


def _place(rng, base):
    """(x, y, scale): where the subject stands, and how large it is."""
    return rng.uniform(12.5, 19.5), base + rng.uniform(1.5, 4.5), rng.uniform(0.85, 1.15)


def _darker(colour, share=0.8):
    return tuple(part * share for part in colour)


# The subjects.


def _at(x0, y0, scale):
    """A function from the subject's own coordinates, y upwards from its foot, to places of the picture."""
    return lambda x, y: (x0 + x * scale, y0 - y * scale)


def _boat(canvas, rng, colour):
    horizon = _landscape(canvas, rng, sea=True)
    x0, y0, scale = _place(rng, horizon)
    at, side = _at(x0, y0, scale), rng.choice((-1, 1))
    sails = rng.sample([c for c in COLOURS.values() if c != colour], 2)
    wood, kind = rng.choice(_WOODS), rng.choice(("sloop", "sloop", "cat", "fishing"))
    if kind == "fishing":
        canvas.line([at(1.5 * side, 3), at(1.5 * side, 12)], wood, 0.9)
        canvas.line([at(1.5 * side, 11), at(8 * side, 4)], wood, 0.5)
        canvas.box(*at(-4, 7.5), *at(1, 2), COLOURS["white"])
        canvas.box(*at(-4.6, 8.6), *at(1.6, 7.4), rng.choice(_ROOFS), dark=True)
        canvas.light(*at(-3, 6.5), *at(-0.2, 4.4))
    else:
        canvas.line([at(0, 2), at(0, 15.5)], wood, 0.9)
        canvas.polygon([at(0.8 * side, 15), at(0.8 * side, 4.2), at(8.2 * side, 4.2)], sails[0])
        if kind == "sloop":
            canvas.polygon([at(-0.8 * side, 13), at(-0.8 * side, 4.2), at(-6.2 * side, 4.2)], sails[1])
        else:
            canvas.polygon([at(0, 17), at(0, 15.4), at(-3 * side, 16.2)], sails[1], dark=True)
    canvas.polygon([at(-9.5, 3.2), at(9.5, 3.2), at(7, -1.6), at(-6.5, -1.6)], colour)
    canvas.polygon([at(-9.5, 3.2), at(9.5, 3.2), at(9, 2.2), at(-9, 2.2)], _darker(colour, 0.72), outline=False)
    canvas.line([at(-8, -1.7), at(-4, -1.3), at(0, -1.8), at(4, -1.3), at(8, -1.7)], (214, 234, 244), 0.6)


def _house(canvas, rng, colour):
    horizon = _landscape(canvas, rng, sea=False)
    x0, y0, scale = _place(rng, horizon)
    at = _at(x0, y0, scale)
    wide, high, steep = rng.uniform(5.5, 8), rng.uniform(6.5, 8.5), rng.uniform(5, 7.5)
    roof, wood, kind = rng.choice(_ROOFS), rng.choice(_WOODS), rng.choice(("gable", "gable", "long"))
    chimney, smoke = rng.choice((-0.5, 0.5)), rng.random() < 0.5
    canvas.box(*at(chimney * wide - 1, high + steep * 0.95), *at(chimney * wide + 1, high), _darker(roof))
    if smoke:
        for step in range(3):
            x, y = at(chimney * wide + step * 1.3, high + steep + 0.8 + step * 1.7)
            canvas.ellipse(x, y, 0.8 + 0.35 * step, 0.7 + 0.3 * step, (236, 236, 238))
    canvas.box(*at(-wide, high), *at(wide, -0.3), colour)
    if kind == "gable":
        canvas.polygon([at(-wide - 1.4, high - 0.3), at(0, high + steep), at(wide + 1.4, high - 0.3)], roof, dark=True)
        canvas.polygon(
            [at(-wide + 1.6, high - 0.2), at(0, high + steep - 2.6), at(wide - 1.6, high - 0.2)], _darker(colour, 0.9)
        )
    else:
        canvas.polygon(
            [
                at(-wide - 1.4, high - 0.3),
                at(-wide + 2, high + steep * 0.7),
                at(wide - 2, high + steep * 0.7),
                at(wide + 1.4, high - 0.3),
            ],
            roof,
        )
    canvas.box(*at(-1.3, 4.4), *at(1.3, -0.3), wood, dark=True)
    for side in (-1, 1):
        middle = side * (wide + 1.3) / 2
        canvas.light(*at(middle - 1.2, 5.6), *at(middle + 1.2, 3))
        canvas.line([at(middle, 5.6), at(middle, 3)], wood, 0.35)


def _lantern(canvas, rng, colour):
    horizon = _landscape(canvas, rng, sea=False)
    x0, y0, scale = _place(rng, horizon)
    post = rng.random() < 0.5
    at = _at(x0, y0 + (0 if not post else 0.5), scale)
    iron, lift = rng.choice(((70, 66, 78), (96, 74, 52), (58, 74, 84))), 5.5 if post else 0.0
    if post:
        canvas.box(*at(-0.9, 6), *at(0.9, -1), _darker(iron), dark=True)

    def y(height):
        return height * (0.86 if post else 1) + lift

    if not post:
        ring = [
            at(2.3 * math.cos(turn * math.pi / 10), y(13.4) + 2.6 * math.sin(turn * math.pi / 10)) for turn in range(11)
        ]
        canvas.line(ring, iron, 0.7)
    if canvas.style == "night":
        for size, share in ((9.5, 0.10), (7.5, 0.18), (6, 0.28)):
            _glow(canvas, at(0, y(6.3)), size * scale, share)
    canvas.polygon([at(-4, y(1.6)), at(4, y(1.6)), at(4.8, y(0)), at(-4.8, y(0))], colour)
    canvas.light(*at(-3.4, y(10)), *at(3.4, y(1.6)))
    flame = [at(0, y(8)), at(1.1, y(5)), at(0, y(3)), at(-1.1, y(5))]
    if canvas.ink:
        canvas.polygon(flame, _PAPER, width=0.5)
    else:
        canvas.pen.polygon([(a * _SCALE, b * _SCALE) for a, b in flame], fill=(250, 150, 60))
    for x in (-3.4, 3.4):
        canvas.line([at(x, y(10)), at(x, y(1.6))], iron, 0.8)
    canvas.polygon([at(-4.6, y(9.8)), at(4.6, y(9.8)), at(1.8, y(13)), at(-1.8, y(13))], colour)
    canvas.box(*at(-1.2, y(14)), *at(1.2, y(12.8)), iron, dark=True)


def _glow(canvas, middle, radius, share):
    """Lighten a round place, as a lamp does at night."""
    from PIL import Image, ImageDraw

    mask = Image.new("L", canvas.image.size, 0)
    x, y = (part * _SCALE for part in middle)
    radius *= _SCALE
    ImageDraw.Draw(mask).ellipse([x - radius, y - radius, x + radius, y + radius], fill=round(255 * share))
    canvas.image.paste(Image.new("RGB", canvas.image.size, _GLOW), mask=mask)


def _lighthouse(canvas, rng, colour):
    sea = rng.random() < 0.5
    horizon = _landscape(canvas, rng, sea)
    x0, y0, scale = _place(rng, horizon)
    at, bands = _at(x0, y0, scale), rng.choice((2, 3))
    roof, wide, high, side = rng.choice(_ROOFS), rng.uniform(3, 3.8), rng.uniform(12, 14), rng.choice((-1, 1))
    pale = COLOURS["white"] if colour != COLOURS["white"] else (150, 156, 170)
    rocks = [(rng.uniform(-6, 6), rng.uniform(1.2, 2.4)) for _ in range(4)]
    if sea:
        canvas.blobs([(*at(x, -0.4), size * 1.5, size) for x, size in rocks], (112, 106, 106), 0.6)
    if canvas.style == "night":
        from PIL import Image, ImageDraw

        mask = Image.new("L", canvas.image.size, 0)
        lamp = at(0, high + 1.7)
        beam = [lamp, (lamp[0] + side * 30, lamp[1] - 5), (lamp[0] + side * 30, lamp[1] + 4)]
        ImageDraw.Draw(mask).polygon([(x * _SCALE, y * _SCALE) for x, y in beam], fill=110)
        canvas.image.paste(Image.new("RGB", canvas.image.size, _GLOW), mask=mask)

    def width_at(y):
        return wide - (wide - 2.1) * y / high

    stripes = 2 * bands - 1
    for stripe in range(stripes):
        low, top = high * stripe / stripes, high * (stripe + 1) / stripes
        fill = colour if stripe % 2 == 0 else pale
        canvas.polygon(
            [at(-width_at(low), low), at(width_at(low), low), at(width_at(top), top), at(-width_at(top), top)], fill
        )
    canvas.box(*at(-0.8, 2.4), *at(0.8, 0), (70, 60, 66), dark=True)
    canvas.light(*at(-1.7, high + 3), *at(1.7, high + 0.6))
    canvas.box(*at(-2.9, high + 0.9), *at(2.9, high), (70, 70, 84), dark=True)
    canvas.polygon([at(-2.4, high + 2.9), at(2.4, high + 2.9), at(0, high + 5.4)], roof, dark=True)


def _tree(canvas, rng, colour):
    horizon = _landscape(canvas, rng, sea=False)
    x0, y0, scale = _place(rng, horizon)
    at, wood = _at(x0, y0, scale), rng.choice(_WOODS)
    kind, lean = rng.choice(("round", "cloud", "pine", "pine")), rng.uniform(-0.6, 0.6)
    swell = rng.uniform(2.8, 3.6)
    fruits = [(side * rng.uniform(1, 3.8), 11 + rng.uniform(-3, 3)) for side in rng.choice(((), (-1, 1, -1, 1)))]
    canvas.polygon([at(-1.3, -0.4), at(1.3, -0.4), at(0.8 + lean, 8), at(-0.8 + lean, 8)], wood, dark=True)
    if kind == "pine":
        for step in range(3):
            low, half = 3 + 3.9 * step, 6.8 - 1.5 * step
            canvas.polygon([at(-half, low), at(half, low), at(0, low + 6.2)], _darker(colour, 0.84 + 0.08 * step))
        return
    if kind == "round":
        canvas.ellipse(*at(lean, 10.8), 6 * scale, 6 * scale, colour)
        canvas.ellipse(
            *at(lean - 1.6, 12.6), 2.8 * scale, 2.2 * scale, [min(255, part + 22) for part in colour], outline=False
        )
    else:
        crown = ((-3.6, 8.8), (3.6, 8.8), (-2.4, 12.6), (2.4, 12.6), (0, 10.6))
        canvas.blobs([(*at(x, y), swell * scale, swell * scale) for x, y in crown], _darker(colour, 0.92))
        canvas.ellipse(*at(-1.4, 12), 2.8 * scale, 2.2 * scale, colour, outline=False)
    if colour == COLOURS["green"] and not canvas.ink:
        for x, y in fruits:
            canvas.ellipse(*at(x, y), 0.75, 0.75, COLOURS["red"])


def _fish(canvas, rng, colour):
    deep = rng.choice(_SEAS)
    sand = rng.uniform(26.5, 30)
    weeds = [
        (rng.choice((rng.uniform(1, 8), rng.uniform(24, 31))), rng.uniform(4, 9), rng.choice((-1, 1)))
        for _ in range(rng.randint(1, 4))
    ]
    bubbles = [(rng.uniform(2, 30), rng.uniform(2, 24), rng.uniform(0.7, 1.2)) for _ in range(rng.randint(2, 5))]
    x0, y0, scale = rng.uniform(13, 19), rng.uniform(11, 19), rng.uniform(0.85, 1.2)
    side, tall, kind = rng.choice((-1, 1)), rng.uniform(4.2, 5.6), rng.choice(("plain", "striped", "spotted"))
    fin = rng.choice([c for c in COLOURS.values() if c != colour])
    canvas.gradient(0, SIZE, canvas.shade([min(255, part + 66) for part in deep]), canvas.shade(_darker(deep)))
    canvas.polygon(
        [(-2, sand), (10, sand - 1), (22, sand + 0.6), (34, sand - 0.6), (34, 34), (-2, 34)], (216, 196, 144), width=0.6
    )
    for x, high, sway in weeds:
        stalk = [(x + sway * math.sin(step * 1.1), sand + 1 - step * high / 6) for step in range(7)]
        canvas.line(stalk, (60, 132, 92), 0.8)
    for x, y, size in bubbles:
        if canvas.ink:
            canvas.ellipse(x, y, size, size, _PAPER)
        else:
            canvas.ellipse(x, y, size, size, [min(255, part + 92) for part in deep])

    def at(x, y):
        return x0 + x * side * scale, y0 - y * scale

    canvas.polygon([at(-5.5, 0), at(-11, 4.6), at(-9.6, 0), at(-11, -4.6)], fin)
    canvas.polygon([at(-3, tall - 1.2), at(1, tall + 2.6), at(3.6, tall - 1.4)], fin)
    canvas.polygon([at(-1.5, -tall + 1), at(-2.5, -tall - 1.8), at(1.5, -tall + 0.8)], fin)
    canvas.ellipse(x0, y0, 7.6 * scale, tall * scale, colour)
    if kind == "striped":
        for x in (-3.2, -0.4):
            reach = tall * math.sqrt(1 - (x / 7.6) ** 2) - 0.5
            canvas.line([at(x, reach), at(x, -reach)], fin, 0.9)
    if kind == "spotted":
        for x, y in ((-3.6, 0.8), (-1.2, -1.6), (-0.8, 1.8)):
            canvas.ellipse(*at(x, y), 0.7, 0.7, fin, outline=False, dark=True)
    canvas.ellipse(*at(4.2, 1.3), 1.3 * scale, 1.3 * scale, (250, 250, 246))
    canvas.ellipse(*at(4.5, 1.3), 0.65 * scale, 0.65 * scale, (30, 28, 36), dark=True, outline=False)
    canvas.line([at(7, -1.2), at(5.4, -1.5)], (60, 40, 44), 0.5)


def _windmill(canvas, rng, colour):
    horizon = _landscape(canvas, rng, sea=False)
    x0, y0, scale = _place(rng, horizon)
    at, turn, wood = _at(x0, y0, scale * 0.95), rng.uniform(0, math.pi / 2), rng.choice(_WOODS)
    canvas.polygon([at(-4.6, -0.3), at(4.6, -0.3), at(3, 9.6), at(-3, 9.6)], COLOURS["white"])
    canvas.polygon([at(-3.6, 9.4), at(3.6, 9.4), at(2, 12.4), at(-2, 12.4)], colour)
    canvas.box(*at(-1.2, 3.6), *at(1.2, -0.3), wood, dark=True)
    canvas.light(*at(-0.8, 7.2), *at(0.8, 5.4))
    for arm in range(4):
        c, s = math.cos(turn + arm * math.pi / 2), math.sin(turn + arm * math.pi / 2)

        def along(far, off, c=c, s=s):
            return at(far * c - off * s, 10.2 + far * s + off * c)

        canvas.polygon([along(2, 0), along(9, 0), along(9, 2.4), along(2, 1.8)], (236, 226, 198), width=0.5)
        canvas.line([along(0, 0), along(9.4, 0)], wood, 0.9)
    canvas.ellipse(*at(0, 10.2), 0.9, 0.9, wood, dark=True)


_PAINTERS = {
    "boat": _boat, "house": _house, "lantern": _lantern, "lighthouse": _lighthouse, "tree": _tree, "fish": _fish, NEW_SUBJECT: _windmill,
}  # fmt: skip


def to_tensor(drawn):
    """Pictures, a sequence of arrays (32, 32, 3), as a float tensor (n, 3, 32, 32) from -1 to 1.

    Raises InputError if one has another shape, or if there is none.
    """
    import numpy
    import torch

    arrays = [numpy.asarray(picture) for picture in drawn]
    if not arrays:
        raise InputError("There is no picture. Give at least one.")
    for number, array in enumerate(arrays):
        if array.shape != (SIZE, SIZE, 3):
            raise InputError(f"Picture {number} has the shape {array.shape}; pictures here are ({SIZE}, {SIZE}, 3).")
    return torch.from_numpy(numpy.stack(arrays)).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_arrays(tensor):
    """The inverse of `to_tensor`: a uint8 array (n, 32, 32, 3)."""
    import torch

    return ((tensor.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def read_folder(folder):
    """(pictures, captions) of the PNG and JPEG files in a folder, in the order of their names.

    A file's name is its caption: "red boat by day 2.png" has the caption "red boat by day".
    Raises InputError if the folder doesn't exist or has no picture, or if one can't be read, isn't 32 × 32 pixels or has no
    word in its name.
    """
    import numpy
    from PIL import Image, UnidentifiedImageError

    if not isinstance(folder, (str, Path)):
        raise InputError(f"{folder!r} is no folder. Give the path of one folder, for example 'my_pictures'.")
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise InputError(f"There is no folder {folder}. Name the folder that your pictures are in.")
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if not files:
        raise InputError(f"There is no PNG or JPEG file in {folder}. Put your pictures there.")
    drawn, captions = [], []
    for path in files:
        try:
            with Image.open(path) as image:
                size, picture = image.size, image.convert("RGB")
        except (UnidentifiedImageError, OSError) as error:
            raise InputError(
                f"{path.name} can't be read as a picture ({error}). Save it anew, or take it away."
            ) from error
        if size != (SIZE, SIZE):
            raise InputError(
                f"{path.name} is {size[0]} × {size[1]} pixels, and the model takes {SIZE} × {SIZE}. "
                f"Cut it to a square, then `image.resize(({SIZE}, {SIZE}))` with Pillow does it."
            )
        words = [word for word in path.stem.replace("-", " ").replace("_", " ").split() if not word.isdigit()]
        if not words:
            raise InputError(
                f"{path.name} has no caption in its name. Name it by what it shows, as in 'boat in ink 1.png'."
            )
        drawn.append(numpy.asarray(picture))
        captions.append(" ".join(words))
    return drawn, captions
