"`make release-check` finds what must not be released."
import subprocess, sys
from pathlib import Path
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
import release                                          # tools/release.py


@pytest.fixture
def tree(tmp_path, monkeypatch):
    "A small repository of version 0.2.0, ready to be tagged."
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nversion = 0.2.0\n")
    (tmp_path / "CHANGELOG.md").write_text("# Changelog\n\n## 0.2.0 (2026-12-01)\n\n### Added\n- A thing.\n\n## 0.1.0\n\nFirst.\n")
    monkeypatch.setattr(release, "ROOT", tmp_path)
    git = lambda *a: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *a], cwd=tmp_path, check=True, capture_output=True)
    git("init", "-q"); git("add", "."); git("commit", "-qm", "0.2.0")
    return tmp_path, git


CHECKS = release.tree_is_committed, release.version_is_valid, release.changelog_names_it


def test_a_ready_tree_passes(tree):
    for check in CHECKS: check()
    with pytest.raises(AssertionError, match="not on this commit"): release.tag_agrees("v0.2.0")
    tree[1]("tag", "v0.2.0")
    release.tag_agrees("v0.2.0")
    release.version_is_valid()                          # its own tag does not count against it
    with pytest.raises(AssertionError, match="expected v0.2.0"): release.tag_agrees("v0.3.0")


def test_a_change_that_is_not_committed(tree):
    (tree[0] / "new.txt").write_text("x")
    with pytest.raises(AssertionError, match="new.txt"): release.tree_is_committed()


def test_a_version_that_was_tagged_before(tree):
    tree[1]("tag", "v0.3.0")
    (tree[0] / "new.txt").write_text("x"); tree[1]("add", "."); tree[1]("commit", "-qm", "later")
    with pytest.raises(AssertionError, match="raise the version"): release.version_is_valid()


@pytest.mark.parametrize("version", ["0.2", "v0.2.0", "0.2.0rc1"])
def test_a_version_of_another_form(tree, version):
    (tree[0] / "settings.ini").write_text(f"[DEFAULT]\nversion = {version}\n")
    with pytest.raises(AssertionError, match="three numbers"): release.version_is_valid()


@pytest.mark.parametrize("text, word", [("# Changelog\n\n## 0.1.0 (2026-01-01)\n", "expected a heading"),
                                        ("# Changelog\n\n## 0.2.0\n", "expected a heading"),
                                        ("# Changelog\n\n## Unreleased\n\n- more\n\n## 0.2.0 (2026-12-01)\n", "Unreleased")])
def test_a_changelog_that_is_behind(tree, text, word):
    (tree[0] / "CHANGELOG.md").write_text(text)
    with pytest.raises(AssertionError, match=word): release.changelog_names_it()
