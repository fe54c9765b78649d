"""Which files hold a component's weights, chosen as diffusers and transformers choose them.

Imports nothing heavy, so that Snakefiles can import it.
"""

import re
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ppcl.errors import UserError
from ppcl.storage import untrusted

STEMS = {"diffusers": "diffusion_pytorch_model", "transformers": "model"}
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
CONFIG = "config.json"
TEACHER = "teacher.path"
_WEIGHTLESS = re.compile(
    "(Scheduler|Guidance|Tokenizer(Fast)?|Backend|FeatureExtractor)$|Processor"
)
_PACKAGES = {"bitsandbytes": "bitsandbytes", "torchao": "torchao", "quanto": "optimum"}
Header = dict[str, dict[str, Any]]


def names_in(folder: Path) -> set[str]:
    """Names of a folder's entries; UserError if it can't be read."""
    try:
        return {path.name for path in folder.iterdir()}
    except OSError as error:
        raise UserError(f"{folder}: can't be read ({error.strerror}); mend that") from error


def variant_of(names: Collection[str], variant: str | None) -> str | None:
    """The variant in which a component is loaded: `variant` if one of its files is of it, else
    None, for files without a variant in their names.

    Args:
        names: the files of the component.
        variant: the config's `teacher.variant`, such as fp16.
    """
    marks = (name.split(".")[1] for name in names if "." in name)
    return variant if variant and any(mark.startswith(variant) for mark in marks) else None


def first(names: Collection[str], stem: str, variant: str | None) -> str | None:
    """The file with which loading begins, the weights or the index of their shards; None if there
    is none. If there are both, transformers reads the single file and diffusers the shards.

    Args:
        names: the files of a component.
        stem: how the library names weights, a value of STEMS.
        variant: as `variant_of` gives it.
    """
    mark = f".{variant}" if variant else ""
    single, index = f"{stem}{mark}.safetensors", f"{stem}.safetensors.index{mark}.json"
    wanted = [single, index]
    if stem == STEMS["diffusers"]:
        wanted = [index, f"{stem}.safetensors{mark}.index.json", single]
    return next((name for name in wanted if name in names), None)


def wanted(names: Collection[str], variant: str | None) -> list[str]:
    """Which of a component's files on the Hub are weights that loading will read."""
    names = [name for name in names if ".safetensors" in name]  # other formats are not read here
    variant, files = variant_of(names, variant), []
    mark = re.escape(f".{variant}") if variant else ""
    for stem in STEMS.values():
        chosen = first(names, stem, variant)
        if chosen is not None:
            files.append(chosen)
        if chosen is not None and chosen.endswith(".json"):
            number = r"-\d+-of-\d+"
            shard = re.compile(rf"{stem}({mark}{number}|{number}{mark})\.safetensors")
            files += [name for name in names if shard.fullmatch(name)]
    return files


def headers(folder: Path, library: str, variant: str | None) -> dict[Path, Header]:
    """File -> its header, for the files that hold a component's weights; empty if there are none.

    Args:
        folder: the component's.
        library: of its class, by the pipeline's index. Any name not in STEMS is a module beside the
            weights, whose files may be named as either library does.
        variant: the config's `teacher.variant`.

    Raises:
        UserError: a file is damaged, or an index and its shards contradict each other.
    """
    names = names_in(folder)
    stems = [STEMS[library]] if library in STEMS else STEMS.values()
    variant = variant_of(names, variant)
    chosen = next(filter(None, (first(names, stem, variant) for stem in stems)), None)
    if chosen is None:
        return {}
    if not chosen.endswith(".json"):
        return {folder / chosen: untrusted.safetensors_header(folder / chosen)}
    index = folder / chosen
    places = _places(index)
    missing = sorted(set(places.values()) - names)
    if missing:
        raise UserError(f"{index}: it names {missing[0]}, which is not there; restore that file")
    shards = [folder / name for name in sorted(set(places.values()))]
    by_shard = {path: untrusted.safetensors_header(path) for path in shards}
    for path, header in by_shard.items():
        told = {name for name, shard in places.items() if shard == path.name}
        if odd := sorted(told ^ header.keys()):
            which = "lacks" if odd[0] in told else "also holds"
            raise UserError(
                f"{path}: against {index.name}, it {which} the weight {odd[0][:200]!r}; restore "
                f"these files, or load {folder.name} and save it again with save_pretrained"
            )
    return by_shard


def _places(index: Path) -> dict[str, str]:
    """Weight -> name of the shard that holds it."""
    content = untrusted.json_object(index)
    places = content.get("weight_map")
    if isinstance(places, dict) and places and isinstance(content.get("metadata"), dict):
        if all(_is_shard(name) for name in places.values()):
            return places
    raise UserError(
        f"{index}: not an index of shards (weight_map, of names of .safetensors files beside "
        "it, and metadata); restore the file"
    )


def _is_shard(name: Any) -> bool:
    return isinstance(name, str) and re.fullmatch(r"\w[\w.-]*\.safetensors", name) is not None


def check(
    folder: Path,
    parts: Mapping[str, tuple[str, str]],
    variant: str | None,
    key: str,
    pruned: str,
) -> dict[str, dict[Path, Header]]:
    """Checks the components of a pipeline before any of them is loaded.

    Args:
        folder: the pipeline's.
        parts: component -> (library, class), as `hub.parts` gives them.
        variant: the config's `teacher.variant`.
        key: the config key that names the folder, for messages; a teacher's ends in TEACHER. Any
            other pipeline is only run, so its weights may be quantised.
        pruned: the component that is pruned.

    Returns:
        Component -> its `headers`, for components with weights.

    Raises:
        UserError: a component is missing, or its weights can't be read here.
    """
    by_part = {}
    for name, (library, made_as) in parts.items():
        part = folder / name
        if not part.is_dir():
            raise UserError(f"{key}: {part} is not there; restore the {name}'s folder")
        names = names_in(part)
        if "model_index.json" in names:  # its loading follows other rules, which allow pickles
            raise UserError(
                f"{key}: {part / 'model_index.json'}: the {name} is a pipeline in the pipeline, "
                "whose weights can't be checked; remove that file, or load the whole and save it "
                "again with parts that are models"
            )
        if variant and (bare := sorted(n for n in names if "." not in n)):
            raise UserError(
                f"{key}: {part / bare[0]}: diffusers can't look for a variant among names "
                "without a dot; move that away, or set teacher.variant to null"
            )
        weightless = name != pruned and _WEIGHTLESS.search(made_as)
        if CONFIG in names and not weightless:
            _check_config(part / CONFIG, key, name == pruned and key.endswith(TEACHER))
            by_part[name] = _weights(part, names, library, variant, key)
        elif name == pruned or library in STEMS and not weightless:
            raise UserError(f"{key}: {part} has no {CONFIG}; restore the {name}'s folder")
    return by_part


def check_variant(folder: Path, parts: Collection[str], variant: str | None, key: str) -> None:
    """Raises UserError if no component of a whole pipeline's folder has files of the variant."""
    held = [folder / name for name in parts if (folder / name).is_dir()]
    if variant and not any(variant_of(names_in(part), variant) for part in held):
        raise UserError(
            f"{key}: {folder}: none of its components has weights of teacher.variant {variant}; "
            "set that to one that they have, or to null"
        )


def _weights(
    part: Path, names: Collection[str], library: str, variant: str | None, key: str
) -> dict[Path, Header]:
    """As `headers`; UserError if there are none."""
    odd = [n for n in sorted(names) if n == "adapter_config.json" or n.startswith("shard-0")]
    if odd and library != "diffusers":
        raise UserError(
            f"{key}: {part / odd[0]}: neither adapters nor training checkpoints are read here; "
            f"load the {part.name}, merge its adapters, and save it again with save_pretrained"
        )
    if by_file := headers(part, library, variant):
        return by_file
    kind = f" of variant {variant}" if variant_of(names, variant) else ""
    pickled = sorted(name for name in names if name.endswith(PICKLED))
    beside = f" ({pickled[0]} could run code when it is read)" if pickled else ""
    raise UserError(
        f"{key}: {part} holds no .safetensors file{kind} under a name that {library} reads, the "
        f"only weights that are read here{beside}; restore it, or load the pipeline and save it "
        "again with save_pretrained"
    )


def _check_config(config: Path, key: str, pruned: bool) -> None:
    """Raises UserError if a model's config sends loaders to weights that are not read here."""
    known = untrusted.json_object(config)
    if known.get("transformers_weights") is not None:
        raise UserError(
            f"{key}: {config} names weights of its own (transformers_weights); take that out, and "
            f"name them {STEMS['transformers']}.safetensors"
        )
    quantised = known.get("quantization_config")
    method = str(quantised.get("quant_method") if isinstance(quantised, dict) else quantised)
    package = next((p for name, p in _PACKAGES.items() if method.startswith(name)), None)
    lacks = package is not None and find_spec(package) is None
    if quantised is not None and (pruned or lacks):
        reason = "can't be pruned" if pruned else f"need the package {package}"
        raise UserError(
            f"{key}: {config}: its weights are quantised ({method[:100]}), and so {reason}; give "
            "the model as it was before, or dequantise it and save it again with save_pretrained"
        )
