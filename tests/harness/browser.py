"""A page in a Chromium engine: what it says on its console, and what a script finds in it.

Looked for in this order: a Chromium or Chrome of the PATH, the one of the package playwright, and
the one within Qt (`pip install PySide6`).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Timer
from typing import Any

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_FLAGS = ("--no-sandbox", "--disable-gpu")
_FOUND = "the script found "
_CONSOLE = re.compile(r':CONSOLE[(:]\d+\)?\] "(.*)", source: ')
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
    reasons = []
    for name, open_by in (
        ("a browser of the PATH", _by_program),
        ("playwright", _by_playwright),
        ("PySide6", _by_qt),
    ):
        try:
            return open_by(page, script)
        except NoEngineError as error:
            reasons.append(f"{name}: {error}")
    raise NoEngineError("; ".join(reasons))


def _by_program(page: Path, script: str) -> Opened:
    """By a copy of the page that says on its console what the script found, half a second later."""
    program = next((path for name in _BROWSERS if (path := shutil.which(name))), None)
    if program is None:
        raise NoEngineError("there is none")
    say = f"setTimeout(() => console.log({_FOUND!r} + ({script})), 500)"
    copy = page.with_name(f"{page.stem}-with-script.html")
    last = f"<script>addEventListener('load', () => {say})</script></body>"
    copy.write_text(page.read_text().replace("</body>", last))
    said: list[str] = []
    with TemporaryDirectory() as profile:
        command = [program, "--headless", *_FLAGS, f"--user-data-dir={profile}"]
        command += ["--enable-logging=stderr", "--window-size=1280,800", copy.as_uri()]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            end = Timer(_PATIENCE_S, process.kill)
            end.start()
            try:
                for line in process.stderr or ():
                    said += _CONSOLE.findall(line)
                    if said and said[-1].startswith(_FOUND):
                        break
            finally:
                end.cancel()
                process.kill()
    if not said or not said[-1].startswith(_FOUND):
        raise NoEngineError(f"{program} said nothing of the page in {_PATIENCE_S} s")
    return Opened(program, said[:-1], json.loads(said[-1].removeprefix(_FOUND)))


def _by_playwright(page: Path, script: str) -> Opened:
    try:
        sync_api: Any = import_module("playwright.sync_api")
    except ImportError as error:
        raise NoEngineError("it is not installed") from error
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
    if find_spec("PySide6") is None:
        raise NoEngineError("it is not installed")
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
