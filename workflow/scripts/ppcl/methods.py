"""What the ablation compares: one entry per method. Needs no torch, so that Snakefiles can read it.

All methods remove the same number of parameters and train for the same number of steps on the same
data; an entry says only what it does differently from the rest. To add a method is to add an entry
(and, for a new way to choose blocks, a function to `ablation.SELECTIONS`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

GROUPS = ("teacher", "ladder", "choice", "rival")


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        group: of `GROUPS`. label: in the figure.
        select: `by`, the name of a function of `ablation.SELECTIONS`, and its keyword arguments.
        train: what differs from the best training: `mode` (independent | sequential: block-local |
            chain: gradients go through the chain of students), `subsets` (false: no any-subset
            phase, its steps go to distillation), `schedule` (joint | staged, of narrow blocks),
            `start` and `loss` (as in the config's prune and distill).
    """

    group: str
    label: str
    select: dict = field(default_factory=dict)
    train: dict = field(default_factory=dict)


def _ladder(label: str, select: dict, **train) -> Method:
    return Method("ladder", label, select, train)


def _choice(label: str, select: dict, **train) -> Method:
    return Method("choice", label, select, train)


def _rival(label: str, by: str, **train) -> Method:
    return Method("rival", label, {"by": by}, train)


_SEQUENTIAL = {"mode": "sequential", "subsets": False}
_TREND = {"by": "ppcl", "segmentation": "trend", "cost": "cka"}
_OPTIMAL = {"by": "ppcl", "segmentation": "optimal", "cost": "velocity"}
_WIDTH = {"by": "depth_and_width"}


def _cka(label: str, **similarity) -> Method:
    """A choice of how CKA is measured shows where CKA alone decides: Eq. 5 and its cost."""
    return _choice(f"CKA: {label}", _TREND | {"similarity": similarity})


METHODS = {
    "teacher": Method("teacher", "teacher", {"by": "nothing"}),
    # The paper's ladder, then ours; each rung keeps what the one before it has, but for the two
    # that replace Eq. 5.
    "sensitivity": _ladder("CKA sensitivity, sequential", {"by": "cka_change"}, **_SEQUENTIAL),
    "chain": _ladder(
        "gradients through the chain", {"by": "cka_change"}, mode="chain", subsets=False
    ),
    "probes": _ladder("+ linear probes (Eq. 5)", _TREND, **_SEQUENTIAL),
    "threshold": _ladder(
        "a CKA threshold instead of Eq. 5", {"by": "cka_threshold"}, **_SEQUENTIAL
    ),
    "longer": _ladder(
        "intervals of 4 blocks or more",
        {"by": "ppcl", "segmentation": "optimal", "cost": "cka", "shortest": 4},
        **_SEQUENTIAL,
    ),
    "independent": _ladder("+ non-sequential distillation", _TREND, subsets=False),
    "velocity": _ladder("+ measured costs", _TREND | {"cost": "velocity"}, subsets=False),
    "optimal": _ladder("+ optimal segmentation", _OPTIMAL, subsets=False),
    "subsets": _ladder("+ any-subset phase", _OPTIMAL),
    "text": _ladder("+ text width", _WIDTH | {"kinds": ["text"]}, schedule="staged"),
    "ffn": _ladder("+ FFN width", _WIDTH, schedule="staged"),
    "joint": _ladder("joint instead of staged", _WIDTH),
    # Choices that METHOD.md leaves open, each against `joint`, or `cka-default` for those of CKA.
    "start-middle": _choice("start: middle block", _WIDTH, start="middle"),
    "start-average": _choice("start: weighted average", _WIDTH, start="average"),
    "loss-relative": _choice("loss: relative", _WIDTH, loss="relative"),
    "loss-mixed": _choice("loss: normalised and relative", _WIDTH, loss="mixed"),
    "cka-default": _cka("at the end, image, plain", reference="end", streams="image"),
    "cka-start": _cka("reference at the start", reference="start", streams="image"),
    "cka-text": _cka("text stream", streams="text"),
    "cka-mean": _cka("mean of streams", streams="mean"),
    "cka-debiased": _cka("debiased", streams="image", estimator="debiased"),
    # Other ways to choose blocks, with the training of `subsets`: only the selection differs.
    "every-nth": _rival("every n-th block", "every_nth"),
    "random-blocks": _rival("random blocks", "random_blocks"),
    "random-run": _rival("a random run", "random_run"),
    "shortgpt": _rival("ShortGPT block influence", "block_influence"),
    "one-out": _rival("one block out (FLUX.1 Lite)", "one_out"),
    "tinyfusion": _rival("TinyFusion learned masks", "learned_masks"),
    "streamline": _rival("LLM-Streamline, one run", "streamline"),
    "amber": _rival("Amber-Image", "over_timesteps", start="average"),
    "cka-change": _rival("CKA sensitivity", "cka_change"),
    "cka-threshold": _rival("CKA threshold", "cka_threshold"),
}


def of_group(group: str) -> list[str]:
    """Names of a group's methods, in order."""
    return [name for name, method in METHODS.items() if method.group == group]


def job(name: str) -> str:
    """JSON of what decides the result of a method's run: not its group, nor its label."""
    method = METHODS[name]
    return json.dumps({"name": name, "select": method.select, "train": method.train})


def phases(select: Mapping, train: Mapping, options: Mapping) -> dict[str, int]:
    """Steps of each phase of a method; their sum is the same for all.

    Learning masks takes half of the any-subset phase. A staged schedule spends a quarter of
    distillation on narrow blocks, as the paper does (6000 and 2000 steps).

    Args:
        options: the config's `ablation`.
    """
    distill, subsets = options["distill_steps"], options["subsets_steps"]
    masks = subsets // 2 if select["by"] == "learned_masks" else 0
    subsets -= masks
    if not train.get("subsets", True):
        distill, subsets = distill + subsets, 0
    staged = train.get("schedule") == "staged" and select["by"] == "depth_and_width"
    narrow = distill // 4 if staged else 0
    return {"masks": masks, "distill": distill - narrow, "narrow": narrow, "subsets": subsets}
