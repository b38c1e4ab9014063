"""Checks a row of user data and makes a preference pair of it.

    row {chosen, rejected, prompt?, system?, tools?, chat_template_kwargs?, margin?, pair_weight?, category?}
      -> Preference: two complete texts, or two complete conversations of whole messages

Every error about the data names the source and the row, counted from 1.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from normbt_kernels.data import STDLIB_FAULTS
from normbt_kernels.data.rows import NUMBERS, check_columns, read_rows
from normbt_kernels.errors import UserError

Message = dict[str, Any]  # role, content, and anything else that the chat template reads (tool_calls, ...)
Text = str | list[Message]  # plain text, or a conversation

OPTIONAL_COLUMNS = (*NUMBERS, "category")  # in every row or in none
COLUMNS = ("chosen", "rejected", "prompt", "system", "tools", "chat_template_kwargs", *OPTIONAL_COLUMNS)


@dataclass(frozen=True)
class Preference:
    """One checked pair: two complete texts or conversations, prompt included. `where` names its row.

    `template` holds what the chat template takes besides the messages: `tools`, and the row's `chat_template_kwargs`.
    `repeats_prompt` is true if an answer begins with the prompt, so that the text has it twice.
    """

    chosen: Text
    rejected: Text
    margin: float | None = None
    pair_weight: float | None = None
    category: str | None = None
    where: str = ""
    template: Mapping[str, Any] = field(default_factory=dict)
    repeats_prompt: bool = False


def load_preferences(
    source: str,
    config: str | None,
    split: str,
    parse: Callable[[Any, str], Preference] | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Preference]:
    """All pairs of a data file or of a split of a hub data set, as `read_rows` reads them.

    The source "stdlib-faults" has the splits "train" and "validation"; any other name means its test split. `parse`
    reads each row of other sources, with the arguments of `parse_row`, the default. `columns` maps our name of a column
    to the data's: {"chosen": "response_j"}.

    Raises:
        UserError: the source cannot be read, or a row is not a preference pair.
    """
    if source == STDLIB_FAULTS:
        from normbt_kernels.data import stdlib_faults

        return stdlib_faults.split_pairs(split if split in ("train", "validation") else "test", seed=0)
    for ours in columns or ():
        if ours not in COLUMNS:
            raise UserError(f"--column {ours}=...: expected one of {', '.join(COLUMNS)}")
    pairs = []
    for number, row in read_rows(source, config, split):
        where = f"{source}, row {number}"
        if columns:
            check_columns(row, columns.values(), where)
            row = row | {ours: row[theirs] for ours, theirs in columns.items()}
        pairs.append((parse or parse_row)(row, where))
    if not pairs:
        raise UserError(f"{source}: no rows")
    for name in OPTIONAL_COLUMNS:
        missing = [pair.where for pair in pairs if getattr(pair, name) is None]
        if missing and len(missing) < len(pairs):
            raise UserError(f"{missing[0]}: no {name}, but other rows have one")
    return pairs


# --- one row -------------------------------------------------------------------------------------------------------


def parse_row(row: Any, where: str) -> Preference:
    """The pair in one row of user data.

    A text prompt is put before text answers unchanged. If the prompt or the answers are messages, the prompt begins the
    conversation and the answers end it; messages that the answers repeat from the prompt are kept once. `system` opens
    the conversation. Messages keep all their fields except those that are None, which a table writes where other rows
    have a value. Numbers may be text, as they are in CSV. RewardBench calls the category `subset`.

    Raises:
        UserError: the row is not a preference pair; the message names `where`.
    """
    check_columns(row, ("chosen", "rejected"), where)
    row = _without_none(row)
    chosen, rejected = (_text_or_messages(row.get(name), name, where) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise UserError(f"{where}: 'chosen' and 'rejected' must both be text or both be messages")
    repeats_prompt = False
    if row.get("prompt"):
        prompt = _text_or_messages(row["prompt"], "prompt", where)
        repeats_prompt = _begins_with(chosen, prompt) or _begins_with(rejected, prompt)
        chosen, rejected = _join(prompt, chosen, where), _join(prompt, rejected, where)
    if row.get("system"):
        chosen, rejected = _with_system(row["system"], chosen, where), _with_system(row["system"], rejected, where)
    margin, pair_weight = (_number(row.get(name), name, where) for name in NUMBERS)
    if pair_weight is not None and pair_weight < 0:
        raise UserError(f"{where}: 'pair_weight' is negative: {pair_weight!r}")
    category = row.get("category", row.get("subset"))
    category = None if category is None else str(category)
    return Preference(
        chosen, rejected, margin, pair_weight, category, where, _template_arguments(row, where), repeats_prompt
    )


def _without_none(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value


def _number(value: Any, name: str, where: str) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: {name!r} is not a finite number: {value!r:.80}")
    return number


def _template_arguments(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`tools` (a list, or a list as JSON) and `chat_template_kwargs` of the row; empty if the row has neither."""
    arguments = row.get("chat_template_kwargs", {})
    if not isinstance(arguments, dict):
        raise UserError(f"{where}: 'chat_template_kwargs' is not an object: {arguments!r}")
    if not row.get("tools"):
        return dict(arguments)
    tools = row["tools"]
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise UserError(f"{where}: 'tools' is text, but not JSON ({error})") from error
    return {"tools": tools, **arguments}


# --- conversations -------------------------------------------------------------------------------------------------


def _text_or_messages(value: Any, name: str, where: str) -> Text:
    if isinstance(value, str) and value:
        return value
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: {name!r} is neither text nor a list of messages, or it is empty")
    for message in value:
        if not _is_message(message):
            raise UserError(f"{where}: {name!r} has a message that is not {{'role': text, 'content': text}}")
    return value


def _is_message(message: Any) -> bool:
    """A message has a role and a text, or something else instead of the text, such as tool calls."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return False
    return isinstance(message["content"], str) if "content" in message else len(message) > 1


def _begins_with(answer: Text, prompt: Text) -> bool:
    """Whether a text answer repeats the text before it."""
    if not isinstance(answer, str):
        return False
    before = prompt if isinstance(prompt, str) else prompt[-1].get("content", "")
    return bool(before.strip()) and answer.startswith(before)


def _join(prompt: Text, answer: Text, where: str) -> Text:
    if isinstance(prompt, str) and isinstance(answer, str):
        return prompt + answer
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if isinstance(answer, str):
        return [*messages, {"role": "assistant", "content": answer}]
    before, after = _comparable(messages), _comparable(answer)
    if answer[0]["role"] not in ("assistant", "tool"):
        starts = range(len(after) - len(before) + 1)
        if any(after[start : start + len(before)] == before for start in starts):
            return answer  # a whole conversation already
    repeated = next(n for n in range(min(len(before), len(after)), -1, -1) if before[len(before) - n :] == after[:n])
    seam = (messages[-1]["role"], answer[0]["role"])
    if not repeated and (seam == ("user", "user") or seam[1] == "system"):
        raise UserError(
            f"{where}: the conversation does not contain the prompt, but the answer opens with a message of role "
            f"{seam[1]!r}: leave the column 'prompt' out, or that message"
        )
    return [*messages, *answer[repeated:]]


def _comparable(messages: list[Message]) -> list[Message]:
    return [message | {"content": message.get("content", "").strip()} for message in messages]


def _with_system(system: Any, conversation: Text, where: str) -> Text:
    if isinstance(conversation, str):
        raise UserError(f"{where}: a 'system' column beside plain text: put it into the text, or give messages")
    opening = {"role": "system", "content": system}
    if not isinstance(system, str):
        raise UserError(f"{where}: 'system' is not text: {system!r}")
    if conversation[0]["role"] != "system":
        return [opening, *conversation]
    if _comparable(conversation[:1]) != _comparable([opening]):
        raise UserError(f"{where}: the system message of the conversation differs from the column 'system'")
    return conversation
