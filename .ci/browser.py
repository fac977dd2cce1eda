"""Open a report in headless Chromium, wide and narrow, light and dark: nothing is clipped, fetched or complained about.

python .ci/browser.py study.html FOLDER keeps a picture of each whole page in the folder.
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
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By

SCREENS = {"desktop": (1280, 900, False), "phone": (390, 844, True)}
SCHEMES = ("light", "dark")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
FAULTS = """
const width = document.documentElement.clientWidth, found = [];
const whole = document.scrollingElement.scrollWidth;
if (whole > width) found.push(`the page is ${whole} wide in a window of ${width}`);
const name = e => `${e.tagName.toLowerCase()}.${e.getAttribute("class") || ""} ${(e.textContent || "").slice(0, 40)}`;
for (const e of document.body.querySelectorAll("*")) {
    if (e.closest(".scroll, pre") !== e && e.closest(".scroll, pre")) continue;
    const box = e.getBoundingClientRect();
    if (box.width && box.height && (box.left < -0.5 || box.right > width + 0.5))
        found.push(`${name(e)} reaches from ${box.left} to ${box.right} in a window of ${width}`);
}
for (const e of document.querySelectorAll("svg")) {
    if (!e.checkVisibility()) continue;
    const box = e.getBoundingClientRect();
    if (!(box.width > 0 && box.height > 0)) found.push(`${name(e)} has no size`);
    const unit = box.width / e.viewBox.baseVal.width;
    for (const t of e.querySelectorAll("text")) {
        const size = parseFloat(getComputedStyle(t).fontSize) * unit;
        if (size < 9) found.push(`"${t.textContent}" is ${size.toFixed(1)} px high`);
    }
}
return found;
"""


def browser(profile: str) -> webdriver.Chrome:
    """Start Chromium with an empty profile that keeps what its console and its network say."""
    options = Options()
    options.binary_location = shutil.which("chromium") or sys.exit("chromium is not installed")
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = shutil.which("chromedriver") or sys.exit("chromium-driver is not installed")
    return webdriver.Chrome(options, Service(driver))


def faults(page: webdriver.Chrome, address: str) -> list[str]:
    """Return what is wrong with the page that is open, one sentence each."""
    found: list[str] = list(page.execute_script(FAULTS))
    found += [f"console: {entry['message']}" for entry in page.get_log("browser")]
    figures = page.find_elements(By.TAG_NAME, "figure")
    if not figures:
        found.append("there is no figure")
    for n, figure in enumerate(figures):
        if figure.is_displayed() and not figure.accessible_name:
            found.append(f"figure {n} has no accessible name")
    for entry in page.get_log("performance"):
        message: dict[str, Any] = json.loads(entry["message"])["message"]
        if message["method"] == "Network.requestWillBeSent" and message["params"]["documentURL"] == address:
            url = message["params"]["request"]["url"]
            found += [f"asks for {url}"] * (url != address and not url.startswith("data:"))
    return found


def picture(page: webdriver.Chrome, path: Path, width: int) -> None:
    """Save the whole page."""
    size = page.execute_cdp_cmd("Page.getLayoutMetrics", {})["cssContentSize"]
    clip = {"x": 0, "y": 0, "width": width, "height": size["height"], "scale": 1}
    shot = page.execute_cdp_cmd("Page.captureScreenshot", {"clip": clip, "captureBeyondViewport": True})
    path.write_bytes(base64.b64decode(shot["data"]))


def main(report: str, folder: str) -> int:
    """Look at the report on every screen; return 1 where something is wrong."""
    address, out, bad = Path(report).resolve().as_uri(), Path(folder), 0
    out.mkdir(parents=True, exist_ok=True)
    for screen, (width, height, mobile) in SCREENS.items():
        for scheme in SCHEMES:
            with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
                page = browser(profile)
                try:
                    about = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
                    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", about)
                    features = [{"name": "prefers-color-scheme", "value": scheme}]
                    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
                    page.get(address)
                    picture(page, out / f"{Path(report).stem}-{screen}-{scheme}.png", width)
                    page.execute_script("for (const e of document.querySelectorAll('details')) e.open = true")
                    found = faults(page, address)
                finally:
                    page.quit()
            print(f"{screen}, {scheme}: " + (f"{len(found)} faults" if found else "nothing clipped, fetched or said"))
            print(*(f"  {one}" for one in found[:20]), sep="\n", end="\n" * bool(found))
            bad += bool(found)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
