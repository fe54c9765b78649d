"""The family registry: one short entry per transformer class, with all that is known about it.

No other module asks which model it works on. An entry names the block lists in the order in which
data flows through them, and which argument and which output of a block is which stream.
`claims.verify` checks the claims numerically before anything long runs. A class without an entry is
inspected (discovery.py), unless it is in `REFUSED`, the classes that are known not to work.

This is a table of data, and so it may be long. `family` describes the fields of an entry,
`family_functions` holds the functions that entries name, and `registry` looks entries up.
"""

from ppcl.transformer import family_functions as functions
from ppcl.transformer import original_files
from ppcl.transformer.family import (
    IMAGE,
    JOINT,
    TEXT,
    Adapter,
    Control,
    Family,
    FeedForward,
    Pipeline,
    Size,
    TextPath,
    Width,
    dual,
    single,
)

# ---- what many classes have in common

IMAGE_TEXT, TEXT_IMAGE = (IMAGE, TEXT), (TEXT, IMAGE)
DOUBLE = ("transformer_blocks", "num_layers")
SINGLE = ("single_transformer_blocks", "num_single_layers")

# For blocks with AdaLayerNormZero norms, which hold the Linear of their modulation.
_ZERO_FFN = {
    IMAGE: FeedForward("norm2", "ff", "norm1.linear"),
    TEXT: FeedForward("norm2_context", "ff_context", "norm1_context.linear"),
}
_TEXT_QUERY = ("attn.add_q_proj", "attn.norm_added_q")
_ZERO_TEXT = TextPath(
    norm="norm1_context",
    modulation=None,
    extras=4,
    attention="attn",
    argument="encoder_hidden_states",
    query=_TEXT_QUERY,
    output="attn.to_add_out",
    keywords="joint_attention_kwargs",
    others=("attn2",),
)
_ZERO = Width(_ZERO_FFN, _ZERO_TEXT)
_ZERO_MODULATIONS = ("norm1.linear", "norm1_context.linear")
_SINGLE_MODULATIONS = ("norm.linear",)
_LAST = "norm_out.linear"
_FFN = FeedForward("norm2", "ff")

# Values of `Family.gated` that many classes share, in this order: for blocks with two streams; for
# blocks with one stream that have self-attention, then cross-attention to the text; for blocks in
# which one Linear projects the outputs of attention and FFN together.
_GATED = (("attn.to_out.0", "attn.to_add_out"), ("ff.net.2", "ff_context.net.2"))
_GATED_TWICE = (("attn2.to_out.0",), ("ff.net.2",))
_GATED_ONCE = (("proj_out",),)

_NO_FLOW = "its schedulers are not flow matching"
_OWN_TIME = "its pipelines count noise the other way round than their schedulers"
# What `Family.lora_names` says of them.
_FLUX_LINEARS: dict[str, tuple[str, ...]] = {
    "double_blocks.{}.img_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"),
    "double_blocks.{}.txt_attn.qkv": tuple(
        f"transformer_blocks.{{}}.attn.add_{x}_proj" for x in "qkv"
    ),
    "double_blocks.{}.img_attn.proj": ("transformer_blocks.{}.attn.to_out.0",),
    "double_blocks.{}.txt_attn.proj": ("transformer_blocks.{}.attn.to_add_out",),
    "double_blocks.{}.img_mlp.0": ("transformer_blocks.{}.ff.net.0.proj",),
    "double_blocks.{}.img_mlp.2": ("transformer_blocks.{}.ff.net.2",),
    "double_blocks.{}.txt_mlp.0": ("transformer_blocks.{}.ff_context.net.0.proj",),
    "double_blocks.{}.txt_mlp.2": ("transformer_blocks.{}.ff_context.net.2",),
    "double_blocks.{}.img_mod.lin": ("transformer_blocks.{}.norm1.linear",),
    "double_blocks.{}.txt_mod.lin": ("transformer_blocks.{}.norm1_context.linear",),
    "single_blocks.{}.linear1": (
        *(f"single_transformer_blocks.{{}}.attn.to_{x}" for x in "qkv"),
        "single_transformer_blocks.{}.proj_mlp",
    ),
    "single_blocks.{}.linear2": ("single_transformer_blocks.{}.proj_out",),
    "single_blocks.{}.modulation.lin": ("single_transformer_blocks.{}.norm.linear",),
}
_WAN_LINEARS: dict[str, tuple[str, ...]] = {
    **{
        f"blocks.{{}}.{theirs}.{x}": (f"blocks.{{}}.{ours}.{path}",)
        for theirs, ours in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for x, path in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"))
    },
    "blocks.{}.cross_attn.k_img": ("blocks.{}.attn2.add_k_proj",),
    "blocks.{}.cross_attn.v_img": ("blocks.{}.attn2.add_v_proj",),
    "blocks.{}.ffn.0": ("blocks.{}.ffn.net.0.proj",),
    "blocks.{}.ffn.2": ("blocks.{}.ffn.net.2",),
    "time_projection.1": ("condition_embedder.time_proj",),
    "head.head": ("proj_out",),
}
FAMILIES: dict[str, Family] = {
    "QwenImageTransformer2DModel": Family(
        lists=(
            dual(
                TEXT_IMAGE,
                *DOUBLE,
                Width(
                    ffn={
                        IMAGE: FeedForward("img_norm2", "img_mlp", "img_mod.1"),
                        TEXT: FeedForward("txt_norm2", "txt_mlp", "txt_mod.1"),
                    },
                    text=TextPath(
                        norm="txt_norm1",
                        modulation="txt_mod",
                        extras=0,
                        attention="attn",
                        argument="encoder_hidden_states",
                        query=_TEXT_QUERY,
                        output="attn.to_add_out",
                        keywords="joint_attention_kwargs",
                    ),
                ),
                ("img_mod.1", "txt_mod.1"),
            ),
        ),
        masks={TEXT: functions.marked("encoder_hidden_states_mask")},
        unread=(TEXT,),
        last_modulation=_LAST,
        framed=functions.filled,
        limits="Qwen-Image-Edit: record.renoised_per_sample must be 0",
        gated={
            "transformer_blocks": (
                ("attn.to_out.0", "attn.to_add_out"),
                ("img_mlp.net.2", "txt_mlp.net.2"),
            )
        },
        control=Control("QwenImageControlNetModel", {DOUBLE[0]: ("num_layers", functions.strided)}),
        pipeline=Pipeline(
            size=Size(1024, 1024, 1, 512),
            steps=50,
            guidance=("true_cfg_scale", 4.0),
            negative=True,
            joined=False,
            arguments=functions.qwen_image,
        ),
        original=original_files.QWEN_IMAGE,
    ),
    "FluxTransformer2DModel": Family(
        lists=(
            dual(TEXT_IMAGE, *DOUBLE, _ZERO, _ZERO_MODULATIONS),
            dual(TEXT_IMAGE, *SINGLE, modulations=_SINGLE_MODULATIONS),
        ),
        shared=("img_ids", "txt_ids"),
        unread=(TEXT,),
        last_modulation=_LAST,
        texts=("tokenizer_2",),
        gated={DOUBLE[0]: _GATED, SINGLE[0]: _GATED_ONCE},
        control=Control(
            "FluxControlNetModel",
            {
                DOUBLE[0]: ("num_layers", functions.repeated),
                SINGLE[0]: ("num_single_layers", functions.strided),
            },
        ),
        adapter=Adapter(DOUBLE[0], summed=("to_v_ip", "ip_adapter_double_stream_v_proj")),
        lora_names=_FLUX_LINEARS,
        pipeline=Pipeline(
            size=Size(1024, 1024, 1, 512),
            steps=28,
            guidance=("true_cfg_scale", 1.0),
            negative=True,
            joined=False,
            arguments=functions.flux,
        ),
        original=original_files.FLUX,
    ),
    "Flux2Transformer2DModel": Family(
        lists=(
            dual(
                TEXT_IMAGE,
                *DOUBLE,
                Width({IMAGE: _FFN, TEXT: FeedForward("norm2_context", "ff_context")}),
            ),
            single(JOINT, *SINGLE),
        ),
        framed=functions.spoken,
        limits="one modulation serves all blocks, so text streams can't be shared",
        original=original_files.FLUX_2,
    ),
    "SD3Transformer2DModel": Family(
        lists=(dual(TEXT_IMAGE, *DOUBLE, _ZERO, _ZERO_MODULATIONS),),
        last_modulation=_LAST,
        untouchable={
            ("transformer_blocks", -1): "the last block has no text output (context_pre_only)"
        },
        index_keys=("dual_attention_layers",),
        numbered=("skip_layers",),
        texts=("tokenizer", "tokenizer_2", "tokenizer_3"),
        limits="no skip-layer guidance, which names blocks by number; intervals don't cross from "
        "blocks with two attentions to others",
        gated={DOUBLE[0]: _GATED},
        control=Control("SD3ControlNetModel", {DOUBLE[0]: ("num_layers", functions.stretched)}),
        adapter=Adapter(DOUBLE[0], ("", "dual_attention_layers")),
        pipeline=Pipeline(
            size=Size(1024, 1024, 1, 256),
            steps=28,
            guidance=("guidance_scale", 7.0),
            negative=False,
            joined=True,
            arguments=functions.sd3,
        ),
        original=original_files.SD3,
    ),
    "PixArtTransformer2DModel": Family(
        lists=(single(IMAGE, *DOUBLE, Width({IMAGE: _FFN})),),
        fixed=_NO_FLOW,
        gated={DOUBLE[0]: _GATED_TWICE},
    ),
    "SanaTransformer2DModel": Family(
        lists=(single(IMAGE, *DOUBLE, Width({IMAGE: _FFN})),),
        original=original_files.SANA,
        control=Control("SanaControlNetModel", {DOUBLE[0]: ("num_layers", functions.after_first)}),
    ),
    "Lumina2Transformer2DModel": Family(
        lists=(
            single(
                IMAGE,
                "layers",
                "num_layers",
                Width(
                    {
                        IMAGE: FeedForward(
                            "ffn_norm1", "feed_forward", "norm1.linear", (2, 4), "ffn_norm2"
                        )
                    }
                ),
                modulations=("norm1.linear",),
            ),
        ),
        last_modulation="norm_out.linear_1",
        masks={IMAGE: functions.lumina_mask},
        framed=functions.instructed,
        fixed=_OWN_TIME,
        limits="the refiners, two blocks each, stay",
        original=original_files.LUMINA_2,
    ),
    "ZImageTransformer2DModel": Family(
        lists=(
            single(
                IMAGE,
                "layers",
                "n_layers",
                Width(
                    {
                        IMAGE: FeedForward(
                            "ffn_norm1", "feed_forward", "adaLN_modulation.0", (2, 4), "ffn_norm2"
                        )
                    }
                ),
                argument="x",
                modulations=("adaLN_modulation.0",),
            ),
        ),
        last_modulation="all_final_layer.2-1.adaLN_modulation.1",
        masks={IMAGE: functions.z_image_mask},
        state="x",
        time="t",
        framed=functions.spoken,
        fixed=_OWN_TIME,
        control=Control(
            "ZImageControlNetModel", {"layers": ("control_layers_places", functions.listed)}
        ),
        limits="the refiners, two blocks each, stay",
        original=original_files.Z_IMAGE,
    ),
    "HunyuanImageTransformer2DModel": Family(
        lists=(
            dual(IMAGE_TEXT, *DOUBLE, Width(_ZERO_FFN), _ZERO_MODULATIONS),
            dual(IMAGE_TEXT, *SINGLE, modulations=_SINGLE_MODULATIONS),
        ),
        last_modulation=_LAST,
        masks={TEXT: functions.hunyuan_image_mask},
        unread=(TEXT,),
        framed=functions.filled,
        apart=functions.lettered,
        guidance=1000.0,
        frames_per_second=15,
        limits="the attention gets no keywords, so text streams can't be shared",
        gated={DOUBLE[0]: _GATED, SINGLE[0]: _GATED_ONCE},
    ),
    "HiDreamImageTransformer2DModel": Family(
        lists=(
            dual(
                IMAGE_TEXT,
                "double_stream_blocks",
                "num_layers",
                modulations=("block.adaLN_modulation.1",),
            ),
            single(
                JOINT,
                "single_stream_blocks",
                "num_single_layers",
                modulations=("block.adaLN_modulation.1",),
            ),
        ),
        last_modulation="final_layer.adaLN_modulation.1",
        masks={TEXT: functions.hidream_mask, JOINT: functions.hidream_mask},
        batch_dims={"encoder_hidden_states_llama3": 1},
        untouchable={
            ("single_stream_blocks", -1): "its layer of the text encoder starts the text stream"
        },
        time="timesteps",
        per_block=("llama_layers",),
        companions=("caption_projection",),
        texts=("tokenizer_3", "tokenizer_4"),
        limits="FFNs are mixtures of experts, which stay",
        original=original_files.HIDREAM,
    ),
    "WanTransformer3DModel": Family(
        lists=(single(IMAGE, "blocks", "num_layers", Width({IMAGE: FeedForward("norm3", "ffn")})),),
        limits="with two transformers, prune one run after the other (teacher.component)",
        gated={"blocks": (("attn2.to_out.0",), ("ffn.net.2",))},
        lora_names=_WAN_LINEARS,
        pipeline=Pipeline(
            size=Size(480, 832, 81, 512),
            steps=50,
            guidance=("guidance_scale", 5.0),
            negative=False,
            joined=False,
            arguments=functions.wan,
        ),
        original=original_files.WAN,
    ),
    "HunyuanVideoTransformer3DModel": Family(
        lists=(
            dual(IMAGE_TEXT, *DOUBLE, Width(_ZERO_FFN), _ZERO_MODULATIONS),
            dual(IMAGE_TEXT, *SINGLE, modulations=_SINGLE_MODULATIONS),
        ),
        last_modulation=_LAST,
        masks={TEXT: functions.marked("encoder_attention_mask")},
        unread=(TEXT,),
        guidance=1000.0,
        limits="the attention gets no keywords, so text streams can't be shared",
        gated={DOUBLE[0]: _GATED, SINGLE[0]: _GATED_ONCE},
        original=original_files.HUNYUAN_VIDEO,
    ),
    "LTXVideoTransformer3DModel": Family(
        lists=(single(IMAGE, *DOUBLE, Width({IMAGE: _FFN})),),
        frames_per_second=24,
        gated={DOUBLE[0]: _GATED_TWICE},
        original=original_files.LTX,
    ),
    "CogVideoXTransformer3DModel": Family(
        lists=(dual(IMAGE_TEXT, *DOUBLE, modulations=("norm1.linear", "norm2.linear")),),
        last_modulation=_LAST,
        shared=("image_rotary_emb",),
        unread=(TEXT,),
        fixed=_NO_FLOW,
        frames_per_second=8,
        limits="one FFN serves both streams, so it stays",
    ),
    "MochiTransformer3DModel": Family(
        lists=(
            dual(
                IMAGE_TEXT,
                *DOUBLE,
                Width(
                    {
                        IMAGE: FeedForward("norm3", "ff", "norm1.linear", (2, 4)),
                        TEXT: FeedForward(
                            "norm3_context", "ff_context", "norm1_context.linear", (2, 4)
                        ),
                    }
                ),
                # The last block's text norm is of another class, whose Linear has another name.
                (*_ZERO_MODULATIONS, "norm1_context.linear_1"),
            ),
        ),
        last_modulation=_LAST,
        masks={TEXT: functions.marked("encoder_attention_mask")},
        untouchable={
            ("transformer_blocks", -1): "the last block has no text output (context_pre_only)"
        },
        unread=(TEXT,),
        frames_per_second=30,
        original=original_files.MOCHI,
    ),
}

_SOUND = "it makes sound, and results here are pictures and videos"
_CACHE = "its calls share a cache of keys and values by block, so none can be replayed alone"
_PART = "it is no denoiser of a pipeline by itself"
_UNSEEN = "its blocks carry other sequences than images and texts"
REFUSED: dict[str, str] = {
    "AceStepTransformer1DModel": _SOUND,
    "AnyFlowFARTransformer3DModel": _CACHE,
    "BriaFibo2Transformer2DModel": "texts enter blocks that the config lists by number",
    "BriaFiboTransformer2DModel": "every block gets a projection of its own of another text layer",
    "ChromaTransformer2DModel": "its modulations come from one table that is made by depth, so a "
    "pruned model loads clean and computes wrong",
    "ConsisIDTransformer3DModel": "faces enter at every n-th block, counted by number",
    "Cosmos3OmniTransformer": _UNSEEN,
    "CosmosTransformer3DModel": "what its blocks return depends on the call",
    "DiTTransformer2DModel": "its output is modulated by the first block's embedding",
    "DreamLiteTransformer2DModel": _PART,
    "EasyAnimateTransformer3DModel": "its first blocks are of another kind, counted by number",
    "ErnieImageTransformer2DModel": "its blocks have the batch in the second dimension",
    "GlmImageTransformer2DModel": _CACHE,
    "HunyuanDiT2DModel": "skip connections join blocks of its first and its second half",
    "Kandinsky5Transformer3DModel": _UNSEEN,
    "Kandinsky6SRTransformer3DModel": _UNSEEN,
    "Kandinsky6Transformer3DModel": _UNSEEN,
    "LTX2VideoTransformer3DModel": "guidance skips blocks by number, and sound passes them too",
    "LatteTransformer3DModel": "its forward pairs blocks of two lists",
    "LongCatAudioDiTTransformer": _SOUND,
    "MiniMaxH3Transformer3DModel": _SOUND,
    "MiniMaxMusic3RVQDepthDecoder": _SOUND,
    "MiniMaxMusic3Transformer1DModel": _SOUND,
    "MotifVideoTransformer3DModel": "how a block is made depends on its number",
    "NucleusMoEImageTransformer2DModel": "which blocks are mixtures of experts goes by number",
    "PriorTransformer": "it makes embeddings, no pictures",
    "QwenImage21Transformer2DModel": _CACHE,
    "RFD4ProteinaTransformer": "it makes proteins, no pictures",
    "SanaWMLTX2RefinerTransformer3DModel": _CACHE,
    "SanaWMTransformer3DModel": "how a block is made depends on its number",
    "StableAudio3DiTModel": _SOUND,
    "StableAudioDiTModel": _SOUND,
    "T5FilmDecoder": _SOUND,
    "Transformer2DModel": _PART,
    "TransformerTemporalModel": _PART,
    "WanAnimate2Transformer3DModel": "what its forward does with block 9 goes by number",
    "WanAnimateTransformer3DModel": "faces enter at every fifth block, counted by number",
    "WanVACETransformer3DModel": "the config lists by number the blocks that control enters",
}
