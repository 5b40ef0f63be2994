"""`cdm generate`: generate one answer with a model."""

from __future__ import annotations

from typing import Annotated

import typer

from cdm_toolkit.cli import completion, options


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    model: Annotated[
        str, typer.Option(help="An alias, a folder or a hub id.", autocompletion=completion.models)
    ],
    max_new_tokens: Annotated[int, typer.Option(help="Maximum number of tokens to generate.", min=1)] = 128,
    device: options.Device = "auto",
    as_json: options.AsJson = False,
) -> None:
    """Continue a prompt with greedy decoding.

    Example: cdm generate "Mia has 3 boxes of 12 pens. How many pens?" --model out
    """
    from cdm_toolkit.cli import screen
    from cdm_toolkit.evaluation.evaluate import load_subject
    from cdm_toolkit.evaluation.generation import generate as write
    from cdm_toolkit.hub.models import resolve_device

    device = str(resolve_device(device))
    subject = load_subject(model, device)
    screen.say_device(device)
    answer = write(subject, prompt, max_new_tokens=max_new_tokens)
    if as_json:
        screen.print_json({"model": model, "prompt": prompt, "device": device, "answer": answer})
        return
    screen.out().print(answer, markup=False, soft_wrap=True)
