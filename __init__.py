"""Loadmaster decides which GPU every expert of a mixture-of-experts model lives on.

The public names, found where they live when first used: importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .foundation.version import VERSION

if TYPE_CHECKING:
    from .errors import InfeasibleError, InputError, LoadmasterError, UsageError
    from .placement.cluster import Cluster
    from .placement.comparison.compare import Comparison, compare
    from .placement.cost.evaluate import Evaluation, evaluate
    from .placement.plan import DispatchSpec, Evidence, Plan
    from .placement.planning.planner import PlanResult, plan
    from .placement.rebalancing.rebalance import rebalance
    from .simulator.serving.simulate import simulate
    from .simulator.serving.workload import Workload
    from .traces.load import load_trace
    from .traces.model_spec import ModelSpec
    from .traces.profile import Profile
    from .traces.steps import StepSampler
    from .traces.storage.store import save_trace
    from .traces.trace import RoutingTrace
    from .workers.group.group import Group

__version__ = VERSION

_HOME = {
    "Cluster": "placement.cluster",
    "Comparison": "placement.comparison.compare",
    "DispatchSpec": "placement.plan",
    "Evaluation": "placement.cost.evaluate",
    "Evidence": "placement.plan",
    "Group": "workers.group.group",
    "InfeasibleError": "errors",
    "InputError": "errors",
    "LoadmasterError": "errors",
    "ModelSpec": "traces.model_spec",
    "Plan": "placement.plan",
    "PlanResult": "placement.planning.planner",
    "Profile": "traces.profile",
    "RoutingTrace": "traces.trace",
    "StepSampler": "traces.steps",
    "UsageError": "errors",
    "Workload": "simulator.serving.workload",
    "compare": "placement.comparison.compare",
    "evaluate": "placement.cost.evaluate",
    "load_trace": "traces.load",
    "plan": "placement.planning.planner",
    "rebalance": "placement.rebalancing.rebalance",
    "save_trace": "traces.storage.store",
    "simulate": "simulator.serving.simulate",
}

__all__ = [
    "Cluster",
    "Comparison",
    "DispatchSpec",
    "Evaluation",
    "Evidence",
    "Group",
    "InfeasibleError",
    "InputError",
    "LoadmasterError",
    "ModelSpec",
    "Plan",
    "PlanResult",
    "Profile",
    "RoutingTrace",
    "StepSampler",
    "UsageError",
    "Workload",
    "compare",
    "evaluate",
    "load_trace",
    "plan",
    "rebalance",
    "save_trace",
    "simulate",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
