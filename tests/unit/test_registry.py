"""Every transformer class of diffusers: supported, refused with a reason, or inspected."""

import inspect
import logging

import diffusers
import pytest
import torch
from torch import nn

from ppcl.errors import UserError
from ppcl.transformer import blocks, claims, discovery, families, registry
from support import zoo_images, zoo_videos

ZOO = zoo_images.SPECIMENS | zoo_videos.SPECIMENS
DUAL, IMAGE = ("image", "text"), ("image",)
DEPTH = ("transformer_blocks", "num_layers")
SINGLES = ("single_transformer_blocks", "num_single_layers")
# What inspection finds of classes without an entry: (list, depth key, outputs).
INSPECTED = {
    "AllegroTransformer3DModel": [(*DEPTH, IMAGE)],
    "AnyFlowTransformer3DModel": [("blocks", "num_layers", IMAGE)],
    "AuraFlowTransformer2DModel": [
        ("joint_transformer_blocks", "num_mmdit_layers", DUAL[::-1]),
        ("single_transformer_blocks", "num_single_dit_layers", ("joint",)),
    ],
    "BriaTransformer2DModel": [(*DEPTH, DUAL[::-1]), (*SINGLES, DUAL[::-1])],
    "ChronoEditTransformer3DModel": [("blocks", "num_layers", IMAGE)],
    "CogView3PlusTransformer2DModel": [(*DEPTH, DUAL)],
    "CogView4Transformer2DModel": [(*DEPTH, DUAL)],
    "Flux3Transformer2DModel": [(*SINGLES, DUAL[::-1])],
    "HeliosTransformer3DModel": [("blocks", "num_layers", IMAGE)],
    "HunyuanVideo15Transformer3DModel": [(*DEPTH, DUAL)],
    "HunyuanVideoFramepackTransformer3DModel": [(*DEPTH, DUAL), (*SINGLES, DUAL)],
    "Ideogram4Transformer2DModel": [("layers", "num_layers", IMAGE)],
    "JoyImageEditPlusTransformer3DModel": [("double_blocks", "num_layers", DUAL)],
    "JoyImageEditTransformer3DModel": [("double_blocks", "num_layers", DUAL)],
    "Krea2Transformer2DModel": [(*DEPTH, IMAGE)],
    "LongCatImageTransformer2DModel": [(*DEPTH, DUAL[::-1]), (*SINGLES, DUAL[::-1])],
    "LuminaNextDiT2DModel": [("layers", "num_layers", IMAGE)],
    "OmniGenTransformer2DModel": [("layers", "num_layers", IMAGE)],
    "OvisImageTransformer2DModel": [(*DEPTH, DUAL[::-1]), (*SINGLES, DUAL[::-1])],
    "PRXTransformer2DModel": [("blocks", "depth", IMAGE)],
    "SanaVideoTransformer3DModel": [(*DEPTH, IMAGE)],
    "SkyReelsV2Transformer3DModel": [("blocks", "num_layers", IMAGE)],
}
# Constructor arguments that have no default.
GIVEN = {
    "LuminaNextDiT2DModel": {"num_kv_heads": 32},
    "OmniGenTransformer2DModel": {"rope_scaling": {"long_factor": [1.0], "short_factor": [1.0]}},
}


def classes() -> list[str]:
    """Names of all transformer classes that diffusers exports."""
    names = []
    for name in dir(diffusers):
        one = getattr(diffusers, name, None)
        if inspect.isclass(one) and issubclass(one, diffusers.ModelMixin):
            names += [name] if ".models.transformers." in one.__module__ else []
    return names


def found_by_inspection(name: str) -> list[tuple]:
    with torch.device("meta"):
        made = getattr(diffusers, name)(**GIVEN.get(name, {}))
    lists = discovery.inspected(made).lists
    return [(b.attribute, b.depth_key, b.outputs) for b in lists]


def test_every_class_of_diffusers_has_a_verdict():
    every = set(classes())
    assert len(every) > 70
    assert set(families.FAMILIES) | set(families.REFUSED) | set(INSPECTED) == every
    assert not set(families.FAMILIES) & set(families.REFUSED)
    assert not set(INSPECTED) & (set(families.FAMILIES) | set(families.REFUSED))


@pytest.mark.parametrize("name", sorted(families.REFUSED))
def test_a_refusal_says_why(name):
    with pytest.raises(UserError, match=name) as refused:
        registry.family_of(name)
    assert families.REFUSED[name] in str(refused.value)


@pytest.mark.parametrize("name", sorted(INSPECTED))
def test_other_classes_are_inspected(name, caplog):
    discovery._inspected.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert found_by_inspection(name) == INSPECTED[name]
    assert f"{name} has no entry in the family registry" in caplog.text


def test_every_supported_family_has_a_tiny_pipeline():
    assert {one.family for one in ZOO.values()} >= set(families.FAMILIES)


def test_inspection_agrees_with_the_registry():
    """Where it accepts a class that has an entry. It refuses those whose entries know better: of
    caches, of layers to skip, of a last block of another kind, of numbers that nobody reads."""
    refused = set()
    for name, family in families.FAMILIES.items():
        try:
            lists = found_by_inspection(name)
        except (UserError, TypeError):  # HiDream has no defaults
            refused.add(name.split("Transformer")[0])
            continue
        assert lists == [(b.attribute, b.depth_key, b.outputs) for b in family.lists], name
    assert refused == {"Flux2", "HiDreamImage", "Mochi", "SD3", "ZImage"}


class Stranger(diffusers.ModelMixin, diffusers.ConfigMixin):
    """A class that diffusers may bring tomorrow."""

    config_name = "config.json"

    @diffusers.configuration_utils.register_to_config
    def __init__(self, num_layers: int = 3, width: int = 4):
        super().__init__()
        self.blocks = nn.ModuleList([StrangeBlock(width) for _ in range(num_layers)])

    def forward(self, hidden_states, encoder_hidden_states, return_dict=True):
        for block in self.blocks:
            encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states)
        return (hidden_states,)


class StrangeBlock(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, hidden_states, encoder_hidden_states, temb=0):
        hidden_states = hidden_states + temb + self.linear(hidden_states)
        encoder_hidden_states = encoder_hidden_states - self.linear(encoder_hidden_states)
        return encoder_hidden_states, hidden_states


class Swapped(Stranger):
    """Returns its streams in another order than its source says."""

    def forward(self, hidden_states, encoder_hidden_states, return_dict=True):
        for block in self.blocks:
            hidden_states, encoder_hidden_states = block(hidden_states, encoder_hidden_states)
        return (hidden_states,)


class Numbered(Stranger):
    def forward(self, hidden_states, encoder_hidden_states, return_dict=True):
        for index, block in enumerate(self.blocks):
            if index > 1:
                encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states)
        return (hidden_states,)


class Counted(Stranger):
    def forward(self, hidden_states, encoder_hidden_states, return_dict=True):
        number = 0
        for block in self.blocks:
            encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states)
            number += 1
        return (hidden_states,)


class Paired(Stranger):
    def forward(self, hidden_states, encoder_hidden_states, return_dict=True):
        for block, _ in zip(self.blocks, range(9), strict=False):
            encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states)
        return (hidden_states,)


class Picked(Stranger):
    def forward(self, hidden_states, encoder_hidden_states, return_dict=True):
        for number in range(len(self.blocks)):
            block = self.blocks[number]
            encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states)
        return (hidden_states,)


class Kept(Stranger):
    def forward(self, hidden_states, encoder_hidden_states, return_dict=True):
        kept = []
        for block in self.blocks:
            encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states)
            kept.append(hidden_states)
        return (hidden_states + kept[1],)


class Hidden(Stranger):
    def forward(self, hidden_states, encoder_hidden_states, return_dict=True):
        return self.through(hidden_states, encoder_hidden_states)

    def through(self, hidden_states, encoder_hidden_states):
        for block in self.blocks:
            encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states)
        return (hidden_states,)


class Table(Stranger):
    """Gives every block a number of its own, in a way that its source does not show."""

    def forward(self, hidden_states, encoder_hidden_states, return_dict=True):
        own = iter(torch.arange(9.0))
        for block in self.blocks:
            temb = next(own)
            encoder_hidden_states, hidden_states = block(hidden_states, encoder_hidden_states, temb)
        return (hidden_states,)


CALL = {"hidden_states": torch.ones(2, 5, 4), "encoder_hidden_states": torch.zeros(2, 5, 4)}


def test_a_class_of_tomorrow_is_read_from_its_source():
    stranger = Stranger().requires_grad_(False)
    (listed,) = blocks.family(stranger).lists
    assert (listed.attribute, listed.depth_key, listed.outputs) == (
        "blocks",
        "num_layers",
        ("text", "image"),
    )
    claims.verify(stranger, CALL)
    small, block_map = blocks.assembled(stranger, {(0, 1): stranger.blocks[0]})
    assert block_map == [[0, 1], [2]] and small.config.num_layers == 2


def test_what_is_read_is_checked_numerically():
    with pytest.raises(UserError, match=r"block 0 does not return its (image|text) stream where"):
        claims.verify(Swapped().requires_grad_(False), CALL)


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (Numbered, "depends on the block's number"),
        (Counted, "counts the blocks"),
        (Paired, "pairs the blocks with something else"),
        (Picked, "picks blocks by number"),
        (Kept, "keeps what they return"),
        (Hidden, "does not go through all of its lists"),
    ],
)
def test_blocks_that_know_their_number_are_refused(made, why):
    with pytest.raises(UserError, match=f"{made.__name__}, which has no entry.*{why}"):
        blocks.family(made())


def test_blocks_that_get_something_of_their_own_are_refused():
    with pytest.raises(UserError, match="block 1 gets another 'temb' than the first of its list"):
        claims.verify(Table().requires_grad_(False), CALL)
