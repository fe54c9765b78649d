"""How long stages take.

Time is FLOPs over a sustained speed (forecast.tflops), plus what faster arithmetic does not
shorten: starts, data, loading. Time limits of jobs are `SAFETY` times that.
"""

import math

from ppcl.planning.workloads import Work
from ppcl.settings import Settings

# Sustained TFLOP/s, if forecast.tflops names none. A GPU's in bf16: large products reach a third of
# an A100's peak of 312. A CPU's in float32: of two cores.
GPU_TFLOPS, CPU_TFLOPS = 100.0, 0.02
# Shares of these speeds. On a GPU: with TensorFloat-32, with float32 (an A100's peaks are 312, 156
# and 19.5), and with float64, on a GPU that is not made for it or on a server's CPU, which steps in
# where the GPU has no room. On a CPU: with float64.
TENSOR_FLOAT32, FLOAT32, GPU_FLOAT64, CPU_FLOAT64 = 1 / 2, 1 / 16, 1 / 200, 1 / 2
# Seconds that FLOPs here do not count: per pass over the model, for starts and data; per picture,
# for text encoder and autoencoder.
PASS, PICTURE = 0.1, 2.0
# Bytes per second: weights from a disk that many share; blocks from main memory to a GPU.
LOADING, STREAMING = 0.2e9, 10e9
# A job's time limit is SAFETY times the estimate, within LEAST and MOST minutes. A stage that takes
# longer than MOST is submitted again at its limit, and goes on.
SAFETY, LEAST, MOST = 3, 10, 2880


def speed(settings: Settings, work: Work, float32: bool = False) -> float:
    """Sustained FLOP/s of one device in the precision of a stage's work: float64, that of its
    training, or else the teacher's.

    float32: of the stage's passes in float32 (`Work.float32`) instead.
    """
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
    """Seconds that a stage is expected to take.

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
    """The time limit, in minutes, of a job that is expected to take so many seconds."""
    return min(MOST, max(LEAST, math.ceil(SAFETY * seconds / 60)))
