"""The columns of every parquet file, and the list of everything a run writes.

`results/README.md` is made from this module; other programs may rely on these columns.
"""

from enum import StrEnum

import pyarrow as pa


def column(name: str, kind: pa.DataType, description: str, nan: bool = False) -> pa.Field:
    """A documented column; `nan` allows missing or non-finite values in it."""
    metadata = {"description": description} | ({"nan": "allowed"} if nan else {})
    return pa.field(name, kind, metadata=metadata)


class Verdict(StrEnum):
    """Why a candidate was selected or not: what the columns `verdict` hold."""

    REQUIRED = "required"
    CHEAPEST = "cheapest"
    FORBIDDEN = "forbidden"
    PROTECTED = "protected"
    LOW_CKA = "low_cka"
    UNMEASURED = "unmeasured"
    COSTLIER = "costlier"
    CONFLICT = "conflict"
    GONE = "gone"
    NOT_NEEDED = "not_needed"


RULED_OUT = frozenset({Verdict.FORBIDDEN, Verdict.PROTECTED, Verdict.LOW_CKA, Verdict.UNMEASURED})
"""Verdicts on candidates that selection may not use, whatever they cost."""

_VERDICT = column(
    "verdict",
    pa.string(),
    "selected: `required` by the config, or of the `cheapest` set that is enough; ruled out: "
    "`forbidden` by the config, holds a `protected` block, `low_cka` (below cka_floor) or "
    "`unmeasured`; left: `costlier` than another choice for its blocks or its matrix, in "
    "`conflict` with one, as either would cut the other, `gone` with one, or `not_needed`",
)
_REASON = column("reason", pa.string(), "the verdict in a sentence")

_STREAM = column("stream", pa.string(), "`image`, `text`, or `joint`: both in one sequence")
_CKA_STREAM = column("stream", pa.string(), "`image`, `text`, `joint` (counts for each) or `mean`")


def tokens(width: int) -> pa.Schema:
    """The token sample for streams of `width` channels; all boundaries have one order of rows."""
    return pa.schema(
        [
            column("boundary", pa.int32(), "b: the input of block b; M: the last block's output"),
            _STREAM,
            column("prompt", pa.int32(), "index of the calibration prompt"),
            column("step", pa.int32(), "index of the denoising step"),
            column("timestep", pa.float64(), "that of the call, as in calls.parquet", nan=True),
            column("token", pa.int32(), "position in the sequence"),
            column("heldout", pa.bool_(), "the prompt was kept from the probes' fit"),
            column(
                "value",
                pa.fixed_shape_tensor(pa.float32(), [width]),
                "the token's channels in the un-pruned teacher",
            ),
        ]
    )


# Tensor columns come after these, named `<argument>/<shape>/<dtype>` (transformer/call_columns.py).
CALLS = pa.schema(
    [
        column("sample", pa.int32(), "calibration sample: one prompt with one noise seed"),
        column("prompt_index", pa.int32(), "row of the prompts file, from 0"),
        column("prompt", pa.string(), "the prompt"),
        column("seed", pa.int64(), "seed of the sample's noise"),
        column("kind", pa.string(), "`pipeline`: as called; `renoised`: fresh noise and timestep"),
        column("step", pa.int32(), "denoising step; -1 for renoised"),
        column("branch", pa.int32(), "which call of the step: 0, then 1 with guidance"),
        column(
            "timestep",
            pa.float64(),
            "the timestep that the scheduler's step was at, if it was at one",
            nan=True,
        ),
        column("sigma", pa.float64(), "its noise level; NaN if the scheduler knows none", nan=True),
        column("heldout", pa.bool_(), "the prompt is kept from all fitting and training"),
        column("arguments", pa.string(), "JSON of the arguments that are not tensors"),
    ]
)

ENCODED = pa.schema(
    [
        column("sample", pa.int32(), "number of the picture, from 0"),
        column("file", pa.string(), "its path, as the config leads to it"),
        column("prompt", pa.string(), "its caption"),
        column("heldout", pa.bool_(), "kept from training; equal files are on one side"),
        column(
            "sign", pa.float64(), "1: the transformer answers noise - latents; -1: the opposite"
        ),
        column("time_at_data", pa.float64(), "the transformer's timestep without noise"),
        column("time_at_noise", pa.float64(), "and of noise alone; linear between"),
        column("noise_low", pa.float64(), "least share of noise that this transformer is for"),
        column("noise_high", pa.float64(), "and the largest"),
        column("arguments", pa.string(), "JSON of the arguments that are not tensors"),
    ]
)

BLOCK_FACTS = pa.schema(
    [
        column("block", pa.int32(), "block in the order in which data flows, from 0"),
        column("list", pa.string(), "the transformer's attribute whose list the block is in"),
        column("seam", pa.bool_(), "another kind of blocks begins; no interval reaches over it"),
        column("untouchable", pa.string(), "why it can't be pruned; empty if it can"),
        column("parameters", pa.int64(), "parameters that go with it"),
    ]
)

SIZES = pa.schema(
    [
        column("block", pa.int32(), "block; its number for the last AdaLN; -1: the transformer"),
        column(
            "part",
            pa.string(),
            "what is counted: the whole `transformer`, what goes with a `block`; what is saved if "
            "its text stream is borrowed (`text`), made again at the end of a run (`text_output`), "
            "or lent where nothing reads it afterwards (`text_lent`); if its FFN becomes linear "
            "(`ffn_image`, `ffn_text`); a `modulation` matrix",
        ),
        column("path", pa.string(), "of a modulation: where it is in its block; else empty"),
        column("parameters", pa.int64(), "parameters"),
        column("kept", pa.int64(), "bytes of weights that quantisation keeps as they are"),
        column("values", pa.int64(), "weights of matrices that are quantised, if any are"),
        column("rows", pa.int64(), "their outputs"),
        column("matrices", pa.int64(), "their number"),
        column("matrix_bytes", pa.int64(), "bytes of these weights, unquantised"),
        column("row_bytes", pa.int64(), "bytes of one weight of each output, unquantised"),
    ]
)

PROBES = pa.schema(
    [
        column("block", pa.int32(), "block in the order in which data flows, from 0"),
        _STREAM,
        column("r2_heldout", pa.float64(), "R^2 of the residual T_i(x) - x, held-out prompts"),
        column("cosine_heldout", pa.float64(), "mean cosine of probe and block output, held out"),
        column("condition_number", pa.float64(), "of X^T X before the ridge term", nan=True),
        column("tokens", pa.int64(), "tokens fitted on"),
        column("r2_fit", pa.float64(), "R^2 of the residual on the fitted tokens"),
        column("tokens_heldout", pa.int64(), "tokens judged on"),
        column("residual_norm", pa.float64(), "RMS of T_i(x) - x over RMS of x, held out"),
        column("influence", pa.float64(), "1 - mean cosine of T_i(x) and x, all sampled tokens"),
    ]
)

CKA = pa.schema(
    [
        _CKA_STREAM,
        column("start", pa.int32(), "u: the last kept block; -1 is the embeddings"),
        column("end", pa.int32(), "k: the last block that probes replace"),
        column("cka", pa.float64(), "cka(u, k), Eq. 3"),
        column("delta", pa.float64(), "Delta(u, k) = cka(u, k-1) - cka(u, k), Eq. 4"),
        column("cka_low", pa.float64(), "2.5 % of the bootstrap over prompts", nan=True),
        column("cka_high", pa.float64(), "97.5 % of the bootstrap over prompts", nan=True),
        column("delta_low", pa.float64(), "2.5 % of the bootstrap over prompts", nan=True),
        column("delta_high", pa.float64(), "97.5 % of the bootstrap over prompts", nan=True),
    ]
)

BLOCKS = pa.schema(
    [
        _STREAM,
        column("block_a", pa.int32(), "block"),
        column("block_b", pa.int32(), "block"),
        column("cka", pa.float64(), "CKA of the two blocks' outputs"),
    ]
)

SENSITIVITY = pa.schema(
    [
        column("first", pa.int32(), "first block of the run"),
        column("last", pa.int32(), "last block of the run"),
        column(
            "velocity_error",
            pa.float64(),
            "relative squared velocity error with one untrained student in the run's place",
        ),
        column("rows", pa.int64(), "recorded calls measured on"),
    ]
)


def _width(unmeasured: bool) -> list[pa.Field]:
    return [
        column(
            "kind",
            pa.string(),
            "`text`: a run on its first text stream; `ffn`: a linear FFN; `modulation`: a matrix "
            "of low rank",
        ),
        column("first", pa.int32(), "first block; the number of blocks for the last AdaLN"),
        column("last", pa.int32(), "last block"),
        column("stream", pa.string(), "`image` or `text`; empty for a modulation"),
        column("path", pa.string(), "of a modulation: where it is in its block; else empty"),
        column("rank", pa.int32(), "of a modulation; else 0"),
        column(
            "fit_error_heldout",
            pa.float64(),
            "1 - R^2 of the least-squares maps, the worst of a run, held-out prompts",
            nan=unmeasured,
        ),
        column("cka", pa.float64(), "text: least CKA of a block's text with the first's", nan=True),
        column("parameters_saved", pa.int64(), "parameters saved if no interval shares its blocks"),
        column(
            "velocity_error",
            pa.float64(),
            "relative squared velocity error of the teacher with only these maps",
            nan=unmeasured,
        ),
    ]


WIDTH_MEASURED = pa.schema(
    [*_width(unmeasured=False), column("rows", pa.int64(), "recorded calls measured on")]
)

WIDTH_CANDIDATES = pa.schema(
    [
        *_width(unmeasured=True),
        column("selected", pa.bool_(), "becomes linear"),
        _VERDICT,
        _REASON,
    ]
)

LATENCY = pa.schema(
    [
        column("block", pa.int32(), "block"),
        column("part", pa.string(), "`block`, `text`, `ffn_image` or `ffn_text`"),
        column("seconds", pa.float64(), "time per call that is saved if it goes or is linear"),
    ]
)

INTERVALS = pa.schema(
    [
        column("first", pa.int32(), "first replaced block"),
        column("last", pa.int32(), "last replaced block"),
        column("removed_blocks", pa.int32(), "last - first: one student remains"),
        column("cka", pa.float64(), "cka(first - 1, last)"),
        column("selected", pa.bool_(), "a student is trained for this interval"),
        _VERDICT,
        _REASON,
        column("source", pa.string(), "`trend` (Eq. 5) or `optimal` (the cheapest set of all)"),
        column("cost", pa.float64(), "predicted loss of fidelity (intervals.cost)", nan=True),
        column("tolerance", pa.float64(), "rise of Delta that ended the search", nan=True),
    ]
)

DISTILL_LOG = pa.schema(
    [
        column("step", pa.int64(), "optimiser steps made"),
        column("interval", pa.string(), "`first-last`, two digits each, as in 03-04"),
        _STREAM,
        column("loss_normalised", pa.float64(), "Eq. 6, one stream"),
        column("loss_relative", pa.float64(), "squared error over the target's squared norm"),
        column("loss_linear", pa.float64(), "L_linear of the block's new linear maps", nan=True),
        column("lr", pa.float64(), "learning rate"),
        column("seconds", pa.float64(), "training time so far"),
        column("loss", pa.float64(), "the loss that was trained, of all streams and maps"),
    ]
)

UNIT_COSTS = pa.schema(
    [
        column("unit", pa.string(), "first-last block, such as `03-04`"),
        column("first", pa.int32(), "first block of the unit"),
        column("last", pa.int32(), "last block of the unit"),
        column("removed_blocks", pa.int32(), "blocks that the unit saves"),
        column("saved_parameters", pa.int64(), "parameters that the unit saves"),
        column(
            "saved_seconds",
            pa.float64(),
            "time that it saves per call; NaN without a latency budget",
            nan=True,
        ),
        column(
            "velocity_error",
            pa.float64(),
            "relative squared velocity error of the teacher with only this unit, held out",
        ),
        column("rows", pa.int64(), "recorded calls measured on"),
    ]
)

VARIANT_UNITS = pa.schema(
    [
        column("variant", pa.string(), "name of the variant"),
        column(
            "kind",
            pa.string(),
            "`interval`: one student for a run of blocks, perhaps with more in it; `text`, `ffn`, "
            "`modulation`",
        ),
        column("unit", pa.string(), "first-last block of the unit that it is in, such as `03-04`"),
        column("first", pa.int32(), "first block; the number of blocks for the last AdaLN"),
        column("last", pa.int32(), "last block"),
        column("stream", pa.string(), "`image`, `text` or both; empty for a modulation"),
        column("path", pa.string(), "of a modulation: where it is in its block; else empty"),
        column("rank", pa.int32(), "of a modulation; else 0"),
        column(
            "source",
            pa.string(),
            "`closed`: least squares; `refit-<variant>`: once more, in that variant's set; "
            "`start`: untrained; or the stage that trained it: `distill`, `narrow`, `subsets`",
        ),
        column("velocity_error", pa.float64(), "of the teacher with only this, held out"),
        column("saved_parameters", pa.int64(), "parameters that it saves in this variant"),
        column("saved_seconds", pa.float64(), "time; NaN without a latency budget", nan=True),
        column("required", pa.bool_(), "the config asks for it whatever it costs"),
    ]
)

# Every set that was measured, in the order in which that was asked for.
VARIANT_SETS = pa.schema(
    [
        column("variant", pa.string(), "the variant that it was measured for"),
        column("tried", pa.string(), "what it is: sources of its units in words"),
        column("sources", pa.string(), "JSON of its trained units, name to source"),
        column("parameters", pa.int64(), "of the transformer"),
        column("predicted_error", pa.float64(), "sum of what its members cost alone, at best"),
        column("velocity_error", pa.float64(), "relative squared error to the teacher's velocity"),
        column("chosen", pa.bool_(), "the variant is this one"),
    ]
)

VELOCITY_LOG = pa.schema(
    [
        column("step", pa.int64(), "optimiser steps made"),
        column("loss", pa.float64(), "the loss that was trained"),
        column("velocity_error", pa.float64(), "relative squared error to the teacher's velocity"),
        column("lr", pa.float64(), "learning rate"),
        column("seconds", pa.float64(), "training time so far"),
    ]
)

FINETUNE_LOG = pa.schema(
    [
        *(field for field in VELOCITY_LOG if field.name != "velocity_error"),
        column(
            "velocity_error",
            pa.float64(),
            "relative squared error to the teacher's velocity; NaN with weight 0",
            nan=True,
        ),
        column(
            "picture_loss",
            pa.float64(),
            "flow-matching loss of the user's pictures (finetune.data); NaN without",
            nan=True,
        ),
        column(
            "heldout_picture_loss",
            pa.float64(),
            "that of the pictures held out, at every checkpoint; NaN otherwise",
            nan=True,
        ),
    ]
)

POINTS = pa.schema(
    [
        column("budget", pa.float64(), "fraction of the teacher's transformer parameters allowed"),
        column("units", pa.string(), "JSON of what is plugged in, as in variants/sets.json"),
        column("predicted_error", pa.float64(), "sum of what its members cost alone, at best"),
        column("parameters", pa.float64(), "of the transformer"),
        column("parameter_fraction", pa.float64(), "of the teacher's"),
        column(
            "parameter_fraction_without_modulation",
            pa.float64(),
            "of all but modulation matrices, which cost no time; NaN if there are none",
            nan=True,
        ),
        column("latency_seconds", pa.float64(), "median of one batch through the transformer"),
        column("velocity_error", pa.float64(), "relative squared error to the teacher's velocity"),
        column("velocity_error_low", pa.float64(), "2.5 % of the bootstrap by prompt", nan=True),
        column("velocity_error_high", pa.float64(), "97.5 % of the bootstrap by prompt", nan=True),
        column("latency_ratio", pa.float64(), "latency over the teacher's"),
        column("latency_ratio_low", pa.float64(), "2.5 % of the bootstrap by round", nan=True),
        column("latency_ratio_high", pa.float64(), "97.5 % of the bootstrap by round", nan=True),
    ]
)

_MEASURED = [
    column("seed", pa.int64(), "seed of the run: of its draws and batches"),
    column(
        "state",
        pa.string(),
        "`plugged`, `finetuned` after that, both with modulations of low rank (`low_rank`, "
        "`low_rank_finetuned`), or `part` of the students plugged in",
    ),
    column("removed_blocks", pa.int32(), "blocks that went"),
    column("removed_parameters", pa.int64(), "parameters that went"),
    column("parameter_fraction", pa.float64(), "of the teacher's transformer"),
    column("intervals", pa.string(), "JSON of [first, last] of every student"),
    column("text_runs", pa.string(), "JSON of [first, last] of every text run"),
    column("linear_ffns", pa.string(), "JSON of [block, stream] of every linear FFN"),
    column("steps", pa.int64(), "training steps up to this state, those of masks included"),
    column("velocity_error", pa.float64(), "relative squared error to the teacher's velocity"),
    column("velocity_error_low", pa.float64(), "2.5 % of the bootstrap by prompt", nan=True),
    column("velocity_error_high", pa.float64(), "97.5 % of the bootstrap by prompt", nan=True),
    column("digit_accuracy", pa.float64(), "share of pictures, by the judge", nan=True),
    column("digit_color_accuracy", pa.float64(), "share of pictures, by the judge", nan=True),
    column("background_color_accuracy", pa.float64(), "share of pictures, by the judge", nan=True),
    column("all_correct", pa.float64(), "share of pictures, all three right", nan=True),
    column("latency_ratio", pa.float64(), "median batch time over the teacher's", nan=True),
    column("seconds", pa.float64(), "of this job's training up to this state, one thread"),
    column("by_prompt", pa.string(), "JSON: squared errors, and norms, summed by held-out prompt"),
    column("right", pa.string(), "JSON of all pictures: 1 if all three are right; none unjudged"),
]
_METHOD = column("method", pa.string(), "name of the method (`ppcl/ablation/methods.py`)")

# One run of the ablation: a method with one seed.
ABLATION_RUN = pa.schema([_METHOD, *_MEASURED])

ABLATION = pa.schema(
    [
        _METHOD,
        column(
            "group",
            pa.string(),
            "`teacher`, `ladder`, `choice`, `schedule`, `depth`, `latency` or `rival`",
        ),
        column("label", pa.string(), "the method in words"),
        column("order", pa.int32(), "place in the figure"),
        *_MEASURED,
    ]
)

CALIBRATION = pa.schema(
    [
        column("kind", pa.string(), "`depth`, `text`, `ffn_image` or `ffn_text`"),
        column("first", pa.int32(), "first block"),
        column("last", pa.int32(), "last block"),
        column("cost_cka", pa.float64(), "1 - CKA; NaN for an FFN", nan=True),
        column("cost_probe", pa.float64(), "velocity error with composed probes", nan=True),
        column(
            "cost_untrained",
            pa.float64(),
            "velocity error with the untrained student or the least-squares maps",
        ),
        column("trained", pa.float64(), "velocity error after training"),
    ]
)

METRICS = pa.schema(
    [
        column("variant", pa.string(), "`teacher` or the variant's name"),
        column("metric", pa.string(), "name of the metric"),
        column("value", pa.float64(), "measured value"),
        column("teacher_value", pa.float64(), "the teacher's", nan=True),
        column("relative_change", pa.float64(), "value / teacher_value - 1", nan=True),
        column("higher_is_better", pa.bool_(), "direction of the metric"),
        column("samples", pa.int64(), "images, calls or repeats behind the value"),
        column("ci_low", pa.float64(), "2.5 % of the bootstrap by prompt", nan=True),
        column("ci_high", pa.float64(), "97.5 % of the bootstrap by prompt", nan=True),
    ]
)

IMAGES = pa.schema(
    [
        column("variant", pa.string(), "`teacher` or the variant's name"),
        column("prompt", pa.string(), "text of the prompt"),
        column("seed", pa.int64(), "seed of the image's noise"),
        column("png", pa.binary(), "the image, PNG bytes"),
        column(
            "read",
            pa.string(),
            "JSON of what the judge read, in words (`text`), and if right (`correct`)",
        ),
        column("prompt_index", pa.int32(), "row of the prompts file"),
        column("frames", pa.int32(), "of a video, one below the other in the image; else 1"),
        column(
            "source",
            pa.binary(),
            "of the teacher's rows: the picture that the prompt names, PNG bytes, at most 512 "
            "pixels a side; else empty",
        ),
    ]
)

# What a run needs, before it runs. One number per row; `item` says what a row is about.
FORECAST = pa.schema(
    [
        column("item", pa.string(), "`variant`, `block`, `stage`, `gpu`, `artifact` or `job`"),
        column(
            "name",
            pa.string(),
            "variant (also of a `block`), stage (also of a `gpu` or `job`), or path below "
            "`results/<run>/`",
        ),
        column("block", pa.int32(), "number of a `block` in its variant; -1 otherwise"),
        column("gpu_gib", pa.float64(), "size of a `gpu` in GiB; NaN otherwise", nan=True),
        column("measure", pa.string(), "what the value is, such as `parameters`"),
        column("value", pa.float64(), "NaN where it can't be told; `fits` is 1 or 0", nan=True),
        column(
            "unit", pa.string(), "`parameters`, `bytes`, `blocks`, `FLOPs`, `share`, `fits` or `s`"
        ),
        column("note", pa.string(), "what it rests on; may be empty"),
    ]
)

TABLES = {
    "forecast/forecast.parquet": FORECAST,
    "record/calls.parquet": CALLS,
    "record/blocks.parquet": BLOCK_FACTS,
    "record/sizes.parquet": SIZES,
    "encode/<data>.parquet": ENCODED,
    "activations/tokens.parquet": tokens(1),
    "probes/probes.parquet": PROBES,
    "similarity/cka.parquet": CKA,
    "similarity/blocks.parquet": BLOCKS,
    "sensitivity/intervals.parquet": SENSITIVITY,
    "width/measured.parquet": WIDTH_MEASURED,
    "latency/blocks.parquet": LATENCY,
    "intervals/intervals.parquet": INTERVALS,
    "width/candidates.parquet": WIDTH_CANDIDATES,
    "distill/log.parquet": DISTILL_LOG,
    "distill/unit_costs.parquet": UNIT_COSTS,
    "narrow/log.parquet": DISTILL_LOG,
    "narrow/unit_costs.parquet": UNIT_COSTS,
    "subsets/log.parquet": VELOCITY_LOG,
    "subsets/unit_costs.parquet": UNIT_COSTS,
    "variants/units.parquet": VARIANT_UNITS,
    "variants/measured.parquet": VARIANT_SETS,
    "finetune/<variant>.parquet": FINETUNE_LOG,
    "pareto/points.parquet": POINTS,
    "ablation/results.parquet": ABLATION,
    "ablation/calibration.parquet": CALIBRATION,
    "evaluation/measured.parquet": METRICS,
    "evaluation/metrics.parquet": METRICS,
    "evaluation/images.parquet": IMAGES,
}
"""Schema of every table below results/<run>/. Calls have tensor columns besides, and tokens are
shown with one channel: both follow the teacher's transformer."""

PROVENANCE = {
    "record/blocks.parquet": {"transformer_parameters": "of the whole transformer"},
    "similarity/cka.parquet": {
        "bootstrap": "number of resamples",
        "delta_noise": "JSON: stream to the noise of Delta's rise, by the bootstrap",
    },
    "width/measured.parquet": {
        "text_saved": "JSON: parameters that each block saves if it borrows its text stream",
        "text_output": "JSON: those of a map at each block that makes a text stream again",
        "text_lent": "JSON: parameters that each block saves if a run after which nothing reads "
        "text borrows from it",
        "unread": "JSON: the block after which nothing reads the text stream, or null",
        "modulations": "JSON: every matrix that conditioning passes (`units.Modulation`)",
    },
    "latency/blocks.parquet": {"transformer_seconds": "time per call of the whole transformer"},
    "encode/<data>.parquet": {"pixels": "frames x height x width of every picture"},
    "finetune/<variant>.parquet": {
        "heldout": "JSON, with finetune.data: losses on held-out calls and pictures before and "
        "after training, their weighted sum, and which weights were kept",
    },
}
"""Facts of a whole table, kept in its provenance beside those that every table has."""

ARTIFACTS = {
    "forecast/forecast.parquet": "sizes, memory and disk that a run needs (target `forecast`)",
    "forecast/resources.json": "time limits (min) and memory (MB) of jobs, from that forecast",
    "record/calls.parquet": "the transformer's own calls on the calibration prompts",
    "record/sizes.parquet": "what there is to store of each part of the teacher's blocks",
    "record/blocks.parquet": "what later stages need to know of the teacher's blocks",
    "encode/<data>.parquet": "your own pictures and captions, encoded (if finetune.data)",
    "activations/tokens.parquet": "a sample of tokens at every block boundary",
    "activations/moments.safetensors": "sums for the probes' least squares, float64, fit prompts",
    "activations/conditioning.safetensors": "sums of what modulation matrices get, float64",
    "probes/probes.parquet": "quality of the linear probe of each block and stream",
    "probes/probes.safetensors": "the probes: `<stream>.<block>.weight` and `.bias`, float64",
    "similarity/cka.parquet": "CKA of every run of probes with the teacher",
    "similarity/blocks.parquet": "CKA between the outputs of all pairs of blocks",
    "sensitivity/intervals.parquet": "what every run of blocks costs before any training",
    "width/measured.parquet": "what text runs, linear FFNs and low-rank modulations cost",
    "width/maps.safetensors": "their least-squares maps: `<kind>.<ends>.weight` and `.bias`",
    "latency/blocks.parquet": "what parts of blocks take (if a budget is a latency)",
    "intervals/intervals.parquet": "candidate intervals and the selection",
    "width/candidates.parquet": "the selection of text runs and FFNs (if width.enabled)",
    "prune/selection.json": "what each student replaces and starts from",
    "prune/students.safetensors": "start weights of the students",
    "distill/students.safetensors": "students trained one by one",
    "distill/unit_costs.parquet": "what each trained student costs, plugged into the teacher alone",
    "distill/log.parquet": "losses of the students during distillation",
    "distill/shards/": "which job owns which students; what each left, until it is joined",
    "narrow/students.safetensors": "made narrow and trained again (width.schedule: staged)",
    "narrow/unit_costs.parquet": "what each unit costs now, plugged into the teacher alone",
    "narrow/log.parquet": "losses of the narrow blocks",
    "subsets/students.safetensors": "trained in random subsets (unless subsets.steps is 0)",
    "subsets/unit_costs.parquet": "what each of them costs, plugged into the teacher alone",
    "subsets/log.parquet": "velocity error while random subsets are trained",
    "variants/sets.json": "what each variant is made of, and from which stage",
    "variants/sets/<variant>.json": "what one is built from: it changes with that one alone",
    "variants/units.parquet": "the same as a table: every member of every variant",
    "variants/measured.parquet": "errors of the sets that were tried for each variant",
    "variants/maps.safetensors": "least-squares maps that were fitted once more: `<variant>/...`",
    "finetune/<variant>.safetensors": "all weights of a fine-tuned variant",
    "finetune/<variant>.parquet": "losses during fine-tuning",
    "models/<variant>/": "a complete pipeline for `DiffusionPipeline.from_pretrained`",
    "pareto/points.parquet": "the sizes between: quality and speed without further training",
    "ablation/results.parquet": "every method at one size and training (target `ablation` only)",
    "ablation/tables.md": "the same for a reader",
    "ablation/calibration.parquet": "which price foretells an error (target `ablation` only)",
    "evaluation/measured.parquet": "quality, size and speed, as `evaluate` measured them",
    "evaluation/benchmarks/": "pictures for benchmarks, and their scores (evaluate.benchmarks)",
    "evaluation/metrics.parquet": "all metrics of teacher and variants, those of benchmarks too",
    "evaluation/images.parquet": "every image behind the metrics",
    "cards/<variant>/": "its model card with pictures, which is put into `models/<variant>/`",
    "plots/intervals/": "`search`, `heatmap`, `probes`, `width` and `modulation` (if enabled), "
    "each .svg and .png",
    "plots/training/": "`distill`, `subsets`, `finetune`, each .svg and .png",
    "plots/quality/": "`sets`, `pareto`, `tradeoff`, `images`, each .svg and .png; `width` and "
    "`modulation` of runs that search no intervals; `benchmarks`, if there are some",
    "plots/ablation/": "`ablation`, `low_rank`, `schedules`, `calibration`, .svg and .png (target "
    "`ablation`)",
    "logs/": "what every stage printed",
    "benchmarks/": "time and memory of every stage, as Snakemake measured them",
    "state/": "what stages resume from; goes when its outputs are read, or the run ends well",
}
"""Everything below results/<run>/, in the order in which it appears."""


def table() -> str:
    """The body of results/README.md: every artifact, and the columns of every table."""
    lines = ["| below `results/<run>/` | content |", "|---|---|"]
    lines += [f"| `{path}` | {content} |" for path, content in ARTIFACTS.items()]
    for path, schema in TABLES.items():
        lines += ["", f"## `{path}`", "", "| column | type | meaning |", "|---|---|---|"]
        for field in schema:
            kind = str(field.type)
            if isinstance(field.type, pa.FixedShapeTensorType):
                kind = f"fixed-shape tensor of {field.type.value_type}, [channels]"
            meaning = field.metadata[b"description"].decode()
            meaning += " (may be NaN)" if b"nan" in field.metadata else ""
            lines.append(f"| `{field.name}` | {kind} | {meaning} |")
        if path in PROVENANCE:
            lines += ["", "| in its provenance | meaning |", "|---|---|"]
            lines += [f"| `{name}` | {meaning} |" for name, meaning in PROVENANCE[path].items()]
    return "\n".join(lines) + "\n"
