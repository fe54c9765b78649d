"""Variables of the environment that would change results without being in any config.

accelerate launch, torchrun, mpirun and srun leave theirs in the shells that they start, and
accelerate, torch and diffusers read them as they are imported: precision, accumulation, sharding,
attention, and how many processes there are. What a run computes is in its config, so all of ppcl's
programs remove them. Kept are the variables that say where programs run, how fast and with what
memory (CUDA_VISIBLE_DEVICES, *_NUM_THREADS, NCCL_*, PYTORCH_*, TORCH_*), where files are (HF_*),
what is printed, and those that make computing more exact or repeatable. The file that `accelerate
config` writes does no harm: accelerate launch alone reads it.
"""

import logging
import os

log = logging.getLogger(__name__)

_LAUNCHERS = ("ACCELERATE_", "FSDP_", "PARALLELISM_CONFIG_", "MEGATRON_LM_", "FORK_LAUNCHED")
# Set for each of several processes: by torchrun and accelerate, and by three kinds of MPI.
_RANKS = {
    *(f"{of}{what}" for of in ("", "LOCAL_", "GROUP_", "ROLE_") for what in ("RANK", "WORLD_SIZE")),
    *("NODE_RANK", "ROLE_NAME", "MASTER_ADDR", "MASTER_PORT"),
}
_RANKED = ("TORCHELASTIC_", "PMI_", "OMPI_COMM_WORLD_", "MV2_COMM_WORLD_", "MPI_LOCAL")
# Somebody may have set these with intent, so their removal is logged.
_NUMBERS = (
    "DIFFUSERS_ATTN_BACKEND",  # another attention kernel, in those stages that see it
    "NVIDIA_TF32_OVERRIDE",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "CUBLAS_EMULATE_SINGLE_PRECISION",
    "DNNL_DEFAULT_FPMATH_MODE",  # images of some clouds set it to BF16
    "ONEDNN_DEFAULT_FPMATH_MODE",
    "PYTORCH_MPS_FAST_MATH",
    "TORCHINDUCTOR_USE_FAST_MATH",
)
RUN = "TORCHELASTIC_RUN_ID"


def forget() -> None:
    """Removes these variables from this process's environment, and so from its children's.

    A process that torchrun or launch.py has just started keeps what tells it its place.
    """
    for name in list(os.environ):
        if name.startswith(_LAUNCHERS):
            del os.environ[name]
        elif name in _NUMBERS:
            what = "%s=%s is left out of account: what a run computes with is in its config"
            log.warning(what, name, os.environ.pop(name))
    if not _is_one_of_several():
        forget_ranks()


def forget_ranks() -> None:
    """Removes what says that this process is one of several."""
    for name in list(os.environ):
        if name in _RANKS or name.startswith(_RANKED):
            del os.environ[name]


def _is_one_of_several() -> bool:
    """Whether torchrun's variables were set for this process, not inherited from its parent."""
    run = os.environ.get(RUN)
    if run is None:
        return False
    try:
        with open(f"/proc/{os.getppid()}/environ", "rb") as parents:
            return os.fsencode(f"{RUN}={run}") not in parents.read().split(b"\0")
    except OSError:
        return True
