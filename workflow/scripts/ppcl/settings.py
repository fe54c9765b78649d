"""The config's sections as typed objects: what programs and the library read instead of mappings.

`configuration.config.load` makes them from a complete, checked config. workflow/schemas has what is
allowed, the defaults and what each key means; a test holds both to the same keys and types. One
file, and a long one, as it is a table: a new key is one line here and one in the schema.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, get_type_hints

from ppcl.errors import UserError

Ends = Sequence[int]  # [first, last] block of an interval, inclusive


@dataclass(frozen=True)
class Section:
    """Some keys of a config, as attributes.

    A program gets only the keys that its rule hands over (and so tracks for reruns). A top-level
    key that it was not given has no default: reading it raises UserError. Below the keys that it
    was given, `config.load` fills in defaults.
    """

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """A section with these keys; lists become tuples. Raises TypeError for an unknown key."""
        return object.__new__(cls).replace(**values)

    @classmethod
    def _typed(cls, key: str, value: Any) -> Any:
        kind = get_type_hints(cls)[key]
        if isinstance(kind, type) and issubclass(kind, Section):
            return value if isinstance(value, kind) else kind.of(value)
        return _tuples(value)

    def replace(self, **changes: Any) -> Self:
        """The same with some keys changed or added. Raises TypeError for an unknown key."""
        made, known = object.__new__(type(self)), {each.name for each in dataclasses.fields(self)}
        vars(made).update(vars(self))
        for key, value in changes.items():
            if key not in known:
                raise TypeError(f"{type(self).__name__} has no key '{key}'")
            object.__setattr__(made, key, self._typed(key, value))
        return made

    if not TYPE_CHECKING:  # else a type checker would accept misspelled attributes

        def __getattr__(self, key: str) -> Any:
            if key not in {each.name for each in dataclasses.fields(self)}:
                raise AttributeError(f"{type(self).__name__} has no key '{key}'")
            raise UserError(
                f"config key '{key}' was not given to this program: pass a whole config file to "
                f"--config, or add '{key}' to the keys in the params of the stage's rule"
            )


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list | tuple) else value


@dataclass(frozen=True)
class LoraSettings(Section):
    """A LoRA that is fused into the teacher's weights when they are loaded.

    fingerprint: not a key of the config. `teacher_identity.resolved` sets it for a local file, to
    tell this LoRA from any other.
    """

    path: str
    weight_name: str | None
    revision: str | None
    scale: float
    component: str | None  # None: the component that is pruned
    fingerprint: str | None

    _PLAIN: ClassVar[Mapping[str, Any]] = {
        "weight_name": None,
        "revision": None,
        "scale": 1.0,
        "component": None,
        "fingerprint": None,
    }

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """As `Section.of`, but all keys but the path have the schema's defaults."""
        return super().of({**cls._PLAIN, **values})


@dataclass(frozen=True)
class TeacherSettings(Section):
    """Where the teacher is and how it is loaded.

    scheduler: keys of its scheduler's config that are changed.
    fingerprint: not a key of the config. `teacher_identity.resolved` sets it for a local folder,
    to tell this teacher from any other.
    """

    path: str
    revision: str | None
    variant: str | None
    subfolder: str | None
    component: str
    loras: tuple[LoraSettings, ...]
    scheduler: Mapping[str, Any]
    dtype: Literal["float32", "bfloat16", "float16"]
    offload: Literal["none", "model", "stream", "auto"]
    compile: bool
    trust_remote_code: bool
    fingerprint: str | None

    _PLAIN: ClassVar[Mapping[str, Any]] = {
        "revision": None,
        "variant": None,
        "subfolder": None,
        "component": "transformer",
        "loras": (),
        "scheduler": {},
        "dtype": "float32",
        "offload": "none",
        "compile": False,
        "trust_remote_code": False,
        "fingerprint": None,
    }

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """As `Section.of`, but keys that most teachers leave out get the schema's defaults."""
        return super().of({**cls._PLAIN, **values})

    @classmethod
    def _typed(cls, key: str, value: Any) -> Any:
        if key == "loras":
            return tuple(e if isinstance(e, LoraSettings) else LoraSettings.of(e) for e in value)
        return dict(value) if key == "scheduler" else super()._typed(key, value)


@dataclass(frozen=True)
class ForecastSettings(Section):
    """What a forecast of memory, sizes and time is computed from."""

    transformer_config: str | None
    gpus: tuple[float, ...]  # GiB
    tflops: float | None  # TFLOP/s of one GPU


@dataclass(frozen=True)
class RecordSettings(Section):
    prompts: str
    samples: int
    batch_size: int
    renoised_per_sample: int
    heldout_fraction: float


@dataclass(frozen=True)
class ExtractSettings(Section):
    rows: int
    batch_size: int
    moment_tokens: int
    sample_tokens: int
    checkpoint_every: int


@dataclass(frozen=True)
class ProbeSettings(Section):
    ridge: float


@dataclass(frozen=True)
class SimilaritySettings(Section):
    reference: Literal["end", "start"]
    streams: Literal["mean", "image", "text"]
    estimator: Literal["plain", "debiased"]
    normalise_tokens: bool
    bootstrap: int


@dataclass(frozen=True)
class SensitivitySettings(Section):
    rows: int
    longest: int
    batch_size: int


@dataclass(frozen=True)
class IntervalsSettings(Section):
    enabled: bool
    segmentation: Literal["trend", "optimal"]  # auto is decided when the config is completed
    tolerance: float | Literal["bootstrap"]
    cost: Literal["velocity", "cka", "influence"]
    training_leaves: float
    cka_floor: float
    protect_first: int
    protect_last: int
    require: tuple[Ends, ...]
    forbid: tuple[Ends, ...]


@dataclass(frozen=True)
class Choices(Section):
    """Which candidates of one kind have to be pruned, and which may not be."""

    require: tuple[Any, ...]
    forbid: tuple[Any, ...]


@dataclass(frozen=True)
class WidthSettings(Section):
    """Linear maps in place of a stream's FFN, or of a run of text streams (Eq. 8 and 9)."""

    enabled: bool
    rows: int
    fit_rows: int
    batch_size: int
    longest: int
    cka_floor: float
    ridge: float
    linear_weight: float
    lr_scale: float
    schedule: Literal["joint", "staged"]
    steps: int
    floor: float
    text: Choices
    ffn_image: Choices
    ffn_text: Choices


@dataclass(frozen=True)
class ModulationSettings(Section):
    enabled: bool
    rank: int | Literal["auto"]
    ladder: tuple[int, ...]
    timesteps: int
    guidance: tuple[float, float]
    require: tuple[Any, ...]
    forbid: tuple[Any, ...]


@dataclass(frozen=True)
class PruneSettings(Section):
    start: Literal["first", "middle", "average", "solved"]


@dataclass(frozen=True)
class TrainingSettings(Section):
    """How something is trained: AdamW with linear warm-up, then a cosine down to zero."""

    steps: int
    batch_size: int
    lr: float
    warmup_steps: int
    betas: tuple[float, float]
    weight_decay: float
    optimizer: Literal["adamw", "adamw8bit"]
    clip_norm: float
    mixed_precision: Literal["no", "bf16"]
    gradient_checkpointing: bool
    ema: float
    checkpoint_every: int
    log_every: int


@dataclass(frozen=True)
class DistillSettings(TrainingSettings):
    """Stage 1.3. `linear_weight`, the weight of the linear maps' own loss, is the config's
    width.linear_weight: `Settings.of` copies it."""

    loss: Literal["normalised", "relative", "mixed"]
    relative_weight: float
    outliers: float
    heldout_rows: int
    mode: Literal["independent", "sequential", "chain"]  # chain: in the ablation alone
    shards: int | Literal["auto"]
    cache_inputs: Literal["auto", "always", "never"]
    linear_weight: float


@dataclass(frozen=True)
class SubsetsSettings(TrainingSettings):
    heldout_rows: int


@dataclass(frozen=True)
class LossWeights(Section):
    distillation: float
    pictures: float


@dataclass(frozen=True)
class FinetuneSettings(TrainingSettings):
    """Fine-tuning. `steps` are a variant's own, and `data` may be: see `for_variant`."""

    data: str | None
    heldout_fraction: float
    weights: LossWeights
    weighting: Literal["none", "logit_normal", "mode", "sigma_sqrt", "cosmap"]
    sharding: Literal["none", "fsdp"]
    cpu_offload: bool

    def for_variant(self, variant: "Variant") -> "FinetuneSettings":
        """With the steps and the data of one variant."""
        data = variant.finetune_data or self.data
        return self.replace(steps=variant.finetune_steps, data=data)


@dataclass(frozen=True)
class Variant(Section):
    """A pruned model to make.

    budget: kind -> upper limit. Kinds: fraction (of the teacher's transformer parameters),
        parameters, blocks (numbers of them), latency (as a fraction of the teacher's), gib (of
        weights as stored). A bare number in a config is a fraction of parameters. Empty with a
        parent.
    parent: the config's key `of`: the variant of which this one is a quantised copy, if it is one.
    """

    name: str
    budget: Mapping[str, float]
    train: bool
    finetune_steps: int
    parent: str | None = None
    quantise: Literal["int8", "nf4", "bnb-int8"] | None = None
    finetune_data: str | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """As of any section; keys that most variants leave out have the schema's defaults."""
        named = {"parent" if key == "of" else key: value for key, value in values.items()}
        unsaid = dict.fromkeys(("parent", "quantise", "finetune_data"))
        return super().of({"budget": {}, **unsaid, **named})

    @classmethod
    def _typed(cls, key: str, value: Any) -> Any:
        if key == "budget":
            return dict(value) if isinstance(value, Mapping) else {"fraction": value}
        return value


@dataclass(frozen=True)
class ChooseSettings(Section):
    closed_forms: bool
    source: Literal["measured", "last"]
    refit: bool
    rows: int
    batch_size: int


@dataclass(frozen=True)
class ParetoSettings(Section):
    budgets: int


@dataclass(frozen=True)
class BenchmarkSettings(Section):
    """A benchmark of the field to make pictures for."""

    name: str
    part: str | None
    prompts: str
    images_per_prompt: int | None

    @property
    def label(self) -> str:
        """What its folder and its metrics are called."""
        return f"{self.name}-{self.part}".lower() if self.part else self.name


@dataclass(frozen=True)
class EvaluateSettings(Section):
    prompts: str
    samples: int
    batch_size: int
    judge: Literal["digits", "none"]
    velocity_rows: int
    bootstrap: int
    latency_repeats: int
    benchmarks: tuple[BenchmarkSettings, ...]

    @classmethod
    def _typed(cls, key: str, value: Any) -> Any:
        if key == "benchmarks":
            kind = BenchmarkSettings
            return tuple(each if isinstance(each, kind) else kind.of(each) for each in value)
        return super()._typed(key, value)


@dataclass(frozen=True)
class AblationSettings(Section):
    methods: tuple[str, ...]
    removed_fraction: float
    distill_steps: int
    subsets_steps: int
    finetune_steps: int
    finetune_lr: float
    batch_size: int
    rank: int
    samples: int
    velocity_rows: int
    seeds: int
    other_seeds: int


@dataclass(frozen=True)
class Settings(Section):
    """A config, or the part of one that a program was given.

    Attributes:
        pipeline: keyword arguments of every call of the pipeline, as the config has them.
        given: the mapping that it was made from, for digests.
    """

    run: str
    seed: int
    device: Literal["auto", "cpu", "cuda", "mps"]
    processes: int | Literal["auto"]
    teacher: TeacherSettings
    pipeline: Mapping[str, Any]
    forecast: ForecastSettings
    record: RecordSettings
    extract: ExtractSettings
    probe: ProbeSettings
    similarity: SimilaritySettings
    sensitivity: SensitivitySettings
    intervals: IntervalsSettings
    width: WidthSettings
    modulation: ModulationSettings
    prune: PruneSettings
    distill: DistillSettings
    subsets: SubsetsSettings
    finetune: FinetuneSettings
    variants: tuple[Variant, ...]
    choose: ChooseSettings
    pareto: ParetoSettings
    evaluate: EvaluateSettings
    ablation: AblationSettings
    given: Mapping[str, Any] = field(repr=False, compare=False)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """Of a complete, checked config, or of some of its top-level keys.

        Raises TypeError for a key that no section has.
        """
        shared = dict(values)
        if "distill" in values and "linear_weight" in values.get("width", {}):
            weight = values["width"]["linear_weight"]
            shared["distill"] = {**values["distill"], "linear_weight": weight}
        return super().of({**shared, "given": values})

    @classmethod
    def _typed(cls, key: str, value: Any) -> Any:
        if key == "variants":
            return tuple(each if isinstance(each, Variant) else Variant.of(each) for each in value)
        return value if key in ("pipeline", "given") else super()._typed(key, value)

    @property
    def pruned(self) -> tuple[Variant, ...]:
        """The variants that are pruned to a budget; the others are some of these, quantised."""
        return tuple(variant for variant in self.variants if variant.parent is None)

    @property
    def compares(self) -> bool:
        """Whether blocks are compared by CKA: for intervals, or for the CKA floor of text runs."""
        runs = self.width.enabled and self.width.longest > 1 and self.width.cka_floor > 0
        return self.intervals.enabled or runs

    @property
    def searches_by_cost(self) -> bool:
        """Whether the search for intervals uses measured costs: velocity errors."""
        return self.intervals.enabled and self.intervals.cost == "velocity"

    @property
    def trains(self) -> bool:
        """Whether students of intervals are trained: some variant has `train`."""
        return self.intervals.enabled and any(variant.train for variant in self.pruned)

    @property
    def closed(self) -> bool:
        """Whether there are closed forms: linear FFNs, text runs or modulations of low rank."""
        return self.width.enabled or self.modulation.enabled

    @property
    def staged(self) -> bool:
        """Whether students are trained at full width first, and narrowed afterwards."""
        return self.trains and self.width.enabled and self.width.schedule == "staged"

    @property
    def narrowing(self) -> DistillSettings:
        """The training of narrowed students: as `distill`, but with the steps of `width`."""
        return self.distill.replace(steps=self.width.steps)

    @property
    def limited_latency(self) -> bool:
        """Whether a variant's latency is limited."""
        return any("latency" in variant.budget for variant in self.variants)

    @property
    def limited_bytes(self) -> bool:
        """Whether some variant has a budget of bytes."""
        return any("gib" in variant.budget for variant in self.pruned)
