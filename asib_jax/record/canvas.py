"""What all pictures share: a figure on a canvas of its own, and colours. Nothing global of matplotlib's is changed.

It is imported where something is drawn: that takes a third of a second, and most of what imports these files draws
nothing.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Of Okabe and Ito (2008): people of every colour vision can tell them apart.
BLUE, ORANGE, GREEN, RED, PINK, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#767676"


def new_figure(width: float, height: float, title: str, **margins: float) -> "Figure":
    """Of so many inches. margins: of `subplots_adjust`, in inches ("wspace", "hspace" between axes: in their sizes);
    without them axes are laid out by what is in them, which takes as long as drawing all of it twice more."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout=None if margins else "constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=11, parse_math=False)
    if margins:
        left, right, bottom, top = (margins[side] for side in ("left", "right", "bottom", "top"))
        edges = {"left": left / width, "right": 1 - right / width, "bottom": bottom / height, "top": 1 - top / height}
        figure.subplots_adjust(**{**margins, **edges})
    return figure
