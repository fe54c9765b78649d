"""The family registry: all that is known about a transformer class, one short entry each.

No other module asks which model it works on. An entry names the block lists in the order in which
data flows through them, and which argument and which output of a block is which stream.
`blocks.verify` checks the claims numerically before anything long runs.
"""

from dataclasses import dataclass, field

from ppcl.errors import UserError

IMAGE, TEXT = "image", "text"


@dataclass(frozen=True)
class BlockList:
    """One list of blocks of a transformer.

    Attributes:
        attribute: the ModuleList's name on the transformer.
        depth_key: the config key that holds the list's length, so that a pruned model reloads.
        inputs: stream -> the block argument that carries it.
        outputs: streams in the order in which the block returns them.
    """

    attribute: str
    depth_key: str
    inputs: dict[str, str]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """A transformer class.

    Attributes:
        lists: its block lists in data-flow order.
        masks: stream -> the transformer argument that marks its real tokens (1) and padding (0).
        shared: tensor arguments of the transformer that have no batch dimension.
        untouchable: (block list, index from either end) -> why that block can't be pruned.
    """

    lists: tuple[BlockList, ...]
    masks: dict[str, str] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    untouchable: dict[tuple[str, int], str] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    "QwenImageTransformer2DModel": Family(
        lists=(
            BlockList(
                attribute="transformer_blocks",
                depth_key="num_layers",
                inputs={IMAGE: "hidden_states", TEXT: "encoder_hidden_states"},
                outputs=(TEXT, IMAGE),
            ),
        ),
        masks={TEXT: "encoder_hidden_states_mask"},
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
