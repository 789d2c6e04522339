"""The container file and the systemd unit of the service: known keys, files that exist, flags that parse."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from examples.service import get_args_parser
from utils.files import PROJECT_ROOT

UNIT, CONTAINER = PROJECT_ROOT / "examples/regad-service.service", PROJECT_ROOT / "examples/Dockerfile"
INSTRUCTIONS = {"FROM", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "HEALTHCHECK", "ENTRYPOINT", "CMD"}
MODULE = ["-m", "examples.service"]


def instructions() -> list[tuple[str, str]]:
    """The instructions of the container file with their arguments."""
    lines = "\n".join(line for line in CONTAINER.read_text().splitlines() if not line.startswith("#"))
    joined = lines.replace("\\\n", " ")
    return [tuple(line.split(maxsplit=1)) for line in joined.splitlines() if line.strip()]


def test_the_container_starts_the_service_as_a_plain_user():
    found = instructions()
    assert {name for name, _ in found} == INSTRUCTIONS and found[0][0] == "FROM"
    assert ":" in found[0][1] and "latest" not in found[0][1]
    names = [name for name, _ in found]
    assert names.index("USER") > max(at for at, name in enumerate(names) if name in ("RUN", "COPY"))
    for name, text in found:
        for file in text.split()[:-1] if name == "COPY" else ():
            assert (PROJECT_ROOT / file).exists(), file
    start, default = (json.loads(text) for wanted in ("ENTRYPOINT", "CMD") for name, text in found if name == wanted)
    assert start[1:3] == MODULE
    config = get_args_parser().parse_config([*start[3:], *default])
    assert config.host == "0.0.0.0" and str(config.port) == dict(found)["EXPOSE"]
    said = shlex.split(re.search(r"regad-service (--detector \S+)", CONTAINER.read_text())[1])
    assert get_args_parser().parse_config([*start[3:], *said]).detector == (Path("/detectors/bottle.regad"),)


def test_the_unit_starts_the_service():
    unit = configparser.ConfigParser(delimiters="=", interpolation=None)
    unit.optionxform = str
    unit.read_string(UNIT.read_text())
    assert unit.sections() == ["Unit", "Service", "Install"]
    service = unit["Service"]
    program, *flags = shlex.split(service["ExecStart"])
    assert program.startswith(service["WorkingDirectory"]) and flags[:2] == MODULE
    log = get_args_parser().parse_config(flags[2:]).log
    assert log.parent == Path("/var/lib", service["StateDirectory"]) and service["ProtectSystem"] == "strict"


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_knows_every_line(tmp_path):
    unit = re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", UNIT.read_text()).replace("User=regad\n", "")
    (tmp_path / UNIT.name).write_text(unit)
    done = subprocess.run(
        ["systemd-analyze", "verify", tmp_path / UNIT.name], capture_output=True, text=True, check=False
    )
    assert "nknown" not in done.stderr, done.stderr
