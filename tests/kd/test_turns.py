"""Chats of several turns: what is learned of them on each side, for real templates."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import cache
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cdm_toolkit.errors import BadOption, UnsupportedTokenizer
from cdm_toolkit.hub.tokenizers import Loaded, load_tokenizer
from cdm_toolkit.kd import TokenizerPair
from cdm_toolkit.kd.aligned_rows import align_groups, truncate_aligned
from cdm_toolkit.kd.loss_sums import following_groups
from cdm_toolkit.kd.rows import Learn, Row, row_of
from cdm_toolkit.kd.tokenized_rows import TokenizedRow, TokenizerSide, tokenize_rows, tokenizer_side

SHARED = Path(__file__).parents[3] / "shared"
REAL = ("llama3", "qwen2", "mistral", "gemma2", "smollm2")
CHAT = [
    {"role": "user", "content": "Hi user"},
    {"role": "assistant", "content": "Hello, assistant here."},
    {"role": "user", "content": "How much is 2 + 2?"},
    {"role": "assistant", "content": "It is 4."},
    {"role": "user", "content": "Danke schön"},
    {"role": "assistant", "content": "Bye 🍎"},
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
WITH_TOOL = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "And the weather in Rome?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": '{"degrees": 20}'},
    {"role": "assistant", "content": "It is 20 degrees."},
]
TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
# Templates that know tools, as models of 2024 have them: calls as tagged JSON, and as bare JSON
TAGGED = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if m.role == 'tool' %}<tool_response>\n{{ m.content }}\n</tool_response>"
    "{% else %}{{ m.content }}{% for call in m.tool_calls or [] %}<tool_call>\n"
    "{{ call.function | tojson }}\n</tool_call>{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
HEADERS = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ 'ipython' if m.role == 'tool' else m.role }}"
    "<|end_header_id|>\n\n{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% elif m.role == 'tool' %}"
    "{{ m.content | tojson }}{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


@cache
def loaded(name: str, template: str | None = None) -> Loaded:
    if template:
        plain = loaded(name)
        tokenizer = copy.copy(plain.tokenizer)
        tokenizer.chat_template = template
        return replace(plain, tokenizer=tokenizer)
    folder = SHARED / "tokenizers" / name
    if name == "gemma2" and not folder.is_dir():
        pytest.skip(f"{folder} is not here")
    return load_tokenizer(str(folder) if name == "gemma2" else name)


def side_of(tokenizer: Loaded) -> TokenizerSide:
    return tokenizer_side(tokenizer.tokenizer, tokenizer.view)


def row_with(messages: list[dict[str, Any]], learn: Learn = "all", **more: Any) -> Row:
    return row_of(1, {"messages": messages, **more}, learn=learn)


def tokenized(tokenizer: Loaded, row: Row) -> TokenizedRow:
    return tokenize_rows(side_of(tokenizer), [row], "chat")[0]


def as_generated(tokenizer: Loaded, messages: list[dict[str, Any]], nth: int, **more: Any) -> tuple[int, int]:
    """Say where the answer `nth` lies if a model generated it: after the prompt before it, up to its end."""
    read = tokenizer.tokenizer
    prompt = read.apply_chat_template(messages[:nth], add_generation_prompt=True, return_dict=True, **more)[
        "input_ids"
    ]
    until = read.apply_chat_template(messages[: nth + 1], return_dict=True, **more)["input_ids"]
    assert until[: len(prompt)] == prompt
    ends = {read.eos_token_id, *read.convert_tokens_to_ids(["<|eot_id|>", "<|im_end|>", "<end_of_turn>"])}
    first_end = next(at for at in range(len(prompt), len(until)) if until[at] in ends)
    return len(prompt), first_end + 1


@pytest.mark.parametrize("name", REAL)
def test_labels_are_what_a_model_generates_in_each_turn(name: str) -> None:
    tokenizer = loaded(name)
    found = tokenized(tokenizer, row_with(CHAT))
    expected = [as_generated(tokenizer, CHAT, nth) for nth in (1, 3, 5)]
    assert found.turns.tolist() == [list(each) for each in expected]
    whole = tokenizer.tokenizer.apply_chat_template(CHAT, return_dict=True)["input_ids"]
    assert found.ids.tolist() == whole[: len(found.ids)]
    for message, (start, end) in zip(CHAT[1::2], found.turns, strict=True):
        assert tokenizer.tokenizer.decode(found.ids[start : end - 1]).strip() == message["content"]


@pytest.mark.parametrize("name", REAL)
def test_the_last_turn_alone(name: str) -> None:
    tokenizer = loaded(name)
    every, last = (tokenized(tokenizer, row_with(CHAT, learn)) for learn in ("all", "last"))
    assert last.turns.tolist() == every.turns[-1:].tolist()
    assert last.ids.tolist() == every.ids.tolist()


@pytest.mark.parametrize(("name", "template"), [("qwen2", TAGGED), ("llama3", HEADERS)])
def test_calls_of_tools_and_their_results_are_read_and_not_learned(name: str, template: str) -> None:
    tokenizer = loaded(name, template)
    found = tokenized(tokenizer, row_with(WITH_TOOL, tools=TOOLS))
    expected = [as_generated(tokenizer, WITH_TOOL, nth, tools=TOOLS) for nth in (1, 5)]
    assert found.turns.tolist() == [list(each) for each in expected]
    text = tokenizer.tokenizer.decode(found.ids)
    assert '"name": "weather"' in text
    assert "degrees" in text.split("It is")[0]


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("llama3", "leaves out the tool call in message 4 of the messages of row 1"),
        ("qwen2", "leaves out the tool call in message 4 of the messages of row 1"),
        ("smollm2", "leaves out the tool call in message 4 of the messages of row 1"),
        ("mistral", "leaves out the tool call in message 4 of the messages of row 1"),
        ("gemma2", "refuses the messages of row 1"),
    ],
)
def test_templates_that_do_not_know_tools_are_found_out(name: str, problem: str) -> None:
    with pytest.raises(UnsupportedTokenizer, match=problem):
        tokenized(loaded(name), row_with(WITH_TOOL, tools=TOOLS))


def test_a_result_that_is_left_out_is_found_out() -> None:
    template = HEADERS.replace("{{ m.content | tojson }}", "")
    with pytest.raises(UnsupportedTokenizer, match="leaves out the result of the tool in message 5"):
        tokenized(loaded("llama3", template), row_with(WITH_TOOL))


def test_a_template_that_writes_earlier_turns_otherwise_is_found_out() -> None:
    """As those do that drop what a model has thought in all turns but the last."""
    thinks = TAGGED.replace(
        "{{ m.content }}{% for", "{% if loop.last %}<think>\n{% endif %}{{ m.content }}{% for"
    )
    tokenizer = loaded("qwen2", thinks)
    with pytest.raises(
        UnsupportedTokenizer, match=r"message 2 .* otherwise where others follow it; learn the last"
    ):
        tokenized(tokenizer, row_with(CHAT))
    assert len(tokenized(tokenizer, row_with(CHAT, "last")).turns) == 1


@pytest.mark.parametrize("names", list(permutations(REAL, 2)), ids="-".join)
def test_both_sides_have_the_same_bytes_in_each_turn(names: tuple[str, str]) -> None:
    t, s = (loaded(name) for name in names)
    row = row_with(CHAT)
    of_t, of_s = tokenized(t, row), tokenized(s, row)
    groups = align_groups(of_t, of_s)
    aligned, _ = truncate_aligned(1, of_s, [(of_t, groups)], 512)
    kept = aligned.teachers[0].groups
    for nth, message in enumerate(CHAT[1::2]):
        (a_t, b_t), (a_s, b_s) = of_t.turns[nth], of_s.turns[nth]
        inside = kept[(kept[:, 2] >= a_s) & (kept[:, 3] <= b_s)]
        assert ((inside[:, 0] >= a_t) & (inside[:, 1] <= b_t)).all()
        spelled = {
            b"".join(view.token_bytes[i] or b"" for a, b in part for i in ids[a:b]).strip()
            for view, ids, part in (
                (t.view, of_t.ids, inside[:-1, :2]),
                (s.view, of_s.ids, inside[:-1, 2:]),
            )
        }
        assert spelled == {message["content"].encode()}
        assert inside[-1].tolist() == [b_t - 1, b_t, b_s - 1, b_s], "the ends of the turn"
    assert len(kept) == sum(((kept[:, 2] >= a) & (kept[:, 3] <= b)).sum() for a, b in of_s.turns)


def test_a_batch_reads_all_turns_and_no_group_follows_over_a_turn() -> None:
    t, s = loaded("llama3"), loaded("smollm2")
    pair = TokenizerPair.from_loaded(t, s)
    one_turn = {"prompt": "1 + 1", "completion": "It is 2."}
    rows = [{"messages": CHAT}, one_turn, {"messages": CHAT[:4]}]
    batch = pair.collate(rows, template="chat")
    (side,) = batch.teachers
    expected = []
    for number, fields in enumerate(rows, 1):
        each = tokenized(s, row_of(number, fields))
        expected += [(number - 1, at, int(each.ids[at])) for a, b in each.turns for at in range(a, b)]
    time = batch.student["input_ids"].shape[1]
    found = zip(
        batch.label_row.tolist(),
        (batch.label_positions % time + 1).tolist(),
        batch.labels.tolist(),
        strict=True,
    )
    assert list(found) == expected
    ids = batch.student["input_ids"].flatten()
    token = batch.label_positions[side.student_token_rows] + 1
    assert ids[token].tolist() == batch.labels[side.student_token_rows].tolist()
    follows = following_groups(batch, side)
    assert (~follows).sum() == 6, "one group begins each turn"
    assert follows.sum() == side.groups - 6


@pytest.mark.parametrize("max_length", range(24, 90, 5))
def test_a_long_chat_is_cut_within_any_turn(max_length: int) -> None:
    t, s = loaded("mistral"), loaded("smollm2")
    row = row_with(CHAT)
    of_t, of_s = tokenized(t, row), tokenized(s, row)
    cut, was_cut = truncate_aligned(1, of_s, [(of_t, align_groups(of_t, of_s))], max_length)
    (teacher,) = cut.teachers
    assert len(cut.student_ids) <= max_length
    assert was_cut == (len(cut.student_ids) < len(of_s.ids))
    whole = {at for a, b in of_s.turns for at in range(a, b)}
    labels = {at for a, b in cut.turns for at in range(a, b)}
    assert labels == {at for at in whole if at < len(cut.student_ids)}
    for t0, t1, s0, s1 in teacher.groups:
        assert t1 <= len(teacher.ids)
        assert set(range(s0, s1)) <= labels
        assert any(a <= t0 and t1 <= b for a, b in of_t.turns)


@pytest.mark.parametrize("names", [("gpt2", "mistral"), ("mistral", "gpt2")], ids="-".join)
def test_without_a_template_all_answers_of_the_text_are_learned(names: tuple[str, str]) -> None:
    t, s = (loaded(name) for name in names)
    batch = TokenizerPair.from_loaded(t, s).collate([{"messages": CHAT}])
    # a token that begins in an answer is a label: the line feed after one is not, unless a token joins them
    answers = [message["content"] for message in CHAT[1::2]]
    learned = s.tokenizer.decode(batch.labels[:-1])
    assert "".join(learned.split()) == "".join("".join(answers).split())
    with pytest.raises(BadOption, match="row 1 calls a tool, which only a template writes"):
        TokenizerPair.from_loaded(t, s).collate([{"messages": WITH_TOOL}])


def test_what_follows_the_last_answer_is_left_out() -> None:
    assert row_with([*CHAT, {"role": "user", "content": "more?"}]) == row_with(CHAT)


def test_shapes_of_tool_calls_are_one() -> None:
    """Arguments and tools as JSON in a string, fields that a table fills with None, and ShareGPT's call."""
    expected = row_with(WITH_TOOL, tools=TOOLS)
    function = {"name": "weather", "arguments": json.dumps({"city": "Rome"})}
    in_strings = [dict(message) for message in WITH_TOOL]
    in_strings[3] = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"type": "function", "function": function}],
    }
    assert row_with(in_strings, tools=json.dumps(TOOLS)) == expected
    from_table = [{"tool_calls": None, "name": None, **message} for message in WITH_TOOL]
    assert row_with(from_table, tools=TOOLS) == expected
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "gpt", "value": "Hello."},
        {"from": "human", "value": "And the weather in Rome?"},
        {"from": "function_call", "value": json.dumps(CALL["function"])},
        {"from": "observation", "value": '{"degrees": 20}'},
        {"from": "gpt", "value": "It is 20 degrees."},
    ]
    read = row_of(1, {"conversations": turns, "tools": json.dumps(TOOLS)})
    assert [message[:2] for message in read.messages] == [message[:2] for message in expected.messages]
    assert read.messages[3] == expected.messages[3]
    assert (read.earlier, read.tools) == ((1,), TOOLS)


def test_the_first_label_has_a_token_before_it() -> None:
    only = row_with([{"role": "assistant", "content": "Hello"}])
    found = tokenized(loaded("smollm2", "{% for m in messages %}{{ m.content }}{% endfor %}"), only)
    assert found.turns[0, 0] == 1
    assert np.array_equal(found.ids[found.turns[0, 0] :], found.ids[1:])
