"""Whether this tree can be released: one line for each check, exit status 1 if one fails.

    python tools/release.py            the version in settings.ini, before it is tagged
    python tools/release.py v0.2.0     the same, and the tag is this version and sits on this commit
"""
import re, subprocess, sys, tempfile, zipfile
from pathlib import Path

import test                                            # beside this file

ROOT = test.ROOT


def version():
    "The version that settings.ini declares."
    return re.search(r"^version = (\S+)$", (ROOT / "settings.ini").read_text(), re.M)[1]


def git(*args): return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True).stdout.strip()


def tree_is_committed():
    "Nothing is changed or new beside what is committed."
    assert not (changes := git("status", "--porcelain")), f"commit or remove:\n{changes}"


def version_is_valid():
    "Three numbers, and a step up from the last tag."
    v = version()
    assert re.fullmatch(r"\d+\.\d+\.\d+", v), f"settings.ini: version = {v}, expected three numbers such as 0.2.0"
    tags = [tuple(map(int, t[1:].split("."))) for t in git("tag", "--list", "v*").split() if re.fullmatch(r"v\d+\.\d+\.\d+", t)]
    here = git("tag", "--points-at", "HEAD").split()
    newer = [t for t in tags if t >= tuple(map(int, v.split("."))) and f"v{'.'.join(map(str, t))}" not in here]
    assert not newer, f"settings.ini: version = {v}, but there are tags {newer}; raise the version"


def changelog_names_it():
    "CHANGELOG.md has a section of this version, dated, and nothing is left under `Unreleased`."
    text = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## {re.escape(version())}\b.*\d{{4}}-\d\d-\d\d", text, re.M), \
        f"CHANGELOG.md: expected a heading '## {version()} (YYYY-MM-DD)'"
    left = re.search(r"^## Unreleased\s*\n(.*?)(?=^## |\Z)", text, re.M | re.S)
    assert not left or not left[1].strip(), f"CHANGELOG.md: move what is under Unreleased to {version()}"


def tag_agrees(tag):
    "The tag is this version, on this commit."
    assert tag == f"v{version()}", f"the tag is {tag}, settings.ini says {version()}: expected v{version()}"
    assert tag in git("tag", "--points-at", "HEAD").split(), f"{tag} is not on this commit: git tag {tag}"


def wheel_is_whole():
    "The wheel's name is the version; it holds every module, stub, style sheet and file of data/, and declares what settings.ini does."
    with tempfile.TemporaryDirectory() as folder:
        test.run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, test.copy_project("release"))
        wheel, = Path(folder).glob("*.whl")
        assert wheel.name.startswith(f"lora_nb-{version()}-"), wheel.name
        names = set(zipfile.ZipFile(wheel).namelist())
    tracked = git("ls-files", "lora_nb", "data").split("\n")
    expected = {re.sub(r"^data/", "lora_nb/data/", f) for f in tracked if not f.startswith(".")}
    assert not (missing := sorted(expected - names)), f"{len(missing)} files are not in the wheel: {missing[:8]}"


def main(tag=None):
    checks = [tree_is_committed, version_is_valid, changelog_names_it, wheel_is_whole, test.colab_badges, test.readme_in_sync,
              test.readme_links, test.modules_in_sync, test.stored_outputs]
    try:
        results = [test.measured(c.__name__.replace("_", " "), c) for c in checks]
        if tag: results.append(test.measured(f"tag {tag} agrees", tag_agrees, tag))
    finally: test.shutil.rmtree(test.SCRATCH, ignore_errors=True)
    for name, error in results:
        if error: print(f"\n{'-' * 30} {name}\n{error}")
    return any(error for _, error in results)


if __name__ == "__main__": sys.exit(main(*sys.argv[1:2]))
