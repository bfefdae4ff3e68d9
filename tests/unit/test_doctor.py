"""`python -m slothrl doctor`: what it finds on this machine, and what it says of a machine that is not ready."""

import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from huggingface_hub import constants
from packaging.requirements import Requirement

from slothrl import doctor
from slothrl.__main__ import main


def test_this_machine(capsys):
    """The tests run here, so what they need is found ready; every line that is not ok says what to do."""
    code = main(["doctor"])
    shown = capsys.readouterr().out
    slow = ("hub", "one base")
    found = {name: doctor.guarded(check) for name, check in doctor.CHECKS.items() if name not in slow}
    assert code == (1 if any(finding.status == doctor.FAIL for finding in found.values()) else 0)
    for name in ("python", "packages", "bitsandbytes"):
        assert found[name].status == doctor.OK, found[name]
    assert "nf4 on " in found["bitsandbytes"].detail
    if found["vLLM"].status == doctor.OK:  # then it was started, shared with and followed a LoRA
        assert "one base, 0.0" in " ".join(shown.split())
    for name, finding in found.items():
        assert name in shown
        assert finding.status == doctor.OK or finding.fix
    assert shown.strip().endswith("ready") if code == 0 else "failed: " in shown


def test_arguments(capsys):
    assert main(["doctor", "now"]) == 2
    assert "takes no arguments" in capsys.readouterr().err


def test_packages_of_other_versions(monkeypatch):
    wanted = [Requirement(text) for text in ("torch>=99", "safetensors>=0.5", "no-such-package>=1", "x; extra == 'y'")]
    monkeypatch.setattr(doctor, "requirements", lambda: wanted)
    found = doctor.packages()
    assert found.status == doctor.FAIL
    first, second = found.detail.split("; ")
    assert first.startswith("torch 2.")
    assert first.endswith("(needs >=99)")
    assert second == "no-such-package is missing (needs >=1)"


def test_the_requirements_are_the_projects():
    assert {"torch", "trl", "peft", "hydra-core"} <= {requirement.name for requirement in doctor.requirements()}


def test_a_check_that_breaks_fails_with_its_reason(monkeypatch, capsys):
    def broken() -> doctor.Finding:
        raise ImportError("libfoo.so.1: cannot open shared object file\nmore")

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(doctor, "CHECKS", {"bitsandbytes": broken, "python": doctor.python})
    assert main(["doctor"]) == 1
    shown = capsys.readouterr().out
    assert "ImportError: libfoo.so.1: cannot open shared object file" in shown
    assert shown.strip().endswith("failed: bitsandbytes")


def test_a_python_that_is_too_new(monkeypatch):
    monkeypatch.setattr(doctor, "PYTHONS", ((3, 0), (3, 1)))
    assert doctor.python().status == doctor.FAIL


def test_little_room(monkeypatch):
    monkeypatch.setattr(doctor, "FREE_BYTES", 10**18)
    found = doctor.disk()
    assert found.status == doctor.NOTE
    assert "output_dir" in found.fix


class Answer(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.mark.parametrize("there", [True, False])
def test_the_hub(there, monkeypatch):
    """A server on this machine stands for the hub: the check only needs an answer."""
    server = HTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    if not there:
        server.shutdown()
        server.server_close()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    found = doctor.hub()
    assert found.status == (doctor.OK if there else doctor.NOTE), found
    if there:
        server.shutdown()
        server.server_close()
    else:
        assert "cannot be reached" in found.detail
