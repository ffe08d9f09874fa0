from __future__ import annotations

import hashlib
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.chat_samples import (
    CHATML,
    CHATML_TEMPLATE,
    HEADERS,
    HEADERS_TEMPLATE,
    INST_TEMPLATE,
    KINDS,
    TURNS_TEMPLATE,
    Plugin,
    byte_tokenizer,
    chat_format,
    family,
    metaspace_tokenizer,
)
from transformers import AutoTokenizer

from btrm_core.chat.format import EncodedResponses, prepare_chat
from btrm_core.errors import CheckpointError, DataError, FamilyError
from btrm_core.families.family import Family
from btrm_core.families.hookspecs import PadToken, hookimpl
from btrm_core.model.load import chat_from_checkpoint


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def system(content: str) -> dict[str, str]:
    return {"role": "system", "content": content}


def reference(chat, conversation):
    return chat.tokenizer.apply_chat_template(
        conversation, chat_template=chat.template, tokenize=True, return_dict=False
    )


def controls(chat, ids):
    return [i for i in ids if i in chat.control_ids]


PROMPT = [system("Be brief."), user("One?"), assistant("1."), user("Two, please. " * 5)]


# prepare_chat


def test_prepared_format_of_a_model_with_bos_and_reserved_tokens():
    chat = chat_format("headers")
    tokenizer = chat.tokenizer
    assert (chat.bos_id, chat.terminal_token) == (tokenizer.bos_token_id, "<|eot_id|>")
    assert chat.pad.token == "<|reserved_0|>"
    assert (chat.pad_id, tokenizer.pad_token_id, chat.num_new_tokens) == (2, 2, 0)
    assert (tokenizer.padding_side, tokenizer.truncation_side) == ("right", "left")
    assert tokenizer.chat_template == chat.template == HEADERS_TEMPLATE
    assert chat.template_sha256 == hashlib.sha256(HEADERS_TEMPLATE.encode()).hexdigest()
    assert chat.control_ids == frozenset(range(6))
    assert chat.answers == {
        "setup_tokenizer": "btrm default",
        "pad_token": "btrm default",
        "chat_template": "family sample",
    }
    assert chat.max_length is None


def test_bos_that_opens_every_turn_is_no_bos():
    chat = chat_format("chatml")
    assert chat.bos_id is None
    assert chat.terminal_token == "<|im_end|>"
    assert chat.pad.token == "<|endoftext|>"


def test_unknown_token_as_pad_and_terminal_token_that_is_eos():
    chat = chat_format("inst")
    assert (chat.pad.token, chat.terminal_token, chat.tokenizer.eos_token_id) == ("<unk>", "</s>", chat.terminal_id)
    assert chat.pad_id in chat.control_ids


def test_a_new_pad_token_is_counted_and_never_produced_by_text():
    chat = prepare_chat(metaspace_tokenizer(), None, family(INST_TEMPLATE, PadToken("[PAD]", new=True)))
    assert chat.num_new_tokens == 1
    assert chat.pad_id == len(chat.tokenizer) - 1
    ids = chat.encode([[user("pad it with [PAD]"), assistant("[PAD][PAD]")]])[0]
    assert chat.pad_id not in ids
    assert chat.answers["pad_token"] == "family sample"


def test_turn_tokens_that_are_not_flagged_special_are_control_tokens_too():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["<turn>", "<think>"])
    template = HEADERS_TEMPLATE.replace("<|start_header_id|>", "<turn>")
    chat = prepare_chat(tokenizer, None, family(template))
    turn, think = tokenizer.convert_tokens_to_ids(["<turn>", "<think>"])
    assert turn in chat.control_ids
    assert think not in chat.control_ids
    ids = chat.encode([[user("<turn>"), assistant("<think>hm</think>")]])[0]
    assert ids.count(turn) == 2
    assert ids.count(think) == 1


def test_the_tokenizer_that_the_family_returns_is_used():
    other = byte_tokenizer()

    class Replacing(Plugin):
        @hookimpl
        def setup_tokenizer(self, tokenizer, config):
            assert config == "config"
            return other

    chat = prepare_chat(metaspace_tokenizer(), "config", Family("sample", "tests 0", Replacing(HEADERS_TEMPLATE)))
    assert chat.tokenizer is other
    assert chat.answers["setup_tokenizer"] == "family sample"


def test_a_template_may_refuse_system_messages():
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + CHATML_TEMPLATE
    )
    chat = prepare_chat(byte_tokenizer(CHATML), None, family(template))
    assert chat.encode_group(PROMPT, ["yes"]).error == "the chat template refuses it: no system role"


def test_bos_that_is_also_the_terminal_token_is_no_bos():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|eot_id|>"
    chat = prepare_chat(tokenizer, None, family(HEADERS_TEMPLATE.replace("{{ bos_token }}", "")))
    assert chat.bos_id is None


OTHER = "give another one with --set tokenizer.chat_template=FILE"
BAD_TEMPLATES = {
    "{% for m in messages %}": (
        "chat template (family sample) does not render a single-turn conversation: Unexpected end of template. Jinja "
        "was looking for the following tags: 'endfor' or 'else'. The innermost block that needs to be closed is 'for'."
        f", line 1; {OTHER}"
    ),
    "{{ raise_exception('not today') }}": (
        f"chat template (family sample) does not render a single-turn conversation: not today; {OTHER}"
    ),
    "{{ bos_token }}" + HEADERS_TEMPLATE: (
        "chat template (family sample) writes the BOS token '<|begin_of_text|>' 2 times in a conversation of one "
        f"exchange and 2 times in one of two, expected exactly once, at the beginning; {OTHER}"
    ),
    HEADERS_TEMPLATE.replace("{{ bos_token }}", "").replace("{{ m.role }}", "{{ bos_token }}{{ m.role }}"): (
        "chat template (family sample) writes the BOS token '<|begin_of_text|>' 2 times in a conversation of one "
        f"exchange and 4 times in one of two, expected exactly once, at the beginning; {OTHER}"
    ),
    HEADERS_TEMPLATE.replace("<|eot_id|>", "<|eot_id|>\n"): (
        "chat template (family sample) ends a conversation in '\\n', expected a control token such as "
        f"'<|end_of_text|>' with nothing after it; {OTHER}"
    ),
    HEADERS_TEMPLATE + "{% if messages|length > 2 %}<|end_of_text|>{% endif %}": (
        "chat template (family sample) ends conversations in different tokens ('<|end_of_text|>', '<|eot_id|>'), "
        f"expected one; {OTHER}"
    ),
    HEADERS_TEMPLATE.replace("messages %}", "messages if m.role != 'system' %}"): (
        "chat template (family sample) loses or changes a system message of a system conversation, expected "
        f"'Answer in few words.' in its place; {OTHER}"
    ),
    HEADERS_TEMPLATE.replace("| trim", "| upper"): (
        "chat template (family sample) loses or changes a user message of a single-turn conversation, expected "
        f"'What is one plus two?' in its place; {OTHER}"
    ),
    HEADERS_TEMPLATE.replace("<|start_header_id|>", "<|reserved_0|>"): (
        "chat template (family sample) writes the pad token '<|reserved_0|>', expected one that never occurs in data; "
        "name another one with --set tokenizer.pad_token=TOKEN"
    ),
    HEADERS_TEMPLATE.replace("<|eot_id|>", "<|reserved_0|>"): (
        "pad token '<|reserved_0|>' is the terminal token of the chat template (family sample), expected a distinct "
        "one; name another one with --set tokenizer.pad_token=TOKEN"
    ),
    "{{ strftime_now('%d') }}" + HEADERS_TEMPLATE: (
        "chat template (family sample) prints today's date (strftime_now), so ids would change from day to day; "
        + OTHER
    ),
}


@pytest.mark.parametrize("template", BAD_TEMPLATES)
def test_templates_that_break_their_promise_are_refused(template):
    with pytest.raises(FamilyError) as caught:
        prepare_chat(byte_tokenizer(), None, family(template))
    assert str(caught.value) == BAD_TEMPLATES[template]


def test_a_comment_about_the_date_is_no_date():
    chat = prepare_chat(byte_tokenizer(), None, family("{# no strftime_now here #}" + HEADERS_TEMPLATE))
    assert chat.bos_id == 0


def test_no_template_anywhere_is_refused_and_names_the_setting():
    with pytest.raises(FamilyError, match=r"tokenizer\.chat_template"):
        prepare_chat(byte_tokenizer(), None, family(None))


def test_pad_that_is_eos_is_refused():
    with pytest.raises(FamilyError, match="end-of-sequence token"):
        prepare_chat(byte_tokenizer(CHATML), None, family(CHATML_TEMPLATE, PadToken("<|im_end|>")))


# encode

CONVERSATIONS = [
    [user("Hello, how are you?"), assistant("I'm doing great.")],
    [*PROMPT, assistant("2.")],
    [user("  spaces   around  "), assistant("\n\nnew lines\n\n")],
    [user(""), assistant("")],
    [assistant("no question")],
    [user("Übermut 你好 🙂 \u200d \x00 \ufeff"), assistant("e\u0301 \U0010fffd \U000f0000")],
    [user("x" * 3000), assistant("1 2 3")],
]


@pytest.mark.parametrize("kind", KINDS)
def test_plain_conversations_have_the_ids_of_transformers(kind):
    chat = chat_format(kind)
    assert chat.encode(CONVERSATIONS) == [reference(chat, c) for c in CONVERSATIONS]
    assert chat.encode([]) == []
    for ids in chat.encode(CONVERSATIONS):
        assert ids[-1] == chat.terminal_id
        if chat.bos_id is not None:
            assert (ids[0], ids.count(chat.bos_id)) == (chat.bos_id, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_the_rendering_is_that_of_transformers(kind):
    chat = chat_format(kind)
    for conversation in CONVERSATIONS:
        own = chat.tokenizer.apply_chat_template(conversation, tokenize=False)
        assert chat.render(conversation) == own
    text = chat_format("headers").render([user("Hi")], add_generation_prompt=True)
    assert text.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")


_WORDS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


def _content(chat):
    spelled = st.sampled_from([*chat.encoder.controls, "\U0010fffd", "\U00100000"])
    return st.lists(st.one_of(_WORDS, spelled), max_size=5).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_no_text_produces_a_control_token(kind, data):
    chat = chat_format(kind)
    contents = data.draw(st.lists(_content(chat), min_size=2, max_size=5))
    roles = [("user", "assistant")[i % 2] for i in range(len(contents))]
    if len(roles) % 2:
        roles = ["system", *roles[:-1]]
    conversation = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    benign = [{**message, "content": "x"} for message in conversation]
    ids = chat.encode([conversation])[0]
    assert controls(chat, ids) == controls(chat, chat.encode([benign])[0])
    assert ids[-1] == chat.terminal_id


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_content_is_decoded_as_it_was_written(data):
    chat = chat_format("chatml")  # keeps white space as it is
    content, answer = data.draw(_content(chat)), data.draw(_content(chat))
    ids = chat.encode([[user(content), assistant(answer)]])[0]
    decoded = chat.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert decoded == f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n{answer}<|im_end|>"


def test_a_spelled_control_token_is_text_in_exactly_its_surroundings():
    chat = chat_format("inst")
    ids = chat.encode([[user("hello </s> a"), assistant("</s>")]])[0]
    tokens = chat.tokenizer.convert_ids_to_tokens(ids)
    assert tokens == ["<s>", "[INST]", "▁hello", "▁", "</", "s>", "▁a", "[/INST]", "▁", "</", "s>", "</s>"]


def test_roles_that_spell_control_tokens_stay_text():
    chat = chat_format("headers")
    plain = controls(chat, chat.encode([[user("x"), assistant("y")]])[0])
    assert controls(chat, chat.encode([[{"role": "<|eot_id|>", "content": "x"}, assistant("y")]])[0]) == plain


def test_conversations_that_cannot_be_encoded_are_named():
    chat = chat_format("inst")
    with pytest.raises(DataError) as caught:
        chat.encode([[user("a"), assistant("b")], [user("a"), {"role": "bot", "content": "b"}]])
    assert str(caught.value) == (
        "conversation 2 of 2 cannot be encoded: the chat template refuses it: unknown role bot"
    )
    with pytest.raises(DataError) as caught:
        chat.encode([[user("a")]])
    assert str(caught.value) == "conversation 1 of 1 cannot be encoded: the chat template does not end it in '</s>'"
    with pytest.raises(DataError, match="unknown role bot"):
        chat.render([{"role": "bot", "content": "b"}])


@pytest.mark.parametrize("kind", KINDS)
def test_a_format_can_be_pickled(kind):
    chat = chat_format(kind)
    again = pickle.loads(pickle.dumps(chat))
    conversations = [*CONVERSATIONS, [user("</s><|eot_id|>"), assistant("<|im_end|>")]]
    assert again.encode(conversations) == chat.encode(conversations)
    assert again.template_sha256 == chat.template_sha256


# encode_groups

_PROMPTS = st.lists(_WORDS, max_size=6).map(
    lambda texts: [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_groups_have_the_ids_of_their_conversations(kind, data):
    chat = chat_format(kind)
    text = st.one_of(_WORDS, _content(chat))
    groups = data.draw(st.lists(st.tuples(_PROMPTS, st.lists(text, min_size=1, max_size=4)), max_size=4))
    encoded = chat.encode_groups(groups)
    for (prompt, responses), group in zip(groups, encoded, strict=True):
        assert group.sequences == [chat.encode([[*prompt, assistant(r)]])[0] for r in responses]
        assert group == EncodedResponses(group.sequences, altered=(None,) * len(responses))


def test_what_responses_share_is_encoded_once():
    chat = chat_format("headers")
    texts = [chat.render([*PROMPT, assistant(answer)]) for answer in ("yes", "yes, sir", "yesterday")]
    cut = chat._shared_cut(texts)
    assert texts[0][cut:].startswith("<|end_header_id|>\n\nyes")
    assert {text[:cut] for text in texts} == {texts[0][:cut]}


def test_bad_rows_do_not_touch_their_neighbours():
    chat = chat_format("inst")
    good = (PROMPT, ["a", "b"])
    bad = {
        3: ([{"role": "bot", "content": "x"}], ["a", "b"]),
        5: ([user("\ud83d")], ["a", "b"]),
        6: ([user("x")], ["a", "\udc00</s>"]),
        9: ([{"role": "user", "content": None}], ["a"]),
    }
    groups = [bad.get(i, good) for i in range(12)]
    encoded = chat.encode_groups(groups)
    expected = chat.encode_group(*good)
    assert [i for i, group in enumerate(encoded) if group.error] == sorted(bad)
    assert all(group == expected for i, group in enumerate(encoded) if i not in bad)
    assert encoded[3] == EncodedResponses([], error="the chat template refuses it: unknown role bot")
    assert encoded[5].error == encoded[6].error == "text is not valid Unicode (half of a surrogate pair)"
    assert encoded[9].error == "a message is not text"


# over-long groups


def test_oldest_exchanges_go_first_and_the_system_message_stays():
    chat = chat_format("headers")
    turns = [user("one " * 20), assistant("two " * 20), user("three " * 20), assistant("four"), user("five")]
    prompt = [system("Be brief."), *turns]
    full = chat.encode_group(prompt, ["six", "six and seven"])
    limit = max(map(len, full.sequences)) - 1
    shorter = chat.encode_group(prompt, ["six", "six and seven"], limit)
    assert (shorter.dropped_turns, shorter.cut_characters, shorter.error) == (2, 0, None)
    kept = [system("Be brief."), *turns[2:]]
    assert shorter.sequences == chat.encode([[*kept, assistant("six")], [*kept, assistant("six and seven")]])
    least = max(map(len, chat.encode([[*prompt[:1], user("five"), assistant("six and seven")]])))
    assert chat.encode_group(prompt, ["six", "six and seven"], least).dropped_turns == 4


def test_then_the_last_user_message_is_cut_from_the_left_then_the_system_message():
    chat = chat_format("headers")
    prompt = [system("abcdefgh " * 10), user("old"), assistant("old"), user("0123456789 " * 30)]
    only = chat.encode([[system("abcdefgh " * 10), user(""), assistant("yes")]])[0]
    cut = chat.encode_group(prompt, ["yes", "no"], len(only) + 40)
    assert cut.dropped_turns == 2
    assert 0 < cut.cut_characters < 330
    kept = [prompt[0], user(prompt[-1]["content"][cut.cut_characters :])]
    assert cut.sequences == chat.encode([[*kept, assistant("yes")], [*kept, assistant("no")]])
    more = chat.encode_group(prompt, ["yes", "no"], len(only) - 20)
    assert 330 < more.cut_characters < 330 + 90
    kept = [system(prompt[0]["content"][more.cut_characters - 330 :]), user("")]
    assert more.sequences == chat.encode([[*kept, assistant("yes")], [*kept, assistant("no")]])


def test_a_long_answer_is_never_cut():
    chat = chat_format("inst")
    group = chat.encode_group(PROMPT, ["short", "long " * 100], 64)
    assert group == EncodedResponses([], error="answer longer than max_length 64")


def test_messages_without_a_role_do_not_stop_the_run():
    chat = chat_format("headers")
    assert chat.encode_group([{"content": "x" * 100}], ["y"], 20).error == "answer longer than max_length 20"


def test_a_conversation_without_a_question_cannot_be_shortened():
    chat = chat_format("headers")
    assert chat.encode_group([], ["a" * 100], 20).error == "answer longer than max_length 20"
    assert chat.encode_group([assistant("b" * 100)], ["a"], 20).error == "answer longer than max_length 20"


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_what_fits_is_within_the_limit_and_has_one_prompt(kind, data):
    chat = chat_format(kind)
    prompt = data.draw(_PROMPTS)
    if data.draw(st.booleans()):
        prompt = [system(data.draw(_WORDS)), *prompt]
    responses = data.draw(st.lists(_content(chat), min_size=1, max_size=3))
    limit = data.draw(st.integers(5, 90))
    full = chat.encode_group(prompt, responses)
    group = chat.encode_group(prompt, responses, limit)
    if max(map(len, full.sequences)) <= limit:
        assert group == full
        return
    if group.error:
        assert group.error == f"answer longer than max_length {limit}"
        return
    assert group.dropped_turns or group.cut_characters
    assert all(len(ids) <= limit and ids[-1] == chat.terminal_id for ids in group.sequences)
    head = [message for message in prompt[:1] if message["role"] == "system"]
    rest = prompt[len(head) + group.dropped_turns :]
    asked = len(rest[0]["content"]) if rest and rest[0]["role"] == "user" else 0
    cut_user = min(asked, group.cut_characters)
    rest = [{**m, "content": m["content"][cut_user:]} if i == 0 and asked else m for i, m in enumerate(rest)]
    head = [{**m, "content": m["content"][group.cut_characters - cut_user :]} for m in head]
    assert group.sequences == chat.encode([[*head, *rest, assistant(r)] for r in responses])


def test_a_checkpoint_s_own_maximum_holds_unless_another_is_named():
    chat = pickle.loads(pickle.dumps(chat_format("headers")))
    chat.max_length = 40
    assert max(map(len, chat.encode_group(PROMPT, ["ok"]).sequences)) <= 40
    assert max(map(len, chat.encode_group(PROMPT, ["ok"], 4096).sequences)) > 40


# chat_from_checkpoint


def save(chat, directory, **manifest):
    chat.tokenizer.save_pretrained(directory)
    (directory / "chat_template.jinja").write_text(chat.template, encoding="utf-8")
    (directory / "btrm.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_encodes_as_it_was_trained(kind, tmp_path):
    chat = chat_format(kind)
    save(
        chat,
        tmp_path,
        template_sha256=chat.template_sha256,
        terminal_token=chat.terminal_token,
        max_length=512,
        other=1,
    )
    again = chat_from_checkpoint(tmp_path)
    conversations = [*CONVERSATIONS, [user("</s><|eot_id|>"), assistant("<|im_end|>")]]
    assert again.encode(conversations) == chat.encode(conversations)
    assert (again.pad_id, again.bos_id, again.terminal_id) == (chat.pad_id, chat.bos_id, chat.terminal_id)
    assert (again.control_ids, again.anchors) == (chat.control_ids, chat.anchors)
    assert (again.max_length, again.num_new_tokens) == (512, 0)
    assert set(again.answers.values()) == {"checkpoint"}


def test_a_checkpoint_with_a_new_pad_token(tmp_path):
    chat = prepare_chat(metaspace_tokenizer(), None, family(INST_TEMPLATE, PadToken("[PAD]", new=True)))
    chat.tokenizer.save_pretrained(tmp_path)
    again = chat_from_checkpoint(str(tmp_path))
    assert (again.pad_id, again.num_new_tokens, again.max_length) == (chat.pad_id, 0, None)
    assert again.template == chat.template


def test_directories_that_are_no_checkpoint_are_refused(tmp_path):
    chat = chat_format("headers")
    with pytest.raises(CheckpointError) as caught:
        chat_from_checkpoint(tmp_path)
    assert str(caught.value) == f"{tmp_path} holds no tokenizer, expected a model directory written by `btrm train`"
    save(chat, tmp_path, template_sha256="0" * 64)
    with pytest.raises(CheckpointError) as caught:
        chat_from_checkpoint(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: template_sha256 is '{chat.template_sha256}', but the model was trained with '{'0' * 64}' "
        "(btrm.json); put the original tokenizer and chat template back"
    )
    save(chat, tmp_path, terminal_token="</s>")
    with pytest.raises(
        CheckpointError,
        match="terminal_token is '<|eot_id|>', but the model was trained with '</s>'".replace("|", r"\|"),
    ):
        chat_from_checkpoint(tmp_path)
    (tmp_path / "btrm.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"btrm\.json is not valid JSON"):
        chat_from_checkpoint(tmp_path)
    (tmp_path / "btrm.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("{{ nonsense( }}")
    with pytest.raises(CheckpointError, match=r"chat template \(checkpoint\) does not render"):
        chat_from_checkpoint(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be loaded"):
        chat_from_checkpoint(tmp_path)


def test_checkpoints_without_template_or_pad_are_refused(tmp_path):
    tokenizer = byte_tokenizer(HEADERS)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        chat_from_checkpoint(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path} has no chat template, expected the text in chat_template.jinja; put it there"
    )
    (tmp_path / "chat_template.jinja").write_text(HEADERS_TEMPLATE)
    (tmp_path / "btrm.json").write_text("{}")  # btrm's own models have one; those of other trainers need none
    with pytest.raises(CheckpointError) as caught:
        chat_from_checkpoint(tmp_path)
    assert str(caught.value) == (
        f"{tmp_path}: the tokenizer names no pad token, expected pad_token in tokenizer_config.json"
    )


REAL = {
    "llama3": HEADERS_TEMPLATE,
    "gemma": TURNS_TEMPLATE,
    "qwen3": CHATML_TEMPLATE,
    "mistral-v1": INST_TEMPLATE,
    "mistral-v3": INST_TEMPLATE,
}
MODEL_TYPES = {"gem": "gemma", "lla": "llama", "qwe": "qwen3", "mis": "mistral"}


@pytest.mark.hub
@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers_keep_their_ids_through_a_checkpoint(name, real_tokenizers, tmp_path):
    original = AutoTokenizer.from_pretrained(real_tokenizers / name)
    plain = CONVERSATIONS[:-1]
    expected = [
        original.apply_chat_template(c, chat_template=REAL[name], tokenize=True, return_dict=False) for c in plain
    ]
    chat = prepare_chat(original, None, family(REAL[name]))
    assert chat.encode(plain) == expected
    save(chat, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": MODEL_TYPES[name[:3]]}))
    again = chat_from_checkpoint(tmp_path)
    spelled = " a ".join([*list(chat.encoder.controls)[:9], *list(chat.encoder.controls)[-9:]])
    groups = [(PROMPT, ["yes", "no"]), ([user(spelled)], ["\n" + spelled, "b"])]
    encoded = again.encode_groups(groups)
    assert again.encode(plain) == expected
    assert encoded == chat.encode_groups(groups)
    assert (again.pad_id, again.bos_id, again.terminal_id) == (chat.pad_id, chat.bos_id, chat.terminal_id)
    benign = chat.encode_group([user("x")], ["y", "z"])
    assert [controls(chat, ids) for ids in encoded[1].sequences] == [controls(chat, ids) for ids in benign.sequences]
    if chat.bos_id is not None:
        assert all(ids.count(chat.bos_id) == 1 for group in encoded for ids in group.sequences)
