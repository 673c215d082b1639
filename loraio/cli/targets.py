"""``loraio targets``: show which weights an adapter would change, before it is trained."""

from __future__ import annotations

import math
from typing import Any

import click

from loraio.cli import _inputs, _options, _output, _training

KEYS = ("layer", "groups", "shape", "kind", "rank", "alpha", "parameters")


@click.command(epilog=_options.example("loraio targets base.safetensors --targets all --exclude fc --rank conv1=2"))
@click.argument("base", type=click.Path())
@_training.target_options
@_options.model_option
@_options.json_option
def targets(base: str, model: str | None, model_args: dict[str, Any] | None, as_json: bool, **settings: Any) -> None:
    """Show which weights of BASE would be adapted.

    The table has their layers, ranks, and how many numbers the factors hold. Nothing is trained. The percentage is of
    the weight itself: at 100 the factors hold as many numbers as the weight.
    """
    import loraio

    network, stripped = _inputs.load_network(base, model=model, model_args=model_args, as_json=as_json)
    config = _training.config_of(settings)
    planned, whole = loraio.plan_targets(network, config), loraio.plan_whole(network, config)
    rows: list[dict[str, Any]] = [
        {
            "name": name,
            **{key: getattr(target, key) for key in KEYS},
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
