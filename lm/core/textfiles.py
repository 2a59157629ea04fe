"""Text files as editors write them: the one reader for every program that reads what a user names.

UTF-8, with or without a byte order mark; a line ends with \\n or \\r\\n, the last one may lack it. Nothing else
ends a line: U+2028, U+0085 or a form feed may stand inside a text, and so inside a JSON string (str.splitlines would
cut there). Callers catch OSError and UnicodeDecodeError, as they know what the file is for.
"""

import codecs
from collections.abc import Iterator
from pathlib import Path


def file_text(path: str | Path) -> str:
    """The text of a file, its lines ended by \\n alone."""
    return decoded_text(Path(path).read_bytes())


def decoded_text(data: bytes) -> str:
    """The text in the bytes of a file, its lines ended by \\n alone."""
    return data.decode("utf-8-sig").replace("\r\n", "\n")


def numbered_lines(data: bytes) -> Iterator[tuple[int, bytes]]:
    """(number from 1, line without its end) of each line that is not blank, still in bytes: invalid UTF-8 is then an
    error of that line alone. Joined files may have a byte order mark before any line."""
    for number, line in enumerate(data.split(b"\n"), 1):
        line = line.removeprefix(codecs.BOM_UTF8).removesuffix(b"\r")
        if line.strip():
            yield number, line
