"""The blocks of a transformer as one sequence: watch them, call them, replace them.

Everything here works on any class of the family registry. A block is called by diffusers with
keywords, or positionally under gradient checkpointing, so arguments are bound by signature.
"""

import copy
import inspect
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ppcl.errors import UserError
from ppcl.families import FAMILIES, BlockList, Family, family_of

Streams = dict[str, Tensor]


class _Enough(Exception):
    """Ends a forward pass early: what was wanted has been seen."""


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
                "(workflow/scripts/ppcl/families.py)"
            )
        return dict(zip(self.list.outputs, values, strict=True))


def signature_arguments(module: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """A module call's arguments by name."""
    return inspect.signature(module.forward).bind(*args, **kwargs).arguments


def family(transformer: nn.Module) -> Family:
    """The registry entry of a transformer; a subclass of a registered class is of that family.

    Raises:
        UserError: there is none.
    """
    names = [c.__name__ for c in type(transformer).__mro__]
    return family_of(next((name for name in names if name in FAMILIES), names[0]))


def block_sequence(transformer: nn.Module) -> list[Block]:
    """All blocks of a transformer in data-flow order."""
    every: list[Block] = []
    for block_list in family(transformer).lists:
        for module in getattr(transformer, block_list.attribute):
            every.append(Block(len(every), module, block_list))
    return every


def seams(transformer: nn.Module) -> list[int]:
    """Index of the first block of every block list; no interval may cross one."""
    every = block_sequence(transformer)
    return [b.index for b in every if b.index == 0 or b.list is not every[b.index - 1].list]


def untouchable(transformer: nn.Module) -> dict[int, str]:
    """Blocks that the family forbids to prune, with the reason."""
    found, every = {}, block_sequence(transformer)
    for (attribute, position), reason in family(transformer).untouchable.items():
        members = [b.index for b in every if b.list.attribute == attribute]
        found[members[position]] = reason
    return found


@contextmanager
def watch(
    blocks: Iterable[Block],
    before: Callable[[Block, dict[str, Any]], None] | None = None,
    after: Callable[[Block, Streams], None] | None = None,
    stop_after: int | None = None,
):
    """Shows the calls of blocks while a transformer runs; yields a function that runs it.

    Args:
        before: gets each block with the bound arguments of its call.
        after: gets each block with the streams that it returned.
        stop_after: the block after which the forward pass ends early. Its caller gets None.
    """
    handles = []

    def run(transformer: nn.Module, arguments: dict[str, Any]):
        try:
            return transformer(**arguments)
        except _Enough:
            return None

    for block in blocks:
        if before is not None:

            def pre(_module, args, kwargs, block=block):
                before(block, block.bind(args, kwargs))

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


@contextmanager
def taps(block: Block):
    """Shows what passes inside a stock block while it runs; yields a mapping that fills then.

    Keys: `text/input`, what its attention gets as text (z_p of Eq. 8), and `ffn/<stream>`, the
    stream after attention (what l_q of Eq. 9 maps).
    """
    seen: Streams = {}
    handles, width = [], block.list.width
    if width and width.text:

        def attend(module, args, kwargs):
            seen["text/input"] = signature_arguments(module, args, kwargs)[width.text.argument]

        attention = block.module.get_submodule(width.text.attention)
        handles.append(attention.register_forward_pre_hook(attend, with_kwargs=True))
    for stream, ffn in width.ffn.items() if width else ():

        def normalise(_module, args, key=f"ffn/{stream}"):
            seen[key] = args[0]

        norm = block.module.get_submodule(ffn.norm)
        handles.append(norm.register_forward_pre_hook(normalise))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def verify(transformer: nn.Module, arguments: dict[str, Any]) -> None:
    """Checks the registry's claims on one real call: what a block returns as a stream is what the
    next block of its list gets as that stream, to the bit.

    Raises:
        UserError: a stream is missing, changes its shape, or comes back in another place.
    """
    returned: Streams = {}
    name = type(transformer).__name__

    def before(block: Block, bound: dict[str, Any]) -> None:
        streams = block.inputs(bound)
        if missing := set(block.list.inputs) - set(streams):
            raise UserError(f"{name}: block {block.index} got no {missing.pop()} stream")
        if block.index not in seams(transformer):
            for stream, value in streams.items():
                if not torch.equal(value, returned[stream]):
                    raise UserError(
                        f"{name}: block {block.index - 1} does not return its {stream} stream "
                        "where the family registry says (workflow/scripts/ppcl/families.py)"
                    )

    with watch(
        block_sequence(transformer), before, lambda _block, streams: returned.update(streams)
    ) as run:
        run(transformer, arguments)


def token_masks(family: Family, arguments: dict[str, Any]) -> Streams:
    """Stream -> boolean mask [batch, tokens] of real tokens, for streams that have padding."""
    found = {s: arguments.get(a) for s, a in family.masks.items()}
    return {s: mask.bool() for s, mask in found.items() if mask is not None}


def assembled(
    transformer: nn.Module, students: dict[tuple[int, int], nn.Module]
) -> tuple[nn.Module, list[list[int]]]:
    """A transformer with students in place of intervals; all other modules are shared.

    The original is left as it was. Block lists are renumbered without gaps and the new config says
    so, so that stock `from_pretrained` rebuilds the model.

    Args:
        students: (first, last) of an interval, inclusive -> the module that replaces it.

    Returns:
        The assembled transformer, and the block map: for every new block, the old ones it stands
        for.
    """
    first = {interval[0]: interval for interval in students}
    inside = {i for u, v in students for i in range(u + 1, v + 1)}
    block_map: list[list[int]] = []
    lists: dict[str, list[nn.Module]] = {}
    depth_keys = {}
    for block in block_sequence(transformer):
        kept = lists.setdefault(block.list.attribute, [])
        depth_keys[block.list.attribute] = block.list.depth_key
        if block.index in first:
            u, v = first[block.index]
            kept.append(students[u, v])
            block_map.append(list(range(u, v + 1)))
        elif block.index not in inside:
            kept.append(block.module)
            block_map.append([block.index])
    copied = copy.copy(transformer)
    copied._modules = dict(transformer._modules)  # a shallow copy would share this mapping
    for attribute, modules in lists.items():
        setattr(copied, attribute, nn.ModuleList(modules))
    copied.register_to_config(**{depth_keys[a]: len(modules) for a, modules in lists.items()})
    return copied, block_map


def parameter_count(module: nn.Module) -> int:
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())
