"""A ladder as one self-contained page, and its figure beside it."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lm.ladder.drawn import SIZE, figure
from lm.ladder.measured import EXACT, KAPLAN, SIX
from lm.ladder.study import sentences
from lm.laws.isoflop import Growth
from lm.laws.parametric import Fitted
from lm.pages import png, svg, templates
from lm.workdir import write_text

NAME = "scaling"  # of the page and the pictures


def written(
    root: Path, summary: Mapping[str, Any], grown: Mapping[str, Growth], laws: Mapping[str, Fitted]
) -> list[Path]:
    """scaling.html, .svg and .png in the ladder's folder."""
    draw = functools.partial(figure, summary, grown, laws)
    files = [root / f"{NAME}.{ending}" for ending in ("html", "svg", "png")]
    drawn = svg(draw, **SIZE)
    text = (
        templates()
        .get_template("ladder/page.html.jinja")
        .render(root=root, summary=summary, sentences=sentences(summary), figure=drawn, ways=(EXACT, SIX, KAPLAN))
    )
    write_text(files[0], text)
    write_text(files[1], drawn)
    files[2].write_bytes(png(draw, **SIZE))
    return files
