"""Hidden-layer LSTMs, grow-and-prune training and the paper's two benchmark models, as small readable modules.

Names are imported when they are first used, so that the inference engine (`load_compact`) does without torch.
"""

import importlib

_HOMES = {"HLSTM": "lstm", "HLSTMCell": "lstm", "ConnectionMasks": "masks", "GrowPruneSchedule": "schedule",
          "grow": "growprune", "prune": "growprune", "count": "counting", "load_compact": "compact.runtime"}
__all__ = list(_HOMES)


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
