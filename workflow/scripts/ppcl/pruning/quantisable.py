"""Which matrices of a transformer are quantised, and what there is to store of its weights.

Quantised are the Linears of its blocks, but for modulations of the first block, as published
checkpoints keep them, and for products of low rank, which are small. What is outside of the blocks
(embeddings of inputs and time, the last norm and projection) is kept: with it, the embedded teacher
in int8 has 6.8 times the error, and in nf4 9.4 times; without the blocks' modulations, which may be
a third of all weights, 0.86 and 0.77 times.
"""

from collections.abc import Collection, Iterable

from torch import nn

from ppcl.pruning import narrow, narrow_layers
from ppcl.pruning.quantisation import Inventory
from ppcl.runtime import devices
from ppcl.transformer import blocks


def in_block(block: nn.Module, modulations: Iterable[str] = ()) -> list[str]:
    """Paths of the Linears of a block, narrow or not, that are quantised.

    modulations: paths of the stock block's matrices that are kept.
    """
    kept = {narrow.held(block, path) for path in modulations}
    products = [f"{n}." for n, m in block.named_modules() if narrow_layers.is_low_rank(m)]
    return [
        path
        for path, module in block.named_modules()
        if isinstance(module, nn.Linear)
        and not path.startswith(tuple(products))
        and path not in kept
    ]


def names(transformer: nn.Module) -> list[str]:
    """Paths of all Linears of a transformer that are quantised."""
    path_of: dict[nn.Module, str] = {}
    paths: list[str] = []
    for name, module in transformer.named_modules():
        path_of.setdefault(module, name)
    for block in blocks.block_sequence(transformer):
        first = block.index == 0
        prefix = path_of[block.module]
        inside = in_block(block.module, block.list.modulations if first else ())
        paths += [f"{prefix}.{path}" for path in inside]
    return paths


def inventory(module: nn.Module, quantised: Collection[str]) -> Inventory:
    """What there is to store of a module.

    quantised: paths of its Linears that are.
    """
    weights = {f"{path}.weight" for path in quantised}
    total = Inventory()
    for name, tensor in module.state_dict().items():
        size = tensor.numel() * tensor.element_size()
        if name in weights:
            rows = len(tensor)
            here = Inventory(0, 0, tensor.numel(), rows, 1, size, rows * tensor.element_size())
        else:
            here = Inventory(kept=size)
        total += here
    return total + Inventory(parameters=blocks.parameter_count(module))


def of_linear(linear: nn.Linear, quantised: bool) -> Inventory:
    """What there is to store of one Linear alone."""
    holder = nn.ModuleDict({"one": linear})
    return inventory(holder, ["one"] if quantised else ())


def stored_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights as they are stored, quantised or not."""
    every = (part for tensor in module.state_dict().values() for part in devices.plain(tensor))
    return sum(part.numel() * part.element_size() for part in every)
