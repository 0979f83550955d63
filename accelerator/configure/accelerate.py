"""From a configuration of Hugging Face Accelerate to settings of ours, with an account of every key."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from strategies.errors import ConfigurationError, nearest

from .accelerate_fsdp import FSDP, XLA, XLA_SETTINGS
from .accelerate_keys import DEEPSPEED, DYNAMO, KINDS, MACHINE, PARALLELISM, strategy_for
from .outcome import Document, Outcome, Rule, is_off, lost, needless, number

SECTIONS: Mapping[str, tuple[str, Mapping[str, Rule]]] = {
    "fsdp_config": ("fsdp_", {**FSDP, **XLA}),
    "dynamo_config": ("dynamo_", DYNAMO),
    "parallelism_config": ("", PARALLELISM),
    "deepspeed_config": ("", DEEPSPEED),
    "xla_fsdp_settings": ("", XLA_SETTINGS),
}
"""The tables inside the file: the prefix that a key may leave out, and what becomes of each key."""

UNBUILT: Mapping[str, str] = {
    "fp8_config": "fp8 is not built",
    "ipex_config": "Intel's extension of PyTorch is no longer made; what it did for CPUs is in torch",
    "megatron_lm_config": "Megatron-LM does not run here",
    "tp_config": "tensor parallelism is not built",
    "mpirun_config": "processes are started by torch's elastic agent, or by SLURM, without mpirun",
}
"""Tables of which no key has a place here, with the reason."""

READ_BY: Mapping[str, str] = {"deepspeed_config": "DEEPSPEED", "megatron_lm_config": "MEGATRON_LM", "tp_config": "TP"}
"""Tables that Accelerate reads for one `distributed_type` alone."""

SAGEMAKER = frozenset({
    "ec2_instance_type", "iam_role_name", "image_uri", "profile", "region", "base_job_name", "pytorch_version",
    "transformers_version", "py_version", "sagemaker_inputs_file", "sagemaker_metrics_file", "additional_args",
})  # fmt: skip


@dataclass(frozen=True)
class Fate:
    """What became of one key, `fsdp_config.fsdp_offload_params` for one."""

    key: str
    value: object
    outcome: Outcome

    def __str__(self) -> str:
        values = ", ".join(f"{name} = {value!r}" for name, value in self.outcome.values.items())
        return f"{self.value!r} -> " + "; ".join(filter(None, [values or self.outcome.kind, self.outcome.words]))


@dataclass(frozen=True)
class Conversion:
    """`values` are settings by dotted name; `fates` has every key of the file, in its order."""

    values: Mapping[str, object]
    fates: tuple[Fate, ...]

    @property
    def losses(self) -> tuple[Fate, ...]:
        """The keys that have no equivalent."""
        return tuple(fate for fate in self.fates if fate.outcome.kind == "no equivalent")

    def __str__(self) -> str:
        """A line per key: what it was, what became of it, and why."""
        width = max((len(fate.key) for fate in self.fates), default=0)
        return "\n".join(f"{fate.key:<{width}}  {fate}" for fate in self.fates)


def convert(text: str, name: str) -> Conversion:
    """Read `text`, the YAML of a file called `name` in errors.

    Raises `ConfigurationError` if it is no such configuration, has a key that Accelerate does not know, or
    contradicts itself.
    """
    table = _read(text, name)
    document = _document(table, name)
    fates = [fate for key, value in table.items() for fate in _fates(key, value, document)]
    if document.is_on_xla:
        recomputes = any("xla.activation_checkpointing" in fate.outcome.values for fate in fates)
        fates = [_on_xla(fate, recomputes=recomputes) for fate in fates]
    values: dict[str, object] = {}
    for fate in fates:
        values.update(fate.outcome.values)
    if document.is_on_xla:  # whichever of the two keys came later
        values["strategy"] = "xla"
    return Conversion(values, tuple(fates))


def _read(text: str, name: str) -> dict[str, Any]:
    try:
        import yaml
    except ImportError as error:
        raise ConfigurationError(
            f"{name} cannot be read without PyYAML, which is not installed. pip install 'torch-accelerator[convert]'"
        ) from error
    try:
        table = yaml.safe_load(text)
        again = _repeated(yaml.compose(text, Loader=yaml.SafeLoader))
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{name} is not YAML: {' '.join(str(error).split())}") from error
    if again is not None:
        raise ConfigurationError(f"{name} says {again} twice; expected each key once. Take one of them out.")
    if not (isinstance(table, dict) and all(isinstance(key, str) for key in table)):
        what = "nothing" if table is None else f"a {type(table).__name__}"
        raise ConfigurationError(
            f"{name} holds {what}; expected keys and values, as `accelerate config` writes them to "
            "~/.cache/huggingface/accelerate/default_config.yaml."
        )
    return table


def _repeated(node: Any) -> str | None:
    """The first key that a mapping of a YAML tree has twice; YAML itself takes the last."""
    to_do, done = [node], set()
    while to_do:
        node = to_do.pop()
        if id(node) in done or not isinstance(getattr(node, "value", None), list):
            continue
        done.add(id(node))
        seen = set()
        for item in node.value:
            key, below = item if isinstance(item, tuple) else (None, item)
            to_do.append(below)
            if key is not None and isinstance(key.value, str):
                if key.value in seen:
                    return f"{key.value} (line {key.start_mark.line + 1})"
                seen.add(key.value)
    return None


def _refuse_both_names(table: Mapping[str, Any], name: str) -> None:
    for section, (prefix, rules) in SECTIONS.items():
        names = [_full(str(key).removeprefix("parallelism_config_"), prefix, rules) for key in table.get(section) or {}]
        twice = next((full for full in names if names.count(full) > 1), None)
        if twice is not None:
            raise ConfigurationError(
                f"{section} says {twice} twice ({name}), with and without its prefix; expected it once. Take one out."
            )


def _document(table: Mapping[str, Any], name: str) -> Document:
    if "distributed_type" not in table:
        raise ConfigurationError(
            f"{name} has no distributed_type, which every configuration of Accelerate has; it has "
            f"{', '.join(list(table)[:8]) or 'no keys'}. Is it another file?"
        )
    kind = table["distributed_type"]
    kind = "NO" if kind is False else str(kind)  # `NO` without quotes is a boolean in YAML
    sagemaker = table.get("compute_environment") == "AMAZON_SAGEMAKER"
    if kind not in KINDS and not sagemaker:
        raise ConfigurationError(
            f"distributed_type is {kind!r} ({name}); expected one of {', '.join(KINDS)}.{nearest(kind, KINDS)}"
        )
    for section in (*SECTIONS, *UNBUILT):
        if not isinstance(table.get(section) or {}, dict):
            raise ConfigurationError(f"{section} is {table[section]!r} ({name}); expected keys and values under it.")
        strange = [key for key in table.get(section) or {} if not isinstance(key, str)]
        if strange:
            raise ConfigurationError(
                f"{section} has the key {strange[0]!r} ({name}); expected words. Correct it or take it out."
            )
    _refuse_both_names(table, name)
    machines = number("num_machines", table.get("num_machines") or 1)
    parallelism = table.get("parallelism_config") or {}
    return Document(
        name=name,
        table=table,
        kind=kind,
        strategy=None if sagemaker else strategy_for(kind, not is_off(table.get("use_cpu"))),
        machines=max(1, machines),
        fsdp={_full(key, "fsdp_", {**FSDP, **XLA}): value for key, value in (table.get("fsdp_config") or {}).items()},
        parallelism={key.removeprefix("parallelism_config_"): value for key, value in parallelism.items()},
    )


def _fates(key: str, value: Any, document: Document) -> Iterator[Fate]:
    if document.table.get("compute_environment") == "AMAZON_SAGEMAKER" and (key in SAGEMAKER or key in MACHINE):
        outcome = MACHINE[key](value, document) if key == "mixed_precision" else lost("no jobs are sent to SageMaker")
        yield Fate(key, value, outcome)
    elif key in SECTIONS or key in UNBUILT:
        if not value:
            yield Fate(key, value, needless("asks for nothing"))
        for inner, below in (value or {}).items():
            yield from _inside(key, str(inner), below, document)
    elif key == "dynamo_backend":  # older files have it outside of dynamo_config
        yield Fate(key, value, DYNAMO[key](value, document))
    elif key in MACHINE or key in XLA:
        yield Fate(key, value, {**MACHINE, **XLA}[key](value, document))
    else:
        known = [*MACHINE, *XLA, *SECTIONS, *UNBUILT]
        raise ConfigurationError(
            f"{key} ({document.name}) is no key of Accelerate's configuration.{nearest(key, known)} "
            "Correct it or take it out."
        )


def _inside(section: str, key: str, value: Any, document: Document) -> Iterator[Fate]:
    shown = f"{section}.{key}"
    ignored = READ_BY.get(section, document.kind) != document.kind
    if section in UNBUILT:
        if ignored:
            outcome = _unread(document)
        elif all(is_off(each) for each in document.table[section].values()):  # `ipex: false`, as of the questionnaire
            outcome = needless("asks for nothing")
        else:
            outcome = lost(UNBUILT[section])
        yield Fate(shown, value, outcome)
        return
    if section == "fsdp_config" and key == "xla_fsdp_settings":
        for inner, below in (value or {}).items():
            yield from (
                Fate(f"{section}.{fate.key}", fate.value, fate.outcome)
                for fate in _inside(key, str(inner), below, document)
            )
        if not value:
            yield Fate(shown, value, needless("asks for nothing"))
        return
    prefix, rules = SECTIONS[section]
    full = _full(key.removeprefix("parallelism_config_"), prefix, rules)
    if full not in rules:
        raise ConfigurationError(
            f"{shown} ({document.name}) is no key of Accelerate's configuration.{nearest(key, rules)} "
            "Correct it or take it out."
        )
    if ignored or (section == "fsdp_config" and document.strategy not in ("fsdp", "xla")):
        yield Fate(shown, value, _unread(document))
        return
    yield Fate(shown, value, rules[full](value, document))


def _unread(document: Document) -> Outcome:
    return needless(f"distributed_type {document.kind} does not read it")


def _full(key: str, prefix: str, rules: Mapping[str, Rule]) -> str:
    return key if key in rules else prefix + key


def _on_xla(fate: Fate, *, recomputes: bool) -> Fate:
    """One program cuts every parameter by itself: beside `xla: true`, blocks are only what may be computed again."""
    told = {name: value for name, value in fate.outcome.values.items() if name.startswith("fsdp.")}
    if not told:
        return fate
    names = ("fsdp.transformer_layer_cls", "fsdp.min_num_params") if recomputes else ()
    kept = {name.replace("fsdp.", "xla."): value for name, value in told.items() if name in names}
    words = "xla cuts every parameter by itself; it has no blocks to tell this"
    return Fate(fate.key, fate.value, Outcome("converted", "of blocks computed again", kept) if kept else lost(words))
