"""The parts that models of the supported classes are published with: tokenizers, processors,
encoders, and what of it the tiny pipelines are made of."""

import json
import logging
from pathlib import Path

import diffusers
import pytest
import torch
import transformers
from diffusers import DiffusionPipeline
from PIL import Image

from ppcl.configuration import preflight
from ppcl.errors import UserError
from ppcl.planning import weightless
from ppcl.teacher import needed, pipelines, prompt_tokens, signatures
from ppcl.transformer import families
from support import tiny, zoo_images, zoo_others, zoo_parts, zoo_videos

CPU = torch.device("cpu")
ZOO = zoo_images.SPECIMENS | zoo_videos.SPECIMENS | zoo_others.SPECIMENS
SUPPORTED = {name: one for name, one in ZOO.items() if one.family in families.FAMILIES}
CLIP = {"text_encoder": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}
CLIPS = {
    "text_encoder": "CLIPTextModelWithProjection",
    "tokenizer": "CLIPTokenizer",
    "text_encoder_2": "CLIPTextModelWithProjection",
    "tokenizer_2": "CLIPTokenizer",
}
T5 = {"text_encoder": "T5EncoderModel", "tokenizer": "T5Tokenizer"}
UMT5 = {"text_encoder": "UMT5EncoderModel", "tokenizer": "T5TokenizerFast"}
GEMMA = {"text_encoder": "Gemma2Model", "tokenizer": "GemmaTokenizerFast"}
QWEN = {"text_encoder": "Qwen2_5_VLForConditionalGeneration", "tokenizer": "Qwen2Tokenizer"}
EDIT = QWEN | {"processor": "Qwen2VLProcessor"}
# What model_index.json of the published models names, by their pipelines: all of transformers.
PUBLISHED = {
    "QwenImagePipeline": QWEN,
    "QwenImageEditPipeline": EDIT,
    "QwenImageEditPlusPipeline": EDIT,
    "FluxPipeline": CLIP | {"text_encoder_2": "T5EncoderModel", "tokenizer_2": "T5TokenizerFast"},
    "Flux2Pipeline": {
        "text_encoder": "Mistral3ForConditionalGeneration",
        "tokenizer": "PixtralProcessor",
    },
    "Flux2KleinPipeline": {"text_encoder": "Qwen3ForCausalLM", "tokenizer": "Qwen2TokenizerFast"},
    "StableDiffusion3Pipeline": CLIPS
    | {"text_encoder_3": "T5EncoderModel", "tokenizer_3": "T5TokenizerFast"},
    "PixArtSigmaPipeline": T5,
    "SanaPipeline": GEMMA,
    "Lumina2Pipeline": GEMMA,
    "ZImagePipeline": {"text_encoder": "Qwen3Model", "tokenizer": "Qwen2Tokenizer"},
    "HunyuanImagePipeline": QWEN
    | {"text_encoder_2": "T5EncoderModel", "tokenizer_2": "ByT5Tokenizer"},
    # Llama comes from elsewhere: the published index leaves it out.
    "HiDreamImagePipeline": CLIPS
    | {
        "text_encoder_3": "T5EncoderModel",
        "tokenizer_3": "T5Tokenizer",
        "text_encoder_4": "LlamaForCausalLM",
        "tokenizer_4": "PreTrainedTokenizerFast",
    },
    "WanPipeline": UMT5,
    "WanImageToVideoPipeline": UMT5
    | {"image_encoder": "CLIPVisionModel", "image_processor": "CLIPImageProcessor"},
    "HunyuanVideoPipeline": {
        "text_encoder": "LlamaModel",
        "tokenizer": "LlamaTokenizerFast",
        "text_encoder_2": "CLIPTextModel",
        "tokenizer_2": "CLIPTokenizer",
    },
    "HunyuanVideoImageToVideoPipeline": {
        "text_encoder": "LlavaForConditionalGeneration",
        "tokenizer": "LlamaTokenizerFast",
        "text_encoder_2": "CLIPTextModel",
        "tokenizer_2": "CLIPTokenizer",
        "image_processor": "CLIPImageProcessor",
    },
    "LTXPipeline": T5,
    "CogVideoXPipeline": T5,
    "MochiPipeline": T5,
}
# Published class -> what stands for it here, and why.
STAND_INS = {
    "PixtralProcessor": ("LlavaProcessor", "torchvision"),
    "Qwen2VLProcessor": ("PaddleOCRVLProcessor", "torchvision, for videos"),
    "LlamaTokenizerFast": ("TokenizersBackend", "what prompt_tokens.as_published makes of it"),
}


@pytest.fixture(scope="module", params=SUPPORTED)
def made(request):
    pipe = SUPPORTED[request.param].make(2)
    pipe.set_progress_bar_config(disable=True)
    return request.param, pipe


def test_specimens_are_made_of_published_parts(made):
    _, pipe = made
    classes = {
        name: type(part)
        for name, part in pipe.components.items()
        if type(part).__module__.startswith("transformers.")
    }
    published = PUBLISHED[type(pipe).__name__]
    assert list(classes) == sorted(published, key=list(classes).index)
    for name, wanted in published.items():
        wanted = STAND_INS.get(wanted, (wanted, ""))[0]
        assert classes[name] is getattr(transformers, wanted), name


def test_specimens_work_with_prompts_of_any_number(made, tmp_path):
    """Batches are made, and run, and none of their prompts gets what is another's; no prompt of a
    few words is called cut."""
    name, pipe = made
    one = SUPPORTED[name]
    if type(pipe).__name__ == "WanImageToVideoPipeline":
        pytest.importorskip("ftfy")
    Image.new("RGB", (64, 64), (90, 9, 9)).save(tmp_path / "a.png")
    image = {"image": str(tmp_path / "a.png")} if one.image else {}
    prompts = ["a red 1", "a blue 2 on red", "a red 3"]
    items = [{"sample": n, "prompt": p} | image for n, p in enumerate(prompts)]
    batches = pipelines.in_batches(pipe, items, 2)
    assert sorted(item["sample"] for batch in batches for item in batch) == [0, 1, 2]
    assert not prompt_tokens.cut(pipe, prompts, one.settings)
    batch = max(batches, key=len)
    together = latents(pipe, one, batch)
    assert torch.isfinite(together).all() and len(together) == len(batch)
    if len(batch) > 1:
        alone = latents(pipe, one, batch[:1])
        torch.testing.assert_close(together[:1], alone, rtol=1e-4, atol=1e-4)


def latents(pipe, one, batch: list[dict]) -> torch.Tensor:
    prompts, seeds, images = ([i.get(k) for i in batch] for k in ("prompt", "sample", "image"))
    settings = one.settings | {"num_inference_steps": 2}
    return pipelines.run(pipe, prompts, seeds, settings, images, output_type="latent")[0]


def test_prompts_that_another_guider_serves_are_apart():
    """HunyuanImage guides a batch otherwise if one of its prompts has words in quotes."""
    one = SUPPORTED["hunyuan-image"]
    pipe = one.make(2)
    pipe.set_progress_bar_config(disable=True)
    quoted, words = 'a "red" 1', ["red"]
    count = prompt_tokens.count(pipe.tokenizer, quoted)
    while prompt_tokens.count(pipe.tokenizer, " ".join(words)) < count:
        words.append("red")
    items = [{"sample": n, "prompt": p} for n, p in enumerate([quoted, " ".join(words)])]
    assert len({prompt_tokens.count(pipe.tokenizer, item["prompt"]) for item in items}) == 1
    assert [len(batch) for batch in pipelines.in_batches(pipe, items, 2)] == [1, 1]
    together, alone = latents(pipe, one, items), latents(pipe, one, items[1:])
    assert (together[1:] - alone).abs().max() > 1e-3  # else they need not be


@pytest.mark.parametrize("made_as", [k for k, (_, why) in STAND_INS.items() if "vision" in why])
def test_what_needs_torchvision_says_so_before_anything_is_loaded(made_as, tmp_path):
    if needed._installed("torchvision"):
        pytest.skip("torchvision is here")
    (tmp_path / "model_index.json").write_text('{"_class_name": "Flux2Pipeline"}')
    with pytest.raises(UserError, match=f"processor is a {made_as}, .* without torchvision; inst"):
        needed.refuse_missing(tmp_path, {"processor": ("transformers", made_as)}, "teacher.path")


def test_a_model_of_sentencepiece_alone_needs_two_packages(tmp_path, monkeypatch):
    monkeypatch.setattr(needed, "_installed", lambda package: False)
    parts = {"tokenizer": ("transformers", "T5Tokenizer")}
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "LTXPipeline"}')
    needed.refuse_missing(tmp_path, parts, "teacher.path")
    (tmp_path / "tokenizer" / "spiece.model").touch()
    with pytest.raises(UserError, match="T5Tokenizer, which .* without sentencepiece and protobuf"):
        needed.refuse_missing(tmp_path, parts, "teacher.path")
    (tmp_path / "tokenizer" / "tokenizer.json").touch()
    needed.refuse_missing(tmp_path, parts, "teacher.path")


def test_a_model_of_sentencepiece_alone_is_read(tmp_path):
    """As PixArt, LTX, CogVideoX and Mochi publish T5's tokenizer; an export does without."""
    trainer = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    pipe = zoo_images.SPECIMENS["pixart-sigma"].make(1)
    pipe.save_pretrained(tmp_path / "teacher")
    part = tmp_path / "teacher" / "tokenizer"
    (part / "tokenizer.json").unlink()
    trainer.SentencePieceTrainer.train(
        sentence_iterator=iter([zoo_parts.WORDS] * 8),
        model_prefix=str(part / "spiece"),
        vocab_size=60,
        hard_vocab_limit=False,
        minloglevel=2,
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
    )
    own = trainer.SentencePieceProcessor(model_file=str(part / "spiece.model"))
    text = "a red 1 on blue, and a cat"
    wanted = [*own.encode(text), own.eos_id()]
    loaded = pipelines.load(tiny.source(tmp_path / "teacher"), CPU)
    assert loaded.tokenizer(text, truncation=False).input_ids == wanted
    loaded.save_pretrained(tmp_path / "exported")
    assert (tmp_path / "exported" / "tokenizer" / "tokenizer.json").is_file()


def test_a_pipeline_that_needs_a_package_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(needed, "_installed", lambda package: False)
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanImageToVideoPipeline"}')
    with pytest.raises(UserError, match="mine.yaml: .* can't work without ftfy; install it"):
        needed.refuse_missing(tmp_path, {}, "mine.yaml")


def edited(file: Path, **values) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_tokens_are_those_of_the_tokenizers_file(tmp_path, caplog):
    """HunyuanVideo's index names a class that makes its tokenizer anew, without its spaces."""
    pipe = zoo_videos.SPECIMENS["hunyuan-video"].make(1)
    pipe.save_pretrained(tmp_path / "teacher")
    edited(
        tmp_path / "teacher" / "model_index.json",
        tokenizer=["transformers", "LlamaTokenizerFast"],
    )
    text = "a red 1 on blue"
    wanted = pipe.tokenizer(text).input_ids
    stock = DiffusionPipeline.from_pretrained(tmp_path / "teacher")
    assert stock.tokenizer(text).input_ids != wanted  # else as_published can go
    with caplog.at_level(logging.WARNING):
        ours = pipelines.load(tiny.source(tmp_path / "teacher"), CPU)
    assert "tokenizer: transformers' LlamaTokenizer makes other tokens" in caplog.text
    assert ours.tokenizer(text).input_ids == wanted
    assert ours.tokenizer.padding_side == stock.tokenizer.padding_side
    ours.save_pretrained(tmp_path / "exported")
    again = DiffusionPipeline.from_pretrained(tmp_path / "exported")
    assert again.tokenizer(text).input_ids == wanted


def test_tokenizers_that_do_what_their_file_says_stay(tmp_path):
    for name in ("flux2", "lumina2", "sd3", "hunyuan-image"):
        pipe = ZOO[name].make(1)
        parts = {k: v for k, v in pipe.components.items() if "token" in k}
        for part, tokenizer in parts.items():
            tokenizer.save_pretrained(tmp_path / name / part)
        prompt_tokens.as_published(pipe, tmp_path / name)
        assert all(getattr(pipe, part) is tokenizer for part, tokenizer in parts.items())


def test_a_class_by_the_name_that_published_indexes_have(tmp_path):
    """PixArt's index and config are older than the class."""
    pipe = zoo_images.SPECIMENS["pixart-sigma"].make(2)
    pipe.save_pretrained(tmp_path)
    edited(tmp_path / "model_index.json", transformer=["diffusers", "Transformer2DModel"])
    edited(tmp_path / "transformer" / "config.json", _class_name="Transformer2DModel")
    teacher = tiny.source(tmp_path)
    preflight._check_teacher(teacher, "mine.yaml")
    whole = pipelines.load(teacher, CPU)
    for transformer in (whole.transformer, pipelines.load_transformer(teacher, CPU)):
        assert type(transformer) is diffusers.PixArtTransformer2DModel
        for a, b in zip(transformer.parameters(), pipe.transformer.parameters(), strict=True):
            assert torch.equal(a, b)
    config, where = weightless.architecture(teacher, None)
    transformer = weightless.on_meta(config, torch.float32, where)
    assert type(transformer) is diffusers.PixArtTransformer2DModel
    edited(tmp_path / "transformer" / "config.json", norm_type="layer_norm")
    with pytest.raises(UserError, match="Transformer2DModel, which can't be pruned"):
        preflight._check_teacher(teacher, "mine.yaml")


def test_components_that_are_published_elsewhere_are_asked_for(tmp_path):
    zoo_images.SPECIMENS["hidream"].make(1).save_pretrained(tmp_path)
    edited(tmp_path / "model_index.json", text_encoder_4=[None, None], tokenizer_4=[None, None])
    with pytest.raises(UserError, match=r"names no text_encoder_4 and no tokenizer_4, .*save it"):
        pipelines.load(tiny.source(tmp_path), CPU)


def test_every_specimen_has_what_its_class_asks_for(made):
    _, pipe = made
    wanted = signatures.components(type(pipe).__name__)
    assert "transformer" in wanted or "Wan" in type(pipe).__name__  # which has one or two
    assert set(wanted) <= {name for name, part in pipe.components.items() if part is not None}
