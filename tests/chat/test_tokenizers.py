from __future__ import annotations

import hashlib
import json
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import processes
from support.chat_samples import (
    CHATML,
    HEADERS,
    TEXTS,
    byte_tokenizer,
    make_chat,
    metaspace_tokenizer,
    unigram_tokenizer,
)
from transformers import AddedToken, AutoTokenizer, LlamaTokenizer

from btrm_core.chat.tokenizers import (
    Encoder,
    fast_backend,
    install_pad,
    rename_tokens,
    self_contained,
    tokenizer_fingerprint,
)
from btrm_core.errors import FamilyError
from btrm_core.families.hookspecs import PadToken, TinyShape
from btrm_core.model.toy import toy_tokenizer

MAKERS = {"bytes": byte_tokenizer, "metaspace": metaspace_tokenizer, "unigram": unigram_tokenizer}


def encoder(tokenizer) -> Encoder:
    added = tokenizer.added_tokens_decoder
    return Encoder(fast_backend(tokenizer), {str(token): i for i, token in added.items() if token.special})


# toy_tokenizer


def test_toy_tokenizer_has_the_tokens_of_its_shape_first():
    tokenizer = toy_tokenizer(HEADERS, TEXTS, vocab_size=400)
    names = [*HEADERS.special_tokens.values(), *HEADERS.control_tokens]
    assert [tokenizer.convert_tokens_to_ids(name) for name in names] == list(range(len(names)))
    assert all(tokenizer.added_tokens_decoder[i].special for i in range(len(names)))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|begin_of_text|>", "<|end_of_text|>")
    assert tokenizer.pad_token is None
    assert tokenizer.unk_token is None
    assert 256 + len(names) < len(tokenizer) <= 400


def test_toy_tokenizer_has_a_pad_token_only_if_the_shape_names_one():
    tokenizer = toy_tokenizer(TinyShape("gemma", special_tokens={"pad_token": "<pad>", "bos_token": "<bos>"}), [])
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == ("<pad>", 0)


def test_toy_tokenizer_never_has_fewer_tokens_than_bytes_and_control_tokens():
    assert len(toy_tokenizer(HEADERS, [], vocab_size=1)) == 256 + 6


@given(st.text())
@settings(max_examples=50, deadline=None)
def test_toy_tokenizer_loses_nothing(text):
    tokenizer = _TINY
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False) == text


_TINY = byte_tokenizer()


def _digest(tokenizer) -> str:
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def _printed_digest() -> None:
    print(hash("text"), _digest(byte_tokenizer()))


def test_toy_tokenizer_is_the_same_in_another_process():
    text, digest = processes.ended(_printed_digest).stdout.split()
    assert int(text) != hash("text"), "another hash seed"
    assert digest == _digest(byte_tokenizer())


def test_toy_tokenizer_survives_saving(tmp_path):
    tokenizer = toy_tokenizer(CHATML, TEXTS, vocab_size=400)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = "<|im_start|>user\n" + TEXTS[3] + "<|im_end|>"
    assert again(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.all_special_ids == tokenizer.all_special_ids
    assert _digest(again) == _digest(tokenizer)


def test_tokenizer_fingerprint_is_of_the_ids_alone():
    chat = make_chat()
    first = tokenizer_fingerprint(chat.tokenizer)
    assert tokenizer_fingerprint(pickle.loads(pickle.dumps(chat.tokenizer))) == first
    assert tokenizer_fingerprint(make_chat().tokenizer) == first
    copy = pickle.loads(pickle.dumps(chat.tokenizer))
    copy(["a", "a b c"], padding=True, truncation=True, max_length=2)  # leaves its settings in the backend
    assert tokenizer_fingerprint(copy) == first
    copy.add_tokens(["quick brown"])
    assert tokenizer_fingerprint(copy) != first


# self_contained


def llama_tokenizer():
    """A tokenizer of a class that builds its backend anew when it is loaded."""
    model = json.loads(metaspace_tokenizer().backend_tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return LlamaTokenizer(
        vocab=model["vocab"],
        merges=merges,
        legacy=True,
        extra_special_tokens=["[INST]", "[/INST]"],
        model_max_length=99,
    )


def test_a_self_contained_tokenizer_comes_back_with_the_same_ids(tmp_path):
    text = "<s>[INST] hello a [/INST]hello</s>"
    original = llama_tokenizer()
    expected = original(text, add_special_tokens=False)["input_ids"]
    plain = self_contained(original)
    assert plain(text, add_special_tokens=False)["input_ids"] == expected
    assert plain(text)["input_ids"] == original(text)["input_ids"]
    assert plain.special_tokens_map == original.special_tokens_map
    assert set(plain.all_special_ids) == set(original.all_special_ids)
    plain.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert again(text, add_special_tokens=False)["input_ids"] == expected
    assert again.model_max_length == 99


def test_a_tokenizer_of_the_generic_class_is_self_contained():
    tokenizer = byte_tokenizer()
    assert self_contained(tokenizer) is tokenizer


# install_pad


def test_pad_from_the_vocabulary_needs_no_new_token():
    tokenizer = byte_tokenizer()
    size = len(tokenizer)
    assert install_pad(tokenizer, PadToken("<|reserved_0|>"), "family x") == 0
    assert (tokenizer.pad_token, tokenizer.pad_token_id, len(tokenizer)) == ("<|reserved_0|>", 2, size)


def test_new_pad_is_added_at_the_end_and_survives_saving(tmp_path):
    tokenizer = metaspace_tokenizer()
    size = len(tokenizer)
    assert install_pad(tokenizer, PadToken("[PAD]", new=True), "family x") == 1
    assert (tokenizer.pad_token_id, len(tokenizer)) == (size, size + 1)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert (again.pad_token, again.pad_token_id) == ("[PAD]", size)


def test_pad_that_was_an_ordinary_added_token_becomes_a_control_token():
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken("<unused0>", special=False, normalized=False)])
    assert install_pad(tokenizer, PadToken("<unused0>"), "family x") == 0
    assert tokenizer.added_tokens_decoder[tokenizer.pad_token_id].special


def test_unknown_token_pads_where_bytes_spell_everything():
    tokenizer = metaspace_tokenizer()
    assert install_pad(tokenizer, PadToken("<unk>"), "family x") == 0
    assert tokenizer.pad_token_id == 0


@pytest.mark.parametrize(
    ("make", "pad", "message"),
    [
        (
            byte_tokenizer,
            PadToken("<pad>"),
            "pad token '<pad>' (family x) is not in the vocabulary; name another one with "
            "--set tokenizer.pad_token=TOKEN",
        ),
        (
            byte_tokenizer,
            PadToken("<|end_of_text|>"),
            "pad token '<|end_of_text|>' (family x) is the end-of-sequence token, expected a distinct one; "
            "name another one with --set tokenizer.pad_token=TOKEN",
        ),
        (
            byte_tokenizer,
            PadToken("<|begin_of_text|>"),
            "pad token '<|begin_of_text|>' (family x) is the beginning-of-sequence token, expected a distinct one; "
            "name another one with --set tokenizer.pad_token=TOKEN",
        ),
        (
            byte_tokenizer,
            PadToken("!"),
            "pad token '!' (family x) is an ordinary piece of text in this vocabulary, expected a control or "
            "reserved token; name another one with --set tokenizer.pad_token=TOKEN",
        ),
        (
            unigram_tokenizer,
            PadToken("<unk>"),
            "pad token '<unk>' (family x) stands for unknown characters in this vocabulary, so it occurs in data; "
            "name another one with --set tokenizer.pad_token=TOKEN",
        ),
    ],
)
def test_unfit_pads_are_refused(make, pad, message):
    with pytest.raises(FamilyError) as caught:
        install_pad(make(), pad, "family x")
    assert str(caught.value) == message


def test_a_tokenizer_without_fast_backend_is_refused():
    with pytest.raises(FamilyError) as caught:
        fast_backend(object())
    assert str(caught.value) == (
        "tokenizer object has no fast backend, expected one with a tokenizer.json; convert it once with transformers "
        "and save it, or return a fast tokenizer from the setup_tokenizer hook"
    )


# rename_tokens and Encoder


@pytest.mark.parametrize("kind", MAKERS)
def test_a_renamed_copy_has_the_same_ids_and_forgets_the_old_names(kind):
    tokenizer = MAKERS[kind]()
    controls = encoder(tokenizer).controls
    names = {text: f"\U0010fffd{chr(0xF0000 + n)}" for n, text in enumerate(controls)}
    copy = rename_tokens(tokenizer.backend_tokenizer, names)
    for old, new in names.items():
        assert copy.token_to_id(new) == controls[old]
        assert copy.token_to_id(old) is None
        assert copy.encode(f"a{new}b").ids == tokenizer(f"a{old}b", add_special_tokens=False)["input_ids"]
        assert not (set(controls.values()) - {tokenizer.unk_token_id}) & set(copy.encode(f"hello {old}").ids)


def test_a_tokenizer_that_cannot_tell_text_from_control_tokens_is_refused():
    tokenizer = byte_tokenizer()
    names = {"<|eot_id|>": "!"}  # an alias that is text itself
    with pytest.raises(FamilyError) as caught:
        rename_tokens(tokenizer.backend_tokenizer, names)
    assert str(caught.value) == (
        "tokenizer cannot keep the text '<|eot_id|>' apart from its control token; expected control tokens that are "
        "added tokens of tokenizer.json; fix it in the setup_tokenizer hook"
    )


_ENCODERS = {kind: encoder(make()) for kind, make in MAKERS.items()}
_PLAIN = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n<>|[]/s")), max_size=30)


@pytest.mark.parametrize("kind", MAKERS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_text_without_control_tokens_has_the_same_ids_on_both_paths(kind, data):
    enc = _ENCODERS[kind]
    pieces = data.draw(st.lists(st.one_of(_PLAIN, st.sampled_from(sorted(enc.controls))), max_size=6))
    text = "".join(pieces)
    assert enc.encode_hidden(text, {}) == enc.encode([text])[0]


@pytest.mark.parametrize("kind", MAKERS)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_spelled_control_tokens_stay_text(kind, data):
    enc = _ENCODERS[kind]
    alphabet = st.one_of(_PLAIN, st.sampled_from([*enc.controls, "\U0010fffd", "\U00100000", "\U0010fffd\U000f0000"]))
    content = "".join(data.draw(st.lists(alphabet, max_size=6)))
    hidden, marks = enc.hide([{"role": "user", "content": content}])
    assert not enc.spells_control(hidden[0]["content"])
    ids = enc.encode_hidden("<s>" + hidden[0]["content"] + "</s>", marks)
    unknown = enc.controls.get("<unk>")
    expected = [enc.controls[t] for t in ("<s>", "</s>") if t in enc.controls]
    assert [i for i in ids if i in enc.controls.values() and i != unknown] == [i for i in expected if i != unknown]


def test_spelled_control_tokens_are_decoded_as_written():
    enc = _ENCODERS["metaspace"]
    content = "hello </s> and [INST]</s>[/INST] a <s>"
    hidden, marks = enc.hide([{"role": "user", "content": content}])
    ids = enc.encode_hidden("<s>" + hidden[0]["content"] + "</s>", marks)
    assert (ids[0], ids[-1]) == (1, 2)
    assert enc.backend.decode(ids[1:-1], skip_special_tokens=False) == content


def test_what_a_call_left_in_the_backend_changes_nothing():
    tokenizer = byte_tokenizer()
    enc = encoder(tokenizer)
    before = enc.encode(["hello there <|eot_id|>", "a"])
    tokenizer.pad_token = "<|reserved_0|>"
    tokenizer(["hello there", "a"], truncation=True, max_length=2, padding="max_length", split_special_tokens=True)
    assert enc.encode(["hello there <|eot_id|>", "a"]) == before


def test_an_encoder_can_be_pickled_and_leaves_its_copies_behind():
    enc = encoder(byte_tokenizer())
    hidden, marks = enc.hide([{"role": "user", "content": "<|eot_id|>"}])
    ids = enc.encode_hidden(hidden[0]["content"], marks)
    again = pickle.loads(pickle.dumps(enc))
    assert not again._copies
    assert again.encode_hidden(hidden[0]["content"], marks) == ids


def test_few_copies_are_kept():
    enc = encoder(byte_tokenizer())
    taken = ""
    for n in range(6):
        enc.encode_hidden(f"<|eot_id|>{taken}", {})
        taken += chr(0x10FFFD - n)
    assert 1 <= len(enc._copies) <= 4


@pytest.mark.hub
@pytest.mark.parametrize(
    "name", ["llama3-first", "llama3", "llama3.1", "gemma", "gemma3", "qwen3", "mistral-v1", "mistral-v3"]
)
def test_real_tokenizers_encode_equally_on_both_paths(name, real_tokenizers):
    tokenizer = AutoTokenizer.from_pretrained(real_tokenizers / name)
    enc = encoder(tokenizer)
    text = "".join([*TEXTS, *list(enc.controls)[:20], "a b", *list(enc.controls)[-20:], "  \n\n c\t", *TEXTS])
    assert enc.encode_hidden(text, {}) == enc.encode([text])[0]
    spelled = " a ".join(enc.controls)
    hidden, marks = enc.hide([{"role": "user", "content": spelled}])
    ids = enc.encode_hidden(hidden[0]["content"], marks)
    assert not set(ids) & set(enc.controls.values())
    assert tokenizer.decode(ids, skip_special_tokens=False) == spelled
