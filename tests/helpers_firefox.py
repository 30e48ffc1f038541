"A Firefox for tests of pages, by its own protocol (Marionette): playwright drives only builds of its own."
import contextlib, json, os, shutil, socket, subprocess, tempfile, time

import pytest

FIREFOX = next(filter(None, map(shutil.which, ("firefox-esr", "firefox"))), None)
needs_firefox = pytest.mark.skipif(FIREFOX is None, reason="Firefox is not installed (Debian's package: firefox-esr)")
OFF = """datareporting.policy.dataSubmissionEnabled app.update.enabled app.normandy.enabled browser.shell.checkDefaultBrowser
    network.captive-portal-service.enabled network.connectivity-service.enabled browser.safebrowsing.malware.enabled
    browser.safebrowsing.phishing.enabled extensions.update.enabled"""
QUIET = {**dict.fromkeys(OFF.split(), False), "browser.startup.page": 0, "services.settings.server": "data:,none"}


class Marionette:
    "One window of a Firefox."
    def __init__(self, port, patience=120):
        end = time.time() + patience
        while True:
            try: self.socket = socket.create_connection(("127.0.0.1", port), 5); break
            except OSError:
                if time.time() > end: raise
                time.sleep(.2)
        self.socket.settimeout(600)
        self.buffer, self.count = b"", 0
        self.receive()
        session = self.ask("WebDriver:NewSession", {"capabilities": {"alwaysMatch": {"timeouts": {"script": 600_000}}}})
        self.version = session["capabilities"]["browserVersion"]

    def receive(self):
        while b":" not in self.buffer: self.buffer += self.more()
        size, _, self.buffer = self.buffer.partition(b":")
        while len(self.buffer) < int(size): self.buffer += self.more()
        message, self.buffer = self.buffer[:int(size)], self.buffer[int(size):]
        return json.loads(message)

    def more(self):
        data = self.socket.recv(1 << 20)
        if not data: raise ConnectionError("Firefox has gone")
        return data

    def ask(self, command, how):
        self.count += 1
        data = json.dumps([0, self.count, command, how]).encode()
        self.socket.sendall(b"%d:%s" % (len(data), data))
        _, _, error, value = self.receive()
        if error: raise AssertionError(f"{error['error']}: {error['message']}")
        return value

    def goto(self, url): self.ask("WebDriver:Navigate", {"url": url})

    def evaluate(self, function, *args):
        "What an async function of the page gives."
        script = f"""const done = arguments[arguments.length - 1]
            ;({function})(...Array.from(arguments).slice(0, -1)).then(value => done({{value}}), e => done({{error: String(e)}}))"""
        found = self.ask("WebDriver:ExecuteAsyncScript", {"script": script, "args": list(args), "sandbox": None, "newSandbox": False})["value"]
        if "error" in found: raise AssertionError(found["error"])
        return found.get("value")

    def wait(self, condition, seconds=120):
        for _ in range(5 * seconds):
            if self.evaluate(f"async () => {condition}"): return
            time.sleep(.2)
        raise AssertionError(f"{condition}: {self.evaluate('async () => document.body.innerText')[:500]}")

    def screenshot(self, path):
        import base64
        path.write_bytes(base64.b64decode(self.ask("WebDriver:TakeScreenshot", {"full": True})["value"]))


@contextlib.contextmanager
def firefox():
    "A headless Firefox that talks to nobody but its pages."
    with socket.socket() as s: s.bind(("127.0.0.1", 0)); port = s.getsockname()[1]
    with tempfile.TemporaryDirectory() as profile:
        prefs = {**QUIET, "marionette.port": port}
        with open(f"{profile}/user.js", "w") as f: f.writelines(f"user_pref({json.dumps(k)}, {json.dumps(v)});\n" for k, v in prefs.items())
        command = [FIREFOX, "--headless", "--marionette", "--no-remote", "--profile", profile]
        env = {**os.environ, "MOZ_HEADLESS": "1", "HOME": profile, "MOZ_CRASHREPORTER_DISABLE": "1"}
        p = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try: yield Marionette(port)
        finally:
            p.terminate()
            try: p.wait(15)
            except subprocess.TimeoutExpired: p.kill()
