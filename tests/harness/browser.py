"""A page in a Chromium engine: what it says on its console, and what a script finds in it.

Looked for in this order: a Chromium or Chrome of the PATH, the one of the package playwright, and
the one within Qt (`pip install PySide6`).
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = ("--no-sandbox", "--disable-gpu")
_PLACE = "what-the-script-found"
_CONSOLE = re.compile(r":CONSOLE[(:]\d+\)?\] (.*)")
_PATIENCE_S = 120
# in a process of its own: Qt may have one application only, and ends with it
_QT = """
import json, sys
from PySide6.QtCore import QTimer, QUrl
from PySide6.QtWebEngineCore import QWebEnginePage
from PySide6.QtWebEngineWidgets import QWebEngineView
from PySide6.QtWidgets import QApplication

application, said = QApplication(sys.argv), []

class Page(QWebEnginePage):
    def javaScriptConsoleMessage(self, level, message, line, source):
        said.append(f"{level.name}: {message}")

def end(found):
    print(json.dumps({"loaded": loaded, "console": said, "found": found}))
    application.quit()

def done(whole):
    global loaded
    loaded = whole
    page.runJavaScript(sys.argv[2], end)

page = Page()
page.loadFinished.connect(done)
view = QWebEngineView()  # gives the page a window's size
view.setPage(page)
view.resize(1280, 800)
view.show()
page.load(QUrl.fromLocalFile(sys.argv[1]))
QTimer.singleShot(60_000, application.quit)
application.exec()
"""


class NoEngineError(Exception):
    """Nothing here can open a page."""


@dataclass(frozen=True)
class Opened:
    """A page that was opened."""

    engine: str
    """What opened it."""
    console: list[str]
    """Everything that was said on the console, errors of loading included."""
    found: Any
    """Value of the script."""


def open_page(page: Path, script: str) -> Opened:
    """Open a page and run a script in it.

    Args:
        page: an HTML file.
        script: an expression of JavaScript whose value is a JSON text.

    Raises:
        NoEngineError: none is here, or the one that is does not start.
    """
    program = next((path for name in _BROWSERS if (path := shutil.which(name))), None)
    if program is not None:
        return _by_program(program, page, script)
    reasons = []
    for module, open_by in (("playwright", _by_playwright), ("PySide6", _by_qt)):
        if find_spec(module) is None:
            reasons.append(f"{module} is not installed")
            continue
        try:
            return open_by(page, script)
        except NoEngineError as error:
            reasons.append(f"{module}: {error}")
    raise NoEngineError(f"no {_BROWSERS[0]} in the PATH, {', '.join(reasons)}")


def _by_program(program: str, page: Path, script: str) -> Opened:
    """By a copy of the page whose last element holds what the script found."""
    copy = page.with_name(f"{page.stem}-with-script.html")
    end = "document.body.append(place)"
    put = f'const place = document.createElement("pre"); place.id = "{_PLACE}"'
    text = page.read_text()
    copy.write_text(
        text.replace(
            "</body>", f"<script>{put}; place.textContent = {script}; {end}</script></body>"
        )
    )
    command = [program, "--headless", *_FLAGS, "--window-size=1280,800"]
    command += ["--enable-logging=stderr", "--dump-dom"]
    done = subprocess.run(
        [*command, copy.as_uri()], capture_output=True, text=True, timeout=_PATIENCE_S
    )
    held = re.search(f'<pre id="{_PLACE}">(.*?)</pre>', done.stdout, re.DOTALL)
    if held is None:
        raise NoEngineError(f"{program} gave no page: {done.stderr[-500:]}")
    return Opened(program, _CONSOLE.findall(done.stderr), json.loads(html.unescape(held[1])))


def _by_playwright(page: Path, script: str) -> Opened:
    from playwright import sync_api  # pyright: ignore[reportMissingImports]

    with sync_api.sync_playwright() as started:
        try:
            browser = started.chromium.launch(args=list(_FLAGS))
        except sync_api.Error as error:  # its browser is a download of its own
            raise NoEngineError(str(error).splitlines()[0]) from error
        opened, said = browser.new_page(), []
        opened.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        opened.on("pageerror", lambda error: said.append(str(error)))
        opened.on("requestfailed", lambda request: said.append(f"not loaded: {request.url}"))
        opened.goto(page.as_uri())
        found = json.loads(opened.evaluate(script))
        browser.close()
    return Opened("playwright", said, found)


def _by_qt(page: Path, script: str) -> Opened:
    settings = {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_CHROMIUM_FLAGS": " ".join(_FLAGS)}
    done = subprocess.run(
        [sys.executable, "-c", _QT, str(page), script],
        capture_output=True,
        text=True,
        timeout=_PATIENCE_S,
        env=os.environ | settings,
    )
    if done.returncode or not done.stdout.strip():
        raise NoEngineError(f"exit code {done.returncode}: {done.stderr.strip()[-500:]}")
    answer = json.loads(done.stdout.splitlines()[-1])
    lost = [] if answer["loaded"] else ["the page was not loaded"]
    return Opened("PySide6", answer["console"] + lost, json.loads(answer["found"]))
