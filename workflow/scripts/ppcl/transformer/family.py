"""The fields of an entry in the family registry. The entries themselves are in `families`."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ppcl.transformer.original_files import OriginalFiles

# `joint`: text and image tokens in one sequence, in blocks that follow blocks with two streams. If
# all blocks of a transformer have one sequence, it is called `image`, even if it holds text tokens.
IMAGE, TEXT, JOINT = "image", "text", "joint"


@dataclass(frozen=True)
class FeedForward:
    """Paths, within a block, of the modules that compute h + gate * ffn(modulated(norm(h))) from a
    stream after attention, h.

    Attributes:
        norm: the norm of h.
        modulation: the Linear whose output holds the scale, the gate and, in most classes, the
            shift that the FFN alone uses; None if there is no such Linear.
        parts: where these begin and end in the Linear's output, in units of the stream's width.
        after: the norm of the FFN's output; None if there is none, or it has no weights.
    """

    norm: str
    ffn: str
    modulation: str | None = None
    parts: tuple[int, int] = (3, 6)
    after: str | None = None


@dataclass(frozen=True)
class TextPath:
    """Paths, within a block, of the modules that take the text stream through the attention.

    Attributes:
        norm: makes the attention's text input z (Eq. 8) from the text stream.
        modulation: makes the shift and scale of that norm, and all gates of the text stream; None
            if the norm itself makes them.
        extras: how many values (gates, shifts, scales) the norm returns beside z.
        attention, argument: the attention, and the name of its argument that gets z.
        query: the projection that makes the text queries, and the norm of these queries. The
            attention may have None in place of that norm.
        output: the projection of the attention's text output.
        keywords: the block's argument that holds a mapping of further arguments for the attention.
        others: further modules that get this mapping's items.
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
        ffn: stream -> its FFN, which can become a linear map (Eq. 9).
        text: how the text stream, which blocks can share (Eq. 8), passes the attention; None if
            there is no text stream, or it can't be shared.
    """

    ffn: dict[str, FeedForward]
    text: TextPath | None = None


@dataclass(frozen=True)
class BlockList:
    """One list of blocks of a transformer.

    Attributes:
        attribute: the ModuleList's name on the transformer.
        depth_key: the key of the transformer's config that holds the list's length. A pruned model
            has its new length there, so that it can be loaded again.
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
        """The paths in its blocks, as `narrow.narrow` takes them: values that JSON has too, since
        exported code holds them."""
        width = self.width or Width({})
        text = width.text and asdict(width.text) | {"stream": self.inputs[TEXT]}
        return {
            "outputs": list(self.outputs),
            "ffn": {s: asdict(parts) for s, parts in width.ffn.items()},
            "text": text,
        }


# From the transformer's arguments and a stream's number of tokens: a mask [batch, tokens], True or
# 1 at real tokens, False or 0 at padding; None if all tokens are real.
Mask = Callable[[dict[str, Any], int], Any]


@dataclass(frozen=True)
class Size:
    """What decides the shapes of the tensors in a call.

    Attributes:
        height, width: of the picture, in pixels.
        frames: number of frames of the video; 1 for a picture.
        text_tokens: number of tokens of the longest prompt that the pipeline takes.
        scale: pixels of the picture per latent, along one side.
    """

    height: int
    width: int
    frames: int
    text_tokens: int
    scale: int = 8


# Makes an empty tensor: `tensor(batch, 3)` is [batch, 3] of the transformer's dtype, and
# `tensor(batch, 3, dtype="int64")` is [batch, 3] of that dtype.
NewTensor = Callable[..., Any]


@dataclass(frozen=True)
class Pipeline:
    """How the stock pipeline of a transformer class calls the transformer by default. Forecasts
    need it before any call is recorded.

    Attributes:
        size: its default size.
        steps: its default number of denoising steps.
        guidance: the pipeline's argument that sets the strength of classifier-free guidance, and
            its default. Above 1, the pipeline calls the transformer for both branches.
        negative: whether the second branch also needs a negative prompt: without one, the pipeline
            asks for one branch, whatever the strength.
        joined: whether both branches are one call with twice the batch, instead of two calls.
        arguments: (the transformer's config, size, batch, `NewTensor`) -> the arguments of one call
            of the transformer, by name.
    """

    size: Size
    steps: int
    guidance: tuple[str, float]
    negative: bool
    joined: bool
    arguments: Callable[[Mapping[str, Any], Size, int, NewTensor], dict[str, Any]]


# (block, blocks, samples, config) -> the key of the sample that is added after a block, counted
# within its list of `blocks` blocks; None if none is. `samples` is how many samples the ControlNet
# gives for this list, and `config` is the ControlNet's.
Stride = Callable[[int, int, int, Mapping[str, Any]], "int | None"]


@dataclass(frozen=True)
class Control:
    """What a transformer adds to its image stream after its blocks: samples of a stock ControlNet.

    Attributes:
        model: the ControlNet's class in diffusers.
        lists: block list -> the key of the ControlNet's config that says how many samples it gives
            for this list, or lists the blocks that get one; and which sample a block gets. In the
            order in which the ControlNet returns them.
    """

    model: str
    lists: dict[str, tuple[str, Stride]]


@dataclass(frozen=True)
class Adapter:
    """How the weights of an IP-adapter for a transformer are named: in a file, by a number that
    counts the attentions of one list of blocks.

    Attributes:
        attribute: the list of blocks.
        attentions: of each attention of a block, in the order in which they are counted, the key of
            the transformer's config that lists the blocks that have it; empty if all have.
        summed: names of the weights that make the values, where the block adds what it reads to its
            stream as it is; empty where a projection of the block's own is between.
    """

    attribute: str
    attentions: tuple[str, ...] = ("",)
    summed: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """A transformer class.

    Attributes:
        lists: its block lists in data-flow order.
        masks: stream -> the mask of its real tokens (`Mask`), for streams that may have padding.
        shared: tensor arguments of the transformer that have no batch dimension.
        batch_dims: argument -> the dimension of its tensor that is the batch, if not the first.
        untouchable: (block list, index from either end) -> why that block can't be pruned.
        unread: streams that nothing reads after the last block.
        state, time: the transformer's arguments with the latents and with the timestep, which are
            replaced to ask the teacher about fresh noise.
        index_keys: config keys whose value is a list of block numbers.
        numbered: the transformer's arguments that are lists of block numbers. A call that uses one
            is refused, since pruning renumbers the blocks.
        per_block: config keys whose value is a list with an entry per block, over all block lists.
        companions: ModuleLists of the transformer with a module per block, over all block lists;
            further modules may follow.
        texts: tokenizers of its pipelines whose text reaches the transformer token by token, not
            only as a summary such as a pooled embedding.
        framed: for pipelines that put a prompt into a template: (pipeline, settings of its call,
            tokenizer, prompt) -> the text that such a tokenizer gets, up to the end of the prompt,
            and how many of its tokens don't count against the limit. None: the text is the prompt,
            and all of its tokens count.
        apart: (pipeline, prompt) -> a number; prompts with different numbers can't be in one batch.
            None: any prompts can.
        fixed: why finished pictures can't be noised again for it; empty if they can.
        last_modulation: path in the transformer of the Linear of its last AdaLN; empty if it has
            none.
        guidance: the number that pipelines give the transformer for a guidance of 1, if it takes
            guidance as an argument.
        gated: block list -> groups of paths, within a block, of the Linears whose output a stream
            adds element by element, times a gate or as it is. Linears of one group do not depend
            on each other. Groups come in the order in which they run, and nothing in the block but
            a gate and the sum follows the last (`closed_forms.solved` refits them).
        frames_per_second: of its videos, as its authors and diffusers' examples show them.
        lora_names: names of Linears in the code that the weights were published with, {} for the
            number of a block -> those of diffusers that are this one, side by side along the
            outputs. For LoRAs; empty where the names are diffusers' own.
        limits: what else a user should know, for the table in the docs.
        control: the ControlNet of diffusers for it; None if there is none.
        adapter: how IP-adapters for it are numbered; None if diffusers loads none.
        pipeline: how its stock pipeline calls it by default; None if that is not known, so that
            forecasts need recorded calls.
        original: the files that its authors publish and other programs read; None if nothing is
            known of them, or diffusers does not read them.
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
    frames_per_second: int = 16
    lora_names: dict[str, tuple[str, ...]] = field(default_factory=dict)
    limits: str = ""
    control: Control | None = None
    adapter: Adapter | None = None
    pipeline: Pipeline | None = None
    original: OriginalFiles | None = None

    def layouts(self) -> dict[str, dict]:
        """Name of each block list -> its layout (`BlockList.layout`); in that of the last,
        `text_unread`: nothing reads the text stream behind it."""
        made = {blocks.attribute: blocks.layout() for blocks in self.lists}
        made[self.lists[-1].attribute]["text_unread"] = TEXT in self.unread
        return made


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
