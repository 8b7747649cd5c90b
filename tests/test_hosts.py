"""The processes of a job, from the environment or arguments, and mistakes in either."""

import jax
import pytest
from helpers.errors import raises

import adapters_jax as aj
from adapters_jax.distributed.hosts import COORDINATOR, PROCESS, PROCESSES, join_hosts


@pytest.fixture
def called(monkeypatch):
    """What jax is asked to join, instead of joining it."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: calls.append((a, k)))
    for name in (COORDINATOR, PROCESS, PROCESSES):
        monkeypatch.delenv(name, raising=False)
    return calls


def test_the_environment_or_arguments_number_the_processes(called, monkeypatch):
    assert join_hosts("10.0.0.1:1234", 4, 0) is False  # as far as this process's jax knows
    monkeypatch.setenv(COORDINATOR, "host:99")
    monkeypatch.setenv(PROCESSES, "2")
    monkeypatch.setenv(PROCESS, "1")
    join_hosts(heartbeat_seconds=5)
    beat = "heartbeat_timeout_seconds"
    assert called == [(("10.0.0.1:1234", 4, 0), {beat: 20}), (("host:99", 2, 1), {beat: 5})]


def test_what_is_missing_is_named(called, monkeypatch):
    monkeypatch.setenv(PROCESSES, "2")
    with raises(aj.UserError, f"{COORDINATOR}, {PROCESS} is", f"{PROCESSES}=2"):
        join_hosts()
    monkeypatch.setenv(PROCESSES, "two")
    with raises(aj.UserError, f"{PROCESSES}='two'"):
        join_hosts()
    assert not called


def test_alone_there_is_nothing_to_join(called, monkeypatch):
    def nobody(**options):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", nobody)
    assert join_hosts() is False

    def broken(**options):
        raise ValueError("something else")

    monkeypatch.setattr(jax.distributed, "initialize", broken)
    with raises(ValueError, "something else") as caught:
        join_hosts()
    assert not isinstance(caught.value, aj.UserError)


def test_processes_that_are_joined_already_are_left_alone(called, monkeypatch):
    monkeypatch.setattr(jax.distributed, "is_initialized", lambda: True)
    monkeypatch.setenv(PROCESSES, "2")
    assert join_hosts() is False and not called
