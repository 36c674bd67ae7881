"""int2 KV cache, in groups of 32 with 40 recent tokens as they are."""

from tests.passes.kv_compression import kivi_checks


def test_decode_equals_attention_over_independently_quantised_tokens():
    kivi_checks.check_decode(2, group=32, window=40)


def test_within_the_window_it_is_exact():
    kivi_checks.check_window(2)


def test_bytes_are_really_freed():
    kivi_checks.check_bytes(2, group=32, window=40)
