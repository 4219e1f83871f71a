"""Plans as tables for people, and as formulas for those who ask. Holds no arithmetic beyond ratios of two answers."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from glm5.planner.hardware import CLASSES
from glm5.planner.host_training import HostTrainingMemory
from glm5.planner.plan import Estimate, ServingPlan
from glm5.planner.quantity import quantities
from glm5.planner.training import TrainingMemory


def print_serving(plan: ServingPlan, console: Console) -> None:
    """What it takes, whether it fits, how fast it is, what it costs."""
    e, load = plan.estimate, plan.serving
    console.print(
        f"[bold]{plan.model}[/] ({plan.parameters / 1e9:,.4g}B weights, {plan.active_parameters / 1e9:,.3g}B a token) "
        f"in {load.dtype} on [bold]{e.hardware.name}[/] ({e.sharding.text}), {load.concurrency} request(s) of "
        f"{load.context:,} tokens, {load.cache_dtype} cache"
        + (f", {load.drafts} drafts (accept length {load.accept_length:g})" if load.drafts else "")
    )
    console.print(_verdict(plan))
    console.print(_memory_table(e))
    console.print(_speed_table(plan))
    console.print(_cost_table(plan))
    console.print(_smallest_table(plan))
    console.print(
        f"[dim]Speeds are estimates: datasheet rates times the efficiency of a {e.hardware.device.kind!r} machine plus "
        "latency per layer (docs/planner.md compares them with published figures). --explain shows every formula.[/]"
    )


def print_training(name: str, result: TrainingMemory | HostTrainingMemory, console: Console) -> None:
    """Memory per device under a parallel plan."""
    p = result.plan
    console.print(
        f"[bold]Training {name}[/] on {p.devices} device(s): data {p.data}, context {p.context}, tensor {p.tensor}, "
        f"pipeline {p.pipeline}, expert {p.expert}; {p.optimizer}, shard {p.shard}, micro batch {p.micro_batch} x "
        f"{p.sequence:,} tokens, checkpointing {'on' if p.checkpointing else 'off'}"
    )
    table = Table("per device", "", "", title="Memory", title_justify="left")
    for quantity in quantities(result):
        if quantity is not result.capacity:
            table.add_row(
                quantity.name, quantity.text, quantity.source, style="bold" if quantity is result.total else ""
            )
    console.print(table)
    word = "[green]fits[/]" if result.fits else "[red]does not fit[/]"
    console.print(f"It {word}: {result.total.text} of {result.capacity.text}.")


def print_formulas(thing: ServingPlan | TrainingMemory | HostTrainingMemory, console: Console) -> None:
    """Every quantity with its formula and its numbers; for a serving plan also those of the two comparisons."""

    def write(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    if isinstance(thing, TrainingMemory | HostTrainingMemory):
        for quantity in quantities(thing):
            write(quantity.explain())
        return
    device = thing.estimate.hardware.device
    sections = ((thing.model, thing.estimate), (f"{thing.model}, dense attention", thing.without_dsa),
                ("glm-4.7, for comparison", thing.predecessor))  # fmt: skip
    for title, part in sections:
        if part is not None:
            write(f"\n## {title} on {part.hardware.name} ({part.sharding.text})")
            for quantity in quantities(part):
                write(quantity.explain())
    write(f"\n## Efficiencies of a {device.kind!r} machine\n{CLASSES[device.kind].why}.")


def _verdict(plan: ServingPlan) -> str:
    e = plan.estimate
    total, capacity = e.memory.device_total, e.memory.capacity
    if e.memory.fits:
        room = f"{e.memory.room.value:,.0f} such request(s) at a time"
        return f"[green]It fits[/]: {total.text} of {capacity.text} on each device; room for {room}."
    if e.memory.streams:
        share = e.memory.experts_on_disk.value
        return f"[yellow]It runs from disk[/]: {share:.0%} of the routed experts do not fit in {capacity.text}."
    device = e.hardware.device.name
    larger = next((f" Take {device}x{o.devices}." for o in plan.smallest if o.device == device and o.devices), "")
    return f"[red]It does not fit[/]: {total.text} needed, {capacity.text} on each device.{larger}"


def _memory_table(e: Estimate) -> Table:
    m = e.memory
    table = Table("", "whole model", "per device", title="Memory", title_justify="left")
    for part in m.parts:
        table.add_row(f"  {part.name}", part.text, "", style="dim")
    table.add_row("weights", m.weights.text, m.device_weights.text)
    table.add_row(f"cache ({m.cache_token.text})", m.cache.text, m.device_cache.text)
    table.add_row("workspace", "", m.workspace.text)
    table.add_row("reserve", "", m.reserve.text)
    table.add_row("total", "", f"{m.device_total.text} of {m.capacity.text}", style="bold")
    return table


def _speed_table(plan: ServingPlan) -> Table:
    columns = [(plan.model, plan.estimate)]
    if plan.without_dsa:
        columns.append(("dense attention", plan.without_dsa))
    if plan.predecessor:
        columns.append((plan.predecessor.model, plan.predecessor))
    table = Table("", *(name for name, _ in columns), title="Speed", title_justify="left")
    estimates = [e for _, e in columns]
    table.add_row("sharding", *(e.sharding.text + ("" if e.runs else " (does not fit)") for e in estimates))
    table.add_row("decode, one request", *(e.decode.per_request.text for e in estimates), style="bold")
    table.add_row("decode, all requests", *(e.decode.aggregate.text for e in estimates))
    table.add_row("time per output token", *(e.decode.token_seconds.text for e in estimates))
    table.add_row("datasheet limit, one request", *(e.decode.limit.text for e in estimates), style="dim")
    table.add_row(f"prefill of {plan.serving.context:,} tokens", *(e.prefill.seconds.text for e in estimates))
    table.add_row("prefill, all replicas", *(e.prefill.throughput.text for e in estimates))
    return table


def _cost_table(plan: ServingPlan) -> Table:
    e, old = plan.estimate, plan.predecessor
    table = Table("$ per million tokens", plan.model, title="Cost", title_justify="left")
    rows = [("input", e.input_cost), ("output", e.output_cost)]
    if old is None or not e.output_cost.value:
        for name, cost in rows:
            table.add_row(name, cost.text if cost.value else "no price per hour: give --price-per-device-hour")
        return table
    table.add_column(old.model)
    table.add_column("ratio")
    for (name, cost), other in zip(rows, (old.input_cost, old.output_cost), strict=True):
        table.add_row(name, cost.text, other.text, f"{cost.value / other.value:.2f}")
    return table


def _smallest_table(plan: ServingPlan) -> Table:
    table = Table("device", "count", "sharding", "tok/s", "$ per million", title="Smallest set that fits (tokens per "
                  "second of one request; cost of output)", title_justify="left")  # fmt: skip
    for o in plan.smallest:
        if not (o.sharding and o.device_total and o.per_request and o.output_cost):
            table.add_row(o.device, "none", "", "", "")
            continue
        size = "1, from disk" if o.streams else f"{o.devices}"
        cost = o.output_cost.text if o.output_cost.value else ""
        table.add_row(o.device, size, o.sharding.text, f"{o.per_request.value:.3g}", cost)
    return table
