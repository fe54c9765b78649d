"""What a family's `Pipeline` says, against the stock pipeline that it speaks of."""

import inspect

import pytest
import torch

from ppcl.transformer import example_calls, families
from support import zoo_images, zoo_videos

ZOO = zoo_images.SPECIMENS | zoo_videos.SPECIMENS
SPECIMENS = {
    name: next(one for one in ZOO.values() if one.family == name)
    for name, family in families.FAMILIES.items()
    if family.pipeline
}
STEPS, PROMPTS = 2, ["a seven", "a red one"]


@pytest.fixture(scope="module", params=sorted(SPECIMENS))
def stock(request):
    """(the family's Pipeline, its tiny stock pipeline, settings of a call without guidance)."""
    specimen = SPECIMENS[request.param]
    known = families.FAMILIES[request.param].pipeline
    plain = {k: v for k, v in specimen.settings.items() if k != "negative_prompt"}
    plain.pop(known.guidance[0], None)
    return known, specimen.make(2), plain


def test_defaults_are_those_of_its_call(stock):
    known, pipeline, _ = stock
    said = {
        name: one.default for name, one in inspect.signature(pipeline.__call__).parameters.items()
    }
    name, usual = known.guidance
    assert said[name] == usual
    assert said["num_inference_steps"] == known.steps
    assert said["max_sequence_length"] == known.size.text_tokens
    assert said.get("num_frames", 1) == known.size.frames
    # Where the call leaves the size to the pipeline, it is so many latents of 8 pixels: a number of
    # the pipeline's own, or of its transformer's config, whose default is that of published ones.
    built = inspect.signature(type(pipeline.transformer).__init__).parameters
    if "sample_size" in built:
        latents = built["sample_size"].default
    else:
        latents = getattr(pipeline, "default_sample_size", None)
    for side in ("height", "width"):
        pixels = said[side] or latents * 8
        assert pixels == getattr(known.size, side), side


@pytest.mark.parametrize("negative", [None, "blue"])
@pytest.mark.parametrize("scale", [None, 1.0, 3.0])
def test_branches_are_those_that_it_runs(stock, negative, scale):
    known, pipeline, plain = stock
    asked = {known.guidance[0]: scale, "negative_prompt": negative}
    asked = {name: value for name, value in asked.items() if value is not None}
    batches = []
    hook = pipeline.transformer.register_forward_pre_hook(
        lambda _, arguments, named: batches.append(len((*arguments, *named.values())[0])),
        with_kwargs=True,
    )
    settings = plain | asked | {"num_inference_steps": STEPS, "output_type": "latent"}
    if negative is not None:
        settings["negative_prompt"] = [negative] * len(PROMPTS)
    pipeline.set_progress_bar_config(disable=True)
    try:
        pipeline(PROMPTS, generator=torch.Generator().manual_seed(0), **settings)
    finally:
        hook.remove()
    both = example_calls.guided(known, asked)
    one_call = len(PROMPTS) * (2 if both and known.joined else 1)
    assert batches == [one_call] * STEPS * (2 if both and not known.joined else 1)
