"""Open a study's report in headless Chromium: ``python .ci/browser.py study.html folder``.

On a desktop and on a phone, in light and in dark: nothing is said on the console, nothing is fetched, nothing is cut
off or wider than the page, and every figure has a name. Screenshots of the whole page go to the folder.
"""

from __future__ import annotations

import base64
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By

SIZES = {"desktop": (1280, 900, False), "phone": (390, 844, True)}
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
)
OUTSIDE = """
const width = document.documentElement.clientWidth, found = [];
const scrolls = e => { for (let p = e; p && p !== document.body; p = p.parentElement)
  if (["auto", "scroll"].includes(getComputedStyle(p).overflowX)) return true; return false; };
for (const e of document.querySelectorAll("body *")) {
  const box = e.getBoundingClientRect(), out = box.right > width + 1 || box.left < -1;
  if (out && box.width && box.height && !e.closest("svg *") && !scrolls(e.parentElement))
    found.push(e.tagName + "." + e.className + " " + Math.round(box.left) + "–" + Math.round(box.right));
}
if (document.scrollingElement.scrollWidth > width) found.push("the page is " + document.scrollingElement.scrollWidth);
return found.slice(0, 5);
"""
EMPTY = """
return [...document.querySelectorAll("figure svg")].filter(e => {
  if (!e.checkVisibility()) return false;
  const box = e.getBoundingClientRect(); return box.width < 8 || box.height < 8; }).length;
"""
OPEN = 'for (const e of document.querySelectorAll("details")) e.open = true;'


def check(page: Path, folder: Path) -> list[str]:
    """Return what is wrong, one sentence each."""
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as profile:
        options = webdriver.ChromeOptions()
        for flag in (*FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        options.binary_location = shutil.which("chromium") or ""
        driver: Any = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        try:
            for name, (width, height, mobile) in SIZES.items():
                for scheme in ("light", "dark"):
                    wrong += [
                        f"{name}, {scheme}: {x}"
                        for x in _look(driver, page, folder, name, scheme, width, height, mobile)
                    ]
        finally:
            driver.quit()
    return wrong


def _look(
    driver: Any, page: Path, folder: Path, name: str, scheme: str, width: int, height: int, mobile: bool
) -> list[str]:
    size = {"width": width, "height": height, "deviceScaleFactor": 2 if mobile else 1, "mobile": mobile}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    driver.get(page.resolve().as_uri())
    wrong = [f"the console says {entry['message']}" for entry in driver.get_log("browser")]
    wrong += [f"{url} is fetched" for url in _fetched(driver) if not url.startswith(("file:", "data:", "chrome:"))]
    wrong += [f"{x} is outside" for x in driver.execute_script(OUTSIDE)]
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True, "format": "png"})
    (folder / f"{page.stem}-{name}-{scheme}.png").write_bytes(base64.b64decode(shot["data"]))
    driver.execute_script(OPEN)
    wrong += [f"{x} is outside, with details open" for x in driver.execute_script(OUTSIDE)]
    if driver.execute_script(EMPTY):
        wrong.append("a picture is empty")
    figures = driver.find_elements(By.TAG_NAME, "figure")
    if not figures:
        wrong.append("there is no figure")
    wrong += [f"figure {n} has no name" for n, figure in enumerate(figures) if not figure.accessible_name.strip()]
    return wrong


def _fetched(driver: Any) -> list[str]:
    """Return the addresses that the page asked for."""
    entries = (json.loads(entry["message"])["message"] for entry in driver.get_log("performance"))
    return [entry["params"]["request"]["url"] for entry in entries if entry["method"] == "Network.requestWillBeSent"]


def main(page: str, folder: str) -> int:
    """Print what is wrong, or that nothing is."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    wrong = check(Path(page), Path(folder))
    print(*wrong or [f"{page}: {len(SIZES)} sizes, light and dark: nothing to complain of"], sep="\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
