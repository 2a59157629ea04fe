"""A ladder as one self-contained page, and its figure beside it."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm.runs.html import write_figure_page
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
    return write_figure_page(
        root,
        PAGE_NAME,
        "studies/scaling/page.html.jinja",
        functools.partial(draw_figure, summary, grown, laws),
        FIGURE_SIZE,
        root=root,
        summary=summary,
        sentences=conclusion_sentences(summary),
        ways=(COUNTED_FLOPS, SIX_ND, SIX_ND_WITHOUT_EMBEDDING),
    )
