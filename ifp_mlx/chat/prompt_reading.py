"""Reading a long prompt in pieces that take half a second: it can be watched, and stopped."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ifp_mlx.chat.kv_cache import KVCache
from ifp_mlx.chat.reading import ReadsWithPart
from ifp_mlx.chat.sampling import KVCacheOptions

OnRead = Callable[[int, int], None]
"""Takes the tokens of the prompt that are read, and how many there are. What it raises ends the
answer; what was read until then is kept."""

_PIECE_S = 0.5
_FIRST_PIECE_TOKENS = 32
"""Tells how fast this model reads on this machine."""

_FEWEST_TOKENS = 16
"""Fewer at a time are read hardly sooner: all weights are gone through for each piece."""

_MOST_TOKENS = 2048
"""Mlx-lm's own piece, by which memory is predicted."""


def read_ahead(
    model: nn.Module,
    token_ids: Sequence[int],
    kv_cache: KVCache,
    kv_options: KVCacheOptions,
    on_read: OnRead,
) -> int:
    """Read a prompt but for its last piece, which is mlx-lm's to read; return how much. Evaluates.

    Args:
        model: what answers. Of one that reads with a part the part reads here: the tail, which the
            whole model reads, is in the last piece, and is one token of a long prompt.
        token_ids: of the prompt, without what the cache holds already.
        kv_cache: grows.
        kv_options: how it is kept.
        on_read: called after each piece.
    """
    from mlx_lm.generate import generation_stream, maybe_quantize_kv_cache, wired_limit

    total, done = len(token_ids), 0
    reader, tail, reads_all = model, 0, False
    if isinstance(model, ReadsWithPart):
        reader, tail = model.reader, model.tail_of(total)
        reads_all = tail == 0
    most_left = 2 * _FIRST_PIECE_TOKENS + tail  # a short prompt is not split up
    # CUDA devices read mlx-lm's pieces in a moment: there is nothing to learn, and time to lose.
    size = _MOST_TOKENS if mx.cuda.is_available() else _FIRST_PIECE_TOKENS
    on_read(0, total)
    if total <= most_left:
        return 0
    streams: Any = [generation_stream]
    with wired_limit(reader, streams), mx.stream(generation_stream):
        while total - done > (1 if reads_all else max(size, most_left)):
            piece = list(token_ids[done : min(done + size, total - tail - 1)])
            start = time.perf_counter()
            reader(mx.array(piece)[None], cache=kv_cache.layers)
            maybe_quantize_kv_cache(
                kv_cache.layers,
                quantized_kv_start=kv_options.quantized_kv_start,
                kv_group_size=kv_options.kv_group_size,
                kv_bits=kv_options.kv_bits,
            )
            mx.eval([layer.state for layer in kv_cache.layers])
            mx.clear_cache()
            done += len(piece)
            on_read(done, total)
            affordable = int(len(piece) * _PIECE_S / (time.perf_counter() - start))
            affordable = min(max(affordable, _FEWEST_TOKENS), _MOST_TOKENS)
            size = 1 << (affordable.bit_length() - 1)  # kernels are made for shapes
    return done
