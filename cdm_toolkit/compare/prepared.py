"""What all cells of a study share: training rows, the initial student, the teacher's cache, both models' scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cdm_toolkit.artifacts.manifest import Format, write_json
from cdm_toolkit.artifacts.provenance import provenance
from cdm_toolkit.artifacts.teacher_cache import read_header
from cdm_toolkit.compare.continuations import continue_rows, measure, subject_of
from cdm_toolkit.compare.corpora import text_rows
from cdm_toolkit.compare.measure import Heldout, score_model
from cdm_toolkit.compare.study import StudyConfig, SuiteConfig, TextConfig, heldout_name
from cdm_toolkit.compare.study_folder import SHARED_FILE, Say, StudyFolder, model_scores, only_one
from cdm_toolkit.compare.tuned_teacher import TEACHER_FOLDER, tuned
from cdm_toolkit.compare.types import RINGS, Measured, ModelScores
from cdm_toolkit.distill.jsonl import write_rows
from cdm_toolkit.distill.sources import read_rows
from cdm_toolkit.distill.write_teacher_cache import CacheProgress, CacheSettings, write_cache
from cdm_toolkit.errors import BadArtifact, BadOption, FileProblem
from cdm_toolkit.evaluation.evaluate import Ask, evaluate, open_suite
from cdm_toolkit.hub.models import model_fingerprint, model_folder
from cdm_toolkit.hub.omp import Donor
from cdm_toolkit.hub.students import new_student, transplant
from cdm_toolkit.hub.tokenizers import load_tokenizer
from cdm_toolkit.kd.rows import Row, rows_fingerprint
from cdm_toolkit.kd.settings import DEFAULT_TOP_K
from cdm_toolkit.kd.tokenized_rows import TokenizerSide, tokenize_rows, tokenizer_side
from cdm_toolkit.teachers.cached import open_cache

TRAIN_FILE, CACHE_FOLDER, STUDENT_FOLDER, HELDOUT_FOLDER = (
    "train.jsonl",
    "teacher-cache",
    "student",
    "heldout",
)
TRAINING_ROWS, CODE = "training rows", "sources"
"""Names of fingerprints: of the rows that cells have in common, and of the code that trained one."""
FITTED_AT_ONCE = 64
"""Rows that are tokenized together to see whether they are short enough."""
_MADE_HERE = "shared:"
"""Prefix of the name of a file that was made in the folder `shared`."""
_AGAIN = "start the study anew with `overwrite`"
FORMAT = Format("cdm-toolkit prepared study", 2, _AGAIN, older=(1,), unmarked=1)

OnStage = Callable[[str, int, int], None]
"""Called with what is prepared, how much of it is done, and how much there is."""


@dataclass(frozen=True, slots=True, eq=False)
class Shared:
    """What is in a study's folder before its first cell runs."""

    student: str
    teacher_model: str | None
    """The teacher that was trained on the rows; None where the study's own teaches as it is."""
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
    fingerprints: Mapping[str, str]


def prepare(
    study: StudyConfig,
    folder: StudyFolder,
    *,
    say: Say = lambda _: None,
    on_stage: OnStage = lambda _stage, _done, _total: None,
) -> Shared:
    """Make what the cells share, or open it. One process makes it, others wait; one that was stopped goes on.

    Raises the errors of data, models, tokenizers, suites and caches, and BadArtifact where what was made has changed.
    """
    _ = study.run.torch_device  # a device that is not here is told before anything is read
    if shared := _ready(study, folder):
        return shared
    with only_one(folder.shared, "prepares this study", say):
        folder.check_file(study)  # until now another one could take a folder in which nothing was made
        if not (folder.shared / SHARED_FILE).is_file():
            _make(study, folder.shared, on_stage)
        elif not _ready(study, folder):
            _ask_again(study, folder.shared, on_stage)
    return open_shared(folder)


def _ready(study: StudyConfig, folder: StudyFolder) -> Shared | None:
    """Open what the cells share; None before it is made, and where added methods need a larger cache."""
    if not (folder.shared / SHARED_FILE).is_file():
        return None
    shared, wanted = open_shared(folder), _wanted_k(study)
    enough = wanted is None or (shared.cache is not None and read_header(Path(shared.cache)).k >= wanted)
    return shared if enough else None


def _ask_again(study: StudyConfig, shared: Path, on_stage: OnStage) -> None:
    """Make a larger teacher cache for added methods; the old one stays for cells that are running."""
    content = FORMAT.read(shared / SHARED_FILE)
    cache = _cache(tuned(study, shared / TRAIN_FILE, shared / TEACHER_FOLDER), shared, on_stage)
    write_json(shared / SHARED_FILE, content | {"cache": cache and _kept(shared, cache)})


def open_shared(folder: StudyFolder) -> Shared:
    """Open what `prepare` has made. Raises FileProblem where there is nothing, BadArtifact where it has changed."""
    file, train = folder.shared / SHARED_FILE, folder.shared / TRAIN_FILE
    if not file.is_file():
        raise FileProblem(
            folder.path, "its study has not been prepared", "run the study, or one of its cells"
        )
    try:
        content = FORMAT.read(file)
        found = Shared(
            student=_found(folder.shared, content["student"]),
            teacher_model=(own := content.get("teacher_model")) and _found(folder.shared, own),
            train=train,
            cache=content["cache"] and _found(folder.shared, content["cache"]),
            heldout=Heldout.open(folder.shared / HELDOUT_FOLDER),
            teacher=model_scores(content["teacher"]),
            start=model_scores(content["start"]),
            counts=content["counts"],
            passed_over=content["passed_over"],
            fingerprints=content["provenance"]["fingerprints"],
        )
        rows = found.fingerprints[TRAINING_ROWS]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadArtifact(file, f"it is damaged ({str(error) or type(error).__name__})", _AGAIN) from None
    if rows_fingerprint(read_rows(train)) != rows:
        raise BadArtifact(train, "these are not the rows that were written", _AGAIN)
    return found


def _kept(shared: Path, path: str) -> str:
    """Write a path so that what was made in the folder `shared` is found wherever that is copied to."""
    return f"{_MADE_HERE}{Path(path).name}" if Path(path).parent == shared else path


def _found(shared: Path, kept: str) -> str:
    return str(shared / kept.removeprefix(_MADE_HERE)) if kept.startswith(_MADE_HERE) else kept


def check_origin(study: StudyConfig, shared: Shared) -> None:
    """See that models, suites and a cache that is given are those that the study began with. Raises BadArtifact."""
    teacher = shared.teacher_model or study.teacher
    now = _made_of(study.model_copy(update={"teacher": teacher}), shared.student)
    if changed := [name for name, value in now.items() if shared.fingerprints.get(name) != value]:
        problem = f"the {' and '.join(changed)} changed since the study began"
        raise BadArtifact(shared.train.parent, problem, f"put back what was there, or {_AGAIN}")


def _make(study: StudyConfig, shared: Path, on_stage: OnStage) -> None:
    """Prepare step by step, cheap checks first; what an earlier process finished is taken as it is."""
    for name, suite in study.suites.items():
        open_suite(name, _ask(suite))
    read_by_kind, heldout_rows = read_texts(study)
    student = _student(study, shared / STUDENT_FOLDER, on_stage)
    chosen, passed_over = _chosen(study, student, read_by_kind)
    train = [row for rows in chosen.values() for row in rows]
    _check_held_out(train, heldout_rows)
    _check_selection(study, heldout_rows)
    write_rows(shared / TRAIN_FILE, train)
    if study.teacher_run is not None:
        on_stage("training the teacher", 0, 1)
        study = tuned(study, shared / TRAIN_FILE, shared / TEACHER_FOLDER)
    cache = _cache(study, shared, on_stage)
    heldout = Heldout.make(
        shared / HELDOUT_FOLDER,
        heldout_rows,
        study.teacher,
        divergence="divergence" in study.measures,
        device=study.run.torch_device,
        on_row=lambda done, total: on_stage("measuring the teacher", done, total),
    )
    teacher = _scores(study, heldout.teacher, suite_scores(study, study.teacher))
    teacher = _with_continuations(study, study.teacher, heldout, teacher, None)
    start = score(
        study, student, heldout, teacher, lambda done, total: on_stage("measuring the student", done, total)
    )
    made_by = provenance(
        fingerprints=_fingerprints(study, student, shared, heldout), device=study.run.torch_device
    )
    content = FORMAT.header(
        made_by,
        student=_kept(shared, student),
        teacher_model=None if study.teacher_run is None else _kept(shared, study.teacher),
        cache=cache and _kept(shared, cache),
        teacher=asdict(teacher),
        start=asdict(start),
        counts={kind: len(rows) for kind, rows in chosen.items()},
        passed_over=passed_over,
    )
    write_json(shared / SHARED_FILE, content)


def _fingerprints(study: StudyConfig, student: str, shared: Path, heldout: Heldout) -> dict[str, str]:
    """Fingerprint what every cell of the study is made of."""
    return _made_of(study, student) | {
        TRAINING_ROWS: rows_fingerprint(read_rows(shared / TRAIN_FILE)),
        "held-out rows": rows_fingerprint([row for rows in heldout.rows.values() for row in rows]),
    }


def _made_of(study: StudyConfig, student: str) -> dict[str, str]:
    """Fingerprint what a study reads from outside its folder."""
    found = {
        "teacher": model_fingerprint(model_folder(study.teacher)),
        "teacher tokenizer": load_tokenizer(study.teacher).view.fingerprint,
        "student": model_fingerprint(model_folder(student)),
        "student tokenizer": load_tokenizer(student).view.fingerprint,
    }
    if study.teacher_cache is not None:
        found["teacher cache"] = read_header(Path(study.teacher_cache)).digest
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


def _check_held_out(train: Sequence[Row], heldout: Mapping[str, Sequence[Row]]) -> None:
    """Check that no held-out row is also a training row."""
    seen = {row.text for row in train}
    for kind, rows in heldout.items():
        if known := sum(row.text in seen for row in rows):
            allowed = (
                f"other text: {known} of its {len(rows)} rows are trained on; split: heldout has other files"
            )
            raise BadOption(f"the held-out text {kind}", f"{len(rows)} rows", allowed)


def _check_selection(study: StudyConfig, heldout: Mapping[str, Sequence[Row]]) -> None:
    """See that alpha is not chosen on what is reported."""
    reported = {row.text for texts in study.rings.values() for kind in texts for row in heldout[kind]}
    for kind in study.select_alpha_on:
        rows = heldout[heldout_name("select_alpha_on", kind)]
        if known := sum(row.text in reported for row in rows):
            allowed = f"other text: {known} of its {len(rows)} rows are reported on; skip passes over these"
            raise BadOption(f"select_alpha_on.{kind}", f"{len(rows)} rows", allowed)


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


def _cache(study: StudyConfig, shared: Path, on_stage: OnStage) -> str | None:
    """Cache the teacher's log-probs on the training rows, if a method reads them; check a cache that is given."""
    k = _wanted_k(study)
    if k is None:
        return None
    if study.teacher_cache is not None:
        _check_cache(study, shared, k)
        return study.teacher_cache
    settings = CacheSettings(
        model=study.teacher,
        data=str(shared / TRAIN_FILE),
        output=str(shared / f"{CACHE_FOLDER}-{k}"),
        k=k,
        dtype="float32",  # so that a method loses nothing by it that the model in memory would give
        max_length=study.max_length,
        device=study.run.torch_device,
    )

    def tell(progress: CacheProgress) -> None:
        on_stage("asking the teacher", progress.rows, progress.total)

    write_cache(settings, on_progress=tell)
    return settings.output


def _wanted_k(study: StudyConfig) -> int | None:
    """Find the top k that the teacher cache needs; None where no method reads a cache.

    A cache that is given needs only the `top_k` that the study sets; a method without one reads all that is cached.
    """
    teachers = [teacher for entry in study.methods.values() if (teacher := entry.resolved()[0])]
    asked = [teacher.get("top_k") or 1 for teacher in teachers if uses_cache(teacher)]
    if not asked or study.teacher_cache is not None:
        return max(asked, default=None)
    return min(max(DEFAULT_TOP_K, *asked), load_tokenizer(study.teacher).view.vocab_size)


def uses_cache(teacher: Mapping[str, object]) -> bool:
    """Say whether a method can read a teacher cache; means of whole logits need the model."""
    return teacher.get("positions", "boundary") == "boundary"


def _check_cache(study: StudyConfig, shared: Path, top_k: int) -> None:
    """See that a cache that the study names is of its teacher and rows, and has `top_k` ids at a token.

    Raises as `open_cache`, BadArtifact.
    """
    assert study.teacher_cache is not None
    rows = read_rows(shared / TRAIN_FILE)
    open_cache(study.teacher_cache, _side(study.teacher), rows, "none")
    header = read_header(Path(study.teacher_cache))
    now = model_fingerprint(model_folder(study.teacher))
    if header.model_fingerprint != now:
        was = f"it was made by {header.model} ({header.model_fingerprint[:8]}…)"
        problem = f"{was}, and the teacher is {study.teacher} ({now[:8]}…)"
        raise BadArtifact(
            study.teacher_cache, problem, "give a cache of the teacher, or leave teacher_cache out"
        )
    if header.k < top_k:
        problem = f"it has {header.k} ids at a token, and a method looks at {top_k}"
        raise BadArtifact(study.teacher_cache, problem, f"make another one with `write_cache` and k {top_k}")


# Scores


def score(
    study: StudyConfig,
    model: str,
    heldout: Heldout,
    teacher: ModelScores,
    on_row: Callable[[int, int], None],
) -> ModelScores:
    """Measure a model on all held-out text and suites, with the teacher's continuations. Raises the errors of all."""
    measured = score_model(model, heldout, device=study.run.torch_device, on_row=on_row)
    scores = _scores(study, measured, suite_scores(study, model))
    return _with_continuations(study, model, heldout, scores, teacher)


def _with_continuations(
    study: StudyConfig, model: str, heldout: Heldout, scores: ModelScores, teacher: ModelScores | None
) -> ModelScores:
    """Add what a model says after held-out prompts, if the study wants that; the teacher itself comes without one."""
    if study.continuations is None:
        return scores
    config, device = study.continuations, study.run.torch_device
    rows = {kind: heldout.rows[kind][: config.rows] for texts in study.rings.values() for kind in texts}
    teacher_subject = subject_of(study.teacher, device)
    subject = teacher_subject if teacher is None else subject_of(model, device)
    texts = continue_rows(subject, rows, config.new_tokens)
    found = measure(texts, texts if teacher is None else teacher.continuations, teacher_subject)
    rings: dict[str, Any] = {
        ring: {kind: Measured.sum((of_kind, found[kind])) for kind, of_kind in scores.on(ring).items()}
        for ring in RINGS
    }
    return replace(scores, **rings, continuations=texts)


def _scores(
    study: StudyConfig, measured: Mapping[str, Measured], suites: Mapping[str, Mapping[str, float]]
) -> ModelScores:
    """Part what was measured into the rings of the study."""
    parts: dict[str, Any] = {
        setting: {kind: measured[heldout_name(setting, kind)] for kind in texts}
        for setting, texts in study.heldout.items()
    }
    return ModelScores(**parts, suites=suites)


def suite_scores(study: StudyConfig, model: str) -> dict[str, dict[str, float]]:
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
    return Ask(
        data=None if suite.data is None else Path(suite.data),
        limit=suite.limit,
        allow_code_execution=suite.allow_code_execution,
    )
