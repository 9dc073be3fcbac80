"""Looks at the dashboard with a real browser.

    python3 tests/browser/dashboard.py [--programs target/release] [--pictures FOLDER] [--states COMMAND]

First a real run: two workers train; one is killed, then the coordinator, which comes back; the page is read all the while.
Then synthetic runs (coordinator/src/api/http/states.rs) with everything at its largest, and with everything missing: nothing
may be wider than the window, cut off, or lie over something else, at any size and in both schemes. Needs Chromium.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import urllib.request

from chrome import Browser, program, wait_for

SETTINGS = ["job.steps=100000", "metrics.every_steps=5", "sample.every_steps=100", "checkpoint.every_steps=200"]
SIZES = [(1440, 900), (1280, 800), (1000, 800), (768, 1024), (390, 844)]
STATES = "cargo test --release --locked -p ganglion-coordinator --lib -- --ignored --nocapture serve_all"
HERE = os.path.dirname(__file__)
# Calls of the page's formats with the texts that they give.
FIGURES = os.path.join(HERE, "figures.json")
# Looks for texts that are cut off or lie over each other.
FIT = os.path.join(HERE, "fit.js")


class Run:
    """A run directory and its coordinator."""

    def __init__(self, programs, folder):
        self.programs, self.folder = programs, folder
        self.process = None

    def start(self):
        command = [os.path.join(self.programs, "coordinator"), "--workers", "2", "--run-dir", self.folder]
        for setting in SETTINGS:
            command += ["--set", setting]
        count = len(self.events("coordinator_started"))
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        started = wait_for("coordinator", lambda: self.events("coordinator_started")[count:] or self.failed())
        self.url = started[0]["dashboard"]

    def failed(self):
        if self.process.poll() is not None:
            raise RuntimeError(self.process.stderr.read())

    def events(self, kind):
        try:
            with open(os.path.join(self.folder, "events.jsonl"), encoding="utf-8") as file:
                events = [json.loads(line) for line in file if line.endswith("\n")]
        except FileNotFoundError:
            return []
        return [event for event in events if event["kind"] == kind]

    def status(self):
        return json.load(urllib.request.urlopen(self.url + "api/status", timeout=10))

    def kill(self):
        self.process.kill()
        self.process.wait()

    def end(self):
        """Stops what is left: the coordinator in order, or its workers without it."""
        if self.process and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(60)


class Page:
    """The page, with the questions that are asked of it."""

    def __init__(self, browser, url):
        self.browser, self.url = browser, url

    def open(self):
        self.browser.open(self.url)
        self.wait("name", lambda: self.text("#name") not in (None, "Ganglion"))

    def wait(self, what, look, limit=60.0):
        return wait_for(f"{what} on the page", look, limit)

    def text(self, selector):
        return (self.browser.text(selector) or "").strip()

    def number(self, selector):
        digits = re.sub(r"[^0-9]", "", self.text(selector))
        return int(digits) if digits else None

    def state(self, text):
        self.wait(f"state {text!r}", lambda: self.text("#state").startswith(text))

    def drawn(self, chart):
        """How many pixels of a chart are not empty."""
        return self.browser.evaluate(
            f"""(() => {{ const canvas = document.querySelector('#{chart} canvas');
            if (!canvas || !canvas.width) return 0;
            const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
            let count = 0; for (let at = 3; at < pixels.length; at += 4) if (pixels[at]) count += 1; return count; }})()"""
        )


def check(holds, what):
    if not holds:
        raise AssertionError(what)
    print(f"ok: {what}", flush=True)


def live(page, run):
    page.state("Training")
    page.wait("a first row", lambda: (page.number("#step") or 0) > 0)
    before = page.number("#step")
    page.wait("a later step", lambda: page.number("#step") > before)
    told = run.status()
    check(abs(page.number("#step") - told["step"]) < 2000, "the page's step is the coordinator's")
    check(page.number("#last-step") == 100000, "the last step is the job's")
    for tile in ("#t-rate", "#t-loss_discriminator", "#t-loss_generator", "#t-score_real", "#t-score_fake", "#t-wait"):
        check(re.search(r"[0-9]", page.text(tile)), f"{tile} shows a number: {page.text(tile)}")
    check(page.text("#t-workers") == "2", "two workers are counted")
    rows = page.browser.evaluate("document.querySelectorAll('#workers tr:not(.empty)').length")
    check(rows == 2, "and listed")
    for chart in ("c-loss", "c-score", "c-rate", "c-time"):
        check(page.wait(chart, lambda chart=chart: page.drawn(chart) > 500), f"{chart} is drawn")
    digest = page.wait("a checkpoint", lambda: page.text("#checkpoints code"))
    check(digest in [event["state_digest"] for event in run.events("checkpoint")], "checkpoints show their digests")


def samples(page):
    browser = page.browser
    loaded = "document.getElementById('s-image').naturalWidth > 0"
    page.wait("a picture", lambda: browser.evaluate(loaded))
    page.wait("some pictures", lambda: browser.evaluate("Number(document.getElementById('s-slider').max) >= 2"))
    browser.evaluate("document.getElementById('s-slider').focus()")
    browser.press("Home")
    page.wait("the first picture", lambda: page.text("#s-step") == "step 100")
    browser.press("ArrowRight")
    page.wait("the second picture", lambda: page.text("#s-step") == "step 200")
    check(page.wait("its pixels", lambda: browser.evaluate(loaded)), "the slider moves through time by keyboard")
    browser.evaluate("document.getElementById('s-newest').click()")
    browser.evaluate("document.querySelector('#c-loss canvas').focus()")
    browser.press("ArrowLeft")
    check(page.text("#tip").startswith("step "), "a curve can be read by keyboard")
    browser.evaluate("document.activeElement.blur()")


def faults(page, run):
    pid = run.status()["workers"][1]["pid"]
    os.kill(pid, signal.SIGKILL)
    page.wait("a lost worker", lambda: "Lost worker" in page.text("#events"))
    page.wait("a fault", lambda: page.browser.evaluate("document.querySelector('#strip .fault') !== null"))
    page.wait("two workers", lambda: page.text("#t-workers") == "2" and (run.status()["world_size"] == 2))
    check(page.browser.evaluate("document.querySelectorAll('#strip .train').length") >= 2, "generations are drawn")


def restart(page, run):
    reached = page.number("#step")
    run.kill()
    page.wait("an absence", lambda: page.text("#state").startswith("Coordinator away since"))
    check(page.drawn("c-loss") > 500, "the page keeps what it knew")
    run.start()
    page.state("Training")
    page.wait("later steps", lambda: (page.number("#step") or 0) > reached)
    page.open()
    page.wait("curves", lambda: page.drawn("c-loss") > 500)
    curve = json.load(urllib.request.urlopen(run.url + "api/metrics?points=100", timeout=10))
    check(curve["step"][0] < reached, "history from before the restart is there after a reload")
    starts = "document.querySelectorAll('#strip .start').length"
    check(page.wait("two starts", lambda: page.browser.evaluate(starts) == 2), "both starts are in the timeline")


def fits(page, pictures, name):
    """Looks at the page at all sizes, in both schemes."""
    with open(FIT, encoding="utf-8") as file:
        fit = file.read()
    wrong = []
    for width, height in SIZES:
        for scheme in ("light", "dark"):
            page.browser.look(width, height, scheme)
            # Two frames: the charts are drawn again once they know their new size.
            page.browser.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")
            where = f"{name}, {width} wide, {scheme}"
            if page.browser.evaluate("document.documentElement.scrollWidth") > width:
                wrong.append(f"{where}: wider than the window")
            wrong += [f"{where}: cut off: {what}" for what in page.browser.evaluate(f"{fit} cutOff()")]
            wrong += [f"{where}: over each other: {what}" for what in page.browser.evaluate(f"{fit} overlapping()")]
            if pictures:
                page.browser.picture(os.path.join(pictures, f"{name}-{width}-{scheme}.png"), whole=True)
    check(not wrong, f"{name}: everything fits: " + "; ".join(wrong[:20]))


class States:
    """The server of synthetic runs."""

    def __init__(self, command):
        self.process = subprocess.Popen(
            command, shell=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def addresses(self):
        """The address of each state, by name. Its program may have to be built first."""
        found = {}
        for line in self.process.stdout:
            if "states are served" in line:
                return found
            match = re.search(r"state (\w+) (http\S+)", line)
            if match:
                found[match[1]] = match[2]
        raise RuntimeError("the synthetic runs are not served: see coordinator/src/api/http/states.rs")

    def end(self):
        self.process.stdin.close()
        self.process.wait(60)


def texts(browser, page):
    """What a state says of itself, by what must be on the page."""
    with open(FIGURES, encoding="utf-8") as file:
        figures = json.load(file)
    calls = ", ".join(f"all.{call}" for call in figures)
    written = browser.evaluate(f"import('/format.js').then((all) => [{calls}])")
    got = [text.replace("\u00a0", " ").replace("\u2060", "") for text in written]
    wrong = [(call, text) for call, text in zip(figures, got) if text != figures[call]]
    check(not wrong, f"numbers are written as they should be: {wrong}")
    for selector, count, what in [
        ("#alarms li", 3, "alarms are at the top"),
        ("#evaluations .small", 12, "metrics of evaluations have curves"),
        ("#settings .small", 7, "settings that change have curves"),
    ]:
        found = browser.evaluate(f"document.querySelectorAll({json.dumps(selector)}).length")
        check(found == count, f"{found} {what}")
    check("none" not in page.text("#w-count") and page.text("#t-workers") == "65", "workers are counted")


# A picture, or no pictures.
DRAWN = "document.getElementById('s-image').naturalWidth > 0 || document.getElementById('s-slider').disabled"
TRUTHS = {
    "full": ("65 in generation 128, 1 spare", "in generation 128, 1 spare"),
    "finished": ("all have left", "all have left"),
    "alone": ("none has joined yet", "none has joined yet"),
    "orphaned": ("none in session after generation 1", "none in session after generation 1"),
    "foreign": ("3 in generation 1", "in generation 1"),
}


def states(browser, command, pictures):
    served = States(command)
    try:
        addresses = served.addresses()
        check(set(addresses) == set(TRUTHS), "each synthetic run has an address")
        for name, url in addresses.items():
            browser.look(*SIZES[0])
            page = Page(browser, url)
            page.open()
            page.wait("a job", lambda page=page: page.text("#job"))
            page.wait("a picture", lambda: browser.evaluate(DRAWN))
            card, tile = TRUTHS[name]
            check(page.text("#w-count").startswith(card) and page.text("#t-generation") == tile, f"{name}: one truth")
            if name == "full":
                texts(browser, page)
            fits(page, pictures, name)
    finally:
        served.end()


def real(browser, options):
    """A real run, with its faults."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        run = Run(options.programs, os.path.join(folder, "run"))
        try:
            run.start()
            browser.look(*SIZES[0])
            page = Page(browser, run.url)
            page.open()
            live(page, run)
            samples(page)
            faults(page, run)
            restart(page, run)
            fits(page, options.pictures, "run")
            run.end()
            page.state("Stopped")
        finally:
            run.end()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--programs", default="target/release", help="where coordinator and worker are")
    parser.add_argument("--pictures", help="a folder for screenshots")
    parser.add_argument("--states", default=STATES, help="the command that serves synthetic runs")
    parser.add_argument("--only", choices=["run", "states"], help="look at the real run or at the synthetic ones alone")
    options = parser.parse_args()
    if program() is None:
        sys.exit(
            "this test needs Chromium: install it (Debian: apt-get install chromium), or leave `make test-browser` out"
        )
    if options.pictures:
        os.makedirs(options.pictures, exist_ok=True)
    with Browser() as browser:
        if options.only != "states":
            real(browser, options)
        if options.only != "run":
            states(browser, options.states, options.pictures)
        check(not browser.complaints, f"the browser has no complaints: {browser.complaints}")
    print("the dashboard is as it should be")


if __name__ == "__main__":
    main()
