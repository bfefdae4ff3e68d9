"""In how many checkpointed layers attention's results are kept for the backward: pure functions of sizes and memory."""

from __future__ import annotations

from dataclasses import dataclass

KEEPING = ("auto", "attention", "both")  # policies of `slothrl.activations` under which any layer does
WORTH = 0.3  # of a layer's forward FLOPs: 24K tokens of Llama-3-8B; below, single modules save less than saving takes
SHARE = 0.5  # of the free memory, for what was asked for or is worth it
HOST_SHARE = 0.3  # of the host's free memory: pinned pieces are powers of two, up to twice what is in them
PLENTY = 0.25  # of the free memory, for what is only a few per cent of a step and takes none away from anything else


@dataclass(frozen=True)
class AttentionSizes:
    """What decides how much of its attention a model keeps, and what for.

    Attributes:
        layers: how many there are.
        width: of the attention's output, heads x head_dim.
        heads: of the queries.
        weights: of all linear layers in one decoder layer.
        numbers: 16-bit values that a layer keeps a token: the output; q, k and v too where it is one step of autograd.
        whole: a layer is one step of autograd (`slothrl.fuse_layer`), which keeps them at no cost and is spared q, k
            and v as well as attention in its backward.
    """

    layers: int
    width: int
    heads: int
    weights: int
    numbers: int
    whole: bool

    @property
    def bytes(self) -> int:
        """A token's, in one layer: 16-bit values, and the log-sum-exp in float32."""
        return 2 * self.numbers + 4 * self.heads

    def share(self, reach: int) -> float:
        """Attention's, of a layer's forward FLOPs a token: causal 2 S width; projections 2 a weight."""
        attention = 2 * reach * self.width
        return attention / (attention + 2 * self.weights)


def layers_that_keep(
    policy: str, sizes: AttentionSizes, tokens: int, reach: int, free: int, left: int, light: int, host: int = 0
) -> int:
    """Layers that keep their attention in one forward on a GPU.

    What was asked for ("attention", "both") gets half of the free memory, and so does "auto" where attention is
    `WORTH` it. Where it is not, "auto" keeps it in whole layers only, in a quarter of the free memory, and in small
    micro-batches: one that is large without it stays as it is, also where memory is plenty. "both" puts what whole
    layers keep into `HOST_SHARE` of the host's memory instead, and takes none of the device's.

    Args:
        tokens: of the forward. reach: the most keys that one of them sees.
        free: bytes of the device before it.
        left: what of them it leaves where layers keep their inputs only (`slothrl.token_bytes.left_beside`): never is
            more taken.
        light: bytes by which the micro-batch is smaller than a large one (`slothrl.token_bytes.left_of_light`).
        host: bytes of the host's memory that nobody has.
    """
    if policy not in KEEPING or tokens < 1:
        return 0
    room = HOST_SHARE * host if in_host(policy, sizes) else min(SHARE * free, left)
    if policy == "auto" and sizes.share(reach) < WORTH:
        room = min(PLENTY * free, left, light) if sizes.whole else 0
    return max(0, min(sizes.layers, int(room / (tokens * sizes.bytes))))


def in_host(policy: str, sizes: AttentionSizes) -> bool:
    """Whether what is kept of attention waits in the host's memory."""
    return policy == "both" and sizes.whole


def reserved_bytes(policy: str, sizes: AttentionSizes, tokens: int, free: int) -> int:
    """Bytes a token that the budget of a micro-batch leaves for attention: what was asked for, or may be worth it when
    all tokens are one sequence. What "auto" keeps beyond that is memory that nobody wants, and lowers no budget."""
    if policy not in KEEPING or in_host(policy, sizes) or (policy == "auto" and sizes.share(tokens) < WORTH):
        return 0
    return min(sizes.layers, int(SHARE * free / (tokens * sizes.bytes))) * sizes.bytes
