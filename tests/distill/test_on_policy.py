"""Texts that the student samples: what the teachers read of them, what is learned, and what a run tells of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import chisquare
from scoring_server import ScoringServer
from torch import nn

from cdm_toolkit.distill import on_policy as module
from cdm_toolkit.distill.generate import Prompt, sample_ids
from cdm_toolkit.distill.logs import StepLog
from cdm_toolkit.distill.on_policy import (
    Drawn,
    OnPolicy,
    Sample,
    add_samples,
    keep_samples_until,
    prompts_of,
)
from cdm_toolkit.distill.output_folder import last_checkpoint
from cdm_toolkit.distill.plan import plan
from cdm_toolkit.distill.prepare import prepare
from cdm_toolkit.distill.run import RunResult, run
from cdm_toolkit.distill.settings import DistillConfig, OnPolicyConfig, from_mapping
from cdm_toolkit.distill.sources import Rows
from cdm_toolkit.distill.trainer import DistillTrainer
from cdm_toolkit.distill.training_arguments import training_arguments
from cdm_toolkit.errors import BadArtifact, BadOption, BadSettings, NotFinite, ServerProblem, SourceNotFound
from cdm_toolkit.hub.models import load_model, save_model
from cdm_toolkit.hub.students import new_student
from cdm_toolkit.hub.tokenizers import load_tokenizer
from cdm_toolkit.kd import ExactMatch, Spelling, TokenizerPair
from cdm_toolkit.kd.batch import AlignedBatch, Collator
from cdm_toolkit.kd.rows import Message, Row
from cdm_toolkit.kd.tokenized_rows import TeacherSide, tokenize_prompts, tokenize_rows, tokenizer_side
from cdm_toolkit.teachers import Local, scoring_client

PAIRS = [
    ("smollm2", "qwen2"),
    ("llama3", "mistral"),
    ("mistral", "gpt2"),
    ("qwen2", "smollm2"),
    ("gpt2", "llama3"),
]
"""Students and teachers."""


@cache
def loaded(name: str) -> Any:
    try:
        return load_tokenizer(name)
    except SourceNotFound as error:
        pytest.skip(str(error))


@cache
def pair_of(student: str, teacher: str) -> TokenizerPair:
    return TokenizerPair.from_loaded(loaded(teacher), loaded(student))


def on_policy_of(
    pair: TokenizerPair, rows: Sequence[Row], template: Any = "none", **settings: Any
) -> OnPolicy:
    numbers = np.array([row.number for row in rows])
    return OnPolicy(
        OnPolicyConfig(**settings),
        prompts_of(rows, numbers, pair.student, template, 511),
        pair.student,
        (TeacherSide(pair.teacher),),
        template,
        512,
        seed=0,
    )


def samples_of(on_policy: OnPolicy, sampled: Sequence[Sequence[int]]) -> list[Sample]:
    """Make the samples of a step that has drawn these ids after the prompts, one each."""
    numbers = sorted(on_policy.prompts)
    drawn = tuple((number, tuple(ids)) for number, ids in zip(numbers, sampled, strict=True))
    (samples,) = on_policy.samples([Drawn(tuple(numbers), (True,) * len(numbers), drawn)])
    return samples


def batch_of(pair: TokenizerPair, on_policy: OnPolicy, sampled: Sequence[Sequence[int]]) -> AlignedBatch:
    """Make the batch of what a step has drawn."""
    return Collator((pair.fingerprints,))([sample.aligned for sample in samples_of(on_policy, sampled)])


class Table(nn.Module):
    """A model whose logits depend on the token that it reads and on how many came before, however rows are laid out."""

    def __init__(self, vocab: int, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.tokens, self.positions = nn.Embedding(vocab, 8), nn.Embedding(600, 8)
        self.head = nn.Linear(8, vocab, bias=False)

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: torch.Tensor, **_: Any) -> SimpleNamespace:
        states = self.tokens(input_ids) + self.positions(torch.arange(input_ids.shape[1]))
        return SimpleNamespace(logits=self.head(states))


class Losses:
    """Of a pair's models, by a method."""

    def __init__(self, pair: TokenizerPair, **settings: Any) -> None:
        self.teacher, self.student = Table(pair.vocab_t, 1).double(), Table(pair.vocab_s, 2).double()
        self.method = ExactMatch(pair, **settings)

    def __call__(self, batch: AlignedBatch) -> tuple[float, float]:
        out = self.method(
            self.student(**batch.student).logits, self.method.signal(self.teacher, batch), batch
        )
        return out.kd.item(), out.ce.item()


TEXTS = [
    "It is 4.",
    " Yes, two and two: four!  ",
    "çà et là, 東京は晴れ\n",
    "emoji 👩🏽‍🚀 and a joined 👨‍👩‍👧",
    "x = [1, 2]\n\n\nfor i in x:\n    print(i)\n",
    "cut in the middle of 🤖",
]


@pytest.mark.parametrize(("student", "teacher"), PAIRS)
def test_a_sample_has_the_loss_of_the_same_ids_given_as_data(student: str, teacher: str) -> None:
    pair = pair_of(student, teacher)
    rows = [Row(nth, f"What is {nth} + 2?", text) for nth, text in enumerate(TEXTS, 1)]
    own = tokenize_rows(pair.student, rows, "none")
    on_policy = on_policy_of(pair, rows)
    assert all(
        (each.ids[: each.turns[0, 0]] == on_policy.prompts[nth].ids).all() for nth, each in enumerate(own, 1)
    )
    sampled = [each.ids[each.turns[0, 0] :].tolist() for each in own]
    losses = Losses(pair, divergence="reverse-kl")
    # what the tokenizer itself makes of a text
    whole = batch_of(pair, on_policy, sampled)
    as_data = pair.collate([{"prompt": row.prompt, "completion": row.completion} for row in rows])
    assert losses(whole) == pytest.approx(losses(as_data), rel=1e-9)
    assert whole.teachers[0].groups == as_data.teachers[0].groups
    # what it does not: the last character cut in two, another in single bytes or letters, without an end
    odd = [one_by_one(pair, row.completion) for row in rows]
    odd[-1] = [token for token in sampled[-1] if token != sampled[-1][-1]][:-1]
    drawn = samples_of(on_policy, odd)
    assert [list(sample.aligned.student_ids[len(sample.prompt.ids) :]) for sample in drawn[:-1]] == odd[:-1]
    assert drawn[-1].text.rstrip() == "cut in the middle of"
    given = [
        {
            "prompt": row.prompt,
            "completion": sample.text,
            "given": sample.row.given.as_dict(),
            "ended": False,
        }
        for row, sample in zip(rows, drawn, strict=True)
        if sample.row.given is not None
    ]
    as_data = pair.collate(given)
    batch = batch_of(pair, on_policy, odd)
    assert losses(batch) == pytest.approx(losses(as_data), rel=1e-9)
    assert batch.teachers[0].groups == as_data.teachers[0].groups > 60


def one_by_one(pair: TokenizerPair, text: str) -> list[int]:
    """Spell a text in the tokens of its letters."""
    view = pair.student.view
    ids = [token for letter in text for token in view.encode(letter).ids.tolist()]
    spelled = [token for token in ids if view.literals[token] != b" "]
    # SentencePiece puts a blank before what is encoded alone
    return (
        spelled
        if b"".join(view.literals[i] for i in spelled).decode() == text
        else view.encode(text).ids.tolist()
    )


# What a text may be


def test_what_a_sample_may_be() -> None:
    pair = pair_of("smollm2", "qwen2")
    view, end = pair.student.view, pair.student.eos
    assert end is not None
    header = next(token for token, special in view.special.items() if "turn_start" in special.roles)
    encode = view.encode
    given = [
        ([*encode("It is 4.").ids.tolist(), end], "It is 4.", True),
        (encode("It goes on and").ids.tolist(), "It goes on and", False),
        (encode("🤖").ids.tolist()[:1], "", False),
        ([*encode("one").ids.tolist(), header, *encode(" two").ids.tolist(), end], "one two", True),
        (
            [*encode("before <|").ids.tolist(), *encode("im_start|> after").ids.tolist(), end],
            "before",
            False,
        ),
        ([*encode("e\u0301 and n\u0303").ids.tolist(), end], "e\u0301 and n\u0303", True),
    ]
    rows = [Row(nth, "How much?", "4") for nth in range(1, len(given) + 1)]
    drawn = samples_of(on_policy_of(pair, rows), [ids for ids, *_ in given])
    assert [(sample.text, sample.row.ended) for sample in drawn] == [tuple(each) for _, *each in given]
    for sample in drawn:
        (side,) = sample.aligned.teachers
        markers = pair.teacher.view.is_special[side.ids[1:]]  # the first gives a context
        assert markers.sum() == (sample.row.ended and len(side.groups) > 0), (
            "its end is the only special token"
        )
        if sample.row.ended:
            t0, t1, s0, s1 = side.groups[-1].tolist()
            assert (side.ids[t0:t1].tolist(), sample.aligned.student_ids[s0:s1].tolist()) == (
                [pair.teacher.eos],
                [end],
            )
    # the teacher's tokenizer composes the accents: the tokens around them are grouped as a whole
    (side,) = drawn[-1].aligned.teachers
    assert pair.teacher.view.encode("\u00e9 and \u00f1").ids.tolist() == side.ids[-5:-1].tolist()


def test_an_answer_that_is_empty_teaches_its_end() -> None:
    """A student that says nothing has to hear what the teacher thinks of that."""
    pair = pair_of("smollm2", "qwen2")
    for template in ("none", "chat"):
        on_policy = on_policy_of(pair, [Row(1, "How much?", "4")], template)
        (sample,) = samples_of(on_policy, [[2]])
        (side,) = sample.aligned.teachers
        assert (sample.text, sample.row.ended, len(side.groups)) == ("", True, 1)
        assert side.ids[side.groups[0, 0]] == 151645


@pytest.mark.parametrize("name", ["smollm2", "qwen2", "llama3", "mistral", "gpt2"])
@pytest.mark.parametrize("template", ["none", "chat"])
def test_a_prompt_is_what_the_labels_follow_in_training(name: str, template: Any) -> None:
    side = tokenizer_side(loaded(name).tokenizer, loaded(name).view)
    if template == "chat" and side.chat is None:
        pytest.skip("no chat template")
    chat = [
        Message("user", "Hi"),
        Message("assistant", "Ho."),
        Message("user", " And? "),
        Message("assistant", "So."),
    ]
    rows = [Row(1, "How much is 2 + 2?", "It is 4."), Row(2, "Ça va?", "Oui, très bien!")]
    if template == "chat":
        rows.append(Row(3, "Hi\nHo.\nAnd?", "So.", messages=tuple(chat), earlier=(1,)))
    prompts = tokenize_prompts(side, rows, template)
    for prompt, whole in zip(prompts, tokenize_rows(side, rows, template), strict=True):
        assert prompt.tolist() == whole.ids[: whole.turns[-1, 0]].tolist()


# Sampling


def model_of(tiny: Any) -> Any:
    return load_model(tiny.student).eval()


def prompts(tiny: Any) -> OnPolicy:
    pair = TokenizerPair.from_names(tiny.teacher, tiny.student)
    rows = list(Rows(from_mapping({"student": "-", "data": tiny.data, "output": "-"}).data.all_sources))
    return on_policy_of(pair, rows[:6], max_new_tokens=12)


def test_samples_do_not_depend_on_padding_and_leave_random_numbers_alone(tiny) -> None:
    on_policy, model = prompts(tiny), model_of(tiny)
    many = list(on_policy.prompts.values())
    greedy = OnPolicyConfig(max_new_tokens=12, temperature=0)
    together = sample_ids(model, many, greedy, on_policy.student, 512, 0)
    alone = [sample_ids(model, [one], greedy, on_policy.student, 512, 0)[0] for one in many]
    assert together == alone
    ids = torch.tensor(np.array([many[0].ids]))
    plain = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    assert together[0] == plain[: len(together[0])]

    model.train()
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    once = sample_ids(model, many, on_policy.settings, on_policy.student, 512, 3)
    assert torch.equal(torch.rand(3), expected)
    assert model.training
    assert once == sample_ids(model, many, on_policy.settings, on_policy.student, 512, 3)
    assert once != sample_ids(model, many, on_policy.settings, on_policy.student, 512, 4)


def test_samples_have_the_models_distribution(tiny) -> None:
    """Temperature, and no more of what a checkpoint says of sampling."""
    on_policy, model = prompts(tiny), model_of(tiny)
    model.generation_config.update(top_k=2, top_p=0.5, min_p=0.1, repetition_penalty=2.0, min_new_tokens=1)
    model.generation_config.update(forced_eos_token_id=3, max_time=1e-9)
    (prompt, *_) = on_policy.prompts.values()
    with torch.no_grad():
        logits = model(torch.tensor(np.array([prompt.ids]))).logits[0, -1] / 0.7
    settings = OnPolicyConfig(max_new_tokens=1, temperature=0.7)
    drawn = sample_ids(model, [prompt] * 4000, settings, on_policy.student, 512, 0)
    counts = np.bincount([ids[0] for ids in drawn], minlength=len(logits))
    probabilities = logits.softmax(-1).double().numpy()
    assert chisquare(counts, probabilities / probabilities.sum() * counts.sum()).pvalue > 1e-3
    (likely,) = {max(each) for each in [np.flatnonzero(probabilities == probabilities.max())]}
    narrow = OnPolicyConfig(max_new_tokens=1, temperature=0.7, top_p=1e-6)
    assert sample_ids(model, [prompt], narrow, on_policy.student, 512, 0) == [[likely]]


def test_no_row_is_continued_beyond_the_positions_of_the_model(tiny) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    on_policy = prompts(tiny)
    lengths = (30, 10, 29, 10)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=200, n_positions=32, n_embd=16, n_layer=1, n_head=2))
    row = next(iter(on_policy.prompts.values())).row
    many = [Prompt(row, np.arange(length, dtype=np.int32) + 5) for length in lengths]
    settings = OnPolicyConfig(max_new_tokens=20, temperature=0)
    found = sample_ids(model, many, settings, on_policy.student, 32, 0)
    assert [len(ids) <= 32 - length for ids, length in zip(found, lengths, strict=True)] == [True] * 4
    assert found[1] == sample_ids(model, many[1:2], settings, on_policy.student, 32, 0)[0]


def test_a_sample_that_a_template_refuses_has_no_teacher() -> None:
    pair = pair_of("smollm2", "qwen2")
    rows = [Row(nth, "How much?", "4") for nth in (1, 2)]
    on_policy = on_policy_of(pair, rows, "chat")
    chat = pair.teacher.chat
    assert chat is not None
    refuses = "{% if 'No' in messages[-1]['content'] %}{{ raise_exception('no') }}{% endif %}"
    teacher = replace(pair.teacher, chat=replace(chat, source=refuses + chat.source))
    strict = replace(on_policy, teachers=(TeacherSide(teacher),))
    encode = pair.student.view.encode
    ids = [[*encode(text).ids.tolist(), 2] for text in ("No.", "Yes.")]
    refused, taken = samples_of(strict, ids)
    assert (len(refused.aligned.teachers[0].groups), len(taken.aligned.teachers[0].groups)) == (0, 3)
    assert refused.aligned.labels == 3


def test_samples_of_odd_text_are_read_again(tmp_path: Path) -> None:
    records = [{"step": step, "completion": f"a\u2028b\x85{step}"} for step in (1, 2, 3)]
    add_samples(tmp_path, records)
    keep_samples_until(tmp_path, 2)
    assert samples_in(tmp_path) == records[:2]


# Runs


SHORT = {"share": 1, "max_new_tokens": 8}


def weights(result: RunResult) -> dict[str, torch.Tensor]:
    return load_file(result.output / "model.safetensors")


def same_weights(one: RunResult, two: RunResult) -> bool:
    of_two = weights(two)
    return all(torch.equal(tensor, of_two[name]) for name, tensor in weights(one).items())


def told(lines: Sequence[StepLog]) -> list[Any]:
    """Take from the log what does not depend on the clock."""
    return [
        (line.step, line.loss, line.ce, line.teachers, line.grad_norm, line.tokens, _without_time(line))
        for line in lines
    ]


def _without_time(line: StepLog) -> Any:
    return None if line.samples is None else replace(line.samples, tokens_per_second=None)


def samples_in(output: Path) -> list[dict[str, Any]]:
    return [
        json.loads(line) for line in (output / "samples.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    ]


def test_without_a_share_a_run_has_the_bits_of_one_without_it(config, tmp_path: Path) -> None:
    more = {"grad_accumulation": 2, "max_steps": 4, "save_every": 2}
    plain = run(config({"output": str(tmp_path / "plain")}, **more))
    nothing = run(config({"on_policy": {"share": 0}}, **more))
    assert told(nothing.losses) == told(plain.losses)
    assert same_weights(nothing, plain)
    assert not (nothing.output / "samples.jsonl").exists()


def test_the_samples_are_learned_alone(config, monkeypatch: pytest.MonkeyPatch, tiny) -> None:
    """KD in full, no cross-entropy: what is learned is what the method says of the same batch by itself."""
    seen: list[AlignedBatch] = []
    real = DistillTrainer._student_sums

    def watched(self: Any, model: Any, batch: AlignedBatch, inputs: Any) -> Any:
        seen.append(batch)
        return real(self, model, batch, inputs)

    monkeypatch.setattr(DistillTrainer, "_student_sums", watched)
    settings = {
        "on_policy": SHORT,
        "teachers": [{"model": tiny.teacher, "divergence": "reverse-kl", "top_k": 40}],
    }
    result = run(config(settings, max_steps=1))
    (log,), (batch,) = result.losses, seen
    pair = TokenizerPair.from_names(tiny.teacher, tiny.student)
    method = Spelling(pair, top_k=40, divergence="reverse-kl")
    with torch.no_grad():
        out = method(
            batch.student_logits_at(model_of(tiny)), method.signal(load_model(tiny.teacher), batch), batch
        )
    assert log.ce is None
    assert log.loss == pytest.approx(out.kd.item(), rel=1e-5)
    assert log.samples is not None
    records = samples_in(result.output)
    assert (log.samples.share, log.samples.tokens) == (1.0, sum(each["tokens"] for each in records) / 4)
    sizes = [len(record["completion"].encode()) for record in records]
    assert log.samples.student_logprob == pytest.approx(
        -out.ce.item() * len(batch.labels) / sum(sizes), rel=1e-5
    )
    assert [record["row"] for record in records] == batch_numbers(config())


def batch_numbers(chosen: DistillConfig) -> list[int]:
    prepared = prepare(chosen, Rows(chosen.sources), lambda _: None)
    sampler = prepared.trainer(training_arguments(chosen, Path(chosen.output))).epoch_sampler()
    return [int(prepared.features.numbers[row]) for row in list(sampler)[: chosen.train.batch_size]]


def test_a_part_of_the_rows_is_sampled(config) -> None:
    settings = {"on_policy": {"share": 0.5, "max_new_tokens": 8, "samples_per_prompt": 2}}
    result = run(config(settings, batch_size=8, max_steps=3))
    for log in result.losses:
        assert log.samples is not None
        assert log.samples.share == 0.5
        assert log.ce is not None
        assert log.seconds is not None
        assert log.seconds.sampling > 0
    by_step: dict[int, list[dict[str, Any]]] = {}
    for record in samples_in(result.output):
        by_step.setdefault(record["step"], []).append(record)
    for records in by_step.values():
        assert len(records) == 4
        assert len({record["row"] for record in records}) == 2
        assert len({record["completion"] for record in records}) > 2, "samples of one prompt are not the same"


def test_a_plan_counts_the_samples(config) -> None:
    settings = {"share": 0.5, "max_new_tokens": 90, "buffer_steps": 2}
    plain, planned = plan(config(batch_size=4)), plan(config({"on_policy": settings}, batch_size=4))
    assert plain.sampling is None
    assert planned.sampling is not None
    assert (planned.sampling.per_step, planned.sampling.buffer_steps) == (2, 2)
    assert planned.sampling.prompts == plain.rows.trained
    assert planned.sampling.tokens == 90
    height = "student logits and their gradient"
    assert planned.memory[height] > plain.memory[height], "no answer in the data has 90 tokens"


def _dies_before_the_step(config: DistillConfig, step: int) -> None:
    real = OnPolicy.samples

    def killed(self: OnPolicy, drawn: Any) -> Any:
        calls.append(None)
        if len(calls) > step:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, drawn)

    calls: list[None] = []
    OnPolicy.samples = killed  # type: ignore[method-assign]
    run(config)


@pytest.mark.parametrize(("buffer_steps", "drawn"), [(1, 3), (3, 1)])
def test_a_process_that_is_killed_after_sampling_goes_on(
    config, tmp_path: Path, buffer_steps: int, drawn: int
) -> None:
    """A checkpoint may stand among steps whose samples were drawn together, from an earlier student."""
    more = {"max_steps": 5, "save_every": 2, "batch_size": 2, "grad_accumulation": 2}
    settings = {"on_policy": {**SHORT, "share": 0.7, "buffer_steps": buffer_steps}}
    whole = run(config(settings | {"output": str(tmp_path / "whole")}, **more))
    chosen = config(settings, **more)
    process = multiprocessing.get_context("fork").Process(target=_dies_before_the_step, args=(chosen, drawn))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    checkpoint = last_checkpoint(Path(chosen.output))
    assert checkpoint == Path(chosen.output) / "checkpoint-2"
    kept = json.loads((checkpoint / "samples-0.json").read_text(encoding="utf-8"))
    assert len(kept["drawn"]) == (2 if buffer_steps > 1 else 0)
    again = run(chosen, resume=True)
    assert samples_in(again.output) == samples_in(whole.output)
    assert told(again.losses) == told(whole.losses)
    assert same_weights(again, whole)


def test_a_run_that_loses_its_server_keeps_the_samples_of_the_step(config, tiny, tmp_path: Path) -> None:
    more = {"max_steps": 5, "save_every": 100}
    settings = {"on_policy": {**SHORT, "buffer_steps": 3}}
    with served_by(tiny) as (server, teacher):
        whole = run(config(settings | teacher | {"output": str(tmp_path / "whole")}, **more))
    with served_by(tiny) as (server, teacher):
        teacher["teachers"][0] |= {"patience": 0.5}
        chosen = config(settings | teacher, **more)
        real = DistillTrainer._answered

        def lost(self: DistillTrainer, batches: Any) -> bool:
            if self.state.global_step == 1:
                server.stop()
            return real(self, batches)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(DistillTrainer, "_answered", lost)
            patch.setattr(scoring_client, "FIRST_PAUSE", 0.05)
            with pytest.raises(ServerProblem):
                run(chosen)
    with served_by(tiny) as (server, teacher):
        again = run(config(settings | teacher, **more), resume=True)
    assert samples_in(again.output) == samples_in(whole.output)
    assert same_weights(again, whole)


@contextmanager
def served_by(tiny: Any) -> Iterator[tuple[ScoringServer, dict[str, Any]]]:
    """Serve the teacher, and give the settings of one that is."""
    model, tokenizer = load_model(tiny.teacher), load_tokenizer(tiny.teacher).tokenizer
    with ScoringServer(model, name="teacher", tokenizer=tokenizer, max_logprobs=50) as server:
        teacher = {"model": "teacher", "url": server.url, "top_k": 20, "tokenizer": tiny.teacher}
        yield server, {"teachers": [teacher]}


def test_a_server_says_of_samples_what_the_model_says(config, tiny) -> None:
    settings = {"on_policy": {**SHORT, "buffer_steps": 2, "share": 0.7, "samples_per_prompt": 2}}
    local = run(config(settings | {"teachers": [{"model": tiny.teacher, "top_k": 20}]}))
    with served_by(tiny) as (_, teacher):
        result = run(config(settings | teacher), overwrite=True)
    for one, two in zip(local.losses, result.losses, strict=True):
        assert two.loss == pytest.approx(one.loss, abs=2e-5)
        assert one.samples is not None
        assert two.samples is not None
        assert two.samples.teacher_logprobs == pytest.approx(one.samples.teacher_logprobs, abs=1e-4)


def test_packed_rows_held_out_rows_and_adapters(config) -> None:
    """Samples are batches like any other; held-out rows are the data's own, and change nothing."""
    settings = {"on_policy": {**SHORT, "share": 0.5}}
    plain = run(config(settings | {"eval": {"share": 0.3, "every": 2}}))
    assert [log.step for log in plain.evaluations] == [2, 4]
    first = samples_in(plain.output)[0]["completion"]
    packed = run(config(settings | {"eval": {"share": 0.3, "every": 2}}, pack=True), overwrite=True)
    assert packed.losses[0].loss == pytest.approx(plain.losses[0].loss, rel=1e-5)
    assert samples_in(packed.output)[0]["completion"] == first
    adapted = run(config(settings, lora={"rank": 4}), overwrite=True)
    assert adapted.losses[0].loss == pytest.approx(
        run(config(settings), overwrite=True).losses[0].loss, rel=1e-5
    )


# The teacher has other ids


def test_the_teacher_never_reads_an_id_of_the_student(config, tiny, tmp_path: Path) -> None:
    """Nearly all that the student samples are ids which the teacher's vocabulary does not have."""
    teacher = load_tokenizer(tiny.teacher)
    try:
        new_student("gpt2", "4m", tmp_path / "student")
    except SourceNotFound as error:
        pytest.skip(str(error))
    read: list[torch.Tensor] = []
    sampled: list[Sequence[int]] = []
    real, draw = Local.signal, OnPolicy.draw

    def drawn(self: OnPolicy, *arguments: Any) -> list[Drawn]:
        found = draw(self, *arguments)
        sampled.extend(ids for one in found for _, ids in one.samples)
        return found

    def watched(self: Local, batch: AlignedBatch, request: Any) -> Any:
        read.append(batch.teachers[0].inputs["input_ids"])
        return real(self, batch, request)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Local, "signal", watched)
        patch.setattr(OnPolicy, "draw", drawn)
        result = run(config({"student": str(tmp_path / "student"), "on_policy": SHORT}, max_steps=2))
    beyond = [token >= teacher.view.vocab_size for ids in sampled for token in ids]
    assert len(beyond) == 64
    assert sum(beyond) > 60
    assert all(int(ids.max()) < teacher.view.vocab_size for ids in read)
    assert all(record["completion"] for record in samples_in(result.output))


# Faults


def test_a_student_that_never_ends(config) -> None:
    result = run(config({"on_policy": {**SHORT, "temperature": 0}}, max_steps=1))
    (log,) = result.losses
    assert log.samples is not None
    records = samples_in(result.output)
    assert log.samples.ended == 0
    assert [record["tokens"] for record in records] == [8] * 4
    assert not any(record["ended"] for record in records)


@pytest.mark.parametrize("said", [[], "half"])
def test_samples_that_say_nothing(config, tiny, monkeypatch: pytest.MonkeyPatch, said: Any) -> None:
    side = prompts(tiny).student
    half = [nth for nth, spelled in enumerate(side.view.token_bytes) if spelled == "é".encode()[:1]]
    ids = half if said else [side.eos]

    def empty(_model: Any, many: Sequence[Any], *_: Any) -> list[list[int]]:
        return [ids for _ in many]

    monkeypatch.setattr(module, "sample_ids", empty)
    result = run(config({"on_policy": SHORT}, max_steps=2))
    for log in result.losses:
        assert np.isfinite(log.loss)
        assert log.samples is not None
        assert log.samples.ended == (not said)
        assert (log.loss > 0) == (not said), "half a character has no end that a teacher could judge"


def test_a_student_whose_logits_are_not_finite_is_told(config, tiny, tmp_path: Path) -> None:
    model, tokenizer = load_model(tiny.student), load_tokenizer(tiny.student)
    with torch.no_grad():
        model.get_input_embeddings().weight[:] = float("nan")
    save_model(model, tokenizer, tmp_path / "broken")
    with pytest.raises(NotFinite, match="what the student samples from is not finite at step 1"):
        run(config({"student": str(tmp_path / "broken"), "on_policy": SHORT}))


def test_prompts_that_leave_no_room(config, tiny) -> None:
    rows = [json.loads(line) for line in Path(tiny.data).read_text(encoding="utf-8").splitlines()]
    texts = Path(tiny.data).with_name("texts.jsonl")
    texts.write_text(
        "".join(json.dumps({"text": row["completion"]}) + "\n" for row in rows), encoding="utf-8"
    )
    with pytest.raises(BadOption, match="has a prompt that leaves room for a sample"):
        run(config({"data": {"path": str(texts)}, "on_policy": SHORT}))
    side = prompts(tiny).student
    lengths = sorted(len(side.view.encode(row["prompt"] + "\n").ids) + side.shift for row in rows)
    limit = lengths[12] + 1
    result = run(config({"data": {"max_length": limit}, "on_policy": {**SHORT, "max_new_tokens": 100}}))
    known = {row["prompt"]: len(side.view.encode(row["prompt"] + "\n").ids) + side.shift for row in rows}
    for record in samples_in(result.output):
        assert record["tokens"] == limit - known[record["prompt"]]


def test_chats_are_read_as_texts_without_a_template(config, tiny) -> None:
    rows = [json.loads(line) for line in Path(tiny.data).read_text(encoding="utf-8").splitlines()]
    chats = Path(tiny.data).with_name("chats.jsonl")
    lines = [
        {
            "messages": [
                {"role": "user", "content": row["prompt"]},
                {"role": "assistant", "content": row["completion"]},
            ]
        }
        for row in rows
    ]
    chats.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    of_chats = run(config({"data": {"path": str(chats)}, "on_policy": SHORT}, max_steps=2))
    of_texts = run(config({"on_policy": SHORT}, max_steps=2), overwrite=True)
    assert told(of_chats.losses) == told(of_texts.losses)


def test_what_cannot_judge_samples_is_told_before_a_run(config, tiny) -> None:
    with pytest.raises(BadSettings, match="on_policy is of no use without a teacher"):
        config({"teachers": [], "on_policy": {}})
    with pytest.raises(
        BadSettings, match=r"can be asked about new texts, of kind local or served: .* is cached"
    ):
        config({"teachers": [{"model": tiny.teacher, "cache": "cache"}], "on_policy": {}})
    own = {"model": tiny.teacher, "aligner": "entropy-dtw", "entropy": "models"}
    with pytest.raises(BadSettings, match="not for entropy: models"):
        config({"teachers": [own], "on_policy": {}})
    sampled = {"teachers": [{"model": tiny.teacher, "method": "sampled-reverse-kl"}]}
    with pytest.raises(
        BadSettings, match=r"learns from samples of the student alone: give on_policy\.share 1"
    ):
        config(sampled | {"on_policy": {"share": 0.9}})
    assert np.isfinite(run(config(sampled | {"on_policy": SHORT}, max_steps=2)).losses[-1].loss)
    with pytest.raises(BadSettings, match="sampled-reverse-kl says nothing of held-out rows"):
        config(sampled | {"on_policy": SHORT, "eval": {"share": 0.2}})
    with pytest.raises(BadSettings, match=r"train\.batch_tokens counts tokens of the data, not of samples"):
        config({"on_policy": SHORT}, batch_tokens=100)
    with pytest.raises(BadSettings, match=r"on_policy\.shares is no setting, did you mean share\?"):
        config({"on_policy": {"shares": 1}})


def test_a_checkpoint_without_samples_is_refused(config, tiny) -> None:
    run(config(max_steps=2, save_every=1))
    shutil.rmtree(Path(config().output) / "checkpoint-2")
    with pytest.raises(BadArtifact, match="its run had no `on_policy`"):
        run(config({"on_policy": SHORT}, max_steps=2, save_every=1), resume=True)
