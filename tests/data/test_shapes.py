"""Every shape in which people bring rows, and what each must become."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from btrm_core.data.convert import Pair, Reading, conversations_of, pairs_of
from btrm_core.data.shapes.naming import Naming, parse_naming
from btrm_core.data.shapes.values import RowError, json_value
from btrm_core.data.shapes.view import RowView
from btrm_core.errors import ConfigError


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def bot(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


Q = [user("q")]
CALL = '<tool_call>\n{"name": "f", "arguments": "22"}\n</tool_call>'
LLAMA3 = "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nq<|eot_id|>{}"
LLAMA3_ANSWER = "<|start_header_id|>assistant<|end_header_id|>\n\n"


def read(row: dict[str, Any], naming: Naming | None = None, **reading: Any) -> tuple[list[Pair], RowView]:
    view = RowView(row, naming)
    return pairs_of(view, Reading(**reading, naming=naming or Naming())), view


def one(row: dict[str, Any], naming: Naming | None = None) -> tuple[list[dict[str, str]], str, str]:
    (pair,), _ = read(row, naming)
    return pair.prompt, pair.chosen, pair.rejected


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (  # content parts
            {
                "chosen": [
                    {"role": "user", "content": [{"type": "text", "text": "q"}]},
                    {"role": "assistant", "content": [{"type": "text", "text": "a"}, {"text": "b", "image": None}]},
                ],
                "rejected": [user("q"), bot("c")],
            },
            (Q, "ab", "c"),
        ),
        (  # tools in the middle
            {
                "chosen": [
                    *(user("q"), bot("", tool_calls=[{"function": {"name": "f", "arguments": "22"}, "id": "1"}])),
                    *({"role": "tool", "content": "42"}, bot("a")),
                ],
                "rejected": [
                    *(user("q"), bot("", tool_calls=[{"function": {"name": "f", "arguments": "22"}, "id": "2"}])),
                    *({"role": "ipython", "content": "42"}, bot("b")),
                ],
            },
            ([*Q, bot(CALL), {"role": "tool", "content": "42"}], "a", "b"),
        ),
        (  # a call is the answer
            {
                "prompt": Q,
                "chosen": [{"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": "22"}]}],
                "rejected": [bot("", tool_calls=[{"name": "f", "arguments": "99"}])],
            },
            (Q, CALL, CALL.replace("22", "99")),
        ),
        (  # ShareGPT with calls
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": [
                    {"from": "function_call", "value": '{"name": "f"}'},
                    *[{"from": "observation", "value": "4"}],
                ],
                "rejected": {"from": "gpt", "value": "b"},
            },
            RowError,
        ),
        ({"chosen": [{"role": "Human", "content": "q"}, bot("a")], "rejected": [user("q"), bot("b")]}, (Q, "a", "b")),
        (
            {
                "chosen": [{"role": "developer", "content": "s"}, user("q"), {"role": "model", "content": "a"}],
                "rejected": [system("s"), {"role": "User", "content": "q"}, {"role": "bot", "content": "b"}],
            },
            ([system("s"), *Q], "a", "b"),
        ),
        (
            {
                "conversations": [{"from": "user", "value": "q"}],
                "chosen": {"from": "assistant", "value": "a"},
                "rejected": {"from": "gpt", "value": "b"},
            },
            (Q, "a", "b"),
        ),
        (
            {
                "instruction": "And?",
                "input": "",
                "chosen": "a",
                "rejected": "b",
                "history": [["One?", "1"], ["q", "2"]],
            },
            ([user("One?"), bot("1"), user("q"), bot("2"), user("And?")], "a", "b"),
        ),
        (
            {"prompt": "And?", "chosen": "a", "rejected": "b", "history": '[["One?", "1"]]'},
            ([user("One?"), bot("1"), user("And?")], "a", "b"),
        ),
        (
            {"prompt": "And?", "chosen": "a", "rejected": "b", "history": [user("One?"), bot("1")], "system": "s"},
            ([system("s"), user("One?"), bot("1"), user("And?")], "a", "b"),
        ),
        ({"instruction": "i", "input": "", "output": ["a", "b"]}, ([user("i")], "a", "b")),
        ({"messages": [*Q, bot("a")], "rejected_response": "b"}, (Q, "a", "b")),
        ({"messages": [*Q, bot("a")], "rejected_messages": [*Q, bot("b")]}, (Q, "a", "b")),
        ({"messages": [*Q, bot("a")], "rejected_response": [bot("b")]}, (Q, "a", "b")),
        ({"query": "q", "response": "a", "rejected_response": "b", "history": []}, (Q, "a", "b")),
        ({"system": "s", "input": "q", "chosen": "a", "rejected": "b"}, ([system("s"), *Q], "a", "b")),
        ({"system": None, "input": "q", "chosen": "a", "rejected": "b"}, (Q, "a", "b")),
        (
            {"info": {"id": "3", "post": "q", "title": "t"}, "summaries": [{"text": "b"}, {"text": "a"}], "choice": 1},
            (Q, "a", "b"),
        ),
        (
            {"history": "q", "human_ref_A": "a", "human_ref_B": "b", "labels": 1, "score_A": 5, "score_B": 2},
            (Q, "a", "b"),
        ),
        ({"history": "q", "human_ref_A": "b", "human_ref_B": "a", "labels": "0"}, (Q, "a", "b")),
        (
            {
                **{"model_a": "m", "prompt": '["q"]', "response_a": '["a"]', "response_b": '["b"]'},
                **{"winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
            },
            (Q, "a", "b"),
        ),
        (
            {
                **{"prompt": '["q", "r"]', "response_a": '["x", "b"]', "response_b": '["x", "a"]'},
                **{"winner_model_a": "False", "winner_model_b": "True", "winner_tie": False},
            },
            ([*Q, bot("x"), user("r")], "a", "b"),
        ),
        ({"prompt": "q", "response_a": "b", "response_b": "a", "winner": "[[B]]"}, (Q, "a", "b")),
        ({"prompt": "q", "response_a": "b", "response_b": "a", "winner": "B>>A"}, (Q, "a", "b")),
        ({"prompt": "q", "response_0": "b", "response_1": "a", "better_response_id": "1"}, (Q, "a", "b")),
        ({"prompt": "q", "response_0": "b", "response_1": "a", "better_response_id": 1.0}, (Q, "a", "b")),
        ({"prompt": "q", "responses": ["b", "a"], "scores": ["1", " 2.5 "]}, (Q, "a", "b")),
        ({"prompt": "q", "responses": '["b", "a"]', "scores": "[1, 2]"}, (Q, "a", "b")),
        (
            {
                "instruction": "q",
                "completions": [
                    {"response": "x", "overall_score": "N/A", "fine-grained_score": 9},
                    *({"response": "b", "overall_score": "3"}, {"response": "a", "overall_score": 4}),
                ],
            },
            (Q, "a", "b"),
        ),
        ({"prompt": "q", "answers": [{"answer": "b", "rank": 2.0}, {"answer": "a", "rank": 1.0}]}, (Q, "a", "b")),
        ({"prompt": user("q"), "chosen": bot("a"), "rejected": bot("b")}, (Q, "a", "b")),
        ({"prompt": "q", "chosen": ["a"], "rejected": ["b"]}, (Q, "a", "b")),
        ({"prompt": "q", "chosen": json.dumps([*Q, bot("a")]), "rejected": json.dumps([*Q, bot("b")])}, (Q, "a", "b")),
        ({"prompt": json.dumps(Q), "chosen": str([bot("a")]), "rejected": json.dumps(bot("b"))}, (Q, "a", "b")),
        ({"chosen": str(np.array([*Q, bot("a")])), "rejected": [*Q, bot("b")]}, (Q, "a", "b")),
        (
            {"prompt": ["q", "r"], "response_a": ["x", "a"], "response_b": ["x", "b"], "winner": "a"},
            ([*Q, bot("x"), user("r")], "a", "b"),
        ),
        ({"chosen": [json.dumps(m) for m in (*Q, bot("a"))], "rejected": [*Q, bot("b")]}, (Q, "a", "b")),
        (
            {
                "chosen": {"role": ["user", "assistant"], "content": ["q", "a"]},
                "rejected": {"from": ["human", "gpt"], "value": ["q", "b"]},
            },
            (Q, "a", "b"),
        ),
        (
            {"prompt": LLAMA3.format(LLAMA3_ANSWER), "chosen": "a<|eot_id|>", "rejected": "b<|eot_id|>"},
            (Q, "a", "b"),
        ),
        (
            {
                "chosen": LLAMA3.format(LLAMA3_ANSWER) + "a<|eot_id|>",
                "rejected": LLAMA3.format(LLAMA3_ANSWER) + "b<|eot_id|>",
            },
            (Q, "a", "b"),
        ),
        (
            {
                "prompt": "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n",
                "chosen": "a<|im_end|>\n",
                "rejected": "b",
            },
            ([system("s"), *Q], "a", "b"),
        ),
        (
            {
                "prompt": "<bos><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\n",
                "chosen": "a",
                "rejected": "b",
            },
            (Q, "a", "b"),
        ),
        ({"prompt": "<s>[INST] q [/INST]", "chosen": " a</s>", "rejected": "b</s>"}, (Q, "a", "b")),
        (
            {
                "prompt": "<s>[INST] <<SYS>>\ns\n<</SYS>>\n\nx [/INST] y </s><s>[INST] q [/INST]",
                "chosen": "a",
                "rejected": "b",
            },
            ([system("s"), user("x"), bot("y"), *Q], "a", "b"),
        ),
        ({"prompt": "<|user|>\nq</s>\n<|assistant|>\n", "chosen": "a</s>", "rejected": "b</s>"}, (Q, "a", "b")),
        (
            {"prompt": "<｜begin▁of▁sentence｜>s<｜User｜>q<｜Assistant｜>", "chosen": "a", "rejected": "b"},
            ([system("s"), *Q], "a", "b"),
        ),
        (
            {
                "prompt": "x\n<extra_id_1>Assistant\ny\n<extra_id_1>User\nq",
                "response_1": "a",
                "response_2": "b",
                "winner": 1,
            },
            ([user("x"), bot("y"), *Q], "a", "b"),
        ),
        (
            {
                "prompt": "<extra_id_0>System\n\n<extra_id_1>User\nq\n<extra_id_1>Assistant\n",
                "chosen": "a",
                "rejected": "b",
            },
            (Q, "a", "b"),
        ),
        (
            {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": " b"},
            (Q, "a", "b"),
        ),
        (
            {
                "question": {"full_text": "q", "dataset": "eli5"},
                "answer_0": "b",
                "answer_1": "a",
                "score_0": -1,
                "score_1": 1,
            },
            (Q, "a", "b"),
        ),
        ({"prompt": np.array(Q), "chosen": np.array([bot("a")]), "rejected": (bot("b"),)}, (Q, "a", "b")),
        ({"prompt": "q", "chosen": [*Q, bot("a")], "rejected": [*Q, bot("b")]}, (Q, "a", "b")),
        (
            {"prompt": [system("s"), *Q], "chosen": [*Q, bot("a")], "rejected": [*Q, bot("b")]},
            ([system("s"), *Q], "a", "b"),
        ),
        (
            {"system": "s", "prompt": Q, "chosen": [*Q, bot("a")], "rejected": [*Q, bot("b")]},
            ([system("s"), *Q], "a", "b"),
        ),
    ],
)
def test_a_row_becomes_the_pair_it_means(row: dict[str, Any], expected: Any) -> None:
    if expected is RowError:
        with pytest.raises(RowError):
            one(row)
        return
    assert one(row) == expected
    shape, conversations = conversations_of(RowView(row))  # scoring sees the same conversations
    found = {(json.dumps(prompt), answer) for prompt, answer in conversations}
    assert {(json.dumps(expected[0]), answer) for answer in expected[1:]} <= found
    assert len(conversations) == len(shape.sides)


WRITERS: dict[str, Callable[[list[Any]], str]] = {
    "Python": repr,
    "a tuple": lambda turns: repr(tuple(turns)),
    "numpy": lambda turns: str(np.array(turns, dtype=object)),
    "numpy's repr": lambda turns: repr(np.array(turns, dtype=object)),
    "numpy in an object": lambda turns: repr({"messages": np.array(turns, dtype=object)}),
    "JSON, quoted by Python": lambda turns: repr(json.dumps(turns)),
    "JSON, twice": lambda turns: json.dumps(json.dumps(turns)),
    "JSON in a list": lambda turns: repr([json.dumps(turn) for turn in turns]),
    "JSON in an array": lambda turns: str(np.array([json.dumps(turn) for turn in turns], dtype=object)),
    "JSON, one a line": lambda turns: "\n".join(json.dumps(turn) for turn in turns),
}


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("first", [{}, {"id": 1, "w": float("nan")}])
def test_cells_of_tables_are_messages_whoever_wrote_them(writer: str, first: dict[str, Any]) -> None:
    """pandas and others write a column of lists as text; letters of it are never trained on."""
    written = WRITERS[writer]
    it = 'it\'s "q"\n{a} }, {b} {'
    sides = [[{**first, **user(it)}, {**first, **bot(text)}] for text in ("a {", "b")]
    row = dict(zip(("chosen", "rejected"), map(written, sides), strict=True))
    _, used = conversations_of(RowView(row))
    assert [([*before, bot(answer)]) for before, answer in used] == [[user(it), bot("a {")], [user(it), bot("b")]]


@pytest.mark.parametrize("first", [{}, {"id": 1}])
def test_cells_that_numpy_shortened_are_refused(first: dict[str, Any]) -> None:
    turns = [{**first, **user("q")}, {**first, **bot("a")}] * 600
    row = {"prompt": "q", "chosen": str(np.array(turns, dtype=object)), "rejected": "b"}
    with pytest.raises(RowError, match="looks like a list of messages but is no JSON"):
        conversations_of(RowView(row))


AB = {"chosen": "a", "rejected": "b"}
TURNS_A = [user("q"), bot("a"), user("more"), bot("c")]
TURNS_B = [user("q"), bot("b"), user("more"), bot("d")]
PARTS_Q = [{"role": "user", "parts": [{"text": "q"}]}]
REPR = "array([{'content': 'q', 'role': 'user'}\n {'content': 'VALUE', 'role': 'assistant'}], dtype=object)"


@pytest.mark.parametrize(
    "row",
    [
        # Names under which published sets keep their answers.
        {"prompt": "q", "chosen_response": "a", "rejected_response": "b", "chosen_reward": 3, "rejected_reward": 1},
        {"question": "q", "response_j": "a", "response_k": "b"},
        {"instruction": "q", "accepted": "a", "rejected": "b"},
        {"chosen_conversations": [*Q, bot("a")], "rejected_conversations": [*Q, bot("b")]},
        {"id": "1", "conv_A": [*Q, bot("a")], "conv_B": [*Q, bot("b")], "conv_A_rating": 4.0, "conv_B_rating": 2.0},
        {"input": "q", "output_1": "b", "output_2": "a", "label": 2},
        {"question": "q", "response_A": "b", "response_B": "a", "label": "B>A"},
        {"prompt": "q", "model_a": "x_1", "model_b": "y", "response_a": "b", "response_b": "a", "winner": "y"},
        {
            "query": "q",
            "response_1": {"content": "a", "model": "x"},
            "response_2": {"content": "b"},
            "preference": "first",
        },
        {
            "orig_instruction": "q",
            "instruction": "Judge.",
            "response_A": "a",
            "response_B": "b",
            "orig_preference": "A",
        },
        {"question": "q", "answers": [{"pm_score": 0, "text": "b"}, {"pm_score": 3, "text": "a"}]},
        {"prompt": "q", "responses": ["b", "a", "b"], "scores": [False, True, False]},
        {"trajectory": [{"from": "user", "value": "q"}], **AB},
        {"conversation": [{"output": None, "input": "q"}], **AB},
        {side: [{"answer": text, "question": "q"}] for side, text in AB.items()},
        {
            "contents": PARTS_Q,
            "chosen": {"role": "model", "parts": [{"text": "a"}]},
            "rejected": {"text": "b", "score": 1},
        },
        {side: {"messages": [*Q, bot(text)], "system": ""} for side, text in AB.items()},
        {side: [{"speaker": "user", "text": "q"}, ["assistant", text]] for side, text in AB.items()},
        {side: [{"user": "q"}, {"assistant": text}] for side, text in AB.items()},
        {"prompt": "q", "chosen": [{"role": "assistant", "content": None, "refusal": "a"}], "rejected": "b"},
        {"prompt": b"q", "chosen": b"a", "rejected": b"b"},
        {"Prompt": "q", "CHOSEN": "a", " rejected ": "b"},
        # Only the turn that was judged counts.
        {"conversation_a": TURNS_A, "conversation_b": TURNS_B, "winner": "model_a", "turn": 1},
        {"messages": [*Q, bot("a")], "chosen": "a", "rejected": "b"},
        # Lists written as text, of answers and of turns.
        {"prompt": "q", "chosen": "['a']", "rejected": '["b"]'},
        {"prompt": "q", "responses": "['b' 'a']", "scores": "[1, 2]"},
        # Text that is structure.
        {"prompt": "USER: q ASSISTANT:", "chosen": "a</s>", "rejected": "b</s>"},
        {"prompt": "User: q\nAssistant:", **AB},
        {"prompt": "USER: q\nASSISTANT:", "chosen": "ASSISTANT: a", "rejected": " b</s>"},
        {
            side: f"<extra_id_0>System\n\n<extra_id_1>User\nq\n<extra_id_1>Assistant\n{t}\n<extra_id_1>"
            for side, t in AB.items()
        },
        {"prompt": "Human: q\nAssistant:", **AB},
        {side: f"\r\n\r\nHuman: q\r\n\r\nAssistant: {text}" for side, text in AB.items()},
        {side: f"Human: q\nAssistant: {text}" for side, text in AB.items()},
        {"prompt": "### Instruction:\nq\n\n### Response:\n", **AB},
        {"prompt": "prompter: q assistant: ", **AB},
        {
            "prompt": "GPT4 Correct User: q<|end_of_turn|>GPT4 Correct Assistant:",
            "chosen": "a<|end_of_turn|>",
            "rejected": "b",
        },
        {"prompt": "[gMASK]<sop><|user|>\nq<|assistant|>\n", **AB},
        {"prompt": "<|prompter|>q<|endoftext|><|assistant|>", **AB},
        {"prompt": "<|im_start|>user<|im_sep|>q<|im_end|><|im_start|>assistant<|im_sep|>", **AB},
        {
            "prompt": "<|start_of_role|>user<|end_of_role|>q<|end_of_text|>\n<|start_of_role|>assistant<|end_of_role|>",
            **AB,
        },
        {side: f"USER: q ASSISTANT: {text}</s>" for side, text in AB.items()},
        {side: json.dumps({"messages": [*Q, bot(text)]}) for side, text in AB.items()},
        {side: json.dumps(json.dumps([{"id": 1, **user("q")}, bot(text)])) for side, text in AB.items()},
        {side: REPR.replace("VALUE", text) for side, text in AB.items()},
    ],
    ids=lambda row: f"{list(row)[:3]} {str(next(iter(row.values())))[:20]}".encode("ascii", "replace").decode(),
)
def test_rows_as_people_have_them_are_one_pair(row: dict[str, Any]) -> None:
    assert one(row) == (Q, "a", "b")
    assert {(prompt[0]["content"], answer) for prompt, answer in conversations_of(RowView(row))[1]} == {
        ("q", "a"),
        ("q", "b"),
    }


@pytest.mark.parametrize("key", ["system_message", "sys_prompt", "systemPrompt", "custom_system_prompt"])
def test_a_system_text_has_many_names(key: str) -> None:
    assert one({key: "s", "prompt": "q", **AB}) == ([system("s"), *Q], "a", "b")
    assert one({side: {"messages": [*Q, bot(text)], "system": "s"} for side, text in AB.items()})[0] == [
        system("s"),
        *Q,
    ]
    for prompt in ("s\n\nUSER: q ASSISTANT:", "s\n\nHuman: q\n\nAssistant:", "\n\nSystem: s\n\nHuman: q\n\nAssistant:"):
        assert one({"prompt": prompt, **AB}) == ([system("s"), *Q], "a", "b")


def test_what_stands_beside_a_turn_of_two_is_named() -> None:
    _, view = read({"conversation": [{"input": "q", "output": None, "thought": "x"}], **AB})
    assert view.unused == ["messages.thought"]


def test_no_row_is_deeper_than_what_reads_it() -> None:
    deep: Any = "y"
    for _ in range(5000):
        deep = [{"type": "tool_result", "content": deep}]
    with pytest.raises(RowError, match="of type 'tool_result', expected text"):
        read({"prompt": [{"role": "user", "content": deep}], **AB})
    copied = json_value({"x": deep, "y": [float("nan"), {"z": float("-inf")}]})
    assert copied["y"] == [None, {"z": None}]
    for _ in range(5000):
        deep, copied["x"] = deep[0]["content"], copied["x"][0]["content"]
    assert deep == copied["x"] == "y"


def test_a_tree_gives_the_ranked_answers_to_each_of_its_messages() -> None:
    def node(role: str, text: str, *replies: dict[str, Any], **more: Any) -> dict[str, Any]:
        return {"message_id": f"id {text}", "role": role, "text": text, "replies": list(replies), **more}

    later = node("prompter", "r", node("assistant", "d", rank=1), node("assistant", "c", rank=0))
    first = node("assistant", "a", later, rank=0)
    tree = {"message_tree_id": "t", "prompt": node("prompter", "q", node("assistant", "b", rank=1), first)}
    pairs, view = read(tree, scored="all")
    assert [(p.id, p.prompt, p.chosen, p.rejected) for p in pairs] == [
        ("id q", Q, "a", "b"),
        ("id r", [*Q, bot("a"), user("r")], "c", "d"),
    ]
    assert view.unused == ["message_tree_id"]
    assert [answer for _, answer in conversations_of(RowView(tree))[1]] == ["a", "b", "c", "d"]
    with pytest.raises(RowError, match="no message of the tree has two answers with ranks"):
        read({"prompt": node("prompter", "q", node("assistant", "a", rank=0))})


def test_a_response_without_a_text_is_left_out_whatever_its_score() -> None:
    row = {"prompt": "q", "responses": [None, "b", {"text": "a"}], "scores": [9, 1, 2]}
    (pair,), view = read(row)
    assert (pair.chosen, pair.rejected) == ("a", "b")
    assert "responses without a text, left out" in view.remarks
    with pytest.raises(RowError, match="only one of the 3"):
        read({**row, "responses": [None, None, "a"]})


def test_the_input_belongs_to_its_prompt_also_under_a_mapped_name() -> None:
    row = {"instruction": "q", "input": "text", **AB}
    assert one(row) == one(row, parse_naming(["prompt=instruction"])) == ([user("q\n\ntext")], "a", "b")
    assert one({"x": "q", "y": "text", **AB}, parse_naming(["prompt=x,input=y"]))[0] == [user("q\n\ntext")]
    (pair,), view = read({"prompt": "q of text", "input": "text", **AB})
    assert (pair.prompt, view.unused) == ([user("q of text")], [])


def test_an_answer_that_the_arena_left_out_is_empty_and_never_letters() -> None:
    row = {"prompt": '["q"]', "response_a": '["a"]', "response_b": "[null]", "winner": "a"}
    assert one(row) == (Q, "a", "")
    later = {**row, "prompt": '["q", "r"]', "response_a": '[null, "a"]', "response_b": '[null, "b"]'}
    assert one(later) == ([*Q, bot(""), user("r")], "a", "b")
    with pytest.raises(RowError, match="nothing but space"):
        read({**row, "prompt": "[null]"})


def test_calls_and_results_that_are_parts_or_objects_are_written() -> None:
    call = {"type": "tool_use", "id": "1", "name": "f", "input": "22"}
    result = {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "42"}]}
    prompt = [*Q, {"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    assert one({"prompt": prompt, **AB})[0] == [*Q, bot(CALL), user("42")]
    prompt = [*Q, bot("", tool_calls=[call | {"type": "function"}]), {"role": "tool", "content": {"r": 4}}]
    (pair,), view = read({"prompt": prompt, **AB})
    assert pair.prompt[-1] == {"role": "tool", "content": '{"r": 4}'}
    assert "results of tools that are objects, written as JSON" in view.remarks


def test_two_ranks_are_compared_across() -> None:
    pairs, view = read({"id": "3", "prompt": "q", "chosen": ["a", "b"], "rejected": ["c", "d"], "models": ["x"]})
    assert [(pair.chosen, pair.rejected) for pair in pairs] == [("a", "c"), ("a", "d"), ("b", "c"), ("b", "d")]
    assert sum(pair.weight for pair in pairs) == 1
    assert len({pair.group for pair in pairs} - {0}) == 1
    assert view.unused == ["models"]


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({"prompt": " ", "chosen": "a", "rejected": "b"}, "empty prompt"),
        ({"prompt": [user("\n")], "chosen": "a", "rejected": "b"}, "empty prompt"),
        ({"chosen": [user(""), bot("a")], "rejected": [user(""), bot("b")]}, "empty prompt"),
        ({"prompt": "other", "chosen": [*Q, bot("a")], "rejected": [*Q, bot("b")]}, "prompts differ"),
        (
            {
                "prompt": [system("x"), *Q],
                "chosen": [system("y"), *Q, bot("a")],
                "rejected": [system("y"), *Q, bot("b")],
            },
            "prompts differ",
        ),
        ({"prompt": "p", "messages": [*Q, bot("a")], "rejected_response": "b"}, "prompts differ"),
        ({"chosen": [*Q, bot("x"), *Q, bot("a")], "rejected": [*Q, bot("y"), *Q, bot("b")]}, "prompts differ"),
        ({"prompt": "q", "chosen": "[{'role': 'user', 'content': q}]", "rejected": "b"}, "messages written as text"),
        (
            {
                "prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
                "chosen": "a",
                "rejected": "b",
            },
            "a part that is no text: image_url",
        ),
        (
            {
                "prompt": Q,
                "chosen": [{"role": "assistant", "content": [{"type": "thinking", "thinking": "x"}]}],
                "rejected": "b",
            },
            "a part that is no text: thinking",
        ),
        ({"prompt": "q", "output": ["a", "b", "c"]}, "wrong type"),
        ({"prompt": '["q", "r"]', "response_a": '["a"]', "response_b": '["b"]', "winner": "a"}, "wrong type"),
        ({"info": {"post": "q"}, "summaries": [{"text": "a"}, {"text": "b"}], "choice": 2}, "unknown winner"),
        ({"messages": [*Q, bot("a")], "rejected_response": [user("b")]}, "last message not from the assistant"),
    ],
)
def test_what_a_row_cannot_mean_is_refused_by_kind(row: dict[str, Any], kind: str) -> None:
    with pytest.raises(RowError) as error:
        read(row)
    assert error.value.kind == kind
    assert "\n" not in str(error.value)


def test_half_a_pair_of_unequal_scores_is_left_out_and_said() -> None:
    _, view = read({"prompt": "q", "responses": ["x", "b", "a"], "scores": [None, 1, 2]})
    assert view.remarks == {"responses without a score, left out"}


@pytest.mark.parametrize(
    ("more", "unused"),
    [
        ({"tools": [{"name": "f"}]}, ["tools"]),
        ({"images": ["x.png"], "tools": []}, ["images"]),
        ({"note": "x", "empty": None, "blank": ""}, ["note"]),
        ({"chosen": bot("a", reasoning_content="long")}, ["messages.reasoning_content"]),
        ({"chosen": bot("a", reasoning_content=None, name="Bo")}, ["messages.name"]),
        ({"messages": [*Q, bot("z")]}, ["messages"]),
        ({"chosen": [*Q, bot("a")], "rejected": [*Q, bot("b")], "messages": [*Q, bot("a")]}, []),
    ],
)
def test_what_is_not_used_is_named(more: dict[str, Any], unused: list[str]) -> None:
    _, view = read({"prompt": "q", "chosen": "a", "rejected": "b", **more})
    assert view.unused == unused


@pytest.mark.parametrize(
    ("more", "remark"),
    [
        ({"id": [1]}, "'id' that is neither text nor a number, left out"),
        ({"subset": True}, "'subset' that is neither text nor a number, left out"),
        ({"id": "x\ud800"}, "'id' with half a surrogate pair, replaced"),
        ({"rejected": " "}, "empty answer"),
        ({"chosen": "a<|eot_id|>"}, "answer that ends in a control token, kept as letters"),
        ({"chosen": bot("", tool_calls="[{}]")}, "tool calls written into the text of their message"),
        ({"chosen": json.dumps([bot("a")])}, "text that is a list of messages, read as messages"),
        (
            {"system": "s", "prompt": [system("other"), *Q]},
            "system text not used: the conversation begins with another",
        ),
    ],
)
def test_what_is_understood_in_an_unusual_way_is_said(more: dict[str, Any], remark: str) -> None:
    (pair,), view = read({"prompt": "q", "chosen": "a", "rejected": "b", **more})
    assert view.remarks == {remark}
    assert f"{pair.id}{pair.subset}".encode()


@pytest.mark.parametrize(
    ("value", "name"), [(1.0, "1"), (2.5, "2.5"), (7, "7"), ("x", "x"), pytest.param(10**5000, "row:0", id="huge")]
)
def test_an_id_never_costs_a_row(value: Any, name: str) -> None:
    (pair,), _ = read({"id": value, "prompt": "q", "chosen": "a", "rejected": "b"})
    assert pair.id == name


@pytest.mark.parametrize(
    "text",
    [
        "Use <|im_start|> to begin a turn.",
        'Return {"role": "admin", "name": "x"} please',
        '{"role": "admin", "content": "x"}',
        '[{"name": "x"}]',
        "[not a list",
        "Say [INST] twice",
        "</s> closes <s>",
        "A Human: in the middle",
        "User: hi\nAssistant: hello\nUser: bye\n\nSummarise this chat",
        "Q: 1 + 1?\nA: 2\nQ: 2 + 2?\nA:",
        "['a', 'b'] + ['c']",
    ],
)
def test_letters_stay_letters(text: str) -> None:
    (pair,), view = read({"prompt": text, "chosen": text, "rejected": "b"})
    assert (pair.prompt, pair.chosen, view.remarks) == ([user(text)], text, set())


NAMES = parse_naming(["prompt=question,chosen=answer_a", "rejected=answer_b"])


def test_columns_are_mapped() -> None:
    row = {"question": "q", "answer_a": "a", "answer_b": "b", "responses": ["x", "y"], "extra": 1}
    (pair,), view = read(row, NAMES)
    assert (pair.prompt, pair.chosen, pair.rejected) == (Q, "a", "b")
    assert view.unused == ["extra"]
    assert view.mapped == {"question", "answer_a", "answer_b"}
    assert one({"prompt": "q", "chosen": "a", "rejected": "b"}, NAMES) == (Q, "a", "b")  # other data as it stands


def test_mapped_columns_win_over_those_of_the_row() -> None:
    row = {
        "prompt": "wrong",
        "chosen": "wrong",
        "rejected": "wrong",
        "x": {"q": "q"},
        "list": ["b", "a"],
        "points": [1, 2],
    }
    assert one(row, parse_naming({"prompt": "x.q", "responses": "list", "scores": "points"})) == (Q, "a", "b")


def test_roles_and_keys_of_messages_are_mapped() -> None:
    naming = parse_naming(
        {"role": {"expert": "assistant", "Asker": "user"}, "message": {"role": "who", "content": "says"}}
    )
    made = [{"who": "asker", "says": "q"}, {"who": "Expert", "says": "a"}]
    row = {"chosen": made, "rejected": [made[0], {"who": "expert", "says": "b"}]}
    assert one(row, naming) == (Q, "a", "b")


@pytest.mark.parametrize(
    ("row", "margin"),
    [
        ({"prompt": "q", "chosen": "a", "rejected": "b", "chosen_score": "4", "rejected_score": 1}, 3.0),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "score_chosen": 4, "score_rejected": 1.5}, 2.5),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "chosen-rating": 4, "rejected-rating": 1.5}, 2.5),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 9, "chosen_score": 4, "rejected_score": 1}, 9.0),
        ({"history": "q", "human_ref_A": "b", "human_ref_B": "a", "labels": 0, "score_A": 2, "score_B": 5}, 3.0),
        ({"prompt": "q", "responses": ["b", "a"], "scores": [1, 3]}, 2.0),
        ({"context": Q, "response1": "a", "response2": "b", "overall_preference": -2}, 2.0),
        ({"prompt": "q", "chosen": "a", "rejected": "b"}, None),
    ],
)
def test_margins_come_from_scores_if_asked_for(row: dict[str, Any], margin: float | None) -> None:
    (pair,), view = read(row, parse_naming(["margin=scores"]))
    assert pair.margin == margin
    assert (view.remarks != set()) == (margin is None)
    (pair,), _ = read({**row, "margin": None})
    assert pair.margin == (margin if "responses" in row else None)  # pairs made from scores keep their difference


def test_a_margin_is_one_column_minus_another() -> None:
    naming = parse_naming(["margin=good-score-bad-score"])
    (pair,), view = read({"prompt": "q", "chosen": "a", "rejected": "b", "good-score": 3, "bad-score": "1"}, naming)
    assert pair.margin == 2.0
    assert view.unused == []


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("prompt", "is not of the form name=column"),
        ("promt=x", "'promt' is unknown.* Did you mean 'prompt'"),
        ("role.expert=asistant", "'asistant' is no role.* Did you mean 'assistant'"),
        ("message.name=x", "'message.name' is unknown"),
    ],
)
def test_a_wrong_map_is_one_line(entry: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_naming([entry])


def test_answers_with_prompts_of_their_own_are_a_pair_if_asked_for() -> None:
    row = {"chosen": [*Q, bot("x"), *Q, bot("a")], "rejected": [*Q, bot("y"), *Q, bot("a")]}
    (pair,), _ = read(row, own_prompts=True)
    assert (pair.chosen_conversation, pair.rejected_conversation) == (row["chosen"], row["rejected"])
    with pytest.raises(RowError, match="differ before the last message: message 2 of 3"):
        read(row)
    (pair,), _ = read({"prompt": "q", "chosen": "a", "rejected": "b"}, own_prompts=True)
    assert pair.rejected_prompt is None
