"""What the tests of data share: a tokenizer that is built in memory, turns, rows, and the check of a split."""

import json

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer(template: str | None = TEMPLATE, bos: bool = False):
    """Build a byte-level tokenizer in which "ab" is one token, so that a border can fall inside a token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*letters, "ab"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<eos>", "<bos>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>"]
    tokenizer.add_special_tokens(special)
    if bos:
        first = [("<bos>", tokenizer.token_to_id("<bos>"))]
        tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=first)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", bos_token="<bos>")
    fast.chat_template = template
    return fast


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
ROWS = [{"prompt": f"q{i}", "completion": f"a{i}", "who": f"p{i % 2}"} for i in range(4)]


def check_splits(rows, clients, splits, group):
    """Check that nothing held out, nor its group, nor its text, is trained on by anybody, and the sizes."""
    owner = {i: name for name, indices in clients.items() for i in indices}
    train = [i for indices in splits.train.values() for i in indices]
    held = splits.server + [i for indices in splits.eval.values() for i in indices]
    assert len(set(train + held)) == len(train + held)
    for part in (splits.train, splits.eval):
        assert list(part) == list(clients)
        assert all(owner[i] == name for name, indices in part.items() for i in indices)

    def texts(indices):
        return {json.dumps([rows[i]["prompt"], rows[i]["completion"]]) for i in indices}

    assert not texts(train) & texts(held)
    assert not {rows[i][group] for i in train} & {rows[i][group] for i in held}
    assert not {rows[i][group] for i in splits.server} & {rows[i][group] for i in held[len(splits.server) :]}
    assert len(splits.server) <= len(owner) / 5
    assert all(len(splits.eval[name]) <= len(clients[name]) / 5 for name in clients)
    assert all(splits.train.values())
