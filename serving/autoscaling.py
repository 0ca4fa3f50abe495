"""How many replicas a service needs, by the decoder rows that are asked for. Called in Ray Serve's controller."""

from typing import Any

from ray.serve.config import AutoscalingContext

METRIC = "occupancy"


class ByOccupancy:
    """A policy of Ray Serve: so many replicas that each has `target` of its rows in use or asked for. Serve keeps the
    answer within its bounds, and waits before it follows."""

    def __init__(self, target: float) -> None:
        self.target = target

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        told = (context.aggregated_metrics or {}).get(METRIC, {})
        if not told:  # no replica has spoken yet
            return context.target_num_replicas, context.policy_state
        # A replica that has just come and has not spoken counts as empty.
        return sum(told.values()) / self.target, context.policy_state


def occupancy(load: dict[str, int], share: float = 1.0) -> float:
    """Rows of a model in use or asked for, as a share of those that may be in use now: above 1 where requests wait."""
    return (load["rows_live"] + load["rows_waiting"]) / (share * load["rows_total"])
