"""The page of one run."""

from __future__ import annotations

import time

from laasp_ray.config.data import GIVEN
from laasp_ray.records import Metrics
from laasp_ray.report.durations import format_duration
from laasp_ray.report.page import numbers
from laasp_ray.report.page.document import Cell, Document, Part, Row, Table, Tile, heads, name, number, render, text
from laasp_ray.report.page.facts import (
    IterationRow,
    LayerRow,
    iterations_of,
    layers_of,
)
from laasp_ray.report.page.latency import latency_part, latency_tile
from laasp_ray.report.page.pictures import pictures_of
from laasp_ray.report.page.reading import RunRecord
from laasp_ray.report.page.settings import settings_of
from laasp_ray.report.summary import Summary, summarise
from laasp_ray.report.sweep import counted
from laasp_ray.run.events import Exhausted, FaultSurvived, ImageExcluded, RunFinished, last_of
from laasp_ray.run.metrics import form_of, label_of, metric_text
from laasp_ray.run.totals import seconds_spent

MOST_ROWS = 1000
"""Of a table; the rest is only counted."""
_NAMED = 3
_METRICS = 3
"""The most metrics that have tiles."""


def run_page(record: RunRecord, now: float | None = None) -> str:
    """The HTML of a run's page; `now` is the time of writing, seconds since 1970. Raises StoreError for a journal whose
    first event has no settings.
    """
    return render(run_document(record), time.time() if now is None else now)


def run_document(record: RunRecord) -> Document:
    summary = summarise(record.events)
    finished = summary.finished
    state = "finished" if finished else f"under way: {_where(record)}"
    pictures = pictures_of(record, summary)
    parts = [
        Part(title="What happened", charts=pictures.happened),
        Part(title="Layers and criteria", charts=pictures.layers),
        _decisions(record),
        _layers(record),
        latency_part(record),
        _faults(record),
        _settings(record),
    ]
    return Document(
        heading=summary.name,
        kicker=f"laasp_ray run in {record.uri}",
        state=state,
        done=finished,
        lead=[
            ("Asked:", _asked(record, summary)),
            ("Came out:" if finished else "So far:", _came_out(record, summary)),
        ],
        tiles=_tiles(record, summary),
        parts=parts,
    )


def _where(record: RunRecord) -> str:
    return f"last event {numbers.moment(record.times[-1])}"


def _asked(record: RunRecord, summary: Summary) -> str:
    config, start = record.start.config, record.start
    model, data, train, prune = (config.get(key) or {} for key in ("model", "data", "train", "prune"))
    shape = f" {numbers.TIMES} ".join(map(str, model.get("input_shape", ())))
    network = f"{model.get('builder', 'a network')}" + (f" at {shape}" if shape else "")
    source = _own(data.get("factory")) or data.get("format", "unknown")
    images = f"{source} ({start.train_images:,} training and {start.test_images:,} test {summary.noun})"
    loss = f"; loss: {_own(train.get('loss'))}" if train.get("loss") else ""
    wanted = " and ".join(f"{share:.4g}% of {of}" for of, share in ((of, 100 * s) for of, s in summary.targets.items()))
    method = prune.get("method", "unknown")
    what = f"remove {wanted} by {method}" if wanted else f"prune by {method}" if prune.get("method") else "train"
    when = f"{train.get('epochs', '?')} epochs"
    if wanted and train.get("prune_epoch") is not None:
        when += f", pruning after {train['prune_epoch']}"
    if train.get("pretrained"):
        when += ", from given weights"
    return f"{what}; {network}, on {images}{loss}; schedule of {when}."


def _own(path: str | None) -> str:
    """A part of the user's own as the config names it; empty if there is none."""
    return "a Python object" if path == GIVEN else path or ""


def _came_out(record: RunRecord, summary: Summary) -> str:
    finish = last_of(record.events, RunFinished)
    gone = ", ".join(f"{of} {numbers.change(share)}" for of, share in summary.reached.items())
    if finish is None:
        last = iterations_of(record)
        made = f"{counted(len(last), 'iteration')} and {counted(summary.epochs, 'epoch')}"
        return f"{gone} after {made}." if summary.targets else f"{made}."
    said = [] if not finish.text or finish.text.startswith("pruned by") else [finish.text]
    said.append(gone)
    if summary.before is not None and summary.after is not None:
        name_of, value = summary.after.primary
        said.append(f"{metric_text(name_of, value)} ({_change(name_of, summary)} against before pruning)")
    if summary.exhausted:
        said.append("pruning ended short of its target, with no filter left to remove")
    return "; ".join(said) + "."


def _tiles(record: RunRecord, summary: Summary) -> list[Tile]:
    counts = [layer.macs_now for layer in layers_of(record)]
    known = [count for count in counts if count is not None]
    so_far = sum(known) if known and len(known) == len(counts) else None
    macs = summary.macs_after if summary.macs_after is not None else so_far
    known_metrics = _values(summary.after or summary.before) or ("top1", "top5")
    return [
        _amount("FLOPs", "multiply-accumulates at one input", summary.macs, macs),
        _amount("Parameters", "", summary.parameters, summary.parameters_after),
        latency_tile(record),
        *(_accuracy(name_of, summary) for name_of in list(known_metrics)[:_METRICS]),
        _time(record),
    ]


def _amount(what: str, unit: str, before: int, after: int | None) -> Tile:
    if after is None:
        return Tile(what=what, value=numbers.short(before), before="unpruned", note="not known before the run's end")
    exact = f"{before:,} {numbers.ARROW} {after:,}"
    share = numbers.change(1 - after / before) if before else numbers.NONE
    text = f"{numbers.short(before)} {numbers.ARROW} {numbers.short(after)}"
    return Tile(what=what, value=share, before=text, note=f"{exact} {unit}".strip())


def _accuracy(name_of: str, summary: Summary) -> Tile:
    """The tile of a metric, before and after."""
    before, after = (_values(metrics).get(name_of) for metrics in (summary.before, summary.after))
    label = label_of(name_of)
    what, form = label[0].upper() + label[1:], form_of(name_of).format
    if after is None or summary.after is None:
        value = numbers.NONE if before is None else form(before)
        return Tile(
            what=what, value=value, before="" if before is None else "before pruning", note="after: at the run's end"
        )
    images = f"{summary.after.images:,} test {summary.noun}"
    best = summary.best
    if best is not None and best.metrics.score > summary.after.score and best.metrics.primary[0] == name_of:
        images += f"; best epoch {best.epoch + 1}: {form(best.metrics.primary[1])}"
    if before is None:
        return Tile(what=what, value=form(after), before="before pruning: unknown", note=images)
    said = f"{form(before)} before pruning ({_change(name_of, summary)})"
    return Tile(what=what, value=form(after), before=said, note=images)


def _values(metrics: Metrics | None) -> dict[str, float]:
    """All values by name; of a loss without metrics the loss."""
    return {} if metrics is None else metrics.named or {"loss": metrics.loss}


def _change(name_of: str, summary: Summary) -> str:
    """How much a metric has changed: shares in points."""
    before, after = _values(summary.before)[name_of], _values(summary.after)[name_of]
    is_share = form_of(name_of).endswith("%}")
    return numbers.signed(100 * (after - before), " points") if is_share else numbers.signed(after - before, digits=4)


def _time(record: RunRecord) -> Tile:
    machine = record.start.machine
    first, last = record.times[0], record.times[-1]
    drivers = "" if record.attempts == 1 else f"; {record.attempts} drivers, one after the other"
    where = "; ".join(machine[key] for key in ("workers", "driver") if key in machine)
    return Tile(
        what="Time of work",
        value=format_duration(seconds_spent(record.events)),
        before=f"{numbers.moment(first)}, for {format_duration(max(0.0, last - first))}{drivers}",
        note=where or "the journal does not say on what",
    )


def _decisions(record: RunRecord) -> Part:
    rows = iterations_of(record)
    if not rows:
        return Part(title="Decisions", lines=["No iteration has been made yet."])
    lines = []
    ended = last_of(record.events, Exhausted)
    if ended is not None:
        lines.append(f"Pruning ended short of its target: {ended.reason}")
    if len(rows) > MOST_ROWS:
        lines.append(f"The last {MOST_ROWS} of {len(rows)} iterations.")
    if not any(row.layers for row in rows):
        head = heads("#iteration", "what was done", "#time", "written")
        return Part(
            title="Iterations", lines=lines, table=Table(head=head, rows=[_plain(row) for row in rows[-MOST_ROWS:]])
        )
    head = heads(
        "#iteration",
        "layer",
        "criterion",
        "#filters",
        "#loss before",
        "#loss",
        "#FLOPs gone",
        "#here",
        "#candidates",
        "#time",
        "written, UTC",
    )
    compensated = any(row.compensated is not None for row in rows)
    if compensated:
        head += heads("made up for")
    return Part(
        title="Decisions",
        lines=[*lines, "Losses are on the calibration set. Click a head to sort."],
        table=Table(head=head, rows=[_decision(row, compensated) for row in rows[-MOST_ROWS:]]),
    )


def _plain(row: IterationRow) -> Row:
    said = numbers.cut(row.text) or "no filters removed"
    return Row(
        cells=[
            number(str(row.number), row.number),
            text(said),
            number(format_duration(row.seconds), row.seconds),
            Cell(text=numbers.moment(row.written), key=row.written),
        ]
    )


def _decision(row: IterationRow, compensated: bool) -> Row:
    layers, filters = _prunes(row)
    criteria = list(dict.fromkeys(criterion for _, criterion, _ in row.layers))
    here = row.flops_reduction - row.flops_before
    cells = [
        number(str(row.number), row.number),
        name(layers),
        text(", ".join(criteria) or numbers.NONE),
        number(str(filters), filters),
        number(numbers.loss(row.loss_before), row.loss_before),
        number(numbers.loss(row.loss), row.loss),
        number(numbers.percent(row.flops_reduction), row.flops_reduction),
        number(numbers.percent(here), here),
        number(str(row.candidates) if row.candidates else numbers.NONE, row.candidates),
        number(format_duration(row.seconds), row.seconds),
        Cell(text=numbers.moment(row.written).removesuffix(" UTC"), key=row.written),
    ]
    if compensated:
        cells.append(text({None: numbers.NONE, True: "yes", False: "no: its loss was lower without"}[row.compensated]))
    return Row(cells=cells)


def _prunes(row: IterationRow) -> tuple[str, int]:
    """The layers of a decision and the number of filters."""
    named = ", ".join(layer for layer, _, _ in row.layers[:_NAMED])
    more = len(row.layers) - _NAMED
    return (f"{named} and {more} more" if more > 0 else named or numbers.NONE), sum(count for _, _, count in row.layers)


def _layers(record: RunRecord) -> Part:
    rows = layers_of(record)
    lines = (
        []
        if record.start.weight_shapes
        else ["This run's journal has no shapes and FLOPs of layers: it is of before these were written."]
    )
    skipped = record.start.skipped_layers
    if skipped:
        kept = [f"{layer} ({reason})" for layer, reason in list(skipped.items())[:20]]
        more = f" and {len(skipped) - 20} more" if len(skipped) > 20 else ""
        lines.append(f"Layers that could not be pruned: {numbers.cut('; '.join(kept), 2000)}{more}.")
    head = heads("layer", "#filters", "#now", "#kept", "shape", "shape now", "#FLOPs", "#now", "#gone", "chosen by")
    table = Table(head=head, rows=[_layer(row) for row in rows[:MOST_ROWS]])
    if len(rows) > MOST_ROWS:
        lines.append(f"The first {MOST_ROWS} of {len(rows)} layers.")
    return Part(title="Layers", lines=lines, table=table if rows else None)


def _layer(row: LayerRow) -> Row:
    share = row.kept / row.filters if row.filters else 1.0
    gone = None if not row.macs or row.macs_now is None else 1 - row.macs_now / row.macs
    won = ", ".join(f"{criterion} {count}{numbers.TIMES}" for criterion, count in row.won.items())
    return Row(
        cells=[
            name(row.name),
            number(f"{row.filters:,}", row.filters),
            number(f"{row.kept:,}", row.kept),
            Cell(text=f"{share:.0%}", key=share, num=True, bar=round(100 * share, 1)),
            text(_shape(row.shape)),
            text(_shape(row.shape_now)),
            number(numbers.short(row.macs), row.macs),
            number(numbers.short(row.macs_now), row.macs_now),
            number(numbers.percent(gone, 1), gone),
            text(won or numbers.NONE),
        ]
    )


def _shape(shape: tuple[int, ...] | None) -> str:
    return numbers.NONE if shape is None else f" {numbers.TIMES} ".join(map(str, shape))


def _faults(record: RunRecord) -> Part:
    found = [
        (written, "part lost and replaced", event.text)
        if isinstance(event, FaultSurvived)
        else (written, "image left out", f"{event.image}: {event.reason}")
        for event, written in zip(record.events, record.times, strict=True)
        if isinstance(event, FaultSurvived | ImageExcluded)
    ]
    lines = []
    if record.attempts > 1:
        lines.append(f"The run was interrupted and resumed: {record.attempts} drivers had it, one after the other.")
    if not found:
        return Part(title="Faults survived", lines=[*lines, "No worker was lost and no image was left out."])
    if len(found) > MOST_ROWS:
        lines.append(f"The last {MOST_ROWS} of {len(found)}.")
    rows = [
        Row(cells=[Cell(text=numbers.moment(written), key=written), text(kind), text(numbers.cut(said))])
        for written, kind, said in found[-MOST_ROWS:]
    ]
    return Part(title="Faults survived", lines=lines, table=Table(head=heads("when", "what", "which"), rows=rows))


def _settings(record: RunRecord) -> Part:
    found = settings_of(record.start.config)
    machine = [(key, value) for key, value in record.start.machine.items()]
    differing = [
        Row(cells=[name(one.key), text(numbers.cut(one.value)), text(numbers.cut(one.recipe or "not set"))])
        for one in found.differing
    ]
    every = [Row(cells=[name(one.key), text(numbers.cut(one.value))]) for one in found.rows]
    if not found.recipe:
        said = "No recipe has this network and this method, so there is none to compare with."
    elif differing:
        said = f"What differs from the recipe {found.recipe}, the closest to these settings:"
    else:
        said = f"All settings are those of the recipe {found.recipe}."
    return Part(
        title="Settings",
        lines=[said],
        facts=machine,
        table=Table(head=heads("setting", "this run", "recipe"), rows=differing) if differing else None,
        more=Table(head=heads("setting", "value"), rows=every, title=f"All {len(every)} settings"),
    )
