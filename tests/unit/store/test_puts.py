"""What obstore's errors mean for a write that must not replace anything."""

import pytest

from laasp_ray.store.puts import says_unsupported


@pytest.mark.parametrize(
    ("error", "unsupported"),
    [
        ("Error performing PUT http://h/b/x - Server returned non-2xx status code: 501 Not Implemented", True),
        ("Server returned non-2xx status code: 400: <Error><Code>NotImplemented</Code></Error>", True),
        ("Error performing PUT http://127.0.0.1:45013/b/x in 645.5us - HTTP error: error sending request", False),
        ("Error performing PUT http://127.0.0.1:501/b/501 - Server returned non-2xx status code: 503", False),
    ],
)
def test_a_port_of_501_does_not_make_a_store_one_without_conditions(error, unsupported):
    assert says_unsupported(error) is unsupported
