"""Which devices a config gets where there are few, in a process of its own that has one device."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import jax
jax.config.update("jax_platforms", "cpu")
assert len(jax.devices()) == 1  # as in a notebook that has looked
from pdjax.config import Config, DecodeConfig
from pdjax.config.load import load_config
from pdjax.device.devices import deal_devices, settled

def outcome(config):
    try:
        config = settled(config)
        return config.colocated, *map(len, deal_devices(config))
    except ValueError as error:
        return str(error)

print(outcome(load_config("smollm2")))
print(outcome(load_config("smollm2", {"decode.stages": 2})))
print(outcome(Config()))
"""


@pytest.mark.smoke
def test_one_device_serves_a_preset_and_an_explicit_config_is_told_what_it_lacks(tmp_path):
    env = {"XDG_CACHE_HOME": str(tmp_path), "PATH": ""}
    command = [sys.executable, "-c", SCRIPT]
    ran = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=250
    )
    assert ran.returncode == 0, ran.stderr
    preset, staged, explicit = ran.stdout.splitlines()
    assert preset == "(True, 1, 1)"
    assert ran.stderr == (
        "colocated: prefill and decode share one mesh, as in the preset smollm2_colocated, since "
        "meshes of their own need 2 devices, and this process has 1\n"
    )
    for message in staged, explicit:
        assert "but this process has 1 (cpu); lower prefill.engines" in message
        assert "colocated=True, as the preset smollm2_colocated does" in message
