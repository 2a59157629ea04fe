"""The shape of a decoder-only transformer, and how it is computed."""

import dataclasses

from lm.errors import UserError

REMAT = ("none", "block", "dots")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes and switches of one model. The first block fixes the parameters, the second only how they are used.

    `scan`, `dtype` and `query_blocks` may be left to the platform ("auto"): see `on`.
    """

    vocab_size: int
    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 4  # fewer than heads: grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245)
    head_size: int = 32
    hidden: int = 384  # of the SwiGLU; 3 x width costs what 4.5 x width costs without the gate
    qk_norm: bool = True  # RMSNorm of queries and keys (Dehghani et al. 2023, arXiv 2302.05442)
    tied: bool = True  # the output matrix is the embedding
    base_width: int = 0  # muP: the width whose learning rate suits every other; 0: off (see lm.model.params.specs)

    context: int = 256  # positions the model is used at; rotary angles have no table, so this is a promise, not a size
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6
    dtype: str = "auto"  # of the matrix products; parameters, norms, softmax and losses stay float32
    scan: str = "auto"  # "yes": one compiled block for all layers; "no": unrolled
    remat: str = "none"  # what the backward pass recomputes: nothing, each block, or all but matrix products
    query_blocks: str | int = (
        "auto"  # causal attention in so many static blocks of queries, each with its own keys only
    )
    loss_chunk: int = 0  # positions a row whose logits exist at a time in the loss; 0: all

    def __post_init__(self):
        for name in ("vocab_size", "layers", "width", "heads", "kv_heads", "head_size", "hidden", "context"):
            if getattr(self, name) < 1:
                raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least 1")
        if self.query_blocks != "auto" and not (isinstance(self.query_blocks, int) and self.query_blocks >= 1):
            raise UserError(f"model.query_blocks is {self.query_blocks!r}; it must be at least 1, or auto")
        if self.base_width < 0:
            raise UserError(f"model.base_width is {self.base_width}; it must be 0 (no muP) or a width")
        if self.loss_chunk < 0:
            raise UserError(f"model.loss_chunk is {self.loss_chunk}; it must be 0 (all positions at once) or above")
        if self.heads % self.kv_heads:
            raise UserError(f"model.heads {self.heads} is not a multiple of model.kv_heads {self.kv_heads}")
        if self.head_size % 2:
            raise UserError(f"model.head_size {self.head_size} is odd; rotary positions turn pairs")
        for name, allowed in (
            ("remat", REMAT),
            ("dtype", ("auto", "float32", "bfloat16")),
            ("scan", ("auto", "yes", "no")),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"model.{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")

    def on(self, backend: str) -> "Config":
        """This config with every "auto" settled for a backend ("cpu", "gpu", "tpu").

        On CPU a scanned stack trains 6 % slower and static query blocks 4 % faster, and bfloat16 gains little;
        elsewhere scanning keeps compile time flat in depth and matrix units want bfloat16.
        """
        cpu = backend == "cpu"
        auto = {
            "dtype": "float32" if cpu else "bfloat16",
            "scan": "no" if cpu else "yes",
            "query_blocks": 2 if cpu else 1,
        }
        return dataclasses.replace(self, **{k: v for k, v in auto.items() if getattr(self, k) == "auto"})
