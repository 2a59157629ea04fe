"""Models that people use, by name: keyword arguments of Config.

    config.model = ConfigDict(presets.llama3_8b())

Each docstring says where the shape is published, and how many parameters that makes.
"""

import math
from typing import Any

Options = dict[str, Any]

LLAMA = dict(qk_norm=False, tie_embeddings=False, norm_eps=1e-5)
LLAMA_3 = dict(LLAMA, vocab_size=128_256, kv_heads=8, rope_base=500_000.0)
LLAMA_3_1 = dict(rope_scaling="llama3", rope_original=8192, context=131_072)
QWEN_2_5 = dict(qk_norm=False, bias="qkv", rope_base=1e6)
QWEN_3 = dict(vocab_size=151_936, head_size=128, rope_base=1e6, context=40_960)
OLMO_2 = dict(
    vocab_size=100_352, head_size=128, tie_embeddings=False, norm_at="output", qk_norm_over="all", rope_base=500_000.0
)
SMOLLM_2 = dict(vocab_size=49_152, head_size=64, qk_norm=False, norm_eps=1e-5, context=8192)


def _sizes(layers: int, width: int, heads: int, hidden: int, **others: Any) -> Options:
    """As many kv heads as heads, that share the width, unless `others` say otherwise."""
    return dict(layers=layers, width=width, heads=heads, hidden=hidden) | {
        "kv_heads": heads,
        "head_size": width // heads,
        **others,
    }


def _gpt2(layers: int, width: int, heads: int) -> Options:
    fixed = dict(vocab_size=50_257, context=1024, positions="learned", norm="layer", norm_eps=1e-5)
    fixed |= dict(bias="all", gated=False, activation="gelu", qk_norm=False)
    return _sizes(layers, width, heads, 4 * width, **fixed)


def _gemma(layers: int, width: int, heads: int, hidden: int, **others: Any) -> Options:
    fixed = dict(head_size=256, norm_at="both", norm_unit_offset=True, activation="gelu")
    return _sizes(layers, width, heads, hidden, **fixed, embedding_scale=math.sqrt(width), **others)


def _gemma2(layers: int, width: int, heads: int, kv_heads: int, hidden: int) -> Options:
    fixed = dict(vocab_size=256_000, context=8192, window=4096, global_every=2, qk_norm=False)
    fixed |= dict(attention_scale=1 / 16, attention_softcap=50.0, logit_softcap=30.0)
    return _gemma(layers, width, heads, hidden, kv_heads=kv_heads, **fixed)


def _gemma3(layers: int, width: int, hidden: int) -> Options:
    fixed = dict(vocab_size=262_144, context=32_768, window=512, global_every=6, attention_scale=1 / 16)
    fixed |= dict(rope_base=1e6, rope_local_base=10_000.0)
    return _gemma(layers, width, 4, hidden, kv_heads=1, **fixed)


def gpt2() -> Options:
    """124,439,808 parameters ("124M"). Radford et al. 2019, table 2, corrected in openai/gpt-2's README."""
    return _gpt2(12, 768, 12)


def gpt2_medium() -> Options:
    """354,823,168 parameters ("355M"). Radford et al. 2019, table 2."""
    return _gpt2(24, 1024, 16)


def gpt2_large() -> Options:
    """774,030,080 parameters ("774M"). Radford et al. 2019, table 2."""
    return _gpt2(36, 1280, 20)


def gpt2_xl() -> Options:
    """1,557,611,200 parameters ("1.5B"). Radford et al. 2019, table 2."""
    return _gpt2(48, 1600, 25)


def llama2_7b() -> Options:
    """6,738,415,616 parameters ("7B"). Touvron et al. 2023, arXiv 2307.09288; sizes of arXiv 2302.13971, table 2."""
    return _sizes(32, 4096, 32, 11_008, **LLAMA, vocab_size=32_000, context=4096)


def llama2_13b() -> Options:
    """13,015,864,320 parameters ("13B"). Touvron et al. 2023, arXiv 2307.09288; sizes of arXiv 2302.13971, table 2."""
    return _sizes(40, 5120, 40, 13_824, **LLAMA, vocab_size=32_000, context=4096)


def llama3_8b() -> Options:
    """8,030,261,248 parameters ("8B"). Grattafiori et al. 2024, table 3, arXiv 2407.21783."""
    return _sizes(32, 4096, 32, 14_336, **LLAMA_3, context=8192)


def llama3_70b() -> Options:
    """70,553,706,496 parameters ("70B"). Grattafiori et al. 2024, table 3, arXiv 2407.21783."""
    return _sizes(80, 8192, 64, 28_672, **LLAMA_3, context=8192)


def llama3_1_8b() -> Options:
    """8,030,261,248 parameters ("8B"). Grattafiori et al. 2024, table 3, arXiv 2407.21783: a context of 128K."""
    return llama3_8b() | LLAMA_3_1 | dict(rope_factor=8.0)


def llama3_2_1b() -> Options:
    """1,235,814,400 parameters ("1.23B"). Model card of meta-llama/Llama-3.2-1B."""
    return _sizes(16, 2048, 32, 8192, **LLAMA_3 | LLAMA_3_1, rope_factor=32.0) | dict(tie_embeddings=True)


def llama3_2_3b() -> Options:
    """3,212,749,824 parameters ("3.21B"). Model card of meta-llama/Llama-3.2-3B."""
    return _sizes(28, 3072, 24, 8192, **LLAMA_3 | LLAMA_3_1, rope_factor=32.0) | dict(tie_embeddings=True)


def mistral_7b() -> Options:
    """7,241,732,096 parameters ("7B"). Jiang et al. 2023, table 1, arXiv 2310.06825: v0.1, with its window."""
    return _sizes(32, 4096, 32, 14_336, **LLAMA, vocab_size=32_000, kv_heads=8, window=4096, context=32_768)


def mixtral_8x7b() -> Options:
    """46,702,792,704 parameters ("46.7B"), 12.9B of them a token's. Jiang et al. 2024, table 1, arXiv 2401.04088."""
    sizes = _sizes(32, 4096, 32, 14_336, **LLAMA, vocab_size=32_000, kv_heads=8, context=32_768, rope_base=1e6)
    return sizes | dict(experts=8, experts_per_token=2)


def qwen2_5_0_5b() -> Options:
    """494,032,768 parameters ("0.49B"). Model card of Qwen/Qwen2.5-0.5B; Qwen 2024, arXiv 2412.15115."""
    return _sizes(24, 896, 14, 4864, **QWEN_2_5, vocab_size=151_936, kv_heads=2, context=32_768)


def qwen2_5_7b() -> Options:
    """7,615,616,512 parameters ("7.61B"). Model card of Qwen/Qwen2.5-7B; Qwen 2024, arXiv 2412.15115."""
    return _sizes(
        28, 3584, 28, 18_944, **QWEN_2_5, vocab_size=152_064, kv_heads=4, context=131_072, tie_embeddings=False
    )


def qwen3_0_6b() -> Options:
    """596,049,920 parameters ("0.6B"). Yang et al. 2025, table 1, arXiv 2505.09388."""
    return _sizes(28, 1024, 16, 3072, **QWEN_3, kv_heads=8)


def qwen3_8b() -> Options:
    """8,190,735,360 parameters ("8.2B"). Yang et al. 2025, table 1, arXiv 2505.09388; model card of Qwen/Qwen3-8B."""
    return _sizes(36, 4096, 32, 12_288, **QWEN_3, kv_heads=8, tie_embeddings=False)


def qwen3_30b_a3b() -> Options:
    """30,532,122,624 parameters ("30.5B"), 3.3B of them a token's. Yang et al. 2025, table 2, arXiv 2505.09388."""
    sizes = _sizes(48, 2048, 32, 768, **QWEN_3, kv_heads=4, tie_embeddings=False)
    return sizes | dict(experts=128, experts_per_token=8)


def gemma2_2b() -> Options:
    """2,614,341,888 parameters ("2.6B"). Gemma Team 2024, tables 1 and 2, arXiv 2408.00118."""
    return _gemma2(26, 2304, 8, 4, 9216)


def gemma2_9b() -> Options:
    """9,241,705,984 parameters ("9.2B"). Gemma Team 2024, tables 1 and 2, arXiv 2408.00118."""
    return _gemma2(42, 3584, 16, 8, 14_336)


def gemma3_270m() -> Options:
    """268,098,176 parameters ("270M"). Model card of google/gemma-3-270m."""
    return _gemma3(18, 640, 2048)


def gemma3_1b() -> Options:
    """999,885,952 parameters ("1B"). Gemma Team 2025, table 1, arXiv 2503.19786; model card of google/gemma-3-1b-pt."""
    return _gemma3(26, 1152, 6912)


def olmo2_1b() -> Options:
    """1,484,916,736 parameters (its name says 1B). Model card of allenai/OLMo-2-0425-1B."""
    return _sizes(16, 2048, 16, 8192, **OLMO_2, context=4096)


def olmo2_7b() -> Options:
    """7,298,617,344 parameters ("7B"). OLMo Team 2024, table 3, arXiv 2501.00656."""
    return _sizes(32, 4096, 32, 11_008, **OLMO_2, context=4096)


def phi3_mini() -> Options:
    """3,821,079,552 parameters ("3.8B"). Abdin et al. 2024, sec. 2, arXiv 2404.14219: the one of 4K positions."""
    return _sizes(32, 3072, 32, 8192, **LLAMA, vocab_size=32_064, window=2047, context=4096)


def smollm2_135m() -> Options:
    """134,515,008 parameters ("135M"). Allal et al. 2025, arXiv 2502.02737; card of HuggingFaceTB/SmolLM2-135M."""
    return _sizes(30, 576, 9, 1536, **SMOLLM_2, kv_heads=3, rope_base=100_000.0)


def smollm2_360m() -> Options:
    """361,821,120 parameters ("360M"). Allal et al. 2025, arXiv 2502.02737; card of HuggingFaceTB/SmolLM2-360M."""
    return _sizes(32, 960, 15, 2560, **SMOLLM_2, kv_heads=5, rope_base=100_000.0)


def smollm2_1_7b() -> Options:
    """1,711,376,384 parameters ("1.7B"). Allal et al. 2025, arXiv 2502.02737; card of HuggingFaceTB/SmolLM2-1.7B."""
    return _sizes(24, 2048, 32, 8192, **SMOLLM_2, rope_base=130_000.0)
