"""`loadmaster trace`: record, import, info, synth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import output as show
from .options import Axes, Json, Layers, MoeLayers, NumExperts, RowsModel, Seed, TraceArgument
from .reports import ReportFile, ReportPictures, require_report_targets, write_reports

app = typer.Typer(help="Get a trace, and see whether it is long enough.", no_args_is_help=True,
                  rich_markup_mode=None)

Out = Annotated[Path, typer.Option("--out", "-o", help="Folder to create for the trace.")]


@app.command()
def record(
    model: Annotated[Path, typer.Option(help="Checkpoint folder of any Hugging Face MoE model.")],
    text: Annotated[list[Path], typer.Option(help="Text files; a file's name is its domain.")],
    out: Out,
    request_tokens: Annotated[int, typer.Option(help="Tokens of each request.")] = 512,
    step_tokens: Annotated[int, typer.Option(help="Prompt tokens of a step.")] = 4096,
    decode_tokens: Annotated[int, typer.Option(help="Tokens each request generates.")] = 0,
    max_tokens: Annotated[int | None, typer.Option(help="Stop after about so many.")] = None,
    gates: Annotated[bool, typer.Option(help="Record gate weights too.")] = False,
    requests: Annotated[
        bool, typer.Option(help="Record request numbers (routing leaks content).")
    ] = True,
    json: Json = False,
) -> None:
    """Run texts through a checkpoint in this process and record its routing."""
    from ..errors import InputError
    from ..traces.recording.record_model import Text, record_model
    from ..traces.storage.manifest import MANIFEST_NAME

    texts = []
    for path in text:
        try:
            texts.append(Text(path.read_text(encoding="utf-8"), domain=path.stem))
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not readable as UTF-8 text: {error}") from error
    kept = out / MANIFEST_NAME
    stood = kept.exists()
    try:
        with show.progress_bar() as bar:
            task = bar.add_task("recording tokens", total=None)
            summary = record_model(
                model, texts, out, request_tokens=request_tokens, step_tokens=step_tokens,
                decode_tokens=decode_tokens, max_tokens=max_tokens, gates=gates,
                requests=requests,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except KeyboardInterrupt:
        if stood or not kept.exists():
            raise
        show.print_error(f"interrupted; {out} holds the whole steps recorded until then")
        raise typer.Exit(130) from None
    if json:
        show.print_json({"trace": str(out), **vars(summary)})
    else:
        show.print_verdict(f"recorded {summary.tokens:,} tokens to {out}")


@app.command("import")
def import_(
    source: Annotated[
        Path, typer.Argument(help="File or folder: arrays, an engine's dump, responses, a table.")
    ],
    out: Out,
    num_experts: NumExperts = None,
    key: Annotated[
        list[str] | None,
        typer.Option(help="Name of an array in the file, as in request=seq. May repeat."),
    ] = None,
    model: RowsModel = None,
    moe_layers: MoeLayers = None,
    axes: Axes = None,
    layers: Layers = None,
    top_k: Annotated[
        int | None, typer.Option(help="Experts a token chooses, where rows do not tell tokens "
                                 "apart, or numbers have no shape.")
    ] = None,
    zero_experts: Annotated[
        int | None, typer.Option(help="So many ids beyond the experts compute nothing; 0: none.")
    ] = None,
    drop_repeated: Annotated[
        bool, typer.Option("--drop-repeated", help="Leave out tokens that share one route.")
    ] = False,
    json: Json = False,
) -> None:
    """Bring routing in other tools' files into our format: arrays, dumps, responses, tables."""
    from ..app.inputs import layer_numbers, read_model
    from ..errors import InputError, UsageError
    from ..traces.formats import Asked, ImportResult, open_any
    from ..traces.storage.manifest import require_unused
    from ..traces.storage.store import save_blocks, save_trace

    require_unused(out)
    keys = dict(pair.partition("=")[::2] for pair in key or ())
    if not all(keys.values()):
        raise UsageError("--key is written column=name, as in --key request=seq")
    found = open_any(source, Asked(
        num_experts, keys, axes, layer_numbers(layers), read_model(model, moe_layers), top_k,
        zero_experts, drop_repeated,
    ))
    notes = found.notes
    if not isinstance(found, ImportResult):
        tokens, notes = found.routes.num_tokens, (*notes, *found.routes.notes)
        save_blocks(found.routes.blocks(), out)
    elif found.trace is not None:
        tokens = found.trace.num_tokens
        save_trace(found.trace, out)
    else:
        told = f" --axes {axes}" if axes else ""
        raise InputError(
            f"{source}: {found.format} holds average loads only, which are no trace: `loadmaster "
            f"plan {source}{told}` takes it as it is"
        )
    if json:
        show.print_json({"trace": str(out), "format": found.format, "tokens": tokens,
                         "cannot_tell": found.cannot_tell, "notes": notes})
        return
    show.print_verdict(f"imported {tokens:,} tokens ({found.format}) to {out}")
    show.print_notes([f"the format does not tell {what}" for what in found.cannot_tell])
    show.print_notes(notes)


@app.command()
def info(
    trace: TraceArgument,
    devices: Annotated[int, typer.Option(help="Devices the learning curve packs for.")] = 8,
    num_experts: NumExperts = None,
    axes: Axes = None,
    report: ReportFile = None,
    report_png: ReportPictures = None,
    json: Json = False,
) -> None:
    """What a trace holds, and whether it is long enough to plan from."""
    from ..simulator.report.trace_report import trace_report
    from ..traces.analysis.summary import trace_info
    from ..traces.formats import Asked, read_any

    require_report_targets(report, report_png)
    found = read_any(trace, Asked(num_experts=num_experts, axes=axes))
    facts = trace_info(found, devices=devices)
    write_reports({"": trace_report(facts)}, report, report_png)
    if json:
        show.print_json(facts.to_dict())
        return
    show.print_verdict(facts.verdict)
    rows = [
        ("format", facts.format), ("model", facts.model_name or None), ("tokens", facts.tokens),
        ("layers", facts.layers), ("experts per layer", facts.experts),
        ("experts per token", facts.top_k), ("requests", facts.requests),
        ("home ranks", facts.source_ranks), ("recorded steps", facts.recorded_steps),
        ("steps of 512 tokens, 64 in flight", facts.steps_available),
        ("hottest expert / mean, median layer", sorted(facts.skew_L)[len(facts.skew_L) // 2]),
        ("hottest expert / mean, worst layer", max(facts.skew_L)),
        ("noise floor of the loads, bits", facts.floor_bits),
    ]
    show.print_table("", ("", "value"), rows)
    for title, counts in (("phase", facts.tokens_by_phase), ("domain", facts.tokens_by_domain)):
        if counts:
            shown = list(counts.items())[:12]
            if len(counts) > len(shown):
                rest = list(counts.values())[len(shown):]
                shown.append((f"and {len(rest)} more", sum(rest)))
            show.print_table("", (title, "tokens"), shown)
    if facts.curve is not None:
        show.print_table(
            f"learning curve, judged by {facts.curve.judged_by}",
            ("planned from tokens", "imbalance on unseen requests", "spread"),
            list(zip(facts.curve.tokens, facts.curve.imbalance, facts.curve.spread, strict=True)),
        )
    show.print_notes([f"the format does not tell {what}" for what in facts.cannot_tell])
    show.print_notes(facts.notes)


@app.command()
def synth(
    out: Out,
    layers: Annotated[int, typer.Option(help="MoE layers.")] = 58,
    experts: Annotated[int, typer.Option(help="Experts per layer.")] = 256,
    top_k: Annotated[int, typer.Option(help="Experts per token.")] = 8,
    tokens: Annotated[int, typer.Option(help="Tokens to make.")] = 200_000,
    zipf: Annotated[float, typer.Option(help="Skew of the loads; 0 is flat.")] = 1.0,
    domains: Annotated[int, typer.Option(help="Domains with loads of their own.")] = 1,
    switch_tokens: Annotated[
        int | None, typer.Option(help="Domains take turns in stretches of so many tokens.")
    ] = None,
    affinity: Annotated[float, typer.Option(help="How far layers follow each other, 0..1.")] = 0.9,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Make a trace with the statistics of a real router."""
    from ..traces.storage.manifest import require_unused
    from ..traces.storage.store import save_trace
    from ..traces.synth.generate import synth_trace

    require_unused(out)
    made = synth_trace(
        layers=layers, experts=experts, top_k=top_k, tokens=tokens, zipf=zipf, domains=domains,
        switch_tokens=switch_tokens, affinity=affinity, seed=seed,
    )
    save_trace(made, out)
    if json:
        show.print_json({"trace": str(out), "tokens": made.num_tokens, "digest": made.digest()})
    else:
        show.print_verdict(f"made {made.num_tokens:,} tokens in {out}")
