"""Fragments: parts of what a run trains that travel between islands in turn. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from relora_ds.parallel.shape import global_shape


def share_out(names: Mapping[nn.Parameter, str], count: int) -> list[list[nn.Parameter]]:
    """Divide trained parameters into fragments of about the same size.

    Those of one module stay together, so that factors of a product travel at once. The largest
    module comes first, each to the fragment that has the least so far. The answer depends on names
    and global shapes alone: it is the same for every way to shard the model.

    Args:
        names: full name of each.
        count: of fragments; the last ones are empty where there are fewer modules.

    Returns:
        The parameters of each fragment, in the order of `names`.
    """
    modules: dict[str, list[nn.Parameter]] = {}
    for parameter, name in names.items():
        modules.setdefault(name.rpartition(".")[0], []).append(parameter)

    def size(module: str) -> int:
        return sum(global_shape(parameter).numel() for parameter in modules[module])

    loads, fragment = [0] * count, dict[nn.Parameter, int]()
    for module in sorted(modules, key=lambda each: (-size(each), each)):
        least = loads.index(min(loads))
        loads[least] += size(module)
        fragment |= dict.fromkeys(modules[module], least)
    return [[p for p in names if fragment[p] == number] for number in range(count)]
