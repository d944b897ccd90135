"""The training objective of a schedule: noising, and the weighted loss of a prediction, in one pass each.

The operators are `ebdiff.ops`'s; see there.
"""

from ..ops.timestep_loss import TimestepLoss, noised, weighted_timestep_loss

__all__ = ["TimestepLoss", "noised", "weighted_timestep_loss"]
