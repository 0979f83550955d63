"""The command line: what is the launcher's, what is the script's, and what is wrong."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from accelerator.config.settings import catalogue
from accelerator.launch.flags import Request, flag_names, help_text, parse
from strategies.errors import LaunchError


def test_flags_before_the_script_are_ours_and_what_follows_is_not() -> None:
    found = parse(["--nproc-per-node", "2", "--seed=3", "train.py", "--seed", "4", "-m", "--", "--help"])
    assert found == Request(
        target="train.py",
        arguments=("--seed", "4", "-m", "--", "--help"),
        flags={"launch.nproc_per_node": "2", "seed": "3"},
    )


SWITCHES = {flag for flag, name in flag_names().items() if catalogue().get(name, (None, None))[1] is bool}


@given(st.lists(st.text()))
def test_arguments_of_the_script_are_never_touched(arguments: list[str]) -> None:
    assert parse(["--nnodes", "1", "train.py", *arguments]).arguments == tuple(arguments)


@given(
    st.dictionaries(st.sampled_from(sorted(set(flag_names()) - SWITCHES)), st.text()),
    st.booleans(),
)
def test_every_flag_takes_its_value_from_the_next_word_or_after_an_equals_sign(
    flags: dict[str, str], joined: bool
) -> None:
    words = [word for flag, value in flags.items() for word in ([f"{flag}={value}"] if joined else [flag, value])]
    assert parse([*words, "t.py"]).flags == {flag_names()[flag]: value for flag, value in flags.items()}


def test_every_setting_has_a_flag_and_a_line_of_help() -> None:
    assert set(flag_names().values()) == {*catalogue(), "config"}
    assert len(flag_names()) == len(catalogue()) + 1
    for flag in flag_names():
        assert f"  {flag} " in help_text()


def test_modules_switches_underscores_and_the_double_dash() -> None:
    assert parse(["-m", "pkg.train", "-m"]) == Request(target="pkg.train", is_module=True, arguments=("-m",))
    assert parse(["--module", "--split-batches", "pkg.train"]).flags == {"split_batches": "true"}
    assert parse(["--split-batches=false", "t.py"]).flags == {"split_batches": "false"}
    assert parse(["--nproc_per_node", "2", "--", "--odd.py", "x"]) == Request(
        target="--odd.py", arguments=("x",), flags={"launch.nproc_per_node": "2"}
    )
    assert parse(["--help", "t.py"]).wants_help


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--nproc", "2", "t.py"], "--nproc is not a flag of accelerator launch. Did you mean '--nproc-per-node'? Fl"),
        (["--sede=1", "t.py"], "--sede=1 is not a flag of accelerator launch. Did you mean '--seed'? Flags of the sc"),
        (["-x", "t.py"], "-x is not a flag of accelerator launch. Flags of the script come after the script; acc"),
        (["--seed"], "--seed has no value; expected --seed VALUE before the script."),
        ([], "no script was named; expected accelerator launch [flags] script.py"),
        (["-m"], "no module was named; expected accelerator launch [flags]"),
    ],
)
def test_errors(words: list[str], message: str) -> None:
    with pytest.raises(LaunchError) as caught:
        parse(words)
    assert str(caught.value).startswith(message)
