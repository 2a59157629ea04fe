"""The shape of a decoder-only transformer, and how it is computed."""

import dataclasses

from lm.core.errors import UserError

CHOICES = {
    "norm": ("rms", "layer"),
    "norm_at": ("input", "output", "both"),
    "qk_norm_over": ("head", "all"),
    "activation": ("silu", "gelu"),
    "bias": ("none", "qkv", "attention", "all"),
    "positions": ("rope", "learned"),
    "rope_scaling": ("none", "linear", "llama3", "yarn"),
    "lora_base_dtype": ("float32", "bfloat16", "int8"),
    "remat": ("none", "block", "dots"),
    "dtype": ("auto", "float32", "bfloat16"),
    "cache_dtype": ("auto", "float32", "bfloat16", "int8"),
    "scan": ("auto", "yes", "no"),
    "attention": ("auto", "xla", "cudnn", "splash"),
}
KERNEL_PLATFORMS = {
    "cudnn": ("gpu", "an NVIDIA GPU"),
    "splash": ("tpu", "a TPU"),
}  # what an implementation of attention runs on
MINIMUMS = {
    0: (
        *("window", "global_every", "experts", "loss_chunk", "attention_scale", "attention_softcap", "logit_softcap"),
        *("rope_local_base", "rope_original", "rope_attention", "base_width", "lora_rank"),
    ),
    1: ("vocab_size", "layers", "width", "heads", "kv_heads", "head_size", "hidden", "context", "experts_per_token"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of one model. The first blocks fix what it computes, the last only how that is done.

    The defaults are a Llama with normalised queries and keys; lm.model.presets has the models that people use.
    `scan`, `dtype`, `cache`, `attention` and `query_blocks` may be left to the platform ("auto"): see `for_backend`.
    """

    vocab_size: int
    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int = 4  # fewer than heads: grouped-query attention (Ainslie et al. 2023, arXiv 2305.13245)
    head_size: int = 32
    hidden: int = 384  # of the SwiGLU; 3 x width costs what 4.5 x width costs without the gate
    qk_norm: bool = True  # norm of queries and keys (Dehghani et al. 2023, arXiv 2302.05442)
    tie_embeddings: bool = True  # the output matrix is the embedding
    base_width: int = (
        0  # muP: the width whose learning rate transfers to every other; 0: off (see lm.model.params.param_specs)
    )

    norm: str = "rms"  # or layer, which also centres and has a bias (GPT-2)
    norm_at: str = "input"  # of attention and MLP; their output (OLMo 2), or both (Gemma)
    norm_unit_offset: bool = False  # scales are stored less one (Gemma)
    qk_norm_over: str = "head"  # or all heads of a token together (OLMo 2)
    activation: str = "silu"  # or gelu, by tanh (GPT-2, Gemma)
    gated: bool = True  # the MLP's up projection times its activated gate (Shazeer 2020, arXiv 2002.05202)
    bias: str = "none"  # qkv (Qwen 2.5), attention, or all (GPT-2): of the projections
    embedding_scale: float = 1.0  # what a looked-up embedding is multiplied by (Gemma: sqrt(width))
    attention_scale: float = 0.0  # of q k^T; 0: head_size^-1/2
    attention_softcap: float = 0.0  # c tanh(x / c) of attention's logits (Gemma 2); 0: none
    logit_softcap: float = 0.0  # the same of the output's logits, in the loss and in sampling alike
    window: int = 0  # keys that a query sees, itself among them (Mistral); 0: all before it
    global_every: int = 0  # with a window: layers k, 2k, ... see everything (Gemma); 0: none does
    experts: int = 0  # MLPs of which each token takes experts_per_token (Mixtral); 0: one MLP for all
    experts_per_token: int = 2
    experts_normalized: bool = True  # the weights of a token's experts sum to one

    context: int = 256  # positions the model is used at; only learned positions have a table of that size
    positions: str = "rope"  # how positions are encoded: rotary (Su et al. 2021), or learned, one vector each (GPT-2)
    rope_base: float = 10_000.0
    rope_local_base: float = 0.0  # of the layers with a window, which then are not rescaled (Gemma 3); 0: the same
    rope_scaling: str = "none"  # how a longer context is reached from rope_original: linear, llama3, yarn
    rope_factor: float = 1.0
    rope_original: int = 0  # the context before scaling
    rope_low: float = 1.0  # rotations within it, below which a frequency is slowed by rope_factor
    rope_high: float = 4.0  # rotations above which it stays (yarn: 32)
    rope_attention: float = 0.0  # yarn: cos and sin times this; 0: 0.1 ln(rope_factor) + 1
    norm_eps: float = 1e-6

    lora_rank: int = 0  # of the adapters that are learned on a frozen base (Hu et al. 2021, arXiv 2106.09685); 0: none
    lora_alpha: float = 16.0  # their product counts lora_alpha / lora_rank
    lora_targets: str = "query,value"  # the matrices that have them
    lora_base_dtype: str = "float32"  # how the base is kept: also bfloat16, int8

    dtype: str = "auto"  # of the matrix products; parameters, norms, softmax and losses stay float32
    cache_dtype: str = (
        "auto"  # how keys and values are kept for decoding: auto as dtype; int8 with a scale a head of a slot
    )
    scan: str = "auto"  # "yes": one compiled block for all layers; "no": unrolled
    attention: str = "auto"  # of whole rows: plain xla, or the kernel of a platform, cudnn or splash (lm.model.kernels)
    remat: str = "none"  # what the backward pass recomputes: nothing, each block, or all but matrix products
    query_blocks: str | int = (
        "auto"  # causal attention in so many static blocks of queries, each with its own keys only
    )
    loss_chunk: int = 0  # positions a row whose logits exist at a time in the loss; 0: all

    def __post_init__(self):
        for least, names in MINIMUMS.items():
            for name in names:
                if getattr(self, name) < least:
                    raise UserError(f"model.{name} is {getattr(self, name)}; it must be at least {least}")
        for name, allowed in CHOICES.items():
            if getattr(self, name) not in allowed:
                raise UserError(f"model.{name} is {getattr(self, name)!r}; choose one of {', '.join(allowed)}")
        if self.query_blocks != "auto" and not (isinstance(self.query_blocks, int) and self.query_blocks >= 1):
            raise UserError(f"model.query_blocks is {self.query_blocks!r}; it must be at least 1, or auto")
        if self.heads % self.kv_heads:
            raise UserError(f"model.heads {self.heads} is not a multiple of model.kv_heads {self.kv_heads}")
        if self.head_size % 2 and self.positions == "rope":
            raise UserError(f"model.head_size {self.head_size} is odd; rotary positions turn pairs")
        if self.global_every and not self.window:
            raise UserError(f"model.global_every is {self.global_every}, but there is no model.window: give one")
        if self.experts and self.experts_per_token > self.experts:
            raise UserError(f"model.experts_per_token {self.experts_per_token} is above model.experts {self.experts}")
        if self.rope_scaling in ("llama3", "yarn") and not self.rope_original:
            raise UserError(f"model.rope_scaling {self.rope_scaling} needs model.rope_original, the context before it")
        if unable := self.unsupported_reason(self.attention):
            raise UserError(f"model.attention is {self.attention!r}, which {unable}: leave it to auto, or choose xla")

    def unsupported_reason(self, attention: str) -> str:
        """Why that implementation of attention cannot compute this model; "" if it can."""
        if attention != "cudnn":
            return ""
        if self.attention_softcap:
            return f"has no cap for model.attention_softcap {self.attention_softcap:g}"
        if self.head_size % 8 or self.head_size > 128:
            return f"takes head sizes that are multiples of 8 up to 128, not model.head_size {self.head_size}"
        return "computes in bfloat16, not model.dtype float32" if self.dtype == "float32" else ""

    def runs_on(self, backend: str) -> bool:
        """Whether a backend has the implementation of attention that was chosen."""
        return self.attention not in KERNEL_PLATFORMS or KERNEL_PLATFORMS[self.attention][0] == backend

    @property
    def local_layers(self) -> tuple[bool, ...]:
        """Whether each layer sees only its window."""
        every = self.global_every
        return tuple(bool(self.window) and not (every and (i + 1) % every == 0) for i in range(self.layers))

    def for_backend(self, backend: str) -> "ModelConfig":
        """This config with every "auto" settled for a backend ("cpu", "gpu", "tpu").

        On CPU a scanned stack trains 6 % slower and static query blocks 4 % faster, and bfloat16 gains little;
        elsewhere scanning keeps compile time flat in depth and matrix units want bfloat16. Attention is the platform's
        kernel where it can compute this model, else xla.

        Raises UserError for an attention that was chosen and that the backend lacks.
        """
        if not self.runs_on(backend):
            raise UserError(
                f"model.attention is {self.attention!r}, which needs {KERNEL_PLATFORMS[self.attention][1]}; "
                f"this is a {backend}: "
                "leave it to auto, or choose xla"
            )
        cpu = backend == "cpu"
        dtype = ("float32" if cpu else "bfloat16") if self.dtype == "auto" else self.dtype
        auto = {"dtype": dtype, "cache_dtype": dtype, "scan": "no" if cpu else "yes", "query_blocks": 2 if cpu else 1}
        c = dataclasses.replace(self, **{k: v for k, v in auto.items() if getattr(self, k) == "auto"})
        if c.attention != "auto":
            return c
        able = [
            name
            for name, (needed, _) in KERNEL_PLATFORMS.items()
            if needed == backend and not c.unsupported_reason(name)
        ]
        return dataclasses.replace(c, attention=able[0] if able else "xla")
