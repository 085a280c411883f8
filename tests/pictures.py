"""What the tests of pictures share."""

from matplotlib.backends.backend_agg import FigureCanvasAgg

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
