"""A table as a finished ablation could have left it."""

import json

import numpy as np
import pandas as pd

from ppcl.ablation import methods
from ppcl.storage import schemas


def table(judged: bool = True, seed: int = 0) -> pd.DataFrame:
    """Three seeds of the ladder and of two rivals, one of the rest."""
    rng = np.random.default_rng(seed)
    rows = []
    for order, (name, method) in enumerate(methods.METHODS.items()):
        level = 0.05 * np.exp(-0.15 * order) if method.group == "ladder" else 0.02
        count = 3 if method.group == "ladder" or name in ("amber", "shortgpt") else 1
        for number in range(1 if name == "teacher" else count):
            error = level * rng.lognormal(0, 0.15)
            kind = method.train.get("low_rank")
            states = [] if kind == "only" else ["plugged", "finetuned"]
            states += ["low_rank", "low_rank_finetuned"] if kind else []
            for state in states:
                error *= 0.4 if state.endswith("finetuned") else 1
                row = dict.fromkeys(schemas.ABLATION.names, 0.9)
                row |= {"method": name, "group": method.group, "label": method.label}
                row |= {"order": order, "seed": number, "state": state, "steps": 200}
                row |= {"removed_blocks": 10, "removed_parameters": 10**6, "intervals": "[]"}
                row |= {"text_runs": "[]", "linear_ffns": "[]", "parameter_fraction": 0.59}
                row |= {"velocity_error": error, "velocity_error_low": 0.9 * error}
                parts = rng.dirichlet(np.ones(6)) * error
                row |= {"by_prompt": json.dumps([parts.tolist(), [1 / 6] * 6]), "right": "[]"}
                row |= {"velocity_error_high": 1.1 * error}
                row |= {"all_correct": 0.98 - 4 * error if judged else np.nan}
                rows.append(row)
                if name == "teacher":
                    rows[-1] |= {"velocity_error": 0.0, "all_correct": 0.98 if judged else np.nan}
                    break
            for part in range(1, 8) if method.group == "schedule" else ():
                smaller = {"state": "part", "removed_parameters": part * 10**6 // 8}
                smaller |= {"parameter_fraction": 1 - 0.41 * part / 8, "latency_ratio": np.nan}
                smaller |= {"velocity_error": error * part / 8 * rng.lognormal(0, 0.15)}
                rows.append(row | smaller)
    return pd.DataFrame(rows)[schemas.ABLATION.names]
