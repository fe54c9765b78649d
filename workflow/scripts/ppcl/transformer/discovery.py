"""Inspection: makes the family of a transformer class that has no entry in the registry.

The order of the block lists is read from the class's forward, the streams from the blocks'
signatures and return statements (or, if these do not tell, from diffusers' own registry of blocks),
and the depth keys from the config. A class is refused if what a block does depends on its number.
`claims.verify` then checks the result numerically, before anything long runs.
"""

import ast
import functools
import inspect
import logging
import textwrap
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from ppcl.errors import UserError
from ppcl.transformer import diffusers_model
from ppcl.transformer.family import IMAGE, JOINT, TEXT, BlockList, Family

log = logging.getLogger(__name__)
_STATES = ("hidden_states", "x")
_BESIDE = (
    "refiner",
    "text_",
    "txt_",
    "audio_",
)  # in names of lists whose blocks do not carry the picture


def inspected(transformer: nn.Module) -> Family:
    """The family of a transformer whose class has no entry, by inspection; warns once per class.

    Raises:
        UserError: the source does not tell enough, or shows that blocks can't be removed; says
            why.
    """
    return _inspected(_Shape.of(transformer))


@functools.cache
def _inspected(shape: "_Shape") -> Family:
    name = shape.made_by.__name__
    if not shape.lists:
        raise _refusal(name, "it has no list of two or more blocks whose length its config names")
    if why := _numbered(shape.made_by, [attribute for attribute, _, _ in shape.lists]):
        raise _refusal(name, why)
    source = _source(shape.made_by.forward)
    ordered = sorted(shape.lists, key=lambda listed: source.find(f"self.{listed[0]}"))
    lists = [_block_list(name, *listed) for listed in ordered]
    if (
        TEXT in lists[0].inputs
    ):  # a later list with one sequence holds the text tokens in it, beside the image tokens
        lists = [b if TEXT in b.inputs else _joint(b) for b in lists]
    log.warning(
        "%s has no entry in the family registry; inspection found %s. Every claim is checked on a "
        "real call before anything long runs; but tokens that pad prompts count as any",
        name,
        "; ".join(f"{b.attribute} ({', '.join(b.outputs)})" for b in lists),
    )
    return Family(lists=tuple(lists))


class _Shape:
    """What inspection needs of a transformer: its class, and (attribute, depth key, block class) of
    each block list. Two transformers with equal shapes need one inspection."""

    def __init__(self, made_by: type[nn.Module], lists: tuple[tuple[str, str, type], ...]):
        self.made_by, self.lists = made_by, lists

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Shape) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((self.made_by, self.lists))

    @classmethod
    def of(cls, transformer: nn.Module) -> "_Shape":
        lists = []
        for attribute, members in transformer.named_children():
            if not isinstance(members, nn.ModuleList) or len(members) < 1:
                continue
            kinds = {type(member) for member in members}
            takes = inspect.signature(members[0].forward).parameters
            beside = any(word in attribute for word in _BESIDE)
            if beside or len(kinds) > 1 or not set(_STATES) & set(takes):
                continue
            if key := _depth_key(transformer, attribute, len(members)):
                lists.append((attribute, key, kinds.pop()))
        return cls(type(transformer), tuple(lists))


def _depth_key(transformer: nn.Module, attribute: str, length: int) -> str | None:
    """The config key that holds a list's length, or None. If several do, one is preferred that has
    `single` in its name exactly if the list's name has it."""
    keys = [
        key
        for key, value in diffusers_model.of(transformer).config.items()
        if value == length
        and not isinstance(value, bool)
        and any(word in key for word in ("layer", "block", "depth"))
        and not any(word in key for word in ("head", *_BESIDE))
    ]
    alike = [key for key in keys if ("single" in key) == ("single" in attribute)]
    return next(iter(alike or keys), None)


def _block_list(name: str, attribute: str, depth_key: str, block: type[nn.Module]) -> BlockList:
    takes = inspect.signature(block.forward).parameters
    state = next(argument for argument in _STATES if argument in takes)
    outputs = _returned(block) or _known_order(block)
    if outputs is None or IMAGE not in outputs:
        raise _refusal(name, f"what a {block.__name__} returns can't be told from its source")
    inputs = {IMAGE: state} | ({TEXT: "encoder_hidden_states"} if TEXT in outputs else {})
    return BlockList(attribute, depth_key, inputs, outputs)


def _joint(listed: BlockList) -> BlockList:
    return replace(listed, inputs={JOINT: listed.inputs[IMAGE]}, outputs=(JOINT,))


def _known_order(block: type) -> tuple[str, ...] | None:
    """The streams that a block returns, in order, by diffusers' own (private) registry of blocks;
    None if the registry does not have the block."""
    try:
        from diffusers.hooks._helpers import TransformerBlockRegistry

        known = TransformerBlockRegistry.get(block)
    except (ImportError, ValueError):
        return None
    places = {
        known.return_hidden_states_index: IMAGE,
        known.return_encoder_hidden_states_index: TEXT,
    }
    named = {place: stream for place, stream in places.items() if place is not None}
    return tuple(named[place] for place in sorted(named)) or None


def _returned(block: type[nn.Module]) -> tuple[str, ...] | None:
    """The streams that a block returns, in order: a single value is the image stream, values of a
    tuple are known by their names. None if return statements differ, or a name is not known."""
    orders: set[tuple[str, ...]] = set()
    for node in ast.walk(ast.parse(_source(block.forward))):
        if isinstance(node, ast.Return) and node.value is not None:
            values = node.value.elts if isinstance(node.value, ast.Tuple) else [node.value]
            names = [value.id if isinstance(value, ast.Name) else "" for value in values]
            if len(names) == 1:
                orders.add((IMAGE,))
            else:
                streams = {"hidden_states": IMAGE, "encoder_hidden_states": TEXT}
                orders.add(tuple(streams.get(name, "") for name in names))
    return orders.pop() if len(orders) == 1 and "" not in next(iter(orders)) else None


def _numbered(made_by: type[nn.Module], attributes: list[str]) -> str | None:
    """Why blocks can't be renumbered: the source treats a block by its number. None if it does
    not."""
    named = [f"self.{attribute}" for attribute in attributes]
    whole = ast.parse(_source(made_by)).body[0]
    for node in ast.walk(whole):
        if isinstance(node, ast.Subscript) and ast.unparse(node.value) in named:
            return "its code picks blocks by number"
    forward = ast.parse(_source(made_by.forward))
    loops = [
        node
        for node in ast.walk(forward)
        if isinstance(node, ast.For) and any(name in ast.unparse(node.iter) for name in named)
    ]
    looped = {name for name in named for loop in loops if name in ast.unparse(loop.iter)}
    if looped != set(named):
        return "its forward does not go through all of its lists of blocks itself"
    for loop in loops:
        if "zip(" in ast.unparse(loop.iter):
            return "its forward pairs the blocks with something else"
        if "range(" in ast.unparse(loop.iter):
            return "its code picks blocks by number"
        if _counts(loop):
            return "its forward counts the blocks, or keeps what they return"
        if "enumerate(" in ast.unparse(loop.iter):
            pair = loop.target
            if not isinstance(pair, ast.Tuple) or _reads(loop.body, ast.unparse(pair.elts[0])):
                return "what its forward does with a block depends on the block's number"
    for node in ast.walk(ast.parse(_source(made_by.__init__))):
        if isinstance(node, (ast.ListComp, ast.GeneratorExp)) and "Block" in ast.unparse(node.elt):
            number = ast.unparse(node.generators[0].target)
            if number != "_" and _reads([node.elt], number):
                return "how its constructor makes a block depends on the block's number"
    return None


def _counts(loop: ast.For) -> bool:
    """Whether a loop adds one to anything, or appends to, pops from or inserts into a list."""
    for node in ast.walk(loop):
        adds = isinstance(node, (ast.AugAssign, ast.BinOp)) and isinstance(node.op, ast.Add)
        if adds and any(_one(side) for side in ast.iter_child_nodes(node)):
            return True
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in ("append", "pop", "insert"):
                return True
    return False


def _one(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and node.value == 1


def _reads(statements: Sequence[ast.AST], name: str) -> bool:
    """Whether statements read a name. Uses of it for a ControlNet's residuals and in conditions on
    gradient checkpointing do not count."""
    for statement in statements:
        first_line = ast.unparse(statement).split("\n")[0]
        if "controlnet" in first_line:
            continue
        if isinstance(statement, (ast.If, ast.For, ast.With)):
            head = statement.test if isinstance(statement, ast.If) else None
            if head is not None and "checkpoint" not in first_line and _reads([head], name):
                return True
            if _reads([*statement.body, *getattr(statement, "orelse", [])], name):
                return True
            continue
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load):
                return True
    return False


def _source(function) -> str:
    try:
        return textwrap.dedent(inspect.getsource(inspect.unwrap(function)))
    except (OSError, TypeError) as error:
        raise _refusal(function.__qualname__, "its source is not at hand") from error


def _refusal(name: str, why: str) -> UserError:
    return UserError(
        f"teacher: its transformer is a {name}, which has no entry in the family registry and "
        f"can't be pruned by inspection: {why}. To add it, write its entry in "
        "workflow/scripts/ppcl/transformer/families.py"
    )
