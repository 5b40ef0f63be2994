"""The signal of a teacher in memory at the groups of a batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from cdm_toolkit.batching import Padding
from cdm_toolkit.distill.dataset import build_dataset
from cdm_toolkit.distill.sources import read_rows
from cdm_toolkit.hub.models import load_model
from cdm_toolkit.hub.students import new_student
from cdm_toolkit.hub.tokenizers import load_tokenizer
from cdm_toolkit.kd.aligned_rows import AlignedRow
from cdm_toolkit.kd.batch import AlignedBatch, Collator
from cdm_toolkit.kd.settings import Positions
from cdm_toolkit.kd.tokenized_rows import TeacherSide, TokenizerSide, tokenizer_side
from cdm_toolkit.kd.types import SignalRequest, TeacherSignal
from cdm_toolkit.teachers import Local

K = 7


def load_side(name: str) -> TokenizerSide:
    loaded = load_tokenizer(name)
    return tokenizer_side(loaded.tokenizer, loaded.view)


@pytest.fixture(scope="module")
def folder(small_models: Path) -> str:
    return str(small_models / "teacher")


@pytest.fixture(scope="module")
def features(small_models: Path, folder: str) -> list[AlignedRow]:
    student, teacher = load_side(str(small_models / "student")), load_side(folder)
    built, _ = build_dataset(read_rows("sample:train")[:4], student, [TeacherSide(teacher)])
    return list(built)


@pytest.fixture(scope="module")
def model(folder: str):
    return load_model(folder)


def batch_of(features: list[AlignedRow], padding: Padding = "right") -> AlignedBatch:
    return Collator((("t", "s"),), teacher_padding=padding)(features)


def signal(
    model, features: list[AlignedRow], padding: Padding, *, tokens: bool = False, mean: bool = False
) -> TeacherSignal:
    teacher = Local(model, vocab=model.config.vocab_size)
    return teacher.signal(batch_of(features, padding), SignalRequest(K, tokens, mean))


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("positions", ["boundary", "mean"])
def test_equals_each_row_by_itself(model, features: list[AlignedRow], positions: Positions, padding) -> None:
    """Right and left padding, batch 4 and 1: the same distributions."""
    expected = []
    for row in features:
        teacher = row.teachers[0]
        logits = model(torch.tensor([teacher.ids.tolist()])).logits[0].detach()
        for t0, t1 in teacher.groups[:, :2].tolist():
            read = logits[[t0 - 1]] if positions == "boundary" else logits[t0 - 1 : t1 - 1]
            expected.append(read.mean(0).log_softmax(-1))
    distributions = torch.stack(expected)
    top = signal(model, features, padding, mean=positions == "mean").top
    assert torch.allclose(top.logprobs, distributions.topk(K).values, atol=1e-5)
    assert torch.allclose(distributions.gather(1, top.ids), top.logprobs, atol=1e-5)
    assert not top.logprobs.requires_grad


@pytest.mark.parametrize("padding", ["right", "left"])
def test_whole_tokens(model, features: list[AlignedRow], padding) -> None:
    expected = []
    for row in features:
        teacher = row.teachers[0]
        ids = torch.tensor(teacher.ids.tolist())
        logprobs = model(ids[None]).logits[0].detach().log_softmax(-1)
        for t0, t1 in teacher.groups[:, :2].tolist():
            expected += [logprobs[place - 1, ids[place]].item() for place in range(t0, t1)]
    found = signal(model, features, padding, tokens=True)
    assert found.token_logprobs is not None
    assert found.token_logprobs.tolist() == pytest.approx(expected, abs=1e-4)
    plain = signal(model, features, padding)
    assert torch.equal(found.top.ids, plain.top.ids)
    assert torch.allclose(found.top.logprobs, plain.top.logprobs, atol=1e-5)


@pytest.mark.parametrize("tokens", [False, True])
def test_padded_embedding_rows_are_left_out(folder: str, features: list[AlignedRow], tokens: bool) -> None:
    model = load_model(folder)
    rows = model.config.vocab_size
    batch, request = batch_of(features), SignalRequest(K, token_logprobs=tokens)
    before = Local(model, vocab=rows).signal(batch, request)
    model.resize_token_embeddings(rows + 24)
    model.get_output_embeddings().weight.data[rows:] = 10 * model.get_output_embeddings().weight.data[:24]
    after = Local(model, vocab=rows).signal(batch, request)
    assert torch.equal(before.top.ids, after.top.ids)
    assert torch.allclose(before.top.logprobs, after.top.logprobs, atol=1e-5)
    if tokens:
        assert torch.allclose(before.token_logprobs, after.token_logprobs, atol=1e-5)  # type: ignore[arg-type]


def test_the_model_is_frozen(folder: str) -> None:
    model = load_model(folder).train()
    Local(model, vocab=model.config.vocab_size)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.fixture(scope="module")
def untied(folder: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Give the head weights of its own, so that it can lie elsewhere than the embedding."""
    model, copy = load_model(folder), tmp_path_factory.mktemp("untied")
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach() * 1.5)
    model.save_pretrained(copy)
    return str(copy)


@pytest.mark.parametrize("away", ["lm_head", "model.embed_tokens", "model.layers"])
@pytest.mark.parametrize(
    "request_", [SignalRequest(K), SignalRequest(K, token_logprobs=True, token_top=True)]
)
def test_parts_that_are_outside_of_memory_until_they_run(
    untied: str, features: list[AlignedRow], away: str, request_: SignalRequest
) -> None:
    """As a `device_map` of accelerate has it: the same hooks move what layers on several devices read."""
    parts = ("model.embed_tokens", "model.layers", "model.norm", "model.rotary_emb", "lm_head")
    whole = load_model(untied)
    model = load_model(untied, device_map={part: "disk" if part == away else "cpu" for part in parts})
    assert {p.device.type for p in model.parameters()} == {"cpu", "meta"}
    batch, vocab = batch_of(features), whole.config.vocab_size
    expected, found = (Local(each, vocab=vocab).signal(batch, request_) for each in (whole, model))
    assert torch.equal(found.top.ids, expected.top.ids)
    assert torch.equal(found.top.logprobs, expected.top.logprobs)
    if request_.token_top:
        assert torch.equal(found.token_logprobs, expected.token_logprobs)  # type: ignore[arg-type]
    Local(model, vocab=vocab).join()


def test_a_quantised_model(features: list[AlignedRow], tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    new_student(
        "smollm2", "1m", tmp_path, entries=900, seed=1
    )  # as `features` are, and of whole blocks of 64
    models = load_model(str(tmp_path)), load_model(str(tmp_path), quantization="4bit")
    expected, found = (signal(each, features, "right").top.logprobs for each in models)
    assert torch.isfinite(found).all()
    assert 0 < (expected - found).abs().mean() < 0.05
    assert not any(parameter.requires_grad for parameter in models[1].parameters())
