"""What a run needs, worked out on the meta device: sizes, FLOPs, memory per stage, disk.

The teacher and its variants have no weights (weightless.py). Memory is that of the stages' own
steps (footprint.py). What only a device knows (its context, fragmentation) is left to `RESERVED`;
the text encoder and the autoencoder are not counted.
"""

import copy
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from ppcl.closed_forms import linear_map_candidates, linear_maps, modulation
from ppcl.closed_forms.linear_map_fits import SUMS_BYTES
from ppcl.planning import footprint, weightless
from ppcl.pruning import students
from ppcl.pruning.units import Matrix, NewBlock, Unit, new_blocks_of, units_of
from ppcl.runtime import devices
from ppcl.settings import DistillSettings, FinetuneSettings, Settings, TrainingSettings
from ppcl.training import distillation, shards, teaching
from ppcl.transformer import blocks, example_calls
from ppcl.transformer.family import Pipeline

log = logging.getLogger(__name__)

GIB = 1 << 30
# Of every GPU, for its context and what the allocator can't use.
RESERVED = 1 * GIB


@dataclass
class Stage:
    """What a stage needs on one device.

    Attributes:
        parts: bytes by what they are for; None where they can't be told.
        resident, offloaded, least: peak bytes with the whole teacher on the device, with one block
            of it at a time where the stage can (teacher.offload: stream), and so with
            gradient_checkpointing and optimizer: adamw8bit too; None if unknown.
        note: what the numbers rest on.
    """

    name: str
    parts: dict[str, float | None]
    resident: float | None
    offloaded: float | None
    least: float | None
    note: str = ""

    def fits(self, gib: float, offloaded: bool) -> bool | None:
        """Whether a GPU of this size is enough; None if unknown."""
        peak = self.offloaded if offloaded else self.resident
        return None if peak is None else peak + RESERVED <= gib * GIB


@dataclass(frozen=True)
class Shares:
    """A trained model that is shared out over processes (finetune.sharding: fsdp).

    Attributes:
        processes: their number.
        gathered: bytes that are whole on every device at once: what is not of blocks, a block
            that runs and the one fetched meanwhile, and a block's gradients.
        offloaded: whether shares rest in CPU memory.
    """

    processes: int
    gathered: int
    offloaded: bool


@dataclass
class Planner:
    """All that is asked of one teacher and its selection.

    Attributes:
        settings: the config.
        transformer: the teacher, on the meta device.
        depth, every: units of depth alone, and of the whole selection.
        ranks: of modulation matrices, as selected; None before there is a selection.
        example: (batch, dtype) -> arguments of a call; None if nothing tells its shapes.
        pipeline: how its stock pipeline calls it, if known.
    """

    settings: Settings
    transformer: nn.Module
    depth: list[Unit]
    every: list[Unit]
    example: Callable[[int, torch.dtype], dict[str, Any]] | None
    pipeline: Pipeline | None
    ranks: Mapping[Matrix, int] | None = None
    _kept: dict = field(default_factory=dict)

    @cached_property
    def variants(self) -> dict[str, tuple[nn.Module, list[list[int]]]]:
        """Name -> model in the teacher's dtype, and its block map; the last one is the smallest.

        `modulation`: with the ranks that are selected, else every matrix at the highest on offer.
        """
        chosen = {"teacher": []}
        if self.depth:
            chosen["depth"] = self.depth
        if any(part.narrow for part in new_blocks_of(self.every)):
            chosen["depth+width" if self.depth else "width"] = self.every
        ranks = {m: max(offered) for m, offered in self.matrices.items()}
        ranks = ranks if self.ranks is None else self.ranks
        found = {}
        for name, taken in chosen.items():
            made = weightless.new_blocks(self.transformer, taken)
            model, block_map = found[name] = weightless.plugged(self.transformer, made)
            if ranks:
                low = "modulation" if name == "teacher" else f"{name}+modulation"
                found[low] = weightless.low_rank(model, block_map, ranks), block_map
        return found

    @cached_property
    def matrices(self) -> dict[Matrix, list[int]]:
        """Modulation matrices that may become low rank, and the ranks on offer."""
        return weightless.matrices(self.settings, self.transformer)

    @cached_property
    def least(self) -> int:
        """Parameters of the smallest model that variants can be: with every closed form in it, if
        variants choose among all. 0 where intervals are still to be found."""
        if self.settings.intervals.enabled and not self.depth:
            return 0
        smallest = [blocks.parameter_count(model) for model, _ in self.variants.values()]
        if self.settings.choose.closed_forms:
            wanted = linear_map_candidates.ffn_candidates(self.transformer) if self.widens else []
            linear = [(unit.first, s) for unit in wanted for s in unit.new_blocks[0].linear_ffn]
            made = weightless.new_blocks(self.transformer, units_of([], linear=linear))
            model, block_map = weightless.plugged(self.transformer, made)
            ranks = {matrix: min(offered) for matrix, offered in self.matrices.items()}
            smallest.append(blocks.parameter_count(weightless.low_rank(model, block_map, ranks)))
        return min(smallest)

    @property
    def widens(self) -> bool:
        """Whether FFNs and text streams may become linear."""
        return self.settings.width.enabled

    @property
    def trains(self) -> bool:
        """Whether students are trained."""
        return bool(self.every) and self.settings.trains

    @cached_property
    def dtype(self) -> torch.dtype:
        return devices.dtype(self.settings.teacher.dtype)

    @cached_property
    def weights(self) -> int:
        """Bytes of the whole teacher."""
        return weightless.weight_bytes(self.transformer)

    @cached_property
    def offloaded(self) -> int:
        """Bytes of the teacher on the device with one block at a time: that block and the rest."""
        sizes = [weightless.weight_bytes(b.module) for b in blocks.block_sequence(self.transformer)]
        return self.weights - sum(sizes) + max(sizes)

    def flops(self, model: nn.Module) -> tuple[list[int], int] | None:
        """Of one call of a variant with a batch of one."""
        if self.example and ("flops", model) not in self._kept:
            self._kept["flops", model] = footprint.flops(model, self.example(1, self.dtype))
        return self._kept.get(("flops", model))

    def inference(self, batch: int, dtype: torch.dtype | None = None) -> int | None:
        """Activations of the teacher without gradients; dtype: what it computes in, if not its
        own."""
        if self.example is None:
            return None
        dtype = dtype or self.dtype
        if (batch, dtype) not in self._kept:
            arguments, model = self.example(batch, dtype), self.transformer
            if dtype != self.dtype:  # diffusers' own `to` would warn
                model = nn.Module.to(copy.deepcopy(model), dtype)

            @torch.no_grad()
            def run():
                return model(**arguments)

            self._kept[batch, dtype] = footprint.measured(run).peak + bytes_of(arguments)
        return self._kept[batch, dtype]

    def forget_unusable(self) -> None:
        """Does without an example call, and says so, if the transformer needs content to run."""
        if self.example is None:
            return
        try:
            self._look()
        except Exception as error:  # of many kinds: a value is asked for that is not there
            log.warning(
                "%s can't run without content (%s): no FLOPs and no memory of activations",
                type(self.transformer).__name__,
                str(error).splitlines()[0] if str(error) else type(error).__name__,
            )
            self.example = None

    @torch.no_grad()
    def _look(self) -> None:
        """Runs one call and keeps what its shapes tell: channels, bytes of streams and answer."""
        sequence = blocks.block_sequence(self.transformer)
        found: list[dict[str, int]] = [{} for _ in sequence]
        sizes: dict[int, int] = {}

        def before(block, bound):
            sizes[block.index] = bytes_of(block.inputs(bound))

        def after(block, streams):
            found[block.index] = {s: x.shape[-1] for s, x in streams.items()}

        with footprint.without_content(), blocks.watch(sequence, before, after) as run:
            output = run(self.transformer, self.example(1, self.dtype))[0]
        self._kept["channels"], self._kept["answer"] = found, bytes_of({"output": output})
        self._kept["streams"] = sizes

    @property
    def answer(self) -> int | None:
        """Bytes of a call's answer with a batch of one, once `channels` were asked for."""
        return self._kept.get("answer")

    def streams(self, block: int) -> int | None:
        """Bytes of what a block gets as streams, with a batch of one, as of `answer`."""
        return self._kept.get("streams", {}).get(block)

    # -- the stages

    def stages(self) -> list[Stage]:
        """Every stage that runs the teacher's transformer, in order."""
        if "stages" not in self._kept:
            self._kept["stages"] = list(self._stages())
        return self._kept["stages"]

    def _stages(self) -> Iterator[Stage]:
        settings = self.settings
        joined = self.pipeline is not None and self.pipeline.joined
        doubled = 2 if joined and example_calls.guided(self.pipeline, settings.pipeline) else 1
        alone = "transformer alone: text encoder and autoencoder come on top"
        yield self._still("record", settings.record.batch_size * doubled, note=alone)
        yield self._extract()
        if settings.searches_by_cost:
            yield self._priced("sensitivity", settings.sensitivity.batch_size)
        if self.widens or self.matrices:
            yield self._width(settings.width.batch_size)
        if self.trains:
            staged = self.widens and settings.width.schedule == "staged"
            yield from self._distillations(self.depth if staged else self.every)
            if staged:
                yield self._distill("narrow", self.every)
            if settings.subsets.steps:
                yield self._subsets()
        yield self._priced("choose", settings.choose.batch_size)
        if any(variant.finetune_steps for variant in settings.variants):
            yield self._finetune()
        yield self._still("evaluate", settings.evaluate.batch_size * doubled, note=alone)

    def _extract(self) -> Stage:
        """On a GPU, sums and the tokens that wait for them are in main memory, and a block's come
        to the device at a time (activations.Moments). Only where blocks are compared; sums of what
        modulations get are small beside them."""
        options, sums = self.settings.extract, sum(self.moments())
        if not sums:
            return self._still("extract", options.batch_size)
        if self.settings.device == "cpu":
            return self._still("extract", options.batch_size, statistics=sums)
        added = options.batch_size * options.moment_tokens
        widths = [
            channels
            for block in blocks.block_sequence(self.transformer)
            for channels in self.channels(block).values()
        ]
        at_once = max(8 * (3 * (d + added) * d + d * d) for d in widths)
        stage = self._still("extract", options.batch_size, statistics=at_once)
        waiting = sum(
            2 * math.ceil((d + added) / added) * _pinned(added * d * self.dtype.itemsize)
            for d in widths
        )
        stage.parts["main memory"] = sums + waiting
        return stage

    def moments(self) -> list[int]:
        """Bytes of the sums that `extract` keeps for probes, float64, of every block and stream."""
        if not self.settings.compares:
            return []
        return [
            8 * (2 * channels**2 + 2 * channels + 2)
            for block in blocks.block_sequence(self.transformer)
            for channels in self.channels(block).values()
        ]

    def channels(self, block: blocks.Block) -> dict[str, int]:
        """Stream -> channels of a block; without an example call, the transformer's least width."""
        if "channels" not in self._kept and self.example is not None:
            self._look()
        if "channels" not in self._kept:
            sequence = blocks.block_sequence(self.transformer)
            shapes = [p.shape for b in sequence for p in b.module.parameters() if p.ndim == 2]
            least = min(min(shape) for shape in shapes if min(shape) > 1)
            self._kept["channels"] = [dict.fromkeys(b.list.inputs, least) for b in sequence]
        return self._kept["channels"][block.index]

    def _priced(self, name: str, batch: int, fit: int | None = 0, statistics: int = 0) -> Stage:
        """A stage that measures changed models in float32 (prices.measure): weights of one block at
        a time, and of all that is no block.

        Args:
            fit, statistics: bytes that are there at other times: all, and what of it is sums.
        """
        sizes = [blocks.parameter_count(b.module) for b in blocks.block_sequence(self.transformer)]
        rest = blocks.parameter_count(self.transformer) - sum(sizes)
        # A student, and if its teacher's type is another one, the lifted block and the rest.
        lifted = max(sizes) + rest if self.dtype != torch.float32 else 0
        held = max(sizes) * self.dtype.itemsize + 4 * lifted
        activations = self.inference(batch, torch.float32)
        beside = None
        if activations is not None and fit is not None:
            beside = max(held + activations, fit)
        parts = {"students": held, "statistics": statistics, "activations": activations}
        return self._stage(name, parts, beside, note=f"batch {batch}, prices in float32")

    def _still(self, name: str, batch: int, note: str = "", statistics: int = 0) -> Stage:
        """A stage that trains nothing."""
        activations = self.inference(batch)
        return self._stage(
            name,
            {"statistics": statistics, "activations": activations},
            None if activations is None else statistics + activations,
            note=f"batch {batch}{'; ' if note else ''}{note}",
        )

    def _stage(
        self,
        name: str,
        parts: dict[str, float | None],
        beside: float | None,
        least: float | None = None,
        note: str = "",
    ) -> Stage:
        """beside, least: peak bytes beside the teacher's, as configured and with all savings."""
        least = beside if least is None else least
        parts = {"teacher": self.weights, "teacher offloaded": self.offloaded} | parts
        if beside is None:
            return Stage(name, parts, None, None, None, note)
        return Stage(
            name,
            parts,
            self.weights + beside,
            self.offloaded + beside,
            self.offloaded + least,
            note,
        )

    def _width(self, batch: int) -> Stage:
        """Sums of as many maps as fit in a pass, and what the teacher shows of their blocks; or the
        largest modulation, as it is taken apart; then prices."""
        shapes = [(m.inputs, m.outputs) for m in modulation.matrices(self.transformer)]
        # Moments, directions and products of the inputs; W, its basis and what it is made from.
        factored = max((8 * (3 * d * d + 3 * d * out) for d, out in shapes), default=0)
        factored = factored if self.matrices else 0
        if not self.widens:
            return self._priced("width", batch, factored, factored)
        candidates = linear_map_candidates.ffn_candidates(self.transformer)
        maps = [
            one for unit in candidates for p in unit.new_blocks for one in linear_maps.maps_of(p)
        ]
        sequence = blocks.block_sequence(self.transformer)
        texts = sum(block.width.text is not None for block in sequence)
        channels = max(max(self.channels(block).values()) for block in sequence)
        one = 4 * 8 * channels**2
        # Every block may borrow the text of one before it and end a run, in as many ways as runs
        # are long.
        wanted = len(maps) + 2 * texts * (self.settings.width.longest - 1)
        at_once = min(wanted, max(1, SUMS_BYTES // one))
        statistics = at_once * one
        activations = None
        if self.example is not None:
            parts = [NewBlock(*ends) for ends in dict.fromkeys(m.target for m in maps[:at_once])]
            arguments = self.example(batch, self.dtype)

            def run():
                return teaching.teacher_states(self.transformer, parts, arguments)

            activations = footprint.measured(run).peak + bytes_of(arguments) if parts else 0
        fit = None if activations is None else max(statistics + activations, factored)
        return self._priced("width", batch, fit, max(statistics, factored))

    def _distillations(self, units: list[Unit]) -> Iterator[Stage]:
        """One job that distills these units, or those that share them out."""
        if not units:
            return
        jobs, caching = self.jobs(units), self.caching()
        for number, job in enumerate(jobs):
            stage = self._distill("distill" if len(jobs) == 1 else f"distill/{number}", job)
            parts = new_blocks_of(job)
            start = shards.first_needed(parts) if shards.cached(job, caching) else 0
            if len(jobs) > 1 or start:
                stage.note += f"; {len(parts)} students, teacher from block {start} to"
                stage.note += (
                    f" {job[-1].last}: {shards.cost(job, caching):.4g} block passes a step"
                )
            yield stage

    def recorded(self) -> int | None:
        """Rows of calls.parquet: of every step and branch, then the renoised ones."""
        if self.pipeline is None:
            return None
        asked, options = self.settings.pipeline, self.settings.record
        steps = asked.get("num_inference_steps", self.pipeline.steps)
        branches = 2 if example_calls.guided(self.pipeline, asked) else 1
        return options.samples * branches * (steps + options.renoised_per_sample)

    def caching(self) -> shards.Caching:
        """What keeping streams at a job's first block costs, from the rows that are recorded."""
        options, rows = self.settings.distill, self.recorded()
        if rows is None or options.mode != "independent":
            return shards.NEVER
        taught = rows * (1 - self.settings.record.heldout_fraction)
        visits = options.steps * options.batch_size
        # Of so many draws, what is drawn at all.
        drawn = taught * (1 - (1 - 1 / max(2, taught)) ** visits)
        return shards.Caching(options.cache_inputs, min(1, drawn / visits))

    def jobs(self, units: list[Unit]) -> list[list[Unit]]:
        """The units of every job of distill."""
        return shards.allot(units, self.settings.distill.shards, self.caching())

    def _distill(self, name: str, units: list[Unit]) -> Stage:
        """Eq. 6: the teacher once, then one student's graph after the other."""
        options = self.settings.distill
        batch, made = (
            self._batch(options),
            weightless.new_blocks(self.transformer, units, torch.float32),
        )

        def measured(recompute: bool) -> footprint.Footprint | None:
            if self.example is None:
                return None
            dtype, times = _precision(options)
            running = {p: copy.deepcopy(m).to(dtype) for p, m in made.items()}
            for module in running.values():
                module.requires_grad_(True).train()
            arguments = self.example(batch, self.dtype)
            used = options.replace(gradient_checkpointing=recompute)

            def run():
                self._distillation_step(running, arguments, used, dtype)

            return footprint.measured(run, running.values(), times).beside(bytes_of(arguments))

        modules = list(made.values())
        largest = max(modules, key=blocks.parameter_count)
        return self._trained(name, options, batch, modules, measured, [largest])

    def _distillation_step(
        self,
        running: students.Students,
        arguments: dict,
        options: DistillSettings,
        dtype: torch.dtype,
    ) -> None:
        """A step of `distillation.independent`, on meta."""
        sequence = blocks.block_sequence(self.transformer)
        unread = blocks.family(self.transformer).unread
        lessons = teaching.teacher_states(self.transformer, list(running), arguments)
        for part, student in running.items():
            lesson = lessons.pop(part)
            if part.last == sequence[-1].index:
                lesson.target = {s: t for s, t in lesson.target.items() if s not in unread}
            lesson.bound = tree_map(lambda v: _cast(v, dtype), lesson.bound)
            returned = distillation._call(student, lesson.bound, options.gradient_checkpointing)
            output = sequence[part.first].outputs(returned)
            output = {s: output[s][..., : t.shape[-1]] for s, t in lesson.target.items()}
            loss, _ = teaching.interval_losses(output, lesson.target, {}, options)
            torch.autograd.backward(loss)

    def _subsets(self) -> Stage:
        """Any-subset distillation at its most: with all units plugged in."""
        options = self.settings.subsets
        batch, made = (
            self._batch(options),
            weightless.new_blocks(self.transformer, self.every, torch.float32),
        )

        def measured(recompute: bool) -> footprint.Footprint | None:
            dtype, times = _precision(options)
            running = {p: copy.deepcopy(m).to(dtype) for p, m in made.items()}
            for module in running.values():
                module.requires_grad_(True).train()
            wrapped = {p: distillation.InFloat32(m) for p, m in running.items()}
            model, _ = weightless.plugged(self.transformer, wrapped if times == 1 else running)
            return self._velocity(
                model, batch, self.dtype, recompute, list(running.values()), times
            )

        modules = list(made.values())
        return self._trained("subsets", options, batch, modules, measured, modules, teacher="stays")

    def _finetune(self) -> Stage:
        """All parameters of the smallest model; the record has the teacher's answers."""
        options = self.settings.finetune
        batch = self._batch(options)
        model, _ = next(reversed(self.variants.values()))
        model = nn.Module.to(copy.deepcopy(model), torch.float32)  # diffusers' own would warn

        def measured(recompute: bool) -> footprint.Footprint | None:
            dtype, times = _precision(options)
            running = nn.Module.to(copy.deepcopy(model), dtype).requires_grad_(True)
            return self._velocity(running, batch, dtype, recompute, [running], times)

        return self._trained(
            "finetune",
            options,
            batch,
            [model],
            measured,
            [model],
            teacher="absent",
            shares=self._shares(options, model),
        )

    def _shares(self, options: FinetuneSettings, model: nn.Module) -> Shares | None:
        """How `model` is shared out, if it is; with processes: auto, as with one."""
        processes = self.settings.processes
        processes = 1 if processes == "auto" else processes
        if options.sharding == "none" or (processes == 1 and not options.cpu_offload):
            return None
        counts = [blocks.parameter_count(b.module) for b in blocks.block_sequence(model)]
        whole = blocks.parameter_count(model) - sum(counts) + 3 * max(counts)
        gathered = whole * _precision(options)[0].itemsize
        return Shares(processes, gathered, options.cpu_offload)

    def _velocity(
        self,
        model: nn.Module,
        batch: int,
        dtype: torch.dtype,
        recompute: bool,
        trained: list[nn.Module],
        times: float,
    ) -> footprint.Footprint | None:
        """A step of `distillation.output_distillation`, on meta."""
        if self.example is None:
            return None
        arguments = self.example(batch, dtype)
        if recompute:
            model.enable_gradient_checkpointing()

        def run():
            output = model(**arguments)[0].float()
            torch.autograd.backward((output - torch.zeros_like(output)).square().mean())

        try:
            found = footprint.measured(run, trained, times)
        finally:
            if recompute:
                model.disable_gradient_checkpointing()
        return found.beside(bytes_of(arguments))

    def _batch(self, options: TrainingSettings) -> int:
        """Samples per device; with processes: auto, all on one."""
        processes = self.settings.processes
        return math.ceil(options.batch_size / (1 if processes == "auto" else processes))

    def _trained(
        self,
        name: str,
        options: TrainingSettings,
        batch: int,
        modules: list[nn.Module],
        measured: Callable[[bool], footprint.Footprint | None],
        cast: list[nn.Module],
        teacher: str = "streams",
        shares: Shares | None = None,
    ) -> Stage:
        """A stage that trains float32 modules with AdamW.

        Args:
            measured: with or without checkpointing -> what a step needs.
            cast: modules of which autocast keeps casts at the same time, with mixed precision.
            teacher: `streams` if it can be there a block at a time, `stays` if it can't, since
                gradients pass through it, `absent` if it is not on the device.
            shares: how the modules are shared out over processes, if they are.
        """
        count = sum(map(blocks.parameter_count, modules))
        held = sum(map(weightless.weight_bytes, modules))
        plain, again = measured(False), measured(True)
        states, small = (
            weightless.optimizer_bytes(count, kind, options.ema) for kind in ("adamw", "adamw8bit")
        )
        lowered = options.mixed_precision == "bf16"
        casts = 2 * sum(map(blocks.parameter_count, cast)) if lowered else 0
        parts = {
            "students": held,
            "casts": casts,
            "gradients": 4 * count,
            "optimizer 32-bit": states,
            "optimizer 8-bit": small,
            "activations": plain and plain.activations,
            "activations checkpointed": again and again.activations,
        }
        note = f"batch {batch}, {options.mixed_precision} mixed precision"
        note += ", checkpointed" if options.gradient_checkpointing else ""
        note += ", 8-bit AdamW" if options.optimizer == "adamw8bit" else ""
        if shares:
            parts = {
                name: value
                if value is None or "activations" in name
                else math.ceil(value / shares.processes)
                for name, value in parts.items()
            } | {"casts": 0, "gathered": shares.gathered}
            note += f", shared out over {shares.processes} processes"
            note += ", shares in CPU memory" if shares.offloaded else ""
        if plain is None:
            return self._stage(name, parts, None, note=note)
        used = again if options.gradient_checkpointing else plain
        configured = small if options.optimizer == "adamw8bit" else states
        # All gradients are there when the optimizer steps, whatever there was before.
        beside = held + configured + max(used.peak + casts, 4 * count)
        least = held + small + max(again.peak + casts, 4 * count)
        if shares:  # which 8-bit AdamW can't take
            kept = math.ceil((held + states + 4 * count) / shares.processes)
            beside = used.activations + shares.gathered + (0 if shares.offloaded else kept)
            least = again.activations + shares.gathered
        stage = self._stage(name, parts, beside, least, note)
        if teacher != "streams":
            there = self.weights if teacher == "stays" else 0
            stage.parts |= {"teacher": there, "teacher offloaded": there}
            stage.resident = stage.offloaded = there + beside
            stage.least = there + least
            stage.note += "; gradients pass through the teacher" if there else "; without teacher"
        return stage


def _precision(options: TrainingSettings) -> tuple[torch.dtype, float]:
    """What a step computes in, and how much larger gradients of float32 weights are than its."""
    return (torch.bfloat16, 2.0) if options.mixed_precision == "bf16" else (torch.float32, 1.0)


def _pinned(size: int) -> int:
    """Bytes of main memory that torch takes for so many, to which copies need not be waited for."""
    return 1 << (size - 1).bit_length()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


def bytes_of(arguments: Mapping[str, Any]) -> int:
    return sum(v.nbytes for v in tree_leaves(dict(arguments)) if isinstance(v, Tensor))
