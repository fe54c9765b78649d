"""The family registry: all that is known about a transformer class, one short entry each.

No other module asks which model it works on. An entry names the block lists in the order in which
data flows through them, and which argument and which output of a block is which stream.
`blocks.verify` checks the claims numerically before anything long runs.
"""

from dataclasses import asdict, dataclass, field

from ppcl.errors import UserError

IMAGE, TEXT = "image", "text"


@dataclass(frozen=True)
class FeedForward:
    """Paths in a block of what computes h + gate * ffn((1 + scale) * norm(h) + shift).

    Attributes:
        modulation: the last of an nn.Sequential: a Linear that gives shift, scale and gate of the
            attention, then the same of the FFN.
    """

    norm: str
    ffn: str
    modulation: str


@dataclass(frozen=True)
class TextPath:
    """Paths in a block of the text stream's way through the attention.

    Attributes:
        norm, modulation: what makes the attention's text input from the stream.
        attention, argument: the attention, and its argument that gets that input.
        output: the projection of the attention's text output.
        keywords: the block's argument whose items it hands to the attention.
    """

    norm: str
    modulation: str
    attention: str
    argument: str
    output: str
    keywords: str


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
    """

    attribute: str
    depth_key: str
    inputs: dict[str, str]
    outputs: tuple[str, ...]
    width: Width | None = None

    def layout(self) -> dict:
        """Where its blocks' parts are, as `narrow.narrow` wants it: JSON, for exported code."""
        width = self.width or Width({})
        text = width.text and asdict(width.text) | {
            "stream": self.inputs[TEXT],
            "position": self.outputs.index(TEXT),
        }
        return {"ffn": {s: asdict(parts) for s, parts in width.ffn.items()}, "text": text}


@dataclass(frozen=True)
class Family:
    """A transformer class.

    Attributes:
        lists: its block lists in data-flow order.
        masks: stream -> the transformer argument that marks its real tokens (1) and padding (0).
        shared: tensor arguments of the transformer that have no batch dimension.
        untouchable: (block list, index from either end) -> why that block can't be pruned.
        unread: streams that nothing reads after the last block.
    """

    lists: tuple[BlockList, ...]
    masks: dict[str, str] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    untouchable: dict[tuple[str, int], str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()

    def layouts(self) -> dict[str, dict]:
        """Name of each block list -> its layout."""
        return {blocks.attribute: blocks.layout() for blocks in self.lists}


FAMILIES: dict[str, Family] = {
    "QwenImageTransformer2DModel": Family(
        lists=(
            BlockList(
                attribute="transformer_blocks",
                depth_key="num_layers",
                inputs={IMAGE: "hidden_states", TEXT: "encoder_hidden_states"},
                outputs=(TEXT, IMAGE),
                width=Width(
                    ffn={
                        IMAGE: FeedForward("img_norm2", "img_mlp", "img_mod.1"),
                        TEXT: FeedForward("txt_norm2", "txt_mlp", "txt_mod.1"),
                    },
                    text=TextPath(
                        norm="txt_norm1",
                        modulation="txt_mod",
                        attention="attn",
                        argument="encoder_hidden_states",
                        output="attn.to_add_out",
                        keywords="joint_attention_kwargs",
                    ),
                ),
            ),
        ),
        masks={TEXT: "encoder_hidden_states_mask"},
        unread=(TEXT,),
    ),
}


def family_of(class_name: str) -> Family:
    """The registry entry of a transformer class.

    Raises:
        UserError: the class has no entry.
    """
    if class_name not in FAMILIES:
        raise UserError(
            f"teacher: its transformer is a {class_name}, which can't be pruned yet. "
            f"Supported: {', '.join(sorted(FAMILIES))}. To add it, write its entry in "
            "workflow/scripts/ppcl/families.py."
        )
    return FAMILIES[class_name]
