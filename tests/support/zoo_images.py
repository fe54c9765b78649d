"""Tiny image pipelines of the supported families: see `zoo`.

Prompts are encoded to few tokens and pictures to at least 16, except where the pipeline fixes the
number itself (Z-Image pads to multiples of 32, HunyuanImage always reads 1,128 text tokens).
Qwen-Image-Edit takes one prompt and its picture per call, as `pipelines.run` gives them.
"""

from functools import partial

import diffusers
import torch
from diffusers import (
    AutoencoderDC,
    AutoencoderKLFlux2,
    AutoencoderKLHunyuanImage,
    AutoencoderKLQwenImage,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.guiders import AdaptiveProjectedMixGuidance
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from transformers import (
    ByT5Tokenizer,
    LlavaProcessor,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PaddleOCRVLProcessor,
    PixtralImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ppcl.digits import teacher
from support import zoo_parts as parts
from support.zoo import Specimen

Z = 4  # latent channels
EDIT_TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, "
    "texture, objects, background), then explain how the user's text instruction should alter or "
    "modify the image. Generate a new image that meets the user's requirements while maintaining "
    "consistency with the original input where appropriate.<|im_end|>\n<|im_start|>user\n"
    "<|vision_start|><|image_pad|><|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"
)
LUMINA_PROMPT = (
    "You are an assistant designed to generate superior images with the superior degree of "
    "image-text alignment based on textual prompts or user prompts. <Prompt Start>"
)


def _moved(name: str, **shape) -> torch.nn.Module:
    """A frozen transformer of diffusers' class `name`; no gate or modulation of it is zero."""
    torch.manual_seed(0)
    return parts.freeze(getattr(diffusers, name)(**shape), moved=0.05)


def _seeded(kind: type, **shape) -> torch.nn.Module:
    """A frozen model of diffusers."""
    torch.manual_seed(0)
    return parts.freeze(kind(**shape))


def _flow() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=1.0)


def _qwen_image(depth: int, edit: bool = False) -> DiffusionPipeline:
    name = "QwenImageEditPipeline" if edit else "QwenImagePipeline"
    more, ids = {}, {}
    if edit:
        tokenizer = parts.qwen_tokenizer(
            EDIT_TEMPLATE,
            markers=("<|vision_start|>", "<|vision_end|>"),
            image_token="<|image_pad|>",
        )
        # Qwen2VLProcessor insists on a video processor, which needs torchvision; this one reads
        # pictures in just the same way.
        reader = Qwen2VLImageProcessorPil(min_pixels=56**2, max_pixels=56**2)
        more["processor"] = PaddleOCRVLProcessor(reader, tokenizer)
        ids = {
            "image_token_id": tokenizer.image_token_id,
            "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        }
    else:
        tokenizer = parts.qwen_tokenizer(teacher.TEMPLATE)
    # The edit pipeline always reads its picture at a megapixel: 8 x 8 tokens need a factor of 64.
    factors = 6 if edit else 2
    vae = _seeded(
        AutoencoderKLQwenImage,
        base_dim=2 if edit else 4,
        z_dim=Z,
        dim_mult=[1] * (factors + 1),
        num_res_blocks=0 if edit else 1,
        temperal_downsample=[False] * factors,
        latents_mean=[0.0] * Z,
        latents_std=[1.0] * Z,
    )
    return getattr(diffusers, name)(
        scheduler=_flow(),
        vae=vae,
        text_encoder=parts.qwen_vl(tokenizer, **ids),
        tokenizer=tokenizer,
        transformer=_moved(
            "QwenImageTransformer2DModel",
            in_channels=4 * Z,
            out_channels=Z,
            num_layers=depth,
            num_attention_heads=2,
            attention_head_dim=16,
            axes_dims_rope=(4, 6, 6),
            joint_attention_dim=parts.WIDTH,
        ),
        **more,
    )


def _flux(depth: int, lite: bool = False) -> DiffusionPipeline:
    clip, t5 = parts.clip_tokenizer(), parts.t5_tokenizer()
    return diffusers.FluxPipeline(
        scheduler=_flow(),
        vae=parts.vae(Z, shift_factor=0.1),
        text_encoder=parts.clip(clip),
        tokenizer=clip,
        text_encoder_2=parts.t5(t5),
        tokenizer_2=t5,
        transformer=_moved(
            "FluxTransformer2DModel",
            in_channels=4 * Z,
            num_layers=max(2, depth // 2) if lite else depth,
            num_single_layers=depth,
            num_attention_heads=2,
            attention_head_dim=16,
            axes_dims_rope=(4, 6, 6),
            joint_attention_dim=parts.WIDTH,
            pooled_projection_dim=parts.WIDTH,
            guidance_embeds=True,
        ),
    )


def _flux2(depth: int) -> DiffusionPipeline:
    tokenizer = parts.llama_tokenizer(SYSTEM_MESSAGE, markers=(*parts.MARKERS[1:], "<image>"))
    # PixtralProcessor needs torchvision; this one has the same call, and reads pictures with its
    # image processor. Its template, not its tokenizer, begins the text.
    processor = LlavaProcessor(
        PixtralImageProcessorPil(),
        tokenizer,
        patch_size=14,
        chat_template="{{ bos_token }}" + parts.CHAT_TEMPLATE,
    )
    text = {
        "model_type": "mistral",
        "vocab_size": len(tokenizer),
        "hidden_size": parts.WIDTH,
        "intermediate_size": parts.WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "sliding_window": None,
    }
    eyes = {
        "model_type": "pixtral",
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Mistral3Config(text_config=text, vision_config=eyes, image_token_index=0)
    return diffusers.Flux2Pipeline(
        scheduler=_flow(),
        vae=_seeded(
            AutoencoderKLFlux2,
            latent_channels=Z,
            block_out_channels=(8, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            norm_num_groups=2,
            mid_block_add_attention=False,
        ),
        text_encoder=parts.seeded(Mistral3ForConditionalGeneration, config),
        tokenizer=processor,
        transformer=_moved(
            "Flux2Transformer2DModel",
            in_channels=4 * Z,
            num_layers=depth,
            num_single_layers=depth,
            num_attention_heads=2,
            attention_head_dim=16,
            axes_dims_rope=(4, 4, 4, 4),
            joint_attention_dim=2 * parts.WIDTH,
            timestep_guidance_channels=16,
        ),
    )


def _sd3(depth: int) -> DiffusionPipeline:
    clip, t5, half = parts.clip_tokenizer(8), parts.t5_tokenizer(), parts.WIDTH // 2
    return diffusers.StableDiffusion3Pipeline(
        scheduler=_flow(),
        vae=parts.vae(Z, shift_factor=0.1),
        text_encoder=parts.clip(clip, projection=True, width=half),
        tokenizer=clip,
        text_encoder_2=parts.clip(clip, projection=True, width=half, seed=1),
        tokenizer_2=clip,
        text_encoder_3=parts.t5(t5),
        tokenizer_3=t5,
        transformer=_moved(
            "SD3Transformer2DModel",
            sample_size=8,
            in_channels=Z,
            out_channels=Z,
            num_layers=depth,
            num_attention_heads=2,
            attention_head_dim=8,
            joint_attention_dim=parts.WIDTH,
            caption_projection_dim=16,
            pooled_projection_dim=parts.WIDTH,
            pos_embed_max_size=8,
            dual_attention_layers=(0, 1),
            qk_norm="rms_norm",
        ),
    )


def _chroma(depth: int) -> DiffusionPipeline:
    tokenizer = parts.t5_tokenizer()
    return diffusers.ChromaPipeline(
        scheduler=_flow(),
        vae=parts.vae(Z, shift_factor=0.1),
        text_encoder=parts.t5(tokenizer),
        tokenizer=tokenizer,
        transformer=_moved(
            "ChromaTransformer2DModel",
            in_channels=4 * Z,
            num_layers=depth,
            num_single_layers=depth,
            num_attention_heads=2,
            attention_head_dim=16,
            axes_dims_rope=(4, 6, 6),
            joint_attention_dim=parts.WIDTH,
            approximator_hidden_dim=32,
            approximator_layers=2,
        ),
    )


def _pixart_sigma(depth: int) -> DiffusionPipeline:
    tokenizer = parts.t5_tokenizer()
    return diffusers.PixArtSigmaPipeline(
        scheduler=DPMSolverMultistepScheduler(beta_schedule="linear", beta_end=0.02),
        vae=parts.vae(Z),
        text_encoder=parts.t5(tokenizer),
        tokenizer=tokenizer,
        transformer=_moved(
            "PixArtTransformer2DModel",
            sample_size=8,
            in_channels=Z,
            out_channels=2 * Z,
            num_layers=depth,
            num_attention_heads=2,
            attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=parts.WIDTH,
            use_additional_conditions=False,
        ),
    )


def _sana(depth: int) -> DiffusionPipeline:
    tokenizer = parts.gemma_tokenizer()
    levels = 4
    vae = {
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in {
            "block_out_channels": (8,) * levels,
            "layers_per_block": (1,) * levels,
            "qkv_multiscales": ((),) * levels,
        }.items()
    }
    return diffusers.SanaPipeline(
        scheduler=DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=_seeded(AutoencoderDC, latent_channels=Z, attention_head_dim=8, **vae),
        text_encoder=parts.gemma(tokenizer),
        tokenizer=tokenizer,
        transformer=_moved(
            "SanaTransformer2DModel",
            sample_size=4,
            in_channels=Z,
            out_channels=Z,
            num_layers=depth,
            num_attention_heads=2,
            attention_head_dim=8,
            num_cross_attention_heads=2,
            cross_attention_head_dim=8,
            cross_attention_dim=16,
            caption_channels=parts.WIDTH,
        ),
    )


def _lumina2(depth: int) -> DiffusionPipeline:
    tokenizer = parts.gemma_tokenizer(LUMINA_PROMPT)
    return diffusers.Lumina2Pipeline(
        scheduler=_flow(),
        vae=parts.vae(Z, shift_factor=0.1),
        text_encoder=parts.gemma(tokenizer),
        tokenizer=tokenizer,
        transformer=_moved(
            "Lumina2Transformer2DModel",
            sample_size=8,
            in_channels=Z,
            hidden_size=32,
            num_layers=depth,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=8,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(64, 32, 32),
            cap_feat_dim=parts.WIDTH,
        ),
    )


def _z_image(depth: int) -> DiffusionPipeline:
    tokenizer = parts.qwen_tokenizer()
    return diffusers.ZImagePipeline(
        scheduler=_flow(),
        vae=parts.vae(Z, shift_factor=0.1),
        text_encoder=parts.qwen3(tokenizer, head=False),
        tokenizer=tokenizer,
        transformer=_moved(
            "ZImageTransformer2DModel",
            in_channels=Z,
            dim=32,
            n_layers=depth,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=parts.WIDTH,
            axes_dims=[4, 6, 6],
            axes_lens=[128, 32, 32],
        ),
    )


def _hunyuan_image(depth: int) -> DiffusionPipeline:
    tokenizer, glyphs = parts.qwen_tokenizer(teacher.TEMPLATE), ByT5Tokenizer(extra_ids=0)
    return diffusers.HunyuanImagePipeline(
        scheduler=_flow(),
        vae=_seeded(
            AutoencoderKLHunyuanImage,
            in_channels=3,
            out_channels=3,
            latent_channels=Z,
            block_out_channels=(32, 32),
            layers_per_block=1,
            spatial_compression_ratio=2,
            sample_size=16,
            scaling_factor=0.75,
        ),
        text_encoder=parts.qwen_vl(tokenizer, layers=2),
        tokenizer=tokenizer,
        text_encoder_2=parts.t5(glyphs),
        tokenizer_2=glyphs,
        guider=AdaptiveProjectedMixGuidance(guidance_scale=3.5),
        ocr_guider=AdaptiveProjectedMixGuidance(guidance_scale=5.0),
        transformer=_moved(
            "HunyuanImageTransformer2DModel",
            in_channels=Z,
            out_channels=Z,
            num_layers=depth,
            num_single_layers=depth,
            num_refiner_layers=1,
            num_attention_heads=1,
            attention_head_dim=16,
            rope_axes_dim=(8, 8),
            text_embed_dim=parts.WIDTH,
            text_embed_2_dim=parts.WIDTH,
        ),
    )


def _hidream(depth: int) -> DiffusionPipeline:
    clip, t5, llama = parts.clip_tokenizer(8), parts.t5_tokenizer(), parts.llama_tokenizer()
    half = parts.WIDTH // 2
    return diffusers.HiDreamImagePipeline(
        scheduler=_flow(),
        vae=parts.vae(Z, levels=1, shift_factor=0.1),
        text_encoder=parts.clip(clip, projection=True, width=half),
        tokenizer=clip,
        text_encoder_2=parts.clip(clip, projection=True, width=half, seed=1),
        tokenizer_2=clip,
        text_encoder_3=parts.t5(t5),
        tokenizer_3=t5,
        text_encoder_4=parts.llama(llama),
        tokenizer_4=llama,
        # The pipeline scales every picture to 128 x 128 latents: 4 x 4 tokens need large patches.
        transformer=_moved(
            "HiDreamImageTransformer2DModel",
            patch_size=32,
            in_channels=Z,
            out_channels=Z,
            num_layers=depth,
            num_single_layers=depth,
            num_attention_heads=2,
            attention_head_dim=16,
            caption_channels=[parts.WIDTH, parts.WIDTH],
            text_emb_dim=parts.WIDTH,
            num_routed_experts=2,
            num_activated_experts=1,
            axes_dims_rope=(4, 6, 6),
            max_resolution=(128, 128),
            llama_layers=[block % 2 for block in range(2 * depth)],
        ),
    )


SMALL = {"height": 16, "width": 16, "num_inference_steps": 3}
SPECIMENS: dict[str, Specimen] = {
    "qwen-image": Specimen(
        "QwenImageTransformer2DModel",
        _qwen_image,
        SMALL | {"height": 32, "width": 32, "true_cfg_scale": 2.0, "negative_prompt": " "},
    ),
    "qwen-image-edit": Specimen(
        "QwenImageTransformer2DModel",
        partial(_qwen_image, edit=True),
        SMALL | {"height": 512, "width": 512, "true_cfg_scale": 2.0, "negative_prompt": " "},
        image=True,
    ),
    "flux": Specimen("FluxTransformer2DModel", _flux, SMALL | {"max_sequence_length": 8}),
    "flux-lite": Specimen(
        "FluxTransformer2DModel", partial(_flux, lite=True), SMALL | {"max_sequence_length": 8}
    ),
    "flux2": Specimen(
        "Flux2Transformer2DModel",
        _flux2,
        SMALL | {"max_sequence_length": 64, "text_encoder_out_layers": [1, 2]},
    ),
    "sd3": Specimen("SD3Transformer2DModel", _sd3, SMALL | {"max_sequence_length": 8}),
    "chroma": Specimen(
        "ChromaTransformer2DModel",
        _chroma,
        SMALL | {"max_sequence_length": 12, "negative_prompt": "a photo"},
    ),
    "pixart-sigma": Specimen(
        "PixArtTransformer2DModel",
        _pixart_sigma,
        SMALL
        | {"max_sequence_length": 12, "use_resolution_binning": False, "clean_caption": False},
    ),
    "sana": Specimen(
        "SanaTransformer2DModel",
        _sana,
        SMALL
        | {
            "height": 32,
            "width": 32,
            "max_sequence_length": 12,
            "use_resolution_binning": False,
            "complex_human_instruction": None,
        },
    ),
    "lumina2": Specimen(
        "Lumina2Transformer2DModel",
        _lumina2,
        SMALL | {"height": 64, "width": 64, "max_sequence_length": 48},
    ),
    "z-image": Specimen("ZImageTransformer2DModel", _z_image, SMALL | {"max_sequence_length": 24}),
    "hunyuan-image": Specimen(
        "HunyuanImageTransformer2DModel",
        _hunyuan_image,
        SMALL | {"height": 8, "width": 8},
    ),
    "hidream": Specimen(
        "HiDreamImageTransformer2DModel", _hidream, SMALL | {"max_sequence_length": 8}
    ),
}
