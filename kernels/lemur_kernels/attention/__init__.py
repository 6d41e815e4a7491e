"""Softmax attention under the mask rule; see api.attention."""

from lemur_kernels.attention.api import attention, attention_with_lse
from lemur_kernels.attention.gather import gather_attention
from lemur_kernels.attention.ring import ring_attention

__all__ = ["attention", "attention_with_lse", "gather_attention", "ring_attention"]
