"""The shapes of a config's model; no weights are read."""

from pdjax.config import Config
from pdjax.core.model_spec import ModelSpec
from pdjax.device.checkpoints.open import open_checkpoint
from pdjax.sim.calibration import Calibration


def spec_of(config: Config, calibration: Calibration, assumed: bool) -> ModelSpec:
    """The shapes of the model that is simulated.

    Args:
      assumed: take them to be those of the calibration, without opening the model.

    Raises:
      ValueError: a model that the calibration is not of, or that cannot be opened.
    """
    if assumed:
        context = config.model.max_model_len or 8192
        return calibration.spec(context)
    spec = opened_spec(config)
    dtype = config.model.dtype
    kv_dtype = config.decode.kv_dtype or config.kv.dtype or dtype
    calibration.check_model(spec, dtype, kv_dtype)
    return spec


def opened_spec(config: Config) -> ModelSpec:
    """The shapes of a config's model, whatever they are.

    Raises:
      ValueError: the model cannot be opened.
    """
    return config.model.spec or open_checkpoint(config.model.source).spec
