"""What a stage reads is what was written: one flipped byte, anywhere, is refused by name."""

import random
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils._pytree import tree_leaves

from ppcl.errors import UserError
from ppcl.figures import catalogue
from ppcl.storage import schemas, seals, tables, tensors, texts
from ppcl.transformer import calls
from support import ROOT, tiny, tiny_run
from support.artifacts import content
from support.tiny_run import BLOCK_FACTS, NAMED, SELECTION, STAGES, Stage

READ_FIRST = {
    "calls.parquet": ("prompt", "heldout", "arguments"),
    "tokens.parquet": ("stream", "boundary"),
}
# Read by people, and by Snakemake (test_dag.py).
ENDS = {"forecast.parquet", "figures", "resources.json", "measured.parquet"}
APART = ("evaluate", "gather_metrics", "describe")
RUN = [stage for stage in STAGES if stage.program not in APART]
# What stages read with other configs, in groups of figures, and as shards.
TABLES = {
    "measured-metrics.parquet": schemas.METRICS,
    "metrics.parquet": schemas.METRICS,
    "images.parquet": schemas.IMAGES,
    "results.parquet": schemas.ABLATION,
    "calibration.parquet": schemas.CALIBRATION,
}
LATENCY = {"latency": "latency.parquet"}
LOGS = {"distill_log": "distill-log.parquet", "subsets_log": "subsets-log.parquet"}
QUALITY = {"metrics": "metrics.parquet", "images": "images.parquet", "points": "points.parquet"}
QUALITY |= {"units": "units.parquet", "measured": "width.parquet"}
QUALITY |= BLOCK_FACTS
JOINED = {"logs": "distill-log.parquet", "costs": "distill-unit_costs.parquet"}
MORE = [
    Stage("intervals", NAMED["intervals"].reads | LATENCY, NAMED["intervals"].writes),
    Stage("prune", NAMED["prune"].reads | LATENCY, NAMED["prune"].writes),
    Stage("assign_shards", SELECTION, {"shards": "shards.json"}),
    Stage(
        "distill",
        NAMED["distill"].reads | {"shards": "shards.json"},
        NAMED["distill"].writes,
        state=True,
    ),
    Stage(
        "join_shards",
        JOINED | {"selection": "selection.json", "students": "distill.safetensors"},
        NAMED["distill"].writes,
    ),
    Stage(
        "plot", LOGS | {"finetune_logs": "small-log.parquet"}, {"output": "f"}, group=("training",)
    ),
    Stage("benchmark_pictures", {"model": "small"}, {"manifest": "p50.json"}),
    Stage("plot", QUALITY, {"output": "f"}, group=("quality",)),
    Stage("plot", {"results": "results.parquet"}, {"output": "f"}, group=("ablation",)),
    Stage("plot", {"calibration": "calibration.parquet"}, {"output": "f"}, group=("ablation",)),
    Stage(
        "intervals",
        NAMED["intervals"].reads | {"probes": "probes.parquet"},
        NAMED["intervals"].writes,
    ),
]
# Read by the figures alone, all by tables.read.
DRAWN = {"probes.parquet", "points.parquet", "units.parquet"} | {
    f"{name}-log.parquet" for name in ("distill", "narrow", "subsets", "small")
}


@pytest.fixture(scope="module")
def finished(tiny_teacher, tmp_path_factory):
    """The folder of a run, up to its evaluation, and its settings."""
    folder = tmp_path_factory.mktemp("sealed")
    settings = tiny_run.settings(tiny_teacher, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "ppcl.export.assembly.prove", lambda *_: None
        )  # test_assembly has the reload gate
        for stage in RUN:
            tiny.stage(stage.program, settings, *stage.group, **stage.paths(folder))
        tiny.stage("assign_shards", settings, **MORE[2].paths(folder))
    for name, schema in TABLES.items():
        tables.write(folder / name, one_row(schema), schema, {})
    return folder, settings


def one_row(schema):
    """A table of a schema that says nothing."""
    values = {"string": "x", "binary": b"x", "bool": False}
    return pa.table(
        {f.name: pa.array([values.get(str(f.type), 1)]).cast(f.type) for f in schema}, schema
    )


def flip(path, generator, places=None):
    """Changes one random bit of a file, at one of some places; returns what it held."""
    content = path.read_bytes()
    changed = bytearray(content)
    changed[generator.choice(places or range(len(content)))] ^= 1 << generator.randrange(8)
    path.write_bytes(changed)
    return content


def read_by_all(path):
    """Places that every stage reads of files that are otherwise read in parts."""
    if path.name not in READ_FIRST:
        return None
    file, size = pq.ParquetFile(path), path.stat().st_size
    places = list(range(size - file.metadata.serialized_size - 8, size))
    for group in range(file.metadata.num_row_groups):
        for column in range(file.metadata.num_columns):
            chunk = file.metadata.row_group(group).column(column)
            if chunk.path_in_schema in READ_FIRST[path.name]:
                start = chunk.dictionary_page_offset or chunk.data_page_offset
                places += range(start, start + chunk.total_compressed_size)
    return places


def readers():
    """(stage, option, artifact) of everything that is read."""
    seen = set()
    for stage in (*STAGES, *MORE):
        for option, artifact in stage.reads.items():
            if (one := (stage.program, stage.group, option)) not in seen:
                seen.add(one)
                yield stage, option, artifact


def handed_over():
    """(program, option) of all that rules hand to their programs."""
    pairs = set()
    common = (ROOT / "workflow/rules/common/commands.smk").read_text()
    trains_students = re.search(r"^TRAINS_STUDENTS = \[\n.*?^\]", common, re.M | re.S)[0]
    lists = dict(re.findall(r"^([A-Z]+) = \[([^]]*)\]$", common, re.M))
    for file in (ROOT / "workflow/rules").glob("*.smk"):
        # Some rules are of a condition, and so further in.
        for rule in re.split(r"\n +input:\n", file.read_text())[1:]:
            program = re.search(r'(?:script=program|launched)\("(\w+)\.py"\)', rule)[1]
            options = re.findall(r"--([a-z-]+) \{+input\.", rule)
            if "*TRAINS_STUDENTS" in rule:
                rule += trains_students
            given = re.findall(r'"(?:(\w+)=)?input\.(\w+)"', rule)
            options += [option or name for option, name in given]
            for group in re.findall(r"optional\(\*figure_tables\(\"(\w+)\"\)\)", rule):
                options += [name for entry in catalogue.of_group(group) for name in entry.tables]
            for names in re.findall(r"optional\(((?!\*figure_tables)[^)]+)\)", rule):
                names = re.sub(r"\*([A-Z]+)", lambda m: lists[m[1]], names)
                options += re.findall(r"\w+", names)
            pairs |= {(program, option.replace("-", "_")) for option in options}
    return pairs


def test_whatever_a_rule_hands_over_is_damaged_here():
    damaged = {(stage.program, option) for stage, option, _ in readers()}
    pairs = handed_over()
    assert len(pairs) > 50 and damaged <= pairs
    # The rest are a config, and tables of the ablation, as are those of its rules' SHARED; and what
    # needs torchao, which tests/stages/test_quantised.py has.
    rest = {("train_teacher", "config"), ("gather_ablation", "runs")}
    assert pairs - damaged == rest | {("quantise", "calls"), ("quantise", "model")}


def test_every_artifact_has_a_reader_here():
    made = {artifact for stage in RUN for artifact in stage.writes.values()}
    unread = made - {artifact for stage in STAGES for artifact in stage.reads.values()}
    assert unread - DRAWN == ENDS


# Students of stages that no variant takes any of are not opened.
UNTAKEN = {
    (program, source)
    for program in ("finetune", "assemble", "pareto")
    for source in ("start", "distill", "narrow")
} | {("pareto", "subsets")}


@pytest.mark.parametrize(
    ("stage", "option", "artifact"),
    [
        pytest.param(*r, id=f"{r[0].program}-{r[1]}")
        for r in readers()
        if r[2] != "small" and (r[0].program, r[1]) not in UNTAKEN
    ],
)
def test_a_flipped_byte_is_refused_by_the_stage_that_reads_it(
    finished, tmp_path, capsys, stage, option, artifact
):
    folder, settings = finished
    if option == "latency":
        settings = settings | {"variants": [{"name": "small", "budget": {"latency": 0.99}}]}
    if (stage.program, option) == ("intervals", "probes"):
        settings = settings | {"intervals": settings["intervals"] | {"cost": "influence"}}
    paths = stage.paths(folder)
    for name in stage.writes:
        paths[name] = tmp_path / "out" / name  # what is there stays
    paths |= {"state": tmp_path / "state"} if stage.state else {}
    where = read_by_all(folder / artifact)
    content = flip(folder / artifact, random.Random(artifact + stage.program), where)
    try:
        with pytest.raises(SystemExit) as stopped:
            tiny.stage(stage.program, settings, *stage.group, **paths)
    finally:
        (folder / artifact).write_bytes(content)
    printed = capsys.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in printed
    assert f"error: {folder / artifact}" in printed and "delete it and rerun" in printed
    assert not (tmp_path / "out").exists()


def computes(*_given, **_more):
    raise AssertionError("computed again")


@pytest.mark.parametrize("stage", [stage for stage in RUN if stage.state], ids=lambda s: s.program)
def test_a_stage_whose_outputs_are_lost_ends_at_once_with_the_same(
    finished, tmp_path, monkeypatch, stage
):
    """As after SIGKILL to Snakemake, which then deletes what it had not taken yet."""
    folder, settings = finished
    paths = stage.paths(folder)
    files = [path for path in paths["state"].rglob("*") if path.is_file()]
    kept = {path: path.stat().st_mtime_ns for path in files}
    paths |= {name: tmp_path / path for name, path in stage.writes.items()}
    for work in (
        "training.loop._one_step",
        "training.prices.Judged.error",
        "training.prices.Judged.errors",
        "closed_forms.linear_map_fits._fit",
        "teacher.recording.record_batch",
        "extraction.call_tokens.pick_tokens",
        "teacher.pipelines.run",
    ):
        monkeypatch.setattr(f"ppcl.{work}", computes)
    tiny.stage(stage.program, settings, **paths)
    for path in stage.writes.values():
        assert content(tmp_path / path) == content(folder / path)
    assert kept and kept == {path: path.stat().st_mtime_ns for path in kept}


RESUMING = [pytest.param(stage, id=stage.program) for stage in RUN if stage.state]


@pytest.mark.parametrize("stage", RESUMING)
def test_a_flipped_byte_in_what_a_stage_resumes_from_is_refused(finished, tmp_path, capsys, stage):
    folder, settings = finished
    paths = stage.paths(folder)
    state = shutil.copytree(paths["state"], tmp_path / "state")
    paths |= {name: tmp_path / "out" / name for name in stage.writes} | {"state": state}
    # One of each kind; kept streams (test_input_cache.py) and maps are made again instead.
    every = [file for file in state.rglob("*.*") if not file.name.startswith("maps-")]
    files = {file.parent: file for file in every if file.parent.name != "inputs"}
    assert files
    for path in files.values():
        content = flip(path, random.Random(path.name))
        with pytest.raises(SystemExit) as stopped:
            tiny.stage(stage.program, settings, **paths)
        path.write_bytes(content)
        printed = capsys.readouterr().err
        assert stopped.value.code == 2 and "Traceback" not in printed
        assert f"error: {path} is not what was written; delete it" in printed, path
    assert not (tmp_path / "out").exists()


def test_a_flipped_byte_in_any_file_of_a_model_is_refused(finished, capsys):
    folder, settings = finished
    files = [path for path in (folder / "small").rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        content = flip(path, random.Random(path.name))
        with pytest.raises(SystemExit):
            tiny.stage("evaluate", settings, **NAMED["evaluate"].paths(folder))
        printed = capsys.readouterr().err
        assert f"error: {path} is not what was written; delete" in printed and "rerun" in printed
        path.unlink()
        if path.name not in ("pruning.json", "model_index.json"):
            with pytest.raises(SystemExit):
                tiny.stage("evaluate", settings, **NAMED["evaluate"].paths(folder))
            assert path.name in capsys.readouterr().err
        path.write_bytes(content)


def read_all(path):
    """What a reader of this kind of file reads, as a whole."""
    if path.suffix == ".safetensors":
        return tensors.read(path)
    if path.suffix == ".json":
        return texts.read_sealed(path)
    if path.name == "calls.parquet":
        reader = calls.Reader(path)
        return [reader.batch(np.array([row])) for row in range(len(reader))]
    return tables.read(path)


def unread(path):
    """Places of a file that its reader has no use for: of recorded calls, columns of tensors of
    other shapes, in a row group of which the footer says that they hold nothing there."""
    if path.name != "calls.parquet":
        return set()
    places, metadata = set(), pq.ParquetFile(path).metadata
    for group in range(metadata.num_row_groups):
        for column in range(metadata.num_columns):
            chunk = metadata.row_group(group).column(column)
            if chunk.statistics and chunk.statistics.null_count == chunk.num_values:
                start = chunk.dictionary_page_offset or chunk.data_page_offset
                places |= set(range(start, start + chunk.total_compressed_size))
    return places


def same(one, other):
    """Whether two batches of recorded calls hold the same."""
    pairs = zip(*(tree_leaves([b.arguments, b.output, b.rows]) for b in (one, other)), strict=True)
    return all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else np.array_equal(a, b) for a, b in pairs
    )


def test_no_byte_of_any_artifact_goes_unnoticed(finished, tmp_path):
    """Many flips, of readers alone: they are what every stage reads by. What one of them passes
    over changes nothing that it reads, and is refused when the table is read as a whole."""
    folder, _ = finished
    generator, count = random.Random(0), 0
    for path in sorted(path for path in folder.iterdir() if path.suffix in (".parquet", ".json")):
        copy = shutil.copy(path, tmp_path)
        whole, passed_over = read_all(tmp_path / path.name), unread(path)
        places = [None] * 30 + [list(passed_over)] * (5 if passed_over else 0)
        for place in places:
            content = flip(tmp_path / path.name, generator, place)
            changed = (tmp_path / path.name).read_bytes()
            (at,) = (i for i, (a, b) in enumerate(zip(content, changed, strict=True)) if a != b)
            read = read_all
            if at in passed_over:
                read = tables.read
                for reread, batch in zip(read_all(tmp_path / path.name), whole, strict=True):
                    assert same(reread, batch)
            with pytest.raises(UserError) as refused:
                read(tmp_path / path.name)
            assert str(copy) in str(refused.value) and "delete it and rerun" in str(refused.value)
            (tmp_path / path.name).write_bytes(content)
            count += 1
    print(f"{count} flipped bits, all refused")


def test_every_byte_of_small_files_is_covered(tmp_path):
    schema = pa.schema([schemas.column("a", pa.int32(), "a"), schemas.column("b", pa.string(), "")])
    with tables.writer(tmp_path / "t.parquet", schema, {"seed": "0"}) as out:
        out.write(pa.table({"a": [1, 2], "b": ["x", "y"]}))
        out.write(pa.table({"a": [3], "b": ["z"]}))
    tensors.write(tmp_path / "t.safetensors", {"w": torch.arange(5.0)}, {"identity": "x"})
    texts.write_sealed(tmp_path / "t.json", {"blocks": 3, "units": ["00-01"]})
    for path in sorted(tmp_path.iterdir()):
        content = path.read_bytes()
        for place in range(len(content)):
            before, byte, after = content[:place], content[place], content[place + 1 :]
            changed = [bytes([byte ^ mask]) for mask in (1, 0x20, 0xFF)]
            for instead in (*changed, b"", bytes([byte, 0]), bytes([0, byte])):
                path.write_bytes(before + instead + after)
                with pytest.raises(UserError, match=path.name):
                    read_all(path)
        path.write_bytes(content)
        read_all(path)


def test_joined_files_are_as_if_written_at_once(tmp_path):
    parts = {
        "a": {"w": torch.arange(5.0), "x": torch.ones(2, 3, dtype=torch.bfloat16)},
        "b": {"b": torch.zeros(1, dtype=torch.float64)},
        "none": {},
    }
    for name, state in parts.items():
        tensors.write(tmp_path / name, state, {"part": name})
    path = tmp_path / "joined"
    tensors.join(path, [tmp_path / name for name in parts], {"seed": "3"})
    joined, about = tensors.read(path)
    assert about == {"seed": "3"}
    every = parts["a"] | parts["b"]
    assert joined.keys() == every.keys()
    assert all(torch.equal(value, every[name]) for name, value in joined.items())
    whole = bytearray(path.read_bytes())
    for place in range(len(whole)):
        whole[place] ^= 1
        path.write_bytes(whole)
        with pytest.raises(UserError):
            tensors.read(path)
        whole[place] ^= 1
    tensors.join(path, [], {})
    assert tensors.read(path) == ({}, {})
    (tmp_path / "a").write_bytes((tmp_path / "a").read_bytes()[:-1])
    with pytest.raises(UserError, match="too short"):
        tensors.join(path, [tmp_path / "a"], {})


@pytest.mark.parametrize("text", ["." * 32, "0" * 64, "seal", "sha256:" + "0" * 64])
def test_a_table_of_one_column_and_texts_like_our_own(tmp_path, text):
    schema = pa.schema([schemas.column("prompt", pa.string(), "")])
    for rows in (0, 1, 2):
        path = tmp_path / f"{rows}.parquet"
        tables.write(path, pa.table({"prompt": pa.array([text] * rows, pa.string())}), schema, {})
        assert tables.read(path, schema).column("prompt").to_pylist() == [text] * rows


def test_a_reader_of_some_columns_checks_these_alone(tmp_path):
    """Else a large file would have to be read whole."""
    path = tmp_path / "t.parquet"
    schema = pa.schema([schemas.column(name, pa.float64(), name) for name in "ab"])
    with tables.writer(path, schema, {}) as out:
        for _ in range(2):
            out.write(pa.table({"a": np.arange(100.0), "b": np.arange(100.0)}))
    chunk = pq.ParquetFile(path).metadata.row_group(1).column(1)
    content = bytearray(path.read_bytes())
    content[chunk.data_page_offset + 40] ^= 1
    path.write_bytes(content)
    file = tables.File(path)
    assert len(file.group(0)) == len(file.group(1, ["a"])) == 100
    assert tables.read(path, columns=["a"]).column_names == ["a"]
    for columns in (["b"], None):
        with pytest.raises(UserError, match="t.parquet is not what was written"):
            file.group(1, columns)


def test_metadata_is_checked_without_the_tensors(tmp_path):
    path = tmp_path / "t.safetensors"
    tensors.write(path, {"w": torch.arange(1000.0)}, {"identity": "x"})
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert tensors.metadata(path) == {"identity": "x"}
    with pytest.raises(UserError, match="is not what was written"):
        tensors.read(path)


def test_a_text_that_looks_like_a_seal_is_refused_when_it_is_written(tmp_path):
    texts.write_sealed(tmp_path / "t.json", {"prompt": f'"seal": "{seals.EMPTY}"'})
    assert texts.read_sealed(tmp_path / "t.json")["prompt"].startswith('"seal')
    schema = pa.schema([schemas.column("prompt", pa.string(), "")])
    fake = pa.table({"prompt": [f"seal\x18G{seals.EMPTY}"]})
    with pytest.raises(UserError, match="looks like a seal"):
        tables.write(tmp_path / "t.parquet", fake, schema, {})


def test_metadata_cannot_take_the_place_of_a_seal(tmp_path):
    for key in ("seal", "data.sha256"):
        with pytest.raises(ValueError, match=f"key '{key}' is the format's own"):
            tensors.write(tmp_path / "t.safetensors", {}, {key: "mine"})
    assert not list(tmp_path.iterdir())


def test_large_files_are_hashed_in_blocks(tmp_path, monkeypatch):
    (tmp_path / "t").write_bytes(b"0123456789" * 10)
    whole = seals.file_digest(tmp_path / "t")
    monkeypatch.setattr(seals, "_BLOCK", 16)
    assert seals.file_digest(tmp_path / "t") != whole
    with open(tmp_path / "t", "rb") as file:
        assert seals.digest(file.fileno(), 0, 100) == seals.file_digest(tmp_path / "t")
        assert seals.digest(file.fileno(), 10, 40) == seals.digest(file.fileno(), 20, 40)


def test_a_file_that_is_replaced_while_it_is_read_is_read_as_one(tmp_path, monkeypatch):
    """As by two runs of one config, of which one resumes from the other's checkpoint."""
    path, checked = tmp_path / "t.safetensors", tensors._checked
    tensors.write(path, {"step": torch.tensor(2)}, {"step": "2"})

    def newer(*given, **more):
        metadata = checked(*given, **more)
        monkeypatch.setattr(tensors, "_checked", checked)
        tensors.write(path, {"step": torch.tensor(4)}, {"step": "4"})
        return metadata

    monkeypatch.setattr(tensors, "_checked", newer)
    read, about = tensors.read(path)
    assert str(read["step"].item()) == about["step"] == "4"

    schema = pa.schema([schemas.column("a", pa.int32(), "a")])
    tables.write(tmp_path / "t.parquet", pa.table({"a": [1, 2]}), schema, {"of": "the first"})
    file = tables.File(tmp_path / "t.parquet")
    tables.write(tmp_path / "t.parquet", pa.table({"a": [3] * 99}), schema, {"of": "the second"})
    assert file.read().column("a").to_pylist() == [1, 2]
    assert file.provenance == {"of": "the first"}
