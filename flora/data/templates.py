"""Rows to token ids with the loss on completions only.

Where the prompt ends in the token ids is found by tokenising twice: the prompt alone and the whole text. If the first
is a prefix of the second, the rest is the completion, exactly as the model will see it. If it is not (a template that
rewrites earlier turns, a token that straddles the border) both parts are tokenised apart. All texts go to the
tokenizer in two calls, whatever their number: that is what makes it fast.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from flora.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]
IGNORED = -100  # the label of a token that is not learnt


def tokenize(
    tokenizer: "PreTrainedTokenizerBase", row: Row, max_length: int, chat_template: bool = True
) -> dict[str, list[int]]:
    """Turn one row into `input_ids` and `labels`; see `tokenize_rows`, which does many at once."""
    return tokenize_rows(tokenizer, [row], max_length, chat_template)[0]


def tokenize_rows(
    tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row], max_length: int, chat_template: bool = True
) -> list[dict[str, list[int]]]:
    """Turn rows into `input_ids` and `labels`, of one length each; -100 where there is no loss: on the prompt.

    With a chat template on the tokenizer (and unless `chat_template` is False) a prompt that is a text is one user
    turn, and the completion carries what the template puts at the end of a turn. Without one, texts are joined (by a
    newline if neither has space there), messages as "role: content" lines, and the end-of-text token closes them.
    Too long: the prompt loses its start, down to one token, then the completion its end.
    Raises DataError: a row of another form, a template that refuses a row's roles, max_length below 2.
    """
    if max_length < 2:
        raise DataError(f"max_length should be at least 2 (a prompt token and a completion token), it is {max_length}")
    if not rows:
        return []
    chat = chat_template and bool(getattr(tokenizer, "chat_template", None))
    texts = [_render(tokenizer, row, i, chat) for i, row in enumerate(rows)]
    before = [] if chat else _start(tokenizer)
    eos = tokenizer.eos_token_id
    after = [] if eos is None else [eos]
    prompts = _ids(tokenizer, [prompt for prompt, _, _ in texts])
    wholes = _ids(tokenizer, [whole for _, whole, _ in texts])
    tokenized = []
    for (_, _, completion), prompt, whole in zip(texts, prompts, wholes, strict=True):
        if whole[: len(prompt)] == prompt:
            rest = whole[len(prompt) :] if chat else whole[len(prompt) :] + after
        else:
            rest = _ids(tokenizer, [completion])[0] + after
        tokenized.append(_cut(before + prompt, rest, max_length))
    return tokenized


def tokenize_prompts(
    tokenizer: "PreTrainedTokenizerBase", rows: Sequence[Row], max_length: int, chat_template: bool = True
) -> list[list[int]]:
    """Turn rows' prompts into token ids as `tokenize_rows` does, up to where the answer starts; no completion is read.

    Too long: the prompt loses its start. Raises DataError: a row without a prompt, a template that refuses a row's
    roles, max_length below 1.
    """
    if max_length < 1:
        raise DataError(f"max_length should be at least 1 (a prompt token), it is {max_length}")
    if not rows:
        return []
    chat = chat_template and bool(getattr(tokenizer, "chat_template", None))
    texts = [_render(tokenizer, {**row, "completion": ""}, i, chat)[0] for i, row in enumerate(rows)]
    before = [] if chat else _start(tokenizer)
    return [(before + prompt)[-max_length:] for prompt in _ids(tokenizer, texts)]


def _render(tokenizer: "PreTrainedTokenizerBase", row: Row, number: int, chat: bool) -> tuple[str, str, str]:
    """Write a row out: the prompt, the whole, and the completion for when the prompt is not where the whole starts."""
    prompt, completion = row.get("prompt"), row.get("completion")
    if not isinstance(prompt, (str, list)) or not isinstance(completion, str):
        raise DataError(
            f"row {number} should have a prompt (a text or messages) and a completion (a text), it has "
            f"{', '.join(f'{key}: {type(value).__name__}' for key, value in row.items())}; load it with load_rows"
        )
    if not chat:
        return _plain(prompt, completion)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    answer = {"role": "assistant", "content": completion}
    try:
        start = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        whole = tokenizer.apply_chat_template([*messages, answer], tokenize=False)
    except Exception as error:  # what a template raises is its own affair
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise DataError(
            f"the chat template refuses row {number} with the roles {roles} ({error}); drop such rows, or turn the "
            f"chat template off"
        ) from error
    return str(start), str(whole), completion


def _plain(prompt: str | list[Row], completion: str) -> tuple[str, str, str]:
    """Write a row out as text, without a template."""
    if isinstance(prompt, list):
        lines = [f"{message['role']}: {message['content']}\n" for message in prompt]
        start, completion = "".join(lines) + "assistant:", f" {completion}"
    else:
        apart = not prompt or prompt[-1].isspace() or completion[:1].isspace()
        start = prompt if apart else f"{prompt}\n"
    return start, start + completion, completion


def _ids(tokenizer: "PreTrainedTokenizerBase", texts: list[str]) -> list[list[int]]:
    """Tokenise many texts in one call, adding nothing: the template has written its special tokens out."""
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    return ids


def _start(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return the token that this tokenizer itself puts before a text, if any."""
    ids = tokenizer("a")["input_ids"]
    return [ids[0]] if ids and ids[0] == tokenizer.bos_token_id else []


def _cut(prompt: list[int], completion: list[int], max_length: int) -> dict[str, list[int]]:
    """Cut to a length: first the start of the prompt, down to one token, then the end of the completion."""
    keep = min(len(prompt), max(1, max_length - len(completion)))
    prompt = prompt[len(prompt) - keep :]
    completion = completion[: max_length - keep]
    return {"input_ids": prompt + completion, "labels": [IGNORED] * keep + completion}
