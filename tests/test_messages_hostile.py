"""Messages that no receiver may accept: ten thousand of them, of every family, signed by a liar where the digest would tell."""
from collections import Counter

import lies_claims as claims
import lies_container as container
import lies_fields as fields
import lies_tensors as tensors
import pytest
from forge import Forged, forged_seeds, rng_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flora import errors
from flora.errors import (
    MessageCountError,
    MessageDigestError,
    MessageDtypeError,
    MessageError,
    MessageFormatError,
    MessageLayerError,
    MessageRankError,
    MessageShapeError,
    MessageSizeError,
    MessageValueError,
    MessageVersionError,
)
from flora.messages import decode

DIGEST = (MessageDigestError, MessageFormatError, MessageSizeError)
WRONG = (MessageFormatError,)
LIES = {
    container.truncated: (MessageError,), container.extended: (MessageDigestError,), container.flipped: DIGEST, container.moved:
    (MessageDigestError,), container.random_bytes: DIGEST, container.header_length: (MessageFormatError, MessageSizeError),
    container.too_many_bytes: (MessageSizeError,), container.digest_lie: (MessageDigestError,), container.spelt_otherwise:
    WRONG, container.twice: WRONG, fields.nested: (MessageError,), fields.fields_lie: (MessageError,), fields.format_lie: WRONG,
    container.offsets_lie: WRONG, container.gap: WRONG, tensors.dtype_lie: (MessageDtypeError,), tensors.dtype_of_scale:
    (MessageDtypeError,), tensors.dtype_refused: (MessageDtypeError,), tensors.shape_lie: (MessageShapeError,
    MessageFormatError), tensors.shape_of_layer: (MessageShapeError, MessageRankError, MessageVersionError),
    tensors.three_dimensions: (MessageShapeError,), tensors.flat: (MessageShapeError,), tensors.not_finite:
    (MessageValueError,), tensors.product_overflows: (MessageValueError,), tensors.unexpected: (MessageLayerError,
    MessageFormatError), tensors.listed_wrong: (MessageLayerError,), fields.many_layers: (MessageSizeError,), fields.names_lie:
    WRONG, fields.long_names: (MessageSizeError,), fields.counts_lie: (MessageCountError,), fields.versions_lie:
    (MessageVersionError,), fields.integers_lie: WRONG, fields.since_lie: (MessageVersionError,), fields.given_lie:
    (MessageVersionError,), fields.metrics_lie: (MessageValueError,), fields.many_metrics: (MessageSizeError,),
    fields.train_lie: WRONG, fields.parts_lie: WRONG, tensors.core_of_another_rank: (MessageRankError, MessageShapeError),
    tensors.base_lie: (MessageError,), tensors.ranks_over: (MessageRankError,), container.header_lie: WRONG, tensors.entry_lie:
    WRONG, tensors.out_of_order: WRONG, claims.zeros_malformed: WRONG, claims.zeros_of_no_dtype: (MessageDtypeError,),
    claims.zeros_of_no_shape: (MessageShapeError,), claims.zeros_too_large: (MessageSizeError,), claims.held_twice:
    (MessageLayerError,), claims.not_listed: (MessageLayerError,), claims.held_malformed: WRONG, claims.held_by_nobody:
    (MessageVersionError,), claims.cores_malformed: (MessageShapeError,), claims.cores_of_another_shape: (MessageShapeError,),
    claims.cores_of_no_frame: (MessageVersionError,)}
NOT_JSON = {container.truncated, container.flipped, container.random_bytes, container.header_length, container.spelt_otherwise,
            fields.nested}                                       # a parser may say no; to all others, the reader itself
SEEDS = {name: Forged.of(raw, options) for name, raw, options in forged_seeds()}
EXAMPLES = 8_000
TOLD: Counter[str] = Counter()
SAID: Counter[type] = Counter()


@pytest.mark.parametrize("name", SEEDS)
def test_the_forger_is_right(name):
    """What is forged without a lie is what encode made, and is accepted: otherwise every refusal below would be for nothing."""
    raw, options = next((raw, options) for known, raw, options in forged_seeds() if known == name)
    assert SEEDS[name].raw() == raw
    decode(raw, **options)


def tell(lie, name, seed):
    """The error that a lie is answered with; None where the family does not apply. Raises AssertionError where it is believed."""
    message = SEEDS[name].copy()
    raw = lie(rng_of(lie.__name__, name, seed), message)
    if raw is None:
        return None
    try:
        decode(raw, **message.options)
    except MessageError as error:
        assert isinstance(error, LIES[lie]), f"{lie.__name__}: {type(error).__name__}: {error}"
        assert "cannot be read" not in str(error) or lie in NOT_JSON, f"{lie.__name__} is left to a parser: {error}"
        return error
    raise AssertionError(f"{lie.__name__} of {name} was accepted")


@settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(st.sampled_from([*LIES]), st.sampled_from([*SEEDS]), st.integers(0, 1 << 32))
def some_lies(lie, name, seed):
    error = tell(lie, name, seed)
    if error is not None:
        TOLD[lie.__name__] += 1
        SAID[type(error)] += 1


def test_ten_thousand_malformed_messages_are_refused_and_nothing_else_is_raised():
    """Every family is told of every seed at least once, then hypothesis draws; every class of error answers some of them."""
    for lie in LIES:
        for name in SEEDS:
            for seed in range(6):
                error = tell(lie, name, seed)
                TOLD[lie.__name__] += error is not None
                SAID[type(error)] += 1
    some_lies()
    assert sum(TOLD.values()) >= 10_000 and set(TOLD) == {lie.__name__ for lie in LIES} and min(TOLD.values()) >= 6, TOLD
    kinds = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, MessageError)}
    assert kinds - set(SAID) == {MessageError}, "a class that nothing raises"
