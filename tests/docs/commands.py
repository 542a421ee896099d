"""Commands of a page: those in its blocks of shell, in order, without comments."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"^```(?:bash|sh)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"(?:^|\s)#.*")
_LAUNCHERS = ("python", "deepspeed", "torchrun")


@dataclass(frozen=True)
class Command:
    """One line of shell, continued lines joined."""

    text: str

    @property
    def words(self) -> list[str]:
        """As a shell splits it, variables before the program left out."""
        words = shlex.split(self.text)
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
            words.pop(0)
        return words

    @property
    def script(self) -> str | None:
        """The Python file of the project that it starts, by whichever launcher."""
        words = self.words
        if words[0] not in _LAUNCHERS:
            return None
        return next((word for word in words if word.endswith(".py")), None)

    @property
    def arguments(self) -> list[str]:
        """Those of the script, or of the program."""
        words, script = self.words, self.script
        return words[words.index(script) + 1 :] if script else words[1:]


def commands(page: Path) -> list[Command]:
    """All of a page, in order."""
    found = []
    for block in _BLOCK.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            text = " ".join(_COMMENT.sub("", line).split())
            if text:
                found.append(Command(text))
    return found
