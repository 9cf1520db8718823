"""The flags of experiments that play workloads to modes."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from absl import flags

from experiments.common.config_fields import config_fields, define_config_fields
from experiments.common.study import SIZES, Server, Study, base_config
from pdjax.bench.modes import MODES
from pdjax.config import Config
from pdjax.config.load import load_config
from pdjax.core.slo import SLO
from pdjax.device.compat import use_virtual_cpu_devices
from pdjax.explain.model import spec_of
from pdjax.flags import new_flags
from pdjax.sim.calibration import Calibration


def study_flags(name: str, modes: tuple[str, ...] = tuple(MODES)) -> flags.FlagValues:
    """Make the flags that such experiments have.

    Args:
      name: of the experiment.
      modes: that are compared unless others are given.
    """
    values = new_flags()
    of: dict[str, Any] = {"flag_values": values}
    flags.DEFINE_enum(
        "backend", "sim", ["sim", "engine"], "simulated engines, or those of this process", **of
    )
    flags.DEFINE_string("url", None, "drive a server with OpenAI's API instead of modes", **of)
    flags.DEFINE_string("label", "server", "what that server is called in results", **of)
    flags.DEFINE_integer("vocab_size", 1000, "token ids for it are below this", **of)
    flags.DEFINE_integer("num_gpu", None, "chips that it has", **of)
    flags.DEFINE_string("costs", "h200", "what simulated steps take: a calibration or a file", **of)
    flags.DEFINE_multi_enum("modes", list(modes), list(MODES), "what is compared", **of)
    flags.DEFINE_enum(
        "size", None, list(SIZES), "of model and requests; small with engines on a CPU", **of
    )
    flags.DEFINE_string("config", None, "file with the disaggregated config of all modes", **of)
    define_config_fields(values)
    flags.DEFINE_string("input_len", None, "tokens of prompts, as 512 or 100-2000", **of)
    flags.DEFINE_string("output_len", None, "tokens of answers, likewise", **of)
    flags.DEFINE_string("prefix_len", None, "tokens of shared prefixes before prompts", **of)
    flags.DEFINE_integer("prefix_groups", 8, "how many prefixes there are", **of)
    flags.DEFINE_float("prefix_share", 1.0, "of the requests that have one", **of)
    flags.DEFINE_integer("requests", None, "of a run", **of)
    flags.DEFINE_float("ttft", None, "milliseconds to the first token of a good request", **of)
    flags.DEFINE_float("tpot", None, "milliseconds a token after it", **of)
    flags.DEFINE_integer("seed", 0, "the first seed of arrivals and lengths", **of)
    flags.DEFINE_integer("seeds", 3, "how many; latencies are means over them", **of)
    flags.DEFINE_bool("records", False, "write a line for each request, too", **of)
    flags.DEFINE_string("out", f"results/{name}", "folder to write", **of)
    return values


def study_of(values: flags.FlagValues, prefix: Mapping[str, str] | None = None) -> Study:
    """What parsed flags ask for.

    Args:
      prefix: the length of shared prefixes by size, where the flags give none.

    Raises:
      ValueError: a value out of range, or a config that cannot work.
    """
    flag: dict[str, Any] = {name: values[name].value for name in values}
    if flag["seeds"] < 1:
        raise ValueError(f"seeds={flag['seeds']}: must be at least 1")
    backend = "url" if flag["url"] else flag["backend"]
    name = _size(flag, backend, values)
    size = SIZES[name]
    base = _base(flag, name, values)
    server = None
    if backend == "url":
        server = Server(flag["url"], flag["vocab_size"], flag["num_gpu"], flag["label"])
    ttft, tpot = flag["ttft"] or size.ttft_ms, flag["tpot"] or size.tpot_ms
    return Study(
        backend=backend,
        size=name,
        input_len=flag["input_len"] or size.input_len,
        output_len=flag["output_len"] or size.output_len,
        slo=SLO(ttft=ttft / 1e3, tpot=tpot / 1e3),
        base=base,
        modes=(flag["label"],) if server else tuple(flag["modes"]),
        seeds=tuple(range(flag["seed"], flag["seed"] + flag["seeds"])),
        calibration=_calibration(flag["costs"], base) if backend == "sim" else None,
        server=server,
        prefix_len=flag["prefix_len"] or (prefix or {}).get(name),
        prefix_groups=flag["prefix_groups"],
        prefix_share=flag["prefix_share"],
        keep=bool(flag["records"]),
    )


def _calibration(name: str, base: Config) -> Calibration:
    """What steps were measured to take, which must be of the model that is served."""
    found = Calibration.load(name)
    spec_of(base, found, assumed=False)
    return found


def _base(flag: dict[str, Any], name: str, values: flags.FlagValues) -> Config:
    given = flag["config"]
    base = load_config(given) if given else base_config(SIZES[name])
    return load_config(base, config_fields(values))


def _size(flag: dict[str, Any], backend: str, values: flags.FlagValues) -> str:
    """The size that is asked for; else small where engines of this process run on a CPU, which is
    told by a message. JAX starts with as many devices as the modes need."""
    if backend != "engine":
        return flag["size"] or "full"
    use_virtual_cpu_devices(_base(flag, flag["size"] or "small", values).devices)
    if flag["size"] is not None:
        return flag["size"]
    if jax.default_backend() != "cpu":
        return "full"
    print("size: small, since JAX runs on the CPU; --size takes others", flush=True)
    return "small"


def requests_of(
    values: flags.FlagValues, usual: Mapping[str, int], study: Study, name: str = "requests"
) -> int:
    """Requests of a run: as `--requests` says, else those that are usual for a size.

    Raises:
      ValueError: fewer than one.
    """
    count = values[name].value
    count = usual[study.size] if count is None else count
    if count < 1:
        raise ValueError(f"{name}={count}: must be at least 1")
    return count


def numbers_of(
    values: flags.FlagValues, name: str, usual: Mapping[str, Sequence[float]], study: Study
) -> list[float]:
    """The positive numbers of a flag that is a list, in order; else those that are usual for a
    size.

    Raises:
      ValueError: what is no positive number.
    """
    given = values[name].value
    if not given:
        return list(usual[study.size])
    try:
        found = sorted({float(each) for each in given})
    except ValueError as error:
        raise ValueError(f"{name}={','.join(given)}: must be numbers") from error
    if not 0 < found[0] <= found[-1] < float("inf"):
        raise ValueError(f"{name}={','.join(given)}: must be more than 0, and finite")
    return found


def number_of(
    values: flags.FlagValues, name: str, usual: Mapping[str, float], study: Study
) -> float:
    """The positive number of a flag; else the one that is usual for a size.

    Raises:
      ValueError: it is not positive.
    """
    given = values[name].value
    found: float = usual[study.size] if given is None else given
    if not 0 < found < float("inf"):
        raise ValueError(f"{name}={found}: must be more than 0, and finite")
    return found
