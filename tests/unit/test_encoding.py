"""Pictures of one's own: read, encoded as the stock pipeline has it, and the loss on them."""

import functools
import json

import diffusers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from ppcl.errors import UserError
from ppcl.settings import FinetuneSettings, LossWeights
from ppcl.storage import schemas
from ppcl.teacher import encoding, pictures, stand_in
from ppcl.training.picture_loss import Pictures, noised
from ppcl.transformer import blocks, call_tables, calls
from ppcl.transformer.families import FAMILIES
from support import tiny, zoo_images, zoo_videos

ZOO = zoo_images.SPECIMENS | zoo_videos.SPECIMENS
CAPTION = "a red 1 on blue"
# Of these the tests' stand-ins take another number of frames than real ones: their autoencoder's
# encoder has its four frames per latent written into its code, and its decoder here makes two.
VAE = {"wan": "AutoencoderKLWan", "wan22": "AutoencoderKLWan", "wan22-low": "AutoencoderKLWan"}
REFUSED = {
    "qwen-image-edit": "takes a picture",
    "pixart-sigma": "is not of flow matching",
    "cogvideox": "is not of flow matching",
}
FLOW = [name for name, one in ZOO.items() if name not in REFUSED and one.family in FAMILIES]


def made(name: str):
    """A specimen's pipeline, its transformer, and the encoder."""
    diffusers.utils.logging.set_verbosity_error()
    specimen = ZOO[name]
    pipe = specimen.make(2)
    pipe.set_progress_bar_config(disable=True)
    settings = dict(specimen.settings)
    if name in VAE:
        settings["num_frames"] = 5
        plain = pipe.vae.config
        shape = {k: plain[k] for k in ("base_dim", "z_dim", "num_res_blocks")}
        shape |= {"latents_mean": plain["latents_mean"], "latents_std": plain["latents_std"]}
        torch.manual_seed(0)
        vae = diffusers.AutoencoderKLWan(
            dim_mult=[1, 1, 1],
            temperal_downsample=[True, True],
            scale_factor_temporal=4,
            scale_factor_spatial=4,
            **shape,
        )
        pipe.register_modules(vae=vae.eval())
        pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial = 4, 4
        settings |= {"height": 16, "width": 16}
    transformer = getattr(pipe, specimen.component)
    return pipe, transformer, settings, encoding.Encoder(pipe, transformer, settings, CAPTION)


@pytest.mark.parametrize("name", FLOW)
def test_a_model_that_answers_as_encoded_makes_the_picture(name):
    """The stock pipeline, from noise, with a transformer that answers noise - latents as it is told
    to, ends where the autoencoder put the picture, so it shows the autoencoder's own picture of it.
    """
    pipe, transformer, settings, encoder = made(name)
    layout, family = encoder.layout, blocks.family(transformer)
    shown = np.random.default_rng(0).integers(0, 256, (1, *layout.size, 3), dtype=np.uint8)
    columns = {"sample": [0], "file": ["a"], "prompt": [CAPTION], "heldout": [False]}
    (table,) = encoder.rows(shown, columns)
    assert set(schemas.ENCODED.names) <= set(table.column_names)
    first = {}

    def answer(*args, **kwargs):
        given = blocks.signature_arguments(transformer, args, kwargs)
        state = given[family.state]
        noise = first.setdefault("noise", blocks.stacked(state).float().clone())
        clean = layout.sign * target
        velocity = layout.sign * (noise.reshape(clean.shape) - clean)
        return (list(velocity),) if isinstance(state, list) else (velocity.to(noise),)

    (column,) = [c for c in table.column_names if c.startswith("output/")]
    target = torch.tensor(np.stack(table[column].combine_chunks().to_numpy_ndarray()))
    reached = []
    with stand_in.in_place(transformer, "forward", functools.wraps(transformer.forward)(answer)):
        with stand_in.in_place(pipe.vae, "decode", _reach):
            try:
                encoder._run([CAPTION])
            except stand_in.Reached as end:
                reached.append(end.value)
    encoded = encoder._encoded(shown)
    if not name.startswith("wan22"):  # whose other transformer answers for the other steps
        torch.testing.assert_close(reached[0], encoded, rtol=0, atol=3e-3)
    torch.testing.assert_close(layout.decoded_from(layout.latents_of(encoded)), encoded)


def _reach(z, *args, **kwargs):
    raise stand_in.Reached(z)


@pytest.mark.parametrize("name", REFUSED)
def test_a_pipeline_that_can_not_be_trained_on_pictures_says_why(name):
    with pytest.raises(UserError, match=REFUSED[name]):
        made(name)


@pytest.fixture(scope="module")
def encoded(tmp_path_factory):
    """Six pictures of two captions of unlike length, encoded by a tiny Qwen-Image."""
    pipe, transformer, _, encoder = made("qwen-image")
    prompts = [CAPTION, "a blue handwritten two on a red background"]
    drawn = np.random.default_rng(0).integers(0, 256, (6, *encoder.layout.size, 3), dtype=np.uint8)
    tables = []
    for half, prompt in enumerate(prompts):
        numbers = list(range(3 * half, 3 * half + 3))
        tables += encoder.rows(
            drawn[numbers],
            {
                "sample": numbers,
                "file": [f"{n}.png" for n in numbers],
                "prompt": [prompt] * 3,
                "heldout": [n % 3 == 0 for n in numbers],
            },
        )
    path = tmp_path_factory.mktemp("encoded") / "encoded.parquet"
    call_tables.write(path, [t.schema for t in tables], tables, {}, schemas.ENCODED)
    return transformer, path


def options(**more) -> FinetuneSettings:
    weights = LossWeights.of({"distillation": 1.0, "pictures": 1.0})
    given = {"batch_size": 4, "weighting": "none", "weights": weights, "data": None}
    return FinetuneSettings.of({"heldout_fraction": 0.5, "sharding": "none", **given, **more})


def test_noise_is_mixed_in_as_flow_matching_has_it(encoded):
    transformer, path = encoded
    reader = calls.Reader(path, schema=schemas.ENCODED)
    batch = reader.batch(reader.buckets[0][:2])
    family, shares = blocks.family(transformer), torch.tensor([0.0, 0.75])
    given, target = noised(batch, family, shares, [(1,), (2,)])
    clean = batch.arguments["hidden_states"]
    assert torch.equal(given["hidden_states"][0], clean[0])
    assert given["timestep"].tolist() == [0.0, 0.75]
    noise = target + clean  # noise - latents
    torch.testing.assert_close(
        given["hidden_states"], torch.lerp(clean, noise, shares[:, None, None])
    )
    assert 0.8 < noise.std() < 1.2


@pytest.mark.parametrize("weighting", ["none", "logit_normal", "mode", "sigma_sqrt", "cosmap"])
def test_the_loss_is_that_of_the_batch_in_any_number_of_processes(encoded, weighting):
    transformer, path = encoded
    chosen = options(weighting=weighting)
    whole = Pictures(path, chosen, 0, tiny.Process(0, 1, None)).loss(transformer, 3)
    parts = [
        Pictures(path, chosen, 0, tiny.Process(n, 2, None)).loss(transformer, 3) for n in range(2)
    ]
    torch.testing.assert_close(sum(parts) / 2, whole)
    assert whole > 0
    alone = Pictures(path, chosen, 0, tiny.Process(0, 1, None))
    assert alone.heldout(transformer) == alone.heldout(transformer)


# ---- pictures as people have them


def picture(path, mode="RGB", size=(40, 30), colour=None, **more):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour if colour is not None else 0).save(path, **more)
    return path


def beside(folder, *names, suffix=".png"):
    for name in names:
        picture(folder / f"{name}{suffix}", colour="red")
        (folder / f"{name}.txt").write_text(f"{name}\u2028 and more\n")
    return folder


def test_a_folder_with_captions_beside_its_pictures(tmp_path):
    beside(tmp_path, "b", "a", "sub/c".split("/")[0])
    (tmp_path / ".DS_Store").write_text("x")
    assert [(p.path.name, p.caption) for p in pictures.listed(tmp_path)] == [
        (f"{name}.png", f"{name}\u2028 and more") for name in ("a", "b", "sub")
    ]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_a_folder_with_a_table(tmp_path, ending):
    rows = [{"file_name": f"d/{n}.png", "text": f"{n}\u2028\u0085x"} for n in range(2)]
    for row in rows:
        picture(tmp_path / row["file_name"])
    path = tmp_path / f"metadata.{ending}"
    if ending == "csv":
        path.write_text(
            "file_name,text\n" + "".join(f"{r['file_name']},{r['text']}\n" for r in rows)
        )
    elif ending == "jsonl":
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    assert [p.caption for p in pictures.listed(tmp_path)] == [row["text"] for row in rows]


def _twice(folder):
    picture(folder / "a.jpg")


def _lone(folder):
    (folder / "c.txt").write_text("no picture")


def _metadata(name):
    def change(folder):
        rows = "".join(f"{n},x\n" for n in ("a.png", name))
        (folder / "metadata.csv").write_text("file_name,text\n" + rows)

    return change


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (_twice, "a.jpg and .*a.png would have one caption"),
        (_lone, "c.txt is a caption without a picture"),
        (lambda f: (f / "a.txt").unlink(), "a.png has no caption"),
        (lambda f: (f / "a.txt").write_text(" \n"), "a.txt: the caption is ''"),
        (lambda f: (f / "a.txt").write_bytes(b"\xff\xfea"), "a.txt: not UTF-8"),
        (_metadata("../b.png"), "'../b.png' is not inside"),
        (_metadata("/etc/passwd"), "'/etc/passwd' is not inside"),
        (_metadata("./a.png"), "'./a.png' is there twice"),
        (_metadata("z.png"), "there is no .*z.png"),
    ],
)
def test_a_folder_that_is_not_whole(tmp_path, change, says):
    beside(tmp_path, "a", "b")
    change(tmp_path)
    with pytest.raises(UserError, match=says):
        pictures.listed(tmp_path)


def test_pictures_of_all_kinds_become_upright_rgb_of_the_size(tmp_path):
    size = (1, 16, 16)
    cases = {
        "cmyk.jpg": picture(tmp_path / "cmyk.jpg", "CMYK", colour=(0, 255, 255, 0)),
        "rgba.png": picture(tmp_path / "rgba.png", "RGBA", colour=(255, 0, 0, 0)),
        "deep.png": picture(tmp_path / "deep.png", "I;16", colour=65535),
        "grey.png": picture(tmp_path / "grey.png", "L", colour=128),
    }
    means = {
        name: pictures.opened(path, size).mean((0, 1, 2)).round() for name, path in cases.items()
    }
    assert means["rgba.png"].tolist() == [255] * 3  # transparent: white
    assert means["deep.png"].tolist() == [255] * 3
    assert means["grey.png"].tolist() == [128] * 3
    assert means["cmyk.jpg"][0] > 200 and means["cmyk.jpg"][1:].max() < 60
    turned = Image.new("RGB", (20, 20), "blue")
    turned.paste("red", (0, 0, 20, 10))  # red above
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    turned.save(tmp_path / "turned.png", exif=exif)
    shown = pictures.opened(tmp_path / "turned.png", size)[0]
    assert shown[0, 8, 2] > 200 and shown[-1, 8, 0] > 200


def _truncated(path):
    Image.effect_noise((64, 64), 50).save(path)
    path.write_bytes(path.read_bytes()[:600])


def _animated(path):
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])


def _bomb(path):
    Image.new("1", (20000, 20000)).save(path)


@pytest.mark.parametrize(
    ("name", "make", "says"),
    [
        ("a.jpg", _truncated, "can't be read as a picture"),
        ("a.png", lambda p: p.write_bytes(b""), "is empty"),
        ("a.png", lambda p: p.write_text("no picture"), "can't be read as a picture"),
        ("a.gif", _animated, "is animated"),
        ("a.png", _bomb, "has more than 178,956,970 pixels"),
        ("a.png", lambda p: p.symlink_to("/dev/zero"), "is no file"),
        ("a.png", lambda p: p.symlink_to("nothing"), "is no file"),
    ],
)
def test_a_damaged_picture_is_named(tmp_path, name, make, says):
    make(tmp_path / name)
    with pytest.raises(UserError, match=rf"{name}: {says}"):
        pictures.opened(tmp_path / name, (1, 16, 16))


def test_videos_are_folders_of_frames_or_films(tmp_path):
    for number in range(3):
        picture(tmp_path / f"clip/{number}.png", colour="red")
    picture(tmp_path / "b.png")
    for name in ("clip", "b"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert [p.caption for p in pictures.listed(tmp_path)] == ["b", "clip"]
    assert pictures.opened(tmp_path / "clip", (2, 16, 16)).shape == (2, 16, 16, 3)
    with pytest.raises(UserError, match="has 3 frames, and the pipeline makes videos of 5"):
        pictures.opened(tmp_path / "clip", (5, 16, 16))
    imageio = pytest.importorskip("imageio.v3")
    pytest.importorskip("imageio_ffmpeg")
    film = tmp_path / "film.mp4"
    imageio.imwrite(film, np.full((6, 32, 32, 3), 200, np.uint8), plugin="FFMPEG", fps=8)
    assert abs(pictures.opened(film, (5, 16, 16)).mean() - 200) < 6
    film.write_bytes(film.read_bytes()[:100])
    with pytest.raises(UserError, match=r"film.mp4: can't be read as a video"):
        pictures.opened(film, (5, 16, 16))
