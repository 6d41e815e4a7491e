"""transformers' own Llama layer as a second witness, when it is asked for and installed.

The only place that may touch transformers and torch, and only inside the function that a user asks
for by a flag: a conversion never needs them. Imported by name so that no import of this package can
pull them in.
"""

import importlib
from types import ModuleType
from typing import Any

import numpy as np

from lemur_jax.convert.errors import ConversionError
from lemur_jax.convert.hf_config import config_to_hf
from lemur_jax.convert.parity.weights import Weights


class TransformersLayer:
    """LlamaDecoderLayer in float32 at given positions; one layer's weights at a time."""

    def __init__(self, weights: Weights, positions_BT: np.ndarray):
        """Raises ConversionError if transformers or torch is not installed."""
        self.weights = weights
        self.torch = _module("torch")
        llama = _module("transformers.models.llama.modeling_llama")
        configuration = _module("transformers").LlamaConfig
        config = configuration.from_dict(config_to_hf(weights.config))
        config._attn_implementation = "eager"
        with self.torch.device("meta"):
            self.layer = llama.LlamaDecoderLayer(config, 0).eval()
        positions = self.torch.from_numpy(positions_BT)
        rotary = llama.LlamaRotaryEmbedding(config)
        # Row by row: `dynamic` takes its length from the longest row of a call.
        turned = [rotary(self.torch.zeros(1), positions[i : i + 1]) for i in range(len(positions))]
        self.turned = [self.torch.cat(parts) for parts in zip(*turned)]
        visible_BTS = positions_BT[:, None, :] <= positions_BT[:, :, None]
        lowest = np.finfo(np.float32).min
        self.mask = self.torch.from_numpy(np.where(visible_BTS, 0, lowest).astype(np.float32))

    def __call__(self, x_BTE: np.ndarray, layer: int) -> np.ndarray:
        """The layer's output for hidden states [B,T,E], float32."""
        prefix = f"model.layers.{layer}."
        state: dict[str, Any] = {}
        for leaf in self.weights.layer_leaves:
            name = self.weights.rules[leaf].theirs.format(layer).removeprefix(prefix)
            array = self.weights.tensor(leaf, layer).astype(np.float32)
            state[name] = self.torch.from_numpy(np.ascontiguousarray(array))
        self.layer.load_state_dict(state, assign=True)
        with self.torch.no_grad():
            result = self.layer(
                self.torch.from_numpy(x_BTE.astype(np.float32)),
                attention_mask=self.mask[:, None],
                position_embeddings=tuple(self.turned),
            )
        result = result[0] if isinstance(result, tuple) else result  # v4 up to 4.53: a tuple
        found = result.numpy().copy()
        self.layer.to("meta")  # one layer's weights are resident at a time
        return found


def _module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConversionError(
            [f"--transformers needs {name.split('.')[0]}, which is not installed ({error})"]
        ) from error
