"""``loraio targets``: what an adapter would adapt, before it is trained."""

from __future__ import annotations

import math
from typing import Any

import click

from loraio.cli import _options, _output, _training


@click.command(epilog=_options.example("loraio targets base.safetensors --targets all --exclude fc --rank conv1=2"))
@click.argument("base", type=click.Path())
@_training.target_options
@_options.model_option
@_options.json_option
def targets(base: str, model: str | None, model_args: dict[str, Any] | None, as_json: bool, **settings: Any) -> None:
    """Show which weights of BASE would be adapted.

    With their layers, ranks, and the numbers that the factors add; nothing is trained. The percentage is of the weight
    itself: at 100 the factors hold as many numbers as the weight.
    """
    import loraio
    from loraio.bases.models import stripped_of

    network = loraio.load_base(base, model=model, model_args=model_args)
    stripped = stripped_of(network)
    _output.note_stripped(stripped, as_json=as_json)
    config = _training.config_of(settings)
    planned, whole = loraio.plan_targets(network, config), loraio.plan_whole(network, config)
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            "layer": target.layer,
            "groups": target.groups,
            "shape": list(target.shape),
            "kind": target.kind,
            "rank": target.rank,
            "alpha": target.alpha,
            "parameters": target.parameters,
            "percent": 100 * target.parameters / math.prod(target.shape),
        }
        for name, target in planned.items()
    ]
    weights = sum(math.prod(target.shape) for target in planned.values())
    added = sum(target.parameters for target in planned.values())
    total = {"weights": weights, "added": added, "percent": 100 * added / weights}
    replaced = {name: _output.whole_facts(tensor) for name, tensor in whole.items()}
    if as_json:
        facts = {"base": base, "stripped": stripped, "targets": rows, "whole": replaced, "total": total}
        _output.print_json("targets", facts)
        return
    table = _output.table(f"Targets in {base}", ["weight", "layer", "shape", "rank", "alpha", "parameters", "percent"])
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        numbers = (str(row["rank"]), f"{row['alpha']:g}", f"{row['parameters']:,}", f"{row['percent']:.3g}")
        table.add_row(row["name"], row["layer"], shape, *numbers)
    _output.console().print(table)
    _output.line(f"{len(rows)} weights with {weights:,} numbers, {added:,} added: {total['percent']:.3f} %")
    for line in _output.whole_lines(replaced):
        _output.line(line)
