"""What the tests of pictures share."""

import itertools

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text

from hlstm_src.figures import WIDTH, Picture


def drawn(picture: Picture) -> Picture:
    """Draws it, checks that nothing reaches beyond its edges, and hands it back."""
    assert isinstance(picture, Picture) and picture.alt
    canvas = FigureCanvasAgg(picture)
    canvas.draw()
    box, (width, height) = picture.get_tightbbox(canvas.get_renderer()), picture.get_size_inches()
    assert width == WIDTH
    assert box.x0 > -0.02 and box.y0 > -0.02 and box.x1 < width + 0.02 and box.y1 < height + 0.02
    return picture


def texts(picture: Picture) -> list[str]:
    return [t.get_text() for t in picture.findobj(Text) if t.get_text()]


def overlaps(picture: Picture) -> list[tuple[str, str]]:
    """Pairs of texts that cover each other; there must be texts."""
    renderer = picture.canvas.get_renderer()
    said = [*picture.texts, *(t for ax in picture.axes for t in ax.texts)]
    boxes = [(t.get_text(), t.get_window_extent(renderer)) for t in said]
    assert len(boxes) > 1
    return [(a, b) for (a, one), (b, other) in itertools.combinations(boxes, 2) if one.overlaps(other)]
