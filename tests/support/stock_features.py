"""What diffusers can do with a pipeline, and on which models it works: the rows of the table in
docs/after-pruning.md and of tests/unit/test_stock_features.py."""

from collections.abc import Iterator
from dataclasses import dataclass

KINDS = ("teacher", "depth", "narrow")
FAMILIES = {"qwen": "Qwen-Image", "small": "Qwen-Image", "flux": "FLUX", "sd3": "SD3", "wan": "Wan"}
# Qwen-Image's is the embedded teacher; a small one where it would take long.
QWEN, SMALL, ALL = ("qwen",), ("small",), ("qwen", "flux", "sd3", "wan")


@dataclass(frozen=True)
class Refusal:
    """Why something does not work.

    Attributes:
        reason: as the table says it.
        match: what is raised, as a regular expression.
        families: of whose models it holds; all if empty.
        kinds: of models that it holds for.
    """

    reason: str
    match: str
    families: tuple[str, ...] = ()
    kinds: tuple[str, ...] = KINDS


@dataclass(frozen=True)
class Feature:
    """A row of the table.

    Attributes:
        title: what the table calls it.
        families: on whose pipelines it is tried.
        refusals: where it does not work.
        kinds: models for which it means something.
        note: what the table says besides.
        package: what it needs that this repository does not install.
    """

    title: str
    families: tuple[str, ...] = ALL
    refusals: tuple[Refusal, ...] = ()
    kinds: tuple[str, ...] = KINDS
    note: str = ""
    package: str = ""

    def refusal(self, family: str, kind: str) -> Refusal | None:
        """Why it does not work on a kind of model of a family; None if it does."""
        for one in self.refusals:
            if kind in one.kinds and family in (one.families or self.families):
                return one
        return None


_NO_CACHE = Refusal("SD3's class has no caches", "no attribute 'enable_cache'", ("sd3",))
_SWAPPED = Refusal(
    "diffusers gives the streams of a skipped block back in another order than blocks of two "
    "streams do",
    "Tensor-likes are not|must match the size|attribute 'shape'|cannot be multiplied|expected",
    ("qwen", "flux", "sd3"),
)
_VARIANTS = ("depth", "narrow")

SECTIONS: dict[str, dict[str, Feature]] = {
    "Loading": {
        "pipeline": Feature(
            "`DiffusionPipeline.from_pretrained(folder)`",
            note="narrow: with `trust_remote_code=True`",
        ),
        "folder_alone": Feature(
            '`AutoModel.from_pretrained(folder + "/transformer")`',
            note="narrow: with `trust_remote_code=True`",
        ),
        "subfolder": Feature(
            '`AutoModel.from_pretrained(folder, subfolder="transformer")`',
            QWEN,
            (
                Refusal(
                    "diffusers looks for the code in the pipeline's index, not in the "
                    "transformer's config; name the folder `transformer` itself",
                    "does not appear to have any custom code",
                    kinds=("narrow",),
                ),
            ),
        ),
        "stock_class": Feature(
            "the stock class's `from_pretrained`",
            QWEN,
            (
                Refusal(
                    "its blocks have other weights; where all shapes fit, it only warns of weights "
                    "that are *newly initialized*",
                    "expected shape",
                    kinds=("narrow",),
                ),
            ),
        ),
        "from_config": Feature("`from_config`", QWEN),
        "plain_loading": Feature("`low_cpu_mem_usage=False`", QWEN),
        "device_map": Feature('`device_map="auto"`', QWEN),
        "quantised": Feature(
            "`PipelineQuantizationConfig`, `TorchAoConfig` (int8 weights)", QWEN, package="torchao"
        ),
        "quantised_bnb": Feature(
            "`BitsAndBytesConfig`",
            QWEN,
            (Refusal("diffusers wants a GPU for it", "No GPU found"),),
            package="bitsandbytes",
        ),
    },
    "Saving": {
        "save_again": Feature("`pipe.save_pretrained`, loaded again"),
        "keeps_block_map": Feature(
            "… keeps the block map and what pruning.json tells, in the transformer's config "
            "(`_block_map`, `_pruning`)",
            QWEN,
            kinds=_VARIANTS,
        ),
        "keeps_files": Feature(
            "… keeps block_map.json, pruning.json and the card as files, beside the weights",
            QWEN,
            (
                Refusal(
                    "the class is stock and saves weights and config alone; the row above is "
                    "what is left, and `remap_lora.py` reads it",
                    "block_map.json",
                    kinds=("depth",),
                ),
            ),
            kinds=_VARIANTS,
        ),
        "shards": Feature("`max_shard_size`", QWEN),
        "precision_variant": Feature('`variant="fp16"`', QWEN),
        "ema": Feature("`EMAModel`, saved and loaded", QWEN),
        "copied": Feature("`copy.deepcopy`"),
        "pickled": Feature("pickle, `torch.save`"),
        "pickled_elsewhere": Feature(
            "… loaded in another process",
            QWEN,
            note="narrow: diffusers' folder of modules has to be on its path",
        ),
    },
    "Other pipelines": {
        "from_pipe": Feature("`from_pipe` of an image-to-image or video-to-video pipeline"),
        "auto_pipe": Feature("`AutoPipelineForImage2Image.from_pipe`", QWEN),
        "control": Feature(
            "`from_transformer` of ControlNets",
            ("qwen", "flux", "sd3"),
            note="narrow: without the linear maps, which stock blocks have no place for",
        ),
        "lora": Feature("LoRA: load, `set_adapters`, unload"),
        "lora_fused": Feature("LoRA: fuse, unfuse"),
    },
    "Running and training": {
        "exported": Feature("`torch.export`", SMALL),
        "compiled": Feature("`torch.compile` of the whole model, `fullgraph=True`", SMALL),
        "compiled_blocks": Feature("`compile_repeated_blocks`", SMALL),
        "checkpointed": Feature("`enable_gradient_checkpointing`"),
        "half": Feature("`to(torch.bfloat16)`"),
        "cast_layerwise": Feature("`enable_layerwise_casting`"),
        "offloaded_groups": Feature("`enable_group_offload`, by blocks and by layers"),
        "offloaded_model": Feature(
            "`enable_model_cpu_offload`",
            QWEN,
            (Refusal("it needs a GPU; not tried", "requires accelerator"),),
        ),
        "attention": Feature("attention processors and backends, set and reset"),
        "fused_qkv": Feature(
            "`fuse_qkv_projections` and back",
            refusals=(
                Refusal(
                    "SD3's fused processor wants texts in every attention",
                    "'NoneType' object has no attribute 'ndim'",
                    ("sd3",),
                ),
            ),
            note="Qwen-Image's attention is left as it is",
        ),
    },
    "Caches": {
        "first_block_cache": Feature("FirstBlockCache", refusals=(_NO_CACHE,)),
        "mag_cache": Feature("MagCache", refusals=(_NO_CACHE,)),
        "sea_cache": Feature(
            "SeaCache", refusals=(_NO_CACHE,), note="with a `raw_vision_callback`"
        ),
        "taylor_cache": Feature("TaylorSeer", refusals=(_NO_CACHE,)),
        "attention_broadcast": Feature("Pyramid Attention Broadcast", refusals=(_NO_CACHE,)),
        "layer_skip": Feature("`apply_layer_skip`, whole blocks", refusals=(_SWAPPED,)),
    },
}
FEATURES = {name: row for rows in SECTIONS.values() for name, row in rows.items()}


def _cell(feature: Feature, kind: str) -> str:
    if kind not in feature.kinds:
        return ""
    if feature.package:
        works, fails = f"yes, with {feature.package}", f"no, with {feature.package}"
    else:
        works, fails = "yes", "no"
    refused = [f for f in feature.families if feature.refusal(f, kind)]
    if not refused:
        return works
    if len(refused) == len(feature.families):
        return fails
    return f"not {', '.join(FAMILIES[family] for family in refused)}"


def _rows() -> Iterator[str]:
    for section, rows in SECTIONS.items():
        yield f"| **{section}** | | | | | |"
        for feature in rows.values():
            cells = [_cell(feature, kind) for kind in KINDS]
            tried = ", ".join(dict.fromkeys(FAMILIES[family] for family in feature.families))
            notes = "; ".join(
                [one.reason for one in feature.refusals] + [feature.note] * bool(feature.note)
            )
            yield "| " + " | ".join([feature.title, *cells, tried, notes]) + " |"


def table() -> str:
    """The table of docs/after-pruning.md."""
    head = ["what diffusers does", *KINDS, "tried on", "note"]
    return "\n".join(["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *_rows()]) + "\n"
