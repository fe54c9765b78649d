"""Weights of IP-adapters for tiny transformers, as files hold them; random, for wiring alone."""

import torch
from diffusers.models.attention_processor import SD3IPAdapterJointAttnProcessor2_0
from diffusers.models.embeddings import IPAdapterTimeImageProjection

PICTURE = 12  # channels of a picture's embedding


def drawn(*shape):
    return torch.randn(*shape) * 0.3


def flux(transformer, style="diffusers"):
    """For FLUX, with names of `diffusers` or of `xlabs`."""
    text, width = transformer.config.joint_attention_dim, transformer.inner_dim
    about = {"proj.weight": drawn(4 * text, PICTURE), "proj.bias": drawn(4 * text)}
    about |= {"norm.weight": drawn(text), "norm.bias": drawn(text)}
    xlabs = style == "xlabs"
    prefix = "ip_adapter_proj_model" if xlabs else "image_proj"
    made = {f"{prefix}.{name}": weight for name, weight in about.items()}
    for block in range(len(transformer.transformer_blocks)):
        for part in ("k", "v"):
            name = f"ip_adapter.{block}.to_{part}_ip"
            if xlabs:
                name = f"double_blocks.{block}.processor.ip_adapter_double_stream_{part}_proj"
            made |= {f"{name}.weight": drawn(width, text), f"{name}.bias": drawn(width)}
    return made


def sd3(transformer):
    """For SD3."""
    width = transformer.inner_dim
    head = transformer.config.attention_head_dim
    about = IPAdapterTimeImageProjection(
        embed_dim=PICTURE, output_dim=width, hidden_dim=64, heads=1, num_queries=4, depth=4
    )
    times = about.time_embedding.linear_2.out_features
    made = {f"image_proj.{name}": drawn(*w.shape) for name, w in about.state_dict().items()}
    for number in range(len(transformer.attn_processors)):
        one = SD3IPAdapterJointAttnProcessor2_0(width, width, head, timesteps_emb_dim=times)
        for name, weight in one.state_dict().items():
            made[f"ip_adapter.{number}.{name}"] = drawn(*weight.shape)
    return made
