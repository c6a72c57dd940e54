"""Loadmaster decides which GPU every expert of a mixture-of-experts model lives on.

The public names, found where they live when first used: importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .errors import InfeasibleError, InputError, LoadmasterError, UsageError
    from .placement.cluster import Cluster
    from .placement.comparison import Comparison, compare
    from .placement.evaluate import Evaluation, evaluate
    from .placement.plan import DispatchSpec, Evidence, Plan
    from .placement.planner import PlanResult, plan
    from .placement.rebalance import rebalance
    from .simulator.serve import simulate
    from .simulator.workload import Workload
    from .traces.profile import Profile
    from .traces.spec import ModelSpec
    from .traces.steps import StepSampler
    from .traces.store import load_trace, save_trace
    from .traces.trace import RoutingTrace
    from .workers.group import Group

__version__ = "0.1.0"

_HOME = {
    "Cluster": "placement.cluster",
    "Comparison": "placement.comparison",
    "DispatchSpec": "placement.plan",
    "Evaluation": "placement.evaluate",
    "Evidence": "placement.plan",
    "Group": "workers.group",
    "InfeasibleError": "errors",
    "InputError": "errors",
    "LoadmasterError": "errors",
    "ModelSpec": "traces.spec",
    "Plan": "placement.plan",
    "PlanResult": "placement.planner",
    "Profile": "traces.profile",
    "RoutingTrace": "traces.trace",
    "StepSampler": "traces.steps",
    "UsageError": "errors",
    "Workload": "simulator.workload",
    "compare": "placement.comparison",
    "evaluate": "placement.evaluate",
    "load_trace": "traces.store",
    "plan": "placement.planner",
    "rebalance": "placement.rebalance",
    "save_trace": "traces.store",
    "simulate": "simulator.serve",
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
