"""A long text in blocks, so that some of it can be held out."""

import re


def text_blocks(name: str, text: str) -> list[tuple[str, str]]:
    """The text cut at blank lines (at line ends where a paragraph is long) into some hundred blocks of 200 to 4,000
    characters or more, named "name#0001" and so on; joined they are the text."""
    size = min(max(len(text) // 100, 200), 4000)
    blocks, block = [], ""
    for paragraph in re.split(r"(?<=\n\n)(?!\n)", text):
        for part in [paragraph] if len(paragraph) <= 2 * size else paragraph.splitlines(keepends=True):
            block += part
            if len(block) >= size:
                blocks.append(block)
                block = ""
    if block:
        blocks.append(block)
    return [(f"{name}#{i:04d}", block) for i, block in enumerate(blocks, 1)]
