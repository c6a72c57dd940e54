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
    reserved_bytes: int | None = None,
    model: ModelSpec | None = None,
) -> tuple[Cluster, tuple[str, ...]]:
    """The cluster the options describe, and what to say of it.

    Slots that nobody names are an even share of the experts and a quarter more, or what the
    model leaves memory for.
    """
    from ..placement.cluster import Cluster
    from ..placement.memory import default_slots

    said = None
    if file is not None:
        cluster = Cluster.from_yaml(file)
    else:
        share = -(-num_experts // max(nodes * devices_per_node, 1))
        cluster = Cluster.preset(
            preset, nodes=nodes, devices_per_node=devices_per_node,
            slots_per_device=share if slots_per_device is None else slots_per_device,
            traffic=traffic,
        )
    cluster = cluster.with_reserved(reserved_bytes)
    if file is None and slots_per_device is None:
        slots, said = default_slots(share, cluster, model)
        cluster = cluster.with_slots(slots)
    if oversubscription is not None:
        cluster = cluster.with_oversubscription(oversubscription)
    return cluster, () if said is None else (said,)


def build_sampler(tokens: int, concurrency: int, order: str, seed: int) -> StepSampler:
    """The sampler the options describe."""
    from ..traces.steps import StepSampler

    return StepSampler(tokens=tokens, concurrency=concurrency, order=order, seed=seed)  # type: ignore[arg-type]


def read_model(source: Path | None, moe_layers: str | None = None) -> ModelSpec | None:
    """The ModelSpec of what `--model` names; None without a source.

    source: a checkpoint's folder, a config.json or params.json, a ModelSpec as JSON, or else a
    published model's name. moe_layers: `--moe-layers`, the answer where the files do not say it.
    Raises InputError or UsageError naming what was given and what to give.
    """
    from ..traces.catalogue import catalogue_model
    from ..traces.model_spec import ModelSpec

    if source is None:
        if moe_layers is not None:
            raise UsageError("--moe-layers says which layers of --model are MoE: give both")
        return None
    if source.is_dir():
        return ModelSpec.from_pretrained(source, moe_layers=moe_layers)
    if _may_be_a_name(source):
        return catalogue_model(str(source))
    if _is_configuration(_model_fields(source, finite=False)):
        return ModelSpec.from_pretrained(source, moe_layers=moe_layers)
    return _written_spec(source, _model_fields(source))


def _may_be_a_name(source: Path) -> bool:
    """Whether nothing stands there and it reads as "gpt-oss-20b" or "openai/gpt-oss-20b"."""
    if source.exists() or source.is_symlink() or source.suffix == ".json":
        return False
    return not source.is_absolute() and len(source.parts) <= 2 and source.parts[:1] != ("..",)


def _model_fields(source: Path, *, finite: bool = True) -> dict[str, Any]:
    from ..foundation.documents import read_json, require_mapping

    try:
        value = read_json(source, finite=finite)
    except InputError as error:
        raise InputError(
            f"{error}; give a checkpoint's folder, its config.json or params.json, a published "
            "model's name, or a ModelSpec as JSON"
        ) from None
    wanted = "num_layers, num_experts, top_k and what else is known"
    return require_mapping(value, str(source), "a ModelSpec file", wanted)


def _is_configuration(fields: dict[str, Any]) -> bool:
    """Whether a JSON file is a model's configuration, and no ModelSpec."""
    named = {"model_type", "architectures", "architecture", "text_config", "moe"}
    sized = {"hidden_size", "num_hidden_layers", "n_layers", "dim", "d_model"}
    return bool(named & fields.keys()) or (
        "num_layers" not in fields and bool(sized & fields.keys())
    )


def _written_spec(source: Path, fields: dict[str, Any]) -> ModelSpec:
    from pydantic import ValidationError

    from ..foundation.documents import first_fault
    from ..traces.model_spec import ModelSpec

    try:
        return ModelSpec.model_validate(fields)
    except ValidationError as error:
        known = ", ".join(ModelSpec.model_fields)
        raise InputError(f"{source}: {first_fault(error, known)}") from None


def model_notes(model: ModelSpec | None) -> tuple[str, ...]:
    """What was read of the model with a doubt, for the notes beside an answer."""
    return () if model is None else tuple(f"{model.name}: {note}" for note in model.notes)


def read_routing(
    path: Path, num_experts: int | None = None, *, model: ModelSpec | None = None,
    axes: str | None = None, layers: str | None = None,
) -> tuple[RoutingTrace | Profile, tuple[str, ...]]:
    """A stored trace, an array file or an engine's dump; and what its format cannot tell.

    model, axes, layers: which rows are which layers, where the file does not say.
    """
    from ..traces.formats import Asked, read_any

    found = read_any(path, Asked(
        num_experts=num_experts, model=model, axes=axes, layers=layer_numbers(layers)
    ))
    source = found.trace if found.trace is not None else found.profile
    assert source is not None
    missing = tuple(f"{found.format} does not tell {what}" for what in found.cannot_tell)
    return source, missing + found.notes


def read_trace(
    path: Path, num_experts: int | None = None, *, model: ModelSpec | None = None
) -> tuple[RoutingTrace, tuple[str, ...]]:
    """As `read_routing`; refuses a dump that holds loads only."""
    from ..traces.trace import RoutingTrace

    source, notes = read_routing(path, num_experts, model=model)
    if not isinstance(source, RoutingTrace):
        raise InputError(
            f"{path}: holds average loads only, and steps need routing per token: give it to "
            f"`loadmaster plan {path} --out plan.json`, which then plans for load only"
        )
    return source, notes


def layer_numbers(text: str | None) -> tuple[int, ...] | None:
    """Layers as a person names them, "3-60"; None where nobody did. Raises UsageError."""
    from ..traces.model_config.layer_ranges import parse_layers

    try:
        return None if text is None else parse_layers(text)
    except InputError as error:
        raise UsageError(f"--layers: {error.typed}") from None


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
    reserved_bytes: int | None = None,
) -> Cluster:
    """The cluster the options describe; where they leave it open, one that the plans fill."""
    first = next(iter(plans.values()))
    if devices_per_node is None:
        devices_per_node = -(-first.num_devices // max(nodes, 1))
    slots = max(plan.slots_per_device for plan in plans.values())
    return build_cluster(
        file, preset, nodes, devices_per_node, slots, traffic, routing.num_experts,
        oversubscription, reserved_bytes,
    )[0]


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
