"""Attention of a few new tokens over a paged KV cache; see api.decode_attention."""

from lemur_kernels.decode_attention.api import decode_attention
from lemur_kernels.decode_attention.pages import join, page_shape, quantize, split

__all__ = ["decode_attention", "join", "page_shape", "quantize", "split"]
