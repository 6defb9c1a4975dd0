"""What all charts share: colours and patterns told apart without colour vision, SVG that follows the page's theme."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito, "Color Universal Design" (2008), without black, which a dark page swallows.
ORANGE, SKY, GREEN, YELLOW = "#e69f00", "#56b4e9", "#009e73", "#f0e442"
BLUE, VERMILION, PURPLE = "#0072b2", "#d55e00", "#cc79a7"
COLORS = (BLUE, ORANGE, GREEN, PURPLE, SKY, VERMILION, YELLOW)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p", "<", "h", ">")
DASHES = ("-", "--", "-.", ":")
# Drawn in these, shown in the page's own: see `themed`.
INK, FAINT, PAPER = "#010203", "#040506", "#070809"
_VARIABLES = {INK: "var(--ink)", FAINT: "var(--line)", PAPER: "var(--paper)"}
_NAME_LENGTH = 34


@dataclass(frozen=True)
class Size:
    """A chart is drawn twice: `width` in CSS pixels is that of its container, so that letters keep their size."""

    name: str
    width: int
    text: float


SIZES = (Size("wide", 760, 12.5), Size("narrow", 340, 11.5))
_STYLE: Any = {
    "svg.hashsalt": "vlm-bench",  # equal results give equal pages
    "svg.fonttype": "none",  # text stays text: sharp, selectable, in the reader's own font
    "text.parse_math": False,  # a name may hold dollar signs
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": FAINT,
    "hatch.color": INK,
    "hatch.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
}


@contextmanager
def figure(size: Size, height: float) -> Iterator[Figure]:
    """An empty figure of `size` and `height` CSS pixels, in the style of the page."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE | {"font.size": size.text}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph .* missing from", UserWarning)  # the reader's browser draws them
        yield Figure(figsize=(size.width / 72, height / 72), layout="constrained")


def svg(drawn: Figure, name: str) -> str:
    """The figure as an element to put into a page: no prolog, no metadata, identifiers that start with `name`."""
    file = io.StringIO()
    drawn.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = file.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", text.replace("xlink:href", "href"))
    text = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(r'<svg[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', text, count=1)
    return themed(text)


def themed(text: str) -> str:
    """Colours that stand for those of the page become its CSS variables."""
    for color, variable in _VARIABLES.items():
        text = text.replace(color, variable)
    return text


def short(name: str, length: int = _NAME_LENGTH) -> str:
    """A name that fits beside a chart, on one line."""
    line = " ".join(name.encode("utf-8", "replace").decode().split())
    return line if len(line) <= length else f"{line[: length - 1]}…"


def look(number: int) -> dict[str, Any]:
    """Colour, marker and dashes of contestant `number`; 77 differ in marker and colour together."""
    return {
        "color": COLORS[number % len(COLORS)],
        "marker": MARKERS[number % len(MARKERS)],
        "markeredgecolor": INK,
        "markeredgewidth": 0.8,
        "markersize": 8,
    }


def key(axes: Axes, columns: int, handles: Sequence[Any] | None = None) -> None:
    """A legend below the figure."""
    drawn = axes.figure
    given = {"handles": handles} if handles is not None else {"handles": axes.get_legend_handles_labels()[0]}
    drawn.legend(loc="outside lower center", ncols=columns, handlelength=2.2, columnspacing=1.2, **given)
