"""The family registry: all that is known about a transformer class, one short entry each.

No other module asks which model it works on. An entry names the block lists in the order in which
data flows through them, and which argument and which output of a block is which stream.
`claims.verify` checks the claims numerically before anything long runs. A class without an entry is
inspected (discovery.py), unless it is among those that are known not to work: REFUSED.
"""

import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ppcl.errors import UserError

# `joint`: text and image tokens in one sequence, where the blocks before have two. Where all blocks
# have one sequence it is called `image`, text tokens or not.
IMAGE, TEXT, JOINT = "image", "text", "joint"


@dataclass(frozen=True)
class FeedForward:
    """Paths in a block of a stream's last step, h + gate * ffn(modulated(norm(h))).

    Attributes:
        norm: gets the stream after attention, h.
        modulation: a Linear of whose outputs the FFN uses some alone; None if there is no such.
        parts: from and to which of that Linear's parts, each as wide as the stream.
        after: a norm of what the FFN returns; None if there is none with weights.
    """

    norm: str
    ffn: str
    modulation: str | None = None
    parts: tuple[int, int] = (3, 6)
    after: str | None = None


@dataclass(frozen=True)
class TextPath:
    """Paths in a block of the text stream's way through the attention.

    Attributes:
        norm: makes the attention's text input from the stream, with `modulation` or by itself.
        modulation: gives that norm's shift and scale, and all gates; None if the norm does.
        extras: values that the norm returns beside its result: gates, shifts and scales.
        attention, argument: the attention, and its argument that gets that input.
        query: the projection of the attention's text queries, and their norm, which may be None.
        output: the projection of the attention's text output.
        keywords: the block's argument whose items it hands to the attention.
        others: further modules that get these items.
    """

    norm: str
    modulation: str | None
    extras: int
    attention: str
    argument: str
    query: tuple[str, str]
    output: str
    keywords: str
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Width:
    """What can be narrowed in the blocks of a list.

    Attributes:
        ffn: stream -> its FFN, which can become a linear map.
        text: None if there is no text stream that blocks could share.
    """

    ffn: dict[str, FeedForward]
    text: TextPath | None = None


@dataclass(frozen=True)
class BlockList:
    """One list of blocks of a transformer.

    Attributes:
        attribute: the ModuleList's name on the transformer.
        depth_key: the config key that holds the list's length, so that a pruned model reloads.
        inputs: stream -> the block argument that carries it.
        outputs: streams in the order in which the block returns them.
        width: what can be narrowed; None if nothing can.
        modulations: paths in a block of every Linear that maps the conditioning to shifts, scales
            and gates; none where one table serves all blocks.
    """

    attribute: str
    depth_key: str
    inputs: dict[str, str]
    outputs: tuple[str, ...]
    width: Width | None = None
    modulations: tuple[str, ...] = ()

    def layout(self) -> dict:
        """Where its blocks' parts are, as `narrow.narrow` wants it: JSON, for exported code."""
        width = self.width or Width({})
        text = width.text and asdict(width.text) | {"stream": self.inputs[TEXT]}
        return {
            "outputs": list(self.outputs),
            "ffn": {s: asdict(parts) for s, parts in width.ffn.items()},
            "text": text,
        }


# A mask of a stream's real tokens [batch, tokens], True or 1, from the transformer's arguments and
# the stream's number of tokens; None if all are real.
Mask = Callable[[dict[str, Any], int], Any]


@dataclass(frozen=True)
class Family:
    """A transformer class.

    Attributes:
        lists: its block lists in data-flow order.
        masks: stream -> what tells its real tokens from padding.
        shared: tensor arguments of the transformer that have no batch dimension.
        batch_dims: argument -> the dimension of its tensor that is the batch, if not the first.
        untouchable: (block list, index from either end) -> why that block can't be pruned.
        unread: streams that nothing reads after the last block.
        state, time: arguments with the latents and the timestep, for fresh noise.
        index_keys: config keys that list numbers of blocks.
        numbered: arguments that list numbers of blocks, which pruning would turn into others.
        per_block: config keys that list a value per block, over all lists.
        companions: ModuleLists that hold a module per block, over all lists, and then others.
        texts: tokenizers of its pipelines whose tokens are the text that it gets, not only a
            summary of it.
        framed: the text that such a tokenizer gets, up to the end of the prompt, and how many of
            its tokens don't count against the limit, where that is not the prompt and none: from
            the pipeline, the settings of its call, the tokenizer and the prompt.
        fixed: why finished pictures can't be noised again for it; empty if they can.
        last_modulation: path in the transformer of the Linear of its last AdaLN; empty without.
        guidance: what pipelines give it for a guidance of 1, where it gets that as a number.
        gated: block list -> paths in a block of Linears whose outputs streams take up element by
            element, times a gate or as they are. Those together that depend on none of each other;
            they come in the order in which they run, and nothing else of the block follows them.
        limits: what else a user should know, for the table in the docs.
    """

    lists: tuple[BlockList, ...]
    masks: dict[str, Mask] = field(default_factory=dict)
    shared: tuple[str, ...] = ()
    batch_dims: dict[str, int] = field(default_factory=dict)
    untouchable: dict[tuple[str, int], str] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    state: str = "hidden_states"
    time: str = "timestep"
    index_keys: tuple[str, ...] = ()
    numbered: tuple[str, ...] = ()
    per_block: tuple[str, ...] = ()
    companions: tuple[str, ...] = ()
    texts: tuple[str, ...] = ("tokenizer",)
    framed: Callable[[Any, Any, Any, str], tuple[str, int]] | None = None
    apart: Callable[[Any, str], int] | None = None
    fixed: str = ""
    last_modulation: str = ""
    guidance: float = 1.0
    gated: dict[str, tuple[tuple[str, ...], ...]] = field(default_factory=dict)
    limits: str = ""

    def layouts(self) -> dict[str, dict]:
        """Name of each block list -> its layout."""
        return {blocks.attribute: blocks.layout() for blocks in self.lists}


# ---- masks


def marked(argument: str) -> Mask:
    """The tokens that an argument of the transformer marks."""
    return lambda arguments, tokens: arguments.get(argument)


def _first(counts, tokens: int):
    """Mask [batch, tokens] of the first counts[i] tokens of each sample."""
    places = counts.new_ones(tokens).cumsum(0) - 1
    return places[None] < counts[:, None]


def _lumina(arguments: dict, tokens: int):
    # Each sample's text, without padding, then its image; then padding.
    text = arguments["encoder_attention_mask"].bool().sum(1)
    return _first(text + tokens - text.max(), tokens)


def _hunyuan_image(arguments: dict, tokens: int):
    # Real tokens of both encoders come first, then the padding of both.
    mask = arguments.get("encoder_attention_mask")
    second = arguments.get("encoder_attention_mask_2")
    if mask is None or second is None:
        return mask
    return _first(mask.bool().sum(1) + second.bool().sum(1), tokens)


def _z_image(arguments: dict, tokens: int):
    # Image and text, each filled up to a multiple of 32 with tokens that count, then padding.
    texts = [-(-len(text) // 32) * 32 for text in arguments["cap_feats"]]
    counts = arguments["t"].double().new_tensor(texts).long()  # bfloat16 can't hold them
    return _first(counts + tokens - counts.max(), tokens)


def _hidream(arguments: dict, tokens: int):
    # The last ones are a layer of the text encoder, which every block gets anew.
    states = arguments["encoder_hidden_states_llama3"]
    nothing = states[0, :, 0, 0].bool().long() * 0  # bfloat16 can't hold the counts
    return _first(nothing + tokens - states.shape[2], tokens)


# ---- prompts


def _instructed(pipe, settings, tokenizer, prompt: str) -> tuple[str, int]:
    return f"{settings.get('system_prompt') or pipe.system_prompt} <Prompt Start> {prompt}", 0


def _spoken(pipe, settings, tokenizer, prompt: str) -> tuple[str, int]:
    spoken: list[dict] = [{"role": "user", "content": prompt}]
    instructed = hasattr(pipe, "system_message")
    if instructed:  # in the form that processors want
        said = [("system", pipe.system_message), ("user", prompt)]
        spoken = [{"role": r, "content": [{"type": "text", "text": t}]} for r, t in said]
    whole = tokenizer.apply_chat_template(spoken, tokenize=False)
    before, _, _ = whole.rpartition(prompt)
    # That pipeline leaves it to the template to begin the text with a token of its own.
    return before + prompt, int(instructed)


def _filled(pipe, settings, tokenizer, prompt: str) -> tuple[str, int]:
    if type(pipe).__name__.startswith("QwenImageEdit"):
        return "", 0  # reads the prompt with its picture, however long they are
    before = pipe.prompt_template_encode.partition("{}")[0]
    return before + prompt, pipe.prompt_template_encode_start_idx


def _lettered(pipe, prompt: str) -> int:
    # One guider serves a whole batch: another one if any of its prompts has words in quotes.
    for base in type(pipe).__mro__:
        if found := getattr(sys.modules[base.__module__], "extract_glyph_text", None):
            return int(found(prompt) is not None)
    return 0


# ---- what many classes have in common


def single(
    stream: str,
    attribute: str,
    depth_key: str,
    width: Width | None = None,
    argument: str = "hidden_states",
    modulations: tuple[str, ...] = (),
) -> BlockList:
    """Blocks that take and return one sequence."""
    return BlockList(attribute, depth_key, {stream: argument}, (stream,), width, modulations)


def dual(
    outputs: tuple[str, ...],
    attribute: str,
    depth_key: str,
    width: Width | None = None,
    modulations: tuple[str, ...] = (),
) -> BlockList:
    """Blocks that take and return image and text as hidden_states and encoder_hidden_states."""
    inputs = {IMAGE: "hidden_states", TEXT: "encoder_hidden_states"}
    return BlockList(attribute, depth_key, inputs, outputs, width, modulations)


IMAGE_TEXT, TEXT_IMAGE = (IMAGE, TEXT), (TEXT, IMAGE)
DOUBLE = ("transformer_blocks", "num_layers")
SINGLE = ("single_transformer_blocks", "num_single_layers")

# Blocks whose norms, AdaLayerNormZero, hold their own modulation.
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

# What `Family.gated` says of many classes: of blocks with two streams, with one that attends to
# itself and then to texts, and with one linear for both branches.
_GATED = (("attn.to_out.0", "attn.to_add_out"), ("ff.net.2", "ff_context.net.2"))
_GATED_TWICE = (("attn2.to_out.0",), ("ff.net.2",))
_GATED_ONCE = (("proj_out",),)

_NO_FLOW = "its schedulers are not flow matching"
_OWN_TIME = "its pipelines count noise the other way round than their schedulers"
# Words in the names of pipelines that give a transformer more than the latents that it denoises.
_MORE_THAN_LATENTS = (
    r"Edit|Kontext|Fill|Control(?!Net)|ImageToVideo|I2V|Condition|Layered|Refiner|VisualCloze"
    r"|Framepack"
)
_GIVEN_MORE = "its transformer gets pictures, or frames that are there already, beside the latents"

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
        masks={TEXT: marked("encoder_hidden_states_mask")},
        unread=(TEXT,),
        last_modulation=_LAST,
        framed=_filled,
        limits="Qwen-Image-Edit: record.renoised_per_sample must be 0",
        gated={
            "transformer_blocks": (
                ("attn.to_out.0", "attn.to_add_out"),
                ("img_mlp.net.2", "txt_mlp.net.2"),
            )
        },
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
        framed=_spoken,
        limits="one modulation serves all blocks, so text streams can't be shared",
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
    ),
    "PixArtTransformer2DModel": Family(
        lists=(single(IMAGE, *DOUBLE, Width({IMAGE: _FFN})),),
        fixed=_NO_FLOW,
        gated={DOUBLE[0]: _GATED_TWICE},
    ),
    "SanaTransformer2DModel": Family(lists=(single(IMAGE, *DOUBLE, Width({IMAGE: _FFN})),)),
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
        masks={IMAGE: _lumina},
        framed=_instructed,
        fixed=_OWN_TIME,
        limits="the refiners, two blocks each, stay",
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
        masks={IMAGE: _z_image},
        state="x",
        time="t",
        framed=_spoken,
        fixed=_OWN_TIME,
        limits="the refiners, two blocks each, stay",
    ),
    "HunyuanImageTransformer2DModel": Family(
        lists=(
            dual(IMAGE_TEXT, *DOUBLE, Width(_ZERO_FFN), _ZERO_MODULATIONS),
            dual(IMAGE_TEXT, *SINGLE, modulations=_SINGLE_MODULATIONS),
        ),
        last_modulation=_LAST,
        masks={TEXT: _hunyuan_image},
        unread=(TEXT,),
        framed=_filled,
        apart=_lettered,
        guidance=1000.0,
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
        masks={TEXT: _hidream, JOINT: _hidream},
        batch_dims={"encoder_hidden_states_llama3": 1},
        untouchable={
            ("single_stream_blocks", -1): "its layer of the text encoder starts the text stream"
        },
        time="timesteps",
        per_block=("llama_layers",),
        companions=("caption_projection",),
        texts=("tokenizer_3", "tokenizer_4"),
        limits="FFNs are mixtures of experts, which stay",
    ),
    "WanTransformer3DModel": Family(
        lists=(single(IMAGE, "blocks", "num_layers", Width({IMAGE: FeedForward("norm3", "ffn")})),),
        limits="with two transformers, prune one run after the other (teacher.component)",
        gated={"blocks": (("attn2.to_out.0",), ("ffn.net.2",))},
    ),
    "HunyuanVideoTransformer3DModel": Family(
        lists=(
            dual(IMAGE_TEXT, *DOUBLE, Width(_ZERO_FFN), _ZERO_MODULATIONS),
            dual(IMAGE_TEXT, *SINGLE, modulations=_SINGLE_MODULATIONS),
        ),
        last_modulation=_LAST,
        masks={TEXT: marked("encoder_attention_mask")},
        unread=(TEXT,),
        guidance=1000.0,
        limits="the attention gets no keywords, so text streams can't be shared",
        gated={DOUBLE[0]: _GATED, SINGLE[0]: _GATED_ONCE},
    ),
    "LTXVideoTransformer3DModel": Family(
        lists=(single(IMAGE, *DOUBLE, Width({IMAGE: _FFN})),),
        gated={DOUBLE[0]: _GATED_TWICE},
    ),
    "CogVideoXTransformer3DModel": Family(
        lists=(dual(IMAGE_TEXT, *DOUBLE, modulations=("norm1.linear", "norm2.linear")),),
        last_modulation=_LAST,
        shared=("image_rotary_emb",),
        unread=(TEXT,),
        fixed=_NO_FLOW,
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
        masks={TEXT: marked("encoder_attention_mask")},
        untouchable={
            ("transformer_blocks", -1): "the last block has no text output (context_pre_only)"
        },
        unread=(TEXT,),
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


# Names that published indexes still have -> the key of the component's config that tells the
# class, and the classes.
_SPLIT = {
    "Transformer2DModel": (
        "norm_type",
        {
            "ada_norm_single": "PixArtTransformer2DModel",
            "ada_norm_zero": "DiTTransformer2DModel",
        },
    )
}


def was_split(class_name: str) -> bool:
    """Whether diffusers has made several classes of this one, which `today` tells apart."""
    return class_name in _SPLIT


def today(class_name: str, config: Mapping[str, Any]) -> str:
    """The name that diffusers has now for a class of an index, from its component's config."""
    key, classes = _SPLIT.get(class_name, ("", {}))
    value = config.get(key)
    return classes.get(value, class_name) if isinstance(value, str) else class_name


def family_of(class_name: str) -> Family | None:
    """The registry entry of a transformer class; None if it has none and must be inspected.

    Raises:
        UserError: the class is known not to work; says why.
    """
    if class_name in REFUSED:
        raise UserError(
            f"teacher: its transformer is a {class_name}, which can't be pruned: "
            f"{REFUSED[class_name]}. Supported: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES.get(class_name)


def fixed_states(transformer: str, pipeline: str) -> str:
    """Why finished pictures of a pipeline can't be noised again for its transformer, so that the
    config's record.renoised_per_sample must be 0; empty if they can, as far as the names tell.

    Args:
        transformer, pipeline: names of their classes.
    """
    if re.search(_MORE_THAN_LATENTS, pipeline):
        return _GIVEN_MORE
    family = FAMILIES.get(transformer)
    return family.fixed if family else ""


def table() -> str:
    """The registry as Markdown: what works on which class, and what does not and why."""
    lines = [
        "| transformer class | blocks, in order of data flow | streams | width "
        "| low-rank modulation | limits |",
        "|---|---|---|---|---|---|",
    ]
    for name, family in sorted(FAMILIES.items()):
        lists = [f"`{listed.attribute}` (`{listed.depth_key}`)" for listed in family.lists]
        streams = dict.fromkeys(", ".join(listed.inputs) for listed in family.lists)
        limits = [f"{where[0]}[{where[1]}]: {why}" for where, why in family.untouchable.items()]
        limits += [family.limits] if family.limits else []
        limits += [f"{family.fixed}: record.renoised_per_sample must be 0"] if family.fixed else []
        cells = [f"`{name}`", " + ".join(lists), "; ".join(streams)]
        cells += [_width_words(family), _modulation_words(family), "; ".join(limits)]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| refused | because |", "|---|---|"]
    lines += [f"| `{name}` | {why} |" for name, why in sorted(REFUSED.items())]
    return "\n".join(lines) + "\n"


def _width_words(family: Family) -> str:
    found = []
    for listed in family.lists:
        width = listed.width or Width({})
        found += [f"{stream} FFN" for stream in width.ffn]
        found += ["text runs"] if width.text else []
    return ", ".join(found) or "none"


def _modulation_words(family: Family) -> str:
    found = [f"`{path}`" for listed in family.lists for path in listed.modulations]
    found += [f"last `{family.last_modulation}`"] if family.last_modulation else []
    return ", ".join(dict.fromkeys(found)) or "none: one table serves all blocks"
