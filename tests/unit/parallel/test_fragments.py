"""Fragments are about equally large, keep modules together and depend on nothing but the model."""

from __future__ import annotations

import torch
from torch import nn

from relora_ds.config.spread.islands import IslandsConfig, TransportConfig
from relora_ds.parallel.fragments import share_out
from relora_ds.parallel.shape import TPShard, apply_shard


def parameters(**shapes: tuple[int, ...]) -> dict[nn.Parameter, str]:
    return {
        nn.Parameter(torch.zeros(shape)): name.replace("__", ".") for name, shape in shapes.items()
    }


LAYERS = {
    f"layer{n}__{part}": shape
    for n in range(5)
    for part, shape in (("lora_A", (4, 30)), ("lora_B", (20, 4)))
}


def named(found: list[list[nn.Parameter]], names: dict[nn.Parameter, str]) -> list[list[str]]:
    return [[names[parameter] for parameter in part] for part in found]


def test_modules_stay_together_and_the_largest_has_a_fragment_of_its_own() -> None:
    names = parameters(embed__weight=(100, 10), **LAYERS, norm__weight=(10,))
    found = named(share_out(names, 3), names)
    assert sorted(name for part in found for name in part) == sorted(names.values())
    assert found[0] == ["embed.weight"]
    for part in found:
        modules = {name.rpartition(".")[0] for name in part if name.startswith("layer")}
        assert sum(name.startswith("layer") for name in part) == 2 * len(modules)
    sizes = [sum(p.numel() for p in part) for part in share_out(parameters(**LAYERS), 5)]
    assert sizes == [200] * 5


def test_shards_and_the_order_of_modules_change_nothing() -> None:
    names = parameters(embed__weight=(100, 10), **LAYERS)
    whole = named(share_out(names, 4), names)
    for parameter, name in names.items():
        if name.endswith("lora_B"):
            apply_shard(parameter, TPShard(parameter.shape, 0, range(10)))
    assert named(share_out(names, 4), names) == whole
    turned = dict(reversed(names.items()))
    assert [sorted(p) for p in named(share_out(turned, 4), names)] == [sorted(p) for p in whole]


def test_more_fragments_than_modules_are_empty() -> None:
    names = parameters(a__weight=(3,), b__weight=(2,))
    assert named(share_out(names, 4), names) == [["a.weight"], ["b.weight"], [], []]


def test_every_fragment_leaves_once_per_round_at_a_time_of_its_own() -> None:
    config = IslandsConfig(every=10, transport=TransportConfig(fragments=3))
    left = {done: config.leaving(done) for done in range(20) if config.leaving(done)}
    assert left == {0: [0], 3: [1], 6: [2], 10: [0], 13: [1], 16: [2]}
    assert config.in_turn
    ramp = config.model_copy(update={"ramp": ((10, 5),)})
    assert [done for done in range(20) if ramp.leaving(done)] == [10, 13, 16]
    assert [done for done in (5, 10, 20) if ramp.ends_together(done)] == [5, 10]
    assert not IslandsConfig(every=10).in_turn
    assert IslandsConfig(every=10, transport=TransportConfig(overlap=1)).in_turn
