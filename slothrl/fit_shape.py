"""What a model is made of, counted on the meta device: no weights are loaded, and none are needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from slothrl.errors import UserError


@dataclass(frozen=True)
class Shape:
    """The sizes that decide how much memory a model takes.

    Attributes:
        matrices: (outputs, inputs) of every linear layer but the head: what quantisation packs.
        embedding, head, rest: values of the input embedding, of the head (0 where it is the embedding), and of all
            other parameters (norms, biases).
        norms: RMS norms of the model's width in one layer, which keep their inputs in float32.
        head_norms: whether queries and keys are normed too (Qwen 3, Gemma 3).
        rank, adapter, adapter_tensors: the LoRA's rank, its values, and the tensors they are in.
        frozen_embedding: no LoRA goes into the input embedding.
    """

    layers: int
    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    matrices: tuple[tuple[int, int], ...]
    embedding: int
    head: int
    rest: int
    norms: int = 2
    head_norms: bool = False
    rank: int = 0
    adapter: int = 0
    adapter_tensors: int = 0
    frozen_embedding: bool = True

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def key_value(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def packed(self) -> int:
        """Values in all `matrices`."""
        return sum(outputs * inputs for outputs, inputs in self.matrices)

    @property
    def largest(self) -> int:
        """Values of the largest matrix: what is unpacked at one time."""
        return max(outputs * inputs for outputs, inputs in self.matrices)

    @property
    def parameters(self) -> int:
        return self.packed + self.embedding + self.head + self.rest


def shape_of(model: Any, adapter: Any) -> Shape:
    """Count a causal LM of transformers, and the adapter that PEFT would make for it.

    Args:
        model: without an adapter, on any device; with weights on the meta device it takes no memory. PEFT's layers
            are put into it.
        adapter: a `peft.LoraConfig`.

    Raises:
        UserError: a decoder that the formulas do not describe: mixture of experts, or no plain MLP and attention.
    """
    from peft import get_peft_model

    text = model.config.get_text_config()
    _check(text, type(model).__name__)
    heads = text.num_attention_heads
    found = _count(model)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    norms, head_norms = _norms(model, text.hidden_size, text.num_hidden_layers)
    wrapped = get_peft_model(model, adapter, low_cpu_mem_usage=True)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    return Shape(
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        mlp=text.intermediate_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=head_dim,
        vocabulary=text.vocab_size,
        norms=norms,
        head_norms=head_norms,
        rank=adapter.r,
        adapter=sum(parameter.numel() for parameter in trained),
        adapter_tensors=len(trained),
        frozen_embedding=isinstance(wrapped.get_base_model().get_input_embeddings(), nn.Embedding),
        **found,
    )


def _check(text: Any, name: str) -> None:
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    missing = [size for size in sizes if not isinstance(getattr(text, size, None), int)]
    if missing:
        raise UserError(f"fit: {name}'s config has no {', '.join(missing)}: it is no decoder that can be predicted")
    experts = [size for size in ("num_experts", "num_local_experts", "n_routed_experts") if getattr(text, size, None)]
    if experts:
        raise UserError(f"fit: {name} is a mixture of experts ({experts[0]}), which is not predicted")


def _count(model: Any) -> dict[str, Any]:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    # On the meta device transformers may not have tied them yet.
    tied = head.weight is embedding.weight or getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    matrices = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
    in_matrices = {id(matrix.weight) for matrix in matrices}
    named = {id(embedding.weight), id(head.weight)}
    rest = [p.numel() for p in model.parameters() if id(p) not in in_matrices | named]
    return {
        "matrices": tuple((matrix.out_features, matrix.in_features) for matrix in matrices),
        "embedding": embedding.weight.numel(),
        "head": 0 if tied else head.weight.numel(),
        "rest": sum(rest),
    }


def _norms(model: Any, hidden: int, layers: int) -> tuple[int, bool]:
    """(norms of the model's width in a layer, whether there are norms of queries and keys)."""
    named = [(name, m) for name, m in model.named_modules() if "norm" in type(m).__name__.lower()]
    sizes = [sum(p.numel() for p in m.parameters()) for _, m in named]
    wide = sum(size == hidden for size in sizes) - 1  # the last one is the decoder's own
    heads = any(name.rsplit(".", 1)[-1] in ("q_norm", "k_norm") for name, _ in named)
    return max(wide, layers) // layers, heads
