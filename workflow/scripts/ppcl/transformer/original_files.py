"""Which files the authors of a model publish, and other programs read: names of tensors per class.

diffusers reads such a file by a converter of its own (`from_single_file`), which
`export.original_format` runs backwards; all that it needs from here are the names. They are those
that diffusers' converters ask for, and that the authors' code has (of Wan, HunyuanVideo, FLUX and
FLUX.2 `tests/unit/test_original_format.py` says how that was compared). Of names that only some
models of a class have, such as those of a guidance or of an image encoder, all are here.

In a name, {a,b} stands for either, and <list> for the numbers of the blocks of diffusers' list.
"""

from dataclasses import dataclass

# All tensors, named as in diffusers.
SAME = ("*",)


@dataclass(frozen=True)
class OriginalFiles:
    """A class's files outside of diffusers.

    Attributes:
        names: of tensors. SAME: as diffusers has them.
        gguf: the architecture that a GGUF file names, one of those that ComfyUI-GGUF reads
            (loader.py); empty if it reads none of the class.
        kept: parts of names of matrices that a quantised GGUF file holds unquantised (its
            tools/lcpp.patch; of Qwen-Image, which that doesn't have, what embeds and what ends).
        precise: parts of names of tensors that are stored in float32 (its tools/convert.py).
        fixed_depth: how many blocks ComfyUI makes of the class, where it doesn't count those of the
            file (its model_detection.py); empty if it counts them.
    """

    names: tuple[str, ...]
    gguf: str = ""
    kept: tuple[str, ...] = ()
    precise: tuple[str, ...] = ()
    fixed_depth: str = ""


_BOTH = "{weight,bias}"
_FLUX_KEPT = ("txt_in.", "img_in.", "time_in.", "vector_in.", "guidance_in.", "final_layer.")

QWEN_IMAGE = OriginalFiles(
    SAME,
    gguf="qwen_image",
    kept=("img_in.", "txt_in.", "time_text_embed.", "norm_out.", "proj_out."),
)

FLUX = OriginalFiles(
    (
        f"{{img_in,txt_in}}.{_BOTH}",
        f"{{time_in,vector_in,guidance_in}}.{{in_layer,out_layer}}.{_BOTH}",
        f"double_blocks.<transformer_blocks>.{{img,txt}}_mod.lin.{_BOTH}",
        f"double_blocks.<transformer_blocks>.{{img,txt}}_attn.{{qkv,proj}}.{_BOTH}",
        "double_blocks.<transformer_blocks>.{img,txt}_attn.norm.{query_norm,key_norm}.scale",
        f"double_blocks.<transformer_blocks>.{{img,txt}}_mlp.{{0,2}}.{_BOTH}",
        f"single_blocks.<single_transformer_blocks>.{{modulation.lin,linear1,linear2}}.{_BOTH}",
        "single_blocks.<single_transformer_blocks>.norm.{query_norm,key_norm}.scale",
        f"final_layer.{{linear,adaLN_modulation.1}}.{_BOTH}",
    ),
    gguf="flux",
    kept=_FLUX_KEPT,
)

FLUX_2 = OriginalFiles(
    (
        "{img_in,txt_in}.weight",
        "{time_in,guidance_in}.{in_layer,out_layer}.weight",
        "{double_stream_modulation_{img,txt},single_stream_modulation}.lin.weight",
        "double_blocks.<transformer_blocks>.{img,txt}_attn.{qkv,proj}.weight",
        "double_blocks.<transformer_blocks>.{img,txt}_attn.norm.{query_norm,key_norm}.scale",
        "double_blocks.<transformer_blocks>.{img,txt}_mlp.{0,2}.weight",
        "single_blocks.<single_transformer_blocks>.{linear1,linear2}.weight",
        "single_blocks.<single_transformer_blocks>.norm.{query_norm,key_norm}.scale",
        "final_layer.{linear,adaLN_modulation.1}.weight",
    ),
    gguf="flux",
    kept=_FLUX_KEPT,
)

SD3 = OriginalFiles(
    (
        "pos_embed",
        f"{{x_embedder.proj,context_embedder}}.{_BOTH}",
        f"{{t_embedder,y_embedder}}.mlp.{{0,2}}.{_BOTH}",
        "joint_blocks.<transformer_blocks>.{x_block,context_block}"
        f".{{attn.qkv,attn.proj,adaLN_modulation.1,mlp.fc1,mlp.fc2}}.{_BOTH}",
        "joint_blocks.<transformer_blocks>.{x_block,context_block}.attn.{ln_q,ln_k}.weight",
        f"joint_blocks.<transformer_blocks>.x_block.attn2.{{qkv,proj}}.{_BOTH}",
        "joint_blocks.<transformer_blocks>.x_block.attn2.{ln_q,ln_k}.weight",
        f"final_layer.{{linear,adaLN_modulation.1}}.{_BOTH}",
    ),
    gguf="sd3",
    kept=(
        *("final_layer.", "time_text_embed.", "context_embedder.", "t_embedder.", "y_embedder."),
        *("x_embedder.", "proj_out.weight", "pos_embed"),
    ),
    fixed_depth="one per 64 channels",
)

SANA = OriginalFiles(
    (
        "pos_embed",
        "y_embedder.y_embedding",
        "attention_y_norm.weight",
        "final_layer.scale_shift_table",
        f"{{x_embedder.proj,t_block.1,final_layer.linear}}.{_BOTH}",
        f"{{t_embedder.mlp.{{0,2}},y_embedder.y_proj.fc{{1,2}}}}.{_BOTH}",
        "blocks.<transformer_blocks>.{scale_shift_table,attn.qkv.weight}",
        f"blocks.<transformer_blocks>.{{attn.proj,cross_attn.{{q_linear,kv_linear,proj}}}}.{_BOTH}",
        f"blocks.<transformer_blocks>.mlp.{{inverted,depth}}_conv.conv.{_BOTH}",
        "blocks.<transformer_blocks>.mlp.point_conv.conv.weight",
    )
)

_LUMINA_KEPT = (
    *("t_embedder.", "x_embedder.", "final_layer.", "cap_embedder.", "context_refiner."),
    "noise_refiner.",
)
# Of Lumina 2 and of Z-Image, in a file of whose the attention is one matrix.
_LUMINA = (
    f"{{x_embedder,t_embedder.mlp.{{0,2}},cap_embedder.1}}.{_BOTH}",
    "cap_embedder.0.weight",
    f"final_layer.{{linear,adaLN_modulation.1}}.{_BOTH}",
    *(
        f"{blocks}.<{blocks}>.{each}"
        for blocks in ("layers", "noise_refiner", "context_refiner")
        for each in (
            "attention.{qkv,out,q_norm,k_norm}.weight",
            "feed_forward.{w1,w2,w3}.weight",
            "{attention,ffn}_norm{1,2}.weight",
        )
    ),
)
LUMINA_2 = OriginalFiles(
    (*_LUMINA, f"{{layers.<layers>,noise_refiner.<noise_refiner>}}.adaLN_modulation.1.{_BOTH}"),
    gguf="lumina2",
    kept=_LUMINA_KEPT,
)
Z_IMAGE = OriginalFiles(
    (
        *_LUMINA,
        f"{{layers.<layers>,noise_refiner.<noise_refiner>}}.adaLN_modulation.0.{_BOTH}",
        "{x,cap}_pad_token",
    ),
    gguf="lumina2",
    kept=_LUMINA_KEPT,
)

HIDREAM = OriginalFiles(
    SAME,
    gguf="hidream",
    kept=(
        *("p_embedder.", "t_embedder.", "x_embedder.", "final_layer.", ".ff_i.gate.weight"),
        "caption_projection.",
    ),
    precise=(".ff_i.gate.weight",),
    fixed_depth="16 and 32",
)

WAN = OriginalFiles(
    (
        f"{{patch_embedding,head.head,time_projection.1}}.{_BOTH}",
        f"{{text_embedding,time_embedding}}.{{0,2}}.{_BOTH}",
        f"img_emb.proj.{{0,1,3,4}}.{_BOTH}",
        "head.modulation",
        "blocks.<blocks>.modulation",
        f"blocks.<blocks>.{{self_attn,cross_attn}}.{{q,k,v,o}}.{_BOTH}",
        "blocks.<blocks>.{self_attn,cross_attn}.{norm_q,norm_k}.weight",
        f"blocks.<blocks>.cross_attn.{{k_img,v_img}}.{_BOTH}",
        "blocks.<blocks>.cross_attn.norm_k_img.weight",
        f"blocks.<blocks>.{{norm3,ffn.0,ffn.2}}.{_BOTH}",
    ),
    gguf="wan",
    kept=(
        *("modulation.", "patch_embedding.", "text_embedding.", "time_projection."),
        *("time_embedding.", "img_emb.", "head."),
    ),
    precise=(".modulation",),
)

HUNYUAN_VIDEO = OriginalFiles(
    (
        f"{{img_in.proj,txt_in.input_embedder,final_layer.{{linear,adaLN_modulation.1}}}}.{_BOTH}",
        f"{{vector_in.{{in,out}}_layer,{{time_in,guidance_in}}.mlp.{{0,2}}}}.{_BOTH}",
        f"txt_in.{{t_embedder.mlp.{{0,2}},c_embedder.linear_{{1,2}}}}.{_BOTH}",
        "txt_in.individual_token_refiner.blocks.<context_embedder.token_refiner.refiner_blocks>"
        ".{norm1,norm2,self_attn_qkv,self_attn_proj,mlp.fc1,mlp.fc2,adaLN_modulation.1}"
        f".{_BOTH}",
        "double_blocks.<transformer_blocks>.{img,txt}"
        f"_{{mod.linear,attn_qkv,attn_proj,mlp.fc1,mlp.fc2}}.{_BOTH}",
        "double_blocks.<transformer_blocks>.{img,txt}_attn_{q,k}_norm.weight",
        "single_blocks.<single_transformer_blocks>.{linear1,linear2,modulation.linear}"
        + f".{_BOTH}",
        "single_blocks.<single_transformer_blocks>.{q,k}_norm.weight",
    ),
    gguf="hyvid",
    kept=_FLUX_KEPT,
)

LTX = OriginalFiles(
    (
        f"{{patchify_proj,proj_out,adaln_single.linear}}.{_BOTH}",
        f"{{adaln_single.emb.timestep_embedder,caption_projection}}.linear_{{1,2}}.{_BOTH}",
        "{scale_shift_table,transformer_blocks.<transformer_blocks>.scale_shift_table}",
        "transformer_blocks.<transformer_blocks>.attn{1,2}.{q_norm,k_norm}.weight",
        f"transformer_blocks.<transformer_blocks>.attn{{1,2}}.to_{{q,k,v,out.0}}.{_BOTH}",
        f"transformer_blocks.<transformer_blocks>.ff.net.{{0.proj,2}}.{_BOTH}",
    ),
    gguf="ltxv",
    kept=("adaln_single.", "caption_projection.", "patchify_proj.", "proj_out."),
    precise=("scale_shift_table",),
)

MOCHI = OriginalFiles(
    (
        "pos_frequencies",
        f"{{x_embedder.proj,t_embedder.mlp.{{0,2}},t5_yproj,final_layer.{{linear,mod}}}}.{_BOTH}",
        f"t5_y_embedder.{{to_kv,to_q,to_out}}.{_BOTH}",
        f"blocks.<transformer_blocks>.{{mod_{{x,y}},attn.proj_{{x,y}}}}.{_BOTH}",
        "blocks.<transformer_blocks>.attn.{qkv,q_norm,k_norm}_{x,y}.weight",
        "blocks.<transformer_blocks>.mlp_{x,y}.{w1,w2}.weight",
    )
)
