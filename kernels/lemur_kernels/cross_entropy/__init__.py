"""Cross-entropy over the vocabulary without full logits; see api.cross_entropy."""

from lemur_kernels.cross_entropy.api import cross_entropy
from lemur_kernels.cross_entropy.reference import CrossEntropy

__all__ = ["CrossEntropy", "cross_entropy"]
