"""The C library's allocator, told to keep the memory it has been given back."""
import importlib


def keep_large_blocks() -> str:
    """Lets the process keep freed memory for its next large tensors; "" if that worked, or why it did not.

    By default glibc maps every large tensor afresh and unmaps it when it is freed: each training step faults in every page again.
    """
    try:
        host = importlib.import_module("flora._host")
    except ImportError as error:
        return f"the host extension is not built ({error})"
    return "" if host.tune_allocator() else "the C library is not glibc, or refused"
