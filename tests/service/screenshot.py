"""Take the picture of the page that the documents show, with what the miniature draws.

python -m tests.service.screenshot
"""

import io

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from flux_lora.service.previews import Previews
from flux_lora.settings import Settings
from tests.conftest import MINI, ROOT
from tests.service.local import LocalReplica, local_front, serving
from tests.service.test_page import CHROMIUM

FILE = ROOT / "docs" / "service.webp"
WINDOW = {"width": 1280, "height": 840}


def ask(page: Page, prompt: str, number: int, ratio: str) -> None:
    """Fill the form and draw."""
    page.get_by_label("Prompt").fill(prompt)
    page.locator("#numbers").get_by_label(str(number)).check(force=True)
    page.get_by_label(ratio, exact=True).check(force=True)
    page.get_by_label("Seed", exact=True).fill("1")
    page.get_by_label("Scale", exact=True).fill("0")
    page.get_by_label("Prompt").press("Enter")


def main() -> None:
    """One request is drawn, and the next one half done."""
    replica = LocalReplica("local", Settings(weights=MINI, device="cpu"), Previews())
    with serving(local_front([replica])) as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport=WINDOW)  # type: ignore[arg-type]
        page.goto(address)
        page.locator("html[data-ready]").wait_for()
        ask(page, "an owl on a purple background", 2, "4:3")
        page.locator("#history li").wait_for(timeout=120_000)
        ask(page, "a fox on a yellow background", 2, "4:3")
        page.locator("#easel .frame:nth-child(2) img").wait_for(timeout=120_000)
        page.wait_for_timeout(700)
        page.evaluate("scrollTo(0, 0)")
        taken = page.screenshot()
        browser.close()
    replica.studio.close()
    Image.open(io.BytesIO(taken)).convert("RGB").save(FILE, quality=84, method=6)
    print(f"{FILE.relative_to(ROOT)}: {FILE.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
