"""Conversations as data sets hold them: every message reaches the chat template whole, and the prompt once."""

import json

import pytest

pytest.importorskip("transformers")

from normbt_kernels.data.preferences import parse_row
from normbt_kernels.data.tokens import tokenize_pair
from normbt_kernels.errors import UserError
from tests.test_trainer_data import make_trainer, message, model, tokenizer, words  # noqa: F401  (fixtures)

TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.name }} {% endfor %}{% if style %}{{ style }} {% endif %}"
    "{% for m in messages %}{{ m.role }} : {% if m.reasoning %}{{ m.reasoning }} {% endif %}{{ m.content or '' }} "
    "{% for call in m.tool_calls or [] %}{{ call.function.arguments.number }} {% endfor %}<eos> {% endfor %}"
)


def call(number):
    calls = [{"function": {"name": "add", "arguments": {"number": number, "unused": None}}}]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def laid_out(tokenizer, row):  # noqa: F811
    tokenizer.chat_template = TEMPLATE
    ids = tokenize_pair(parse_row(row, "row 1"), tokenizer)
    return [" ".join(words(ids[f"{side}_ids"])) for side in ("chosen", "rejected")]


def test_tool_calls_tools_and_arguments_of_the_template_tell_answers_apart(tokenizer):  # noqa: F811
    tools = [{"name": "six"}]
    row = {"prompt": [message("user", "add")], "chosen": [call("two")], "rejected": [call("four")], "tools": tools}
    expected = ["six user : add <eos> assistant : two <eos>", "six user : add <eos> assistant : four <eos>"]
    assert laid_out(tokenizer, row) == laid_out(tokenizer, row | {"tools": json.dumps(tools)}) == expected
    five = laid_out(tokenizer, row | {"chat_template_kwargs": {"style": "five"}})
    assert five == [text.replace("six ", "six five ") for text in expected]


def test_any_other_field_of_a_message_reaches_the_template(tokenizer):  # noqa: F811
    answers = [message("assistant", "add") | {"reasoning": word} for word in ("two", None)]
    row = {"prompt": "six", "chosen": answers[:1], "rejected": answers[1:]}
    assert laid_out(tokenizer, row) == [
        "user : six <eos> assistant : two add <eos>",
        "user : six <eos> assistant : add <eos>",
    ]


SYSTEM, USER = message("system", "six"), message("user", "add")
HELLO, AGAIN = message("assistant", "five"), message("user", "two")
GOOD = message("assistant", "four")
TOOL = message("tool", "six")


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": [USER, HELLO], "answer": [TOOL, GOOD]}, [USER, HELLO, TOOL, GOOD]),
        ({"prompt": [SYSTEM, USER, HELLO], "answer": [AGAIN, GOOD]}, [SYSTEM, USER, HELLO, AGAIN, GOOD]),
        ({"prompt": [SYSTEM, USER], "answer": [USER, GOOD]}, [SYSTEM, USER, GOOD]),
        ({"prompt": [USER], "answer": [SYSTEM, USER, GOOD]}, [SYSTEM, USER, GOOD]),
        ({"prompt": " add", "answer": [SYSTEM, USER, HELLO, AGAIN, GOOD]}, [SYSTEM, USER, HELLO, AGAIN, GOOD]),
        ({"prompt": [SYSTEM, USER], "answer": "four"}, [SYSTEM, USER, GOOD]),
        ({"system": "six", "prompt": "add", "answer": [GOOD]}, [SYSTEM, USER, GOOD]),
        ({"system": "six", "answer": [SYSTEM, USER, GOOD]}, [SYSTEM, USER, GOOD]),
        ({"system": None, "prompt": [USER], "answer": [GOOD]}, [USER, GOOD]),
    ],
)
def test_no_message_is_lost_and_none_is_there_twice(row, expected):
    answer = row.pop("answer")
    pair = parse_row(row | {"chosen": answer, "rejected": answer}, "row 1")
    assert pair.chosen == pair.rejected == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "two", "answer": [USER, GOOD]}, "opens with a message of role 'user': leave the column 'prompt'"),
        ({"prompt": [USER], "answer": [SYSTEM, GOOD]}, "opens with a message of role 'system'"),
        ({"system": "five", "answer": [SYSTEM, USER, GOOD]}, "differs from the column 'system'"),
        ({"system": "five", "answer": "four"}, "a 'system' column beside plain text"),
        ({"tools": "{", "answer": [USER, GOOD]}, "'tools' is text, but not JSON"),
        ({"chat_template_kwargs": "x", "answer": [USER, GOOD]}, "'chat_template_kwargs' is not an object"),
        ({"answer": [USER, {"role": "assistant", "content": None}]}, "has a message that is not"),
    ],
)
def test_what_cannot_be_one_conversation_is_refused(row, reason):
    answer = row.pop("answer")
    with pytest.raises(UserError, match=rf"row 1: .*{reason}"):
        parse_row(row | {"chosen": answer, "rejected": answer}, "row 1")
