"""Answers against a loop over argmax; many at once against one at a time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from cdm_toolkit.errors import BadOption, UnsupportedTokenizer
from cdm_toolkit.evaluation.evaluate import Subject, start_token
from cdm_toolkit.evaluation.generation import (
    GenerationSettings,
    _top_p,
    as_chat,
    generate,
    generate_batch,
    prompt_ids,
    spelled,
)

MakeSubject = Callable[..., Subject]
PROMPTS = (
    "Ada buys 3 pens.",
    "x",
    "Tom has 14 apples and gives 2 of them to Ann. How many has he left?",
    "你好",
)


@pytest.mark.parametrize(("bos", "eos"), [("<s>", "</s>"), (None, "</s>")])
def test_an_answer_is_the_most_probable_token_each_time(make: MakeSubject, bos: str | None, eos: str) -> None:
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
    assert generate(subject, prompt, max_new_tokens=12) == expected


def test_an_answer_stops_at_the_end_token(make: MakeSubject) -> None:
    subject = make()
    torch.nn.init.zeros_(subject.model.lm_head.weight)
    subject.model.generation_config.eos_token_id = 0  # argmax of equal logits
    assert generate(subject, "a", max_new_tokens=5) == ""


def test_a_prompt_that_is_too_long_keeps_its_end(make: MakeSubject) -> None:
    subject = make(positions=32)
    long = "word " * 200 + "Ada has 3 pens"
    short = generate(subject, long, max_new_tokens=8)
    kept = subject.tokenizer(f"{long}\n", add_special_tokens=False).input_ids[-23:]
    with torch.no_grad():
        first = int(
            subject.model(torch.tensor([[start_token(subject.tokenizer), *kept]])).logits[0, -1].argmax()
        )
    assert short.startswith(subject.tokenizer.decode([first], skip_special_tokens=True).strip())


@pytest.mark.parametrize(
    "settings",
    [
        GenerationSettings(12),
        GenerationSettings(12, temperature=1.0, seed=10),
        GenerationSettings(12, temperature=0.7, top_p=0.6, seed=20),
    ],
)
def test_what_is_written_does_not_depend_on_the_batch(subject: Subject, settings: GenerationSettings) -> None:
    alone = [generate_batch(subject, [prompt], settings)[0] for prompt in PROMPTS]
    assert all(alone)
    for batch_size in (None, 1, 2, 4):
        assert generate_batch(subject, PROMPTS, settings, batch_size=batch_size) == alone
    assert generate_batch(subject, PROMPTS[::-1], settings) == alone[::-1]


def test_greedy_is_the_most_probable_token_each_time(subject: Subject) -> None:
    for prompt, text in zip(PROMPTS, generate_batch(subject, PROMPTS, GenerationSettings(9)), strict=True):
        ids = prompt_ids(subject.tokenizer, prompt, None)
        begin = len(ids)
        for _ in range(9):
            with torch.no_grad():
                ids.append(int(subject.model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert text == spelled(subject.view, ids[begin:]).decode(errors="replace")


def test_draws_follow_the_model(make: MakeSubject) -> None:
    """Half a thousand draws of one token against the probabilities that the model gives."""
    subject = make()
    prompt, n = "Ada", 600
    with torch.no_grad():
        logits = subject.model(torch.tensor([prompt_ids(subject.tokenizer, prompt, None)])).logits[0, -1]
    chances = torch.softmax(logits / 0.25, -1)
    drawn = generate_batch(
        subject, [prompt] * n, GenerationSettings(1, temperature=0.25, seed=1), batch_size=200
    )
    best = chances.topk(3)
    assert best.values[0] > 0.05
    for chance, token_id in zip(best.values.tolist(), best.indices.tolist(), strict=True):
        share = drawn.count(spelled(subject.view, [token_id]).decode(errors="replace")) / n
        assert share == pytest.approx(chance, abs=4 * (chance * (1 - chance) / n) ** 0.5)


def test_each_seed_draws_anew_and_the_same_again(subject: Subject) -> None:
    drawn = [
        generate_batch(subject, ["x", "x"], GenerationSettings(8, temperature=1.0, seed=seed))
        for seed in (1, 1, 2)
    ]
    assert drawn[0] == drawn[1]
    assert len({*drawn[0], *drawn[2]}) == 4


def test_top_p_keeps_the_fewest_most_probable_tokens() -> None:
    scores = torch.log(torch.tensor([[0.1, 0.5, 0.15, 0.25]]))
    for top_p, kept in ((0.4, [1]), (0.5, [1]), (0.6, [1, 3]), (0.76, [1, 2, 3]), (1.0, [0, 1, 2, 3])):
        assert torch.isfinite(_top_p(scores, top_p))[0].nonzero().flatten().tolist() == kept


def test_a_completion_ends_before_the_first_stop_string(subject: Subject) -> None:
    free = generate_batch(subject, PROMPTS, GenerationSettings(12))
    stops = (free[0][3:8], free[2][5:7])
    stopped = generate_batch(subject, PROMPTS, GenerationSettings(12, stop=stops))
    assert stopped == [
        text[: min(p for s in stops if (p := text.find(s)) >= 0)] if any(s in text for s in stops) else text
        for text in free
    ]
    assert stopped[0] != free[0]


def test_a_stop_string_ends_the_work(make: MakeSubject) -> None:
    """A model that would write for ever does not, once all rows have stopped."""
    subject = make()
    text = generate_batch(subject, ["Ada"], GenerationSettings(6))[0]
    steps: list[int] = []
    subject.model.register_forward_hook(lambda *_: steps.append(1))
    generate_batch(subject, ["Ada"], GenerationSettings(200, stop=(text[:2],)))
    assert len(steps) < 10


def test_no_more_is_written_than_asked_for_or_than_there_are_positions(make: MakeSubject) -> None:
    subject = make(positions=32)
    steps: list[int] = []
    subject.model.register_forward_hook(lambda *_: steps.append(1))
    for prompt in ("a", "word " * 200):
        assert generate_batch(subject, [prompt], GenerationSettings(20)) != [""]
        assert len(steps) <= 20
        steps.clear()
    with pytest.raises(BadOption, match="`max_new_tokens` is 32; give less than the 32 positions of tiny"):
        generate_batch(subject, ["a"], GenerationSettings(32))


def test_a_prompt_begins_with_the_start_token_once(make: MakeSubject) -> None:
    tokenizer = make().tokenizer
    start = start_token(tokenizer)
    plain = prompt_ids(tokenizer, "Ada has 3 pens", None)
    assert plain[0] == start
    assert prompt_ids(tokenizer, "<s>Ada has 3 pens", None) == plain
    assert prompt_ids(tokenizer, "Ada has 3 pens", 3) == [start, *plain[-2:]]
    assert prompt_ids(tokenizer, "Ada has 3 pens", 1) == [start]


def test_a_chat_template_is_the_models_own(make: MakeSubject) -> None:
    subject = make()
    with pytest.raises(
        UnsupportedTokenizer, match="it has no chat template; score it without `chat_template`"
    ):
        as_chat(subject, "hi")
    subject.tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<answer>"
    )
    assert as_chat(subject, "hi") == "<user>hi<answer>"
