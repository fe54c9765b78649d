"""How long prompts are to a pipeline: which may share a batch, and which are cut."""

import logging
from types import SimpleNamespace

import pytest
import torch

from ppcl.errors import UserError
from ppcl.teacher import pipelines, prompt_tokens
from support import tiny, zoo_images


@pytest.fixture(scope="module")
def flux():
    """CLIP's tokenizer takes 16 tokens here, for a summary alone; T5's as many as are asked for."""
    pipe = zoo_images.SPECIMENS["flux"].make(2)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def qwen(tiny_teacher):
    return tiny.load(tiny_teacher)


class Words:
    """A tokenizer of words, and what it was asked."""

    model_max_length = 9

    def __call__(self, text=None, verbose=True):
        assert isinstance(text, str) and not verbose
        return {"input_ids": text.split()}


class Positional:
    def __call__(self, sentence):
        return {"input_ids": torch.zeros(1, len(sentence.split()) + 1)}


class Processor:
    """Its first argument is a picture."""

    tokenizer = Words()

    def __call__(self, images=None, text=None):
        raise AssertionError("takes the prompt for a picture")


@pytest.mark.parametrize(("reader", "tokens"), [(Words(), 3), (Positional(), 4), (Processor(), 3)])
def test_prompts_are_measured_as_text(reader, tokens):
    assert prompt_tokens.count(reader, "one red cat") == tokens


def test_published_kinds_of_tokenizers_are_measured(flux):
    for reader in (flux.tokenizer, flux.tokenizer_2):
        given = reader("a red 1").input_ids
        assert prompt_tokens.count(reader, "a red 1") == len(given)


def batches(pipe, prompts, size=8) -> list[list[str]]:
    items = [{"sample": number, "prompt": prompt} for number, prompt in enumerate(prompts)]
    return [[i["prompt"] for i in batch] for batch in pipelines.in_batches(pipe, items, size)]


PROMPTS = ["a red 1", "red", "a blue 2", "blue"]


def test_prompts_of_one_length_share_a_batch_where_padding_follows_them(qwen):
    assert batches(qwen, PROMPTS) == [["red", "blue"], ["a red 1", "a blue 2"]]


def test_lengths_do_not_matter_where_all_prompts_are_padded_alike(flux):
    assert batches(flux, PROMPTS) == [PROMPTS]
    assert batches(flux, PROMPTS, 3) == [PROMPTS[:3], PROMPTS[3:]]


def test_every_tokenizer_counts_where_the_class_is_not_known():
    one, other = Words(), Positional()
    pipe = SimpleNamespace(components={"tokenizer": one, "tokenizer_2": other, "vae": object()})
    assert prompt_tokens.lengths(pipe, ["a b", "c"]) == {"a b": (2, 3), "c": (1, 2)}
    pipe = SimpleNamespace(components={"tokenizer": None, "vae": object()})
    assert prompt_tokens.lengths(pipe, ["a b", "c"]) == {"a b": (3,), "c": (1,)}


# ---- prompts that are cut


def heard(pipe, prompt: str, settings: dict) -> list[torch.Tensor]:
    """The text that the transformer gets, from a call that ends there."""
    texts = []

    def hook(_module, _args, given):
        text = given["encoder_hidden_states"] if "cap_feats" not in given else given["cap_feats"]
        texts.extend(text)
        raise KeyboardInterrupt

    handle = pipe.transformer.register_forward_pre_hook(hook, with_kwargs=True)
    with pytest.raises(KeyboardInterrupt):
        pipelines.run(pipe, [prompt], [0], settings, output_type="latent")
    handle.remove()
    return texts


@pytest.mark.parametrize("name", ["flux", "qwen", "sd3"])
def test_the_first_prompt_that_is_called_cut_loses_its_last_word(name, request):
    settings = {"height": 16, "width": 16, "num_inference_steps": 1, "max_sequence_length": 12}
    if name == "sd3":
        pipe = zoo_images.SPECIMENS["sd3"].make(2)
    else:
        pipe = request.getfixturevalue(name)
    if name == "qwen":
        settings |= {"height": 32, "width": 32, "max_sequence_length": 40}
    words = ["red"] * 60
    cut = [bool(prompt_tokens.cut(pipe, [" ".join(words[:n])], settings)) for n in range(1, 60)]
    first = cut.index(True) + 1
    assert 6 < first < 42 and cut == [n >= first for n in range(1, 60)]
    for n, alike in ((first - 1, False), (first, True)):
        a, b = (heard(pipe, " ".join([*words[: n - 1], w]), settings) for w in ("red", "blue"))
        same = all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert same == alike


def test_a_prompt_that_is_cut_is_said_once_with_the_count(flux, caplog):
    long = "a red 1 on blue and a cat with a dog of green"
    settings = {"max_sequence_length": 12}
    assert prompt_tokens.cut(flux, ["a red 1", long], settings) == {long: 14}
    prompt_tokens.warn_of_cut(flux, ["a red 1", long, long], settings, "record.prompts")
    (record,) = caplog.records
    assert "record.prompts: 1 of 2 prompts are longer than the 12 tokens" in record.getMessage()
    assert long in record.getMessage() and "pipeline.max_sequence_length" in record.getMessage()


def test_what_only_a_summary_of_the_prompt_loses_is_not_said(flux, caplog):
    prompt = "red " * 19 + "cat"  # too long for CLIP alone
    assert len(flux.tokenizer(prompt).input_ids) > flux.tokenizer.model_max_length
    settings = {"height": 16, "width": 16, "num_inference_steps": 1, "max_sequence_length": 32}
    with caplog.at_level(logging.WARNING):
        prompt_tokens.warn_of_cut(flux, [prompt], settings, "record.prompts")
        pipelines.run(flux, [prompt], [0], settings, output_type="latent")
    assert not [r for r in caplog.records if "truncated" in r.getMessage() or "long" in r.msg]


def test_a_text_of_the_settings_is_measured_in_place_of_the_prompt(flux):
    settings = {"max_sequence_length": 12, "prompt_2": "red"}
    assert not prompt_tokens.cut(flux, ["red " * 20], settings)


# ---- what a pipeline refuses


def test_what_the_pipeline_itself_refuses_names_the_section(qwen):
    settings = {**tiny.SETTINGS, "max_sequence_length": 2000}
    with pytest.raises(UserError, match="section 'pipeline': QwenImagePipeline .*than 1024"):
        pipelines.run(qwen, ["red"], [0], settings, output_type="latent")
    settings = {**tiny.SETTINGS, "sigmas": [1.0, 0.5], "num_inference_steps": 2}

    class Plain(type(qwen.scheduler)):
        def set_timesteps(self, num_inference_steps=None, device=None, mu=None):
            raise AssertionError

    whole = qwen.scheduler
    qwen.scheduler = Plain.from_config(whole.config)
    try:
        with pytest.raises(UserError, match="does not support custom"):
            pipelines.run(qwen, ["red"], [0], settings, output_type="latent")
    finally:
        qwen.scheduler = whole


@pytest.mark.parametrize("kind", [TypeError, ValueError, AttributeError])
def test_what_goes_wrong_in_a_model_keeps_its_traceback(qwen, kind, monkeypatch):
    def broken(*_args, **_given):
        raise kind("a bug")

    monkeypatch.setattr(qwen.transformer, "forward", broken)
    with pytest.raises(kind, match="a bug"):
        pipelines.run(qwen, ["red"], [0], tiny.SETTINGS, output_type="latent")


def test_texts_of_the_settings_reach_every_prompt_of_a_batch(flux):
    settings = {
        "height": 16,
        "width": 16,
        "num_inference_steps": 1,
        "max_sequence_length": 12,
        "true_cfg_scale": 2.0,
        "prompt_2": "a cat",
        "negative_prompt": "dog",
        "negative_prompt_2": "a dog",
    }
    both = pipelines.run(flux, ["red", "a blue 2"], [0, 1], settings, output_type="latent").images
    for number, prompt in enumerate(["red", "a blue 2"]):
        one = pipelines.run(flux, [prompt], [number], settings, output_type="latent").images
        torch.testing.assert_close(both[number : number + 1], one, rtol=1e-4, atol=1e-4)
