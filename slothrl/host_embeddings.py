"""Token embeddings in the host's pinned memory, from where a GPU's own kernels read the few rows that a step needs.

A step of 4,096 tokens reads 32 MB of the 1 GB of an 8B model's embeddings. Pinned memory has one address for host and
GPU (CUDA C++ Programming Guide, "Unified Virtual Address Space"), so that the weight stays a CUDA tensor, of other
memory: the module, torch's kernel and every bit of its result are the same, and only the way to the rows is longer.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn

from slothrl.host_memory import free_of_host
from slothrl.plan import Rows, size

WISHES = ("auto", "device", "host")
LEAST = 256 * 2**20  # bytes from which "auto" moves them: less is not worth a row in the plan
SHARE = 0.5  # of the host's free memory at most: nobody else can have what is pinned
CHUNK = 4096  # rows compared at a time
_held: weakref.WeakValueDictionary[int, HostCopy] = weakref.WeakValueDictionary()  # by address


class HostCopy:
    """A weight's values in the host's memory, there as long as a tensor over them is.

    Unlike memory of the device it does not wait for kernels when it goes: `return_embeddings` does, and a model whose
    last step was waited for may be dropped.

    Attributes:
        memory: the same shape and dtype, contiguous, on the CPU; pinned where a GPU is to read it.
    """

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The bytes as version 3 of Numba's CUDA Array Interface describes them, by which torch takes them over."""
        place = (self.memory.data_ptr(), False)  # False: not read-only, which torch refuses
        return {"shape": (self.memory.nbytes,), "typestr": "|u1", "data": place, "strides": None, "version": 3}


class PinnedMemory:
    """How a GPU gets at the host's memory; a test without one has another way."""

    device_type = "cuda"

    def copy(self, weight: Tensor) -> HostCopy:
        """Raises `RuntimeError` where the system pins no such memory."""
        return HostCopy(torch.empty(weight.shape, dtype=weight.dtype, device="cpu", pin_memory=True).copy_(weight))

    def bytes_on(self, device: torch.device, held: HostCopy) -> Tensor:
        """The copy's bytes (bytes,) uint8 as a tensor of `device`, which keeps `held`; nothing is copied.

        With an index in `device` torch (2.9 on) takes its word for where the memory is, and copies only to another
        device than that.
        """
        return torch.as_tensor(held, device=device)

    def let_go(self) -> None:
        """Give the driver what torch's allocator holds and nobody has: the device's embeddings in one piece, mostly."""
        torch.cuda.empty_cache()

    def finish(self, device: torch.device) -> None:
        """Wait for kernels that may still read the host's memory."""
        torch.cuda.synchronize(device)


def move_embeddings(model: Any, where: str, shared: bool = False, pinning: PinnedMemory | None = None) -> Rows:
    """Put a model's frozen input embeddings where `model.embeddings` says; rows for the plan table.

    Only their memory moves, and only where nobody else has it: not if they are trained, tied to the head, under an
    adapter, or of another type than 16- or 32-bit numbers on one GPU. The plan says why they stay.

    Args:
        model: a causal LM of transformers, PEFT-wrapped or not; adapters are there already.
        where: "device", back to it too; "host"; or "auto": host from 256 MiB on.
        shared: vLLM generates from the same memory: its CUDA graphs have the address, so they stay.
        pinning: in the place of pinned memory.

    Raises:
        ValueError: an unknown `where`.
    """
    if where not in WISHES:
        raise ValueError(f"embeddings {where!r} is not one of {', '.join(WISHES)}")
    pinning = pinning or PinnedMemory()
    if where == "device":
        return_embeddings(model, pinning)
        return [("embeddings", "on the device (model.embeddings=device)")]
    embedding = input_embeddings(model)
    why = _why_not(model, embedding, shared, pinning.device_type)
    if why is None and in_host(embedding.weight):
        return [("embeddings", _told(embedding.weight))]
    if why is None and not wanted(where, embedding.weight.nbytes):
        why = f"{size(embedding.weight.nbytes)} are too few to move (model.embeddings=host to move them)"
    why = why or _no_room(embedding.weight.nbytes) or _move(embedding.weight, pinning)
    return [("embeddings", f"on the device: {why}" if why else _told(embedding.weight))]


def return_embeddings(model: Any, pinning: PinnedMemory | None = None) -> bool:
    """Take the input embeddings back to the device, bit for bit; False where they are not in the host's memory.

    torch keeps the pinned memory for whoever pins some next.
    """
    weight = getattr(input_embeddings(model), "weight", None)
    if weight is None or not in_host(weight):
        return False
    held, own = _held[weight.data_ptr()], torch.empty_like(weight.data)
    own.copy_(held.memory)
    weight.data = own
    (pinning or PinnedMemory()).finish(own.device)
    return True


def in_host(tensor: Tensor) -> bool:
    """Whether a tensor, or a view of its beginning, lies in the host's memory though its device is a GPU."""
    return bool(_held) and not tensor.is_meta and tensor.data_ptr() in _held


def wanted(where: str, nbytes: int) -> bool:
    """Whether embeddings of `nbytes` that could be moved are."""
    return where == "host" or (where == "auto" and nbytes >= LEAST)


def pinned_bytes(nbytes: int) -> int:
    """What torch pins for `nbytes`: a power of two."""
    return 1 << max(0, nbytes - 1).bit_length()


def input_embeddings(model: Any) -> Any:
    """The module that makes hidden states of token ids, or what PEFT put around it; None where there is none."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_input_embeddings() if hasattr(base, "get_input_embeddings") else None


# --- whether, and how ------------------------------------------------------------------------------------------------


def _why_not(model: Any, embedding: Any, shared: bool, device_type: str) -> str | None:
    """Why the embeddings cannot lie elsewhere without changing anything but that."""
    if shared:
        return "vLLM reads the same ones"
    if not isinstance(embedding, nn.Embedding):
        return f"{type(embedding).__name__} is not a plain embedding (an adapter on it, or a model of another kind)"
    weight = embedding._parameters.get("weight")
    if weight is None or type(weight) is not nn.Parameter or embedding.max_norm is not None:
        return "their values are made, or changed, by each forward"
    if any(p.requires_grad for p in embedding.parameters()):
        return "they are trained"
    if weight.device.type != device_type:
        return "there is no GPU" if weight.device.type == "cpu" else f"they are on {weight.device}"
    if in_host(weight):
        return None
    if not weight.is_floating_point() or weight.element_size() not in (2, 4) or not weight.is_contiguous():
        return f"they are no contiguous 16- or 32-bit numbers ({weight.dtype})"
    group = torch.distributed
    if group.is_available() and group.is_initialized() and group.get_world_size() > 1:
        return "several processes would each pin their own"
    return _tied(model, embedding, weight)


def _tied(model: Any, embedding: nn.Embedding, weight: Tensor) -> str | None:
    """Who else has the embeddings' memory, which would then stay, or be another one than the model's."""
    place = weight.untyped_storage().data_ptr()
    for path, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None or tensor.is_meta or (module is embedding and name == "weight"):
                continue
            if tensor.untyped_storage().data_ptr() == place:
                return f"tied to {path}.{name}"
    if weight.untyped_storage().nbytes() > weight.nbytes:
        return "they are part of a larger piece of memory"
    return None


def _no_room(nbytes: int) -> str | None:
    needed, free = pinned_bytes(nbytes), free_of_host()
    if needed <= SHARE * free:
        return None
    return f"{size(needed)} would be pinned, of {size(free)} that the host has free"


def _move(weight: nn.Parameter, pinning: PinnedMemory) -> str | None:
    """Copy, look at the copy through the device, and let go of the device's; or why that could not be."""
    try:
        held = pinning.copy(weight.data)
        view = pinning.bytes_on(weight.device, held).view(weight.dtype).view(weight.shape)
    except RuntimeError as error:
        return f"the host's memory could not be pinned, or not read ({_first_line(error)})"
    if view.device != weight.device or view.data_ptr() != held.memory.data_ptr():
        return f"torch {torch.__version__} copies pinned memory instead of reading it"
    if not _same_bits(view, weight.data):
        return "the GPU reads other values from the host's memory than were written"
    _held[view.data_ptr()] = held
    weight.data = view
    pinning.let_go()
    return None


def _same_bits(one: Tensor, other: Tensor) -> bool:
    """Read by the device, a few rows at a time: comparing all at once would take half their memory again."""
    bits = torch.int16 if one.element_size() == 2 else torch.int32
    pairs = zip(one.view(bits).split(CHUNK), other.view(bits).split(CHUNK), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def _told(weight: Tensor) -> str:
    return f"{size(weight.nbytes)} in the host's memory ({size(pinned_bytes(weight.nbytes))} pinned), read from there"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
