"""What a person names becomes objects: traces, models, clusters, plans, and where answers may go.

Knows paths, sizes and names. Errors say what was named and what to name instead. Knows nothing of
options, HTTP or printing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import InputError, LoadmasterError, UsageError

if TYPE_CHECKING:
    from ..placement.cluster import Cluster
    from ..placement.plan import Plan
    from ..traces.model_spec import ModelSpec
    from ..traces.profile import Profile
    from ..traces.steps import StepSampler
    from ..traces.trace import RoutingTrace


def build_cluster(
    file: Path | None,
    preset: str,
    nodes: int,
    devices_per_node: int,
    slots_per_device: int | None,
    traffic: str,
    num_experts: int,
    oversubscription: float | None = None,
) -> Cluster:
    """The cluster the options describe."""
    from ..placement.cluster import Cluster

    if file is not None:
        cluster = Cluster.from_yaml(file)
    else:
        if slots_per_device is None:
            devices = max(nodes * devices_per_node, 1)
            share = -(-num_experts // devices)
            slots_per_device = share + max(1, round(share / 4))
        cluster = Cluster.preset(
            preset, nodes=nodes, devices_per_node=devices_per_node,
            slots_per_device=slots_per_device, traffic=traffic,
        )
    if oversubscription is None:
        return cluster
    return cluster.with_oversubscription(oversubscription)


def build_sampler(tokens: int, concurrency: int, order: str, seed: int) -> StepSampler:
    """The sampler the options describe."""
    from ..traces.steps import StepSampler

    return StepSampler(tokens=tokens, concurrency=concurrency, order=order, seed=seed)  # type: ignore[arg-type]


def read_model(source: Path | None) -> ModelSpec | None:
    """A checkpoint's or a JSON file's ModelSpec; None without a source."""
    from pydantic import ValidationError

    from ..foundation.documents import first_fault, read_json, require_mapping
    from ..traces.model_spec import ModelSpec

    if source is None:
        return None
    if source.is_dir():
        return ModelSpec.from_pretrained(source)
    try:
        value = read_json(source)
    except InputError as error:
        raise InputError(f"{error}; give a checkpoint's folder, or a ModelSpec as JSON") from None
    wanted = "num_layers, num_experts, top_k and what else is known"
    fields = require_mapping(value, str(source), "a ModelSpec file", wanted)
    try:
        return ModelSpec.model_validate(fields)
    except ValidationError as error:
        known = ", ".join(ModelSpec.model_fields)
        raise InputError(f"{source}: {first_fault(error, known)}") from None


def read_routing(path: Path, num_experts: int | None = None) -> tuple[
    RoutingTrace | Profile, tuple[str, ...]
]:
    """A stored trace, an array file or an engine's dump; and what its format cannot tell."""
    from ..traces.formats import import_any

    found = import_any(path, num_experts=num_experts)
    source = found.trace if found.trace is not None else found.profile
    assert source is not None
    missing = tuple(f"{found.format} does not tell {what}" for what in found.cannot_tell)
    return source, missing + found.notes


def read_trace(path: Path, num_experts: int | None = None) -> tuple[RoutingTrace, tuple[str, ...]]:
    """As `read_routing`; refuses a dump that holds loads only."""
    from ..traces.trace import RoutingTrace

    source, notes = read_routing(path, num_experts)
    if not isinstance(source, RoutingTrace):
        raise InputError(
            f"{path}: holds average loads only, and steps need routing per token",
            call="plan from it, for load only", command=f"`loadmaster plan {path}` plans from it, "
            "for load only",
        )
    return source, notes


def require_new(path: Path | None) -> None:
    """Refuse to write over a file that exists."""
    if path is not None and (path.exists() or path.is_symlink()):
        raise UsageError(f"{path} exists: name another file, or remove it first")


def require_target(path: Path | None) -> None:
    """Refuse, before any work, a file that exists or a place where none can be written."""
    import os

    require_new(path)
    if path is None:
        return
    if not path.parent.is_dir():
        raise UsageError(f"{path}: there is no folder {path.parent}: make it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UsageError(f"{path}: the folder {path.parent} cannot be written to")


def require_targets(*paths: Path | None) -> None:
    """As `require_target`, for all the files of a run, which must be different ones."""
    named = [path for path in paths if path is not None]
    for i, path in enumerate(named):
        require_target(path)
        if path.resolve() in [other.resolve() for other in named[:i]]:
            raise UsageError(f"{path} is named twice: give each output a file of its own")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full disk or a folder gone meanwhile becomes one line that names the file."""
    try:
        yield
    except OSError as error:
        raise LoadmasterError(f"{path}: cannot be written: {error.strerror or error}") from error


def read_plans(paths: Sequence[Path]) -> dict[str, Plan]:
    """Plan files by name. Raises UsageError where two would share a name."""
    from ..placement.plan import Plan

    named = {path.stem: Plan.load(path) for path in paths}
    if len(named) != len(paths):
        raise UsageError("two plan files share a name: rename one, names label the rows")
    return named


def with_current(
    plans: dict[str, Plan], current: Path | None
) -> tuple[dict[str, Plan], str | None]:
    """The plans, the active one among them; the name of that one."""
    plan = load_plan(current)
    if plan is None or current is None:
        return plans, None
    name = "current" if current.stem in plans else current.stem
    return plans | {name: plan}, name


def plans_cluster(
    plans: Mapping[str, Plan],
    file: Path | None,
    preset: str,
    nodes: int,
    devices_per_node: int | None,
    traffic: str,
    routing: RoutingTrace,
    oversubscription: float | None = None,
) -> Cluster:
    """The cluster the options describe; where they leave it open, one that the plans fill."""
    first = next(iter(plans.values()))
    if devices_per_node is None:
        devices_per_node = -(-first.num_devices // max(nodes, 1))
    slots = max(plan.slots_per_device for plan in plans.values())
    return build_cluster(
        file, preset, nodes, devices_per_node, slots, traffic, routing.num_experts,
        oversubscription,
    )


def load_plan(path: Path | None) -> Plan | None:
    """A plan file; None without one."""
    from ..placement.plan import Plan

    return None if path is None else Plan.load(path)


def build_executor(address: str | None) -> Any:
    """Ray tasks on the cluster named, or None: in this process."""
    if address is None:
        return None
    from ..workers.jobs.ray_executor import RayExecutor

    return RayExecutor(address)
