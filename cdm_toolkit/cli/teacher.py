"""`cdm teacher`: precompute a cache of a teacher's log-probabilities."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cdm_toolkit.cli import completion, options, screen
from cdm_toolkit.cli.settings_options import given, record_option
from cdm_toolkit.errors import BadOption, Interrupted, TwoWays

if TYPE_CHECKING:
    from cdm_toolkit.artifacts.teacher_header import CacheHeader
    from cdm_toolkit.distill.write_teacher_cache import CacheProgress, CacheResult
    from cdm_toolkit.integrations.distillkit_convert import Converted

_RECORD = ("distill/write_teacher_cache.py", "CacheSettings")
_option = functools.partial(record_option, *_RECORD)
_server_option = functools.partial(record_option, "distill/teacher_settings.py", "TeacherSource")

app = typer.Typer(no_args_is_help=True, help="Precompute a cache of a teacher's log-probabilities.")


@app.command()
def cache(
    context: typer.Context,
    model: Annotated[str, _option("model", names=completion.models)],
    data: Annotated[Path, _option("data")],
    output: Annotated[Path, _option("output", "--output", "-o")],
    k: Annotated[int | None, _option("k", "-k", "--top-k")] = None,
    dtype: Annotated[str | None, _option("dtype")] = None,
    quantised: Annotated[bool, _option("quantised", "--quantised")] = False,
    max_length: Annotated[int | None, _option("max_length")] = None,
    template: Annotated[str | None, _option("template")] = None,
    learn: Annotated[str | None, _option("learn")] = None,
    batch_size: Annotated[int | None, _option("batch_size")] = None,
    device: Annotated[str | None, _option("device")] = None,
    device_map: Annotated[str | None, _option("device_map")] = None,
    teacher_dtype: Annotated[str | None, _option("teacher_dtype")] = None,
    quantization: Annotated[str | None, _option("quantization")] = None,
    shard: Annotated[str | None, _option("shard")] = None,
    limit: Annotated[int | None, _option("limit")] = None,
    rows_per_shard: Annotated[int | None, _option("rows_per_shard")] = None,
    url: Annotated[list[str] | None, _option("url")] = None,
    tokenizer: Annotated[str | None, _option("tokenizer", names=completion.models)] = None,
    engine: Annotated[str | None, _option("engine")] = None,
    api_key_env: Annotated[str | None, _option("api_key_env")] = None,
    in_flight: Annotated[int | None, _option("in_flight")] = None,
    timeout: Annotated[float | None, _option("timeout")] = None,
    patience: Annotated[float | None, _option("patience")] = None,
    as_json: options.AsJson = False,
) -> None:
    """Store a teacher's top-k log-probabilities at each completion token, so that training needs no teacher in memory.

    Run the same command again to resume an interrupted run. Parts (--shard) are written to one folder, or to several
    that are merged by copying their files.

    With --url a server that has the model is asked.

    Example: cdm teacher cache --model smollm2 --data rows.jsonl -o cached
    """
    from cdm_toolkit.artifacts.settings import make, with_settings
    from cdm_toolkit.distill.write_teacher_cache import CacheSettings, write_cache

    said = given(context, *_RECORD) | {"data": str(data), "output": str(output)}
    if device_map is not None:  # a name, or a mapping as YAML has it
        said = with_settings(said, [f"device_map={device_map}"], source="the command line")
    settings = make(CacheSettings, said, source="the command line")
    with screen.progress() as bar:
        task = bar.add_task("running the teacher", total=None, note="")

        # once, when the model has begun
        say_device = functools.cache(lambda: screen.say_device(settings.runs_on))

        def follow(progress: CacheProgress) -> None:
            if progress.tokens:
                say_device()
            note = f"{progress.tokens_per_second:,.0f} tokens/s" if progress.tokens else ""
            bar.update(task, completed=progress.rows, total=progress.total, note=note)

        try:
            result = write_cache(settings, on_progress=follow)
        except KeyboardInterrupt:
            kept = f"what was finished is kept in {output}"
            raise Interrupted("the teacher", kept, "the same command") from None
    for note in result.notes:
        screen.warn(note)
    for name in result.damaged:
        screen.warn(f"{name} was damaged, and was made again")
    if as_json:
        screen.print_json(_result_record(result))
    else:
        _print_result(result)


@app.command()
def info(
    folder: Annotated[Path, typer.Argument(help="Folder of a teacher cache.")],
    as_json: options.AsJson = False,
) -> None:
    """Show the inputs and settings of a cache, and verify its checksums.

    Example: cdm teacher info cached
    """
    from cdm_toolkit.artifacts.teacher_cache import TeacherCache

    found = TeacherCache.open(folder)
    with screen.counted("checking shards") as progress:
        found.verify(lambda done: progress(done, len(found.notes)))
    sizes = _sizes(found.header.rows, found.positions, found.size)
    if as_json:
        screen.print_json({"folder": str(folder)} | sizes | {"verified": True} | found.header.model_dump())
        return
    shards = ("shards", f"{len(found.notes)}, all as they were written")
    screen.print_table(None, ("what", "figure"), [*_facts(found.header), *_size_lines(sizes), shards])


@app.command()
def check(
    url: Annotated[list[str], _server_option("url", "--url")],
    model: Annotated[str, typer.Option("--model", help="The name that the server has for it.")],
    tokenizer: Annotated[
        str | None,
        _server_option("tokenizer", names=completion.models),
    ] = None,
    engine: Annotated[str | None, _server_option("engine")] = None,
    api_key_env: Annotated[str | None, _server_option("api_key_env")] = None,
    in_flight: Annotated[int | None, _server_option("in_flight")] = None,
    timeout: Annotated[float | None, _server_option("timeout")] = None,
    patience: Annotated[float | None, _server_option("patience")] = None,
    k: Annotated[int, typer.Option("-k", "--top-k", help="Candidates to ask for at each token.")] = 100,
    texts: Annotated[int, typer.Option("--texts", help="Texts of the package's own to score.", min=1)] = 32,
    against: Annotated[
        str | None,
        typer.Option(
            help="A model in memory to compare with: an alias, a folder or a hub id.",
            autocompletion=completion.models,
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """See whether a server can be a teacher: its tokenizer, the candidates that it gives, its speed.

    Example: cdm teacher check --url http://localhost:8000 --model smollm2
    """
    from dataclasses import asdict

    from cdm_toolkit.artifacts.settings import make
    from cdm_toolkit.distill.served_teacher import server_settings
    from cdm_toolkit.distill.sources import read_rows
    from cdm_toolkit.distill.teacher_settings import TeacherConfig
    from cdm_toolkit.hub.models import load_model
    from cdm_toolkit.hub.tokenizers import load_tokenizer
    from cdm_toolkit.kd.tokenized_rows import tokenizer_side
    from cdm_toolkit.teachers.check_server import check_servers

    optional = {"engine": engine, "api_key_env": api_key_env, "in_flight": in_flight, "timeout": timeout}
    optional |= {"patience": patience}
    said: dict[str, Any] = {"kind": "served", "url": url, "model": model, "tokenizer": tokenizer}
    said |= {name: value for name, value in optional.items() if value is not None}
    config = make(TeacherConfig, said, source="the command line")
    loaded = load_tokenizer(config.tokenizer_name)
    side = tokenizer_side(loaded.tokenizer, loaded.view)
    rows = read_rows("sample:train")[:texts]
    with screen.counted("asking the server") as progress:
        found = check_servers(
            server_settings(config),
            side,
            [f"{row.prompt} {row.completion}" for row in rows],
            k=k,
            model=None if against is None else load_model(against),
            on_text=lambda done: progress(done, len(rows)),
        )
    for note in found.notes:
        screen.warn(note)
    if as_json:
        screen.print_json(asdict(found) | {"tokens_per_second": found.tokens_per_second})
        return
    lines = [
        ("tokenizer", f"{loaded.view.name}, as the server has it"),
        ("candidates", f"{found.k} at each token"),
        ("likelihood", f"{found.bits_per_byte:.2f} bits per byte of an English text"),
        ("speed", f"{found.tokens_per_second:,.0f} tokens/s ({found.texts} texts, {found.tokens:,} tokens)"),
        ("received", f"{found.bytes_per_token:,.0f} bytes a token"),
    ]
    if (agreement := found.agreement) is not None:
        apart = f"{agreement.mean:.2g} nats a token apart in the mean, {agreement.largest:.2g} at most"
        lines.append(
            (f"against {against}", f"{apart}; the likeliest token is the same at {agreement.same_best:.1%}")
        )
    screen.print_table(None, ("what", "figure"), lines)


@app.command()
def convert(
    source: Annotated[
        str,
        typer.Argument(help="A set of DistillKit's (a folder, files, an id on the hub), or a teacher cache."),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(
            help="Of a set: the tokenizer that its ids are of: an alias, a folder or a hub id.",
            autocompletion=completion.models,
        ),
    ] = None,
    compression: Annotated[
        Path | None,
        typer.Option(
            help="The file that says how a set is compressed, or is to be: its compression_config.yaml."
        ),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of a set on the hub; train unless given.")] = None,
    config: Annotated[str | None, typer.Option(help="Of a set on the hub, where it has several.")] = None,
    k: Annotated[
        int | None, typer.Option("-k", "--top-k", min=1, help="Candidates of a set that is written.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of a cache that is written: float32, or float16.")
    ] = None,
    quantised: Annotated[
        bool, typer.Option("--quantised", help="Write a cache with a few bits a number.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Write a set of DistillKit's as a teacher cache, with the rows to train on beside it; or a cache as a set.

    Example: cdm teacher convert teacher-set --tokenizer qwen2 -o cached
    """
    from cdm_toolkit.artifacts.teacher_header import HEADER_FILE

    of_sets: dict[str, Any] = {"tokenizer": tokenizer, "split": split, "config": config, "dtype": dtype}
    of_sets["quantised"] = quantised or None
    with screen.counted("converting") as progress:
        if (Path(source) / HEADER_FILE).is_file():
            _refuse(of_sets, "the source is a cache, which is written as a set")
            from cdm_toolkit.artifacts.teacher_cache import TeacherCache
            from cdm_toolkit.integrations.distillkit_convert import set_from_cache

            cache = TeacherCache.open(source)
            made = set_from_cache(cache, output, compression=compression, k=k, on_progress=progress)
        else:
            _refuse({"k": k}, "the source is a set, all of whose candidates are kept")
            made = _cache_of_set(source, output, compression, of_sets, progress)
    if as_json:
        screen.print_json({**asdict(made), "folder": str(made.folder)})
        return
    sizes = {**_sizes(made.rows, made.positions, made.size)}
    rows = [("written", str(made.folder)), *_size_lines(sizes), ("candidates", f"{made.k} a token")]
    screen.print_table(None, ("what", "figure"), rows)


def _cache_of_set(
    source: str,
    output: Path,
    compression: Path | None,
    said: dict[str, Any],
    progress: Callable[[int, int], None],
) -> Converted:
    from cdm_toolkit.integrations.distillkit import SetFiles
    from cdm_toolkit.integrations.distillkit_convert import cache_from_set

    if said["tokenizer"] is None:
        raise BadOption("tokenizer", None, "that of the model that the set is of: ids are all that it holds")
    if said["dtype"] not in (None, "float16", "float32"):
        raise BadOption("dtype", said["dtype"], "float32 or float16")
    if said["quantised"] and said["dtype"]:
        raise TwoWays("dtype", "quantised")
    file = None if compression is None else str(compression)
    return cache_from_set(
        SetFiles(source, said["split"] or "train", said["config"], file),
        output,
        tokenizer=said["tokenizer"],
        dtype=said["dtype"] or "float32",
        quantised=bool(said["quantised"]),
        on_progress=progress,
    )


def _refuse(said: dict[str, Any], why: str) -> None:
    """Refuse options that are for the other direction."""
    for name, value in said.items():
        if value is not None:
            raise BadOption(name, value, f"none: {why}")


def _facts(header: CacheHeader) -> list[tuple[str, str]]:
    kept = {
        "whole": f"all of {header.vocab:,} ids, {header.dtype}",
        "plain": f"top {header.k} of {header.vocab:,} ids, {header.dtype}",
        "quantised": f"top {header.k} of {header.vocab:,} ids, quantised",
    }
    return [
        ("teacher", _teacher(header)),
        ("tokenizer", f"{header.tokenizer} ({header.tokenizer_fingerprint[:8]}…)"),
        ("data", f"{header.data} ({header.data_fingerprint[:8]}…)"),
        ("template", f"{header.template}, rows of up to {header.max_length} tokens"),
        ("kept", kept[header.encoding]),
    ]


def _teacher(header: CacheHeader) -> str:
    if header.probe is not None:
        return f"{header.model}, behind a server"
    return f"{header.model} ({header.model_fingerprint[:8]}…), run in {header.teacher_dtype}"


def _sizes(rows: int, tokens: int, size: int) -> dict[str, Any]:
    return {"rows": rows, "tokens": tokens, "size": size, "bytes_per_token": size / max(tokens, 1)}


def _size_lines(sizes: dict[str, Any]) -> list[tuple[str, str]]:
    return [
        ("rows", f"{sizes['rows']:,}"),
        ("tokens", f"{sizes['tokens']:,} of the completions"),
        ("size", f"{sizes['size'] / 1e6:,.1f} MB, {sizes['bytes_per_token']:.1f} bytes a token"),
    ]


def _print_result(result: CacheResult) -> None:
    kept = f", {len(result.kept)} were there" if result.kept else ""
    left = f"; {result.missing} of {result.header.shards} are left for other parts" if result.missing else ""
    speed = f", {result.tokens_per_second:,.0f} tokens/s" if result.made else ""
    rows = [
        ("cache", str(result.folder)),
        *_size_lines(_sizes(result.rows, result.tokens, result.size)),
        ("shards", f"{len(result.made)} made{kept}{left}"),
        ("time", f"{result.seconds:.0f} s{speed}"),
    ]
    screen.print_table(None, ("what", "figure"), rows)


def _result_record(result: CacheResult) -> dict[str, Any]:
    names = ("made", "kept", "damaged", "missing", "seconds", "tokens_per_second")
    sizes = _sizes(result.rows, result.tokens, result.size)
    return {"folder": str(result.folder), **sizes, **{name: getattr(result, name) for name in names}}
