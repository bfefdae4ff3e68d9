"""In how many checkpointed layers attention's results, or all results, are kept for the backward: pure functions."""

from __future__ import annotations

from dataclasses import dataclass

HOSTED = ("offload", "both")  # policies under which layers' inputs wait in the host's memory
KEEPING = ("auto", "attention", "both", "all")  # policies of `slothrl.activations` under which any layer does
WORTH = 0.3  # of a layer's forward FLOPs: 24K tokens of Llama-3-8B; below, single modules save less than saving takes
SHARE = 0.5  # of the free memory, for what was asked for or is worth it
HOST_SHARE = 0.3  # of the host's free memory: pinned pieces are powers of two, up to twice what is in them
ENOUGH = 4096  # tokens of a micro-batch: twice as many are faster by 3 %, and nothing computed again by 15 (8B, H100)
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
        rest: 16-bit values a token that it keeps beyond these where nothing is computed again.
        hidden: the width of its input.
    """

    layers: int
    width: int
    heads: int
    weights: int
    numbers: int
    whole: bool
    rest: int = 0
    hidden: int = 0

    @property
    def bytes(self) -> int:
        """A token's, in one layer: 16-bit values, and the log-sum-exp in float32."""
        return 2 * self.numbers + 4 * self.heads

    @property
    def all_bytes(self) -> int:
        """The same of a layer that keeps everything."""
        return self.bytes + 2 * self.rest

    def share(self, reach: int) -> float:
        """Attention's, of a layer's forward FLOPs a token: causal 2 S width; projections 2 a weight."""
        attention = 2 * reach * self.width
        return attention / (attention + 2 * self.weights)


def layers_that_keep(
    policy: str,
    sizes: AttentionSizes,
    tokens: int,
    reach: int,
    free: int,
    left: int,
    light: int,
    host: int = 0,
    within: int | None = None,
) -> tuple[int, int]:
    """(layers that keep everything, others that keep their attention) in one forward on a GPU.

    What was asked for ("attention", "both", "all" in layers that do not keep all) gets half of the free memory, and so
    does "auto" where attention is `WORTH` it. Where it is not, "auto" keeps it in whole layers only, in a quarter of
    the free memory, and in small micro-batches: one that is large without it stays as it is, also where memory is
    plenty. What all layers' attention leaves of that quarter goes to everything else, layer by layer. "all" keeps
    everything in as many whole layers as `left` holds. "both" puts what whole layers keep of attention into
    `HOST_SHARE` of the host's memory instead, and takes none of the device's.

    Where `within` is given, layers that are one step keep everything in no more than that, under every policy; and
    under all but "auto" as many do as fit into it and into `left`, before anything else is kept.

    Args:
        tokens: of the forward. reach: the most keys that one of them sees.
        free: bytes of the device before it.
        left: what of them it leaves where layers keep their inputs only (`slothrl.token_bytes.left_beside`): never is
            more taken.
        light: bytes by which the micro-batch is smaller than a large one (`slothrl.token_bytes.left_of_light`).
        host: bytes of the host's memory that nobody has.
        within: bytes (`model.activation_gib`).
    """
    if tokens < 1:
        return 0, 0
    most = most_whole(policy, sizes, tokens, within)
    whole = min(most, _that_hold(sizes, left, tokens * sizes.all_bytes)) if asks_for_whole(policy, within) else 0
    if policy not in KEEPING:
        return whole, 0
    room = HOST_SHARE * host if in_host(policy, sizes) else min(SHARE * free, left - whole * tokens * sizes.all_bytes)
    spare = policy == "auto" and sizes.share(reach) < WORTH
    if spare:
        room = min(PLENTY * free, left, light) if sizes.whole else 0
    attending = _that_hold(sizes, room, tokens * sizes.bytes)
    if spare and attending == sizes.layers and sizes.rest:
        whole = min(most, _that_hold(sizes, room - attending * tokens * sizes.bytes, tokens * 2 * sizes.rest))
    return whole, min(attending, sizes.layers - whole)


def layers_on_a_cpu(policy: str, sizes: AttentionSizes, tokens: int, within: int | None = None) -> tuple[int, int]:
    """The same on a CPU, where nothing is measured: all or none, as asked for, and no more than `within`."""
    whole = most_whole(policy, sizes, tokens, within) if asks_for_whole(policy, within) else 0
    return whole, sizes.layers - whole if policy in ("attention", "both", "all") else 0


def asks_for_whole(policy: str, within: int | None) -> bool:
    """Whether layers keep everything before other layers keep more than their inputs."""
    return policy == "all" or (within is not None and policy != "auto")


def most_whole(policy: str, sizes: AttentionSizes, tokens: int, within: int | None) -> int:
    """How many layers may keep everything: those that are one step, within so many bytes; None: all of them.

    A layer's input counts where those of the others wait in the host's memory.
    """
    if not sizes.whole:
        return 0
    each = sizes.all_bytes + (2 * sizes.hidden if policy in HOSTED else 0)
    return sizes.layers if within is None else _that_hold(sizes, within, tokens * each)


def _that_hold(sizes: AttentionSizes, room: float, each: int) -> int:
    """How many layers of `each` bytes fit into `room`."""
    return max(0, min(sizes.layers, int(room / each)))


def in_host(policy: str, sizes: AttentionSizes) -> bool:
    """Whether what is kept of attention waits in the host's memory."""
    return policy == "both" and sizes.whole


def reserved_bytes(
    policy: str,
    sizes: AttentionSizes,
    tokens: int,
    free: int,
    each: int = 0,
    within: int | None = None,
    usable: int = 0,
) -> int:
    """Bytes a token that the budget of a micro-batch leaves for attention: what was asked for, or may be worth it when
    all tokens are one sequence. What "auto" keeps beyond that is memory that nobody wants, and lowers no budget.

    For all that layers compute ("all") it is left as far as `ENOUGH` tokens still fit: (T / T' - 1) b more a token
    leave T' of T tokens.

    Where layers keep everything `within` so many bytes, those are left, or what all layers keep where that is less: of
    U usable bytes T' = (U - within) / b tokens, by within b / (U - within) more a token.

    Args:
        tokens: as many as fit without (T). free: bytes of the device. each: a token's without (b).
        within: bytes, or None. usable: bytes that micro-batches are counted on (U).
    """
    whole = sizes.layers * sizes.all_bytes if sizes.whole else 0
    if within is not None and whole:
        whole = min(whole, int(within * each / max(usable - within, 1)))
    if policy == "all" and sizes.whole:
        return min(whole, int((tokens / min(tokens, ENOUGH) - 1) * each))
    asked = whole if within is not None and asks_for_whole(policy, within) else 0
    if policy not in KEEPING or in_host(policy, sizes) or (policy == "auto" and sizes.share(tokens) < WORTH):
        return asked
    return asked + min(sizes.layers, int(SHARE * free / (tokens * sizes.bytes))) * sizes.bytes
