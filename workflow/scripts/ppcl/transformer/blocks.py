"""The blocks of a transformer as one sequence: watch them, call them, replace them.

Everything here works on any class of the family registry. A block is called by diffusers with
keywords, or positionally under gradient checkpointing, so arguments are bound by signature.
"""

import copy
import functools
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.errors import UserError
from ppcl.transformer import diffusers_model, discovery
from ppcl.transformer.block_facts import BlockFacts
from ppcl.transformer.family import BlockList, Family, Width
from ppcl.transformer.registry import family_of

Streams = dict[str, Tensor]


class _Enough(Exception):
    """Ends a forward pass early, once the last wanted block has been seen."""


@dataclass(frozen=True)
class Block:
    """One block: its place in the data flow, its module, and the list that it belongs to."""

    index: int
    module: nn.Module
    list: BlockList

    def bind(self, args: tuple, kwargs: dict) -> dict[str, Any]:
        """A call's arguments by name."""
        return signature_arguments(self.module, args, kwargs)

    def inputs(self, bound: dict[str, Any]) -> Streams:
        """The streams among a call's bound arguments."""
        return {s: bound[a] for s, a in self.list.inputs.items() if bound.get(a) is not None}

    def outputs(self, returned: Any) -> Streams:
        """The streams among what the block returned.

        Raises:
            UserError: it returned more or fewer than the family registry says.
        """
        values = returned if isinstance(returned, tuple) else (returned,)
        if len(values) != len(self.list.outputs):
            raise UserError(
                f"{type(self.module).__name__}: block {self.index} returns {len(values)} values, "
                f"the family registry says {len(self.list.outputs)} "
                "(workflow/scripts/ppcl/transformer/families.py)"
            )
        pairs = zip(self.list.outputs, values, strict=True)
        return {stream: value for stream, value in pairs if value is not None}

    @property
    def width(self) -> Width:
        """What can be narrowed in this block. The last block of a list may lack parts that the
        others have."""
        listed = self.list.width or Width({})

        def has(path: str) -> bool:
            try:
                return self.module.get_submodule(path) is not None
            except AttributeError:  # no such path, or None or a function at its end
                return False

        ffn = {stream: parts for stream, parts in listed.ffn.items() if has(parts.ffn)}
        text = listed.text if listed.text and has(listed.text.output) else None
        return Width(ffn, text)


def signature_arguments(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """A module call's arguments by name, without self.

    The names are those of the class's `forward`. The module itself may have a function in its place
    that takes any arguments, such as an offloading hook's.
    """
    bound = _signature(type(module).forward).bind(module, *args, **kwargs).arguments
    return dict(list(bound.items())[1:])


# There are few signatures, and one is needed at every block of every step. Finding one takes as
# long as a small layer.
_signature = functools.lru_cache(maxsize=64)(inspect.signature)


def family(transformer: nn.Module) -> Family:
    """The registry entry of a transformer's class or of one of its base classes; the result of
    inspection if there is none.

    Raises:
        UserError: its class can't be pruned; says why.
    """
    for base in type(transformer).__mro__:
        if entry := family_of(base.__name__):
            return entry
    return discovery.inspected(transformer)


def block_sequence(transformer: nn.Module) -> list[Block]:
    """All blocks of a transformer in data-flow order."""
    every: list[Block] = []
    for block_list in family(transformer).lists:
        for module in getattr(transformer, block_list.attribute):
            every.append(Block(len(every), module, block_list))
    return every


def seams(transformer: nn.Module) -> list[int]:
    """Number of the first block of every run of like blocks: blocks of one list whose weights have
    the same names and shapes. No interval may reach over a seam, since one student could not stand
    for blocks of both sides."""
    every = block_sequence(transformer)
    kinds = [(b.list.attribute, _shapes(b.module)) for b in every]
    return [i for i, kind in enumerate(kinds) if i == 0 or kind != kinds[i - 1]]


def _shapes(module: nn.Module) -> list[tuple]:
    return [(name, p.shape) for name, p in module.named_parameters()]


def answer(transformer: nn.Module, arguments: dict[str, Any]) -> Tensor:
    """A transformer's output for a call as one tensor [batch, ...], the velocity or noise
    prediction."""
    return stacked(transformer(**arguments)[0])


def stacked(output: Tensor | list[Tensor]) -> Tensor:
    """A transformer's output as one tensor [batch, ...]; some return a list with a tensor per
    sample."""
    return output if isinstance(output, Tensor) else torch.stack(list(output))


def untouchable(transformer: nn.Module) -> dict[int, str]:
    """Number of each block that the family forbids to prune -> the reason."""
    reasons, every = {}, block_sequence(transformer)
    for (attribute, position), reason in family(transformer).untouchable.items():
        members = [b.index for b in every if b.list.attribute == attribute]
        reasons[members[position]] = reason
    return reasons


@contextmanager
def watch(
    blocks: Iterable[Block],
    before: Callable[[Block, dict[str, Any]], None] | None = None,
    after: Callable[[Block, Streams], None] | None = None,
    stop_after: int | None = None,
    stop_before: int | None = None,
):
    """Watches the calls of blocks; yields run(transformer, arguments), which runs the transformer
    and returns its output, or None if the forward pass was stopped early.

    Args:
        before: is called before each block, with the block and its arguments by name.
        after: is called after each block, with the block and the streams that it returned.
        stop_after: number of the block after which the forward pass ends early.
        stop_before: number of the block before which it ends early.
    """
    handles = []

    def run(transformer: nn.Module, arguments: dict[str, Any]):
        try:
            return transformer(**arguments)
        except _Enough:
            return None

    for block in blocks:
        if before is not None or block.index == stop_before:

            def pre(_module, args, kwargs, block=block):
                if before is not None:
                    before(block, block.bind(args, kwargs))
                if block.index == stop_before:
                    raise _Enough

            handles.append(block.module.register_forward_pre_hook(pre, with_kwargs=True))
        if after is not None or block.index == stop_after:

            def post(_module, _args, returned, block=block):
                if after is not None:
                    after(block, block.outputs(returned))
                if block.index == stop_after:
                    raise _Enough

            handles.append(block.module.register_forward_hook(post))
    try:
        yield run
    finally:
        for handle in handles:
            handle.remove()


def token_masks(family: Family, arguments: dict[str, Any], streams: Streams) -> Streams:
    """Stream -> boolean mask [batch, tokens] of real tokens, for streams that have padding.

    Args:
        arguments: of the transformer's call.
        streams: the streams for which masks are wanted, [batch, tokens, channels] each.
    """
    masks = {
        stream: family.masks[stream](arguments, value.shape[1])
        for stream, value in streams.items()
        if stream in family.masks
    }
    return {s: mask.bool() for s, mask in masks.items() if mask is not None}


def assembled(
    transformer: nn.Module, students: Mapping[tuple[int, int], nn.Module]
) -> tuple[nn.Module, list[list[int]]]:
    """A transformer with students in place of intervals; all other modules are shared.

    The original is left as it was. Block lists are renumbered without gaps and the new config says
    so, so that stock `from_pretrained` rebuilds the model.

    Args:
        students: (first, last) of an interval, inclusive -> the module that replaces it.

    Returns:
        The assembled transformer, and the block map: for every block of it, the numbers of the old
        blocks for which it stands.
    """
    first = {interval[0]: interval for interval in students}
    inside = {i for u, v in students for i in range(u + 1, v + 1)}
    of, every = family(transformer), block_sequence(transformer)
    block_map: list[list[int]] = []
    lists: dict[str, list[nn.Module]] = {listed.attribute: [] for listed in of.lists}
    starts: dict[str, int] = {}
    origins: dict[str, list[int]] = {listed.attribute: [] for listed in of.lists}
    for block in every:
        attribute = block.list.attribute
        start = starts.setdefault(attribute, block.index)
        if block.index in inside:
            continue
        interval = first.get(block.index, (block.index, block.index))
        lists[attribute].append(students.get(interval, block.module))
        origins[attribute].append(block.index - start)
        block_map.append(list(range(interval[0], interval[1] + 1)))
    copied = copy.copy(transformer)
    copied.__dict__.pop("forward", None)  # an offloading hook's, which runs the original
    copied._modules = dict(transformer._modules)  # a shallow copy would share this mapping
    changed: dict[str, Any] = {}
    config = diffusers_model.of(transformer).config
    for listed in of.lists:
        setattr(copied, listed.attribute, nn.ModuleList(lists[listed.attribute]))
        changed[listed.depth_key] = len(lists[listed.attribute])
    kept = [members[0] for members in block_map]
    for key in of.index_keys:  # numbers of blocks, of families that have one list
        (numbers,) = origins.values()
        marked = set(config[key] or ())
        changed[key] = [new for new, old in enumerate(numbers) if old in marked]
    for key in of.per_block:
        changed[key] = [config[key][index] for index in kept]
    for attribute in of.companions:
        members = list(getattr(transformer, attribute))
        chosen = [members[index] for index in kept] + members[len(every) :]
        setattr(copied, attribute, nn.ModuleList(chosen))
    diffusers_model.of(copied).register_to_config(**changed)
    return copied, block_map


class PassThroughBlock(nn.Module):
    """Stands in for a block, and returns the streams that it gets unchanged."""

    def __init__(self, block: Block):
        super().__init__()
        self._block = block

    def forward(self, *args, **kwargs):
        streams = self._block.inputs(self._block.bind(args, kwargs))
        returned = tuple(streams.get(stream) for stream in self._block.list.outputs)
        return returned if len(returned) > 1 else returned[0]


def emptied(transformer: nn.Module, kept: Collection[int] = ()) -> nn.Module:
    """A transformer with as many blocks, of which only those with the `kept` numbers compute; the
    others return their streams unchanged. All other modules are the original's."""
    every = block_sequence(transformer)
    passing = {(b.index, b.index): PassThroughBlock(b) for b in every if b.index not in kept}
    return assembled(transformer, passing)[0]


def sizes(transformer: nn.Module) -> dict[str, int]:
    """What budgets count: the numbers of transformer_parameters and of blocks."""
    depth = len(block_sequence(transformer))
    return {"transformer_parameters": parameter_count(transformer), "blocks": depth}


def parameter_count(module: nn.Module) -> int:
    """Number of parameters, of a quantised module as it was before."""
    return sum(map(_count, module.parameters()))


def _count(parameter: nn.Parameter) -> int:
    # Two weights of 4 bits are one byte of bitsandbytes' tensor, which keeps the shape.
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def parameters_of_blocks(transformer: nn.Module) -> list[int]:
    """Of each block, how many parameters go if it is removed: its own and those of its companions
    (`Family.companions`)."""
    sequence = block_sequence(transformer)
    beside = [getattr(transformer, name) for name in family(transformer).companions]
    return [
        parameter_count(block.module) + sum(parameter_count(each[block.index]) for each in beside)
        for block in sequence
    ]


def facts(transformer: nn.Module) -> BlockFacts:
    """What the stages without a transformer need to know of its blocks."""
    return BlockFacts(
        lists=[block.list.attribute for block in block_sequence(transformer)],
        seams=seams(transformer),
        untouchable=untouchable(transformer),
        parameters=parameters_of_blocks(transformer),
        transformer_parameters=parameter_count(transformer),
    )
