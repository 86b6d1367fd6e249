"""The audit says what it looked up, and takes no answer for none."""

import audit

CLEAN = {"name": "jinja2", "version": "3.1.6", "vulns": []}
SKIPPED = {
    "name": "torch",
    "skip_reason": "Dependency not found on PyPI and could not be audited: torch (2.13.0)",
}
HOLED = {"name": "requests", "version": "2.19.0", "vulns": [{"id": "CVE-2018-18074"}]}
WANTED = audit.pins("# as tested\nJinja2==3.1.6\ntorch==2.13.0  # the CPU's\n")


def test_what_was_not_looked_up_is_not_passed():
    assert {"jinja2==3.1.6", "torch==2.13.0"} == WANTED
    assert audit.verdict([CLEAN, CLEAN | {"name": "torch", "version": "2.13.0"}], WANTED)[0] == 0
    for found in ([], [CLEAN], [CLEAN, SKIPPED]):
        code, words = audit.verdict(found, WANTED)
        assert code == 3 and words.startswith("not run for ") and "torch==2.13.0" in words
    code, words = audit.verdict([HOLED], audit.pins("requests==2.19.0"))
    assert code == 1 and "requests 2.19.0: CVE-2018-18074" in words


def test_a_database_that_does_not_answer_is_not_asked_further(monkeypatch, capsys):
    asked = []
    monkeypatch.setattr(audit, "asked", lambda database, file: asked.append(database) or [SKIPPED])
    assert audit.main() == 3
    assert asked == ["pypi", "osv"] and "not run" in capsys.readouterr().out
    monkeypatch.setattr(audit, "asked", lambda database, file: [HOLED])
    assert audit.main() == 1
