"""schemathesis sends what the OpenAPI description allows and forbids; no answer is a 5xx.

It needs the extra serve-test.
"""

import subprocess
import sys

import pytest
from helpers.serving import serving
from helpers.tiny import write_llama

pytestmark = [pytest.mark.hostile, pytest.mark.slow]
pytest.importorskip("schemathesis", reason="schemathesis is not installed")


@pytest.mark.weekly
def test_no_request_of_the_description_is_an_error_of_the_server(tmp_path):
    llama = str(write_llama(tmp_path / "llama"))
    with serving(llama, "--room", "lora --rank 1", "--context", "32", "--rows", "2") as server:
        answer = server.ask("/v1/completions", {"model": "llama", "prompt": "food"})
        flags = "--checks not_a_server_error --max-examples 40 --seed 1 --no-color"
        fuzz = [sys.executable, "-m", "schemathesis.cli", "run", *flags.split()]
        done = subprocess.run(
            [*fuzz, f"{server.address}/openapi.json"], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        again = server.ask("/v1/completions", {"model": "llama", "prompt": "food"})
        assert again["usage"]["prompt_tokens"] == answer["usage"]["prompt_tokens"]
        assert server.figure('adapters_jax_http_requests_total{status="500"}') == 0
        assert server.figure('adapters_jax_http_requests_total{status="400"}') > 10
