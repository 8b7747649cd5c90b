"""Pictures of pages, compared with those that are kept in tests/browser/pictures.

Every text is in the font that comes with matplotlib: in another font lines wrap elsewhere, and then
an unchanged page differs as much from its picture as one whose style sheet is broken. Compared are
grey pictures of a cell for 8 x 8 pixels, in which edges of letters hardly matter. Of 255 levels,
the mean difference of a page drawn again was 0, without smoothed letters at most 1.8, and in
Liberation Sans 1.3 to 18; with a margin of 12 pixels it was at least 2.8, and with letters a tenth
larger, without tables, or without the style sheets at least 5. Colours of texts alone it does not
see.
"""

import base64
import io
import os
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

FOLDER = Path(__file__).parents[1] / "browser" / "pictures"
CELL = 8
LIMIT = 2.2
FONT = "fonts/ttf/DejaVuSans.ttf"
STYLE = """
* { font-family: Kept !important; animation: none !important; transition: none !important }
.timing { visibility: hidden }"""
SETTLE = """
const [font, style, done] = arguments;
const bytes = Uint8Array.from(atob(font), letter => letter.charCodeAt(0));
new FontFace("Kept", bytes.buffer).load().then(face => {
  document.fonts.add(face);
  const sheet = new CSSStyleSheet();
  sheet.replaceSync(style);
  document.adoptedStyleSheets.push(sheet);
  return document.fonts.ready;
}).then(() => requestAnimationFrame(() => requestAnimationFrame(done)));"""


def check_picture(page):
    """Compares a page with its picture; with PICTURES=write in the environment, renews that.

    Where they differ, the picture, the new one and their difference are left beside each other in a
    file that the error names.
    """
    font = base64.b64encode(Path(matplotlib.get_data_path(), FONT).read_bytes()).decode()
    page.browser.execute_async_script(SETTLE, font, STYLE)
    new = Image.open(io.BytesIO(page.browser.get_screenshot_as_png())).convert("RGB")
    path = FOLDER / f"{page.shown}.png"
    if os.environ.get("PICTURES") == "write":
        new.quantize(48).save(path, optimize=True)
    with Image.open(path) as kept:
        difference = compare(kept.convert("RGB"), new, FOLDER / "failed" / path.name)
    assert difference <= LIMIT, (
        f"{page.shown} differs by {difference:.1f} of 255 levels, and {LIMIT} are allowed: see "
        f"{FOLDER / 'failed' / path.name}; if it should look so, PICTURES=write renews the pictures"
    )


def compare(kept, new, failed):
    """The mean difference of two pictures; more than the limit leaves a file."""
    assert kept.size == new.size, f"{failed.name}: {new.size} in place of {kept.size}"
    cells = [np.asarray(each.convert("L").reduce(CELL), float) for each in (kept, new)]
    apart = np.abs(cells[0] - cells[1])
    if apart.mean() > LIMIT:
        shown = Image.fromarray(apart.clip(0, 255).astype(np.uint8)).resize(kept.size, 0)
        whole = Image.new("RGB", (3 * kept.width, kept.height))
        for i, each in enumerate((kept, new, shown)):
            whole.paste(each.convert("RGB"), (i * kept.width, 0))
        failed.parent.mkdir(exist_ok=True)
        whole.save(failed)
    return apart.mean()
