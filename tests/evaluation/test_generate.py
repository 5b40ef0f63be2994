"""A greedy answer against a loop over argmax."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cdm_toolkit.evaluation.generate import generate
from cdm_toolkit.evaluation.run import Subject, start_token

MakeSubject = Callable[..., Subject]


@pytest.mark.parametrize(("bos", "eos"), [("<s>", "</s>"), (None, "</s>")])
def test_an_answer_is_the_likeliest_token_each_time(make: MakeSubject, bos: str | None, eos: str) -> None:
    subject = make(bos=bos, eos=eos)
    prompt = "Ada buys 3 pens."
    ids = [
        start_token(subject.tokenizer),
        *subject.tokenizer(f"{prompt}\n", add_special_tokens=False).input_ids,
    ]
    begin = len(ids)
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(subject.model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == subject.tokenizer.eos_token_id:
            break
    expected = subject.tokenizer.decode(ids[begin:], skip_special_tokens=True).strip()
    assert generate(subject.model, subject.tokenizer, prompt, max_new_tokens=12) == expected


def test_an_answer_stops_at_the_end_token(make: MakeSubject) -> None:
    subject = make()
    torch.nn.init.zeros_(subject.model.lm_head.weight)
    subject.model.generation_config.eos_token_id = 0  # argmax of equal logits
    assert generate(subject.model, subject.tokenizer, "a", max_new_tokens=5) == ""


def test_a_prompt_that_is_too_long_keeps_its_end(make: MakeSubject) -> None:
    subject = make(positions=32)
    long = "word " * 200 + "Ada has 3 pens"
    short = generate(subject.model, subject.tokenizer, long, max_new_tokens=8)
    kept = subject.tokenizer(f"{long}\n", add_special_tokens=False).input_ids[-23:]
    with torch.no_grad():
        first = int(
            subject.model(torch.tensor([[start_token(subject.tokenizer), *kept]])).logits[0, -1].argmax()
        )
    assert short.startswith(subject.tokenizer.decode([first], skip_special_tokens=True).strip())
