"""A check of report pages in a browser: screenshots, requests, console, scrolling, sorting.

    apt-get install chromium
    python bench/stress/screens.py REPORT.html [--out FOLDER] [--browser PROGRAM]

Needs only Chromium or Chrome, which it drives by the DevTools protocol over a pipe. Each page is
opened at 1280 and 390 pixels, light and dark, and captured in full (FOLDER/NAME-WIDTH-SCHEME.png).
Each column of the table of layers is sorted by two clicks and by the keyboard, and the order is
compared with the cells. The results are printed as JSON. The exit code is 1 if a page requests
anything but itself, writes to the console, is wider than the screen, or sorts wrongly.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WIDTHS = {1280: 800, 390: 844}
TALLEST = 12000  # pixels of a screenshot

# Visible elements that reach beyond the screen without being in a box that scrolls.
_OVERFLOW = """
(() => {
  const width = document.documentElement.clientWidth, wide = [];
  for (const e of document.querySelectorAll("main *")) {
    const box = e.getBoundingClientRect();
    if (box.width && box.right > width + 1 && !e.closest(".scroll > *")) wide.push(e.outerHTML);
  }
  return { page: document.documentElement.scrollWidth - width,
           elements: wide.slice(0, 3).map((s) => s.slice(0, 120)) };
})()
"""
# Pairs of texts of one drawing that overlap.
_OVERLAPS = """
(() => {
  let found = 0;
  for (const svg of document.querySelectorAll("svg")) {
    const boxes = [...svg.querySelectorAll("text")].map((t) => t.getBoundingClientRect());
    boxes.forEach((a, i) => boxes.slice(i + 1).forEach((b) => {
      if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 &&
          b.top < a.bottom - 3) found += 1;
    }));
  }
  return found;
})()
"""
_CENTRE = """
(() => {
  const button = document.querySelectorAll("table.layers th button")[%d];
  button.scrollIntoView({ block: "center", inline: "center" });
  button.focus();
  const box = button.getBoundingClientRect();
  return [box.left + box.width / 2, box.top + box.height / 2];
})()
"""
_COLUMN = """
(() => {
  const table = document.querySelector("table.layers");
  const cells = [...table.tBodies].map((body) => body.rows[0].cells[%d]);
  return { sort: table.tHead.rows[0].cells[%d].getAttribute("aria-sort"),
           numbers: cells.some((c) => c.hasAttribute("data-v")),
           values: cells.map((c) => c.dataset.v ?? c.textContent.trim()) };
})()
"""


class Browser:
    """A headless browser with one page."""

    def __init__(self, program: str, profile: str) -> None:
        to_child, ours_out = os.pipe()
        ours_in, from_child = os.pipe()

        def pipes() -> None:  # file descriptors 3 and 4, where the browser expects them
            first, second = os.dup(to_child), os.dup(from_child)
            os.dup2(first, 3)
            os.dup2(second, 4)

        self.process = subprocess.Popen(
            [
                *(program, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *("--remote-debugging-pipe", f"--user-data-dir={profile}", "--no-first-run"),
                *("--disable-background-networking", "--disable-component-update"),
                *("--disable-sync", "--disable-quic", "about:blank"),
            ],
            preexec_fn=pipes,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_child)
        os.close(from_child)
        self.out, self.into = os.fdopen(ours_out, "wb", 0), os.fdopen(ours_in, "rb")
        self.rest, self.number, self.events = b"", 0, list[dict[str, Any]]()
        self.session: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and return its result; messages that arrive before that are events."""
        self.number += 1
        message: dict[str, Any] = {"id": self.number, "method": method, "params": parameters}
        if self.session:
            message["sessionId"] = self.session
        self.out.write(json.dumps(message).encode() + b"\0")
        while True:
            answer = self._next()
            if answer.get("id") == self.number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                return answer["result"]
            self.events.append(answer)

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self.rest:
            received = self.into.read1(1 << 20)
            if not received:
                raise RuntimeError("the browser has exited")
            self.rest += received
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def value(self, script: str) -> Any:
        """The value of a script that is run on the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"]))
        return answer["result"].get("value")

    def open(self, url: str, width: int, scheme: str) -> None:
        """Load a page on a screen of this width, and wait until it has loaded."""
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=WIDTHS[width],
            deviceScaleFactor=1,
            mobile=width < 500,
        )
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.call("Emulation.setEmulatedMedia", features=[feature])
        self.call("Page.navigate", url=url)
        while not any(e.get("method") == "Page.loadEventFired" for e in self.events):
            self.events.append(self._next())

    def capture(self, path: Path, width: int) -> None:
        """Write a screenshot of the page in its full length."""
        height = self.value("document.documentElement.scrollHeight")
        clip = {"x": 0, "y": 0, "width": width, "height": min(height, TALLEST), "scale": 1}
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(answer["data"]))

    def close(self) -> None:
        """End the browser."""
        self.session = None
        self.call("Browser.close")
        self.process.wait(timeout=20)


def is_sorted(column: dict[str, Any]) -> bool:
    """Whether numbers are in the order that the heading claims, with missing ones last."""
    values, numbers = column["values"], column["numbers"]
    if column["sort"] not in ("ascending", "descending"):
        return False
    if not numbers:
        return True  # sorted by the browser's own collation
    missing = [v in ("", "nan") for v in values]
    known = [float(v) for v in values if v not in ("", "nan")]
    expected = sorted(known, reverse=column["sort"] == "descending")
    return known == expected and missing == sorted(missing)


def check_sorting(browser: Browser) -> dict[str, Any]:
    """Sort by every column: two clicks, Enter, and the space bar."""
    columns = browser.value('document.querySelectorAll("table.layers th button").length')
    wrong, orders = [], 0
    for k in range(columns):
        for way in ("click", "click", "Enter", " "):
            x, y = browser.value(_CENTRE % k)
            before = browser.value(_COLUMN % (k, k))["sort"]
            if way == "click":
                for kind in ("mousePressed", "mouseReleased"):
                    browser.call(
                        *("Input.dispatchMouseEvent",),
                        type=kind,
                        x=x,
                        y=y,
                        button="left",
                        clickCount=1,
                    )
            else:
                key = {"key": way, "text": "\r" if way == "Enter" else way}
                key["code"] = "Enter" if way == "Enter" else "Space"
                code = 13 if way == "Enter" else 32
                for kind in ("keyDown", "keyUp"):
                    more = key if kind == "keyDown" else {n: key[n] for n in ("key", "code")}
                    browser.call(
                        "Input.dispatchKeyEvent", type=kind, windowsVirtualKeyCode=code, **more
                    )
            column = browser.value(_COLUMN % (k, k))
            orders += 1
            if column["sort"] == before or not is_sorted(column):
                wrong.append((k, way, before, column["sort"]))
    return {"columns": columns, "orders": orders, "wrong": wrong}


def check_page(browser: Browser, page: Path, out: Path) -> dict[str, Any]:
    """The size, requests, sorting and problems of one page, in all four views."""
    url = page.resolve().as_uri()
    results: dict[str, Any] = {"page": page.name, "bytes": page.stat().st_size}
    problems: list[str] = []
    requests = 0
    for width in WIDTHS:
        for scheme in ("light", "dark"):
            browser.events.clear()
            browser.open(url, width, scheme)
            name = f"{page.stem}-{width}-{scheme}"
            browser.capture(out / f"{name}.png", width)
            over = browser.value(_OVERFLOW)
            if over["page"] > 0 or over["elements"]:
                problems.append(f"{name}: wider than the screen: {over}")
            if overlaps := browser.value(_OVERLAPS):
                problems.append(f"{name}: {overlaps} texts of a drawing overlap")
            if width == max(WIDTHS) and scheme == "light":
                results["sorting"] = check_sorting(browser)
                if results["sorting"]["wrong"] or not results["sorting"]["columns"]:
                    problems.append(f"{name}: sorting")
            for event in browser.events:
                method, details = event.get("method"), event.get("params", {})
                if method == "Network.requestWillBeSent":
                    requests += 1
                    if details["request"]["url"] != url:
                        problems.append(f"{name}: requests {details['request']['url']}")
                elif method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown"):
                    problems.append(f"{name}: console: {json.dumps(details)[:300]}")
                elif method == "Log.entryAdded":
                    problems.append(f"{name}: log: {details['entry']['text']}")
    return {**results, "requests of the four views": requests, "problems": problems}


def main() -> int:
    parser = argparse.ArgumentParser(description="Check report pages in a browser.")
    parser.add_argument("page", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("."))
    parser.add_argument("--browser", default="chromium")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = Browser(options.browser, profile)
        try:
            results = [check_page(browser, page, options.out) for page in options.page]
        finally:
            browser.close()
    print(json.dumps(results, indent=1))
    return int(any(page["problems"] for page in results))


if __name__ == "__main__":
    sys.exit(main())
