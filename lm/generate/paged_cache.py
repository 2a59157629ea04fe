"""The paged KV cache: keys and values in pages that requests share, and which page holds what.

A page holds `page_size` tokens of one row in every layer. A request's block table lists its pages in order; two
requests whose first tokens are the same list the same pages there. Kwon et al. 2023, arXiv 2309.06180. Page 0 belongs
to nobody: idle rows and padding write there.

The pages are what counts, and a `KVCache` with the pages of each row side by side is what attention reads. Gathering it
anew for every token takes as long as attention itself on a CPU, so the engine keeps it while its rows stay the same and
writes each new token to both.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from lm.core.types import Array
from lm.model import KVCache, ModelConfig
from lm.model.kv_cache import CACHE_ARRAYS, LayerCache, layer_cache

DEFAULT_PAGE_BYTES = 2**30  # of all pages together, at most, where their number is not given
Pages = tuple[LayerCache, ...]  # a layer each: keys and values f[P,K,page,H], and scales f32[P,K,page] where int8


def empty_pages(config: ModelConfig, count: int, page_size: int) -> Pages:
    """`count` pages of zeros. Layers with a window keep all tokens, too: attention masks those outside it."""
    dtype, shape = jnp.dtype(config.cache_dtype), (count, config.kv_heads, page_size, config.head_size)

    def layer() -> LayerCache:
        scales = (jnp.zeros(shape[:-1]), jnp.zeros(shape[:-1])) if dtype == jnp.int8 else ()
        return jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), *scales

    return tuple(layer() for _ in range(config.layers))


def default_pages(config: ModelConfig, wanted: int, page_size: int) -> int:
    """Pages for an engine: as many as wanted, or as DEFAULT_PAGE_BYTES hold."""
    numbers = 2 * config.layers * config.kv_heads * page_size * config.head_size
    return min(wanted, max(DEFAULT_PAGE_BYTES // (numbers * jnp.dtype(config.cache_dtype).itemsize), 1))


def gathered_cache(pages: Pages, table: Array, lengths: Array) -> KVCache:
    """The pages of table i32[B,n] side by side, as the cache of B rows with lengths i32[B] of n pages of slots each.

    One gather of whole rows, page by head, that lands where attention reads: 4 times as fast on a CPU as one of pages.
    """

    def gather_pages(held: Array) -> Array:
        P, K, page, *rest = held.shape
        places = table[:, None, :] * K + jnp.arange(K)[:, None]  # [B,K,n]
        taken = jnp.take(held.reshape(P * K, -1), places, axis=0, mode="clip")
        return taken.reshape(table.shape[0], K, table.shape[1] * page, *rest)

    arrays = zip(*(tuple(gather_pages(held) for held in layer) for layer in pages))
    named = dict(zip(CACHE_ARRAYS, map(tuple, arrays)))
    slots = table.shape[1] * pages[0][0].shape[2]
    return KVCache(**named, segments=jnp.zeros((table.shape[0], slots), jnp.int32), length=lengths)


def cache_with_row(cache: KVCache, pages: Pages, table: Array, row: Array) -> KVCache:
    """`cache`, whose row i32[] now holds the pages of table i32[n]."""
    new = gathered_cache(pages, table[None], cache.length[:1])
    put = lambda held, one: jax.lax.dynamic_update_slice_in_dim(held, one, row, axis=0)
    return jax.tree.map(put, cache, new).replace(segments=cache.segments, length=cache.length)


def pages_with_tokens(pages: Pages, cache: KVCache, slots: Array, places: Array, offsets: Array) -> Pages:
    """`pages` with slot i32[B] of each row of `cache` in page i32[B], at offset i32[B]."""
    rows = jnp.arange(slots.shape[0])

    def layer(held: LayerCache, new: LayerCache) -> LayerCache:
        return tuple(a.at[places, :, offsets].set(b[rows, :, slots]) for a, b in zip(held, new))

    return tuple(layer(held, layer_cache(cache, i)) for i, held in enumerate(pages))


def pages_with_chunk(pages: Pages, cache: KVCache, start: Array, places: Array) -> Pages:
    """`pages` with the slots from i32[] on, of a cache of one row, in the pages i32[m]: as many as they hold."""

    def store_slots(held: Array, new: Array) -> Array:
        _, K, page, *rest = held.shape
        chunk = jax.lax.dynamic_slice_in_dim(new[0], start, places.shape[0] * page, axis=1)
        return held.at[places].set(chunk.reshape(K, -1, page, *rest).swapaxes(0, 1))

    def layer(held: LayerCache, new: LayerCache) -> LayerCache:
        return tuple(store_slots(a, b) for a, b in zip(held, new))

    return tuple(layer(held, layer_cache(cache, i)) for i, held in enumerate(pages))


def page_digests(ids: Sequence[int], page_size: int) -> list[bytes]:
    """A name for each full page of tokens: a hash of them and of all before, so equal names are equal prefixes."""
    array, digest, digests = np.asarray(ids, np.int32), b"", []
    for end in range(page_size, len(array) + 1, page_size):
        digest = hashlib.blake2b(digest + array[end - page_size : end].tobytes(), digest_size=16).digest()
        digests.append(digest)
    return digests


class PageAllocator:
    """Which page is free, whose it is, and what full pages that nobody uses any more still hold.

    A page is free, used (counted by the requests that list it), or kept: full, of no request, and under its digest for
    one that begins with the same tokens. Kept pages are evicted as room is needed, the least recently used first.
    """

    def __init__(self, count: int):
        """Pages 1 to count - 1; page 0 is nobody's."""
        self._free = list(range(count - 1, 0, -1))
        self._uses = [0] * count
        self._kept: OrderedDict[int, None] = OrderedDict()  # page, the least recently used first
        self._page_of: dict[bytes, int] = {}
        self._digest_of: dict[int, bytes] = {}
        self.count = count - 1

    @property
    def used(self) -> int:
        """Pages of requests."""
        return self.count - len(self._free) - len(self._kept)

    @property
    def kept(self) -> int:
        """Pages of no request that hold a prefix."""
        return len(self._kept)

    def prefix(self, digests: Sequence[bytes]) -> list[int]:
        """The pages that hold the longest known prefix of these."""
        pages = []
        for digest in digests:
            if digest not in self._page_of:
                break
            pages.append(self._page_of[digest])
        return pages

    def take(self, shared: Sequence[int], new: int, *, spare: int = 0) -> list[int] | None:
        """The pages `shared`, which are then used once more, and `new` others; None where there are not so many, and
        `spare` besides."""
        if new + spare > len(self._free) + len(self._kept) - sum(self._uses[page] == 0 for page in shared):
            return None
        for page in shared:
            self._kept.pop(page, None)
            self._uses[page] += 1
        return [*shared, *(self._new_page() for _ in range(new))]

    def _new_page(self) -> int:
        if self._free:
            page = self._free.pop()
        else:
            page, _ = self._kept.popitem(last=False)
            del self._page_of[self._digest_of.pop(page)]
        self._uses[page] = 1
        return page

    def name(self, page: int, digest: bytes) -> None:
        """A used page is full and holds that prefix; nothing happens where another page does already."""
        if digest not in self._page_of and page not in self._digest_of:
            self._page_of[digest], self._digest_of[page] = page, digest

    def release(self, pages: Sequence[int]) -> None:
        """A request is done with its pages. The last ones count as less recently used than those before them."""
        for page in reversed(pages):
            self._uses[page] -= 1
            if not self._uses[page]:
                if page in self._digest_of:
                    self._kept[page] = None
                else:
                    self._free.append(page)
