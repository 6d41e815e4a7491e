"""Softmax attention under the mask rule; see api.attention."""

from lemur_kernels.attention.api import attention, attention_with_lse

__all__ = ["attention", "attention_with_lse"]
