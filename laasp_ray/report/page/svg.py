"""Matplotlib's figures as inline SVG, whose colours and font are the page's.

A figure is drawn with the placeholders of `COLOURS`. In the SVG each becomes a CSS variable, which the page sets for
light and for dark.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from markupsafe import Markup, escape

from laasp_ray.store.addresses import public_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH = 480
"""Of a figure, in units of its SVG; texts are FONT_SIZE of them."""
FONT_SIZE = 12

COLOURS = {
    "ink": "#0a0001",
    "muted": "#0a0002",
    "grid": "#0a0003",
    "card": "#0a0004",
    "band": "#0a0005",
    **{f"c{number}": f"#0b000{number}" for number in range(1, 7)},
}
"""Name of a CSS variable -> its placeholder."""
SERIES = tuple(COLOURS[f"c{number}"] for number in range(1, 7))

_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",  # texts stay texts
    "svg.image_inline": True,
    "text.parse_math": False,  # names may hold $
    "font.size": FONT_SIZE,
    "font.family": "sans-serif",
    "text.color": COLOURS["ink"],
    "axes.labelcolor": COLOURS["muted"],
    "axes.edgecolor": COLOURS["grid"],
    "axes.facecolor": "none",
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.unicode_minus": True,
    "grid.color": COLOURS["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": COLOURS["grid"],
    "ytick.color": COLOURS["grid"],
    "xtick.labelcolor": COLOURS["muted"],
    "ytick.labelcolor": COLOURS["muted"],
    "figure.facecolor": "none",
    "legend.frameon": False,
    "legend.fontsize": 11,
    "lines.linewidth": 2,
}
_NOTHING = ("Creator", "Date", "Format", "Type")


def draw(name: str, description: str, height: float, paint: Callable[[Figure], None]) -> Markup:
    """The SVG of a figure that `paint` draws, WIDTH x `height`. `name` keeps its ids apart from other figures' on the
    page; `description` is for those who cannot see it.
    """
    import matplotlib  # half a second, and only a page needs it
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    settings: Any = {**_SETTINGS, "svg.hashsalt": name}
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH / 72, height / 72), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(_NOTHING))
    return _inline(buffer.getvalue(), name, description)


def _inline(text: str, name: str, description: str) -> Markup:
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    head = f'<svg viewBox="0 0 \\1" role="img" aria-label="{escape(description)}">'
    text = re.sub(r'<svg [^>]*viewBox="0 0 ([\d. ]+)"[^>]*>', head, text, count=1)
    text = text.replace("xlink:href", "href")
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    used = set(re.findall(r'(?:url\(#|href="#)([\w.-]+)', text))
    text = re.sub(r' id="([\w.:-]+)"', lambda found: _own_id(found, name, used), text)
    text = re.sub(r"url\(#", f"url(#{name}-", text)
    text = re.sub(r'href="#', f'href="#{name}-', text)
    text = re.sub(r"font(-size)?: ?(\d+(?:\.\d+)?)px[^;\"]*(; ?font-family: [^;\"]*)?", r"font-size: \2px", text)
    text = re.sub(r' transform="rotate\(-?0 [\d. -]+\)"', "", text)
    text = re.sub(r' (?:d|x|y|width|height|transform)="[^"]*"', _rounded, text)
    text = re.sub(r"\s*\n\s*", "\n", text)
    for variable, placeholder in COLOURS.items():
        text = text.replace(placeholder, f"var(--{variable})")
    return Markup(public_text(text))


def _own_id(found: re.Match[str], name: str, used: set[str]) -> str:
    return f' id="{name}-{found[1]}"' if found[1] in used else ""


def _rounded(found: re.Match[str]) -> str:
    return re.sub(r"(\d+\.\d\d)\d+", r"\1", found[0])
