"""Pages in a real browser: how they look, and that texts of others stay texts."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import threading
from html import unescape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from colours import luminance
from made_runs import MAKERS, capture

from persona_nnsight.analysis.columns import read_table
from persona_nnsight.pages.figures.canvas import inline_svg
from persona_nnsight.pages.figures.lines import EQUALS, Line, line_panel
from persona_nnsight.report import write as writing
from persona_nnsight.report.write import write_report

#: Put first into the page: notes errors, blocks and notes requests, measures what came out.
PROBE = """
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<script>
const seen = {errors: [], requests: []};
addEventListener('error', event => seen.errors.push(String(event.message)), true);
addEventListener('securitypolicyviolation', event => seen.requests.push(event.blockedURI));
addEventListener('load', () => {
  // Headless windows are at least 500 pixels wide, so the page stands in a frame.
  if (parent === window) return;
  document.querySelectorAll('details').forEach(details => details.open = true);
  const body = getComputedStyle(document.body);
  const svgs = [...document.querySelectorAll('svg')].map(svg => svg.getBoundingClientRect());
  Object.assign(seen, {
    title: document.title,
    width: innerWidth,
    scroll: document.documentElement.scrollWidth,
    scripts: document.scripts.length,
    resources: performance.getEntriesByType('resource').length,
    figures: svgs.length,
    smallest: Math.min(...svgs.map(box => Math.min(box.width, box.height))),
    beyond: Math.max(...svgs.map(box => box.right)),
    background: body.backgroundColor,
    colour: body.color,
    texts: document.body.textContent.includes("<script>document.title = 'ran'<" + "/script>"),
    columns: new Set([...document.querySelectorAll('.beside')[0].children]
      .map(child => child.getBoundingClientRect().left)).size,
  });
  parent.postMessage(JSON.stringify(seen), '*');
});
</script>
"""
#: The page in a frame of some width, and what the probe in it has seen.
FRAME = """<!DOCTYPE html><meta name="color-scheme" content="light dark">
<pre id="probe"></pre>
<script>addEventListener('message', event => { probe.textContent = event.data; });</script>
<iframe src="probed.html" style="width: %dpx; height: 900px; border: 0"></iframe>
"""


def browser() -> str:
    """The path of a browser; without one the test is skipped, or fails where one is promised."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    if os.environ.get("PERSONA_NEEDS_BROWSER"):
        pytest.fail("PERSONA_NEEDS_BROWSER is set and there is no chromium on PATH")
    pytest.skip("no chromium on PATH")


def look(page: Path, *flags: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [
            browser(),
            *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
            *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
            *("--hide-scrollbars", "--enable-logging=stderr"),
            f"--user-data-dir={page.parent / 'browser'}",
            *flags,
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=180,
        check=True,
    )


@pytest.fixture(scope="module")
def probed(runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One page with a run of every command, and the probe in its head."""
    browser()
    out = tmp_path_factory.mktemp("browser")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "save", lambda *arguments: None)  # the page alone
        page = write_report(list(runs.values()), out)
    html = page.read_text("utf-8")
    assert html.count("<head>") == 1
    (out / "probed.html").write_text(html.replace("<head>", f"<head>{PROBE}"), "utf-8")
    return out / "probed.html"


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(probed: Path, width: int, scheme: str) -> None:
    frame = probed.parent / f"{width}.html"
    frame.write_text(FRAME % width)
    shown = look(
        frame,
        *("--dump-dom", "--virtual-time-budget=5000", "--window-size=1400,1000"),
        f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}",
    )
    found = re.search(r'<pre id="probe">(.+?)</pre>', shown.stdout, re.DOTALL)
    assert found, shown.stderr
    seen = json.loads(unescape(found[1]))
    assert "CONSOLE" not in shown.stderr
    assert seen["errors"] == []
    assert seen["requests"] == []
    assert seen["resources"] == 0
    # The script in the personas and in the texts is text: only the probe ran.
    assert seen["texts"]
    assert seen["title"] == "6 runs"
    assert seen["scripts"] == 1
    assert seen["width"] == width
    assert seen["scroll"] <= width
    assert seen["figures"] > 50
    assert seen["smallest"] > 100
    assert seen["beyond"] <= width
    assert seen["columns"] == (1 if width == 390 else 4)
    page, ink = (
        luminance(tuple(int(value) / 255 for value in re.findall(r"\d+", seen[name])[:3]))
        for name in ("background", "colour")
    )
    assert (page < 0.05 and ink > 0.5) if scheme == "dark" else (page > 0.9 and ink < 0.05)


#: What nobody should be able to have a page do, in the words of texts that others wrote.
ATTACK = (
    '"><img src=x onerror="document.title=\'ran\'"><svg onload="document.title=\'ran\'">'
    "</style></title></svg><script>document.title='ran'</script>--><!--]]>"
    "<a href=\"javascript:document.title='ran'\">click</a> {{ 7 * 7 }} $\\frac{$ &lt;b&gt; "
    "<meta http-equiv=refresh content='0; url=https://elsewhere.invalid'>"
)


def attacked(value: Any) -> Any:
    """JSON-like data with the attack in the place of every text that may be any."""
    if isinstance(value, dict):
        return {key: attacked(item) for key, item in value.items()}
    if isinstance(value, list):
        return [attacked(item) for item in value]
    return f"{value} {ATTACK}" if isinstance(value, str) else value


def attack(run: Path) -> None:
    """Put the attack everywhere in a run where a report would show it."""
    for directory in (run, *(path for path in run.iterdir() if path.is_dir())):
        data = json.loads((directory / "run.json").read_text())
        grid = data.get("grid")
        kept = {name: data[name] for name in ("format", "command", "complete")}
        if grid:
            kept["grid"] = {
                **grid,
                "personas": attacked(grid["personas"]),
                "tasks": attacked(grid["tasks"]),
                "baseline": attacked(grid["baseline"]),
            }
        texts = {name: attacked(data[name]) for name in data.keys() - kept.keys()}
        backend = {"host": ATTACK, "jobs": [1]}
        (directory / "run.json").write_text(json.dumps({**texts, **kept, "backend": backend}))
        if (directory / "text.jsonl").exists():
            lines = (directory / "text.jsonl").read_text().splitlines()
            made = [json.loads(line) for line in lines]
            changed = [{**text, "text": f"{text['text']} {ATTACK}"} for text in made]
            (directory / "text.jsonl").write_text("\n".join(map(json.dumps, changed)))
        for path in directory.glob("*.csv"):
            table = read_table(path)
            for name in {"hits", "published_model"} & set(table.columns):
                table[name] = ATTACK
            table.to_csv(path, index=False)


def test_words_in_a_figure_stay_words() -> None:
    """Names come from tables, which hold no such thing; the drawing does not rely on it."""
    line = Line("<b>", EQUALS[0], (1, 2), (0.1, 0.2))
    panel = line_panel(ATTACK, [line], x_label=ATTACK, y_label=ATTACK, ticks=[(1, ATTACK)])
    drawn = inline_svg(panel, "u")
    elements = set(re.findall(r"<([a-zA-Z]+)", drawn))
    assert elements <= {"svg", "defs", "g", "path", "text", "use", "clipPath", "rect"}
    assert drawn.count("&lt;img src=x onerror=") >= 3


#: Put at the start of the page, before its policy: says at the end what the page came to be.
WITNESS = """<script>
const seen = {blocked: []};
document.addEventListener('securitypolicyviolation', e => seen.blocked.push(e.violatedDirective));
addEventListener('load', () => setTimeout(() => {
  const all = [...document.querySelectorAll('*')];
  seen.title = document.title;
  seen.names = [...new Set(all.map(node => node.localName))];
  seen.scripts = document.scripts.length;
  seen.handlers = all.flatMap(node => [...node.attributes])
    .filter(found => found.name.startsWith('on')).length;
  seen.links = all.flatMap(node => [...node.attributes])
    .filter(found => ['href', 'src', 'xlink:href', 'action'].includes(found.name))
    .map(found => found.value).filter(value => !value.startsWith('#') && value !== 'data:,');
  seen.shown = document.body.textContent.split("document.title='ran'").length - 1;
  const said = document.createElement('pre');
  said.id = 'said';
  said.textContent = JSON.stringify(seen);
  document.body.append(said);
}, 500));
</script>
"""


def witnessed(page: Path, put: str = "", policy: bool = True) -> dict[str, Any]:
    """What a browser makes of a page, with `put` at the end of its body."""
    html = page.read_text("utf-8")
    html = html.replace("<head>", f"<head>{WITNESS}", 1).replace("</body>", f"{put}</body>", 1)
    if not policy:
        html = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", html, count=1)
    changed = page.with_name("witnessed.html")
    changed.write_text(html, "utf-8")
    shown = look(changed, "--dump-dom", "--virtual-time-budget=5000")
    found = re.search(r'<pre id="said">(.+?)</pre>', shown.stdout, re.DOTALL)
    assert found, shown.stderr
    seen: dict[str, Any] = json.loads(unescape(found[1]))
    return seen


@pytest.mark.parametrize("command", MAKERS)
def test_texts_of_others_stay_texts(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser()
    monkeypatch.setattr(writing, "save", lambda *arguments: None)  # the page alone
    run = MAKERS[command](tmp_path / "run")
    attack(run)
    # Without its policy, so that nothing but the escaping is tested.
    seen = witnessed(write_report([run]), policy=False)
    assert seen["title"] != "ran"
    assert seen["shown"] > 10
    assert seen["scripts"] == 1  # the witness
    assert seen["handlers"] == 0
    assert seen["links"] == []
    assert not {"img", "a", "iframe", "object", "embed", "form", "base"} & set(seen["names"])


#: What would run or fetch something if it were in the page after all.
SLIPPED = """<script>document.title = 'ran'</script>
<img src="data:," onerror="document.title = 'ran'">
<iframe srcdoc="<script>parent.document.title = 'ran'</script>"></iframe>
<img src="{url}/image"><script src="{url}/script"></script>
<link rel="stylesheet" href="{url}/style"><object data="{url}/object"></object>
<style>@import "{url}/import"; body {{ background: url({url}/background) }}</style>
"""


@pytest.mark.parametrize("policy", [True, False], ids=["policy", "no policy"])
def test_a_page_runs_and_fetches_nothing(
    policy: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where something slipped in; without the policy it would."""
    browser()
    monkeypatch.setattr(writing, "save", lambda *arguments: None)
    page = write_report([capture(tmp_path / "run")])
    asked: list[str] = []

    class Outside(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Outside) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        put = SLIPPED.format(url=f"http://127.0.0.1:{server.server_port}")
        seen = witnessed(page, put, policy=policy)
        server.shutdown()
    if policy:
        assert seen["title"] != "ran"
        assert asked == []
        assert {name.split("-")[0] for name in seen["blocked"]} >= {"script", "img", "style"}
    else:
        assert seen["title"] == "ran"
        assert {"/image", "/script", "/style"} <= set(asked)


def test_the_page_makes_a_picture(probed: Path, tmp_path: Path) -> None:
    shot = tmp_path / "shot.png"
    look(probed, f"--screenshot={shot}", "--window-size=390,2000")
    from PIL import Image

    with Image.open(shot) as image:
        assert image.size == (390, 2000)
        assert len(image.convert("L").getcolors() or []) > 20
