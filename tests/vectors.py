"""Tokenizers read from GGUF against the test vectors that llama.cpp keeps beside its vocabularies.

    python -m tests.vectors            # fetches the source package that carries them (77 MB)
    python -m tests.vectors --folder=DIR   # a folder with ggml-vocab-NAME.gguf, .inp and .out

Prints a line a vocabulary and exits with 1 if any id differs. WordPiece (bert) is not read, and said so.
"""

import sys
import tarfile
import tempfile
from pathlib import Path

from lm.core.config import parsed_flags
from lm.core.errors import UserError
from lm.runs.console import print_table, run_program, say
from lm.weights import gguf, packages

PACKAGE = "llama-cpp-python==0.3.36"
BETWEEN = "\n__ggml_vocab_test__\n"
FLAGS = {"folder": dict(default="", metavar="DIR", help="where the vocabularies are; fetched, if not given")}


def fetched(folder: Path) -> Path:
    """The vocabularies out of the package."""
    archive = packages.download_archive(PACKAGE, folder, "*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, [m for m in tar if "/models/ggml-vocab" in m.name], filter="data")
    return next(folder.rglob("ggml-vocab-gpt-2.gguf")).parent


def compared(folder: Path) -> list[list[str]]:
    """Name, vectors, and how many differ (or why it is not read), for each vocabulary with vectors."""
    rows = []
    for path in sorted(folder.glob("ggml-vocab-*.gguf")):
        texts, ids = (path.with_name(f"{path.name}.{side}") for side in ("inp", "out"))
        if not texts.exists():
            continue
        name = path.stem.removeprefix("ggml-vocab-")
        expected = [[int(i) for i in line.split()] for line in ids.read_text().splitlines()]
        given = texts.read_text(encoding="utf-8").split(BETWEEN)[: len(expected)]
        try:
            found = gguf.read_gguf_tokenizer(path).encode_batch(given)
        except UserError as error:
            rows.append([name, str(len(expected)), str(error)])
            continue
        rows.append([name, str(len(expected)), str(sum(a != b for a, b in zip(found, expected, strict=True)))])
    if not rows:
        raise UserError(f"{folder} holds no ggml-vocab-NAME.gguf with .inp and .out: give another --folder")
    return rows


def program(argv: list[str]) -> None:
    flags = parsed_flags(argv, __doc__, FLAGS)
    with tempfile.TemporaryDirectory() as temporary:
        rows = compared(Path(flags.folder) if flags.folder else fetched(Path(temporary)))
    print_table("llama.cpp's vectors", ["vocabulary", "vectors", "differ"], rows)
    wrong = [name for name, _, differ in rows if differ.isdigit() and int(differ)]
    say(f"differ: {', '.join(wrong)}" if wrong else "every vocabulary that is read gives every id")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    run_program(program)
