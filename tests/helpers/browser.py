"""A real Chromium for tests of pages. It needs selenium, and Debian's chromium and chromium-driver.

With the environment variable SCREENSHOTS, pictures of the pages are put into that directory.
"""

import contextlib
import os
import shutil
from pathlib import Path

import pytest

QUIET = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-sync"
QUIET += " disable-background-networking disable-component-update hide-scrollbars"


@contextlib.contextmanager
def chromium(profile):
    """A browser with a profile of its own, which logs what pages say and ask for."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium and chromium-driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in QUIET.split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={profile}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options, service) as browser:
        yield browser


def open_page(browser, address, width, scheme, height=900):
    """Opens a page at a width of the window, in a colour scheme."""
    sizes = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.get(address)


def picture(browser, name):
    """Saves a picture of the page, if pictures are wanted."""
    if "SCREENSHOTS" in os.environ:
        browser.save_screenshot(str(Path(os.environ["SCREENSHOTS"], f"{name}.png")))
