"""ControlNets of the teacher on pruned pipelines: every block gets what the teacher adds there.

Which sample the teacher adds after a block is not computed here but seen, in the stock class: it is
what a block gets more than the block before it returned.
"""

import copy
import dataclasses
import inspect
import json
import re
import runpy
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers import AutoModel, DiffusionPipeline
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import nn

from ppcl.errors import UserError
from ppcl.export import control_class, controlnets, pruned_models
from ppcl.transformer import blocks
from ppcl.transformer.families import FAMILIES
from support import SCRIPTS, pruned, zoo_parts
from support.zoo_images import SPECIMENS

DEPTH = 6
SAMPLES = (
    "controlnet_block_samples",
    "controlnet_single_block_samples",
    "block_controlnet_hidden_states",
    "controlnet_blocks_repeat",
)


@dataclass(frozen=True)
class Case:
    """A family of the zoo, and its stock ControlNet pipeline.

    Attributes:
        merged: ends of the intervals that one block stands for, at the start, in the middle and at
            the end of lists where the family lets them.
        last: what gets the stream of the last block.
        layers: keys of the ControlNet, for each ControlNet that is tried.
        settings: of the pipeline's call, besides those of the zoo.
    """

    specimen: str
    pipeline: str
    merged: tuple[tuple[int, int], ...]
    last: str
    layers: tuple[dict, ...]
    settings: dict = field(default_factory=dict)


FLUX = ((0, 1), (3, 5), (6, 8), (10, 11))
CASES = {
    "qwen-image": Case(
        "qwen-image",
        "QwenImageControlNetPipeline",
        ((0, 2), (4, 5)),
        "norm_out",
        tuple({"num_layers": n} for n in (1, 2, 4, 6, 8)),
    ),
    "flux": Case(
        "flux",
        "FluxControlNetPipeline",
        FLUX,
        "norm_out",
        tuple(
            {"num_layers": n, "num_single_layers": m} for n, m in ((1, 6), (6, 1), (4, 0), (2, 8))
        ),
    ),
    # It encodes its picture itself, and pipelines repeat its samples.
    "flux-xlabs": Case(
        "flux",
        "FluxControlNetPipeline",
        FLUX,
        "norm_out",
        ({"num_layers": 2, "num_single_layers": 0, "conditioning_embedding_channels": 4},),
        {"height": 32, "width": 32},
    ),
    "sd3": Case(
        "sd3",
        "StableDiffusion3ControlNetPipeline",
        ((0, 1), (3, 4)),
        "norm_out",
        tuple({"num_layers": n} for n in (1, 4, 6, 8)),
    ),
    "sana": Case(
        "sana",
        "SanaControlNetPipeline",
        ((1, 2), (4, 5)),
        "norm_out",
        tuple({"num_layers": n} for n in (1, 3, 5)),
    ),
    "z-image": Case(
        "z-image",
        "ZImageControlNetPipeline",
        ((0, 1), (3, 5)),
        "all_final_layer.2-1",
        ({"control_layers_places": [0, 1, 3, 5]}, {"control_layers_places": [0, 2, 4]}),
    ),
}


def controlnet(case, transformer, layers):
    """A stock ControlNet, none of whose weights are zero."""
    kind = getattr(diffusers, blocks.family(transformer).control.model)
    config = {k: v for k, v in transformer.config.items() if not k.startswith("_")}
    if case.specimen == "z-image":
        config |= {"control_in_dim": config["in_channels"], "n_refiner_layers": 1}
    if case.specimen == "sd3":
        config |= {"extra_conditioning_channels": 0, "dual_attention_layers": []}
    if "conditioning_embedding_channels" in layers:
        config |= {"patch_size": 2}
    torch.manual_seed(1)
    made = kind.from_config(config | layers)
    for weight in made.parameters():
        nn.init.normal_(weight, std=0.2)
    return made.requires_grad_(False).eval()


def call(pipe, settings, **more):
    """Pictures of a stock pipeline, as numbers."""
    rng = np.random.default_rng(0)
    side = settings["height"], settings["width"]
    picture = Image.fromarray(rng.integers(0, 255, (*side, 3), dtype=np.uint8))
    given = settings | {
        "prompt": "a red cat",
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
        "num_inference_steps": 2,
        "control_image": picture,
        "controlnet_conditioning_scale": 0.5,
    }
    return pipe(**(given | more)).images.float()


@torch.no_grad()
def added(transformer, last, arguments):
    """What the stock class adds to the image stream after each of its blocks."""
    every = blocks.block_sequence(transformer)
    left, got = {}, {}

    def before(block, bound):
        got[block.index] = block.inputs(bound)["image"].clone()

    def after(block, streams):
        left[block.index] = streams["image"].clone()

    def end(_module, args, kwargs):
        got[len(every)] = (args[0] if args else kwargs["x"]).clone()

    handle = transformer.get_submodule(last).register_forward_pre_hook(end, with_kwargs=True)
    try:
        with blocks.watch(every, before, after) as run:
            run(transformer, arguments)
    finally:
        handle.remove()
    return [got[index + 1] - left[index] for index in range(len(every))]


def expected(teacher, variant, block_map, last):
    """The forward of a variant which adds, after each block, all that the teacher adds after the
    blocks that it stands for; it is given the samples that the teacher would get."""
    forward = variant.forward

    def run(*args, **kwargs):
        bound = blocks.signature_arguments(teacher, args, kwargs)
        by_block = added(teacher, last, bound)
        handles = []
        for block, members in zip(blocks.block_sequence(variant), block_map, strict=True):
            more = sum(by_block[member] for member in members)

            def hook(_module, _args, returned, block=block, more=more):
                if not isinstance(returned, tuple):
                    return returned + more
                place = block.list.outputs.index("image")
                return tuple(s + more if i == place else s for i, s in enumerate(returned))

            handles.append(block.module.register_forward_hook(hook))
        try:
            return forward(**{k: v for k, v in bound.items() if k not in SAMPLES})
        finally:
            for handle in handles:
                handle.remove()

    return run


@pytest.fixture(autouse=True, scope="module")
def modes():
    """Pictures are encoded without chance: the pipeline of SD3 draws by the global generator."""
    with pytest.MonkeyPatch.context() as patch:
        kind = DiagonalGaussianDistribution
        patch.setattr(kind, "sample", lambda self, generator=None: self.mode())
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Family -> its teacher's pipeline, the variant's transformer, block map and folder; once."""
    known = {}

    def get(name):
        case = CASES[name]
        if (key := (case.specimen, case.merged)) not in known:
            pipe = SPECIMENS[case.specimen].make(DEPTH)
            variant, block_map = pruned.model(pipe.transformer, case.merged)
            folder = tmp_path_factory.mktemp(name)
            variant.save_pretrained(folder / "transformer")
            index = {"transformer": ["diffusers", type(variant).__name__]}
            (folder / "model_index.json").write_text(json.dumps(index))
            (folder / "transformer/block_map.json").write_text(json.dumps(block_map))
            known[key] = pipe, variant, block_map, folder
        return known[key]

    return get


def remapped(folder, stock, place):
    """A stock ControlNet, written for the variant of a folder and loaded by diffusers alone."""
    stock.save_pretrained(place / "stock")
    model = pruned_models.read(folder, "transformer")
    own = controlnets.remap(place / "stock", model, place / "remapped")
    shutil.rmtree(place / "stock")
    return AutoModel.from_pretrained(str(place / "remapped"), trust_remote_code=own)


def pipeline(name, made, controlnet):
    """The stock ControlNet pipeline of a variant, with a transformer of its own."""
    pipe, variant, _, _ = made(name)
    kind = getattr(diffusers, CASES[name].pipeline)
    parts = pipe.components | {"transformer": copy.copy(variant), "controlnet": controlnet}
    if CASES[name].settings:
        parts["vae"] = zoo_parts.vae(4, levels=4, shift_factor=0.1)
    known = kind.__init__.__code__.co_varnames
    built = kind(**{key: part for key, part in parts.items() if key in known})
    built.set_progress_bar_config(disable=True)
    return built


EVERY = [(name, layers) for name, case in CASES.items() for layers in case.layers]


@pytest.mark.parametrize("name, layers", EVERY, ids=[f"{n}-{[*k.values()]}" for n, k in EVERY])
def test_a_block_gets_what_the_teacher_adds_after_all_that_it_stands_for(
    name, layers, made, tmp_path
):
    case, (pipe, _, block_map, folder) = CASES[name], made(name)
    settings = SPECIMENS[case.specimen].settings | case.settings
    stock = controlnet(case, pipe.transformer, layers)
    mine = call(pipeline(name, made, remapped(folder, stock, tmp_path)), settings)
    theirs = pipeline(name, made, stock)
    unmapped = call(theirs, settings)
    theirs.transformer.forward = expected(
        pipe.transformer, theirs.transformer, block_map, case.last
    )
    right = call(theirs, settings)
    without = call(pipeline(name, made, stock), settings, controlnet_conditioning_scale=0.0)
    assert apart(mine, right) < 1e-4
    assert apart(right, without) > 1e-2
    # One sample, after the first of two blocks that one stands for: the stock class fits.
    assert apart(right, unmapped) > 1e-2 or (name, layers) == ("sana", {"num_layers": 1})


def apart(a, b):
    """How far two tensors are apart, relative to the second."""
    return float((a - b).norm() / b.norm())


MULTI = {
    "qwen-image": ("QwenImageMultiControlNetModel", ({"num_layers": 4},)),
    "flux": (
        "FluxMultiControlNetModel",
        ({"num_layers": 2, "num_single_layers": 1}, {"num_layers": 6, "num_single_layers": 3}),
    ),
    "sd3": ("SD3MultiControlNetModel", ({"num_layers": 2}, {"num_layers": 6})),
}


@pytest.mark.parametrize("name", MULTI)
def test_several_at_once_each_add_what_they_add_alone(name, made, tmp_path):
    """Qwen-Image has one ControlNet for several pictures, the others have one for each. Stock ones
    of unlike depth would be cut to the shortest; remapped ones are all as deep as the model."""
    case, (pipe, _, _, folder) = CASES[name], made(name)
    kind, layers = MULTI[name]
    settings = SPECIMENS[case.specimen].settings
    stock = [controlnet(case, pipe.transformer, each) for each in layers]
    mine = []
    for number, each in enumerate(stock):
        (place := tmp_path / str(number)).mkdir()
        mine.append(remapped(folder, each, place))
    both = pipeline(name, made, getattr(diffusers, kind)(mine))
    rng = np.random.default_rng(1)
    side = settings["height"], settings["width"], 3
    pictures = [Image.fromarray(rng.integers(0, 255, side, dtype=np.uint8)) for _ in range(2)]
    given = {"control_image": pictures, "controlnet_conditioning_scale": [0.5, 0.25]}
    if name == "flux":
        given["control_mode"] = [0, 0]
    got = call(both, settings, **given)
    samples = Seen()
    both.transformer.forward = samples.watching(both.transformer.forward)
    call(both, settings, **given)
    alone = []
    for number, picture in enumerate(pictures):
        single = pipeline(name, made, mine[number % len(mine)])
        alone.append(Seen())
        single.transformer.forward = alone[-1].watching(single.transformer.forward)
        scale = given["controlnet_conditioning_scale"][number]
        call(single, settings, control_image=picture, controlnet_conditioning_scale=scale)
    assert torch.isfinite(got).all()
    # In the first step all of them see the same latents.
    for key in samples.first:
        one, other = (each.first[key] for each in alone)
        for value, a, b in zip(samples.first[key], one, other, strict=True):
            assert apart(value, a + b) < 1e-5


class Seen:
    """The samples that a transformer gets in the first step."""

    def __init__(self):
        self.first = {}

    def watching(self, forward):
        def run(*args, **kwargs):
            for key in SAMPLES[:3]:
                if kwargs.get(key) is not None:
                    self.first.setdefault(key, list(kwargs[key]))
            return forward(*args, **kwargs)

        return run


def saved(case, made, place, layers):
    """Folders of a stock ControlNet and of the variant."""
    pipe, _, _, folder = made(case)
    controlnet(CASES[case], pipe.transformer, layers).save_pretrained(place, max_shard_size="40KB")
    return place, pruned_models.read(folder, "transformer")


def test_weights_stay_as_they_are_and_a_loaded_one_is_saved_with_its_code(made, tmp_path):
    place, model = saved("qwen-image", made, tmp_path / "stock", {"num_layers": 2})
    assert controlnets.remap(place, model, tmp_path / "mine")
    for file in (files := [*place.glob("*.safetensors*")]):
        assert (tmp_path / "mine" / file.name).read_bytes() == file.read_bytes()
    assert len(files) > 2  # in shards, with their index
    loaded = AutoModel.from_pretrained(str(tmp_path / "mine"), trust_remote_code=True)
    assert isinstance(loaded, diffusers.QwenImageControlNetModel)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(str(tmp_path / "again"), trust_remote_code=True)
    assert again.config.block_samples == loaded.config.block_samples == [[[0] * 3, [1], [1] * 2]]
    with pytest.raises(ValueError, match="trust_remote_code"):
        AutoModel.from_pretrained(str(tmp_path / "again"))


def test_a_pipeline_s_folder_holds_it(made, tmp_path):
    """The folder of the whole ControlNet pipeline loads by itself, with narrow blocks too."""
    stock = controlnet(CASES["qwen-image"], made("qwen-image")[0].transformer, {"num_layers": 2})
    whole = pipeline("qwen-image", made, remapped(made("qwen-image")[3], stock, tmp_path))
    settings = SPECIMENS["qwen-image"].settings
    before = call(whole, settings)
    whole.save_pretrained(tmp_path / "pipeline")
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "pipeline", trust_remote_code=True)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.controlnet).__name__ == "RemappedQwenImageControlNetModel"
    assert torch.equal(call(loaded, settings), before)


SANA, Z_IMAGE = FAMILIES["SanaTransformer2DModel"], FAMILIES["ZImageTransformer2DModel"]
HERE = Path("canny")


def test_the_first_block_of_sana_takes_nothing_so_the_next_gets_what_is_its():
    maps = {"transformer_blocks": [[0, 1, 2], [3], [4, 5]]}
    _, sums = controlnets.planned(SANA.control, maps, {"num_layers": 5}, HERE)
    assert sums == [[[0, 1, 2], [3, 4]]]
    _, sums = controlnets.planned(SANA.control, maps, {"num_layers": 2}, HERE)
    assert sums == [[[0, 1]]]  # nothing after the teacher's third block


def test_places_of_z_image_move_and_only_a_shared_block_needs_a_sum():
    maps = {"layers": [[0], [1, 2], [3], [4, 5]]}
    key = "control_layers_places"
    assert controlnets.planned(Z_IMAGE.control, maps, {key: [0, 2, 5]}, HERE) == (
        {key: [0, 1, 3]},
        None,
    )
    changed, sums = controlnets.planned(Z_IMAGE.control, maps, {key: [0, 1, 2, 3]}, HERE)
    assert (changed, sums) == ({}, [[[0], [1, 2], [3], []]])
    with pytest.raises(UserError, match="block 6, but the teacher has 6"):
        controlnets.planned(Z_IMAGE.control, maps, {key: [0, 6]}, HERE)


TWICE = {
    "QwenImageTransformer2DModel": [{"num_layers": n} for n in (1, 2, 4, 6)],
    "FluxTransformer2DModel": [
        {"num_layers": n, "num_single_layers": m, "conditioning_embedding_channels": c}
        for n, m, c in ((2, 3, None), (6, 0, None), (2, 0, 4))
    ],
    "SD3Transformer2DModel": [{"num_layers": n} for n in (1, 4, 6)],
    "SanaTransformer2DModel": [{"num_layers": n} for n in (1, 3, 5)],
    "ZImageTransformer2DModel": [{"control_layers_places": [0, 1, 2, 4]}],
}


@pytest.mark.parametrize(
    "name, config", [(name, config) for name, every in TWICE.items() for config in every]
)
def test_a_model_that_is_pruned_twice_gets_what_one_that_is_pruned_once_would(name, config):
    """Remapped for the first variant, then for the variant of that one."""
    control = FAMILIES[name].control
    first, second = [[0, 1], [2], [3, 4], [5]], [[0], [1, 2], [3]]
    both = [[0, 1], [2, 3, 4], [5]]

    def sums(block_map, config):
        maps = dict.fromkeys(control.lists, block_map)
        return controlnets.planned(control, maps, config, HERE)[1]

    again = sums(second, config | {"block_samples": sums(first, config)})
    assert again == sums(both, config)


def test_where_the_block_count_stays_the_stock_class_fits(made, tmp_path):
    """A variant that is only narrow, and one whose pruned list gets no samples."""
    place, model = saved(
        "flux", made, tmp_path / "stock", {"num_layers": 2, "num_single_layers": 0}
    )
    same = {"transformer_blocks": [[block] for block in range(DEPTH)]}
    kept = dataclasses.replace(model, block_maps=model.block_maps | same)
    assert not controlnets.remap(place, kept, tmp_path / "mine")
    assert not list((tmp_path / "mine").glob("*.py"))
    assert isinstance(
        AutoModel.from_pretrained(str(tmp_path / "mine")), diffusers.FluxControlNetModel
    )
    assert controlnets.remap(place, model, tmp_path / "other")


def test_a_narrow_variant_takes_it_as_it_is(tmp_path):
    folder = pruned.folder(tmp_path / "narrow", narrowed=pruned.NARROW)
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    stock = controlnet(CASES["qwen-image"], pipe.transformer, {"num_layers": 5})
    stock.save_pretrained(tmp_path / "stock")
    model = pruned_models.read(folder, "transformer")
    assert not controlnets.remap(tmp_path / "stock", model, tmp_path / "mine")
    mine = AutoModel.from_pretrained(str(tmp_path / "mine"))
    whole = diffusers.QwenImageControlNetPipeline(**pipe.components, controlnet=mine)
    whole.set_progress_bar_config(disable=True)
    settings = SPECIMENS["qwen-image"].settings
    teacher = DiffusionPipeline.from_pretrained(pruned.TEACHER)
    wide = diffusers.QwenImageControlNetPipeline(**teacher.components, controlnet=stock)
    wide.set_progress_bar_config(disable=True)
    seen = Seen(), Seen()
    for built, watched in zip((whole, wide), seen, strict=True):
        built.transformer.forward = watched.watching(built.transformer.forward)
        assert torch.isfinite(call(built, settings)).all()
    (mine_samples,), (theirs,) = (each.first.values() for each in seen)
    assert len(mine_samples) == len(theirs) == 5
    assert all(map(torch.equal, mine_samples, theirs))


def remapped_as(sums):
    return {"_class_name": "RemappedQwenImageControlNetModel", "block_samples": sums}


@pytest.mark.parametrize("change, message", [
    ({"_class_name": "FluxControlNetModel"}, "takes samples of a QwenImageControlNetModel"),
    ({"_class_name": "RemappedQwenImageControlNetModel"}, "takes samples of a QwenImageControlNet"),
    (remapped_as([[[0], [0], [1]]]), "remapped already, for a pruned model with 3 blocks or more"),
    (remapped_as([[[2]] * 6]), "block_samples are no sums of its samples"),
    (remapped_as([[[0]] * 6, []]), "block_samples are no sums of its samples"),
    (remapped_as("x"), "block_samples are no sums of its samples"),
    ({"_class_name": ["x"]}, "takes samples of a QwenImageControlNetModel"),
    ({"num_layers": "two"}, "num_layers is two"),
    ({"num_layers": -1}, "num_layers is -1"),
    ({"num_layers": True}, "num_layers is True"),
    ({"num_attention_heads": 3}, "48 channels wide, but the model's stream has 32"),
    ({"num_attention_heads": None}, "of another model"),
])  # fmt: skip
def test_another_model_s_controlnet_is_refused(change, message, made, tmp_path):
    place, model = saved("qwen-image", made, tmp_path / "stock", {"num_layers": 2})
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(UserError, match=re.escape(message)):
        controlnets.remap(place, model, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_weights_that_are_not_there_are_refused(made, tmp_path):
    place, model = saved("qwen-image", made, tmp_path / "stock", {"num_layers": 2})
    first, *_ = sorted(place.glob("*.safetensors"))
    content = first.read_bytes()
    first.write_bytes(content[:-1])
    with pytest.raises(UserError, match="truncated"):
        controlnets.remap(place, model, tmp_path / "mine")
    first.unlink()
    with pytest.raises(UserError, match="not there"):
        controlnets.remap(place, model, tmp_path / "mine")
    shutil.rmtree(place)
    with pytest.raises(UserError, match=r"has no config.json"):
        controlnets.remap(place, model, tmp_path / "mine")


def test_a_family_without_controlnets_is_refused_with_the_reason(made, tmp_path):
    place, model = saved("qwen-image", made, tmp_path / "stock", {"num_layers": 2})
    name = "WanTransformer3DModel"
    other = dataclasses.replace(model, name=name, family=FAMILIES[name])
    with pytest.raises(UserError, match="for which diffusers has no ControlNet"):
        controlnets.remap(place, other, tmp_path / "mine")


@pytest.mark.parametrize("name", FAMILIES)
def test_the_registry_knows_every_class_that_takes_samples(name):
    """By the arguments of its forward."""
    arguments = inspect.signature(getattr(diffusers, name).forward).parameters
    takes = any("controlnet" in argument for argument in arguments)
    control = FAMILIES[name].control
    assert takes == (control is not None)
    if control:
        known = inspect.signature(getattr(diffusers, control.model).__init__).parameters
        assert {key for key, _ in control.lists.values()} <= known.keys()
        assert control.lists.keys() == {each.attribute for each in FAMILIES[name].lists}


@pytest.mark.parametrize("value", [{}, [1], [[1]], [[["a"]]], [[[-1]]], [[[True]]]])
def test_a_strange_key_in_its_config_is_refused(value):
    kind = control_class.remapped(diffusers.QwenImageControlNetModel)
    with pytest.raises(ValueError, match="block_samples should list"):
        kind(**TINY, block_samples=value)
    assert kind(**TINY).config.block_samples is None


TINY = {
    "num_layers": 1,
    "num_attention_heads": 1,
    "attention_head_dim": 8,
    "axes_dims_rope": (2, 2, 4),
}


def test_the_program_writes_one_and_says_how_it_loads(made, tmp_path, capsys):
    place, _ = saved("qwen-image", made, tmp_path / "stock", {"num_layers": 2})
    folder = made("qwen-image")[3]
    paths = {"controlnet": place, "model": folder, "output": tmp_path / "mine"}
    run(paths)
    assert "trust_remote_code=True" in capsys.readouterr().out
    AutoModel.from_pretrained(str(tmp_path / "mine"), trust_remote_code=True)
    with pytest.raises(SystemExit):
        run(paths)
    assert "is there already" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(paths | {"output": tmp_path / "new", "component": "vae"})
    assert "has no vae" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def run(paths):
    words = [word for key, path in paths.items() for word in (f"--{key}", str(path))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["remap_controlnet", *words])
        runpy.run_path(str(SCRIPTS / "remap_controlnet.py"), run_name="__main__")


def test_samples_that_are_the_sum_of_none_are_zeros_in_a_list_and_left_out_by_number():
    samples = [torch.ones(1, 2, 3), torch.full((1, 2, 3), 2.0)]
    made = control_class.summed(samples, [[0, 1, 1], [], [1]])
    assert [float(each.mean()) for each in made] == [5.0, 0.0, 2.0]
    assert made[1].shape == samples[0].shape
    by_number = control_class.summed(dict(enumerate(samples)), [[], [0]])
    assert by_number.keys() == {1} and by_number[1] is samples[0]
