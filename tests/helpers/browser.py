"""A page in a browser, at a width and in a colour scheme."""

import json
import os
from pathlib import Path

# contrasts(): for each element with text of its own, the contrast with what lies below it;
# contrast_of(color): that of a colour with the ground of the page.
CONTRASTS = """(() => {
  const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
  const rgba = color => {
    canvas.clearRect(0, 0, 1, 1);
    canvas.fillStyle = color;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const over = (top, below) => top.slice(0, 3).map((x, i) => {
    const part = top[3] / 255;
    return x * part + below[i] * (1 - part);
  });
  const ground = element => {
    const own = rgba(getComputedStyle(element).backgroundColor);
    if (own[3] === 255 || !element.parentElement) return own[3] ? own : [255, 255, 255, 255];
    return [...over(own, ground(element.parentElement)), 255];
  };
  const light = color => {
    const parts = color.slice(0, 3).map(x => x / 255)
      .map(x => x <= 0.04045 ? x / 12.92 : ((x + 0.055) / 1.055) ** 2.4);
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
  };
  const contrast = (color, below) => {
    const ends = [light(over(rgba(color), below)), light(below)];
    return (Math.max(...ends) + 0.05) / (Math.min(...ends) + 0.05);
  };
  window.contrast_of = color => {
    const probe = document.body.appendChild(document.createElement("i"));
    probe.style.color = color;
    const found = contrast(getComputedStyle(probe).color, ground(document.body));
    probe.remove();
    return found;
  };
  window.contrasts = () => {
    const found = [];
    for (const element of document.querySelectorAll("body *")) {
      const own = [...element.childNodes].filter(x => x.nodeType === 3);
      const text = own.map(x => x.data).join("");
      if (!text.trim() || !element.getClientRects().length || element.closest("script")) continue;
      const below = ground(element);
      const ratio = contrast(getComputedStyle(element).color, below);
      found.push([ratio, `${element.tagName} ${text.trim().slice(0, 40)}`]);
    }
    return found;
  };
})()"""


class BrowserPage:
    """A page that is open.

    Args:
        browser: the browser.
        address: the address of the page.
        width: the width of the window.
        scheme: "light" or "dark".
        name: the beginning of the name of its picture.
    """

    def __init__(self, browser, address, width=1280, scheme="light", name=""):
        self.browser, self.address, self.width = browser, address, width
        self.shown = f"{name}{width}-{scheme}"
        self.resize(900)
        feature = {"name": "prefers-color-scheme", "value": scheme}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
        browser.get(address)

    def resize(self, height):
        mobile = self.width < 600
        sizes = {"width": self.width, "height": height, "deviceScaleFactor": 1, "mobile": mobile}
        self.browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", sizes)

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def one(self, selector):
        return self.browser.find_element("css selector", selector)

    def run(self, script):
        return self.browser.execute_script(f"return {script}")

    def wait(self, check, seconds=30):
        from selenium.webdriver.support.ui import WebDriverWait

        WebDriverWait(self.browser, seconds, 0.05).until(lambda _: check())

    def violations(self):
        """What axe-core finds inaccessible: the rule and the elements of each."""
        import axe_core_python

        self.browser.execute_script(
            Path(axe_core_python.__file__).with_name("axe.min.js").read_text()
        )
        return self.browser.execute_async_script(
            "const done = arguments[0];"
            "axe.run().then(found => done(found.violations.map("
            "rule => `${rule.id}: ${rule.nodes.map(node => node.target).join(', ')}`)))"
        )

    def errors(self):
        """The messages of the console since they were read last."""
        return [entry["message"] for entry in self.browser.get_log("browser")]

    def asked(self):
        """The addresses that the page asked for, since they were read last."""
        events = [json.loads(e["message"])["message"] for e in self.browser.get_log("performance")]
        return {
            event["params"]["request"]["url"]
            for event in events
            if event["method"] == "Network.requestWillBeSent"
            and event["params"]["documentURL"].startswith(self.address)  # not the first, empty tab
        }

    def save_picture(self, whole=False):
        """Saves a picture where the environment variable SCREENSHOTS names a directory."""
        if "SCREENSHOTS" not in os.environ:
            return
        if whole:
            self.resize(min(self.run("document.documentElement.scrollHeight"), 8000))
        self.browser.save_screenshot(str(Path(os.environ["SCREENSHOTS"], f"{self.shown}.png")))
