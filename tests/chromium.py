"""Pages in a real browser: headless Chromium, which Debian's package `chromium` brings."""

import html
import json
import re
import shutil
import subprocess

BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chrome"))), None)
MISSING = "no chromium on the PATH (Debian: apt install chromium)"

# Runs in the page once it is drawn; what `probe` returns is found in an attribute of the body.
_PROBE = """<script>(async () => {
  const errors = [];
  addEventListener("error", (e) => errors.push(String(e.message)));
  addEventListener("unhandledrejection", (e) => errors.push(String(e.reason)));
  addEventListener("securitypolicyviolation", (e) => errors.push("blocked: " + e.blockedURI));
  const pause = (ms) => new Promise((done) => setTimeout(done, ms));
  for (let i = 0; i < 4000 && !document.body.dataset.ready; i += 1) await pause(50);
  let value = null;
  try { value = await (async () => { PROBE })(); } catch (e) { errors.push(String(e.stack || e)); }
  const ready = document.body.dataset.ready || "";
  document.body.dataset.result = JSON.stringify({ ready, errors, value });
})();</script></body>"""


def look(path, probe, folder, *, width=1280, height=2000):
    """{"ready", "errors", "value": what the JavaScript `probe` returns} of a page of a copy."""
    page = folder / "probed.html"
    text = path.read_text()
    assert text.count("</body>") == 1
    page.write_text(text.replace("</body>", _PROBE.replace("PROBE", probe)))
    command = [BROWSER, "--headless=new", "--no-sandbox", "--enable-unsafe-swiftshader"]
    command += [f"--window-size={width},{height}", "--virtual-time-budget=400000", "--dump-dom"]
    command += [f"--user-data-dir={folder}/profile", f"file://{page}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'data-result="([^"]*)"', done.stdout)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    return json.loads(html.unescape(found[1]))
