"""What the ablation compares: one entry per method. Needs no torch, so that Snakefiles can read it.

All methods remove the same number of parameters and train for the same number of steps on the same
data; an entry says only what it does differently from the rest. To add a method is to add an entry
(and, for a new way to choose blocks, a function to `selections.SELECTIONS`).
"""

import json
from dataclasses import dataclass, field

from ppcl.errors import UserError
from ppcl.settings import AblationSettings

GROUPS = ("teacher", "ladder", "choice", "schedule", "latency", "rival")


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        group: of `GROUPS`. label: in the figure.
        repeated: it runs with `ablation.seeds` seeds; else with `ablation.other_seeds`.
        select: `by`, the name of a function of `selections.SELECTIONS`, and its keyword arguments.
        train: what differs from the best training: `mode` (independent | sequential: block-local |
            chain: gradients go through the chain of students), `subsets` (false: no any-subset
            phase, its steps go to distillation), `schedule` (joint | staged, of narrow blocks),
            `start`, `loss`, `outliers` (as in the config's prune and distill), `ema` (of every
            phase), and of the any-subset phase `share` (of all steps), `draw` (of
            `schedules.DRAWS`) and `mixed` (weight of Eq. 6 in it). `budgets` (true): smaller sets
            of the students are measured as well. `low_rank`: `also` measures and fine-tunes the
            trained model with low-rank modulations as well, `only` with them alone.
    """

    group: str
    label: str
    select: dict = field(default_factory=dict)
    train: dict = field(default_factory=dict)
    repeated: bool = False


def _ladder(label: str, select: dict, **train) -> Method:
    return Method("ladder", label, select, train, repeated=True)


def _choice(label: str, select: dict, **train) -> Method:
    return Method("choice", label, select, train)


def _schedule(label: str, repeated: bool = False, **train) -> Method:
    return Method("schedule", label, _OPTIMAL, train | {"budgets": True}, repeated)


# All units are plugged in at every step. With random subsets, that would happen more often to a
# method of few units, which is measured with all of them.
_AT_ONCE = {"draw": "everything"}


def _rival(label: str, by: str, repeated: bool = False, **train) -> Method:
    return Method("rival", label, {"by": by}, _AT_ONCE | {"low_rank": "also"} | train, repeated)


_SEQUENTIAL = {"mode": "sequential", "subsets": False}
_TREND = {"by": "ppcl", "segmentation": "trend", "cost": "cka"}
_OPTIMAL = {"by": "ppcl", "segmentation": "optimal", "cost": "velocity"}
_WIDTH = {"by": "depth_and_width"}


_CKA = {"reference": "end", "streams": "image", "estimator": "plain", "normalise_tokens": False}


def _cka(label: str, **similarity) -> Method:
    """CKA measured in another way, where CKA alone decides: with Eq. 5 and CKA as the cost."""
    return _choice(f"CKA: {label}", _TREND | {"similarity": _CKA | similarity})


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
        "any intervals of 4 blocks or more, by CKA",
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
    # As large as the rivals are with the same low-rank modulation put into them.
    "low-rank": _ladder(
        "+ low-rank modulation", _WIDTH | {"like": "low-rank rivals"}, low_rank="only"
    ),
    # Choices that the paper leaves open. Each is compared with `cka-default`, which prunes depth
    # alone and chooses by CKA: no cost that was measured with start `first` favours this start. The
    # last one is compared with `joint`.
    "start-middle": _choice("start: middle block", _TREND, start="middle"),
    "start-average": _choice("start: weighted average", _TREND, start="average"),
    "loss-relative": _choice("loss: relative", _TREND, loss="relative"),
    "loss-mixed": _choice("loss: normalised and relative", _TREND, loss="mixed"),
    "start-solved": _choice("start: first block, refitted", _TREND, start="solved"),
    "outliers": _choice("loss: without outliers (2 deviations)", _TREND, outliers=2.0),
    "ema": _choice("moving average (decay 0.95)", _TREND, ema=0.95),
    "cka-default": _cka("at the end, image, plain"),
    "cka-start": _cka("reference at the start", reference="start"),
    "cka-text": _cka("text stream", streams="text"),
    "cka-mean": _cka("mean of streams", streams="mean"),
    "cka-debiased": _cka("debiased", estimator="debiased"),
    "any-depth": _choice("+ width, no least depth", _WIDTH | {"depth_share": 0.0}),
    # How the steps are spent on students that are to serve every budget.
    "schedule-default": _schedule("30 % Eq. 6, 70 % any subset", repeated=True, share=0.7),
    "schedule-independent": _schedule("Eq. 6 alone", subsets=False),
    "schedule-whole": _schedule(
        "30 % Eq. 6, 70 % all plugged in", repeated=True, share=0.7, draw="everything"
    ),
    "schedule-half": _schedule("half Eq. 6, half any subset", share=0.5),
    "schedule-late": _schedule("any subset alone", share=1.0),
    "schedule-large": _schedule("as the first, more often large sets", share=0.7, draw="large"),
    "schedule-budgets": _schedule(
        "as the first, half of the sets as budgets choose", share=0.7, draw="budgets"
    ),
    "schedule-mixed": _schedule("as the first, Eq. 6 goes on (weight 0.05)", share=0.7, mixed=0.05),
    # Depth and width, as fast as rivals are.
    "latency": Method(
        "latency", "depth and width, as fast", _WIDTH | {"like": "rivals' time"}, _AT_ONCE, True
    ),
    # Other ways to choose blocks, with the training that suits a model of one size best. What they
    # draw by chance, they draw anew for every seed.
    "every-nth": _rival("every n-th block", "every_nth"),
    "random-blocks": _rival("random blocks", "random_blocks", repeated=True),
    "random-run": _rival("a random run", "random_run", repeated=True),
    "shortgpt": _rival("ShortGPT block influence", "block_influence"),
    "one-out": _rival("one block out, output error", "one_out"),
    "tinyfusion": _rival("TinyFusion learned masks (more steps)", "learned_masks", repeated=True),
    "streamline": _rival("LLM-Streamline, one run", "streamline"),
    "amber": _rival("Amber-Image (score assumed)", "over_timesteps", start="average"),
    "cka-change": _rival("CKA sensitivity", "cka_change"),
    "cka-threshold": _rival("CKA threshold", "cka_threshold"),
}


def of_group(group: str) -> list[str]:
    """Names of a group's methods, in order."""
    return [name for name, method in METHODS.items() if method.group == group]


def wanted(options: AblationSettings) -> list[str]:
    """Names of the methods to run, in order. options: the config's `ablation`.

    Raises:
        UserError: `ablation.methods` names an unknown method.
    """
    if unknown := set(options.methods) - set(METHODS):
        raise UserError(
            f"ablation.methods: there is no method '{min(unknown)}'; choose among "
            f"{', '.join(METHODS)}"
        )
    return [name for name in METHODS if name in options.methods or not options.methods]


def seeds(name: str, options: AblationSettings) -> int:
    """How many runs a method has, before further ones of the best rivals.

    options: the config's `ablation`.
    """
    if METHODS[name].group == "teacher":
        return 1
    return options.seeds if METHODS[name].repeated else options.other_seeds


def job(name: str) -> str:
    """JSON of what decides the result of a method's run: not its group, nor its label."""
    method = METHODS[name]
    return json.dumps({"name": name, "select": method.select, "train": method.train})
