#!/usr/bin/env python3
"""Make a Kubernetes Job per island of launch/kubernetes.yaml.

    python launch/kubernetes_islands.py LABEL=VALUE LABEL=VALUE ... | kubectl apply -f -

Every `LABEL=VALUE` is an island: as many nodes as the file's Job has, with that label, such as
`topology.kubernetes.io/zone=west`. Nodes are numbered by island over one service, and the run gets
as many `parallel.islands`. Fit the file in first; NNODES becomes the number of all nodes.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

_FILE = Path(__file__).with_name("kubernetes.yaml")


def islands_of(documents: Sequence[dict[str, Any]], selectors: Sequence[str]) -> list[Any]:
    """The file's documents with its Job once per island.

    Args:
        documents: of launch/kubernetes.yaml.
        selectors: `LABEL=VALUE` of each island's nodes.

    Raises:
        ValueError: there are fewer than two, one is named twice, or is not of that form.
    """
    found = []
    if len(set(selectors)) < max(2, len(selectors)):
        raise ValueError("name two islands or more, each by a label of its own nodes")
    for document in documents:
        if document["kind"] != "Job":
            found.append(document)
            continue
        for number, selector in enumerate(selectors):
            label, equals, value = selector.partition("=")
            if not (label and equals and value):
                raise ValueError(f"{selector} is not LABEL=VALUE")
            found.append(_job(document, number, len(selectors), {label: value}))
    return found


def _job(document: dict[str, Any], number: int, count: int, nodes: dict[str, str]) -> Any:
    """The Job of one island."""
    job = copy.deepcopy(document)
    name, size = job["metadata"]["name"], job["spec"]["completions"]
    job["metadata"]["name"] = f"{name}-{number}"
    pod = job["spec"]["template"]["spec"]
    pod["nodeSelector"] = {**pod.get("nodeSelector", {}), **nodes}
    (container,) = pod["containers"]
    container["args"] = [f"{argument} parallel.islands={count}" for argument in container["args"]]
    values = {
        "NNODES": size * count,
        "FIRST_NODE": size * number,
        "FIRST_POD": f"{name}-0-0",
    }
    for variable in container["env"]:
        if variable["name"] in values:
            variable["value"] = str(values[variable["name"]])
    return job


def main(selectors: Sequence[str]) -> int:
    """Print the manifest; returns the exit code."""
    if "-h" in selectors or "--help" in selectors:
        sys.stdout.write(__doc__ or "")
        return 0
    try:
        found = islands_of(list(yaml.safe_load_all(_FILE.read_text())), selectors)
    except ValueError as error:
        sys.stderr.write(f"error: {error}; see --help\n")
        return 2
    sys.stdout.write(yaml.safe_dump_all(found, sort_keys=False))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
