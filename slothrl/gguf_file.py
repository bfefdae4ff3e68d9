"""A merged model as one GGUF file, written tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quant_shape_to_byte_shape, quantize

from slothrl.errors import UserError
from slothrl.gguf_layout import (
    ROPE_FACTORS,
    add_metadata,
    check_architecture,
    gguf_name,
    name_map,
    reorder,
    rope_factors,
)
from slothrl.gguf_vocabulary import add_vocabulary
from slothrl.merge import MergedWeights

TYPES = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
QUANTIZATION_VERSION = 2  # ggml's GGML_QNT_VERSION


@dataclass(frozen=True)
class GGUFTensor:
    """A tensor that will be written: its name there and in the checkpoint (None: made here), its shape, its type."""

    name: str
    source: str | None
    shape: tuple[int, ...]
    kind: GGMLQuantizationType

    @property
    def nbytes(self) -> int:
        return int(np.prod(quant_shape_to_byte_shape(self.shape, self.kind)))


def write_gguf(path: Path, merged: MergedWeights, tokenizer: Any, kind: str, title: str) -> None:
    """Write `path`.

    Args:
        tokenizer: the fast tokenizer of the model.
        kind: a key of `TYPES`; norms and biases stay float32, and rows that are no multiple of q8_0's 32 become f16.
        title: the model's name in the file.
    Raises:
        UserError: the architecture or the tokenizer is not covered, or a value is beyond float16.
    """
    config = merged.model_config
    architecture = check_architecture(config)
    planned = plan_tensors(merged, kind)
    writer = GGUFWriter(None, arch=_architecture_name(architecture))
    add_metadata(writer, config, title)
    writer.add_file_type(TYPES[kind][1])
    if kind == "q8_0":
        writer.add_quantization_version(QUANTIZATION_VERSION)
    add_vocabulary(writer, tokenizer, config.vocab_size)
    for tensor in planned:
        # The dtype stands for "not packed yet": the library then takes the shape as it is.
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=tensor.kind)
    try:
        writer.write_header_to_file(path)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for data in _packed(planned, merged, architecture):
            writer.write_tensor_data(data)
    finally:
        writer.close()


def plan_tensors(merged: MergedWeights, kind: str) -> list[GGUFTensor]:
    """What the file will hold; reads no weights. Raises `UserError` for a tensor without a GGUF name."""
    config = merged.model_config
    names = name_map(check_architecture(config), config)
    planned = []
    for name in merged.names:
        if name.endswith(".rotary_emb.inv_freq"):  # old checkpoints carry this buffer; it follows from the config
            continue
        shape = merged.shape(name)
        planned.append(GGUFTensor(gguf_name(names, name), name, shape, _type_for(shape, kind)))
    factors = rope_factors(config)
    if factors is not None:
        planned.append(GGUFTensor(ROPE_FACTORS, None, tuple(factors.shape), GGMLQuantizationType.F32))
    return planned


def _type_for(shape: tuple[int, ...], kind: str) -> GGMLQuantizationType:
    wanted = TYPES[kind][0]
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    return wanted if shape[-1] % GGML_QUANT_SIZES[wanted][0] == 0 else GGMLQuantizationType.F16


def _packed(planned: list[GGUFTensor], merged: MergedWeights, architecture: Any) -> Iterator[np.ndarray]:
    config = merged.model_config
    for tensor in planned:
        if tensor.source is None:
            value: Any = rope_factors(config)
        else:
            value = reorder(merged.tensor(tensor.source).float(), tensor.source, architecture, config)
        if tensor.kind == GGMLQuantizationType.F16 and value.abs().max() > torch.finfo(torch.float16).max:
            raise UserError(f"{tensor.source} has values beyond float16's range: export as bf16 or q8_0")
        yield quantize(value.contiguous().numpy(), tensor.kind)


def _architecture_name(architecture: Any) -> str:
    from gguf import MODEL_ARCH_NAMES

    return MODEL_ARCH_NAMES[architecture]
