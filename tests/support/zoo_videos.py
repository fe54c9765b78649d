"""Tiny video pipelines of the supported families: see `zoo`.

Schedulers are configured as the families publish them, because they differ in kind: solvers of
several steps (Wan), shifts that depend on the number of tokens (LTX), sigmas that rise (Mochi) and
a diffusion that is no flow and draws noise in every step (CogVideoX).
"""

from functools import partial

import diffusers
import torch
from diffusers import (
    CogVideoXDPMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

from support import zoo_parts as parts
from support.zoo import Specimen

Z = 4  # latent channels
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


def _made(name: str, moved: float = 0.0, seed: int = 0, **shape) -> torch.nn.Module:
    """A frozen model of diffusers' class `name`, its parameters moved by `moved` * normal."""
    torch.manual_seed(seed)
    return parts.freeze(getattr(diffusers, name)(**shape), moved, seed)


_transformer = partial(_made, moved=0.05)  # no gate or modulation is zero


def _wan(depth: int, experts: int = 1) -> DiffusionPipeline:
    """One transformer as in Wan 2.1; or one for much noise and one for little as in 2.2 A14B."""
    tokenizer = parts.t5_tokenizer()
    names = ["transformer", "transformer_2"][:experts]
    transformers = {
        name: _transformer(
            "WanTransformer3DModel",
            seed=seed,
            **HEADS,
            in_channels=Z,
            out_channels=Z,
            text_dim=parts.WIDTH,
            freq_dim=32,
            ffn_dim=64,
            num_layers=depth,
            rope_max_seq_len=32,
        )
        for seed, name in enumerate(names)
    }
    return diffusers.WanPipeline(
        scheduler=UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        vae=_made(
            "AutoencoderKLWan",
            base_dim=8,
            z_dim=Z,
            dim_mult=[1, 1],
            num_res_blocks=1,
            temperal_downsample=[True],
            latents_mean=[0.0] * Z,
            latents_std=[1.0] * Z,
            scale_factor_temporal=2,
            scale_factor_spatial=2,
        ),
        text_encoder=parts.t5(tokenizer, umt5=True),
        tokenizer=tokenizer,
        boundary_ratio=0.875 if experts == 2 else None,
        **transformers,
    )


def _hunyuan_video(depth: int) -> DiffusionPipeline:
    # The template's prefix takes 96 tokens, of which the pipeline drops 95.
    llama = parts.llama_tokenizer(
        DEFAULT_PROMPT_TEMPLATE["template"],
        markers=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    )
    clip = parts.clip_tokenizer(77)  # the pipeline pads to 77 whatever the settings
    return diffusers.HunyuanVideoPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        vae=_made(
            "AutoencoderKLHunyuanVideo",
            latent_channels=Z,
            down_block_types=("HunyuanVideoDownBlock3D",) * 3,
            up_block_types=("HunyuanVideoUpBlock3D",) * 3,
            block_out_channels=(8, 8, 8),
            layers_per_block=1,
            norm_num_groups=2,
            spatial_compression_ratio=2,
            mid_block_add_attention=False,
        ),
        text_encoder=parts.llama(llama, layers=3, head=False),  # the last two are skipped
        tokenizer=llama,
        text_encoder_2=parts.clip(clip),
        tokenizer_2=clip,
        transformer=_transformer(
            "HunyuanVideoTransformer3DModel",
            **HEADS,
            in_channels=Z,
            out_channels=Z,
            num_layers=depth,
            num_single_layers=depth,
            num_refiner_layers=2,
            text_embed_dim=parts.WIDTH,
            pooled_projection_dim=parts.WIDTH,
            rope_axes_dim=(4, 6, 6),
        ),
    )


def _ltx(depth: int) -> DiffusionPipeline:
    tokenizer = parts.t5_tokenizer()
    vae = {
        f"{side}{name}": value
        for side in ("", "decoder_")
        for name, value in {
            "block_out_channels": (8, 8),
            "layers_per_block": (1, 1, 1),
            "spatio_temporal_scaling": (True, False),
        }.items()
    }
    return diffusers.LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.95,
            max_shift=2.05,
            base_image_seq_len=1024,
            max_image_seq_len=4096,
            shift_terminal=0.1,
        ),
        vae=_made(
            "AutoencoderKLLTXVideo",
            latent_channels=2 * Z,
            down_block_types=("LTXVideoDownBlock3D",) * 2,
            decoder_inject_noise=(False,) * 3,
            downsample_type=("conv",) * 2,
            upsample_residual=(False,) * 2,
            upsample_factor=(1, 1),
            **vae,
        ),
        text_encoder=parts.t5(tokenizer),
        tokenizer=tokenizer,
        transformer=_transformer(
            "LTXVideoTransformer3DModel",
            **HEADS,
            in_channels=2 * Z,
            out_channels=2 * Z,
            cross_attention_dim=32,
            num_layers=depth,
            caption_channels=parts.WIDTH,
        ),
    )


def _cogvideox(depth: int) -> DiffusionPipeline:
    tokenizer = parts.t5_tokenizer()
    return diffusers.CogVideoXPipeline(
        scheduler=CogVideoXDPMScheduler(
            beta_schedule="scaled_linear",
            prediction_type="v_prediction",
            rescale_betas_zero_snr=True,
            snr_shift_scale=1.0,
            timestep_spacing="trailing",
        ),
        vae=_made(
            "AutoencoderKLCogVideoX",
            down_block_types=("CogVideoXDownBlock3D",) * 2,
            up_block_types=("CogVideoXUpBlock3D",) * 2,
            block_out_channels=(8, 8),
            latent_channels=Z,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=2,
            sample_height=16,
            sample_width=16,
        ),
        text_encoder=parts.t5(tokenizer),
        tokenizer=tokenizer,
        transformer=_transformer(
            "CogVideoXTransformer3DModel",
            **HEADS,
            in_channels=Z,
            out_channels=Z,
            time_embed_dim=32,
            text_embed_dim=parts.WIDTH,
            num_layers=depth,
            sample_width=8,
            sample_height=8,
            sample_frames=5,
            temporal_compression_ratio=2,
            max_text_seq_length=12,
            use_rotary_positional_embeddings=True,
        ),
    )


def _mochi(depth: int) -> DiffusionPipeline:
    tokenizer = parts.t5_tokenizer()
    # The pipeline fixes 12 channels and the factors 6 and 8; one level makes all of the factor.
    return diffusers.MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=_made(
            "AutoencoderKLMochi",
            encoder_block_out_channels=(32, 32),
            decoder_block_out_channels=(32, 32),
            layers_per_block=(1, 1, 1),
            temporal_expansions=(6,),
            spatial_expansions=(8,),
            add_attention_block=(False,) * 3,
        ),
        text_encoder=parts.t5(tokenizer),
        tokenizer=tokenizer,
        transformer=_transformer(
            "MochiTransformer3DModel",
            **HEADS,
            num_layers=depth,
            pooled_projection_dim=16,
            text_embed_dim=parts.WIDTH,
            time_embed_dim=32,
            max_sequence_length=12,
        ),
    )


SMALL = {
    "height": 16,
    "width": 16,
    "num_frames": 3,
    "num_inference_steps": 3,
    "max_sequence_length": 12,
}
# Sigmas 1, 0.9, 0.75, 0.5: either transformer is called in two of the four steps.
EXPERTS = SMALL | {"num_inference_steps": 4, "guidance_scale": 4.0, "guidance_scale_2": 3.0}
SPECIMENS: dict[str, Specimen] = {
    "wan": Specimen("WanTransformer3DModel", _wan, SMALL | {"negative_prompt": "blue"}),
    "wan22": Specimen("WanTransformer3DModel", partial(_wan, experts=2), EXPERTS),
    "wan22-low": Specimen(
        "WanTransformer3DModel", partial(_wan, experts=2), EXPERTS, component="transformer_2"
    ),
    "hunyuan-video": Specimen(
        "HunyuanVideoTransformer3DModel",
        _hunyuan_video,
        SMALL | {"num_frames": 5, "max_sequence_length": 16},
    ),
    "ltx": Specimen("LTXVideoTransformer3DModel", _ltx, SMALL | {"height": 32, "width": 32}),
    "cogvideox": Specimen("CogVideoXTransformer3DModel", _cogvideox, SMALL | {"num_frames": 5}),
    "mochi": Specimen(
        "MochiTransformer3DModel", _mochi, SMALL | {"height": 32, "width": 32, "num_frames": 19}
    ),
}
