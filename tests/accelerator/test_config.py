"""Configuration: precedence of the layers, origins, strategies built from options, and every error's text."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accelerator.config import NOT_GIVEN, LaunchSettings, Resolved, Settings, resolve_settings
from accelerator.config import given as only_given
from accelerator.config.layers import flag_of, variable_of
from accelerator.config.settings import catalogue
from fresh_process import FreshProcesses
from strategies.base import Strategy
from strategies.errors import ConfigurationError


@dataclass(frozen=True)
class Options(Strategy):
    """A strategy with settings of many types."""

    flag: bool = False
    size: int = 25
    ratio: float = 1.0
    blocks: tuple[str, ...] = ()
    hook: Literal["none", "bf16"] | None = None

    def __post_init__(self) -> None:
        if self.size == 13:
            raise ConfigurationError("size is 13; expected another one")


Options.__abstractmethods__ = frozenset()  # its ten methods are of no interest here


@pytest.fixture
def options_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """`package.module:Class` of `Options`, importable as a user's module would be."""
    monkeypatch.setitem(sys.modules, "their_package", sys.modules[__name__])
    return "their_package:Options"


def resolve(
    code: dict[str, object] | None = None,
    *,
    file: str | None = None,
    environ: dict[str, str] | None = None,
    flags: dict[str, object] | None = None,
    config: str | None = None,
    directory: Path | None = None,
) -> Resolved:
    environ = dict(environ or {})
    if flags is not None:
        environ["ACCELERATOR_LAUNCH_FLAGS"] = json.dumps(flags)
    with contextlib.ExitStack() as stack:
        directory = directory or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if file is not None:
            (directory / "accelerator.toml").write_text(file, encoding="utf-8")
        return resolve_settings(code or {}, config=config, environ=environ, directory=directory)


def error(*args: Any, **kwargs: Any) -> str:
    with pytest.raises(ConfigurationError) as caught:
        resolve(*args, **kwargs)
    return str(caught.value)


def test_nothing_given_is_the_defaults() -> None:
    found = resolve()
    assert found.settings == Settings()
    assert set(found.origins.values()) == {"default"}
    assert {f"launch.{item.name}" for item in fields(LaunchSettings)} < set(found.origins)


LAYERS = ("file", "environ", "flags", "code")
CHOICES: dict[str, list[Any]] = {
    "strategy": ["auto", "cpu", "ddp", "a.b:C"],
    "mixed_precision": ["no", "bf16", "fp16"],
    "gradient_accumulation_steps": [1, 2, 7],
    "split_batches": [True, False],
    "dispatch_batches": [True, False],
    "pad_batches": [True, False],
    "seed_samples": [True, False],
    "seed": [0, 1, 2**40],
    "project_dir": ["runs", "other"],
}


@given(
    st.fixed_dictionaries(
        {},
        optional={
            layer: st.fixed_dictionaries(
                {}, optional={name: st.sampled_from(values) for name, values in CHOICES.items()}
            )
            for layer in LAYERS
        },
    )
)
@settings(max_examples=150)
def test_the_highest_layer_that_gives_a_setting_wins(layers: dict[str, dict[str, Any]]) -> None:
    found = resolve(
        layers.get("code"),
        file="".join(f"{name} = {json.dumps(value)}\n" for name, value in layers.get("file", {}).items()),
        environ={f"ACCELERATOR_{name.upper()}": str(value) for name, value in layers.get("environ", {}).items()},
        flags={name: str(value) for name, value in layers.get("flags", {}).items()},
    )
    for name in CHOICES:
        origin = {
            "file": f"accelerator.toml line {list(layers.get('file', {})).index(name) + 1}"
            if name in layers.get("file", {})
            else "",
            "environ": f"ACCELERATOR_{name.upper()}",
            "flags": "--" + name.replace("_", "-"),
            "code": "code",
        }
        winner = next((layer for layer in reversed(LAYERS) if name in layers.get(layer, {})), None)
        expected = layers[winner][name] if winner else getattr(Settings(), name)
        assert getattr(found.settings, name) == expected
        assert found.origins[name] == (origin[winner] if winner else "default")


@given(
    st.fixed_dictionaries(
        {},
        optional={
            layer: st.dictionaries(st.sampled_from(["flag", "size"]), st.integers(0, 1))
            for layer in ("file", "environ")
        },
    )
)
@settings(max_examples=50)
def test_options_of_a_strategy_merge_one_by_one(layers: dict[str, dict[str, int]]) -> None:
    rows = "".join(f"{name} = {value}\n" for name, value in layers.get("file", {}).items())
    found = resolve(
        file=f"[ddp]\n{rows}",
        environ={f"ACCELERATOR_DDP__{name.upper()}": str(value) for name, value in layers.get("environ", {}).items()},
    )
    expected = layers.get("file", {}) | {name: str(value) for name, value in layers.get("environ", {}).items()}
    assert dict(found.settings.strategy_options.get("ddp", {})) == expected


def test_an_argument_left_out_and_none_are_not_the_same() -> None:
    assert only_given(seed=None, strategy=NOT_GIVEN) == {"seed": None}
    assert resolve(only_given(seed=NOT_GIVEN), file="seed = 3").settings.seed == 3
    found = resolve(only_given(seed=None), file="seed = 3")
    assert (found.settings.seed, found.origins["seed"]) == (None, "code")


def test_none_in_a_variable_takes_a_value_back() -> None:
    assert resolve(file="seed = 3", environ={"ACCELERATOR_SEED": "none"}).settings.seed is None


def test_launch_settings_have_their_table_variables_and_flags() -> None:
    found = resolve(
        file='[launch]\nnnodes = "1:2"\nmax_restarts = 1\nnproc_per_node = 2\n',
        environ={"ACCELERATOR_LAUNCH__MAX_RESTARTS": "2", "ACCELERATOR_LAUNCH__NPROC_PER_NODE": "3"},
        flags={"launch.nproc_per_node": "4"},
    )
    assert found.settings.launch == LaunchSettings(nnodes="1:2", max_restarts=2, nproc_per_node=4)
    assert found.origins["launch.nnodes"] == "accelerator.toml line 2"
    assert found.origins["launch.max_restarts"] == "ACCELERATOR_LAUNCH__MAX_RESTARTS"
    assert found.origins["launch.nproc_per_node"] == "--nproc-per-node"


class TestWhichFile:
    def test_code_before_flag_before_variable_before_the_project_directory(self, tmp_path: Path) -> None:
        for number, name in enumerate(["code", "flag", "variable"]):
            (tmp_path / f"{name}.toml").write_text(f"seed = {number}")
        environ = {"ACCELERATOR_CONFIG": "variable.toml"}
        file, flags = "seed = 3", {"config": "flag.toml"}
        where = {"directory": tmp_path, "file": file}
        assert resolve(config="code.toml", environ=environ, flags=flags, **where).settings.seed == 0  # type: ignore[arg-type]
        assert resolve(environ=environ, flags=flags, **where).settings.seed == 1  # type: ignore[arg-type]
        assert resolve(environ=environ, **where).settings.seed == 2  # type: ignore[arg-type]
        found = resolve(environ={}, **where)  # type: ignore[arg-type]
        assert (found.settings.seed, found.origins["seed"]) == (3, "accelerator.toml line 1")

    def test_the_project_directory_before_the_current_one(self, tmp_path: Path) -> None:
        (tmp_path / "run").mkdir()
        assert resolve({"project_dir": tmp_path / "run"}, file="seed = 1", directory=tmp_path).settings.seed == 1
        (tmp_path / "run" / "accelerator.toml").write_text("\nseed = 2")
        found = resolve({"project_dir": "run"}, directory=tmp_path)
        assert (found.settings.seed, found.origins["seed"]) == (2, "run/accelerator.toml line 2")

    def test_a_named_file_that_is_not_there_is_an_error(self) -> None:
        assert error(config="gone.toml") == "config is 'gone.toml' (config=); expected the path of a TOML file."
        assert "(--config)" in error(flags={"config": "gone.toml"})
        assert "(ACCELERATOR_CONFIG)" in error(environ={"ACCELERATOR_CONFIG": "gone.toml"})


@pytest.mark.parametrize("name", ["ACCELERATOR_PROJECT_DIR", "ACCELERATOR_LAUNCH__RDZV_ID"])
def test_none_takes_a_text_back(name: str) -> None:
    settings = resolve(environ={name: "none"}).settings
    assert (settings.project_dir, settings.launch.rdzv_id) == (None, None)


class TestStrategy:
    def test_options_build_the_dataclass(self, options_path: str) -> None:
        table = f'strategy = "{options_path}"\n["{options_path}"]\nflag = true\nratio = 2\nblocks = ["A", "B"]\n'
        found = resolve(file=table)
        assert found.strategy_for(options_path) == Options(flag=True, ratio=2.0, blocks=("A", "B"))
        assert found.origins[f"{options_path}.blocks"] == "accelerator.toml line 5"

    def test_text_is_parsed_to_the_type_of_the_field(self, options_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("strategies.registry.BUILT_IN", {"ddp": options_path})
        found = resolve(
            {"strategy": "ddp"},
            file='[ddp]\nhook = "bf16"\nsize = 3\n',
            environ={
                "ACCELERATOR_DDP__FLAG": "true",
                "ACCELERATOR_DDP__BLOCKS": '["A"]',
                "ACCELERATOR_DDP__SIZE": "4",
                "ACCELERATOR_DDP__HOOK": "none",
            },
        )
        assert found.strategy_for("ddp") == Options(flag=True, size=4, blocks=("A",), hook="none")

    def test_options_of_another_strategy_may_stand_in_the_file(self, options_path: str) -> None:
        found = resolve({"strategy": options_path}, file=f'[ddp]\nanything = 1\n["{options_path}"]\nsize = 2\n')
        assert found.strategy_for(options_path) == Options(size=2)

    def test_auto_is_built_under_the_name_it_came_to(self, options_path: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("strategies.registry.BUILT_IN", {"cpu": "gone:Gone", "ddp": options_path})
        assert resolve(file="[ddp]\nsize = 9\n").strategy_for("ddp") == Options(size=9)

    def test_a_class_in_code_takes_its_options_from_the_other_layers(self) -> None:
        name = f"{Options.__module__}:Options"
        found = resolve({"strategy": Options}, file=f'["{name}"]\nsize = 2\n')
        assert (found.settings.strategy, found.origins["strategy"]) == (name, "code")
        assert found.strategy_for(name) == Options(size=2)

    def test_a_built_in_class_in_code_goes_by_its_short_name(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("strategies.registry.BUILT_IN", {"ddp": f"{Options.__module__}:Options"})
        assert resolve({"strategy": Options}, file="[ddp]\nsize = 2").strategy_for("ddp") == Options(size=2)

    def test_an_instance_in_code_is_used_as_it_is(self) -> None:
        name, mine = f"{Options.__module__}:Options", Options(size=7)
        found = resolve({"strategy": mine}, file=f'["{name}"]\nsize = 2\n')
        assert found.strategy_for(found.settings.strategy) is mine
        assert f"{name}.size" not in found.origins

    def test_unknown_and_ill_typed_options(self, options_path: str) -> None:
        def failure(row: str) -> str:
            found = resolve({"strategy": options_path}, file=f'["{options_path}"]\n{row}\n')
            with pytest.raises(ConfigurationError) as caught:
                found.strategy_for(options_path)
            return str(caught.value)

        assert failure("sizes = 1") == (
            "their_package:Options.sizes is set (accelerator.toml line 2), but Options has no such setting; "
            "expected one of flag, size, ratio, blocks, hook. Did you mean 'size'?"
        )
        assert failure('size = "1"') == (
            "their_package:Options.size is '1' (accelerator.toml line 2); expected an integer."
        )
        assert failure("blocks = 1").endswith("is 1 (accelerator.toml line 2); expected a list of text.")
        assert failure('hook = "bf61"').endswith("expected one of 'none', 'bf16' or none. Did you mean 'bf16'?")
        assert failure("size = 13") == (
            "strategy 'their_package:Options' cannot be built (size from accelerator.toml line 2): "
            "size is 13; expected another one"
        )


class TestErrors:
    def test_unknown_key(self) -> None:
        text = error(file="\nsed = 1\n")
        assert text.startswith("accelerator.toml line 2 has an unknown setting 'sed'; expected a setting (strategy, ")
        assert text.endswith("Did you mean 'seed'?")

    def test_unknown_table(self) -> None:
        text = error(file="seed = 1\n\n[dpp]\nx = 1\n")
        assert text.startswith("accelerator.toml line 3 has an unknown table 'dpp'; ")
        assert text.endswith("Did you mean 'ddp'?")

    def test_unknown_launch_key(self) -> None:
        text = error(file="[launch]\n\nnproc = 2\n")
        assert text.startswith("accelerator.toml line 3 has an unknown key 'nproc' in [launch]; expected one of nproc_")
        assert error(file="[launch]\nnode = 2\n").endswith("Did you mean 'nnodes'?")

    def test_a_value_where_a_table_belongs(self) -> None:
        assert error(file="ddp = 3") == (
            "ddp is 3 (accelerator.toml line 1); expected a table: [ddp] and a line per option."
        )

    def test_wrong_types_in_the_file_are_not_converted(self) -> None:
        assert error(file='seed = "3"') == ("seed is '3' (accelerator.toml line 1); expected an integer >= 0 or none.")
        assert error(file="split_batches = 1") == (
            "split_batches is 1 (accelerator.toml line 1); expected true or false."
        )
        assert "expected an integer >= 1." in error(file="gradient_accumulation_steps = true")
        assert error(file="project_dir = 1979-05-27").endswith("(accelerator.toml line 1); expected text or none.")

    def test_toml_syntax(self) -> None:
        text = error(file="seed = 1\nstrategy = ddp\n")
        assert text.startswith("accelerator.toml is not valid TOML: ")
        assert "line 2" in text

    def test_unknown_variables(self) -> None:
        text = error(environ={"ACCELERATOR_SED": "1"})
        assert text.startswith("ACCELERATOR_SED is set, but no setting has that name; expected one of ACCELERATOR_STR")
        assert text.endswith("Did you mean 'ACCELERATOR_SEED'? Unset it or correct its name.")
        assert "Did you mean 'ACCELERATOR_LAUNCH__NNODES'?" in error(environ={"ACCELERATOR_LAUNCH__NODES": "1"})
        assert "Did you mean 'ACCELERATOR_DDP__X'?" in error(environ={"ACCELERATOR_DPP__X": "1"})

    def test_wrong_values_in_variables_and_flags(self) -> None:
        assert error(environ={"ACCELERATOR_GRADIENT_ACCUMULATION_STEPS": "0"}) == (
            "gradient_accumulation_steps is '0' (ACCELERATOR_GRADIENT_ACCUMULATION_STEPS); expected an integer >= 1."
        )
        assert error(flags={"mixed_precision": "bf61"}) == (
            "mixed_precision is 'bf61' (--mixed-precision); expected one of 'no', 'bf16', 'fp16'. Did you mean 'bf16'?"
        )
        assert error(flags={"launch.nnodes": "2:"}) == (
            "launch.nnodes is '2:' (--nnodes); expected a number of nodes >= 1, or MIN:MAX."
        )

    def test_flags_that_no_launcher_wrote(self) -> None:
        for text in ("{", "[]", '{"sed": 1}'):
            assert error(environ={"ACCELERATOR_LAUNCH_FLAGS": text}) == (
                f"ACCELERATOR_LAUNCH_FLAGS is {text!r}; expected what `accelerator launch` writes there. "
                "It is no setting: unset it."
            )

    def test_wrong_values_in_code(self) -> None:
        assert error({"gradient_accumulation_steps": 0}) == (
            "gradient_accumulation_steps is 0 (code); expected an integer >= 1."
        )
        assert error({"gradient_accumulation_steps": True}).endswith("is True (code); expected an integer >= 1.")
        assert error({"seed": "3"}) == "seed is '3' (code); expected an integer >= 0 or none."
        assert error({"sed": 3}).endswith("Did you mean 'seed'?")
        assert error({"strategy": 3}) == (
            "strategy is 3 (code); expected a name, a subclass of Strategy or an instance of one."
        )

    def test_strategy_with_a_typo(self) -> None:
        text = error(environ={"ACCELERATOR_STRATEGY": "dpp"})
        assert re.fullmatch(
            r"strategy is 'dpp' \(ACCELERATOR_STRATEGY\); expected one of auto, .*, or 'package.module:Class'. "
            r"Did you mean 'ddp'\?",
            text,
        )

    def test_contradiction_names_both_origins(self) -> None:
        text = error({"global_batch_size": 64}, file="gradient_accumulation_steps = 4")
        assert text == (
            "gradient_accumulation_steps is 4 (accelerator.toml line 1) and global_batch_size is 64 (code); "
            "expected one of the two, since each gives the other. Remove one."
        )
        assert resolve({"global_batch_size": None}, file="gradient_accumulation_steps = 4")


@pytest.mark.parametrize(
    ("text", "name", "line"),
    [
        ("# a\nddp.size = 3\n", "ddp.size", 2),
        ("seed=1\nddp = { flag = true, size = 3 }\n", "ddp.size", 2),
        ("[ddp]\nflag = true\n'size' = 3\n[launch]\n", "ddp.size", 3),
        ('[launch]\nmax_restarts = 1\n["a.b:C"]\nsize = 1\n', "a.b:C.size", 4),
    ],
)
def test_lines_are_found_in_every_spelling_of_toml(text: str, name: str, line: int) -> None:
    assert resolve(file=text).origins[name] == f"accelerator.toml line {line}"


def test_importing_configuration_is_cheap(fresh: FreshProcesses) -> None:
    (finished,) = fresh(
        "import sys, accelerator.config\nprint('pydantic' in sys.modules, 'rich' in sys.modules)", nproc=1
    )
    assert finished.stdout.split() == ["False", "False"]


def test_the_reference_page_lists_every_setting_with_its_flag_variable_default_and_meaning() -> None:
    page = Path(__file__).parents[2].joinpath("docs/reference/configuration.md").read_text(encoding="utf-8")
    shown = {"None": "none", "False": "false", "True": "true", "": '""', "('jsonl',)": '["jsonl"]'}
    for name, (item, _) in catalogue().items():
        default = shown.get(str(item.default), str(item.default))
        row = [name.rpartition(".")[2], flag_of(name), variable_of(name), default]
        assert "| " + " | ".join(f"`{cell}`" for cell in row) + f" | {item.metadata['help']} |\n" in page


def test_a_seed_that_no_generator_takes_is_refused() -> None:
    assert resolve({"seed": 2**64 - 1}).settings.seed == 2**64 - 1
    with pytest.raises(
        ConfigurationError, match=r"seed is 18446744073709551616 \(code\); expected an integer >= 0 and <="
    ):
        resolve({"seed": 2**64})
