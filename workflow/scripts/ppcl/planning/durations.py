"""How long stages take.

Time is FLOPs over a sustained speed (forecast.tflops), and what no speed of arithmetic shortens.
Limits are `SAFETY` times that.
"""

import math

from ppcl.planning.workloads import Work
from ppcl.settings import Settings

# TFLOP/s, if forecast.tflops names none. An A100's peak is 312 in bf16, of which large products
# leave a third; a CPU's is that of two cores in float32.
GPU_TFLOPS, CPU_TFLOPS = 100.0, 0.02
# Of a GPU's speed in bf16, what TensorFloat-32 leaves, float32 (an A100's peaks are 312, 156 and
# 19.5), and float64 on one that is not made for it, or on a server's CPU, which does it where the
# GPU has no room; of a CPU's in float32, what float64 does.
TENSOR_FLOAT32, FLOAT32, GPU_FLOAT64, CPU_FLOAT64 = 1 / 2, 1 / 16, 1 / 200, 1 / 2
# Seconds: of starts and data for every pass over the model, and of text encoder and autoencoder for
# every picture, which no FLOPs here count.
PASS, PICTURE = 0.1, 2.0
# Bytes per second: of weights from a disk that many share; of blocks on their way to a GPU.
LOADING, STREAMING = 0.2e9, 10e9
# Of a limit: over the estimate; least and most minutes. Stages of more are submitted again at their
# limit and go on.
SAFETY, LEAST, MOST = 3, 10, 2880


def speed(settings: Settings, work: Work, float32: bool = False) -> float:
    """FLOP/s of one device, in the precision of a stage's work: the teacher's, unless it has its
    own; or of its passes in float32."""
    cpu = settings.device == "cpu"
    given = 1e12 * (settings.forecast.tflops or (CPU_TFLOPS if cpu else GPU_TFLOPS))
    if work.float64:
        return given * (CPU_FLOAT64 if cpu else GPU_FLOAT64)
    low = settings.teacher.dtype != "float32"
    if float32:
        return given * (1.0 if cpu else TENSOR_FLOAT32 if low else FLOAT32)
    if work.trains:
        low = getattr(settings, work.trains).mixed_precision != "no"
    return given * (1.0 if low or cpu else FLOAT32)


def seconds(work: Work, settings: Settings, weights: int) -> float:
    """What a stage is expected to take.

    Args:
        weights: bytes of the teacher's transformer.
    """
    spent = work.flops / work.devices / speed(settings, work)
    spent += work.float32 / work.devices / speed(settings, work, float32=True)
    spent += work.passes / work.devices * PASS + work.pictures * PICTURE
    if work.streams and settings.teacher.offload in ("stream", "auto"):
        spent += work.passes / work.devices * weights / STREAMING
    return spent + work.models * weights / LOADING


def minutes(seconds: float) -> int:
    """The time limit of a job that is expected to take so many seconds."""
    return min(MOST, max(LEAST, math.ceil(SAFETY * seconds / 60)))
