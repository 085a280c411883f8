"""Hidden-layer LSTMs, grow-and-prune training and the paper's two benchmark models, as small readable modules."""

from .counting import count
from .growprune import grow, prune
from .lstm import HLSTM, HLSTMCell
from .masks import ConnectionMasks
from .schedule import GrowPruneSchedule

__all__ = ["HLSTM", "HLSTMCell", "ConnectionMasks", "GrowPruneSchedule", "grow", "prune", "count"]
