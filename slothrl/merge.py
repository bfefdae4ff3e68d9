"""An adapter merged into the original weights of its base, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import AutoConfig

from slothrl.adapter import Adapter
from slothrl.base_weights import BaseWeights
from slothrl.errors import UserError
from slothrl.safetensors_shards import Entry

HEAD = "lm_head.weight"
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight")


class MergedWeights:
    """W + scaling * B @ A for the layers of `adapter`, W for the others.

    A model whose embedding is also its output layer, and whose adapter is on one of the two, has two matrices
    afterwards: `untied` says so, and both are among `names`.

    Raises:
        UserError: the adapter has a layer that the base does not.
    """

    def __init__(self, base: BaseWeights, adapter: Adapter):
        self.base, self.adapter = base, adapter
        try:
            self.model_config = AutoConfig.from_pretrained(base.folder)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"the base {base.folder} is of no kind that transformers knows: {error}") from error
        self.names = list(base.names)
        embedding = next((name for name in self.names if name.endswith(_EMBEDDINGS)), None)
        tied = bool(self.model_config.get_text_config().tie_word_embeddings)
        touched = {f"{layer}.weight" for layer in adapter.layers} & {HEAD, embedding}
        self.untied = tied and bool(touched)
        # Some checkpoints store the tied output layer once more.
        self._source = {HEAD: embedding} if tied and embedding is not None else {}
        if tied and not self.untied:
            self.names = [name for name in self.names if name != HEAD]
        elif self.untied and HEAD not in self.names:
            self.names.append(HEAD)
        unknown = sorted(layer for layer in adapter.layers if f"{layer}.weight" not in self.names)
        if unknown:
            raise UserError(
                f"the base {base.folder} has no weight for the adapter's {unknown[0]}"
                f"{f' and {len(unknown) - 1} more' if unknown[1:] else ''}: it belongs to another model (--base)"
            )
        for layer in adapter.layers:  # a wrong shape is told before anything is written
            shape = self.shape(f"{layer}.weight")
            adapter.transposed(layer, shape)
            saved = adapter.layers[layer].base
            if saved is not None and tuple(saved.shape) != shape:
                raise UserError(f"the adapter was trained on a resized {layer}, {tuple(saved.shape)} and not {shape}")

    def shape(self, name: str) -> tuple[int, ...]:
        return self.base.shape(self._source.get(name, name))

    def entries(self, dtype: torch.dtype) -> list[Entry]:
        """What `rounded` will give; reads no weights."""
        found = []
        for name in self.names:
            stored = self.base.dtype(self._source.get(name, name))
            found.append(Entry(name, self.shape(name), dtype if stored.is_floating_point else stored))
        return found

    def tensor(self, name: str) -> torch.Tensor:
        """The merged tensor, in float32 where there was something to add; else as the base stores it."""
        layer = self.adapter.layers.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        saved = layer.base if layer is not None else None
        weight = saved.clone() if saved is not None else self.base.tensor(self._source.get(name, name))
        if layer is None:
            return weight
        transposed = self.adapter.transposed(name.removesuffix(".weight"), tuple(weight.shape))
        return weight.float().add_(layer.delta(transposed))

    def rounded(self, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
        """Every tensor in the order of `names`; floating-point ones rounded to `dtype`, once.

        Raises:
            UserError: a value is beyond the range of float16.
        """
        for name in self.names:
            tensor = self.tensor(name)
            if tensor.is_floating_point():
                tensor = tensor.to(dtype)
                if dtype == torch.float16 and not torch.isfinite(tensor).all():
                    raise UserError(f"{name} has values beyond float16's range: export in bfloat16")
            yield name, tensor.contiguous()
