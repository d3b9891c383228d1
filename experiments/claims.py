"""What widely copied labs and projects say of the cache's memory, beside what the arrays of those shapes take."""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp

from kvjax import primer
from kvjax.attention.base import AttentionConfig
from kvjax.attention.grouped import Grouped
from kvjax.attention.latent import Latent
from kvjax.attention.low_rank import LowRank
from kvjax.capacity import SHAPES, Shape, Sizes
from kvjax.decoder import DecoderConfig
from kvjax.recipes import parse

KIB, MIB, GIB, GB = 2**10, 2**20, 2**30, 10**9
COMPRESSION, PLUGIN, PROJECT = "KV compression lab", "cache compression plugin", "GQA project"
QUANTIZATION, CACHE = "KV optimization lab", "KV cache lab"

LLAMA = SHAPES["llama-7b"]
LLAMA70, LLAMA70_MHA = SHAPES["llama2-70b"], SHAPES["llama2-70b-mha"]
QWEN = Shape(Grouped(28, 4, head_dim=128, qkv_bias=True), DecoderConfig(3584, 28, 18944, False), 152_064, 1024)
DEEPSEEK_V2 = Latent(128, rank=512, rope_dim=64, nope_dim=128, value_dim=128, query_rank=1536)


class Claim(NamedTuple):
    """One row; texts but for `bytes`, what decides it."""

    document: str
    claim: str
    claimed: str
    measured: str
    bytes: int
    holds: bool
    remark: str


def documents(track: Callable[[list], Iterable] = iter) -> list[dict[str, Any]]:
    """Every claim, recomputed: rows that `experiments.capacity.claims_table` shows.

    `track` may wrap the list of documents to show progress.
    """
    groups = [_optimization_lab, _gqa_project, _compression_lab, _plugin, _cache_lab]
    return [claim._asdict() for group in track(groups) for claim in group()]


@functools.cache
def stored(shape: Shape, codec: str, batch: int, context: int, dtype: str = "float16") -> int:
    """Bytes that the tokens leave, of the arrays that decoding would use."""
    sizes = Sizes(shape, jnp.dtype(dtype))
    return sizes.cache_bytes(sizes.layers(parse(codec)), batch, context).memory


def with_attention(shape: Shape, attention: AttentionConfig) -> Shape:
    """The same model with another variant."""
    return dataclasses.replace(shape, attention=attention)


def gib(size: int) -> str:
    """In both units that a claim of GB may mean."""
    return f"{size / GIB:.2f} GiB ({size / GB:.2f} GB)"


def mib(size: int) -> str:
    """In MiB."""
    return f"{size / MIB:,.4g} MiB"


def _optimization_lab():
    """Its table for "a 70B model with 8K context", and its factors."""
    lab = with_attention(LLAMA, Grouped(32, 32, head_dim=128))  # its configuration: 32 layers, 32 heads of 128
    shapes = {"70B": LLAMA70, "70B of 64 kv heads": LLAMA70_MHA}
    exact = stored(lab, "fp16", 8, 8192)
    for precision, codec, size, batch in (("FP16", "fp16", 32, 4), ("FP8", "fp8", 16, 8), ("FP4", "nvfp4", 8, 16)):
        one = {name: stored(shape, codec, 1, 8192) for name, shape in shapes.items()}
        own = stored(lab, codec, 8, 8192)
        measured = "; ".join(
            f"{name}: {n / GIB:.2f} GiB a sequence, {32 * GIB // n} fit 32 GiB" for name, n in one.items()
        )
        remark = (
            f"the size is that of its own configuration, 32 layers of 32 heads, batch 8: {gib(own)}; not a 70B's"
        )
        if precision == "FP4":
            remark = f"its own configuration at batch 8 takes {gib(own)}: every 16 values carry a scale"
        claim = f"70B, 8K, {precision}: KV cache, max batch"
        yield Claim(QUANTIZATION, claim, f"{size} GB, {batch}", measured, own, False, remark)
    for name, codec, factor in (("FP8", "fp8", 2), ("FP8, blocks of 128", "fp8:b128", 2), ("NVFP4", "nvfp4", 4)):
        size = stored(lab, codec, 8, 8192)
        remark = {
            "fp8": "one scale a layer and array",
            "fp8:b128": "a float32 scale for every 128 values of a token",
            "nvfp4": "4 bits, and 8 more for every 16 values",
        }[codec]
        holds = exact == factor * size
        yield Claim(
            QUANTIZATION, f"{name}: compression", f"{factor}x", f"{exact / size:.2f}x", size, holds, remark
        )


def _gqa_project():
    """Its table "LLaMA-7B scale" at 2K, and its formula, which has 4 bytes an element."""
    mha = stored(LLAMA, "fp16", 1, 2048)
    rows = (("MHA", 32, 1024, "0%"), ("GQA-8", 8, 256, "75%"), ("GQA-4", 4, 128, "87.5%"), ("MQA", 1, 32, "96.9%"))
    for name, heads, claimed, saved in rows:
        shape = with_attention(LLAMA, Grouped(32, heads, head_dim=128))
        half, full = stored(shape, "fp16", 1, 2048), stored(shape, "exact", 1, 2048, "float32")
        measured = f"{mib(half)} at 2 bytes, {mib(full)} at 4; saved {1 - half / mha:.1%}"
        remark = "2 bytes an element, although its formula has 4; MB are MiB"
        claim = f"Llama-7B, 2K, {name}: cache, savings"
        yield Claim(PROJECT, claim, f"{claimed} MB, {saved}", measured, half, half == claimed * MIB, remark)


def _compression_lab():
    """Its examples; a low-rank latent that is joint is half as large as it says."""
    name, context = COMPRESSION, 4096
    mha = stored(LLAMA, "fp16", 1, context)
    yield Claim(
        name,
        "Llama-7B, 4K, fp16",
        "2147483648 bytes, 2 GB",
        f"{mha} bytes, {gib(mha)}",
        mha,
        mha == 2147483648,
        "right in bytes; GB are GiB; the formula above it counts elements",
    )
    gqa = stored(with_attention(LLAMA, Grouped(32, 4, head_dim=128)), "fp16", 1, context)
    measured, remark = f"{mib(gqa)}, {mha / gqa:.0f}x", "right; MB are MiB"
    yield Claim(name, "the same with 4 kv heads", "256 MB, 8x", measured, gqa, gqa == 256 * MIB, remark)
    for heads, factor in ((8, 4), (4, 8)):
        size = stored(with_attention(LLAMA, Grouped(32, heads, head_dim=128)), "fp16", 1, context)
        measured, remark = f"{mha / size:.0f}x", "heads over kv heads, whatever their number"
        yield Claim(
            name, f"GQA, 32 heads over {heads}", f"{factor}x", measured, size, mha == factor * size, remark
        )
    narrow = dataclasses.replace(LLAMA, decoder=dataclasses.replace(LLAMA.decoder, width=2048))
    yield _latent(
        narrow, 16, 256, "latent of 256, width 2048, 4K, fp16: compute_kv_cache_size(4096, 32, 1, 256, 2)", 8
    )
    small = dataclasses.replace(LLAMA, decoder=DecoderConfig(width=512, depth=1, mlp_width=1024))
    yield _latent(small, 8, 128, "LowRankKVAttention(512, 8 heads, d_latent 128)", 4)
    whole, grouped = stored(LLAMA70_MHA, "fp16", 1, 32_768), stored(LLAMA70, "fp16", 1, 32_768)
    measured = f"8 kv heads (Llama-2): {gib(grouped)}; 64: {gib(whole)}"
    remark = f"a sequence; 64 kv heads in float32: {gib(stored(LLAMA70_MHA, 'exact', 1, 32_768, 'float32'))}"
    yield Claim(name, "70B, 32K: the cache alone", "100 GB+", measured, whole, whole > 100 * GB, remark)
    deepseek = dataclasses.replace(LLAMA, decoder=DecoderConfig(width=5120, depth=60, mlp_width=12288))
    latent = stored(with_attention(deepseek, DEEPSEEK_V2), "fp16", 1, 1024)
    heads = stored(with_attention(deepseek, Grouped(128, 128, head_dim=128)), "fp16", 1, 1024)
    remark = "no product of GQA's factor and a latent's: a latent costs the same however many heads read it"
    measured = f"DeepSeek-V2: {heads / latent:.1f}x its own heads"
    yield Claim(name, "GQA and low rank combined", "16-64x", measured, latent, 16 <= heads / latent <= 64, remark)


def _latent(shape: Shape, heads: int, rank: int, claim: str, factor: int) -> Claim:
    """Of a joint latent and of one each for keys and values, against the shape's own heads."""
    width = shape.decoder.width
    variants = {
        "heads": Grouped(heads, heads, head_dim=width // heads),
        "joint": LowRank(heads, head_dim=width // heads, rank=rank),
        "split": LowRank(heads, head_dim=width // heads, rank=None, rank_k=rank, rank_v=rank),
    }
    size = {name: stored(with_attention(shape, variant), "fp16", 1, 4096) for name, variant in variants.items()}
    joint, split = (f"{mib(size[n])}, {size['heads'] / size[n]:.0f}x" for n in ("joint", "split"))
    remark = f"K and V from one latent, as it describes, is twice as small: {factor}x takes a latent for each"
    holds = size["heads"] == factor * size["joint"]
    return Claim(COMPRESSION, claim, f"{factor}x", f"joint: {joint}; two: {split}", size["joint"], holds, remark)


def _plugin():
    """Its measurements on Qwen2.5-7B, which are those of 1,024 tokens; values alone are compressed."""
    exact = stored(QWEN, "fp16", 1, 1024)
    codecs = {
        "baseline": ("fp16", 56, "", "1,024 tokens; MB are MiB"),
        "V in rank 120": ("k=fp16,v=pca120+fp16", 54, ", -3%", "right: 8 of 128 features of V, none of K"),
        "V in rank 96": ("k=fp16,v=pca96+fp16", 49, ", -12%", "right: 32 of 128 features of V, none of K"),
        "V in rank 120, INT8": ("k=fp16,v=pca120+int8", 41, ", -27%", "most of it is INT8's, not the rank's"),
    }
    for name, (codec, claimed, change, remark) in codecs.items():
        size = stored(QWEN, codec, 1, 1024)
        measured = f"{size / MIB:.2f} MiB" + (f", {size / exact - 1:+.1%}" if change else "")
        if "INT8" in name:
            remark += f": V whole in INT8 takes {stored(QWEN, 'k=fp16,v=int8', 1, 1024) / MIB:.2f} MiB"
        holds = round(size / MIB) == claimed
        yield Claim(PLUGIN, f"Qwen2.5-7B: {name}", f"{claimed} MB{change}", measured, size, holds, remark)
    sizes = {codec: stored(QWEN, codec, 1, 1024) for codec in ("int8", "int4", "int4:g32:asym")}
    measured = ", ".join(f"{codec} {exact / size:.2f}x" for codec, size in sizes.items())
    remark = "INT8 a little less, for its scales; INT4 nearly twice that"
    yield Claim(PLUGIN, "INT8 or INT4 in engines", "2x", measured, sizes["int8"], False, remark)
    ring = with_attention(QWEN, dataclasses.replace(QWEN.attention, window=4096))
    sizes = {context: stored(ring, "fp16", 1, context) for context in (2048, 8192, 32_768)}
    measured = ", ".join(f"{context:,}: {mib(size)}" for context, size in sizes.items())
    remark = "a window of 4,096: fixed once the text is as long"
    holds = sizes[8192] == sizes[32_768]
    yield Claim(PLUGIN, "sliding window", "fixed whatever the length", measured, sizes[32_768], holds, remark)


def _cache_lab():
    """It counts a query as one operation, however much of the cache it reads."""
    slots = sum(LLAMA.attention.band.num_seen(t) for t in range(100))
    token = stored(LLAMA, "fp16", 1, 1024) // 1024
    queries = {cached: primer.count_attention_operations(100, cached) for cached in (True, False)}
    yield Claim(
        CACHE,
        "100 tokens one by one: attention operations, with a cache and without",
        "100, 5050",
        f"{queries[True]:,} and {queries[False]:,} queries; with a cache these read {slots:,} slots",
        slots * token,
        queries == {True: 100, False: 5050},
        f"right for queries; what is read still grows with the square, in a Llama-7B to {gib(slots * token)}",
    )
