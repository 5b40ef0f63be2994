"""The command line `cdm`: parse, call, render. The only user of typer and rich."""

from __future__ import annotations

import gc
import os
import sys


def main(args: list[str] | None = None) -> int:
    """Run one command and return its exit status.

    0; 2 with one line on stderr for a user's mistake; 130 where a signal stopped it.
    """
    # Progress bars and advice of other libraries would mix with ours; a person's own setting wins.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")

    import typer

    from cdm_toolkit.cli import library_notes, translate_messages
    from cdm_toolkit.cli.app import app
    from cdm_toolkit.errors import CdmError, FileProblem, Interrupted

    # typer carries click inside or beside it, by version: its usage error is the base of BadParameter.
    usage_error: type[Exception] = typer.BadParameter.__bases__[0]
    command = typer.main.get_command(app)
    library_notes.start()
    translate_messages.start(command, sys.argv[1:] if args is None else args)
    try:
        status = command.main(args=args, prog_name="cdm", standalone_mode=False)
        sys.stdout.flush()
    except Interrupted as error:
        print(f"cdm: {translate_messages.in_terminal(str(error))}", file=sys.stderr)
        return 130
    except CdmError as error:
        return _fail(translate_messages.in_terminal(str(error)))
    except usage_error as error:
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "cdm"
        hint = _setting_hint(where, getattr(error, "option_name", None))
        said = error.format_message().rstrip(".")  # type: ignore[attr-defined]
        return _fail(f"{said}.{hint} See: {where} --help")
    except BrokenPipeError:
        # The reader went away, as `head` does. Python would complain once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        if error.filename is None and error.errno is None:
            raise
        return _fail(str(FileProblem(error.filename or "output", error.strerror or str(error))))
    except (KeyboardInterrupt, typer.Abort):
        print("cdm: stopped", file=sys.stderr)
        return 130
    return status if isinstance(status, int) else 0


def _setting_hint(command: str, flag: str | None) -> str:
    """Say how a setting is given that has no option of its own."""
    from cdm_toolkit.cli.settings_options import setting_named

    if flag is None or command != "cdm distill" or (setting := setting_named(flag)) is None:
        return ""
    return f" It is a setting of the run: --set {setting}=…."


def _fail(message: str) -> int:
    print(f"cdm: error: {message}", file=sys.stderr)
    return 2


def entry() -> None:
    """Entry point of the installed `cdm` script."""
    gc.set_threshold(50_000, 50, 1000)  # imports make half a million objects, none of them garbage
    sys.exit(main())
