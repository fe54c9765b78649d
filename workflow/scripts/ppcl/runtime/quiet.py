"""Silences messages of libraries that no user can act on, each by name; all others are shown.

Shown are, for one, weights that are missing or new, prompts that are cut, requests without a token.
"""

import logging
import os
import re
import warnings
from collections.abc import Callable

# Logger -> beginnings of its messages.
MESSAGES = {
    "diffusers.pipelines.pipeline_utils": (
        r"self\.\w+=None of type <class 'NoneType'> cannot be saved",  # assembly.export copies them
        r"Keyword arguments \{.*\} are not expected by",  # components that were left out
    ),
    "diffusers.guiders.guider_utils": (r"Guiders are currently an experimental feature",),
    "transformers.utils.import_utils": (r"`\w+` requires torchvision \(not installed\); falling",),
    "transformers.processing_utils": (r"`\w+` defines `\w+ = '\w+'`, which is deprecated",),
    "transformers.configuration_utils": (r"`torch_dtype` is deprecated",),
    "transformers.integrations.sdpa_attention": (
        r"`sdpa` attention does not support `output_attentions=True`",
    ),
    "huggingface_hub.file_download": (r"Xet Storage is enabled for this repo, but the 'hf_xet'",),
    # Optional packages that are there, and not used here.
    "torchao": (r"Skipping import of cpp extensions", r"Failed to load .*\.so"),
    "torch.utils._pytree": (r"<enum '\w+'> is an Enum subclass",),  # of torchao
    "diffusers.quantizers.torchao.torchao_quantizer": (
        r"Unable to import `torchao` Tensor objects",  # of pickled weights, which are not read
        r"You are trying to set torch_dtype to torch.float\d+ for integer quantization",  # it works
    ),
    "bitsandbytes.cextension": (r"The installed version of bitsandbytes was compiled without GPU",),
    "bitsandbytes.backends.cpu.ops": (r"Failed to load CPU gemm_4bit_forward",),
}
WARNINGS = (
    r"In CPU autocast, but the target dtype is not supported",
    r"CPU Autocast only supports",
)
LIBRARIES = r"(accelerate|diffusers|huggingface_hub|torch|transformers)(\.|$)"


def start() -> None:
    """Silences them from now on, in every program: to be called before libraries are loaded."""
    for name, beginnings in MESSAGES.items():
        logging.getLogger(name).addFilter(_without(re.compile("|".join(beginnings))))
    for beginning in WARNINGS:
        warnings.filterwarnings("ignore", beginning)
    # Deprecated parts of a library that itself or another library still uses.
    warnings.filterwarnings("ignore", category=FutureWarning, module=LIBRARIES)
    # Without it, tokenizers turn their parallelism off after a fork, and warn that they do.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _without(pattern: re.Pattern[str]) -> Callable[[logging.LogRecord], bool]:
    return lambda said: not pattern.match(said.getMessage())
