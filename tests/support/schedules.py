"""Schedules of published few-step models."""

import math

LIGHTNING = {  # of lightx2v/Qwen-Image-Lightning, by its card: what differs from Qwen-Image's
    "base_shift": math.log(3),
    "max_shift": math.log(3),
    "shift_terminal": None,
    "use_dynamic_shifting": True,
}
