"""Teachers as users have them: folders and names on the Hub, variants, shards, little memory."""

import http.server
import inspect
import json
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, WanPipeline, WanTransformer3DModel
from PIL import Image

from ppcl.errors import UserError
from ppcl.evaluation import generation, model_folders
from ppcl.export import assembly, reload_gate
from ppcl.pruning import pruned_class, students
from ppcl.pruning.units import NewBlock
from ppcl.runtime import devices
from ppcl.teacher import hub, pipelines, prompts, recording
from ppcl.transformer import blocks, call_arguments, claims
from support import SCRIPTS, tiny, zoo_images, zoo_parts
from support.hub_cache import NAME, put

CPU = torch.device("cpu")


@torch.no_grad()
def answer(transformer, call):
    return blocks.answer(transformer, call)


@pytest.fixture(scope="module")
def call():
    return tiny.arguments((5, 3))


@pytest.fixture(scope="module")
def expected(tiny_teacher, call):
    """What the teacher answers, loaded without this package."""
    return answer(DiffusionPipeline.from_pretrained(tiny_teacher).transformer, call)


def loaded(source, call):
    """The answer of the transformer alone, and of the pipeline's."""
    alone = pipelines.load_transformer(source, CPU)
    return answer(alone, call), answer(pipelines.load(source, CPU).transformer, call)


# ---- folders


def test_subfolder_shards_and_variant(tiny_teacher, call, expected, tmp_path):
    pipe = DiffusionPipeline.from_pretrained(tiny_teacher)
    pipe.save_pretrained(tmp_path / "inside", variant="fp16", max_shard_size="60KB")
    files = [f.name for f in (tmp_path / "inside/transformer").iterdir()]
    assert len(files) > 3 and "diffusion_pytorch_model.safetensors.index.fp16.json" in files
    source = tiny.source(tmp_path).replace(subfolder="inside", variant="fp16")
    for output in loaded(source, call):
        assert torch.equal(output, expected)
    size = sum(p.nbytes for p in pipe.transformer.parameters())
    assert pipelines.transformer_size(source) == size
    assert pipelines.transformer_size(source.replace(dtype="bfloat16")) == size // 2
    with pytest.raises(
        UserError, match="none of its components has weights of teacher.variant fp32"
    ):
        pipelines.load_transformer(source.replace(variant="fp32"), CPU)
    pipe.save_pretrained(tmp_path / "plain", max_shard_size="60KB")
    for output in loaded(tiny.source(tmp_path / "plain"), call):
        assert torch.equal(output, expected)


def test_nothing_but_the_transformer_is_read(tiny_teacher, call, expected, tmp_path):
    """What distill and all later training load has neither text encoder nor autoencoder."""
    for part in ("model_index.json", "transformer"):
        copy = shutil.copytree if (tiny_teacher / part).is_dir() else shutil.copy
        copy(tiny_teacher / part, tmp_path / part)
    transformer = pipelines.load_transformer(tiny.source(tmp_path), CPU)
    assert torch.equal(answer(transformer, call), expected)
    with pytest.raises(UserError, match="scheduler is not there; restore the scheduler's folder"):
        pipelines.load(tiny.source(tmp_path), CPU)


@pytest.mark.parametrize("name", sorted(SCRIPTS.glob("*.py")), ids=lambda p: p.stem)
def test_which_programs_load_a_whole_pipeline(name):
    whole = "pipelines.load(" in name.read_text()
    assert whole == (name.stem in {"record", "encode", "assemble", "ablate", "remap_lora"})


# ---- names on the Hub


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache of the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.fixture
def no_network(monkeypatch):
    """The Hub at a port where nothing listens."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


@pytest.mark.parametrize("load", [pipelines.load, pipelines.load_transformer])
def test_no_network_is_one_error_at_once(cache, no_network, load):
    start = time.monotonic()
    with pytest.raises(UserError) as raised:
        load(tiny.source(NAME), CPU)
    assert time.monotonic() - start < 2
    message = str(raised.value)
    assert message.startswith(f"teacher.path: {NAME} is no local folder, the Hub can't be reached")
    assert "set teacher.path to a local folder" in message and "HF_HUB_OFFLINE=1" in message
    assert "\n" not in message


@pytest.mark.parametrize("inside", ["..", "a/../../b", "/etc"])
def test_a_subfolder_on_the_hub_is_inside(inside):
    with pytest.raises(UserError, match=r"teacher\.subfolder: .* is no folder inside"):
        hub.folder(tiny.source(NAME).replace(subfolder=inside))


def test_what_is_in_the_cache_needs_no_network(cache, no_network, tiny_teacher, call, expected):
    put(tiny_teacher, cache)
    for output in loaded(tiny.source(NAME), call):
        assert torch.equal(output, expected)
    with pytest.raises(UserError, match="does not hold some-owner/some-model at revision v2"):
        pipelines.load(tiny.source(NAME).replace(revision="v2"), CPU)


def test_a_fresh_process_uses_the_cache_of_hf_home(tiny_teacher, tmp_path):
    """As jobs on a cluster's nodes do; with the machine's own (missing) network, then offline."""
    put(tiny_teacher, tmp_path / "hub")
    program = (
        "import sys, json, torch; sys.path.insert(0, sys.argv[1])\n"
        "from ppcl.teacher import pipelines\n"
        "from ppcl.settings import TeacherSettings\n"
        "source = TeacherSettings.of(json.loads(sys.argv[2]))\n"
        "print(len(pipelines.load_transformer(source, torch.device('cpu')).transformer_blocks))\n"
    )
    arguments = [str(SCRIPTS), json.dumps(vars(tiny.source(NAME)))]
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env={"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "5"


class _Hub(http.server.BaseHTTPRequestHandler):
    """Knows one gated repository, which it shows to one token."""

    folder: Path
    seen: list

    def do_GET(self):
        token = self.headers.get("Authorization")
        self.seen.append((self.command, self.path, token))
        if token != "Bearer right":
            self.send_response(401)
            self.send_header("X-Error-Code", "GatedRepo")
            self.end_headers()
            return
        paths = [f for f in sorted(self.folder.rglob("*")) if f.is_file()]
        names = [f.relative_to(self.folder).as_posix() for f in paths]
        content, etag = b"", ""
        if self.path.startswith("/api/") and "/tree/" in self.path:
            entries = [
                {"type": "file", "path": n, "size": f.stat().st_size, "oid": n}
                for n, f in zip(names, paths, strict=True)
            ]
            content = json.dumps(entries).encode()
        elif self.path.startswith("/api/"):
            files = [{"rfilename": name} for name in names]
            content = json.dumps({"id": NAME, "sha": "1" * 40, "siblings": files}).encode()
        else:
            name = self.path.split("/resolve/")[1].split("/", 1)[1]
            content, etag = (self.folder / name).read_bytes(), f'"{name.replace("/", "-")}"'
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        if etag:
            self.send_header("ETag", etag)
            self.send_header("X-Repo-Commit", "1" * 40)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


@pytest.fixture
def gated(cache, tiny_teacher, tmp_path, monkeypatch):
    """A gated repository on a Hub of our own; what was asked of it."""
    folder = tmp_path / "repository" / "inside"
    shutil.copytree(tiny_teacher, folder)
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    shutil.copy(weights, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    handler = type("Handler", (_Hub,), {"folder": folder.parent, "seen": []})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    yield handler.seen
    server.shutdown()
    server.server_close()


def test_a_token_comes_from_the_environment(gated, cache, call, expected, monkeypatch):
    """Only what the stage needs is downloaded."""
    source = tiny.source(NAME).replace(subfolder="inside", revision="v1")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(UserError, match="accept its terms there and set HF_TOKEN"):
        pipelines.load_transformer(source, CPU)
    monkeypatch.setenv("HF_TOKEN", "right")
    transformer = pipelines.load_transformer(source, CPU)
    assert torch.equal(answer(transformer, call), expected)
    assert any("/v1" in path for _, path, _ in gated)
    (snapshot,) = cache.glob("models--*/snapshots/*")
    names = sorted(f.relative_to(snapshot).as_posix() for f in snapshot.rglob("*") if f.is_file())
    assert names == [
        "inside/model_index.json",
        "inside/transformer/config.json",
        "inside/transformer/diffusion_pytorch_model.safetensors",
    ]
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    again = pipelines.load_transformer(source, CPU)  # from the cache, without a network
    assert torch.equal(answer(again, call), expected)


def test_one_set_of_weights_is_downloaded():
    """Of each component, what its library will read; pickles never, code if it is trusted."""
    own, shard = "diffusion_pytorch_model", "-00001-of-00002"
    plain = [f"vae/{own}.safetensors", f"b/{own}{shard}.safetensors", "t/model.safetensors"]
    plain += [f"b/{own}.safetensors.index.json"]
    marked = [f"vae/{own}.fp16.safetensors", f"b/{own}.fp16{shard}.safetensors"]
    marked += [f"b/{own}.safetensors.index.fp16.json"]
    other = ["t/pytorch_model.bin", "t/model.fp16.bin", f"b/{own}.safetensors", "b/x.safetensors"]
    other += [f"t/model{shard}.safetensors", "t/model.safetensors.index.json", "p/model.bin"]
    files = ["model_index.json", "README.md", "b/config.json", "p/vocab.txt"]
    names = [*plain, *marked, *other, *files, "x.py", "b/y.py", "b/README.md", "b/m.onnx"]
    source = tiny.source(NAME)
    pick = lambda **more: hub.wanted(names, "", None, (), source.replace(**more))  # noqa: E731
    assert sorted(pick()) == sorted([*plain, *files])
    assert sorted(pick(variant="fp16")) == sorted([*marked, "t/model.safetensors", *files])
    assert sorted(pick(trust_remote_code=True)) == sorted([*plain, *files, "x.py", "b/y.py"])


# ---- little memory


@pytest.mark.parametrize("how", ["model", "stream"])
def test_offloaded_pipelines_make_the_same(tiny_teacher, how):
    sample, made = tiny.samples(tiny.CALIBRATION)[:2], {}
    for setting in ("none", how):
        pipe = pipelines.load(tiny.source(tiny_teacher).replace(offload=setting), CPU)
        recorded = recording.record_batch(pipe, pipe.transformer, sample, tiny.SETTINGS, 1, seed=0)
        run = pipelines.run(pipe, ["red 1"], [3], tiny.SETTINGS, output_type="np")
        made[setting] = (recorded, run.images)
    assert made["none"][0] == made[how][0]
    assert (made["none"][1] == made[how][1]).all()


def test_a_streamed_transformer_works_as_any(tiny_teacher, call, expected):
    source = tiny.source(tiny_teacher)
    plain = pipelines.load_transformer(source, CPU)
    streamed = pipelines.load_transformer(source.replace(offload="stream"), CPU)
    assert torch.equal(answer(streamed, call), expected)
    claims.verify(streamed, call)
    seen = {}
    for name, transformer in (("plain", plain), ("streamed", streamed)):
        kept = seen.setdefault(name, {})
        sequence = blocks.block_sequence(transformer)
        after = lambda block, streams, kept=kept: kept.update({block.index: streams})  # noqa: E731
        with torch.no_grad(), blocks.watch(sequence, after=after, stop_after=2) as run:
            assert run(transformer, call) is None
    assert list(seen["plain"]) == list(seen["streamed"]) == [0, 1, 2]
    for index, streams in seen["plain"].items():
        for stream, value in streams.items():
            assert torch.equal(value, seen["streamed"][index][stream])
    # Students of it, plugged in, give what students of a plain teacher do.
    answers = []
    for transformer in (plain, streamed):
        made = students.start(transformer, [NewBlock(1, 3)], "average")
        model, _ = blocks.assembled(transformer, {(1, 3): made[NewBlock(1, 3)]})
        answers.append(answer(model, call))
    assert torch.equal(*answers) and not torch.equal(answers[0], expected)


def test_blocks_are_on_the_device_only_while_they_run(tiny_teacher, call, monkeypatch):
    moves = []
    move = devices._Move.__call__

    def noted(hook, module, *rest):
        moves.append(("on" if hook.device else "off", module))
        move(hook, module, *rest)

    monkeypatch.setattr(devices._Move, "__call__", noted)
    transformer = pipelines.load_transformer(
        tiny.source(tiny_teacher).replace(offload="stream"), CPU
    )
    every = list(transformer.transformer_blocks)
    places = [p.data_ptr() for p in transformer.parameters()]
    answer(transformer, call)
    assert moves == [(way, block) for block in every for way in ("on", "off")]
    assert [p.data_ptr() for p in transformer.parameters()] == places
    moves.clear()
    with torch.no_grad(), blocks.watch(blocks.block_sequence(transformer), stop_after=1) as run:
        run(transformer, call)
    assert moves == [(way, block) for block in every[:2] for way in ("on", "off")]
    moves.clear()
    with pytest.raises(TypeError):
        every[3]("wrong")
    assert moves == [("on", every[3]), ("off", every[3])]
    moves.clear()
    student = students.start(transformer, [NewBlock(0, 1)], "first")[NewBlock(0, 1)]
    blocks.assembled(transformer, {(0, 4): student})[0](**call)[0].sum().backward()
    assert moves == [] and student.img_mlp.net[2].weight.grad.abs().sum() > 0


def test_gradients_do_not_pass_through_a_streamed_teacher(tiny_teacher):
    source = tiny.source(tiny_teacher).replace(offload="stream")
    with pytest.raises(UserError, match="teacher.offload: .*needs all its weights on the device"):
        pipelines.load_transformer(source, CPU, gradients=True)
    pipelines.load_transformer(source.replace(offload="auto"), CPU, gradients=True)


@pytest.mark.parametrize(
    ("free", "how"), [(None, "none"), (100, "none"), (70, "model"), (40, "stream")]
)
def test_auto_goes_by_the_room_there_is(monkeypatch, free, how):
    monkeypatch.setattr(devices, "free_memory", lambda _device: free)
    assert devices.offload("auto", {"transformer": 35, "text_encoder": 30}, CPU) == how
    assert devices.offload("none", {"transformer": 10**15}, CPU) == "none"


def test_models_side_by_side_are_offloaded_alike(tiny_teacher, monkeypatch):
    teacher = tiny.source(tiny_teacher).replace(offload="auto")
    size = pipelines.transformer_size(teacher)
    models = [model_folders.Model("teacher", teacher), model_folders.Model("p70", teacher)]
    for room, how in ((3 * size, "none"), (2 * size, "stream")):
        monkeypatch.setattr(devices, "free_memory", lambda _device, room=room: room)
        hows = [model.source.offload for model in model_folders.side_by_side(models, CPU)]
        assert hows == [how, how]


# ---- other components than `transformer`


@pytest.fixture(scope="module")
def wan(tmp_path_factory) -> Path:
    """A pipeline of two transformers of 3 blocks, which makes 5 frames."""
    tokenizer = zoo_parts.t5_tokenizer()

    def transformer(seed):
        made = WanTransformer3DModel(
            patch_size=(1, 2, 2),
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            text_dim=zoo_parts.WIDTH,
            freq_dim=16,
            ffn_dim=32,
            num_layers=3,
            rope_max_seq_len=32,
        )
        return zoo_parts.freeze(made, 0.05, seed)

    torch.manual_seed(0)
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=zoo_parts.t5(tokenizer, umt5=True),
        vae=diffusers.AutoencoderKLWan(
            base_dim=3,
            z_dim=4,
            dim_mult=[1, 1, 1, 1],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            latents_mean=[0.0] * 4,
            latents_std=[1.0] * 4,
        ),
        scheduler=diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
        transformer=transformer(1),
        transformer_2=transformer(2),
        boundary_ratio=0.6,
    )
    folder = tmp_path_factory.mktemp("wan") / "teacher"
    pipe.save_pretrained(folder)
    return folder


FILM = {
    "height": 16,
    "width": 16,
    "num_frames": 5,
    "num_inference_steps": 2,
    "guidance_scale": 1.0,
    "max_sequence_length": 8,
}


def film_call():
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(2, 4, 2, 4, 4, generator=generator),
        "timestep": torch.tensor([500.0, 20.0]),
        "encoder_hidden_states": torch.randn(2, 7, zoo_parts.WIDTH, generator=generator),
        "return_dict": False,
    }


def test_the_second_transformer_is_pruned(wan, tmp_path):
    source, given = tiny.source(wan).replace(component="transformer_2"), film_call()
    transformer = pipelines.load_transformer(source, CPU)
    left_out = assembly.copied(wan)
    assert left_out == ("text_encoder",)
    pipe = pipelines.load(source, CPU, without=left_out)
    second = pipelines.denoiser(pipe, source)
    assert torch.equal(answer(second, given), answer(transformer, given))
    assert pipe.text_encoder is None
    model, block_map = blocks.assembled(second, {(0, 1): second.blocks[0]})
    folder = tmp_path / "p70"
    assembly.export(
        assembly.TeacherPipeline(pipe, "transformer_2", wan), model, block_map, folder, {}, given
    )
    again = DiffusionPipeline.from_pretrained(folder)
    assert torch.equal(answer(again.transformer_2, given), answer(model, given))
    assert len(again.transformer.blocks) == 3 and len(again.transformer_2.blocks) == 2
    for part in left_out:
        for file in (wan / part).iterdir():
            assert (folder / part / file.name).read_bytes() == file.read_bytes()
    whole, index = hub.read_index(wan), hub.read_index(folder)
    assert {k: v for k, v in index.items() if k[0] != "_"} == {
        k: v for k, v in whole.items() if k[0] != "_"
    }
    assert (folder / "transformer_2" / "block_map.json").is_file()


def test_a_model_is_what_loads_in_the_teachers_types(wan, tmp_path):
    """Its class keeps tables and norms in float32: a student's are not rounded on the way."""
    source = tiny.source(wan).replace(dtype="bfloat16")
    transformer, part = pipelines.load_transformer(source, CPU), NewBlock(0, 1, ("image",))
    (student,) = students.start(transformer, [part], "average").values()
    students.shaped(transformer, part, student)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    trained = {name: value.clone() for name, value in student.state_dict().items()}
    model, held, block_map = students.plugged(transformer, {part: student})
    assert block_map == [[0, 1], [2]] and held[part] is not student
    assert all(torch.equal(student.state_dict()[n], v) for n, v in trained.items())
    exported = pruned_class.from_stock(model, blocks.family(model).layouts())
    exported.save_pretrained(tmp_path)
    again = type(exported).from_pretrained(tmp_path, dtype=torch.bfloat16).state_dict()
    held_types = set()
    for name, value in model.state_dict().items():
        assert value.dtype == again[name].dtype and torch.equal(value, again[name]), name
        if name.startswith("blocks.0."):
            own = trained[name.removeprefix("blocks.0.")]
            held_types.add(value.dtype)
            assert torch.equal(value.float(), own) == (value.dtype == torch.float32), name
    assert held_types == {torch.bfloat16, torch.float32}
    students.as_teacher(transformer, part, student)
    same, held, _ = students.plugged(transformer, {part: student})
    assert held[part] is student
    assert all(torch.equal(v, model.state_dict()[n]) for n, v in same.state_dict().items())


def test_a_component_that_is_not_there(tiny_teacher):
    source = tiny.source(tiny_teacher).replace(component="transformer_2")
    with pytest.raises(UserError, match="has no transformer_2; set teacher.component"):
        pipelines.load_transformer(source, CPU)
    with pytest.raises(UserError, match="teacher.component: .* without a transformer_2"):
        pipelines.load(source, CPU)


def test_films_become_strips(wan, tmp_path):
    model = model_folders.Model("p70", tiny.source(wan))
    batch = [
        {"sample": n, "prompt_index": n, "prompt": p, "seed": n}
        for n, p in enumerate(("red 1", "blue 2"))
    ]
    generation._loaded.clear()
    generation.generate(model, CPU, FILM, batch, tmp_path / "part.parquet")
    table = generation.tables.read(tmp_path / "part.parquet", generation.schemas.IMAGES)
    assert table.column("frames").to_pylist() == [5, 5]
    for data in table.column("png").to_pylist():
        assert generation.from_png(data).shape == (5 * 16, 16, 3)
    made = SimpleNamespace(frames=np.arange(2 * 3 * 4).reshape(1, 2, 3, 4, 1))
    strips, frames = generation.stacked(made)
    assert frames == 2 and (strips[0, :, :, 0] == np.arange(24).reshape(6, 4)).all()


# ---- calls


@pytest.mark.parametrize("kind", ["nested", "listed"])
def test_the_gate_gets_nested_arguments(tmp_path, kind):
    """Tensors inside lists, tuples and mappings arrive as they were."""
    held = {}
    t = torch.arange(3.0)
    given = {"a": {"nested": (t, [t + 1, None, "x"]), "listed": [[t], {"b": (1, 2.5)}]}[kind]}
    skeleton = json.loads(json.dumps(call_arguments.encode(given, "call", held.__setitem__)))
    file = SimpleNamespace(get_tensor=held.__getitem__)
    arguments = reload_gate.filled(skeleton, file)
    flat = torch.utils._pytree.tree_flatten(arguments)
    wanted = torch.utils._pytree.tree_flatten(given)
    assert flat[1] == wanted[1]
    assert all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(flat[0], wanted[0], strict=True)
    )


def test_sigmas_of_few_step_teachers_pass_through(tiny_teacher):
    pipe = pipelines.load(tiny.source(tiny_teacher), CPU)
    settings = {"height": 32, "width": 32, "num_inference_steps": 2, "sigmas": [1.0, 0.25]}
    pipelines.run(pipe, ["red 1"], [0], settings, output_type="latent")
    assert pipe.scheduler.sigmas.tolist() == [1.0, 0.25, 0.0]


# ---- prompts with a picture


def test_pictures_reach_the_pipeline(tmp_path):
    pipe = zoo_images._qwen_image(2, edit=True)
    pipe.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(0)
    for name in "ab":
        pixels = rng.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{name}.png")
    (tmp_path / "edits.csv").write_text("prompt,image\nred 1,a.png\nred 2,b.png\n")
    rows = prompts.read(tmp_path / "edits.csv")
    samples = pipelines.samples(rows, 3, seed=5)
    assert [s["image"] for s in samples] == [rows[n]["image"] for n in (0, 1, 0)]
    batches = pipelines.in_batches(pipe, samples, 8)
    assert [len(batch) for batch in batches] == [1, 1, 1]
    settings = {"height": 512, "width": 512, "num_inference_steps": 1, "true_cfg_scale": 1.0}

    def made(image):
        run = pipelines.run(pipe, ["red 1"], [0], settings, [image], output_type="latent")
        return run.images

    first, second = made(rows[0]["image"]), made(rows[1]["image"])
    assert not torch.equal(first, second) and torch.equal(first, made(rows[0]["image"]))
    with pytest.raises(UserError, match="takes a picture .*in a column 'image' of the prompts"):
        made(None)
    (tmp_path / "a.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="a.png, which can't be read"):
        made(rows[0]["image"])
    with pytest.raises(UserError, match="pipeline.image' is set by the workflow"):
        pipelines.run(pipe, ["red 1"], [0], {"image": "a.png"})


def test_a_pipeline_that_takes_no_picture_says_so(tiny_teacher):
    pipe = pipelines.load(tiny.source(tiny_teacher), CPU)
    assert "image" not in inspect.signature(pipe.__call__).parameters
    with pytest.raises(UserError, match="QwenImagePipeline takes no picture; remove the column"):
        pipelines.run(pipe, ["red 1"], [0], tiny.SETTINGS, ["a.png"])
