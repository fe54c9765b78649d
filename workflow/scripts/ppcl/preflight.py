"""Cheap checks, before anything runs, of what a configuration points at.

Reads neither torch nor diffusers, so that Snakefiles can import it.
"""

import csv
import json
import re
import struct
from pathlib import Path

from ppcl.errors import UserError
from ppcl.families import family_of

JUDGE_COLUMNS = ("digit", "digit_color", "background_color")


def check(config: dict, source: str = "config") -> None:
    """Cheap checks of what the configuration points at: teacher, prompts, possible budgets.

    Raises UserError naming the key, the file and the fix.
    """
    _check_teacher(config["teacher"]["path"], source)
    used = []
    for stage in ("record", "evaluate"):
        rows = prompts(config[stage]["prompts"], f"{source}: {stage}.prompts")
        used.append({row["prompt"] for row in rows[: config[stage]["samples"]]})
    if shared := sorted(used[0] & used[1]):
        raise UserError(
            f"{source}: evaluate.prompts: '{shared[0]}' is also a calibration prompt "
            "(record.prompts), so results on it would flatter; remove it from one of the two files"
        )
    if config["evaluate"]["judge"] == "digits":
        path = config["evaluate"]["prompts"]
        row = prompts(path, f"{source}: evaluate.prompts")[0]
        missing = [column for column in JUDGE_COLUMNS if column not in row]
        if missing:
            raise UserError(
                f"{source}: evaluate.judge is 'digits', but {path} has no column "
                f"{', '.join(missing)}; add it or set evaluate.judge: none"
            )
    for stage in ("distill", "subsets", "finetune"):
        size = config[stage]["batch_size"]
        if config["processes"] != "auto" and config["processes"] > size:
            raise UserError(
                f"{source}: processes is {config['processes']}, but {stage}.batch_size only "
                f"{size}, and every process needs a sample; raise one or lower the other"
            )
    smallest = _smallest_fraction(Path(config["teacher"]["path"]), config["intervals"], source)
    for variant in config["variants"]:
        if smallest is not None and variant["budget"] < smallest:
            raise UserError(
                f"{source}: variants: budget {variant['budget']} of '{variant['name']}' is "
                f"impossible: even one student in place of every unprotected block leaves "
                f"{smallest:.3f} of this teacher's parameters; choose a larger budget"
            )


def prompts(path: str | Path, key: str = "prompts") -> list[dict[str, str]]:
    """The rows of a prompts file: each has `prompt`, a CSV keeps its other columns too.

    A .csv needs a header with `prompt`; any other file holds one prompt per line (empty lines
    are skipped). Raises UserError if it is missing, empty, not UTF-8 or has no prompt column.
    """
    try:
        # utf-8-sig: spreadsheets prefix a byte order mark, which would become part of a prompt.
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{key}: {path} is not UTF-8 (byte {error.start}); save the file as UTF-8"
        ) from error
    except OSError as error:
        raise UserError(
            f"{key}: cannot read {path} ({error.strerror}); set the key to a prompts file"
        ) from error
    if str(path).lower().endswith(".csv"):
        reader = csv.DictReader(text.splitlines(keepends=True))
        if text.strip() and "prompt" not in (reader.fieldnames or []):
            raise UserError(f"{key}: {path} has no column 'prompt'; name it in the first line")
        rows = list(reader)
        for row in rows:
            if None in row:
                raise UserError(
                    f"{key}: {path}: '{row['prompt']}' is followed by more columns than the header "
                    "has; put prompts with commas in double quotes"
                )
        rows = [row for row in rows if (row["prompt"] or "").strip()]
    else:
        rows = [{"prompt": line.strip()} for line in text.splitlines() if line.strip()]
    if not rows:
        raise UserError(f"{key}: {path} is empty; write at least one prompt, one per line")
    return rows


def _check_teacher(teacher: str, source: str) -> None:
    folder = Path(teacher)
    if not folder.exists():
        if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", teacher) and not folder.parent.exists():
            return  # a repository name on the Hub, which only the download can check
        raise UserError(
            f"{source}: teacher.path: {teacher} does not exist; give the folder of a diffusers "
            f"pipeline or the name of a repository on the Hub (owner/name)"
        )
    index_path = folder / "model_index.json"
    if not index_path.is_file():
        raise UserError(
            f"{source}: teacher.path: {teacher} is not a diffusers pipeline (it has no "
            f"model_index.json); give the folder that save_pretrained wrote"
        )
    try:
        index = json.loads(index_path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{index_path}: not valid JSON ({error}); restore the file") from error
    if "_class_name" not in index or "transformer" not in index:
        raise UserError(
            f"{source}: teacher.path: {index_path} names no transformer; only pipelines whose "
            f"denoiser is a transformer can be pruned"
        )
    family_of(index["transformer"][1])
    if not (folder / "transformer" / "config.json").is_file():
        raise UserError(
            f"{source}: teacher.path: {folder / 'transformer'} has no config.json; restore the "
            f"transformer's folder"
        )
    for weights in sorted(folder.glob("*/*.safetensors")):
        safetensors_header(weights)


def _smallest_fraction(folder: Path, intervals: dict, source: str) -> float | None:
    """The smallest fraction of a local teacher's parameters that pruning can leave, or None.

    One student in place of all unprotected blocks, counted from the safetensors headers alone.
    """
    blocks: dict[tuple[str, int], int] = {}
    total = 0
    for path in sorted((folder / "transformer").glob("*.safetensors")):
        for name, entry in safetensors_header(path).items():
            if name == "__metadata__":
                continue
            count = 1
            for length in entry["shape"]:
                count *= length
            total += count
            match = re.match(r"([\w.]*blocks)\.(\d+)\.", name)
            if match:
                key = (match[1], int(match[2]))
                blocks[key] = blocks.get(key, 0) + count
    if not blocks:
        return None
    protected = intervals["protect_first"] + intervals["protect_last"]
    if protected > len(blocks) - 2:
        raise UserError(
            f"{source}: intervals: protect_first and protect_last keep {protected} of this "
            f"teacher's {len(blocks)} blocks, which leaves nothing to prune; lower them"
        )
    return 1 - sum(sorted(blocks.values())[protected + 1 :]) / total


def safetensors_header(path: Path) -> dict:
    """Names, shapes and types of a safetensors file, without reading its tensors.

    Raises UserError if the file is truncated or not safetensors.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length < size else None
        ends = [v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"]
        complete_size = 8 + length + max(ends, default=0)
    except (OSError, ValueError, struct.error, AttributeError, KeyError, TypeError):
        complete_size = None
    if complete_size is None or complete_size != size:
        raise UserError(f"{path}: truncated or not a safetensors file; restore or remake it")
    return header
