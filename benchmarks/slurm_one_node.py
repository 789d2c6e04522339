"""Makes a table on a real Slurm of one node, kills its driver, resumes, and compares with the local engine.

python -m benchmarks.slurm_one_node      as root; needs Debian's slurm-wlm and munge, and requirements-cluster.txt

Starts munged, slurmctld and slurmd with files in a temporary folder, and stops them at the end. Draws a small data set,
runs `reproduce.py --engine slurm`, kills the driver (SIGKILL), runs the same command again, then `--engine local`, and
compares the records. Writes benchmarks/results/slurm_one_node.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from examples.demo_data import write_dataset
from utils.config import script_parser
from utils.errors import UserError, run_command
from utils.files import PROJECT_ROOT, require_writable, write_json

CONFIGURATION = """
ClusterName=one
SlurmctldHost={host}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=batch_sched_delay=1,sched_interval=5
ReturnToService=2
NodeName={host} CPUs={cores} State=UNKNOWN
PartitionName=main Nodes={host} Default=YES MaxTime=INFINITE State=UP
"""
DATA_SIZE = 64  # pixels
TABLE = ("--shots", "1", "--epochs", "2", "--inferences", "2", "--weights", "none", "--img_size", str(DATA_SIZE))
TABLE += ("--batch_size", "4", "--num_workers", "0", "--device", "cpu", "--data_type", "folder", "--jobs", "2")
PATIENCE = 600  # seconds to wait for the second driver


def get_args_parser() -> argparse.ArgumentParser:
    """The command line of the script."""
    parser = script_parser(__doc__)
    results = PROJECT_ROOT / "benchmarks" / "results"
    parser.add_argument("--output", type=Path, default=results, help="folder of the JSON file")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Makes the table on both engines, prints the observations and writes a JSON file."""
    args = get_args_parser().parse_args(argv)
    require_writable(args.output, "--output", folder=True)
    missing = [name for name in ("munged", "slurmctld", "slurmd", "sbatch") if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        raise UserError(f"needs root and apt-get install slurm-wlm munge (missing: {', '.join(missing) or 'nothing'})")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_dataset(folder / "data", categories=("ring", "weave"), train=5, good=3, defective=2, size=DATA_SIZE)
        with one_node(folder):
            seen = {"slurm": _output("sinfo", "--version"), "node": _output("sinfo", "--noheader")}
            seen |= _run_on_slurm(folder)
        begin = time.monotonic()
        _start(folder, "local").wait()
        seen |= {"local_seconds": time.monotonic() - begin}
        slurm, local = (_rounds(folder / name) for name in ("slurm", "local"))
        seen |= {"records": len(slurm), "same_numbers": slurm == local}
    print(json.dumps(seen, indent=2))
    write_json(args.output / "slurm_one_node.json", seen)


def _run_on_slurm(folder: Path) -> dict:
    """Makes the table with a driver that is killed and a second one that finishes; returns the observations."""
    begin, driver = time.monotonic(), _start(folder, "slurm")
    _wait_for(lambda: " R " in _output("squeue"))
    driver.kill()
    driver.wait()
    queue = _output("squeue", "--array", "--format=%i %T").splitlines()[1:]
    again = _start(folder, "slurm", capture=True)
    printed = again.communicate(timeout=PATIENCE)[0]
    kept = next(line for line in printed.splitlines() if "in the queue from before" in line)
    ids = sorted(file.read_text() for file in (folder / "slurm" / "jobs").glob("*.slurm"))
    seen = {"queue_after_the_kill": queue, "second_driver": kept, "exit_code": again.returncode, "jobs": ids}
    return seen | {"slurm_seconds": time.monotonic() - begin}


def _start(folder: Path, engine: str, capture: bool = False) -> subprocess.Popen:
    command = [sys.executable, str(PROJECT_ROOT / "reproduce.py"), *TABLE, "--engine", engine]
    command += ["--data_path", str(folder / "data"), "--cache_dir", str(folder / "cache")]
    command += ["--output", str(folder / engine), "--slurm", "gpus=0", "cpus=1", "minutes=30"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE if capture else None)


def _rounds(folder: Path) -> dict[str, list]:
    records = {file.name: json.loads(file.read_text()) for file in folder.glob("*_*.json")}
    return {name: record["rounds"] for name, record in records.items()}


@contextmanager
def one_node(folder: Path) -> Iterator[None]:
    """A Slurm with this machine as its only node. Inside the context, sbatch, squeue and other commands use it."""
    host = os.uname().nodename.split(".")[0]
    file = folder / "slurm.conf"
    file.write_text(CONFIGURATION.format(host=host, folder=folder, cores=os.cpu_count()))
    for name in ("state", "spool"):
        (folder / name).mkdir()
    key, socket = folder / "munge.key", folder / "munge.socket"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    folder.chmod(0o755)
    os.environ["SLURM_CONF"] = str(file)
    munged = ["munged", "--foreground", "--force", f"--key-file={key}", f"--socket={socket}"]
    munged += [f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    with ExitStack() as stack:
        stack.enter_context(_daemon(munged, folder / "munged.out"))
        _wait_for(socket.exists)
        for name in ("slurmctld", "slurmd"):
            stack.enter_context(_daemon([name, "-D", "-f", str(file)], folder / f"{name}.out"))
        try:
            _wait_for(lambda: "idle" in _output("sinfo"))
        except UserError as error:
            logs = "\n".join(out.read_text()[-2000:] for out in folder.glob("*.out"))
            raise UserError(f"{error}\n{logs}") from error
        yield


@contextmanager
def _daemon(command: Sequence[str], log: Path) -> Iterator[None]:
    with open(log, "wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    try:
        yield
    finally:
        process.terminate()
        process.wait()


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def _wait_for(condition: object) -> None:
    end = time.monotonic() + 60
    while not condition():
        if time.monotonic() > end:
            raise UserError("Slurm did not start within a minute")
        time.sleep(0.3)


if __name__ == "__main__":
    run_command(main)
