"""How many tokens a pipeline makes of a prompt, and how many of them it reads."""

import inspect
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from transformers import PreTrainedTokenizerFast

from ppcl.teacher import signatures
from ppcl.transformer.families import FAMILIES
from ppcl.transformer.family import Family

log = logging.getLogger(__name__)

# A text with spaces, line breaks, digits, punctuation, accents and another script.
_SAMPLE = "A photo of 2 cats, it's 10:30.\nÜber Paris: 猫"


def as_published(pipe: DiffusionPipeline, folder: Path) -> None:
    """Replaces tokenizers that make other tokens than their tokenizer.json says, and logs which.

    transformers 5 builds tokenizers of some classes from the vocabulary of that file alone. So
    LlamaTokenizer, which HunyuanVideo's pipelines name, takes a byte-level vocabulary for one of
    sentencepiece and drops every space. The text encoder was trained with the whole file's tokens.

    Args:
        pipe: the pipeline, just loaded; changed in place.
        folder: the folder from which it was loaded.
    """
    for name, part in pipe.components.items():
        tokenizer = getattr(part, "tokenizer", None) or part
        if (
            not isinstance(tokenizer, PreTrainedTokenizerFast)
            or type(tokenizer) is PreTrainedTokenizerFast
            or not (folder / name / "tokenizer.json").is_file()
        ):
            continue
        plain = PreTrainedTokenizerFast.from_pretrained(
            folder / name,
            padding_side=tokenizer.padding_side,
            model_input_names=tokenizer.model_input_names,
        )
        plainly = {"add_special_tokens": False, "verbose": False}
        if tokenizer(_SAMPLE, **plainly).input_ids == plain(_SAMPLE, **plainly).input_ids:
            continue
        log.warning(
            "%s: transformers' %s makes other tokens of prompts than its tokenizer.json says; "
            "here, and in what is exported, the file is read as it is",
            name,
            type(tokenizer).__name__,
        )
        if tokenizer is part:
            pipe.register_modules(**{name: plain})
        else:
            part.tokenizer = plain


def family(pipe: DiffusionPipeline) -> Family | None:
    """The registry entry of the pipeline's transformer; None if it has none."""
    bases = (base for part in pipe.components.values() for base in type(part).__mro__)
    return next((FAMILIES[base.__name__] for base in bases if base.__name__ in FAMILIES), None)


def readers(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Name -> tokenizer, or processor with one, for those whose text reaches the transformer token
    by token: those in `Family.texts` that the pipeline has, or all if it has none of them."""
    parts = {
        name: part
        for name, part in pipe.components.items()
        if part is not None and ("tokenizer" in name or hasattr(part, "tokenizer"))
    }
    known = family(pipe)
    named = {k: parts[k] for k in known.texts if k in parts} if known is not None else {}
    return named or parts


def count(reader: Any, text: str) -> int:
    """Number of tokens of a text, including special tokens, without padding and truncation.

    Args:
        reader: a tokenizer, or a processor of texts and pictures.
    """
    tokenizer = getattr(reader, "tokenizer", None) or reader
    takes = inspect.signature(type(tokenizer).__call__).parameters
    given = {"text": text} if "text" in takes else {}
    # Without this, a tokenizer warns of texts that are too long for its model.
    quiet = {"verbose": False} if "verbose" in takes else {}
    tokens = tokenizer(*([] if given else [text]), **given, **quiet)["input_ids"]
    if hasattr(tokens, "shape"):
        return tokens.shape[-1]
    return len(tokens[0]) if tokens and isinstance(tokens[0], (list, tuple)) else len(tokens)


def lengths(pipe: DiffusionPipeline, prompts: list[str]) -> dict[str, tuple[int, ...]]:
    """Prompt -> numbers that must be equal for all prompts of a batch: its number of tokens by each
    tokenizer, and `Family.apart`. So no prompt is padded, or treated as another one asks.

    They are equal for all prompts if a stock pipeline pads every prompt to one length without a
    mask. Without a tokenizer, the number of characters counts.
    """
    known, stock = family(pipe), type(pipe).__module__.startswith("diffusers.")
    if stock and known is not None and not known.masks:
        return dict.fromkeys(prompts, ())
    tokenizers = readers(pipe).values()
    apart = known.apart if known is not None else None
    return {
        p: (tuple(count(reader, p) for reader in tokenizers) or (len(p),))
        + ((apart(pipe, p),) if apart is not None else ())
        for p in set(prompts)
    }


def cut(pipe: DiffusionPipeline, prompts: list[str], settings: Mapping) -> dict[str, int]:
    """Prompt -> number of its tokens, for prompts of which the transformer gets only the beginning.

    A prompt that one of several tokenizers takes as a whole is not cut.

    Args:
        settings: the config's `pipeline` mapping.
    """
    lengths_of = {}
    for prompt in dict.fromkeys(prompts):
        over = [_over(pipe, name, part, prompt, settings) for name, part in readers(pipe).items()]
        tokens = [number for number in over if number]
        if over and len(tokens) == len(over):
            lengths_of[prompt] = max(tokens)
    return lengths_of


def warn_of_cut(pipe: DiffusionPipeline, prompts: list[str], settings: Mapping, key: str) -> None:
    """Logs how many prompts are cut, and one of them; nothing if none is.

    Args:
        key: the config key that names the prompts file, for the message.
    """
    short = cut(pipe, prompts, settings)
    if not short:
        return
    prompt, tokens = max(short.items(), key=lambda item: item[1])
    limits = [_limit(pipe, name, part, settings) for name, part in readers(pipe).items()]
    asked = "max_sequence_length" in signatures.of_class(type(pipe)).parameters
    log.warning(
        "%s: %d of %d prompts are longer than the %d tokens that %s reads of one, and are cut, "
        "such as '%s' with %d; shorten them%s",
        key,
        len(short),
        len(set(prompts)),
        max(limits),
        type(pipe).__name__,
        prompt if len(prompt) < 100 else f"{prompt[:97]}...",
        tokens,
        " or raise pipeline.max_sequence_length" if asked else "",
    )


def hush(pipe: DiffusionPipeline) -> None:
    """Silences the warnings of cut prompts that diffusers and transformers log for every batch.
    `warn_of_cut` logs one for all."""
    modules = {base.__module__ for base in type(pipe).__mro__}
    for name in (*modules, "transformers.tokenization_utils_base"):
        logging.getLogger(name).addFilter(_says_something_else)


def _says_something_else(record: logging.LogRecord) -> bool:
    said = str(record.msg)
    return not said.startswith(
        ("The following part of your input was truncated", "Token indices sequence length is")
    )


def _over(
    pipe: DiffusionPipeline, name: str, reader: Any, prompt: str, settings: Mapping
) -> int | None:
    """Number of tokens of the text that a tokenizer gets for a prompt; None if it is not cut."""
    own = settings.get(name.replace("tokenizer", "prompt")) if name != "tokenizer" else None
    text, spare, known = own if isinstance(own, str) else prompt, 0, family(pipe)
    if known is not None and known.framed is not None:
        text, spare = known.framed(pipe, settings, reader, text)
    tokens = count(reader, text) - spare
    return tokens if tokens > _limit(pipe, name, reader, settings) else None


def _limit(pipe: DiffusionPipeline, name: str, reader: Any, settings: Mapping) -> float:
    """Largest number of a tokenizer's tokens that the pipeline reads; infinity if there is none."""
    tokenizer = getattr(reader, "tokenizer", None) or reader
    own = getattr(tokenizer, "model_max_length", None) or math.inf
    parameter = signatures.of_class(type(pipe)).parameters.get("max_sequence_length")
    default = parameter.default if parameter is not None else None
    asked = settings.get("max_sequence_length") or default
    # HunyuanImage has no such argument, but attributes like tokenizer_max_length.
    asked = asked or getattr(pipe, f"{name}_max_length", None)
    config = getattr(getattr(pipe, name.replace("tokenizer", "text_encoder"), None), "config", None)
    config = getattr(config, "text_config", None) or config
    places = getattr(config, "max_position_embeddings", None)
    # CLIP can't read beyond its last position, whatever is asked for; T5 has no such limit.
    return min(asked or own, own if places else math.inf, places or math.inf)
