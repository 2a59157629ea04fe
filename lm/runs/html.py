"""What our HTML pages share: templates and their filters, how numbers look, figures as SVG."""

import io
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lm.core.statistics import Estimate, estimate_text, interval_text, percent_text, signed_number
from lm.runs.workdir import write_text

TEXT_COLOR, TRAIN_COLOR, HELD_OUT_COLOR = (
    "#7b7b7a",
    "#3f7fd6",
    "#d9822b",
)  # svg_figure replaces the first by the page's text colour
SERIES_COLORS = ("#3f7fd6", "#d9822b", "#2f8a4b", "#a356b8", "#c0483c", "#7b8a2f")  # of series, in their order
FIGURE_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lm",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": TEXT_COLOR,
    "axes.labelcolor": TEXT_COLOR,
    "text.color": TEXT_COLOR,
    "xtick.color": TEXT_COLOR,
    "ytick.color": TEXT_COLOR,
    "grid.color": TEXT_COLOR,
    "grid.alpha": 0.25,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.linewidth": 0.6,
}
MATPLOTLIB_LOCK = threading.Lock()  # the settings above are matplotlib's own while a figure is drawn


def template_environment() -> jinja2.Environment:
    """The templates of this package, with the filters below. A missing value is an error."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parents[1]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        f.__name__: f for f in (short_number, signed_number, percent_text, interval_text, estimate_text, visible_text)
    }
    return environment


def rendered_page(template: str, **values: Any) -> str:
    """The page that a template of this package, such as "compare/page.html.jinja", makes of these values."""
    return template_environment().get_template(template).render(**values)


def write_figure_page(
    folder: Path, name: str, template: str, draw: Callable, size: Mapping[str, Any], **values: Any
) -> list[Path]:
    """NAME.html with the figure as its value `figure`, and the figure beside it as NAME.svg and NAME.png.

    draw and size: the arguments of `svg_figure`. values: the other values of the template.
    """
    page, picture, bitmap = (folder / f"{name}.{ending}" for ending in ("html", "svg", "png"))
    svg = svg_figure(draw, **size)
    write_text(page, rendered_page(template, figure=svg, **values))
    write_text(picture, svg)
    bitmap.write_bytes(png_figure(draw, **size))
    return [page, picture, bitmap]


def interval_plot(estimates: Mapping[str, Estimate], label: str, *, centre: float | None = None) -> Markup:
    """Each estimate as a dot with its 95 % interval; `centre` gets a line."""

    def draw(axes: Axes):
        values, low, high = np.array([(e.value, e.low, e.high) for e in estimates.values()]).T
        axes.errorbar(
            values, range(len(values)), xerr=[values - low, high - values], fmt="o", color=TRAIN_COLOR, capsize=3
        )
        axes.set_yticks(range(len(values)), list(estimates))
        axes.set_ylim(len(values) - 0.5, -0.5)
        axes.set_xlabel(label)
        axes.grid(axis="x", color=TEXT_COLOR, alpha=0.25)
        if centre is not None:
            axes.axvline(centre, color=TEXT_COLOR, linewidth=0.8, linestyle="--")

    return svg_figure(draw, width=4.4, height=0.75 + 0.32 * len(estimates))


def svg_figure(draw: Callable, *, width: float, height: float, **subplots) -> Markup:
    """What `draw(axes)` draws, as an element for the page; width and height in inches.

    `subplots` are the options of Figure.subplots (nrows, ncols, ...), whose axes `draw` is given.
    """
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    text = _rendered_figure(draw, (width, height), subplots, format="svg", transparent=True, metadata=nothing).decode()
    return Markup(text[text.index("<svg") :].replace(TEXT_COLOR, "currentColor"))


def png_figure(draw: Callable, *, width: float, height: float, **subplots) -> bytes:
    """The same as a PNG on white, for use outside a page."""
    return _rendered_figure(draw, (width, height), subplots, format="png", facecolor="white", dpi=150)


def _rendered_figure(draw: Callable, size: tuple[float, float], subplots: Mapping, **options) -> bytes:
    with MATPLOTLIB_LOCK, rc_context(FIGURE_STYLE):
        figure, file = Figure(size, layout="constrained"), io.BytesIO()
        draw(figure.subplots(**subplots))
        figure.savefig(file, **options)
    return file.getvalue()


def visible_text(text: str) -> str:
    """`text` with control characters that HTML does not allow as visible pictures; newline and tab stay."""
    pictures = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"}
    return text.translate({**pictures, 0x7F: 0x2421, **dict.fromkeys(range(0x80, 0xA0), 0xFFFD)})


def short_number(number: float | None) -> str:
    """1234567 to "1.23 M"; a dash for None."""
    if number is None:
        return "–"
    for size, letter in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g} {letter}"
    return f"{number:.3g}"
