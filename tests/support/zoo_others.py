"""Further pipelines of the supported classes, for the parts that they are published with: see
`zoo`. They share their transformers' classes with specimens that go through every stage."""

import diffusers
from diffusers import DiffusionPipeline
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import (
    DEFAULT_PROMPT_TEMPLATE,
)
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from support import zoo_images, zoo_videos
from support import zoo_parts as parts
from support.zoo import Specimen

EYES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 1,
}


def _like(base: Specimen, depth: int, name: str, **other) -> DiffusionPipeline:
    """A pipeline of diffusers' class `name`, of another one's components but for those given."""
    return getattr(diffusers, name)(**(base.make(depth).components | other))


def _klein(depth: int) -> DiffusionPipeline:
    tokenizer = parts.qwen_tokenizer()
    base, encoder = zoo_images.SPECIMENS["flux2"], parts.qwen3(tokenizer)
    return _like(base, depth, "Flux2KleinPipeline", tokenizer=tokenizer, text_encoder=encoder)


def _edit_plus(depth: int) -> DiffusionPipeline:
    return _like(zoo_images.SPECIMENS["qwen-image-edit"], depth, "QwenImageEditPlusPipeline")


def _wan_picture(depth: int) -> DiffusionPipeline:
    pixels = CLIPVisionConfig(**EYES, image_size=28, patch_size=14)
    return _like(
        zoo_videos.SPECIMENS["wan"],
        depth,
        "WanImageToVideoPipeline",
        image_encoder=parts.seeded(CLIPVisionModel, pixels),
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28),
        transformer=zoo_videos._transformer(
            "WanTransformer3DModel",
            **zoo_videos.HEADS,
            in_channels=2 * zoo_videos.Z + 2,
            out_channels=zoo_videos.Z,
            text_dim=parts.WIDTH,
            freq_dim=32,
            ffn_dim=64,
            num_layers=depth,
            rope_max_seq_len=32,
            image_dim=EYES["hidden_size"],
            added_kv_proj_dim=32,
        ),
    )


def _hunyuan_picture(depth: int) -> DiffusionPipeline:
    llama = parts.llama_tokenizer(
        DEFAULT_PROMPT_TEMPLATE["template"],
        markers=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<image>"),
    )
    size = 336  # the template has places for 24 x 24 patches
    text = parts.llama(llama, layers=3).config
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**EYES, image_size=size, patch_size=14),
        text_config=text,
        image_token_index=llama.convert_tokens_to_ids("<image>"),
        pad_token_id=llama.pad_token_id,
    )
    return _like(
        zoo_videos.SPECIMENS["hunyuan-video"],
        depth,
        "HunyuanVideoImageToVideoPipeline",
        tokenizer=llama,
        text_encoder=parts.seeded(LlavaForConditionalGeneration, config),
        image_processor=CLIPImageProcessor(size={"shortest_edge": size}, crop_size=size),
        transformer=zoo_videos._transformer(
            "HunyuanVideoTransformer3DModel",
            **zoo_videos.HEADS,
            in_channels=2 * zoo_videos.Z + 1,
            out_channels=zoo_videos.Z,
            num_layers=depth,
            num_single_layers=depth,
            num_refiner_layers=1,
            text_embed_dim=parts.WIDTH,
            pooled_projection_dim=parts.WIDTH,
            rope_axes_dim=(4, 6, 6),
            image_condition_type="latent_concat",
        ),
    )


SPECIMENS: dict[str, Specimen] = {
    "flux2-klein": Specimen(
        "Flux2Transformer2DModel", _klein, zoo_images.SPECIMENS["flux2"].settings
    ),
    "qwen-image-edit-plus": Specimen(
        "QwenImageTransformer2DModel",
        _edit_plus,
        zoo_images.SPECIMENS["qwen-image-edit"].settings,
        image=True,
    ),
    "wan-picture": Specimen(
        "WanTransformer3DModel",
        _wan_picture,
        zoo_videos.SPECIMENS["wan"].settings | {"num_frames": 5},  # its autoencoder reads 1, then 4
        image=True,
    ),
    "hunyuan-video-picture": Specimen(
        "HunyuanVideoTransformer3DModel",
        _hunyuan_picture,
        zoo_videos.SPECIMENS["hunyuan-video"].settings,
        image=True,
    ),
}
