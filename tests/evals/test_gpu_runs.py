"""quantize_speed.py and finetune_speed.py as a machine that is lent ends them: what they leave in $OUT, and what they clear away."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


def started(folder: Path, *arguments: str) -> tuple[subprocess.Popen[str], Path]:
    """A driver with $OUT and temporary files in the folder."""
    out, temporary = folder / "out", folder / "tmp"
    temporary.mkdir()
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "OUT": str(out), "TMPDIR": str(temporary)}
    command = [sys.executable, *arguments]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, cwd=ROOT / "evals"
    ), out


def wait_for(process: subprocess.Popen[str], file: Path, there: Any) -> None:
    until = time.monotonic() + 120
    while not (file.exists() and there(json.loads(file.read_text()))):
        assert time.monotonic() < until
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def test_gptq_that_is_ended(tmp_path: Path) -> None:
    """So many samples that it does not get to its end by itself."""
    process, out = started(
        tmp_path, "quantize_speed.py", "tiny", "--samples", "4000", "--length", "128", "--threads", "1"
    )
    file = out / "quantize_speed-gptq-tiny.unfinished.json"
    wait_for(process, file, lambda report: report["progress"][-1]["what"] == "quantize")
    (work,) = (tmp_path / "tmp").glob("quantize_speed-*")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert not work.exists()
    assert [path.name for path in out.iterdir()] == [file.name]
    report = json.loads(file.read_text())
    assert (report["shape"], report["samples"]) == ("tiny", 4000)
    last = report["progress"][-1]
    assert last["of"] == 2
    assert last["seconds"] > 0
    assert last["peak_rss_bytes"] > 0
    assert f"quantize: {last['done']} of 2, " in errors


def test_gptq_that_ends(tmp_path: Path) -> None:
    process, out = started(tmp_path, "quantize_speed.py", "tiny", "--samples", "4", "--length", "64", "--repeats", "1")
    printed, errors = process.communicate(timeout=200)
    assert process.returncode == 0, errors
    report = json.loads(printed.splitlines()[-1])
    assert report["goals"] == []
    assert [path.name for path in out.iterdir()] == ["quantize_speed-gptq-tiny.json"]
    assert [line.partition(",")[0] for line in errors.splitlines() if line.startswith("quantize: ")] == [
        f"quantize: {done} of 2" for done in range(3)
    ]
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.parametrize("code", ["sys.exit(3)", "print('no JSON')"])
def test_a_worker_that_fails(code: str, tmp_path: Path) -> None:
    """Its words are there, without the lines of progress."""
    worker = f"import sys; print('progress {{}}', file=sys.stderr); print('why', file=sys.stderr); {code}"
    run = f"import quantize_speed as q, sys; q.run([sys.executable, '-c', {worker!r}], 1)"
    process, _ = started(tmp_path, "-c", run)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "why" in errors.splitlines()
    assert "progress {}" not in errors.splitlines()
    assert f"exit code {3 if 'exit' in code else 0}" in errors


def test_a_report_after_every_run(tmp_path: Path) -> None:
    """Of qlm's side alone, as long as there is no other; and then the process is told to end."""
    process, out = started(
        tmp_path, "finetune_speed.py", "tiny", "--steps", "3", "--warm-up", "1", "--rounds", "1", "--length", "16", "--r", "2"
    )  # fmt: skip
    file = out / "finetune_speed-tiny-cpu-float32.json"
    wait_for(process, file, lambda report: "qlm" in report)
    report = json.loads(file.read_text())
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert list((tmp_path / "tmp").glob("finetune_speed-*")) == []
    assert report["optimizer"] == "adamw"
    assert (report["gpu"], report["driver"]) == (None, None)
    assert len(report["runs"]["qlm"]) == 1
    assert report["runs"]["peer"] == []
    assert "step_ratio" not in report
