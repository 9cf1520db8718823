"""Overrides of a config that an experiment makes itself, as in `--config.decode.stages=2`."""

from absl import flags

_NAME = "config.FIELD"


def define_config_fields(values: flags.FlagValues) -> None:
    """Add the flag for overrides to flags that have no `--config`."""
    flags.DEFINE_multi_string(
        _NAME, [], "override a field of the config; may be repeated", flag_values=values
    )


def config_fields(values: flags.FlagValues) -> dict[str, str]:
    """Return the overrides of a parsed command line: field, such as `decode.stages`, to value."""
    return dict(item.split("=", 1) for item in values[_NAME].value or ())
