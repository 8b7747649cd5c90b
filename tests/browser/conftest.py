"""A real Chromium: it needs selenium (the extra serve-test) and Debian's chromium packages."""

import shutil

import pytest

QUIET = "headless=new no-sandbox disable-gpu disable-quic no-first-run disable-sync"
QUIET += " disable-background-networking disable-component-update hide-scrollbars"


@pytest.fixture(scope="session")
def browser(tmp_path_factory):
    """The browser, with its log of messages and requests."""
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        pytest.skip("chromium and chromium-driver are not installed")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in QUIET.split():
        options.add_argument(f"--{flag}")
    options.add_argument(f"--user-data-dir={tmp_path_factory.mktemp('profile')}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options, service) as browser:
        yield browser
