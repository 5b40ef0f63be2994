"""The sandbox: hostile programs do not pass, do no harm and leave nothing behind; honest ones pass."""

from __future__ import annotations

import errno
import operator
import os
import platform
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cdm_toolkit.errors import IsolationMissing
from cdm_toolkit.evaluation.sandbox import cgroup, plain, seccomp
from cdm_toolkit.evaluation.sandbox import execute as run
from cdm_toolkit.evaluation.sandbox import isolation as isolation_module
from cdm_toolkit.evaluation.sandbox.execute import SetupError, run_program, run_programs
from cdm_toolkit.evaluation.sandbox.isolation import probe, require
from cdm_toolkit.evaluation.sandbox.records import CGROUP, LAYERS, Isolation, Limits, Outcome, Program

HOSTILE = Path(__file__).with_name("hostile")
"""Programs in `.txt`, so that nothing collects, imports or runs them by mistake."""
DOCS = Path(__file__).parents[2] / "docs" / "sandbox.md"
SHORT = Limits(wall_seconds=3, cpu_seconds=1, memory_mib=256)
SQUARES = "def check(candidate):\n    assert candidate(3) == 9\n    assert candidate(5) == 25\n"

# What each comes to. A program that is right only if it got through has `failed`.
WRONG = {"failed"}
STOPPED = {"cpu", "timeout"}  # which one, on a machine that has other work, is a matter of luck
EXPECTED: dict[str, set[str]] = {
    "exit_zero": {"unloadable"},
    "exit_zero_in_call": {"raised"},
    "hard_exit": {"ended"},
    "atexit_hook": {"raised"},
    "base_exception": {"raised"},
    "raise_generator_exit": {"raised"},
    "endless_loop": STOPPED,
    "endless_load": STOPPED,
    "endless_answer": STOPPED,
    "endless_generator": {"not plain"},
    "sleep": {"timeout"},
    "silent": {"ended"},
    "deep_recursion": {"cpu", "timeout", "ended", "raised"},
    "deep_answer": {"not plain"},
    "shared_answer": {"cpu", "timeout", "not plain", "ended"},
    "huge_integer": STOPPED,
    "huge_answer": {"not plain", *STOPPED},
    "hash_flood": {"failed", "unchecked", "timeout"},
    "always_equal": {"not plain"},
    "always_equal_number": WRONG,
    "pickled": {"not plain"},
    "close_descriptors": {"ended"},
    "forge_answers": {"not plain", "ended"},
    "forge_flood": {"not plain"},
    "forge_garbage": {"not plain"},
    "patch_builtins": {"ended", "failed", "not plain", "raised", "unloadable"},
    "x32_calls": {"ended", "failed"},  # failed: on a machine that has no such calls
    "old_calls": {"ended", "failed"},
}


@dataclass(frozen=True)
class Attack:
    outcomes: dict[str, Outcome]
    seconds: float
    canary: Path
    server: socket.socket


def hostile_source(name: str, canary: Path, port: int) -> str:
    source = (HOSTILE / f"{name}.txt").read_text(encoding="utf-8")
    words = {
        "CANARY": canary,
        "PORT": port,
        "PID": os.getpid(),
        "PACKAGES": sysconfig.get_path("purelib"),
        "ROOT": Path(__file__).parents[2],
        "ALLOWED": allowed_numbers(platform.machine()),
    }
    for word, value in words.items():
        source = source.replace(f"@{word}@", str(value))
    return source


def allowed_numbers(machine: str) -> list[int]:
    column = tuple(seccomp.MACHINES).index(machine)
    listed = [*seccomp.ALLOWED.values(), *(numbers for numbers, _, _ in seccomp.ALLOWED_WITH.values())]
    return sorted(number for both in listed if (number := both[column]) is not None)


def names() -> list[str]:
    return sorted(path.stem for path in HOSTILE.glob("*.txt"))


def attack(folder: Path, chosen: list[str], isolation: Isolation) -> Attack:
    canary = folder / "canary.jsonl"
    canary.write_text("alive")
    server = socket.create_server(("127.0.0.1", 0))
    server.setblocking(False)
    programs = [
        Program(hostile_source(name, canary, server.getsockname()[1]), "solve", SQUARES) for name in chosen
    ]
    os.environ["SANDBOX_SECRET"] = "hunter2"
    began = time.monotonic()
    found = dict(run_programs(programs, isolation=isolation, limits=SHORT, workers=2))
    del os.environ["SANDBOX_SECRET"]
    outcomes = {chosen[place]: outcome for place, outcome in found.items()}
    return Attack(outcomes, time.monotonic() - began, canary, server)


def memory_groups() -> set[str]:
    """Find the control groups of sandboxes."""
    with suppress(OSError):
        parent, _ = cgroup.find_parent(
            *(Path(f"/proc/self/{name}").read_text() for name in ("cgroup", "mountinfo"))
        )
        return {path.name for path in Path(parent).glob(f"{cgroup.PREFIX}*")}
    return set()


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Attack]:
    if not set(LAYERS) <= set(probe().layers):
        pytest.skip(f"the machine lacks walls: {probe()}")
    done = attack(tmp_path_factory.mktemp("attacked"), names(), probe())
    yield done
    done.server.close()


def inside() -> set[int]:
    """Find the processes of sandboxes that this process has started, and their children."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if b"sandbox.inside" in (folder / "cmdline").read_bytes():
                found.add(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", names())
def test_a_hostile_program_does_not_pass(attacked: Attack, name: str) -> None:
    outcome = attacked.outcomes[name]
    assert outcome.reason in EXPECTED.get(name, WRONG), outcome


@pytest.mark.slow
def test_hostile_programs_do_no_harm_and_leave_nothing(attacked: Attack) -> None:
    assert attacked.canary.read_text() == "alive"
    assert list(attacked.canary.parent.iterdir()) == [attacked.canary]
    with pytest.raises(BlockingIOError):
        attacked.server.accept()
    assert not any(Path(place, "breach").exists() for place in ("/tmp", "/", "/etc", "/root", "/dev/shm"))
    assert not inside()
    assert not memory_groups()
    assert not list(Path(run.tempfile.gettempdir()).glob("cdm-sandbox-*"))
    assert attacked.seconds < 60


def test_each_hostile_program_is_explained() -> None:
    assert len(names()) >= 25
    assert set(re.findall(r"^\| `(\w+)` \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)) == set(names())


SAME = "def solve(x):\n    return x\n"
TRIED = "try:\n    candidate(1)\nexcept:\n    pass\n"


def solved(source: str, test: str, **named: object) -> Outcome:
    program = Program(source, "solve", test, str(named.pop("helpers", "")))
    return run_program(program, isolation=probe(), limits=Limits(**named))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("answer", "test"),
    [
        ("x * x", "assert candidate(4) == 16 == solve(4)"),
        ("[(x, None), {'a': {1}}, b'x', 1j, True]", "assert candidate(1) == [(1, None), {'a': {1}}, b'x', 1j, True]"),
        ("(frozenset([x]), {(x,): 'é\\ud800'})", "assert candidate(1) == (frozenset([1]), {(1,): 'é\\ud800'})"),
        ("3 ** 9999 * x", "assert candidate(-1) == -3 ** 9999"),
        ("float('nan')", "found = candidate(0)\nassert found != found"),
        ("float('-inf')", "assert candidate(0) == -float('inf')"),
        ("__import__('collections').Counter(x)", "assert candidate('aab') == {'a': 2, 'b': 1}"),
        ("__import__('collections').namedtuple('P', 'a')(x)", "assert candidate(1) == (1,)"),
        ("1 // x", "try:\n    candidate(0)\n    assert False\nexcept ZeroDivisionError:\n    pass"),
        ("{}[x]", "try:\n    candidate(0)\n    assert False\nexcept KeyError:\n    pass"),
        ("helper(x)", "assert candidate(2) == 3 and helper(2) == 4"),
    ],
)  # fmt: skip
def test_an_honest_program_passes(answer: str, test: str) -> None:
    source = f"def helper(x):\n    return x + 1\n\ndef solve(x):\n    return {answer}\n"
    outcome = solved(source, test, helpers="def helper(x):\n    return x + 2\n")
    assert outcome.reason == "passed", outcome


@pytest.mark.parametrize(
    ("source", "test", "reason", "detail"),
    [
        (SAME, "assert candidate(1) == 2", "failed", "AssertionError at assert candidate(1) == 2"),
        (SAME, "assert candidate(1) == 2, 'told'", "failed", "AssertionError: told at assert"),
        ("def solve(x):\n    return [].y", "candidate(1)", "raised", "'list' object has no attribute 'y'"),
        ("def solve(x:", "candidate(1)", "unloadable", "SyntaxError"),
        ("def other(x): pass", "candidate(1)", "unloadable", "it defines no solve"),
        ("raise KeyError('solve')", "candidate(1)", "unloadable", "KeyError: 'solve'"),
        (SAME, "1", "unchecked", "the test never called it"),
        (SAME, "candidate(len)", "unchecked", "builtin_function_or_method is no plain value"),
        (SAME, "nobody(1)", "unchecked", "NameError"),
        ("def solve(x):\n    raise SystemExit", TRIED, "raised", "SystemExit"),
        ("def solve(x):\n    import os\n    os._exit(0)", TRIED, "ended", "exit status 0"),
    ],
)  # fmt: skip
def test_the_reason_of_a_failure_is_said(source: str, test: str, reason: str, detail: str) -> None:
    outcome = solved(source, test)
    assert (outcome.reason, outcome.passed) == (reason, False)
    assert detail in outcome.detail


def test_what_a_program_finds_around_it() -> None:
    if not set(LAYERS) <= set(probe().layers):
        pytest.skip(f"the machine lacks walls: {probe()}")
    source = """
import ctypes, os, resource, sys
from dataclasses import dataclass

@dataclass
class Facts:
    value: int

def solve(x):
    libc = ctypes.CDLL(None)
    seen = [place for place in "/proc /dev /sys /etc /tmp /bin /usr/bin /home".split() if os.path.exists(place)]
    return {
        "pid": (os.getpid(), os.getppid()), "uid": os.getuid(), "gid": os.getgid(), "groups": os.getgroups(),
        "no new privileges": libc.prctl(39, 0, 0, 0, 0), "dumpable": libc.prctl(3, 0, 0, 0, 0),
        "filter": libc.prctl(21, 0, 0, 0, 0), "environment": sorted(os.environ), "cwd": os.getcwd(),
        "seen": seen, "scratch": os.listdir("."),
        "library": os.listdir(os.path.dirname(os.__file__) + "/site-packages")
        if os.path.isdir(os.path.dirname(os.__file__) + "/site-packages") else [],
        "descriptors": [n for n in range(100) if fstat(n)], "memory": resource.getrlimit(resource.RLIMIT_AS)[1],
    }

def fstat(n):
    try:
        return os.fstat(n)
    except OSError:
        return None
"""
    test = """
wanted = {
    "pid": (1, 0), "uid": 65534, "gid": 65534, "groups": [], "no new privileges": 1, "dumpable": 0, "filter": 2,
    "environment": ["HOME", "TMPDIR"], "cwd": "/scratch", "seen": [], "scratch": [], "library": [],
    "descriptors": [0, 1, 2, 3, 4], "memory": 512 * 2**20,
}
found = candidate(0)
wrong = {key: value for key, value in found.items() if value != wanted[key]}
assert not wrong, wrong
"""
    if os.geteuid() != 0:  # groups of a user stay, but nothing that they open is in sight
        test = test.replace('"groups": [], ', "").replace(
            "for key, value in found", "for key, value in known"
        )
        test = test.replace("wrong =", "known = {key: found[key] for key in wanted}\nwrong =")
    outcome = solved(source, test)
    assert outcome.passed, outcome


def test_the_standard_library_is_there() -> None:
    modules = (
        *(
            "re",
            "json",
            "math",
            "random",
            "hashlib",
            "zlib",
            "bz2",
            "lzma",
            "decimal",
            "fractions",
            "statistics",
        ),
        *(
            "itertools",
            "heapq",
            "bisect",
            "string",
            "datetime",
            "collections",
            "typing",
            "functools",
            "operator",
        ),
        *(
            "copy",
            "tempfile",
            "struct",
            "array",
            "queue",
            "threading",
            "csv",
            "textwrap",
            "unicodedata",
            "enum",
        ),
    )
    source = f"""
import hashlib, zlib, bz2, importlib, tempfile, threading
def solve(x):
    for name in {modules}:
        importlib.import_module(name)
    done = []
    threads = [threading.Thread(target=done.append, args=(n,)) for n in range(4)]
    [thread.start() for thread in threads], [thread.join() for thread in threads]
    with tempfile.TemporaryFile() as file:
        file.write(zlib.compress(bz2.compress(b"x")))
    return [hashlib.md5(b"Hello world").hexdigest(), sorted(done)]
"""
    outcome = solved(source, "assert candidate(0) == ['3e25960a79dbc69b674cd4ec67a72c62', [0, 1, 2, 3]]")
    assert outcome.passed, outcome


def test_modules_that_are_preloaded_can_be_imported() -> None:
    program = Program(
        "import numpy\ndef solve(x):\n    return float(numpy.sum([x, 1]))",
        "solve",
        "import numpy\nassert candidate(2) == numpy.float64(3)",
    )
    assert not run_program(program, isolation=probe()).passed
    outcome = run_program(program, isolation=probe(), preload=["numpy"], limits=Limits(memory_mib=2048))
    assert outcome.passed, outcome
    with pytest.raises(IsolationMissing, match="cannot import no_such_module"):
        list(run_programs([program], isolation=probe(), preload=["no_such_module"]))


def test_outcomes_do_not_depend_on_how_many_run_at_once() -> None:
    programs = [
        Program(
            f"def solve(x):\n    return {'x' if n % 3 else 'y'} + {n}", "solve", "assert candidate(1) != 5"
        )
        for n in range(9)
    ]
    found = [
        [outcome.reason for _, outcome in sorted(run_programs(programs, isolation=probe(), workers=workers))]
        for workers in (1, 3)
    ]
    assert found[0] == found[1]
    assert found[0] == [
        "raised",
        "passed",
        "passed",
        "raised",
        "failed",
        "passed",
        "raised",
        "passed",
        "passed",
    ]


def test_nothing_outlives_whoever_asked() -> None:
    script = """
from cdm_toolkit.evaluation.sandbox import isolation, records
from cdm_toolkit.evaluation.sandbox import execute as run
program = records.Program("def solve(x):\\n    import time\\n    time.sleep(600)", "solve", "candidate(1)")
probe = isolation.probe()
print("ready", flush=True)
run.run_program(program, isolation=probe, limits=records.Limits(wall_seconds=600))
"""
    asker = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE)
    assert asker.stdout is not None
    assert asker.stdout.readline() == b"ready\n"
    deadline = time.monotonic() + 30
    while len(inside()) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(inside()) == 4  # a process that waits and one that works, for the program and for its test
    asker.send_signal(signal.SIGKILL)
    asker.wait()
    asker.stdout.close()
    while inside() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not inside()
    assert not memory_groups()


@pytest.mark.slow
def test_the_memory_of_all_processes_together_is_limited(tmp_path: Path) -> None:
    layers = tuple(layer for layer in probe().layers if layer != "seccomp")  # which forbids other processes
    if CGROUP not in layers:
        pytest.skip(f"the machine gives no control groups: {probe()}")
    program = Program(hostile_source("memory_tree", tmp_path, 0), "solve", SQUARES)
    limits = Limits(memory_mib=256)
    apart = Isolation(tuple(layer for layer in layers if layer != CGROUP))
    assert run_program(program, isolation=apart, limits=limits).passed
    assert run_program(program, isolation=Isolation(layers), limits=limits).reason in {"failed", "ended"}
    assert not inside()
    assert not memory_groups()


def test_a_program_that_its_group_ends_is_told_so() -> None:
    if CGROUP not in probe().layers:
        pytest.skip(f"the machine gives no control groups: {probe()}")
    layers = tuple(layer for layer in probe().layers if layer != "seccomp")
    source = """
import os, time
def solve(x):
    for _ in range(4):
        if os.fork() == 0:
            taken = bytearray(b"x") * 30_000_000
            time.sleep(60)
    taken = bytearray(b"x") * 110_000_000  # the largest process is the one to be killed
    os.wait()
"""
    outcome = run_program(
        Program(source, "solve", SQUARES),
        isolation=Isolation(layers),
        limits=Limits(memory_mib=192, scratch_mib=1),
    )
    assert (outcome.reason, outcome.detail) == ("ended", "its processes took more than 193 MiB together")


V1 = "9:name=systemd:/\n4:cpu,memory:/{}\n0::/\n"
V1_MOUNTED = "30 23 0:26 {} {}/memory rw,relatime shared:9 - cgroup cgroup rw,cpu,memory\n"
V2_MOUNTED = "35 24 0:30 {} {} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"


def test_the_group_of_the_caller_is_found(tmp_path: Path) -> None:
    mounted = V2_MOUNTED.format("/", f"{tmp_path}/unified") + V1_MOUNTED.format("/", tmp_path)
    assert cgroup.find_parent(V1.format("a/b"), mounted) == (f"{tmp_path}/memory/a/b", 1)
    assert cgroup.find_parent(V1.format(""), mounted) == (f"{tmp_path}/memory", 1)
    container = V1_MOUNTED.format("/docker/1f", tmp_path)
    assert cgroup.find_parent(V1.format("docker/1f"), container) == (f"{tmp_path}/memory", 1)
    assert cgroup.find_parent(V1.format("docker/1f/x"), container) == (f"{tmp_path}/memory/x", 1)
    for path in ("docker/2", "docker/1ff", "docker/1f/../../x"):
        with pytest.raises(OSError, match="its control group is not mounted"):
            cgroup.find_parent(V1.format(path), container)
    for groups, mounts in (("0::/a\n", container), (V1.format(""), V2_MOUNTED), ("0::/a\n", "")):
        with pytest.raises(OSError, match="no cgroups are mounted"):
            cgroup.find_parent(groups, mounts)


def test_the_nearest_group_that_controls_memory_is_found(tmp_path: Path) -> None:
    scope = tmp_path / "user.slice" / "app.slice" / "run.scope"
    scope.mkdir(parents=True)
    mounted = V2_MOUNTED.format("/", tmp_path)
    controls = {folder: folder / "cgroup.subtree_control" for folder in (scope, *scope.parents[:3])}
    for file in controls.values():
        file.write_text("cpu pids\n")
    path = f"0::/{scope.relative_to(tmp_path)}\n"
    with pytest.raises(OSError, match=f"no control group from {scope} up to {tmp_path} controls the memory"):
        cgroup.find_parent(path, mounted)
    for folder in (tmp_path, scope.parent, scope):  # from the top down: the nearer one is taken
        controls[folder].write_text("cpu memory pids\n")
        assert cgroup.find_parent(path, mounted) == (str(folder), 2)


def readable_python() -> str | None:
    """Find an interpreter whose library is open to nobody, who cannot do without where nothing is mounted."""
    if os.geteuid() != 0:
        return sys.executable
    ask = (
        "import os; os.setuid(65534); os.listdir(os.path.dirname(os.__file__)); import tomllib"  # new in 3.11
    )
    for name in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        if shutil.which(name) and subprocess.run([name, "-c", ask], capture_output=True).returncode == 0:
            return name
    return None


@pytest.mark.parametrize("layers", [("landlock", "seccomp"), LAYERS[:6]], ids=["filters", "namespaces"])
def test_half_of_the_walls_hold_most_programs(
    layers: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = readable_python()
    if python is None or not set(layers) <= set(probe().layers):
        pytest.skip(f"the machine lacks what is left: {probe()}, {python}")
    monkeypatch.setattr(run.sys, "executable", python)
    chosen = ["exit_zero", "read_file", "write_outside", "delete_files", "connect_loopback", "connect_out",
              "read_environment", "signal_parent", "trace_parent", "large_file", "fork_bomb", "always_equal",
              "zombies", "silent"]  # fmt: skip
    done = attack(tmp_path, chosen, Isolation(layers))
    done.server.close()
    assert not [name for name, outcome in done.outcomes.items() if outcome.passed]
    assert done.canary.read_text() == "alive"
    assert not inside()
    assert not list(Path(run.tempfile.gettempdir()).glob("cdm-sandbox-*"))


def test_what_a_machine_lacks_is_found_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_trial(program: Program, *, isolation: Isolation) -> Outcome:
        if "user" in isolation.layers or "mount" in isolation.layers:
            raise SetupError("unshare: Operation not permitted")
        if "landlock" in isolation.layers:
            raise SetupError("landlock_create_ruleset: Function not implemented")
        if CGROUP in isolation.layers:
            raise SetupError("/sys/fs/cgroup: Read-only file system")
        return Outcome("passed", "", 0.0)

    monkeypatch.setattr(isolation_module, "run_program", run_trial)
    found = isolation_module.probe.__wrapped__()
    assert found.layers == ("seccomp",)
    missing = dict(found.missing)
    assert missing["network"] == "unshare: Operation not permitted"
    assert set(missing) == {*LAYERS, CGROUP} - {"seccomp"}
    assert str(found).startswith("seccomp, no new privileges, resource limits; without user (unshare: ")
    with pytest.raises(
        IsolationMissing, match="lacks user, mount, pid, network, ipc, uts, landlock on this machine"
    ):
        require(found)
    assert str(found).endswith("; cgroup (/sys/fs/cgroup: Read-only file system)")
    require(Isolation(LAYERS))
    require(Isolation(LAYERS, ((CGROUP, "no cgroups are mounted"),)))
    monkeypatch.setattr(isolation_module.sys, "platform", "darwin")
    with pytest.raises(IsolationMissing, match="lacks everything on this machine, it is darwin"):
        isolation_module.probe.__wrapped__()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
    | st.complex_numbers(allow_nan=False),
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(st.text() | st.integers(), inner)
    | st.sets(st.integers()) | st.frozensets(st.text()),
    max_leaves=20,
)  # fmt: skip


@given(VALUES)
def test_plain_values_come_back_as_they_were(value: object) -> None:
    line = plain.encode(value)
    assert line.isascii()
    assert "\n" not in line
    assert repr(plain.decode(line)) == repr(value) or plain.decode(line) == value


@pytest.mark.parametrize(
    "text",
    ["", "{}", '{"a": 1}', "1.5", "NaN", "[]", "[1]", '["object"]', '["set", ["list"]]', '["int", "7", "8"]', '["int"]',
     '["dict", [1]]', '["dict", 1]', '["float", "x"]', '["float", "0x1p99999"]', '["bytes", "0"]', "[" * 100_000,
     '["list", ' * 200 + "1" + "]" * 200, "1" * 10_000, '["complex", "0x1p0"]', b"\xff"],
)  # fmt: skip
def test_what_encodes_no_plain_value_is_refused(text: str | bytes) -> None:
    with pytest.raises(plain.NotPlainError):
        plain.decode(text)


def test_decoding_gives_exactly_the_plain_types() -> None:
    class Odd(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    found = plain.decode(plain.encode([Odd(3), True]))
    assert [type(value) for value in found] == [int, bool]
    assert found != [4, True]
    with pytest.raises(plain.NotPlainError, match="object is no plain value"):
        plain.encode([object()])


@pytest.mark.parametrize(
    ("machine", "header"),
    [
        ("x86_64", "/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
        ("aarch64", "/usr/include/asm-generic/unistd.h"),
    ],
)
def test_the_numbers_of_system_calls_are_the_kernels(machine: str, header: str) -> None:
    if not Path(header).is_file():
        pytest.skip(f"no {header}")
    text = Path(header).read_text().replace("__NR3264_fstatat", "__NR_newfstatat")
    found = {name: int(n) for name, n in re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", text)}
    column = tuple(seccomp.MACHINES).index(machine)
    calls = {**seccomp.ALLOWED, **{name: numbers for name, (numbers, _, _) in seccomp.ALLOWED_WITH.items()}}
    numbers = {
        name: both[column] for name, both in calls.items() if (both[column] or 0) <= max(found.values())
    }
    assert numbers == {name: found.get(name) for name in numbers}


def test_the_filter_has_no_jump_out_of_it() -> None:
    for machine in seccomp.MACHINES:
        steps = list(seccomp.steps(machine))
        assert steps[-1][0] == seccomp.RETURN
        assert all(place + max(step[1], step[2]) + 1 < len(steps) for place, step in enumerate(steps[:-1]))


def ruling(machine: str, number: int, *arguments: int, architecture: int | None = None) -> int:
    """Run the filter, as the kernel does, on a system call."""
    given = seccomp.MACHINES[machine] if architecture is None else architecture
    data = struct.pack("<IIQ6Q", number, given, 0, *arguments, *[0] * (6 - len(arguments)))
    tests = {seccomp.JUMP_IF_EQUAL: operator.eq, seccomp.JUMP_IF_AT_LEAST: operator.ge}
    steps, place, loaded = list(seccomp.steps(machine)), 0, 0
    while steps[place][0] != seccomp.RETURN:
        code, if_true, if_false, operand = steps[place]
        if code == seccomp.LOAD:
            (loaded,) = struct.unpack_from("<I", data, operand)
        else:
            place += if_true if tests[code](loaded, operand) else if_false
        place += 1
    return steps[place][3]


EPERM, ENOSYS = seccomp.ERRNO | errno.EPERM, seccomp.ERRNO | errno.ENOSYS


@pytest.mark.parametrize("machine", seccomp.MACHINES)
def test_the_filter_allows_the_list_and_nothing_else(machine: str) -> None:
    column = tuple(seccomp.MACHINES).index(machine)
    plain_calls = {numbers[column] for numbers in seccomp.ALLOWED.values()} - {None}
    with_arguments = {
        numbers[column]: (index, values) for numbers, index, values in seccomp.ALLOWED_WITH.values()
    }
    for number in (*range(1024), seccomp.X32_BIT - 1):
        refusal = ENOSYS if number >= 424 else EPERM
        index, values = with_arguments.get(number, (0, ()))
        for argument in (1 << 20, 99, 2**32 - 1, *values):
            allowed = number in plain_calls or argument in values
            refused = EPERM if number in with_arguments else refusal
            arguments = [0xDEAD] * index + [argument]
            assert ruling(machine, number, *arguments) == (seccomp.ALLOW if allowed else refused), number
    other = next(code for name, code in seccomp.MACHINES.items() if name != machine)
    assert ruling(machine, 0, architecture=other) == seccomp.KILL
    assert ruling(machine, 0, architecture=0x40000003) == seccomp.KILL  # 32-bit x86
    assert ruling(machine, seccomp.X32_BIT) == (seccomp.KILL if machine == "x86_64" else ENOSYS)


@pytest.mark.parametrize("machine", seccomp.MACHINES)
def test_threads_are_allowed_and_processes_are_not(machine: str) -> None:
    clone, fork_flags, vfork_flags, thread = (
        {"x86_64": 56, "aarch64": 220}[machine],
        0x1200011,
        0x4111,
        0x3D0F00,
    )
    assert ruling(machine, clone, thread) == seccomp.ALLOW
    for flags in (0, 17, fork_flags, vfork_flags, thread | 0x10000000, thread & ~0x10000):
        assert ruling(machine, clone, flags) == EPERM
    assert ruling(machine, 435, thread) == ENOSYS  # clone3: the C library falls back to clone
