"""A ladder as one self-contained page, and its figure beside it."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm.runs.html import png_figure, svg_figure, template_environment
from lm.runs.workdir import write_text
from lm.studies.scaling.figures import FIGURE_SIZE, draw_figure
from lm.studies.scaling.fit import conclusion_sentences
from lm.studies.scaling.isoflop import IsoflopFit
from lm.studies.scaling.parametric import ParametricFit
from lm.studies.scaling.runs import COUNTED_FLOPS, SIX_ND, SIX_ND_WITHOUT_EMBEDDING

PAGE_NAME = "scaling"  # of the page and the pictures


def write_page(
    root: Path, summary: Mapping[str, Any], grown: Mapping[str, IsoflopFit], laws: Mapping[str, ParametricFit]
) -> list[Path]:
    """scaling.html, .svg and .png in the ladder's folder."""
    draw = functools.partial(draw_figure, summary, grown, laws)
    files = [root / f"{PAGE_NAME}.{ending}" for ending in ("html", "svg", "png")]
    drawn = svg_figure(draw, **FIGURE_SIZE)
    text = (
        template_environment()
        .get_template("studies/scaling/page.html.jinja")
        .render(
            root=root,
            summary=summary,
            sentences=conclusion_sentences(summary),
            figure=drawn,
            ways=(COUNTED_FLOPS, SIX_ND, SIX_ND_WITHOUT_EMBEDDING),
        )
    )
    write_text(files[0], text)
    write_text(files[1], drawn)
    files[2].write_bytes(png_figure(draw, **FIGURE_SIZE))
    return files
