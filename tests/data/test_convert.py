from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from btrm_core.data.convert import Reading, convert_row, pairs_of
from btrm_core.data.formats import group_single_responses
from btrm_core.data.shapes.named import FORMATS
from btrm_core.data.shapes.naming import parse_naming
from btrm_core.data.shapes.text import transcript_turns
from btrm_core.data.shapes.values import RowError, shown
from btrm_core.data.shapes.view import RowView
from btrm_core.errors import ConfigError

USER = {"role": "user", "content": "Name a prime."}
GOOD = {"role": "assistant", "content": "7"}
BAD = {"role": "assistant", "content": "8"}
STANDARD = {"chosen": [USER, GOOD], "rejected": [USER, BAD]}


def one(row, **options):
    pairs = convert_row(row, **options)
    assert len(pairs) == 1
    return pairs[0]


def texts(row, **options):
    return [(pair.chosen, pair.rejected) for pair in convert_row(row, **options)]


@pytest.mark.parametrize(
    "row",
    [
        STANDARD,
        {"prompt": "Name a prime.", "chosen": "7", "rejected": "8"},
        {"prompt": [USER], "chosen": "7", "rejected": "8"},
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
        {"prompt": "Name a prime.", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], **STANDARD},
        {"question": "Name a prime.", "chosen": "7", "rejected": "8"},
        {"messages": [USER], "chosen": "7", "rejected": "8"},
        {"prompt": "Name a prime.", "messages": [USER, GOOD], **STANDARD},
        {"instruction": "Name a prime.", "input": "", "chosen": "7", "rejected": "8"},
        {"chosen": "\n\nHuman: Name a prime.\n\nAssistant: 7", "rejected": "\n\nHuman: Name a prime.\n\nAssistant: 8"},
        {"prompt": "\n\nHuman: Name a prime.\n\nAssistant:", "chosen": " 7", "rejected": " 8"},
        {
            "conversations": [{"from": "human", "value": "Name a prime."}],
            "chosen": {"from": "gpt", "value": "7"},
            "rejected": {"from": "gpt", "value": "8"},
        },
        {"prompt": "Name a prime.", "responses": ["8", "7"], "scores": [1, 2.5]},
        {"prompt": "Name a prime.", "answers": [{"answer": "7", "rank": 1}, {"answer": "8", "rank": 2}]},
        {
            "instruction": "Name a prime.",
            "completions": [{"response": "8", "overall_score": 3}, {"response": "7", "overall_score": 9}],
        },
        {"prompt": "Name a prime.", "response_a": "7", "response_b": "8", "winner": "a"},
        {"prompt": "Name a prime.", "response_a": "8", "response_b": "7", "winner": "model_b"},
        {"prompt": "Name a prime.", "response_0": "8", "response_1": "7", "better_response_id": 1},
        {"prompt": "Name a prime.", "response_1": "8", "response_2": "7", "winner": "2"},
        {"prompt": "Name a prime.", "response_1": "7", "response_2": "8", "preference_strength": -2},
        {"context": [USER], "response1": "8", "response2": "7", "overall_preference": 1},
        {"question": "Name a prime.", "answer_0": "7", "answer_1": "8", "score_0": 0.5, "score_1": -0.5},
        {"conversation_a": [USER, GOOD], "conversation_b": [USER, BAD], "winner": "model_a"},
    ],
)
def test_every_format_gives_the_same_pair(row):
    pair = one(row, name="file.jsonl", line=3, subset="file")
    assert (pair.prompt, pair.chosen, pair.rejected) == ([USER], "7", "8")
    assert (pair.id, pair.subset, pair.weight) == ("file.jsonl:3", "file", 1.0)
    assert (pair.margin is not None) == ("responses" in row or "completions" in row)
    assert pair.chosen_conversation == [USER, GOOD]
    assert pair.rejected_conversation == [USER, BAD]


def test_optional_keys():
    pair = one({**STANDARD, "id": 12, "subset": "math", "margin": 2, "weight": 0.5}, subset="file")
    assert (pair.id, pair.subset, pair.margin, pair.weight) == ("12", "math", 2.0, 0.5)
    assert one({**STANDARD, "id": None, "margin": None, "extra": object()}).id == "row:0"


def test_texts_are_kept_to_the_letter():
    pair = one({"prompt": " Hi\n", "chosen": " a ", "rejected": ""})
    assert (pair.prompt[0]["content"], pair.chosen, pair.rejected) == (" Hi\n", " a ", "")


def test_a_system_text_is_put_first_and_never_twice():
    system = {"role": "system", "content": "Be brief."}
    for row in (
        {"system": "Be brief.", "question": "Name a prime.", "chosen": "7", "rejected": "8"},
        {"system": "Be brief.", **STANDARD},
        {"system_prompt": "Be brief.", "prompt": [system, USER], "chosen": "7", "rejected": "8"},
    ):
        assert one(row).prompt == [system, USER]
    assert one({"system": "", **STANDARD}).prompt == [USER]


def test_instruction_and_input_are_joined():
    row = {"instruction": "Translate.", "input": "Haus", "chosen": "house", "rejected": "mouse"}
    assert one(row).prompt[0]["content"] == "Translate.\n\nHaus"


def test_several_turns():
    turns = [USER, GOOD, {"role": "user", "content": "Another."}]
    assert one({"chosen": [*turns, GOOD], "rejected": [*turns, BAD]}).prompt == turns
    text = "\n\nHuman: Name a prime.\n\nAssistant: 7\n\nHuman: Another.\n\nAssistant: "
    assert one({"chosen": text + "11", "rejected": text + "12"}).prompt == turns
    assert one({"prompt": [USER], "chosen": [GOOD, turns[2], GOOD], "rejected": [GOOD, turns[2], BAD]}).prompt == turns


def fails(row, kind, reason, bad=True, **options):
    with pytest.raises(RowError) as error:
        convert_row(row, **options)
    assert (error.value.kind, str(error.value), error.value.bad) == (kind, reason, bad)


@pytest.mark.parametrize(
    ("row", "kind", "reason"),
    [
        ({}, "missing key", "missing key 'chosen' (the row has nothing)"),
        ({"text": "a", "label": 1}, "missing key", "missing key 'chosen' (the row has text, label)"),
        ({"chosen": [USER, GOOD]}, "missing key", "missing key 'rejected' (the row has chosen)"),
        (
            {**STANDARD, "rejected": None},
            "missing key",
            "missing key 'rejected' (the row has chosen, rejected)",
        ),
        (
            {"chosen": "7", "rejected": "8"},
            "missing key",
            "missing key 'prompt': 'chosen' is text without its conversation",
        ),
        ({**STANDARD, "chosen": 7}, "wrong type", "'chosen' is 7 (int), expected a list of messages"),
        (
            {**STANDARD, "chosen": [USER, "7"]},
            "wrong type",
            "'chosen[1]' is '7', expected an object with 'role' and 'content'",
        ),
        (
            {**STANDARD, "rejected": [USER, {"role": "assistant", "content": None}]},
            "wrong type",
            "'rejected[1].content' is None (NoneType), expected text",
        ),
        (
            {**STANDARD, "rejected": [USER, {"role": "assistant"}]},
            "missing key",
            "missing key 'content' in 'rejected[1]'",
        ),
        (
            {**STANDARD, "chosen": [{"role": "judge", "content": "hi"}, GOOD]},
            "unknown role",
            "unknown role 'judge' in 'chosen[0]', expected system, user, assistant, tool; "
            "name it with --map role.judge=user",
        ),
        (
            {**STANDARD, "chosen": [{"from": "a judge", "value": "hi"}, GOOD]},
            "unknown role",
            "unknown role 'a judge' in 'chosen[0]', expected system, user, assistant, tool",
        ),
        (
            {**STANDARD, "rejected": [{"role": "user", "content": "Name a square."}, BAD]},
            "prompts differ",
            "'chosen' and 'rejected' differ before the last message: message 1 of 1",
        ),
        (
            {**STANDARD, "rejected": [USER, GOOD, USER, BAD]},
            "prompts differ",
            "'chosen' and 'rejected' differ before the last message: 1 messages against 3",
        ),
        (
            {"prompt": [{"role": "user", "content": "Other."}], **STANDARD},
            "prompts differ",
            "'prompt' is not the beginning of 'chosen'",
        ),
        ({**STANDARD, "chosen": []}, "empty conversation", "'chosen' is an empty list, expected messages"),
        (
            {"chosen": [GOOD], "rejected": [BAD]},
            "empty conversation",
            "'chosen' has no message before the answer",
        ),
        (
            {**STANDARD, "rejected": [USER, BAD, USER]},
            "last message not from the assistant",
            "the last message of 'rejected' is from 'user', expected 'assistant'",
        ),
        (
            {**STANDARD, "rejected": [USER, GOOD]},
            "chosen equals rejected",
            "'chosen' and 'rejected' are the same answer: '7'",
        ),
        ({**STANDARD, "margin": "big"}, "wrong type", "'margin' is 'big', expected a finite number"),
        ({**STANDARD, "margin": float("nan")}, "wrong type", "'margin' is nan (float), expected a finite number"),
        (
            {**STANDARD, "margin": 10**400},
            "wrong type",
            f"'margin' is 1{'0' * 36}... (int), expected a finite number",
        ),
        ({**STANDARD, "weight": True}, "wrong type", "'weight' is True (bool), expected a finite number"),
        ({**STANDARD, "weight": 0}, "wrong type", "'weight' is 0, expected a number above 0"),
        ({**STANDARD, "weight": 1e-46}, "wrong type", "'weight' is 1e-46, expected a number from 1e-09 to 1e+09"),
        ({**STANDARD, "weight": 1e308}, "wrong type", "'weight' is 1e+308, expected a number from 1e-09 to 1e+09"),
        ({**STANDARD, "margin": -1e300}, "wrong type", "'margin' is -1e+300, expected a number from -1e+09 to 1e+09"),
        (
            {"prompt": 5, "chosen": "7", "rejected": "8"},
            "wrong type",
            "'prompt' is 5 (int), expected text or a list of messages",
        ),
        ({"system": 5, **STANDARD}, "wrong type", "'system' is 5 (int), expected text"),
        (
            {"prompt": "a\ud800", "chosen": "7", "rejected": "8"},
            "not UTF-8",
            "the text holds half a surrogate pair (\\ud800)",
        ),
        ({"prompt": "a\udcff", "chosen": "7", "rejected": "8"}, "not UTF-8", "not UTF-8: byte 0xff in the text"),
        ({"prompt": "p", "responses": "ab"}, "wrong type", "'responses' is 'ab', expected a list of responses"),
        (
            {"prompt": "p", "responses": ["a", "b"], "scores": [1]},
            "wrong type",
            "'scores' is of length 1, expected 2, one a response",
        ),
        (
            {"prompt": "p", "responses": ["a", "b"], "scores": ["N/A", None]},
            "missing key",
            "no response has a score: 'scores' is ['N/A', None] (list)",
        ),
        (
            {"prompt": "p", "responses": ["a", "b"]},
            "missing key",
            "no score for 'responses[0]': expected 'scores' or a score in it",
        ),
        (
            {"prompt": "p", "completions": [{"score": 1}, {"score": 2}]},
            "missing key",
            "'completions[0]' has no text: expected one of response, text, content, answer, completion, output",
        ),
        (
            {"prompt": "p", "responses": ["a", "a"], "scores": [1, 2]},
            "chosen equals rejected",
            "'responses[1]' and 'responses[0]' are the same answer: 'a'",
        ),
        (
            {"prompt": "p", "response_a": "a", "response_b": "b", "winner": 0},
            "unknown winner",
            "'winner' is 0 (int), expected 'a', 'b' or 'tie'",
        ),
        (
            {"prompt": "p", "response_a": "a", "response_b": "b"},
            "missing key",
            "missing key 'winner' (the row has prompt, response_a, response_b)",
        ),
    ],
)
def test_bad_rows_say_what_and_where(row, kind, reason):
    fails(row, kind, reason)


def test_long_values_are_cut():
    with pytest.raises(RowError) as error:
        convert_row({**STANDARD, "chosen": "x" * 1000, "prompt": None})
    assert len(str(error.value)) < 120


def test_rows_without_a_preference_are_not_bad():
    ab = {"prompt": "p", "response_a": "a", "response_b": "b"}
    for winner in ("tie", "Tie (both bad)", "both_bad", "draw"):
        fails({**ab, "winner": winner}, "tie", "'response_a' and 'response_b' are tied, no preference", bad=False)
    row = {"prompt": "p", "responses": ["a", "b"], "scores": [3, 3]}
    fails(row, "tie", "all 2 responses have the score 3, no preference", bad=False)
    row = {"prompt": "p", "responses": ["a", "b"], "scores": [1, None]}
    fails(row, "only one response", "only one of the 2 responses has a score, nothing to compare", bad=False)
    row = {"prompt": "p", "responses": ["a"], "scores": [3]}
    fails(row, "only one response", "'responses' holds one response, nothing to compare", bad=False)


SCORED = {"id": "x", "prompt": "p", "responses": ["b", "a", "d", "c", "b2"], "scores": [3, 4, 1, 2, 3]}


def test_scored_responses():
    assert texts(SCORED) == [("a", "d")]
    each = convert_row(SCORED, scored="best-vs-each")
    assert [(pair.chosen, pair.rejected) for pair in each] == [("a", "b"), ("a", "b2"), ("a", "c"), ("a", "d")]
    assert [pair.id for pair in each] == ["x#0", "x#1", "x#2", "x#3"]
    assert [pair.weight for pair in each] == [0.25] * 4
    all_pairs = texts(SCORED, scored="all")
    assert len(all_pairs) == 9  # ten pairs of five responses, one of them tied
    assert ("b", "b2") not in all_pairs
    assert sum(pair.weight for pair in convert_row({**SCORED, "weight": 3}, scored="all")) == pytest.approx(3)


def test_equal_texts_among_several_scored_pairs_are_left_out():
    row = {"prompt": "p", "responses": ["a", "a", "b"], "scores": [3, 2, 1]}
    assert texts(row, scored="best-vs-each") == [("a", "b")]
    assert texts(row, scored="all") == [("a", "b"), ("a", "b")]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.text(max_size=3), st.integers(0, 4)), min_size=2, max_size=6))
def test_every_pair_of_scored_responses_prefers_the_higher_score(responses):
    row = {"prompt": "p", "responses": [f"{i}{text}" for i, (text, _) in enumerate(responses)]}
    row["scores"] = [score for _, score in responses]
    by_text = dict(zip(row["responses"], row["scores"], strict=True))
    expected = sum(a > b for a in row["scores"] for b in row["scores"])
    for scored in ("best-vs-worst", "best-vs-each", "all", "random"):
        if not expected:
            with pytest.raises(RowError, match="no preference"):
                convert_row(row, scored=scored)
            continue
        pairs = convert_row(row, scored=scored)
        assert all(by_text[pair.chosen] - by_text[pair.rejected] == pair.margin > 0 for pair in pairs)
        assert sum(pair.weight for pair in pairs) == pytest.approx(1)
        if scored == "random":
            assert len(pairs) == 1
            continue
        if scored == "all":
            assert len(pairs) == expected
        else:
            assert {by_text[pair.chosen] for pair in pairs} == {max(row["scores"])}
        assert min(row["scores"]) in {by_text[pair.rejected] for pair in pairs}


def test_random_pairs_are_drawn_alike_in_every_run_and_evenly():
    row = {"prompt": "p", "responses": ["a", "b", "c"], "scores": [3, 2, 1]}
    assert texts(row, scored="random") == texts({"id": "7", **row, "prompt": "q"}, scored="random")
    rows = [{"prompt": "p", "responses": [f"a{n}", f"b{n}", f"c{n}"], "scores": [3, 2, 1]} for n in range(300)]
    drawn = Counter(
        (w[0], r[0], convert_row(one, scored="random")[0].margin)
        for one in rows
        for w, r in texts(one, scored="random")
    )
    assert set(drawn) == {("a", "b", 1.0), ("a", "c", 2.0), ("b", "c", 1.0)}
    assert min(drawn.values()) > 70  # 100 each, give or take 8


def test_ranks_are_no_margins_unless_asked_for():
    ranked = {"prompt": "p", "answers": [{"answer": "a", "rank": 1}, {"answer": "b", "rank": 7}]}
    assert convert_row(ranked)[0].margin is None
    view = RowView(ranked, parse_naming(["margin=scores"]))
    assert pairs_of(view, Reading(naming=view.naming))[0].margin == 6.0


FORMS = {
    "standard": {"prompt": "p", "chosen": "a", "rejected": "b"},
    "hh": {"chosen": "\n\nHuman: p\n\nAssistant: a", "rejected": "\n\nHuman: p\n\nAssistant: b"},
    "sharegpt": {
        "conversations": [{"from": "human", "value": "p"}],
        "chosen": {"from": "gpt", "value": "a"},
        "rejected": {"from": "gpt", "value": "b"},
    },
    "rewardbench": {"prompt": "p", "chosen": "a", "rejected": "b", "subset": "x"},
    "rewardbench2": {"prompt": "p", "chosen": ["a"], "rejected": ["b"]},
    "ms-swift": {
        "messages": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}],
        "rejected_response": "b",
    },
    "output-list": {"instruction": "p", "output": ["a", "b"]},
    "scored": {"prompt": "p", "responses": ["b", "a"], "scores": [1, 2]},
    "ultrafeedback": {
        "instruction": "p",
        "completions": [{"response": "b", "overall_score": 1}, {"response": "a", "overall_score": 2}],
    },
    "helpsteer": {"prompt": "p", "responses": ["b", "a"], "scores": [1, 2]},
    "helpsteer3": {
        "context": [{"role": "user", "content": "p"}],
        "response1": "a",
        "response2": "b",
        "overall_preference": -2,
    },
    "ranks": {"prompt": "p", "responses": ["b", "a"], "ranks": [2, 1]},
    "nectar": {"prompt": "p", "answers": [{"answer": "b", "rank": 2}, {"answer": "a", "rank": 1}]},
    "summarize": {"info": {"post": "p"}, "summaries": [{"text": "b"}, {"text": "a"}], "choice": 1},
    "arena": {
        "conversation_a": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "a"}],
        "conversation_b": [{"role": "user", "content": "p"}, {"role": "assistant", "content": "b"}],
        "winner": "model_a",
    },
    "versus": {"prompt": "p", "response_a": "b", "response_b": "a", "winner": "b"},
    "argilla": {"instruction": "p", "chosen_response": "a", "rejected_response": "b", "chosen_avg_rating": 5.0},
    "openai": {
        "input": {"messages": [{"role": "user", "content": "p"}], "tools": []},
        "preferred_output": [{"role": "assistant", "content": "a"}],
        "non_preferred_output": [{"role": "assistant", "content": "b"}],
    },
    "alpacafarm": {"instruction": "p", "input": "", "output_1": "b", "output_2": "a", "preference": 2},
    "pku": {"prompt": "p", "response_0": "b", "response_1": "a", "better_response_id": 1},
    "shp": {"history": "p", "human_ref_A": "b", "human_ref_B": "a", "labels": 0},
}


def as_format(row, form):
    naming = parse_naming([], form)
    return [(p.chosen, p.rejected) for p in pairs_of(RowView(row, naming), Reading(naming=naming))]


def test_every_format_has_a_name_under_which_its_rows_are_read_alike():
    assert list(FORMS) == list(FORMATS)
    for form, row in FORMS.items():
        assert as_format(row, form) == texts(row)[:1] == [("a", "b")]


def test_a_named_format_is_read_and_no_other():
    both = {**FORMS["standard"], "completions": FORMS["ultrafeedback"]["completions"][::-1], "id": 1}
    both["chosen"] = "other"
    assert texts(both) == [("other", "b")]
    assert as_format(both, "ultrafeedback") == [("a", "b")]
    naming = parse_naming([], "ultrafeedback")
    view = RowView(both, naming)
    pairs_of(view, Reading(naming=naming))
    assert view.unused == ["chosen", "rejected"]
    with pytest.raises(
        RowError, match=r"not of the format 'shp': missing key 'human_ref_A' \(the row has prompt, chosen"
    ):
        as_format(both, "shp")
    assert parse_naming(["format=shp"]).format == "shp"
    with pytest.raises(
        ConfigError, match=r"format 'ultrafedback' is unknown, expected one of standard, .*Did you mean"
    ):
        parse_naming([], "ultrafedback")


def test_neighbouring_single_responses_are_joined():
    def row(prompt, response, score):
        return {"prompt": prompt, "response": response, "helpfulness": score, "verbosity": 1}

    rows = [row("p", "a", 1), row("p", "b", 3), row("q", "c", 2), {"prompt": "x", "chosen": "c", "rejected": "d"}]
    joined = list(group_single_responses(enumerate([*rows, row("q", "d", 4)], start=1)))
    assert [(line, number) for line, number, _ in joined] == [(1, 2), (3, 1), (4, 1), (5, 1)]
    assert texts(joined[0][2]) == [("b", "a")]
    no_prompt = [{"response": "a", "score": 1}, {"response": "b", "score": 2}]
    assert [number for _, number, _ in group_single_responses(enumerate(no_prompt))] == [1, 1]
    fails(joined[1][2], "only one response", "'responses' holds one response, nothing to compare", bad=False)


contents = st.text(max_size=12)
turns = st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "assistant"]), contents
    ),
    min_size=1,
    max_size=4,
)


@settings(max_examples=50, deadline=None)
@given(st.booleans(), turns, contents, contents)
def test_standard_rows_round_trip(has_system, prompt, chosen, rejected):
    prompt = [{"role": "system", "content": "s"}, *prompt] if has_system else prompt
    sides = [[*prompt, {"role": "assistant", "content": text}] for text in (chosen, rejected)]
    row = {"chosen": sides[0], "rejected": sides[1]}
    if not any(message["content"].strip() for message in prompt if message["role"] != "system"):
        fails(row, "empty prompt", "the prompt of 'chosen' holds nothing but space")
        return
    if chosen == rejected:
        fails(row, "chosen equals rejected", f"'chosen' and 'rejected' are the same answer: {shown(chosen)}")
        return
    pair = one(row)
    assert [pair.chosen_conversation, pair.rejected_conversation] == sides
    assert one(json.loads(json.dumps(row))) == pair
    if prompt[-1]["role"] != "assistant":  # the same pair in the explicit form
        assert one({"prompt": prompt, "chosen": chosen, "rejected": rejected}) == pair


def transcript(messages):
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[message['role']]}: {message['content']}" for message in messages)


plain = (
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
    .map(str.strip)
    .filter(lambda text: "Human:" not in text and "Assistant:" not in text)
)
plain_turns = st.lists(
    st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "assistant"]), plain),
    max_size=4,
)


@settings(max_examples=50, deadline=None)
@given(plain, plain_turns)
def test_transcripts_round_trip(first, rest):
    messages = [{"role": "user", "content": first}, *rest]
    names = {"human": "user", "assistant": "assistant"}
    turns = [{"role": names[who], "content": content} for who, content in transcript_turns(transcript(messages))]
    assert turns == messages


@settings(max_examples=50, deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["role", "content", "from", "value", "score", "text"]), inner, max_size=3)
        ),
    ),
    st.sampled_from(["chosen", "prompt", "rejected", "responses", "scores", "margin", "id", "system", "winner"]),
)
def test_any_json_value_is_converted_or_refused_with_a_reason(value, key):
    rows = (
        STANDARD,
        {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]},
        {"prompt": "p", "response_a": "a", "response_b": "b", "winner": "a"},
    )
    for row in rows:
        reason = refusal({**row, key: value})
        assert reason is None or (reason and "\n" not in reason)


def refusal(row):
    try:
        assert convert_row(row)
    except RowError as error:
        return f"{error.kind}: {error}"
    return None
