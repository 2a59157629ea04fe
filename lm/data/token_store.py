"""Tokens of a whole source on disk, memory-mapped: encoded once, and read again by every later start.

A store is a folder of flat arrays in the cache (lm.core.cache). Its name is a digest of the source's content and of the
tokenizer, so that a changed file or another tokenizer makes another store. It is written under another name and moved
when complete; one that is torn all the same is written again. Beyond CACHE_BYTES the stores that were used least
recently are removed.
"""

import contextlib
import hashlib
import json
import os
import shutil
import socket
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from lm.core.cache import cache_folder

CACHE_BYTES = 20 * 2**30
STORE_VERSION = 1  # a layout, or a rule of encoding, that changed makes other stores
INDEX_FILE = "index.json"
DOCUMENT_ARRAYS = ("names", "name_offsets", "bytes", "name_keys", "content_keys", "order_keys")
EXAMPLE_ARRAYS = ("offsets", "document", "start", "trained")
WRITTEN_IDS = 1 << 20  # ids that are held in memory before they are written


class EncodedExample(NamedTuple):
    """Ids that are laid into rows together: a document, or an excerpt of a conversation."""

    ids: Sequence[int]  # i32[n]
    weights: np.ndarray | None  # f32[n] of each as a target; None: 1
    start: int = 0  # the first message of an excerpt


class EncodedDocument(NamedTuple):
    """What a source holds under one name."""

    name: str
    content: str  # its words: one content is held out, or trained on, under all its names
    size: int  # UTF-8 bytes of its text
    examples: Sequence[EncodedExample]


class TokenStore(NamedTuple):
    """Examples of documents, D and E of them, memory-mapped. Never written to."""

    ids: np.ndarray  # u16[N] or i32[N]  of all examples, one after another
    weights: np.ndarray | None  # f32[N]  None: every target counts 1
    offsets: np.ndarray  # i64[E+1]  where each example begins in `ids`
    document: np.ndarray  # i32[E]  the document of each
    start: np.ndarray  # i32[E]  its first message
    trained: np.ndarray  # i32[E]  targets whose weight is not 0
    names: np.ndarray  # u8[...]  UTF-8
    name_offsets: np.ndarray  # i64[D+1]
    bytes: np.ndarray  # i64[D]  UTF-8 bytes of the text
    name_keys: np.ndarray  # u64[D]  a hash of the name, of which `is_held_out` is a threshold
    content_keys: np.ndarray  # u64[D]  the same of the content
    order_keys: np.ndarray  # u64[D]  another of the name: a random order that never changes
    counts: Mapping[str, int] = {}  # what was counted while the source was read: bad rows, ...

    @property
    def documents(self) -> int:
        return len(self.bytes)

    @property
    def sizes(self) -> np.ndarray:
        """i64[E]: ids of each example."""
        return np.diff(self.offsets)

    def name(self, document: int) -> str:
        begin, end = self.name_offsets[document : document + 2]
        return self.names[begin:end].tobytes().decode()

    def example_ids(self, example: int) -> list[int]:
        begin, end = self.offsets[example : example + 2]
        return self.ids[begin:end].tolist()


def store_key(*parts: str) -> str:
    """The name of the store of what `parts` identify."""
    return hashlib.sha256("\0".join([f"store {STORE_VERSION}", *parts]).encode()).hexdigest()[:32]


def cached_store(
    key: str,
    documents: Callable[[], Iterable[EncodedDocument]],
    *,
    vocab_size: int,
    counts: Callable[[], Mapping[str, int]] = dict,
) -> TokenStore:
    """The store of this key: from the cache, else of `documents`, which are read one by one and then kept there.

    counts: what to keep beside them, asked for once they have been read."""
    folder = cache_folder() / "tokens"
    store = open_store(folder / key)
    if store is not None:
        with contextlib.suppress(OSError):  # another process may remove it meanwhile
            os.utime(folder / key)  # used now
        return store
    folder.mkdir(parents=True, exist_ok=True)
    remove_abandoned_folders(folder)
    prefix = f".{socket.gethostname()}-{os.getpid()}-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=folder, ignore_cleanup_errors=True) as temporary:
        written = Path(temporary) / key
        write_store(written, documents(), vocab_size=vocab_size, counts=counts)
        remove_oldest_stores(folder, CACHE_BYTES - stored_bytes(written))
        store = open_store(written)  # what is mapped outlives its name, and whoever else writes the same
        if open_store(folder / key) is None:  # else another was faster
            with contextlib.suppress(OSError):  # another is faster just now, or what is torn cannot be moved away
                if (folder / key).exists():
                    os.replace(folder / key, Path(temporary) / "torn")
                os.replace(written, folder / key)
    return store


def write_store(
    path: Path, documents: Iterable[EncodedDocument], *, vocab_size: int, counts: Callable[[], Mapping[str, int]] = dict
) -> None:
    """Writes the folder `path`, the index last. Ids go to the disk as they come; of a document some 100 bytes stay."""
    path.mkdir()
    dtype = np.dtype(np.uint16 if vocab_size <= 2**16 else np.int32)
    offsets, name_offsets, sizes = array("q", [0]), array("q", [0]), array("q")
    keys, names = {name: array("Q") for name in ("name_keys", "content_keys", "order_keys")}, bytearray()
    owners, starts, trained = array("i"), array("i"), array("i")
    has_weights, total = False, 0
    with (path / "ids").open("wb") as ids_file, (path / "weights").open("wb") as weights_file:
        pending: list[np.ndarray] = []
        held = 0
        for number, document in enumerate(documents):
            names += document.name.encode(errors="surrogatepass")
            name_offsets.append(len(names))
            sizes.append(document.size)
            for key, value in zip(keys, document_keys(document.name, document.content)):
                keys[key].append(value)
            for ids, weights, start in document.examples:
                pending.append(ids if isinstance(ids, np.ndarray) else np.fromiter(ids, dtype, len(ids)))
                held += len(ids)
                total += len(ids)
                offsets.append(total)
                owners.append(number)
                starts.append(start)
                trained.append(len(ids) - 1 if weights is None else int(np.count_nonzero(weights[1:])))
                if weights is not None:
                    weights_file.write(np.asarray(weights, np.float32).tobytes())
                    has_weights = True
            if held >= WRITTEN_IDS:
                np.concatenate(pending, dtype=dtype, casting="unsafe").tofile(ids_file)
                pending, held = [], 0
        if pending:
            np.concatenate(pending, dtype=dtype, casting="unsafe").tofile(ids_file)
    arrays = {"offsets": offsets, "document": owners, "start": starts, "trained": trained, "bytes": sizes}
    for name, values in {**arrays, "name_offsets": name_offsets, **keys, "names": names}.items():
        np.save(path / f"{name}.npy", np.frombuffer(values, np.uint8 if name == "names" else values.typecode))
    if not has_weights:
        (path / "weights").unlink()
    files = {file.name: file.stat().st_size for file in path.iterdir()}
    for name in files:
        with (path / name).open("rb") as file:
            os.fsync(file.fileno())  # the index must not be there before what it speaks of
    (path / INDEX_FILE).write_text(
        json.dumps({"dtype": dtype.str, "ids": total, "files": files, "counts": dict(counts())})
    )


def open_store(path: Path) -> TokenStore | None:
    """The store in a folder, memory-mapped; None where there is none, or its files are not as they were written."""
    try:
        index = json.loads((path / INDEX_FILE).read_text())
        files = {file.name: file.stat().st_size for file in path.iterdir() if file.name != INDEX_FILE}
        if files != index["files"]:
            return None
        arrays = {name: mapped_array(path / f"{name}.npy") for name in (*DOCUMENT_ARRAYS, *EXAMPLE_ARRAYS)}
        ids = flat_array(path / "ids", np.dtype(index["dtype"]))
        weights = flat_array(path / "weights", np.dtype(np.float32)) if "weights" in files else None
        counts = index["counts"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    is_complete = arrays["offsets"][-1] == index["ids"] == len(ids) and (weights is None or len(weights) == len(ids))
    return TokenStore(ids=ids, weights=weights, counts=counts, **arrays) if is_complete else None


def mapped_array(path: Path) -> np.ndarray:
    """An array file, memory-mapped, as a plain array: what it gives is copied, and costs no subclass's bookkeeping."""
    return np.load(path, mmap_mode="r").view(np.ndarray)


def flat_array(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.zeros(0, dtype)  # nothing cannot be mapped
    return np.memmap(path, dtype, "r").view(np.ndarray)


def document_keys(name: str, content: str) -> tuple[int, int, int]:
    """(name key, content key, order key), 64 bits each.

    The first is what `lm.data.sources.is_held_out` compares; the second is that of the name which a content bears where
    it has several; the third is the name's hash from its other end.
    """
    digest = hashlib.sha256(name.encode(errors="surrogatepass")).digest()
    text = hashlib.sha256((content or name).encode(errors="surrogatepass")).hexdigest()
    of_content = hashlib.sha256(text.encode()).digest()
    return tuple(int.from_bytes(part, "big") for part in (digest[:8], of_content[:8], digest[:-9:-1]))


def stored_bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def remove_abandoned_folders(folder: Path) -> None:
    """Removes what processes of this machine were writing when they were killed."""
    for path in folder.glob(f".{socket.gethostname()}-*-*"):
        process = path.name.removeprefix(f".{socket.gethostname()}-").partition("-")[0]
        try:
            os.kill(int(process), 0)
        except ProcessLookupError:
            shutil.rmtree(path, ignore_errors=True)
        except (ValueError, OSError):
            continue  # not ours to judge


def remove_oldest_stores(folder: Path, room: int) -> None:
    """Removes stores, those first that were used least recently, until the others take no more than `room` bytes."""

    def stored_folders() -> Iterator[tuple[float, int, Path]]:
        for path in folder.iterdir():
            with contextlib.suppress(OSError):  # another process may remove it meanwhile
                if not path.name.startswith("."):
                    yield path.stat().st_mtime, stored_bytes(path), path

    stores = sorted(stored_folders())
    used = sum(size for _, size, _ in stores)
    for _, size, path in stores:
        if used <= room:
            break
        shutil.rmtree(path, ignore_errors=True)
        used -= size
