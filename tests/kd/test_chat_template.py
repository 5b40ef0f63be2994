"""Chats rendered by a tokenizer's own template: the text, and where the contents are in it."""

from __future__ import annotations

import pickle

import pytest

from cdm_toolkit.errors import UnsupportedTokenizer
from cdm_toolkit.hub.tokenizers import Loaded, load_tokenizer
from cdm_toolkit.kd import TokenizerPair
from cdm_toolkit.kd.chat_template import ChatTemplate, chat_template

CHAT = [
    {"role": "user", "content": "Wie heißt user?"},
    {"role": "assistant", "content": "assistant 🍎"},
    {"role": "user", "content": " user "},
    {"role": "assistant", "content": "ok\n"},
]
LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)


def loaded(name: str, template: str | None = None) -> Loaded:
    found = load_tokenizer(name)
    if template:
        found.tokenizer.chat_template = template
    return found


def template_of(tokenizer: Loaded) -> ChatTemplate | None:
    return chat_template(tokenizer.tokenizer, tokenizer.view.name)


@pytest.mark.parametrize(("name", "template"), [("smollm2", None), ("mistral", LLAMA2)])
def test_the_text_is_what_transformers_makes_and_contents_are_where_they_are(
    name: str, template: str | None
) -> None:
    tokenizer = loaded(name, template)
    of_tokenizer = template_of(tokenizer)
    assert of_tokenizer
    rendered = of_tokenizer.render(CHAT)
    assert rendered.text == tokenizer.tokenizer.apply_chat_template(CHAT, tokenize=False)
    text = rendered.text.encode()
    for message, content, whole in zip(CHAT, rendered.contents, rendered.whole, strict=True):
        assert content
        assert whole
        assert text[slice(*content)].decode() == message["content"].strip()
        kept = message["content"] if template is None else message["content"].strip()
        assert text[slice(*whole)].decode().rstrip(" ") == kept.rstrip(" ")
    assert rendered.contents[0] != rendered.contents[2]


def test_a_template_goes_to_other_processes_as_text() -> None:
    template = template_of(loaded("smollm2"))
    assert template
    copy = pickle.loads(pickle.dumps(template))
    assert copy == template
    assert copy.render(CHAT) == template.render(CHAT)
    assert dict(template.tokens)["eos_token"] == "<|im_end|>"


def test_what_a_template_leaves_out_has_no_place() -> None:
    only_last = ChatTemplate("short", "{{ messages[-1]['content'] }}", ())
    assert only_last.render(CHAT).contents == (None, None, None, (0, 2))


def test_tokenizers_without_a_usable_template_are_named() -> None:
    plain = loaded("gpt2")
    assert template_of(plain) is None
    with pytest.raises(UnsupportedTokenizer, match=r"gpt2.*no chat template"):
        TokenizerPair(plain.tokenizer, plain.tokenizer, names=("gpt2", "gpt2")).align_chat(CHAT)
    plain.tokenizer.chat_template = {"a": LLAMA2, "b": LLAMA2}  # type: ignore[assignment]
    with pytest.raises(UnsupportedTokenizer, match="none of which is the default"):
        template_of(plain)


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("{{ raise_exception('no system here') }}", "refuses these messages: no system here"),
        ("{% for m in messages %}", "refuses these messages"),
        (
            "{% for m in messages %}{{ m['content'] | upper }}{% endfor %}",
            "rewrites the content of message 1",
        ),
    ],
)
def test_templates_that_cannot_be_used(source: str, problem: str) -> None:
    with pytest.raises(UnsupportedTokenizer, match=problem):
        ChatTemplate("broken", source, ()).render(CHAT)
