"""What a family's entry in the registry can say of a transformer class; the entries: `families`."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

# `joint`: text and image tokens in one sequence, where the blocks before have two. Where all blocks
# have one sequence it is called `image`, text tokens or not.
IMAGE, TEXT, JOINT = "image", "text", "joint"


@dataclass(frozen=True)
class FeedForward:
    """Paths in a block of a stream's last step, h + gate * ffn(modulated(norm(h))).

    Attributes:
        norm: gets the stream after attention, h.
        modulation: a Linear of whose outputs the FFN uses some alone; None if there is no such.
        parts: from and to which of that Linear's parts, each as wide as the stream.
        after: a norm of what the FFN returns; None if there is none with weights.
    """

    norm: str
    ffn: str
    modulation: str | None = None
    parts: tuple[int, int] = (3, 6)
    after: str | None = None


@dataclass(frozen=True)
class TextPath:
    """Paths in a block of the text stream's way through the attention.

    Attributes:
        norm: makes the attention's text input from the stream, with `modulation` or by itself.
        modulation: gives that norm's shift and scale, and all gates; None if the norm does.
        extras: values that the norm returns beside its result: gates, shifts and scales.
        attention, argument: the attention, and its argument that gets that input.
        query: the projection of the attention's text queries, and their norm, which may be None.
        output: the projection of the attention's text output.
        keywords: the block's argument whose items it hands to the attention.
        others: further modules that get these items.
    """

    norm: str
    modulation: str | None
    extras: int
    attention: str
    argument: str
    query: tuple[str, str]
    output: str
    keywords: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Width:
    """What can be narrowed in the blocks of a list.

    Attributes:
        ffn: stream -> its FFN, which can become a linear map.
        text: None if there is no text stream that blocks could share.
    """

    ffn: dict[str, FeedForward]
    text: TextPath | None = None


@dataclass(frozen=True)
class BlockList:
    """One list of blocks of a transformer.

    Attributes:
        attribute: the ModuleList's name on the transformer.
        depth_key: the config key that holds the list's length, so that a pruned model reloads.
        inputs: stream -> the block argument that carries it.
        outputs: streams in the order in which the block returns them.
        width: what can be narrowed; None if nothing can.
        modulations: paths in a block of every Linear that maps the conditioning to shifts, scales
            and gates; none where one table serves all blocks.
    """

    attribute: str
    depth_key: str
    inputs: dict[str, str]
    outputs: tuple[str, ...]
    width: Width | None = None
    modulations: tuple[str, ...] = ()

    def layout(self) -> dict:
        """Where its blocks' parts are, as `narrow.narrow` wants it: JSON, for exported code."""
        width = self.width or Width({})
        text = width.text and asdict(width.text) | {"stream": self.inputs[TEXT]}
        return {
            "outputs": list(self.outputs),
            "ffn": {s: asdict(parts) for s, parts in width.ffn.items()},
            "text": text,
        }


# A mask of a stream's real tokens [batch, tokens], True or 1, from the transformer's arguments and
# the stream's number of tokens; None if all are real.
Mask = Callable[[dict[str, Any], int], Any]


@dataclass(frozen=True)
class Size:
    """What decides the shapes of a call.

    Attributes:
        height, width: of the picture, in pixels. frames: of the video; 1 for a picture.
        text_tokens: of the longest prompt that the pipeline takes.
        scale: pixels of the picture per latent, along one side.
    """

    height: int
    width: int
    frames: int
    text_tokens: int
    scale: int = 8


# An empty tensor of a shape: `tensor(batch, 3)` of the transformer's dtype, or
# `tensor(batch, 3, dtype="int64")`.
NewTensor = Callable[..., Any]


@dataclass(frozen=True)
class Pipeline:
    """How the stock pipeline of a class calls it, if the config says no more: for plans, as long
    as no call is recorded.

    Attributes:
        size: its usual one.
        steps: denoising steps.
        guidance: the argument above 1 of which both branches are asked for, and its default.
        negative: without a negative prompt it asks for one branch, however high the guidance.
        joined: both branches are one call of twice the batch, not two calls.
        arguments: (config, size, batch, tensor) -> arguments of the transformer.
    """

    size: Size
    steps: int
    guidance: tuple[str, float]
    negative: bool
    joined: bool
    arguments: Callable[[Mapping[str, Any], Size, int, NewTensor], dict[str, Any]]


@dataclass(frozen=True)
class Family:
    """A transformer class.

    Attributes:
        lists: its block lists in data-flow order.
        masks: stream -> what tells its real tokens from padding.
        shared: tensor arguments of the transformer that have no batch dimension.
        batch_dims: argument -> the dimension of its tensor that is the batch, if not the first.
        untouchable: (block list, index from either end) -> why that block can't be pruned.
        unread: streams that nothing reads after the last block.
        state, time: arguments with the latents and the timestep, for fresh noise.
        index_keys: config keys that list numbers of blocks.
        numbered: arguments that list numbers of blocks, which pruning would turn into others.
        per_block: config keys that list a value per block, over all lists.
        companions: ModuleLists that hold a module per block, over all lists, and then others.
        texts: tokenizers of its pipelines whose tokens are the text that it gets, not only a
            summary of it.
        framed: the text that such a tokenizer gets, up to the end of the prompt, and how many of
            its tokens don't count against the limit, where that is not the prompt and none: from
            the pipeline, the settings of its call, the tokenizer and the prompt.
        apart: of a pipeline and a prompt, a number; prompts with different ones can't be in one
            batch.
        fixed: why finished pictures can't be noised again for it; empty if they can.
        last_modulation: path in the transformer of the Linear of its last AdaLN; empty without.
        guidance: what pipelines give it for a guidance of 1, where it gets that as a number.
        gated: block list -> paths in a block of Linears whose outputs streams take up element by
            element, times a gate or as they are. Those together that depend on none of each other;
            they come in the order in which they run, and nothing else of the block follows them.
        limits: what else a user should know, for the table in the docs.
        pipeline: how its stock pipeline calls it; None: plans wait for recorded calls.
    """

    lists: tuple[BlockList, ...]
    masks: dict[str, Mask] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    batch_dims: dict[str, int] = field(default_factory=dict)
    untouchable: dict[tuple[str, int], str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    state: str = "hidden_states"
    time: str = "timestep"
    index_keys: tuple[str, ...] = ()
    numbered: tuple[str, ...] = ()
    per_block: tuple[str, ...] = ()
    companions: tuple[str, ...] = ()
    texts: tuple[str, ...] = ("tokenizer",)
    framed: Callable[[Any, Any, Any, str], tuple[str, int]] | None = None
    apart: Callable[[Any, str], int] | None = None
    fixed: str = ""
    last_modulation: str = ""
    guidance: float = 1.0
    gated: dict[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    limits: str = ""
    pipeline: Pipeline | None = None

    def layouts(self) -> dict[str, dict]:
        """Name of each block list -> its layout."""
        return {blocks.attribute: blocks.layout() for blocks in self.lists}


def single(
    stream: str,
    attribute: str,
    depth_key: str,
    width: Width | None = None,
    argument: str = "hidden_states",
    modulations: tuple[str, ...] = (),
) -> BlockList:
    """Blocks that take and return one sequence."""
    return BlockList(attribute, depth_key, {stream: argument}, (stream,), width, modulations)


def dual(
    outputs: tuple[str, ...],
    attribute: str,
    depth_key: str,
    width: Width | None = None,
    modulations: tuple[str, ...] = (),
) -> BlockList:
    """Blocks that take and return image and text as hidden_states and encoder_hidden_states."""
    inputs = {IMAGE: "hidden_states", TEXT: "encoder_hidden_states"}
    return BlockList(attribute, depth_key, inputs, outputs, width, modulations)
