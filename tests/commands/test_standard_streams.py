"""Programs whose standard output fails: the work goes on, the status is true, and no traceback is printed."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = sorted(
    path.name
    for path in (ROOT / "experiments").glob("*.py")
    if '__name__ == "__main__"' in path.read_text() and path.name != "ogbench_worker.py"
)
SCRIPT = """
import sys
from experiments.cli.standard_streams import ignore_write_errors, standard_streams
with standard_streams() as streams:
    {first}
    for number in range(3000):
        print("line", number)
    print("the last one", file=sys.stderr)
    status = streams.verdict({status})
sys.exit(status)
"""
SHORT, LONG = "pass", "ignore_write_errors()"
NOTE = "note: standard output cannot be written"


def play(first: str, where: str, *, status: int = 0, flags: Sequence[str] = ()) -> tuple[int, list[str]]:
    """Exit status and complaints of a small program that prints to a full disk or to a closed pipe."""
    command = [sys.executable, *flags, "-c", SCRIPT.format(first=first, status=status)]
    if where == "pipe":
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open("/dev/full", os.O_WRONLY)
    try:
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    finally:
        os.close(write)
    return done.returncode, done.stderr.splitlines()


@pytest.mark.parametrize("flags", [(), ("-u",), ("-X", "dev")], ids=["buffered", "unbuffered", "dev"])
def test_short_program_ends_quietly_when_its_reader_is_gone(flags: Sequence[str]):
    assert play(SHORT, "pipe", flags=flags) == (141, ["the last one"])


def test_output_that_was_asked_for_and_lost_is_an_error():
    status, lines = play(SHORT, "full")
    assert status == 2 and lines == [
        "the last one",
        "error: cannot write standard output: No space left on device",
    ]


@pytest.mark.parametrize("where", ["pipe", "full"])
@pytest.mark.parametrize("flags", [(), ("-u",)], ids=["buffered", "unbuffered"])
def test_long_program_outlives_its_output(where: str, flags: Sequence[str]):
    status, lines = play(LONG, where, flags=flags)
    assert status == 0
    note, last = sorted(lines, key=lambda line: line == "the last one")
    assert note.startswith(NOTE) and last == "the last one"


def test_output_that_failed_before_the_work_began_is_noted_too():
    status, (note, _) = play("print('lost', flush=True); ignore_write_errors()", "full")
    assert status == 0 and note.startswith(NOTE)


@pytest.mark.parametrize("where", ["pipe", "full"])
def test_another_status_is_not_hidden_by_lost_output(where: str):
    assert play(SHORT, where, status=1)[0] == 1


def test_both_streams_may_fail():
    command = [sys.executable, "-c", SCRIPT.format(first=LONG, status=0)]
    with open("/dev/full", "wb") as full:
        assert subprocess.run(command, stdout=full, stderr=full, cwd=ROOT).returncode == 0
    closed = ["sh", "-c", '"$@" >&- 2>&-', "sh", *command]
    assert subprocess.run(closed, cwd=ROOT).returncode == 0


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("ascii", b"a - b, lambda, ?, 3 x 4\n"),
        ("latin-1", b"a - b, lambda, ?, 3 \xd7 4\n"),
        ("utf-8", "a – b, λ, 数, 3 × 4\n".encode()),
    ],
)
def test_characters_that_an_encoding_lacks_are_replaced(encoding: str, text: bytes):
    script = """
import sys
from experiments.cli.standard_streams import standard_streams
with standard_streams():
    print("a \\u2013 b, \\u03bb, \\u6570, 3 \\u00d7 4", file=sys.stdout)
    print("a \\u2013 b, \\u03bb, \\u6570, 3 \\u00d7 4", file=sys.stderr)
"""
    env = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=ROOT, env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, text, text)


def test_names_of_files_that_are_no_text_are_printed_as_they_are():
    script = """
import os
from experiments.cli.standard_streams import standard_streams
with standard_streams():
    print(os.fsdecode(b"run-\\xff"))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, b"run-\xff\n"), done.stderr


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_program_guards_its_output(name: str):
    text = (ROOT / "experiments" / name).read_text()
    assert "exit_status(" in text or "standard_streams(" in text


def test_a_list_to_a_full_disk_is_an_error():
    """A program as it is, from its first import to Python's own last flush."""
    with open("/dev/full", "wb") as full:
        command = [sys.executable, "experiments/run.py", "--list"]
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == "error: cannot write standard output: No space left on device\n"
