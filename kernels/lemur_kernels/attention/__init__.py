"""Softmax attention under the mask rule; see api.attention."""

from lemur_kernels.attention.api import attention

__all__ = ["attention"]
