"""What all cells of a study share: training rows, the initial student, the teacher's cache, both models' scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cdm_toolkit.artifacts.manifest import Format, validated, write_json
from cdm_toolkit.artifacts.provenance import provenance
from cdm_toolkit.artifacts.teacher_cache import read_header
from cdm_toolkit.compare.continuations import continue_rows, measure
from cdm_toolkit.compare.corpora import text_rows
from cdm_toolkit.compare.measure import Heldout, score_model
from cdm_toolkit.compare.study import StudyConfig, SuiteConfig, TextConfig, heldout_name
from cdm_toolkit.compare.study_folder import SHARED_FILE, Say, StudyFolder, only_one
from cdm_toolkit.compare.types import RINGS, Measured, ModelScores
from cdm_toolkit.distill.jsonl import write_rows
from cdm_toolkit.distill.settings import from_mapping
from cdm_toolkit.distill.sources import read_rows
from cdm_toolkit.distill.write_teacher_cache import CacheSettings, write_cache
from cdm_toolkit.errors import BadArtifact, BadOption, FileProblem
from cdm_toolkit.evaluation.evaluate import Ask, evaluate, load_subject, open_suite
from cdm_toolkit.hub.models import model_fingerprint, model_folder
from cdm_toolkit.hub.omp import Donor
from cdm_toolkit.hub.students import new_student, transplant
from cdm_toolkit.hub.tokenizers import load_tokenizer
from cdm_toolkit.kd.rows import Row, rows_fingerprint
from cdm_toolkit.kd.settings import DEFAULT_TOP_K
from cdm_toolkit.kd.tokenized_rows import TokenizerSide, tokenize_rows, tokenizer_side

TRAIN_FILE, CACHE_FOLDER, STUDENT_FOLDER, TEACHER_FOLDER, HELDOUT_FOLDER = (
    "train.jsonl",
    "teacher-cache",
    "student",
    "teacher",
    "heldout",
)
TRAINING_ROWS, CODE = "training rows", "sources"
"""Names of fingerprints: of the rows that cells have in common, and of the code that trained one."""
FITTED_AT_ONCE = 64
"""Rows that are tokenized together to see whether they are short enough."""
_MADE_HERE = "shared:"
"""Prefix of the name of a file that was made in the folder `shared`, so that it is found wherever that is copied to."""
_AGAIN = "start the study anew with `overwrite`"
FORMAT = Format("cdm-toolkit prepared study", 2, _AGAIN, older=(1,), unmarked=1)

OnStage = Callable[[str, int, int], None]
"""Called with what is prepared, how much of it is done, and how much there is."""


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """What is in a study's folder before its first cell runs."""

    student: str
    train: Path
    cache: str | None
    """Folder of the teacher's log-prob cache for the training rows; None where no method reads it."""
    heldout: Heldout
    teacher: ModelScores
    start: ModelScores
    counts: Mapping[str, int]
    """Rows to train on, by kind."""
    passed_over: int
    """Rows that were skipped as too long before enough rows were found."""
    provenance: Mapping[str, Any]
    teacher_model: str | None = None
    """The teacher that was trained on the rows; None where the study's own teaches as it is."""

    @property
    def fingerprints(self) -> Mapping[str, str]:
        found: Mapping[str, str] = self.provenance.get("fingerprints", {})
        return found


def prepare(
    study: StudyConfig,
    folder: StudyFolder,
    *,
    say: Say = lambda _: None,
    on_stage: OnStage = lambda _stage, _done, _total: None,
) -> Shared:
    """Make what the cells share, or open it. One process makes it, others wait; one that was stopped goes on.

    Raises the errors of data, models, tokenizers and suites, and BadArtifact where what was made has changed.
    """
    _ = study.run.torch_device  # a device that is not here is told before anything is read
    if shared := _ready(study, folder):
        return shared
    file = folder.shared / SHARED_FILE
    with only_one(folder.shared, "prepares this study", say):
        folder.check_file(study)  # until now another one could take a folder in which nothing was made
        if not _ready(study, folder):
            if file.is_file():
                content = FORMAT.read(file) | {"cache": _cache(study, folder.shared, on_stage)}
            else:
                content = _make(study, folder.shared, on_stage)
            write_json(file, content)
    return open_shared(folder)


def _ready(study: StudyConfig, folder: StudyFolder) -> Shared | None:
    """Open what the cells share; None before it is made, and where added methods need a larger cache.

    The old one stays for cells that are running.
    """
    if not (folder.shared / SHARED_FILE).is_file():
        return None
    shared, wanted = open_shared(folder), _wanted_k(study)
    enough = wanted is None or (shared.cache is not None and read_header(Path(shared.cache)).k >= wanted)
    return shared if enough else None


def open_shared(folder: StudyFolder) -> Shared:
    """Open what `prepare` has made. Raises FileProblem where there is nothing, BadArtifact where it has changed."""
    file, train = folder.shared / SHARED_FILE, folder.shared / TRAIN_FILE
    if not file.is_file():
        fix = "run the study, or one of its cells"
        raise FileProblem(folder.path, "its study has not been prepared", fix)
    content = {name: _found(folder.shared, value) for name, value in FORMAT.read(file).items()}
    content |= {"train": train, "heldout": Heldout.open(folder.shared / HELDOUT_FOLDER)}
    found = validated(Shared, file, content, _AGAIN)
    if rows_fingerprint(read_rows(train)) != found.fingerprints.get(TRAINING_ROWS):
        raise BadArtifact(train, "these are not the rows that were written", _AGAIN)
    return found


def _kept(shared: Path, path: str) -> str:
    return f"{_MADE_HERE}{Path(path).name}" if Path(path).parent == shared else path


def _found(shared: Path, kept: Any) -> Any:
    made_here = isinstance(kept, str) and kept.startswith(_MADE_HERE)
    return str(shared / kept.removeprefix(_MADE_HERE)) if made_here else kept


def check_origin(study: StudyConfig, shared: Shared) -> None:
    """See that models and suites are those that the study began with. Raises BadArtifact."""
    now = _made_of(study, shared.teacher_model or study.teacher, shared.student)
    if changed := [name for name, value in now.items() if shared.fingerprints.get(name) != value]:
        problem = f"the {' and '.join(changed)} changed since the study began"
        raise BadArtifact(shared.train.parent, problem, f"put back what was there, or {_AGAIN}")


def _make(study: StudyConfig, shared: Path, on_stage: OnStage) -> dict[str, Any]:
    """Prepare step by step, cheap checks first; what an earlier process finished is taken as it is."""
    for name, suite in study.suites.items():
        open_suite(name, _ask(suite))
    read_by_kind, heldout_rows = read_texts(study)
    student = _student(study, shared / STUDENT_FOLDER, on_stage)
    chosen, passed_over = _chosen(study, student, read_by_kind)
    train = [row for rows in chosen.values() for row in rows]
    _check_held_out(study, train, heldout_rows)
    write_rows(shared / TRAIN_FILE, train)
    study = study.model_copy(update={"teacher": _teacher(study, shared, on_stage)})
    cache = _cache(study, shared, on_stage)
    heldout = Heldout.make(
        shared / HELDOUT_FOLDER,
        heldout_rows,
        study.teacher,
        divergence="divergence" in study.measures,
        device=study.run.torch_device,
        on_row=lambda done, total: on_stage("measuring the teacher", done, total),
    )
    teacher = score(study, study.teacher, heldout, None)
    start = score(
        study, student, heldout, teacher, lambda done, total: on_stage("measuring the student", done, total)
    )
    rows = {
        TRAINING_ROWS: read_rows(shared / TRAIN_FILE),
        "held-out rows": [row for of_kind in heldout.rows.values() for row in of_kind],
    }
    made_of = _made_of(study, study.teacher, student) | {
        what: rows_fingerprint(of) for what, of in rows.items()
    }
    return FORMAT.header(
        provenance(fingerprints=made_of, device=study.run.torch_device),
        student=_kept(shared, student),
        teacher_model=None if study.teacher_run is None else _kept(shared, study.teacher),
        cache=cache,
        teacher=asdict(teacher),
        start=asdict(start),
        counts={kind: len(rows) for kind, rows in chosen.items()},
        passed_over=passed_over,
    )


def _made_of(study: StudyConfig, teacher: str, student: str) -> dict[str, str]:
    """Fingerprint what a study reads from outside its folder."""
    found = {
        "teacher": model_fingerprint(model_folder(teacher)),
        "teacher tokenizer": load_tokenizer(teacher).view.fingerprint,
        "student": model_fingerprint(model_folder(student)),
        "student tokenizer": load_tokenizer(student).view.fingerprint,
    }
    for name, suite in study.suites.items():
        found[f"data of {name}"] = open_suite(name, _ask(suite)).contents.fingerprint
    return found


# Rows


def read_texts(study: StudyConfig) -> tuple[dict[str, list[Row]], dict[str, list[Row]]]:
    """Read all rows of the kinds to train on, and the held-out rows of each kind.

    Raises FileProblem, BadRow, and BadOption for more rows than there are.
    """
    _check_files(study)
    train = {kind: _rows_of(f"train.{kind}", text) for kind, text in study.train.items()}
    heldout = {
        heldout_name(setting, kind): _rows_of(f"{setting}.{kind}", text)[: text.rows]
        for setting, texts in study.heldout.items()
        for kind, text in texts.items()
    }
    return train, heldout


def _check_files(study: StudyConfig) -> None:
    """Say of all files that are not there which settings give their paths."""
    sections = (("train", study.train), *study.heldout.items())
    every = {f"{name}.{kind}": text.path for name, texts in sections for kind, text in texts.items()}
    missing = {name: path for name, path in every.items() if ":" not in path and not Path(path).is_file()}
    if missing:
        paths = ", ".join(dict.fromkeys(missing.values()))
        fix = "give the paths: " + ", ".join(f"`{name}.path`" for name in missing)
        raise FileProblem(paths, f"no such file, which {' and '.join(missing)} name", fix)


def _rows_of(name: str, text: TextConfig) -> list[Row]:
    """Read all rows of a kind but those to skip."""
    rows = text_rows(text.path, split=text.split)[text.skip :]
    if not rows:
        raise BadOption(f"{name}.skip", text.skip, f"less: {text.path} has no more rows")
    if text.rows is not None and text.rows > len(rows):
        raise BadOption(f"{name}.rows", text.rows, f"at most {len(rows)}: {text.path} has no more")
    return rows


def _chosen(
    study: StudyConfig, student: str, read_by_kind: Mapping[str, Sequence[Row]]
) -> tuple[dict[str, list[Row]], int]:
    """Take the first rows of each kind that no model would have to cut; also returns how many were skipped."""
    sides = [_side(name) for name in (study.teacher, student)]
    chosen: dict[str, list[Row]] = {}
    passed_over = 0
    for kind, rows in read_by_kind.items():
        wanted = study.train[kind].rows or len(rows)
        found: list[Row] = []
        too_long = 0
        for row, is_fit in _fitted(rows, sides, study.max_length):
            found += [row] if is_fit else []
            too_long += not is_fit
            if len(found) == wanted:
                break
        if not found or (study.train[kind].rows and len(found) < wanted):
            allowed = (
                f"at most {len(found)}, or a longer max_length: {too_long} of its {len(rows)} rows have no completion, "
                f"or more than {study.max_length} tokens on a side"
            )
            raise BadOption(f"train.{kind}.rows", wanted, allowed)
        chosen[kind] = found
        passed_over += too_long
    return chosen, passed_over


def _fitted(
    rows: Sequence[Row], sides: Sequence[TokenizerSide], max_length: int
) -> Iterator[tuple[Row, bool]]:
    """Yield each row, with whether it has labels and fits uncut into `max_length` on all sides."""
    for at in range(0, len(rows), FITTED_AT_ONCE):
        some = rows[at : at + FITTED_AT_ONCE]
        for row, *tokenized in zip(some, *(tokenize_rows(side, some, "none") for side in sides), strict=True):
            fits = (each.label_from < len(each.ids) <= max_length for each in tokenized)
            yield row, bool(row.completion) and all(fits)


def _side(name: str) -> TokenizerSide:
    loaded = load_tokenizer(name)
    return tokenizer_side(loaded.tokenizer, loaded.view)


def _check_held_out(study: StudyConfig, train: Iterable[Row], heldout: Mapping[str, Sequence[Row]]) -> None:
    """See that no held-out row is trained on, and that alpha is not chosen on what is reported."""
    for kind, rows in heldout.items():
        trained_on = "are trained on; split: heldout has other files"
        _check_other(f"the held-out text {kind}", rows, train, trained_on)
    reported = [row for texts in study.rings.values() for kind in texts for row in heldout[kind]]
    for kind in study.select_alpha_on:
        rows = heldout[heldout_name("select_alpha_on", kind)]
        _check_other(f"select_alpha_on.{kind}", rows, reported, "are reported on; skip passes over these")


def _check_other(name: str, rows: Sequence[Row], others: Iterable[Row], which: str) -> None:
    seen = {row.text for row in others}
    if known := sum(row.text in seen for row in rows):
        raise BadOption(name, f"{len(rows)} rows", f"other text: {known} of its {len(rows)} rows {which}")


# Models


def _student(study: StudyConfig, folder: Path, on_stage: OnStage) -> str:
    """Make the student if the study says how, and name it."""
    student = study.student
    if student.model is not None:
        model_folder(student.model)
        return student.model
    if (folder / "config.json").is_file():
        return str(folder)
    on_stage("making the student", 0, 1)
    entries, seed = student.entries, student.seed
    if student.transplant is not None:
        transplant(
            student.transplant,
            student.tokenizer,
            folder,
            entries=entries,
            layers=student.layers,
            texts=[row.text for row in _rows_of("student.data", student.data)[: student.data.rows]],
            donor=None if student.donor is None else Donor(student.donor),
            seed=seed,
            overwrite=True,
        )
    else:
        assert student.size is not None
        assert student.tokenizer is not None
        new_student(student.tokenizer, student.size, folder, entries=entries, seed=seed, overwrite=True)
    on_stage("making the student", 1, 1)
    return str(folder)


def _teacher(study: StudyConfig, shared: Path, on_stage: OnStage) -> str:
    """Name the teacher; where the study trains it on the rows, do that first (teacher correction, arXiv 2408.11796)."""
    folder = shared / TEACHER_FOLDER
    if study.teacher_run is None:
        return study.teacher
    if not (folder / "config.json").is_file():
        from cdm_toolkit.distill.run import run

        on_stage("training the teacher", 0, 1)
        own = study.teacher_run.model_dump(exclude_unset=True)
        settings = run_settings(study, study.teacher, shared / TRAIN_FILE, folder, study.steps, own)
        run(from_mapping(settings, source="the teacher's training"), overwrite=True)
    return str(folder)


def run_settings(
    study: StudyConfig, model: str, rows: Path, output: Path, steps: int, train: Mapping[str, Any]
) -> dict[str, Any]:
    """Write down a run on the study's rows for so many steps, with settings of training that are its own."""
    return {
        "student": model,
        "data": {"path": str(rows), "max_length": study.max_length},
        "output": str(output),
        "train": {**train, "max_steps": steps, "save_every": 0, "group_by_length": False},
    }


def _cache(study: StudyConfig, shared: Path, on_stage: OnStage) -> str | None:
    """Cache the teacher's log-probs on the training rows, if a method reads them, and name the folder."""
    k = _wanted_k(study)
    if k is None:
        return None
    settings = CacheSettings(
        model=_teacher(study, shared, on_stage),
        data=str(shared / TRAIN_FILE),
        output=str(shared / f"{CACHE_FOLDER}-{k}"),
        k=k,
        dtype="float32",  # so that a method loses nothing by it that the model in memory would give
        max_length=study.max_length,
        device=study.run.torch_device,
    )
    write_cache(settings, on_progress=lambda at: on_stage("asking the teacher", at.rows, at.total))
    return _kept(shared, settings.output)


def _wanted_k(study: StudyConfig) -> int | None:
    """Find the top k that the teacher cache needs; None where no method reads a cache."""
    cached = [entry for entry in study.methods.values() if entry.uses_cache]
    asked = [entry.resolved()[0].get("top_k") or 1 for entry in cached]
    if not asked:
        return None
    return min(max(DEFAULT_TOP_K, *asked), load_tokenizer(study.teacher).view.vocab_size)


# Scores


def score(
    study: StudyConfig,
    model: str,
    heldout: Heldout,
    teacher: ModelScores | None,
    on_row: Callable[[int, int], None] = lambda _done, _total: None,
) -> ModelScores:
    """Measure a model on all held-out text and suites, and what it says beside `teacher`; None measures that itself.

    Raises the errors of all.
    """
    device = study.run.torch_device
    measured = (
        heldout.teacher if teacher is None else score_model(model, heldout, device=device, on_row=on_row)
    )
    parts: dict[str, Any] = {
        setting: {kind: measured[heldout_name(setting, kind)] for kind in texts}
        for setting, texts in study.heldout.items()
    }
    scores = ModelScores(**parts, suites=_suite_scores(study, model))
    if study.continuations is None:
        return scores
    rows = {
        kind: heldout.rows[kind][: study.continuations.rows]
        for texts in study.rings.values()
        for kind in texts
    }
    by = load_subject(study.teacher, device)
    subject = by if teacher is None else load_subject(model, device)
    said = continue_rows(subject, rows, study.continuations.new_tokens)
    found = measure(said, said if teacher is None else teacher.continuations, by)
    rings: dict[str, Any] = {
        ring: {kind: Measured.sum((of_kind, found[kind])) for kind, of_kind in scores.on(ring).items()}
        for ring in RINGS
    }
    return replace(scores, **rings, continuations=said)


def _suite_scores(study: StudyConfig, model: str) -> dict[str, dict[str, float]]:
    """Score a model on the study's eval suites: by suite, by metric."""
    return {
        name: {
            each.metric: each.value
            for result in evaluate(name, [model], ask=_ask(suite), device=study.run.torch_device).results
            for each in result.scores
        }
        for name, suite in study.suites.items()
    }


def _ask(suite: SuiteConfig) -> Ask:
    data = None if suite.data is None else Path(suite.data)
    return Ask(data=data, limit=suite.limit, allow_code_execution=suite.allow_code_execution)
