"""config/paper.yaml is the method as published: key by key, and nothing is left unsaid."""

import yaml

from ppcl.configuration import config
from support import ROOT
from support.schema_keys import nodes

# Steps of depth, width and fine-tune as published: `paper.yaml` has them divided by one number.
STEPS = (6000, 2000, 1000)
# Key -> the paper's value, and where METHOD.md, the restated method, says so.
PAPER = {
    "probe.ridge": (0, "stage 1.1: Eq. 1 has no ridge"),
    "similarity.reference": ("end", "stage 1.2, open: the teacher's output at k (Eq. 3)"),
    "similarity.streams": ("mean", "stage 1.2, open: the mean of both streams"),
    "similarity.estimator": ("plain", "stage 1.2, open: linear CKA, feature-space form"),
    "similarity.normalise_tokens": (False, "stage 1.2, open: off"),
    "similarity.bootstrap": (0, "stage 1.2, open: the noise level of our tolerance"),
    "intervals.enabled": (True, "stage 1.2"),
    "intervals.segmentation": ("trend", "stage 1.2: Eq. 5; optimal is beyond the paper"),
    "intervals.tolerance": (0, "stage 1.2: Eq. 5 has none"),
    "intervals.cost": ("cka", "stage 1.2: predicted fidelity is cka(u, v)"),
    "intervals.cka_floor": (0, "stage 1.2, open: a floor is the selection's, not Eq. 5's"),
    "intervals.protect_first": (0, "stage 1.2, open: so is a protected set"),
    "intervals.protect_last": (0, "stage 1.2, open"),
    "intervals.require": ([], "stage 1.2: found, not typed in"),
    "intervals.forbid": ([], "stage 1.2"),
    "prune.start": ("first", "stage 1.3, open: block u [paper]"),
    "distill.loss": ("normalised", "stage 1.3, open: normalised [paper] (Eq. 6)"),
    "distill.mode": ("independent", "stage 1.3: sequential is the baseline of the ablation"),
    "distill.outliers": (0, "stage 1.3: Eq. 6 leaves nothing out"),
    "subsets.steps": (0, "stage 1.3: no phase but Eq. 6"),
    "width.enabled": (True, "stage 2"),
    "width.linear_weight": (1.0, "stage 2: L_width and L_linear added up"),
    "width.lr_scale": (1.0, "stage 2: one learning rate"),
    "width.schedule": ("staged", "stage 2, joint schedule: depth, then width"),
    "width.floor": (0, "stage 2: all of these maps train with their block"),
    "width.text.require": ([], "stage 2: candidates are found, not typed in"),
    "width.text.forbid": ([], "stage 2"),
    "width.ffn_image.require": ([], "stage 2"),
    "width.ffn_image.forbid": ([], "stage 2"),
    "width.ffn_text.require": ([], "stage 2"),
    "width.ffn_text.forbid": ([], "stage 2"),
    "distill.batch_size": (16, "stage 2, joint schedule: 8 GPUs, micro-batch 2"),
    "finetune.batch_size": (32, "stage 2, joint schedule: 8 GPUs, fine-tune 4"),
    **{
        f"{stage}.{key}": (value, f"stage 2, joint schedule: {words}")
        for stage in ("distill", "finetune")
        for key, value, words in (
            ("optimizer", "adamw", "AdamW"),
            ("betas", [0.9, 0.95], "betas 0.9/0.95"),
            ("weight_decay", 0.02, "weight decay 0.02"),
            # The one exception, of hardware: bf16 in the paper, which takes a GPU.
            ("mixed_precision", "no", "bf16 on GPUs"),
            ("gradient_checkpointing", True, "gradient checkpointing"),
            ("ema", 0, "AdamW, no average of weights"),
        )
    },
    "choose.closed_forms": (False, "pluggable variants: every subset of trained students"),
    "choose.source": ("last", "pluggable variants: trained students"),
    "choose.refit": (False, "stage 2: maps start from least squares, then train"),
    "modulation.enabled": (False, "beyond the paper: low-rank modulation"),
}
# What the paper does not tell, or what does not change the method: where and how fast it runs, what
# is measured and how often, rates that fit a teacher. Ending in a dot: a whole section.
NOT_THE_METHOD = (
    *(
        "run",
        "seed",
        "device",
        "processes",
        "teacher.",
        "pipeline",
        "forecast.",
        "record.",
        "extract.",
    ),
    *("sensitivity.", "pareto.", "evaluate.", "ablation."),
    # Without effect here: of prices that cost cka does not ask for, of switched-off parts.
    *("intervals.training_leaves", "distill.relative_weight", "modulation.", "subsets."),
    # Which text runs and FFNs there are to choose from; the paper names no limits.
    *("width.rows", "width.fit_rows", "width.batch_size", "width.longest", "width.cka_floor"),
    "width.ridge",
    *("choose.rows", "choose.batch_size"),
    *(
        f"{stage}.{key}"
        for stage in ("distill", "finetune")
        for key in ("lr", "warmup_steps", "clip_norm", "checkpoint_every", "log_every")
    ),
    *("distill.heldout_rows", "distill.shards", "distill.cache_inputs"),
    *("finetune.sharding", "finetune.cpu_offload"),
    # Without effect here: the paper's fine-tuning sees the teacher's answers alone.
    *("finetune.data", "finetune.heldout_fraction", "finetune.weights.", "finetune.weighting"),
)
# Told apart: one factor for all steps, and the budgets.
STEPS_AND_SIZES = ("distill.steps", "width.steps", "variants")


def value(settings: dict, key: str):
    for name in key.split("."):
        settings = settings[name]
    return settings


def test_paper_config_is_the_paper_key_by_key():
    written = yaml.safe_load((ROOT / "config/paper.yaml").read_text(encoding="utf-8"))
    loaded = config.load(str(ROOT / "config/paper.yaml")).given
    assert {key: value(loaded, key) for key in PAPER} == {k: v for k, (v, _) in PAPER.items()}
    # A default may change one day: what differs from it, or might, is written down.
    defaults = config.complete({}, "defaults")
    for key, (wanted, _) in PAPER.items():
        if value(defaults, key) != wanted:
            assert value(written, key) == wanted, key


def test_steps_of_the_paper_config_are_the_papers_by_one_factor():
    loaded = config.load(str(ROOT / "config/paper.yaml"))
    tuned = [v.finetune_steps for v in loaded.variants if v.finetune_steps]
    steps = loaded.distill.steps, loaded.width.steps, *tuned
    assert len(set(a / b for a, b in zip(STEPS, steps, strict=True))) == 1


def test_sizes_of_the_paper_config_are_those_of_its_three_models():
    """Parameters and blocks as shares of Qwen-Image's, as they are published."""
    budgets = {v.name: v.budget for v in config.load("config/paper.yaml").variants}
    whole, depth = 20_430_401_088, 11_934_618_688
    assert abs(budgets["p69"]["fraction"] - 14e9 / whole) < 0.005
    assert abs(budgets["p58"]["fraction"] - depth / whole) < 0.005
    assert abs(budgets["p50"]["fraction"] - 10_263_831_616 / whole) < 0.005
    assert budgets["p50"]["blocks"] == 24 * 35 / 60


def test_every_key_is_the_papers_or_none_of_its_method():
    """A key of a method of ours must be listed, with the value that turns it off."""
    leaves = [key for key, node in nodes(config.schema()) if "properties" not in node]
    for key in leaves:
        if key.startswith("variants[]"):
            continue
        places = [
            key in PAPER,
            key not in PAPER
            and any(key == n or (n.endswith(".") and key.startswith(n)) for n in NOT_THE_METHOD),
            key in STEPS_AND_SIZES,
        ]
        assert sum(places) == 1, f"{key}: is it the paper's (PAPER), or not of its method?"
    assert set(PAPER) <= set(leaves), "a key that is gone"
